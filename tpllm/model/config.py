"""The static description of a decoder: features, never family names."""
import dataclasses
from typing import Literal

from pallas_kernels.gated_mlp import ClampedGlu
from sharding_rules import ONE_DEVICE, Partition

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ALL_LAYERS = "all"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its extensions beyond the trained context.

    Attributes:
        kind: which rule gives the frequencies; see ``tpllm/model/rope.py``.
        theta: the base of the geometric series of frequencies.
        factor: how many times longer the context is than the trained one.
        partial_rotary_factor: the part of a head's dims that is rotated, from the first on.
        original_max_position: the trained context, in tokens (all kinds but default and linear).
        low_freq_factor, high_freq_factor: llama3's bounds of the blended band, in rotations over the trained context.
        beta_fast, beta_slow: yarn's bounds, in rotations over the trained context.
        attention_factor: yarn's and longrope's factor on cos and sin; None for 0.1 ln(factor) + 1, or for longrope
            sqrt(1 + ln(factor) / ln(original_max_position)).
        mscale, mscale_all_dim: yarn's other way to give it (their ratio).
        truncate: whether yarn rounds the band's bounds to whole dims.
        short_factors, long_factors: by which longrope divides each frequency of a sequence within the trained context, and of a longer one.
    """

    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    partial_rotary_factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def rotary_dim(self, head_dim: int) -> int:
        """How many dims of a head are rotated."""
        return int(head_dim * self.partial_rotary_factor)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer, and (after :func:`tpllm.model.partition.fit_to_mesh`) how it lies on its mesh.

    Attributes:
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size: sizes of the logical model.
        max_position: the longest context, in tokens.
        activation: the MLP's nonlinearity: the gate's, where there is one; or a rule for gate and up together.
        norm: RMSNorm, or LayerNorm, which has a bias (Ba et al. 2016, arXiv:1607.06450).
        norm_eps: epsilon of every norm.
        norm_offset: is added to the weight of every norm, in float32.
        rope: rotary embedding.
        layer_ropes: for each layer its own, or None for a layer without; ``rope`` in all of them by default.
        ties_embeddings: whether the output head is the embedding.
        has_qkv_bias, has_output_bias, has_mlp_bias: which projections add a bias.
        has_router_bias, has_expert_bias: likewise of the router, and of all three projections of each expert.
        has_sinks: whether each query head's softmax has one more logit, a learned one, whose value is zero.
        has_qk_norm: whether queries and keys are RMS-normalized per head before rope.
        qk_norm_spans_heads: whether that norm is over all heads together.
        has_pre_norm, has_post_norm: whether attention and MLP are given normalized hidden states, and whether what they give is normalized before
            it is added to the residual stream.
        has_gated_mlp: whether the MLP has a gate.
        num_experts, num_experts_per_token: how many experts a sparse layer has and how many of them a token goes through; 0 for none.
        expert_size, shared_expert_size: the inner size of an expert, and of the one that every token goes through; 0 for none.
        normalizes_expert_weights: whether the weights of a token's experts are divided by their sum, which makes them the softmax over their own
            logits alone.
        sparse_layers: for each layer whether its MLP is one of experts; by default all are where there are experts.
        embedding_multiplier: multiplies embeddings, itself rounded to the activations' dtype.
        residual_multiplier: multiplies what attention and MLP add to the residual stream.
        attention_scale: multiplies attention scores; None for 1 / sqrt(head_dim).
        attention_softcap: attention scores s become ``softcap * tanh(s / softcap)``; None for none.
        logit_scale: multiplies logits.
        logit_softcap: likewise of logits; None for none.
        layer_windows: for each layer the sliding window in tokens, or None for full attention.
        kv_repeat: how often each KV head is stored, so that every shard owns one.
        padded_vocab_size: rows of the embedding and head as stored; rows from ``vocab_size`` on are padding.
        partition: mesh and rules; by default a single device without sharding.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] | ClampedGlu = "silu"
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    rope: RopeConfig = RopeConfig()
    layer_ropes: tuple[RopeConfig | None, ...] = ()
    ties_embeddings: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_router_bias: bool = False
    has_expert_bias: bool = False
    has_sinks: bool = False
    has_qk_norm: bool = False
    qk_norm_spans_heads: bool = False
    has_pre_norm: bool = True
    has_post_norm: bool = False
    has_gated_mlp: bool = True
    num_experts: int = 0
    num_experts_per_token: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    normalizes_expert_weights: bool = True
    sparse_layers: tuple[bool, ...] = ()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    layer_windows: tuple[int | None, ...] = ()
    kv_repeat: int = 1
    padded_vocab_size: int = 0
    partition: Partition = ONE_DEVICE

    def __post_init__(self):
        of_layers = {"layer_windows": None, "layer_ropes": self.rope, "sparse_layers": self.num_experts > 0}
        defaults = {name: (value,) * self.num_layers for name, value in of_layers.items()} | {"padded_vocab_size": self.vocab_size}
        for name, value in defaults.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)

    @property
    def layer_groups(self) -> tuple[str, ...]:
        """The group whose pages each layer uses; layers of a group have the same page ids. There is one group today."""
        return (ALL_LAYERS,) * self.num_layers

    def slice(self, first: int, last: int) -> "ModelConfig":
        """Layers ``first`` to ``last``, that one not included, as a stage of a pipeline has them."""
        layers = range(self.num_layers)[first:last]
        return dataclasses.replace(self, num_layers=len(layers), **{
            name: tuple(getattr(self, name)[index] for index in layers) for name in ("layer_ropes", "layer_windows", "sparse_layers")})

    @property
    def stored_kv_heads(self) -> int:
        """KV heads as stored and cached, repeats included."""
        return self.num_kv_heads * self.kv_repeat
