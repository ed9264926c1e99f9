"""The decoder's parameters: one :class:`ParamSpec` each, from which shape, sharding, loading target and random init follow.

Projections are stored ``[out, in]``, as Hugging Face checkpoints hold them: ``dot_general`` on that layout needs no transpose.
"""
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sharding_rules import ShardingError
from sharding_rules.axes import EMBED, EXPERT_MLP, EXPERTS, HEAD_DIM, HEADS, KV_HEADS, MLP, VOCAB
from tpllm.model.config import ModelConfig
from tpllm.model.stacks import Stack
from tpllm.weights.storage import Storage


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The declaration of one parameter.

    Attributes:
        shape: as stored, with repeated KV heads and vocabulary padding.
        axes: the logical axis of each dim, or None.
        init: ``"normal"`` (std 1/sqrt(fan in)), ``"embedding"`` (std 0.02), ``"ones"`` or ``"zeros"``.
        stack: how the rows of several matrices lie in it, where it holds as many.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    stack: Stack | None = None


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
    q_norm: Any = None  # [H], or [N*H] where it spans heads
    k_norm: Any = None  # [H], or [K*H]
    sinks: Any = None  # [N]


@struct.dataclass
class MlpParams:
    """Projections of one MLP; F: inner size."""

    gate: Any  # [F, D]; None where there is no gate
    up: Any  # [F, D]
    down: Any  # [D, F]
    gate_bias: Any = None  # [F]
    up_bias: Any = None  # [F]
    down_bias: Any = None  # [D]


@struct.dataclass
class MoeParams:
    """The router and the experts of one sparse layer; E: experts. The rows of all experts are one matrix, which :class:`.Stack` describes."""

    router: Any  # [E, D]
    experts: MlpParams  # [E*F, D], [E*F, D], [E*D, F], each expert's rows padded to a multiple of 32, and biases as long
    router_bias: Any = None  # [E]
    shared: MlpParams | None = None
    shared_gate: Any = None  # [1, D]


@struct.dataclass
class LayerParams:
    """One transformer block; norms are None where there are none."""

    attn_norm: Any  # [D]
    attn: AttentionParams
    mlp_norm: Any  # [D]
    mlp: MlpParams | MoeParams
    attn_norm_bias: Any = None  # [D]
    mlp_norm_bias: Any = None  # [D]
    attn_post_norm: Any = None  # [D]
    mlp_post_norm: Any = None  # [D]


@struct.dataclass
class DecoderParams:
    """All parameters of a decoder."""

    embed: Any  # [V, D]
    layers: tuple[LayerParams, ...]
    final_norm: Any  # [D]
    head: Any = None  # [V, D]; None where it is the embedding
    final_norm_bias: Any = None  # [D]

    @property
    def dtype(self) -> Any:
        """The dtype of activations, and of parameters that are neither quantized nor packed."""
        return self.final_norm.dtype


def param_specs(config: ModelConfig) -> DecoderParams:
    """The declaration of every parameter of ``config``'s model, as a tree of :class:`ParamSpec`."""
    table = ParamSpec((config.padded_vocab_size, config.hidden_size), (VOCAB, EMBED), "embedding")
    return DecoderParams(
        embed=table,
        layers=tuple(_layer_specs(config, index) for index in range(config.num_layers)),
        final_norm=_norm_spec(config, config.hidden_size, EMBED),
        head=None if config.ties_embeddings else table,
        final_norm_bias=_bias_spec(config.norm == "layer", config.hidden_size, EMBED),
    )


def _layer_specs(config: ModelConfig, index: int) -> LayerParams:
    norm = _norm_spec(config, config.hidden_size, EMBED)
    pre_norm, post_norm = norm if config.has_pre_norm else None, norm if config.has_post_norm else None
    bias = _bias_spec(config.norm == "layer" and config.has_pre_norm, config.hidden_size, EMBED)
    mlp = _moe_specs(config) if config.sparse_layers[index] else _mlp_specs(config, config.intermediate_size)
    return LayerParams(attn_norm=pre_norm, attn=_attention_specs(config), mlp_norm=pre_norm, mlp=mlp, attn_norm_bias=bias,
                       mlp_norm_bias=bias, attn_post_norm=post_norm, mlp_post_norm=post_norm)


def _attention_specs(config: ModelConfig) -> AttentionParams:
    D, H, bias = config.hidden_size, config.head_dim, _bias_spec
    NH, KH = config.num_heads * H, config.stored_kv_heads * H
    q_norm = k_norm = _norm_spec(config, H, HEAD_DIM) if config.has_qk_norm else None
    if config.has_qk_norm and config.qk_norm_spans_heads:
        q_norm, k_norm = _norm_spec(config, NH, HEADS), _norm_spec(config, KH, KV_HEADS)
    return AttentionParams(
        q=ParamSpec((NH, D), (HEADS, EMBED)), k=ParamSpec((KH, D), (KV_HEADS, EMBED)), v=ParamSpec((KH, D), (KV_HEADS, EMBED)),
        o=ParamSpec((D, NH), (EMBED, HEADS)),
        q_bias=bias(config.has_qkv_bias, NH, HEADS), k_bias=bias(config.has_qkv_bias, KH, KV_HEADS),
        v_bias=bias(config.has_qkv_bias, KH, KV_HEADS), o_bias=bias(config.has_output_bias, D, EMBED), q_norm=q_norm, k_norm=k_norm,
        sinks=bias(config.has_sinks, config.num_heads, HEADS))


