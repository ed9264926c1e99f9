"""The decoder's parameters: one :class:`ParamSpec` each, from which shape, sharding, loading target and random init follow.

Projections are stored ``[out, in]``, as Hugging Face checkpoints hold them: ``dot_general`` on that layout needs no transpose.
"""
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sharding_rules.axes import EMBED, HEAD_DIM, HEADS, KV_HEADS, MLP, VOCAB
from tpllm.model.config import ModelConfig
from tpllm.quant.storage import Storage


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The declaration of one parameter.

    Attributes:
        shape: as stored, with repeated KV heads and vocabulary padding.
        axes: the logical axis of each dim, or None.
        init: ``"normal"`` (std 1/sqrt(fan in)), ``"embedding"`` (std 0.02), ``"ones"`` or ``"zeros"``.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"


@struct.dataclass
class AttentionParams:
    """Projections of one attention layer; N, K, H: heads, stored KV heads, head dim; D: hidden size."""

    q: Any  # [N*H, D]
    k: Any  # [K*H, D]
    v: Any  # [K*H, D]
    o: Any  # [D, N*H]
    q_bias: Any = None  # [N*H]
    k_bias: Any = None  # [K*H]
    v_bias: Any = None  # [K*H]
    o_bias: Any = None  # [D]
    q_norm: Any = None  # [H]
    k_norm: Any = None  # [H]


@struct.dataclass
class MlpParams:
    """Projections of one gated MLP; F: inner size."""

    gate: Any  # [F, D]
    up: Any  # [F, D]
    down: Any  # [D, F]
    gate_bias: Any = None  # [F]
    up_bias: Any = None  # [F]
    down_bias: Any = None  # [D]


@struct.dataclass
class LayerParams:
    """One transformer block."""

    attn_norm: Any  # [D]
    attn: AttentionParams
    mlp_norm: Any  # [D]
    mlp: MlpParams


@struct.dataclass
class DecoderParams:
    """All parameters of a decoder."""

    embed: Any  # [V, D]
    layers: tuple[LayerParams, ...]
    final_norm: Any  # [D]
    head: Any = None  # [V, D]; None where it is the embedding

    @property
    def dtype(self) -> Any:
        """Of activations, and of what is neither quantized nor packed."""
        return self.final_norm.dtype


def param_specs(config: ModelConfig) -> DecoderParams:
    """The declaration of every parameter of ``config``'s model, as a tree of :class:`ParamSpec`."""
    table = ParamSpec((config.padded_vocab_size, config.hidden_size), (VOCAB, EMBED), "embedding")
    return DecoderParams(
        embed=table,
        layers=tuple(_layer_specs(config) for _ in range(config.num_layers)),
        final_norm=ParamSpec((config.hidden_size,), (EMBED,), "ones"),
        head=None if config.ties_embeddings else table,
    )


def _layer_specs(config: ModelConfig) -> LayerParams:
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    NH, KH = config.num_heads * H, config.stored_kv_heads * H

    def bias(is_present: bool, size: int, axis: str) -> ParamSpec | None:
        return ParamSpec((size,), (axis,), "zeros") if is_present else None

    norm_D = ParamSpec((D,), (EMBED,), "ones")
    norm_H = ParamSpec((H,), (HEAD_DIM,), "ones") if config.has_qk_norm else None
    attn = AttentionParams(
        q=ParamSpec((NH, D), (HEADS, EMBED)), k=ParamSpec((KH, D), (KV_HEADS, EMBED)), v=ParamSpec((KH, D), (KV_HEADS, EMBED)),
        o=ParamSpec((D, NH), (EMBED, HEADS)),
        q_bias=bias(config.has_qkv_bias, NH, HEADS), k_bias=bias(config.has_qkv_bias, KH, KV_HEADS),
        v_bias=bias(config.has_qkv_bias, KH, KV_HEADS), o_bias=bias(config.has_output_bias, D, EMBED), q_norm=norm_H, k_norm=norm_H,
    )
    mlp = MlpParams(
        gate=ParamSpec((F, D), (MLP, EMBED)), up=ParamSpec((F, D), (MLP, EMBED)), down=ParamSpec((D, F), (EMBED, MLP)),
        gate_bias=bias(config.has_mlp_bias, F, MLP), up_bias=bias(config.has_mlp_bias, F, MLP),
        down_bias=bias(config.has_mlp_bias, D, EMBED),
    )
    return LayerParams(attn_norm=norm_D, attn=attn, mlp_norm=norm_D, mlp=mlp)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Every leaf with its dotted name, as in ``layers.3.attn.q``; specs and arrays alike."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    return [(".".join(str(getattr(key, "name", getattr(key, "idx", key))) for key in path), leaf) for path, leaf in leaves]


def map_specs(function, specs: DecoderParams) -> DecoderParams:
    """``function(name, spec)`` over a tree of specs."""
    named = named_leaves(specs)
    treedef = jax.tree.structure(specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    return jax.tree.unflatten(treedef, [function(name, spec) for name, spec in named])


def param_shardings(config: ModelConfig) -> DecoderParams:
    """The ``NamedSharding`` of every parameter on ``config.partition``.

    Raises:
        ShardingError: a parameter that the mesh cannot cut evenly, named.
    """
    return map_specs(lambda name, spec: config.partition.sharding(spec.axes, shape=spec.shape, name=name), param_specs(config))


def abstract_params(config: ModelConfig, dtype: Any, storage: Storage | None = None) -> DecoderParams:
    """Shapes, dtypes and shardings of the parameters without their values, for ``jit(...).lower``.

    Args:
        config: the model.
        dtype: of every parameter, or of those that ``storage`` keeps as plain arrays.
        storage: how matrices are kept; None for plain arrays.
    """
    def one(shape, dtype, axes, name):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=config.partition and config.partition.sharding(axes, shape=shape, name=name))

    def abstract(name, spec):
        layout = storage and storage.layout(spec.shape, spec.axes, config.partition, name=name)
        if layout is None:
            return one(spec.shape, dtype, spec.axes, name)
        return layout.build({array: one(shape, array_dtype, axes, name) for array, (shape, array_dtype, axes) in layout.arrays().items()})
    return map_specs(abstract, param_specs(config))


def init_params(config: ModelConfig, seed: int | jax.Array, dtype: Any = jnp.float32) -> DecoderParams:
    """Random parameters, each made directly in its sharding.

    Args:
        config: the model; with a partition, every parameter is created sharded.
        seed: a whole number or a PRNG key.
        dtype: of every parameter.
    """
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    specs = param_specs(config)
    indices = {name: i for i, (name, _) in enumerate(named_leaves(specs))}

    def make(name, spec):
        sharding = config.partition and config.partition.sharding(spec.axes, shape=spec.shape, name=name)
        return jax.jit(_init_one, static_argnums=(1, 2), out_shardings=sharding)(jax.random.fold_in(key, indices[name]), spec, dtype)
    return map_specs(make, specs)


def _init_one(key: jax.Array, spec: ParamSpec, dtype: Any) -> jax.Array:
    if spec.init in ("ones", "zeros"):
        return getattr(jnp, spec.init)(spec.shape, dtype)
    std = 0.02 if spec.init == "embedding" else 1 / math.sqrt(spec.shape[-1])
    return (jax.random.normal(key, spec.shape, jnp.float32) * std).astype(dtype)
