"""What makes, trains and measures the models that ship in the package; ``tools/train_demo.py`` is its command."""
