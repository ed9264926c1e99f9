"""The products of a decoder layer by the native kernels, each for one shard: what ``jax.shard_map`` runs on every device.

Sums of one output run in one order whatever the number of rows, so a row's result does not depend, to the bit, on its neighbours.
"""
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_mlp import Activation, ClampedGlu
from tpllm.native.library import FLOAT_DTYPES, call

if TYPE_CHECKING:
    from tpllm.weights.native import NativeWeight

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
CLAMPED_GLU = 4
"""Like those a number of csrc/kernels.h."""


def linear(x_D: jax.Array, weights: "Sequence[NativeWeight]", biases: Sequence[jax.Array | None],
           dtype=None) -> tuple[jax.Array, ...]:
    """``x @ w.T + bias`` for several weights of one input, read in one go.

    Args:
        x_D: [..., D]; float32, bfloat16 or float16.
        weights: each a shard of [F, D].
        biases: each [F] or None.
        dtype: of the results; None for ``x_D``'s.

    Returns:
        A tuple of [..., F].
    """
    rows = _as_rows(x_D)
    _check_dtype("results are", dtype or rows.dtype)
    shapes = [_checked_shape(weight, rows) for weight in weights]
    operands, attributes = _operands(weights, biases, rows.dtype)
    results = [jax.ShapeDtypeStruct((rows.shape[0], num_outputs), dtype or rows.dtype) for num_outputs, _ in shapes]
    outs = call("linear", results, rows, *operands, weights=attributes)
    return tuple(out.reshape(*x_D.shape[:-1], out.shape[1]) for out in outs)


def gated_mlp(x_D: jax.Array, weights: "tuple[NativeWeight, NativeWeight, NativeWeight]", biases: Sequence[jax.Array | None],
              activation: Activation) -> jax.Array:
    """``down(act(gate(x)) * up(x))``, in one call.

    Args:
        x_D: [..., D].
        weights: gate and up, shards of [F, D], and down, a shard of [D, F].
        biases: of the three, or None.
        activation: see :func:`pallas_kernels.gated_mlp.gated`.

    Returns:
        [..., D] in ``x_D``'s dtype.
    """
    rows, (gate, up, down) = _as_rows(x_D), weights
    if _checked_shape(gate, rows) != _checked_shape(up, rows) or down.layout.shard_shape[1] != gate.layout.shard_shape[0]:
        raise ValueError(f"gate {gate.layout.shard_shape}, up {up.layout.shard_shape} and down {down.layout.shard_shape} are no gated MLP")
    operands, attributes = _operands(weights, biases, rows.dtype)
    result = jax.ShapeDtypeStruct((rows.shape[0], down.layout.shard_shape[0]), rows.dtype)
    out = call("gated_mlp", [result], rows, *operands, weights=attributes, **_gating(activation))[0]
    return out.reshape(*x_D.shape[:-1], out.shape[1])


def expert_mlps(x_SD: jax.Array, counts_E: jax.Array, weights: "tuple[NativeWeight, NativeWeight, NativeWeight]",
                biases: Sequence[jax.Array | None] = (None, None, None), *, activation: Activation, inner_size: int) -> jax.Array:
    """``gated_mlp`` with another expert's weights for each run of rows, in one call; experts without rows are not read.

    Args:
        x_SD: [S, D], the rows of one expert after those of the other.
        counts_E: int32 [E], how many each has; together S at most.
        weights: gate and up, shards of the experts' [F, D], one below the other, each from a multiple of 32 rows on; and down, of [D, F], in the same
            way.
        biases: of the three, as long as their rows, or None.
        activation: see :func:`pallas_kernels.gated_mlp.gated`.
        inner_size: F of a shard.

    Returns:
        [S, D] in ``x_SD``'s dtype; rows beyond those counted hold anything.
    """
    rows = _as_rows(x_SD)
    operands, attributes = _operands(weights, biases, rows.dtype)
    result = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
    return call("expert_mlps", [result], counts_E, rows, *operands, weights=attributes, **_gating(activation),
                inner_size=np.int64(inner_size), outer_size=np.int64(rows.shape[1]))[0]


def _gating(activation: Activation) -> dict[str, np.generic]:
    if isinstance(activation, ClampedGlu):
        return {"activation": np.int64(CLAMPED_GLU), "limit": np.float32(activation.limit), "alpha": np.float32(activation.alpha)}
    return {"activation": np.int64(ACTIVATIONS[activation]), "limit": np.float32(0), "alpha": np.float32(0)}


def lookup(tokens: jax.Array, table: "NativeWeight", dtype) -> jax.Array:
    """Rows of an embedding table.

    Args:
        tokens: int32 [...]; one outside of the table gives zeros.
        table: a shard of [V, D].
        dtype: of the result.

    Returns:
        [..., D].
    """
    if tokens.dtype != jnp.int32:
        raise TypeError(f"tokens are {tokens.dtype}; they must be int32")
    _check_dtype("results are", dtype)
    operands, attributes = _operands((table,), (None,), dtype)
    result = jax.ShapeDtypeStruct((tokens.size, table.layout.shard_shape[1]), dtype)
    return call("lookup", result, tokens.reshape(-1), *operands, weights=attributes).reshape(*tokens.shape, -1)


def _as_rows(x_D: jax.Array) -> jax.Array:
    _check_dtype("activations are", x_D.dtype)
    return x_D.reshape(-1, x_D.shape[-1])


def _check_dtype(what: str, dtype) -> None:
    if jnp.dtype(dtype) not in FLOAT_DTYPES:
        raise TypeError(f"{what} {jnp.dtype(dtype)}; the native kernels take and give float32, bfloat16 and float16")


def _checked_shape(weight: "NativeWeight", rows: jax.Array) -> tuple[int, int]:
    shape = weight.layout.shard_shape
    if shape[1] != rows.shape[1]:
        raise ValueError(f"a weight of shape {shape} cannot multiply activations of {rows.shape[1]} columns; both must have as many")
    return shape


def _operands(weights: "Sequence[NativeWeight]", biases: Sequence[jax.Array | None], dtype) -> tuple[list[jax.Array], np.ndarray]:
    operands, attributes = [], []
    for weight, bias in zip(weights, biases, strict=True):
        operands += weight.arrays().values()
        if bias is not None:
            if bias.shape != weight.layout.shard_shape[:1]:
                raise ValueError(f"a bias of shape {bias.shape} does not fit a weight of shape {weight.layout.shard_shape}")
            operands.append(bias.astype(dtype))
        attributes += weight.attributes(has_bias=bias is not None)
    return operands, np.array(attributes, np.int64)
