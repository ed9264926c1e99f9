"""Attention of new tokens to a paged KV cache."""
from pallas_kernels.paged_attention.reference import BLOCK, paged_attention_reference

__all__ = ["BLOCK", "paged_attention_reference"]