def _moe_specs(config: ModelConfig) -> MoeParams:
    has_shared, D = config.shared_expert_size > 0, config.hidden_size
    return MoeParams(
        router=ParamSpec((config.num_experts, D), (None, EMBED)), experts=_expert_specs(config),
        router_bias=_bias_spec(config.has_router_bias, config.num_experts, None),
        shared=_mlp_specs(config, config.shared_expert_size) if has_shared else None,
        shared_gate=ParamSpec((1, D), (None, EMBED)) if has_shared else None)


def _expert_specs(config: ModelConfig) -> MlpParams:
    inner, outer = expert_stacks(config)
    rows = ParamSpec((inner.stored_rows, config.hidden_size), (EXPERT_MLP, EMBED), stack=inner)
    specs = MlpParams(gate=rows, up=rows, down=ParamSpec((outer.stored_rows, config.expert_size), (EXPERTS, MLP), stack=outer))
    if not config.has_expert_bias:
        return specs
    bias = ParamSpec((inner.stored_rows,), (EXPERT_MLP,), "zeros", inner)
    return specs.replace(gate_bias=bias, up_bias=bias, down_bias=ParamSpec((outer.stored_rows,), (EXPERTS,), "zeros", outer))


def expert_stacks(config: ModelConfig) -> tuple[Stack, Stack]:
    """How the experts' rows are stacked: those of gate and up, and those of down.

    Raises:
        ShardingError: experts, or their inner size, that the mesh does not divide.
    """
    groups = config.partition.size(EXPERTS)
    cuts = config.partition.size(EXPERT_MLP) // groups
    if cuts != config.partition.size(MLP):
        raise ShardingError(f"the rules cut an expert's rows (expert_mlp) into {cuts} parts and its down projection's inputs (mlp) into "
                            f"{config.partition.size(MLP)}; map expert_mlp to the mesh axes of experts and mlp together")
    for size, parts, what in ((config.num_experts, groups, "experts"), (config.expert_size, cuts, "inputs of an expert's down projection")):
        if size % parts:
            raise ShardingError(f"{size} {what} cannot be cut into {parts} equal parts; choose a mesh whose axis divides {size}")
    return Stack(config.num_experts, config.expert_size, groups, cuts), Stack(config.num_experts, config.hidden_size, groups)


def _mlp_specs(config: ModelConfig, inner_size: int) -> MlpParams:
    D, F, bias = config.hidden_size, inner_size, _bias_spec
    inner = ParamSpec((F, D), (MLP, EMBED))
    return MlpParams(
        gate=inner if config.has_gated_mlp else None, up=inner, down=ParamSpec((D, F), (EMBED, MLP)),
        gate_bias=bias(config.has_mlp_bias and config.has_gated_mlp, F, MLP), up_bias=bias(config.has_mlp_bias, F, MLP),
        down_bias=bias(config.has_mlp_bias, D, EMBED))


def _norm_spec(config: ModelConfig, size: int, axis: str) -> ParamSpec:
    return ParamSpec((size,), (axis,), "ones" if config.norm_offset == 0 else "zeros")


def _bias_spec(is_present: bool, size: int, axis: str | None) -> ParamSpec | None:
    return ParamSpec((size,), (axis,), "zeros") if is_present else None


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Every leaf with its dotted name, as in ``layers.3.attn.q``; specs and arrays alike."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    return [(".".join(str(getattr(key, "name", getattr(key, "idx", key))) for key in path), leaf) for path, leaf in leaves]


def bytes_per_device(tree: Any) -> int:
    """Bytes of the shards of arrays, or of shapes with shardings, on each device of their mesh; replicas count on every device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


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
    def array_of(shape, dtype, axes, name):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=config.partition.sharding(axes, shape=shape, name=name))

    def abstract(name, spec):
        layout = storage and storage.layout(spec.shape, spec.axes, config.partition, name=name)
        if layout is None:
            return array_of(spec.shape, dtype, spec.axes, name)
        return layout.build({array: array_of(shape, array_dtype, axes, name) for array, (shape, array_dtype, axes) in layout.arrays().items()})
    return map_specs(abstract, param_specs(config))


def init_params(config: ModelConfig, seed: int | jax.Array, dtype: Any = jnp.float32) -> DecoderParams:
    """Random parameters, each made directly in its sharding.

    Args:
        config: the model; every parameter is created in its sharding on the model's partition.
        seed: a whole number or a PRNG key.
        dtype: of every parameter.
    """
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    specs = param_specs(config)
    indices = {name: i for i, (name, _) in enumerate(named_leaves(specs))}

    def make(name, spec):
        sharding = config.partition.sharding(spec.axes, shape=spec.shape, name=name)
        return jax.jit(_init_one, static_argnums=(1, 2), out_shardings=sharding)(jax.random.fold_in(key, indices[name]), spec, dtype)
    return map_specs(make, specs)


def _init_one(key: jax.Array, spec: ParamSpec, dtype: Any) -> jax.Array:
    if spec.init in ("ones", "zeros"):
        return getattr(jnp, spec.init)(spec.shape, dtype)
    std = 0.02 if spec.init == "embedding" else 1 / math.sqrt(spec.shape[-1])
    return (jax.random.normal(key, spec.shape, jnp.float32) * std).astype(dtype)
