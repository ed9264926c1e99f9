"""Checkpoints: finding and opening them, whether they fit, and loading their weights by shard.

Nothing is imported here: a job that only looks at its files begins without JAX.
"""
