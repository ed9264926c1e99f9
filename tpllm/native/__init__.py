"""Kernels for CPUs, called inside jitted programs through XLA's foreign function interface and run on XLA's own threads.

Their definitions are the references in ``pallas_kernels``; ``csrc`` holds them in C++, one source for every instruction set.
"""
from tpllm.native.library import instruction_set, is_available

__all__ = ["instruction_set", "is_available"]
