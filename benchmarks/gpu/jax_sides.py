"""Sides of contests that run in JAX: this project's ops and XLA. Kernels of others are in :mod:`.jax_peers`.

A builder takes a contest's sizes, and gives the inputs of one call and the call. Ops are looked up when they are wanted: one without a public
function, which has no kernels yet, is its reference, and says so.
"""
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.page_table import PageTable
from pallas_kernels.paged_attention import paged_attention_reference
from pallas_kernels.quant_matmul import PackedArrays, WeightFormat, dequantize_packed, layout_for, pack, quantize_rows
from pallas_kernels.quant_matmul.cases import FORMATS, with_layout
from pallas_kernels.tiling import HOPPER, Device, device_of

INTERPRETED = Device("gpu", "NVIDIA H200", HOPPER)
"""What kernels are interpreted for where there is no GPU."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One side.

    Attributes:
        inputs: arrays of a call, from a random key.
        call: on them.
        expected: what it should give, computed otherwise; None where that is not asked.
        notes: JSON-able, for the result.
    """

    inputs: Callable[[jax.Array], tuple[Any, ...]]
    call: Callable[..., Any]
    expected: Callable[..., Any] | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


def our_op(name: str, implementation: str | None, interpret: bool, function: str | None = None) -> tuple[Callable[..., Any], dict[str, Any]]:
    """(an op of ``pallas_kernels`` on this device, notes); its reference where it has no public function yet."""
    module, function = importlib.import_module(f"pallas_kernels.{name}"), function or name
    if not callable(op := getattr(module, function, None)):
        if implementation is not None:
            raise NotImplementedError(f"pallas_kernels.{name} has no {function} yet, so no {implementation}")
        return getattr(module, f"{function}_reference"), {"note": "the reference: this op has no kernels yet"}
    device = INTERPRETED if interpret else device_of(jax.devices()[0])
    return functools.partial(op, device=device, implementation=implementation, interpret=interpret), {}


def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.bfloat16, scale: float = 1.0) -> jax.Array:
    """Random numbers."""
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)


def codes_of(key: jax.Array, shape: tuple[int, ...], dtype: Any, low: int, high: int) -> jax.Array:
    """Random whole numbers from ``low`` to ``high``."""
    return jax.random.randint(key, shape, low, high + 1, jnp.int32).astype(dtype)


# Attention of a prompt.

def flash_inputs(key: jax.Array, *, B: int, T: int, N: int, K: int, H: int) -> tuple[jax.Array, ...]:
    """Queries, keys and values."""
    keys = jax.random.split(key, 3)
    return tuple(normal(one, (B, T, heads, H)) for one, heads in zip(keys, (N, K, K), strict=True))


def flash_ours(*, implementation: str | None = None, interpret: bool = False, **sizes: int) -> Side:
    """``flash_attention``."""
    op, notes = our_op("flash_attention", implementation, interpret)
    positions_BT = jnp.broadcast_to(jnp.arange(sizes["T"], dtype=jnp.int32), (sizes["B"], sizes["T"]))

    def expected(q, k, v, positions):
        blocked, _ = our_op("flash_attention", "blocked", False)
        return blocked(*(x.astype(jnp.float32) for x in (q, k, v)), positions, scale=attention_scale(sizes))

    def call(q, k, v, positions):
        return op(q, k, v, positions, scale=attention_scale(sizes))
    return Side(lambda key: (*flash_inputs(key, **sizes), positions_BT), call, expected, notes)


def attention_scale(sizes: dict[str, int]) -> float:
    """Of scores."""
    return 1 / math.sqrt(sizes["H"])


# Decoding over pages.

def paged_ours(*, B: int, S: int, page: int, N: int, K: int, H: int, cache_dtype: str = "bfloat16", implementation: str | None = None,
               interpret: bool = False) -> Side:
    """``paged_attention`` of one query a row at the end of S cached tokens."""
    op, notes = our_op("paged_attention", implementation, interpret)
    L, is_scaled = S // page, cache_dtype != "bfloat16"
    pages_BL = jax.random.permutation(jax.random.key(7), B * L).reshape(B, L).astype(jnp.int32)
    positions_B1 = jnp.full((B, 1), S - 1, jnp.int32)

    def inputs(key):
        q_key, k_key, v_key = jax.random.split(key, 3)
        caches = tuple(_cache(one, (B * L, K, page, H), cache_dtype) for one in (k_key, v_key))
        scales = tuple(jnp.full((B * L, K, page), 1 / 64, jnp.float32) for _ in range(2)) if is_scaled else ()
        return normal(q_key, (B, 1, N, H)), *caches, pages_BL, positions_B1, *scales

    def call(q, k, v, pages, positions, *scales, op=op):
        return op(q, k, v, positions, scales=scales or None, table=PageTable(pages), scale=1 / math.sqrt(H))
    return Side(inputs, call, functools.partial(call, op=paged_attention_reference), notes)


