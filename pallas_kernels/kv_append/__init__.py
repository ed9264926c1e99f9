"""Writing new keys and values into a KV cache: the reference that defines it, and a kernel for TPUs."""
from pallas_kernels.kv_append.op import kv_append
from pallas_kernels.kv_append.reference import as_bits, from_bits, kv_append_reference, quantize_entries, scatter_entries

__all__ = ["as_bits", "from_bits", "kv_append", "kv_append_reference", "quantize_entries", "scatter_entries"]
