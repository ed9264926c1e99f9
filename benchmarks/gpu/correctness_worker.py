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
    try:
        return importlib.import_module(f"pallas_kernels.{op}.cases").CASES
    except ImportError:
        return ()


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


CHECKS: dict[str, tuple[tuple[str, ...], Callable[[Any, int, dict[str, Any]], Comparison]]] = {
    "rms_norm": (("mosaic_gpu", "triton"), _rms_norm),
}
