"""The feed-forward layer, with a gate (GLU variants: Shazeer 2020, arXiv:2002.05202) or without, and routed experts: each token goes through a few of
many MLPs, chosen by a router (Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961; Jiang et al. 2024, arXiv:2401.04088).
"""
import functools
import operator

import jax
import jax.numpy as jnp

from pallas_kernels.gated_mlp import ACTIVATIONS
from tpllm import ops
from tpllm.model.config import ModelConfig
from tpllm.model.params import MlpParams, MoeParams, expert_stacks
from tpllm.weights.experts import Experts, expert_mlps, on_experts
from tpllm.weights.linear import Matrix, gated_mlp, linear


def mlp(x_BTD: jax.Array, params: MlpParams, config: ModelConfig) -> jax.Array:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where there is no gate; [B, T, D] to [B, T, D]."""
    if params.gate is None:
        up_BTF = linear(x_BTD, params.up, params.up_bias, dtype=jnp.float32)
        return linear(ACTIVATIONS[config.activation](up_BTF).astype(x_BTD.dtype), params.down, params.down_bias)
    biases = (params.gate_bias, params.up_bias, params.down_bias)
    return gated_mlp(x_BTD, (params.gate, params.up, params.down), biases, activation=config.activation)


def moe(x_BTD: jax.Array, params: MoeParams, config: ModelConfig, *, positions_BT: jax.Array) -> jax.Array:
    """The weighted sum of what a token's experts give, and of the shared expert times its own gate where there is one.

    Args:
        x_BTD: normalized hidden states.
        params, config: of the layer and the model.
        positions_BT: int32; tokens at negative ones are padding and go to no expert.

    Returns:
        [B, T, D] in ``x_BTD``'s dtype.
    """
    weights_BTk, experts_BTk = route(x_BTD, params.router, config, bias_E=params.router_bias)
    experts_BTk = jnp.where(positions_BT[..., None] < 0, config.num_experts, experts_BTk)
    own = params.experts
    experts = Experts((own.gate, own.up, own.down), (own.gate_bias, own.up_bias, own.down_bias))
    total_BTD = on_experts(functools.partial(_weighted_sum, config), x_BTD, (weights_BTk, experts_BTk), experts, config.partition)
    if params.shared is not None:
        gate_BT1 = jax.nn.sigmoid(linear(x_BTD, params.shared_gate, dtype=jnp.float32))
        total_BTD = total_BTD + gate_BT1 * mlp(x_BTD, params.shared, config).astype(jnp.float32)
    return total_BTD.astype(x_BTD.dtype)


def route(x_BTD: jax.Array, router_ED: Matrix, config: ModelConfig, *, bias_E: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Which experts each token goes to: those of the largest softmax over all, the lower index first where two are equal.

    Returns:
        (float32 weights, int32 experts), both [B, T, k].
    """
    logits_BTE = linear(x_BTD, router_ED, bias_E, dtype=jnp.float32)
    exps_BTE = jnp.exp(logits_BTE - jnp.max(logits_BTE, axis=-1, keepdims=True))
    probs_BTE = exps_BTE / ops.row_sums(exps_BTE, ops.HIDDEN_AXES, config.partition)[..., None]
    weights_BTk, experts_BTk = jax.lax.top_k(probs_BTE, config.num_experts_per_token)
    if config.normalizes_expert_weights:
        weights_BTk = weights_BTk / _chained_sum([weights_BTk[..., slot] for slot in range(config.num_experts_per_token)])[..., None]
    return weights_BTk, experts_BTk


def _weighted_sum(config: ModelConfig, x_BTD: jax.Array, routing: tuple[jax.Array, jax.Array], experts: Experts, group: jax.Array) -> jax.Array:
    """What the experts of a shard of the ``group``-th group add to each token; [B, T, D] in float32.

    A token's choices (S = B * T * k in all) are sorted by expert, so that each expert has its rows one after the other.
    """
    (weights_BTk, experts_BTk), stack, k, D = routing, expert_stacks(config)[0], config.num_experts_per_token, x_BTD.shape[-1]
    expert_S = (experts_BTk - group * stack.shard_matrices).reshape(-1)
    is_here_S = (expert_S >= 0) & (expert_S < stack.shard_matrices)
    expert_S = jnp.where(is_here_S, expert_S, stack.shard_matrices)
    order_S = jnp.argsort(expert_S, stable=True)
    counts_E = jnp.sum(expert_S[:, None] == jnp.arange(stack.shard_matrices, dtype=jnp.int32), axis=0, dtype=jnp.int32)
    out_SD = expert_mlps(x_BTD.reshape(-1, D)[order_S // k], counts_E, experts, inner_size=stack.shard_rows, activation=config.activation)
    out_SD = jnp.where(is_here_S[:, None], out_SD[jnp.argsort(order_S)], 0).astype(jnp.float32)
    outs_BTkD = out_SD.reshape(*experts_BTk.shape, D)
    return _chained_sum([weights_BTk[..., slot, None] * outs_BTkD[..., slot, :] for slot in range(k)])


def _chained_sum(terms: list[jax.Array]) -> jax.Array:
    """One after the other: a reduction's order would depend on the number of rows."""
    return functools.reduce(operator.add, terms)