def _cache(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return codes_of(key, shape, jnp.int8, -127, 127) if dtype == "int8" else normal(key, shape, dtype)


# Products.

def dense_xla(*, M: int, N: int, K: int, dtype: str = "bfloat16") -> Side:
    """A product of XLA's, the weight as checkpoints hold it."""
    def inputs(key):
        x_key, w_key = jax.random.split(key)
        return normal(x_key, (M, K), dtype), normal(w_key, (N, K), dtype, 1 / math.sqrt(K))
    return Side(inputs, lambda x, w: outputs_dot(x, w).astype(jnp.bfloat16))


def outputs_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """[M, N] float32 of [M, K] and [N, K]."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def packed_ours(*, M: int, N: int, K: int, name: str, implementation: str | None = None, interpret: bool = False) -> Side:
    """``quant_matmul`` of bfloat16 activations and a packed weight; what a format quantizes of the activations, it does in the op.

    Args:
        M, N, K: rows, outputs, inputs.
        name: of ``quant_matmul.cases.FORMATS``.
        implementation, interpret: of the op.
    """
    op, notes = our_op("quant_matmul", implementation, interpret)
    f = _format(name, implementation, interpret)

    def inputs(key):
        x_key, w_key = jax.random.split(key)
        return normal(x_key, (M, K)), random_packed(w_key, f, N, K)

    def expected(x, arrays):
        return outputs_dot(_rounded(*quantize_rows(x, f), f), dequantize_packed(f, arrays)[:N, :K].astype(x.dtype))
    return Side(inputs, lambda x, arrays: op(x, arrays, weight_format=f, num_outputs=N), expected, notes)


def _rounded(codes: jax.Array, row_scales: jax.Array | None, f: WeightFormat) -> jax.Array:
    """bfloat16 activations of what a format makes of them."""
    if row_scales is None:
        return codes
    return (codes.astype(jnp.float32) * (jnp.repeat(row_scales, f.group, axis=1) if f.group else row_scales)).astype(jnp.bfloat16)


def random_packed(key: jax.Array, f: WeightFormat, N: int, K: int) -> PackedArrays:
    """A weight of random codes and equal scales, of the spread that products of size 1 need; packed on the device."""
    groups, size = (N, K // f.group) if f.group else (N, 1), 1 / (0.29 * 2**f.bits * math.sqrt(K))
    if f.kind != "int":
        codes = normal(key, (N, K), {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}[f.kind], 64)
    else:
        codes = codes_of(key, (N, K), jnp.int8, -127, 127) if f.bits == 8 else codes_of(key, (N, K), jnp.uint8, 0, 2**f.bits - 1)
    if f.super_group:  # of two levels: scales and mins are whole numbers
        supers, level = (N, K // f.super_group), jnp.full(groups, 32, jnp.uint8)
        super_scales = jnp.full(supers, size / 32, jnp.float16)
        return jax.jit(functools.partial(pack, f))(codes, level, level, super_scales, super_scales * 2**(f.bits - 1))
    return jax.jit(functools.partial(pack, f))(codes, jnp.full(groups, size, jnp.float32 if f.bits == 8 else jnp.float16))


def _format(name: str, implementation: str | None, interpret: bool) -> WeightFormat:
    """A format in the layout that an implementation reads."""
    device = INTERPRETED if interpret else device_of(jax.devices()[0])
    return with_layout(FORMATS[name], "rows" if implementation in ("triton", "jax_triton") else layout_for(device))


def packed_xla(*, M: int, N: int, K: int, bits: int, group: int) -> Side:
    """XLA on codes as they are in checkpoints: it makes the weight dense in bfloat16, then multiplies, fused as far as it can."""
    zero, span = (8, (0, 15)) if bits == 4 else (0, (-127, 127))

    def inputs(key):
        x_key, w_key = jax.random.split(key)
        scales = jnp.full((N, K // group) if group else (N, 1), 1 / (0.29 * 2**bits * math.sqrt(K)), jnp.float16 if group else jnp.float32)
        return normal(x_key, (M, K)), codes_of(w_key, (N, K), jnp.uint4 if bits == 4 else jnp.int8, *span), scales

    def call(x, codes, scales):
        scales_NK = jnp.repeat(scales, group, axis=1) if group else scales
        return outputs_dot(x, ((codes.astype(jnp.float32) - zero) * scales_NK.astype(jnp.float32)).astype(x.dtype)).astype(x.dtype)
    return Side(inputs, call)


def eight_bit_ours(*, M: int, N: int, K: int, name: str, interpret: bool = False) -> Side:
    """The product alone of factors that are quantized already, by the Mosaic GPU kernel behind ``quant_matmul``."""
    from pallas_kernels.quant_matmul.gpu import gpu_matmul
    f, device = _format(name, "mosaic_gpu", interpret), INTERPRETED if interpret else device_of(jax.devices()[0])
    if not device.has_mosaic_gpu:
        raise NotImplementedError(f"the product alone is a kernel for Hopper GPUs, and this is {device.kind or device.platform}")

    def inputs(key):
        x_key, w_key = jax.random.split(key)
        return *jax.jit(lambda x: quantize_rows(x, f))(normal(x_key, (M, K))), random_packed(w_key, f, N, K)

    def call(codes, row_scales, arrays):
        return gpu_matmul(codes, row_scales, arrays, f, None, out_dtype=jnp.bfloat16, device=device, interpret=interpret)

    def expected(codes, row_scales, arrays):
        return outputs_dot(_rounded(codes, row_scales, f), dequantize_packed(f, arrays).astype(jnp.bfloat16))
    return Side(inputs, call, expected)


def fp8_xla(*, M: int, N: int, K: int) -> Side:
    """XLA's fp8 product (cuBLASLt), a scale a row of each factor."""
    def inputs(key):
        x_key, w_key = jax.random.split(key)
        return (normal(x_key, (M, K), jnp.float8_e4m3fn), normal(w_key, (N, K), jnp.float8_e4m3fn), jnp.full((M, 1), 1.0, jnp.float32),
                jnp.full(N, 1 / math.sqrt(K), jnp.float32))
    return Side(inputs, lambda x, w, x_scales, w_scales: (outputs_dot(x, w) * x_scales * w_scales).astype(jnp.bfloat16))


# The fused ones.

def norm_ours(*, M: int, D: int, implementation: str | None = None, interpret: bool = False) -> Side:
    """``rms_norm`` of a sum, which is written too."""
    op, notes = our_op("rms_norm", implementation, interpret)

    def inputs(key):
        keys = jax.random.split(key)
        return normal(keys[0], (M, D)), normal(keys[1], (M, D)), jnp.ones(D, jnp.bfloat16)

    def call(x, residual, weight):
        return op(x, weight, eps=1e-5, residual_D=residual)
    return Side(inputs, call, _norm, notes)


def norm_xla(*, M: int, D: int) -> Side:
    """The same in XLA's fusions."""
    return Side(norm_ours(M=M, D=D).inputs, _norm)


def _norm(x: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = x + residual
    total32 = total.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(total32), axis=-1, keepdims=True) + 1e-5)
    return (total32 * scale * weight.astype(jnp.float32)).astype(x.dtype), total


