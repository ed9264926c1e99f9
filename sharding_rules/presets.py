"""The rule sets most meshes need."""
from sharding_rules.axes import BATCH, EXPERT_MLP, EXPERTS, HEADS, KV_HEADS, MLP, VOCAB
from sharding_rules.rules import Rules

REPLICATED = Rules()
"""Every device holds everything."""

TENSOR = Rules(((VOCAB, "tp"), (HEADS, "tp"), (KV_HEADS, "tp"), (MLP, "tp"), (EXPERTS, "ep"), (EXPERT_MLP, ("ep", "tp"))))
"""Megatron's split of attention by heads, the MLP by its inner dim, and both embeddings by vocabulary; experts over ``ep``.

Shoeybi et al. 2019, arXiv:1909.08053.
"""

DATA_TENSOR = Rules((*TENSOR.entries, (BATCH, "dp")))
"""The tensor split inside each data group; the rows of a batch and their KV cache over the groups."""

PRESETS = {"replicated": REPLICATED, "tensor": TENSOR, "data_tensor": DATA_TENSOR}
