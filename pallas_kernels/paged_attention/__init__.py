"""Attention of new tokens to a paged KV cache: decode, chunks of a prefill, and both in one call."""
from pallas_kernels.paged_attention.op import paged_attention
from pallas_kernels.paged_attention.reference import BLOCK, paged_attention_reference

__all__ = ["BLOCK", "paged_attention", "paged_attention_reference"]
