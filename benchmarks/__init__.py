"""Benchmarks beside peers, and their dated results. Scripts are run as files, ``gpu`` as ``python -m benchmarks.gpu``."""
