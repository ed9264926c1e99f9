"""The logical axes a model may name.

``heads`` and ``kv_heads`` also name the flattened ``heads * head_dim`` dim of a 2-D projection: a mesh axis cuts it between heads.
"""
VOCAB = "vocab"
EMBED = "embed"
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
MLP = "mlp"
BATCH = "batch"

LOGICAL_AXES = (VOCAB, EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP, BATCH)
