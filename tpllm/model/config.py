"""The static description of a decoder: features, never family names."""
import dataclasses
from typing import Literal

from sharding_rules import Partition

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its extensions beyond the trained context.

    Attributes:
        kind: which rule gives the frequencies; see ``tpllm/model/rope.py``.
        theta: the base of the geometric series of frequencies.
        factor: how many times longer the context is than the trained one.
        original_max_position: the trained context, in tokens (dynamic, llama3, yarn).
        low_freq_factor, high_freq_factor: llama3's bounds of the blended band, in rotations over the trained context.
        beta_fast, beta_slow: yarn's bounds, in rotations over the trained context.
        attention_factor: yarn's factor on cos and sin; None for 0.1 ln(factor) + 1.
        mscale, mscale_all_dim: yarn's other way to give it (their ratio).
        truncate: whether yarn rounds the band's bounds to whole dims.
    """

    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer, and (after :func:`tpllm.model.partition.fit_to_mesh`) how it lies on its mesh.

    Attributes:
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size: sizes of the logical model.
        max_position: the longest context, in tokens.
        activation: the gate's nonlinearity.
        norm_eps: epsilon of every RMSNorm.
        rope: rotary embedding.
        ties_embeddings: whether the output head is the embedding.
        has_qkv_bias, has_output_bias, has_mlp_bias: which projections add a bias.
        has_qk_norm: whether queries and keys are RMS-normalized per head before rope.
        layer_windows: for each layer the sliding window in tokens, or None for full attention.
        kv_repeat: how often each KV head is stored, so that every shard owns one.
        padded_vocab_size: rows of the embedding and head as stored; rows from ``vocab_size`` on are padding.
        partition: mesh and rules, or None for a single device without sharding.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    ties_embeddings: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    layer_windows: tuple[int | None, ...] = ()
    kv_repeat: int = 1
    padded_vocab_size: int = 0
    partition: Partition | None = None

    def __post_init__(self):
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_layers)
        if not self.padded_vocab_size:
            object.__setattr__(self, "padded_vocab_size", self.vocab_size)

    @property
    def stored_kv_heads(self) -> int:
        """KV heads as stored and cached, repeats included."""
        return self.num_kv_heads * self.kv_repeat