def mlp_ours(*, M: int, D: int, F: int, implementation: str | None = None, interpret: bool = False) -> Side:
    """``gated_mlp`` on dense weights."""
    op, notes = our_op("gated_mlp", implementation, interpret)

    def inputs(key):
        keys = jax.random.split(key, 4)
        shapes = ((F, D), (F, D), (D, F))
        return normal(keys[0], (M, D)), *(normal(one, shape, scale=1 / math.sqrt(shape[1])) for one, shape in zip(keys[1:], shapes, strict=True))
    return Side(inputs, lambda x, gate, up, down: op(x, gate, up, down, activation="silu"), _mlp, notes)


def mlp_packed_ours(*, M: int, D: int, F: int, name: str, implementation: str | None = None, interpret: bool = False) -> Side:
    """The layer on packed weights: ``gated_product``, then ``quant_matmul``."""
    (gated, notes), (product, _) = our_op("gated_mlp", implementation, interpret, "gated_product"), our_op("quant_matmul", implementation, interpret)
    f = _format(name, implementation, interpret)

    def inputs(key):
        keys = jax.random.split(key, 4)
        return normal(keys[0], (M, D)), *(random_packed(one, f, *shape) for one, shape in zip(keys[1:], ((F, D), (F, D), (D, F)), strict=True))

    def call(x, gate, up, down):
        return product(gated(x, gate, up, activation="silu", weight_format=f, num_outputs=F), down, weight_format=f, num_outputs=D)

    def expected(x, *weights):
        shapes = ((F, D), (F, D), (D, F))
        return _mlp(x, *(dequantize_packed(f, one)[:N, :K].astype(x.dtype) for one, (N, K) in zip(weights, shapes, strict=True)))
    return Side(inputs, call, expected, notes)


def mlp_xla(*, M: int, D: int, F: int) -> Side:
    """Three products of XLA's, and its fusion between."""
    return Side(mlp_ours(M=M, D=D, F=F).inputs, _mlp)


def _mlp(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return outputs_dot((jax.nn.silu(outputs_dot(x, gate)) * outputs_dot(x, up)).astype(x.dtype), down).astype(x.dtype)


SIDES: dict[str, Callable[..., Side]] = {builder.__name__: builder for builder in (
    flash_ours, paged_ours, dense_xla, packed_ours, packed_xla, eight_bit_ours, fp8_xla, norm_ours, norm_xla, mlp_ours, mlp_packed_ours, mlp_xla)}
