"""The logical axes a model may name.

``heads`` and ``kv_heads`` also name the flattened ``heads * head_dim`` dim of a 2-D projection: a mesh axis cuts it between heads.
``experts`` also names the flattened rows of all experts' matrices; in ``expert_mlp`` those are cut by their own inner dim too.
"""
VOCAB = "vocab"
EMBED = "embed"
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
MLP = "mlp"
BATCH = "batch"
EXPERTS = "experts"
EXPERT_MLP = "expert_mlp"

LOGICAL_AXES = (VOCAB, EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP, BATCH, EXPERTS, EXPERT_MLP)
