"""Prefill attention: the reference that defines it, and kernels for NVIDIA Hopper and TPUs."""
from pallas_kernels.flash_attention.op import flash_attention
from pallas_kernels.flash_attention.reference import MASKED, attention_mask, flash_attention_reference, soft_cap

__all__ = ["MASKED", "attention_mask", "flash_attention", "flash_attention_reference", "soft_cap"]
