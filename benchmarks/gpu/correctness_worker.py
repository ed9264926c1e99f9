"""Tasks of the worker that runs JAX: each op's own cases on the device, kernel against float32 reference.

What a case is belongs to its op; what is to be called for it and compared stands in ``CHECKS``. The bounds are those of the ops' tests.
"""
import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.jax_sides import INTERPRETED
from pallas_kernels.tiling import device_of

BOUNDS = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2}
"""Of the relative Frobenius error, by the dtype of the activations."""
TINY_CASES = 1
Arrays = Sequence[jax.Array]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a kernel gave, and the reference.

    Attributes:
        pairs: (actual, expected) arrays.
        dtype: that decides the bound.
    """

    pairs: list[tuple[Any, Any]]
    dtype: str

    def errors(self) -> list[float]:
        """Relative Frobenius errors; infinite where something is not finite."""
        found = []
        for actual, expected in self.pairs:
            actual, expected = (np.asarray(jax.device_get(x)).astype(np.float64) for x in (actual, expected))
            is_finite = np.isfinite(actual).all() and actual.shape == expected.shape
            found.append(float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)) if is_finite else float("inf"))
        return found


def list_cases(is_tiny: bool) -> dict[str, list[dict[str, Any]]]:
    """By op, the arguments of :func:`check` for each of its cases and kernels; ops without kernels have none."""
    found: dict[str, list[dict[str, Any]]] = {}
    for op, (implementations, _) in CHECKS.items():
        cases = _cases(op)
        count = min(len(cases), TINY_CASES) if is_tiny else len(cases)
        found[op] = [{"op": op, "index": index, "implementation": name} for index in range(count) for name in implementations]
    return found


def check(op: str, index: int, implementation: str, is_tiny: bool, seed: int = 0) -> dict[str, Any]:
    """One case: its errors, and whether they are within the bound. A case that a kernel says it cannot do is ``"refused"``."""
    case, device = _cases(op)[index], INTERPRETED if is_tiny else device_of(jax.devices()[0])
    entry = {"op": op, "case": str(case), "implementation": implementation}
    try:
        compared = CHECKS[op][1](case, seed, {"device": device, "implementation": implementation, "interpret": is_tiny})
    except ValueError as error:
        if implementation not in str(error):
            raise
        return {**entry, "refused": str(error), "is_right": None}
    errors = compared.errors()
    return {**entry, "errors": errors, "bound": BOUNDS[compared.dtype], "is_right": max(errors) <= BOUNDS[compared.dtype]}


def _cases(op: str) -> Sequence[Any]:
    cases = importlib.import_module(f"pallas_kernels.{op}.cases")
    return tuple(case for name in LISTS.get(op, ("CASES",)) for case in getattr(cases, name))


def _float32(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else x.astype(jnp.float32)


def _rms_norm(case: Any, seed: int, how: dict[str, Any]) -> Comparison:
    from pallas_kernels.rms_norm import rms_norm, rms_norm_reference
    x, weight, residual = case.arrays(seed)
    out = jax.jit(lambda x, weight, residual: rms_norm(x, weight, eps=1e-5, residual_D=residual, offset=case.offset, quantized=case.quantized,
                                                       **how))(x, weight, residual)
    expected = rms_norm_reference(_float32(x), _float32(weight), eps=1e-5, residual_D=_float32(residual), offset=case.offset)
    out, expected = ((one,) if residual is None else one for one in (out, expected))
    y, dtype = out[0], case.dtype
    if case.quantized is not None:
        codes, scales = y
        y = codes.astype(jnp.float32) * scales[..., None]
        expected = (_rounded(expected[0], y, scales, case.quantized), *expected[1:])
    return Comparison(list(zip((y, *out[1:]), expected, strict=True)), dtype)


def _rounded(expected: jax.Array, actual: jax.Array, scales: jax.Array, dtype: str) -> jax.Array:
    """The reference where codes are further from it than rounding explains, else what the codes say."""
    step = scales[..., None]
    allowed = 0.51 * step if dtype == "int8" else jnp.maximum(jnp.abs(expected) / 15, step * 2**-9)
    return jnp.where(jnp.abs(actual - expected) <= allowed + 0.01 * jnp.abs(expected), actual, expected)


def _flash_attention(case: Any, seed: int, how: dict[str, Any]) -> Comparison:
    from pallas_kernels.flash_attention import flash_attention, flash_attention_reference
    arrays, options = case.arrays(seed)
    statics = {name: value for name, value in options.items() if not isinstance(value, jax.Array)}
    traced = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    got = jax.jit(lambda arrays, traced: flash_attention(*arrays, **traced, **statics, returns_lse=True, **how))(arrays, traced)
    expected = flash_attention_reference(*map(_float32, arrays[:3]), arrays[3], **options, returns_lse=True)
    return Comparison(list(zip(got, expected, strict=True)), case.dtype)


def _paged_attention(case: Any, seed: int, how: dict[str, Any]) -> Comparison:
    from pallas_kernels.paged_attention import paged_attention, paged_attention_reference
    arguments = case.arguments(seed)
    statics = {name: arguments.pop(name) for name in ("scale", "window", "softcap")}
    got = jax.jit(lambda arguments: paged_attention(**arguments, **statics, **how))(arguments)
    exact = {name: _float32(arguments[name]) for name in ("q_BTNH", *(("k_PKSH", "v_PKSH") if arguments["scales"] is None else ()))}
    expected = paged_attention_reference(**{**arguments, **exact}, **statics)
    is_real = np.asarray(arguments["positions_BT"]) >= 0
    return Comparison([(np.asarray(_float32(got))[is_real], np.asarray(expected)[is_real])], case.dtype)


def _quant_matmul(case: Any, seed: int, how: dict[str, Any]) -> Comparison:
    from pallas_kernels.quant_matmul import layout_for, packed_matmul_reference, quant_matmul
    from pallas_kernels.quant_matmul.cases import random_arrays, with_layout
    layout = "rows" if how["implementation"] in ("triton", "jax_triton") else layout_for(how["device"])
    x, arrays, bias = random_arrays(case, layout, seed)
    what = {"weight_format": with_layout(case.weight_format, layout), "num_outputs": case.N}
    got = jax.jit(lambda x, arrays, bias: quant_matmul(x, arrays, bias=bias, **what, **how))(x, arrays, bias)
    return Comparison([(got, packed_matmul_reference(_float32(x), arrays, bias=bias, **what))], case.dtype)


def _gated_mlp(case: Any, seed: int, how: dict[str, Any]) -> Comparison:
    from pallas_kernels.gated_mlp import gated_product
    from pallas_kernels.quant_matmul import layout_for
    x, weights, biases, f = case.arrays(seed, layout_for(how["device"]))
    what = {"activation": case.activation, "weight_format": f, "num_outputs": None if f is None else case.F}
    got = jax.jit(lambda x, weights, biases: gated_product(x, *weights, biases=biases, **what, **how))(x, weights, biases)
    expected = gated_product(_float32(x), *weights, biases=biases, **what, device=how["device"], implementation="reference")
    return Comparison([(got, expected)], case.dtype)


CHECKS: dict[str, tuple[tuple[str, ...], Callable[[Any, int, dict[str, Any]], Comparison]]] = {
    "flash_attention": (("mosaic_gpu",), _flash_attention),
    "paged_attention": (("mosaic_gpu",), _paged_attention),
    "quant_matmul": (("mosaic_gpu", "triton", "jax_triton"), _quant_matmul),
    "gated_mlp": (("mosaic_gpu",), _gated_mlp),
    "rms_norm": (("mosaic_gpu", "triton"), _rms_norm),
}
LISTS = {"paged_attention": ("DECODE", "CHUNKS", "RARER"), "gated_mlp": ("CASES", "PACKED_CASES")}
"""What an op's lists of cases are called, where there are several."""
