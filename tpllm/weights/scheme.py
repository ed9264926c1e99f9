"""Ways to keep a weight with fewer bits, and quantizing to them.

    w[n, k] = scale[n, k // group] * (code[n, k] - zero) + min[n, k // group]

Where ``super_group`` is there, scales and mins are small integers times the float16 scales of larger groups, as in llama.cpp's K-quants.
"""
import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)
FLOAT32, HALF = np.dtype(np.float32), np.dtype(np.float16)
Mins = Literal["none", "float", "zeros", "super"]
Kind = Literal["int", "e4m3", "e5m2", "e2m1"]
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of codes of two exponent bits and one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3)."""
E8M0_BIAS, E8M0_NAN = 127, 255
"""Scales that are a byte e beside such codes are ``2**(e - 127)`` (section 5.4)."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to keep a matrix; hashable.

    Attributes:
        name: as users, files and ``tpllm inspect`` write it.
        bits: of a code, 2 to 8.
        group: inputs that share a scale; 0 where an output has one.
        kind: what a code is: an integer, fp8 (Micikevicius et al. 2022, arXiv:2209.05433), or the index of one of :data:`E2M1_VALUES`.
        zero: what is taken from each integer code. Codes of 8 bits are signed and have none; those of fewer bits are unsigned.
        mins: ``"none"``; ``"float"``: mins are added as they are; ``"zeros"``: they are unsigned integers, and the min is ``-scale * zero``;
            ``"super"``: they are unsigned integers, and the min is ``-super_min * min``.
        super_group: inputs that share a scale of scales; 0 for none.
        scale_dtype: of scales: a float, int8 or uint8 under super scales, or uint8 for powers of two beside ``"e2m1"``.
        quantizes_input: whether activations become int8, one scale a row and call (Dettmers et al. 2022, arXiv:2208.07339).
        num_outliers: how many inputs of a row, those of the largest magnitude, are not, but multiplied as they are.
    """

    name: str
    bits: int
    group: int = 0
    kind: Kind = "int"
    zero: int = 0
    mins: Mins = "none"
    super_group: int = 0
    scale_dtype: np.dtype = FLOAT32
    quantizes_input: bool = False
    num_outliers: int = 0

    @property
    def code_dtype(self) -> np.dtype:
        """The dtype of codes that take a byte each. It is int8 for 8 bits, uint8 for fewer, or the fp8 type."""
        if self.kind in ("e4m3", "e5m2"):
            return np.dtype(ml_dtypes.float8_e4m3fn if self.kind == "e4m3" else ml_dtypes.float8_e5m2)
        return np.dtype(np.int8 if self.bits == 8 else np.uint8)

    @property
    def min_dtype(self) -> np.dtype | None:
        """The dtype of mins; None where there are none."""
        return {"none": None, "float": self.scale_dtype}.get(self.mins, np.dtype(np.uint8))

    @property
    def has_power_scales(self) -> bool:
        """Whether scales are powers of two, in bytes."""
        return self.kind == "e2m1" and self.scale_dtype == np.uint8

    def num_groups(self, num_inputs: int) -> int:
        """Scales of an output."""
        return -(-num_inputs // self.group) if self.group else 1

    def arrays(self, num_inputs: int) -> dict[str, tuple[int, np.dtype]]:
        """(columns, dtype) of each array of :class:`QuantizedRows` that there is, of so many inputs."""
        groups = self.num_groups(num_inputs)
        found = {"codes": (num_inputs, self.code_dtype), "scales": (groups, self.scale_dtype)}
        found |= {"mins": (groups, self.min_dtype)} if self.min_dtype else {}
        supers = (-(-num_inputs // self.super_group), HALF) if self.super_group else None
        return found | ({"super_scales": supers} if supers else {}) | ({"super_mins": supers} if self.mins == "super" else {})

    def bits_per_weight(self, num_inputs: int) -> float:
        """The bits of one weight of an output with so many inputs, its share of the scales included."""
        small = sum(columns * dtype.itemsize for name, (columns, dtype) in self.arrays(num_inputs).items() if name != "codes")
        return self.bits + 8 * small / num_inputs


@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """Some rows of a quantized matrix, on the host; or in jax, where they are dequantized.

    Attributes:
        codes: [n, K] in the scheme's ``code_dtype``.
        scales: [n, groups], or [n, 1] where an output has one.
        mins: [n, groups] or None.
        super_scales, super_mins: float16 [n, super groups] or None.
    """

    codes: np.ndarray
    scales: np.ndarray
    mins: np.ndarray | None = None
    super_scales: np.ndarray | None = None
    super_mins: np.ndarray | None = None

    def take(self, rows: slice | np.ndarray) -> "QuantizedRows":
        """Some of the rows, by slice or indices."""
        return QuantizedRows(*(None if array is None else array[rows] for array in self.arrays().values()))

    def arrays(self) -> dict[str, np.ndarray | None]:
        """Every array by its name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def dequantize(rows: QuantizedRows, scheme: Scheme) -> Array:
    """float32 [..., K]: what the rows stand for, each step rounded to float32 once; in numpy or, traced or not, in jax."""
    numpy, num_inputs = jnp if isinstance(rows.codes, jax.Array) else np, rows.codes.shape[-1]

    def spread(values: Array, group: int) -> Array:
        values = values.astype(np.float32)
        return numpy.repeat(values, group, axis=-1)[..., :num_inputs] if group else values
    scales = spread(power_scales(rows.scales) if scheme.has_power_scales else rows.scales, scheme.group)
    if scheme.super_group:
        scales = scales * spread(rows.super_scales, scheme.super_group)
    if scheme.kind == "e2m1":
        return scales * e2m1_values(rows.codes)
    codes = rows.codes.astype(np.float32)
    if scheme.mins == "zeros":
        return scales * (codes - spread(rows.mins, scheme.group))
    weights = scales * (codes - scheme.zero)
    if scheme.mins == "none":
        return weights
    mins = spread(rows.mins, scheme.group)
    return weights - mins * spread(rows.super_mins, scheme.super_group) if scheme.mins == "super" else weights + mins


def power_scales(exponents: Array) -> Array:
    """float32 of bytes e: ``2**(e - 127)``; of 0, which gives no normal float32, jax makes 0."""
    if isinstance(exponents, jax.Array):
        return jax.lax.bitcast_convert_type(exponents.astype(jnp.uint32) << 23, jnp.float32)
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - E8M0_BIAS)


def e2m1_values(codes: Array) -> Array:
    """float32 of :data:`E2M1_VALUES`. In jax no table, which XLA would gather from: from 1 on their bits are those of the code with another bias."""
    if not isinstance(codes, jax.Array):
        return E2M1_VALUES[codes]
    codes = codes.astype(jnp.uint32)
    size = codes & 7
    normal = jax.lax.bitcast_convert_type((size << 22) + jnp.uint32(126 << 23), jnp.float32)
    values = jnp.where(size < 2, size.astype(jnp.float32) * 0.5, normal)
    return jnp.where(codes > 7, -values, values)


def widened(scheme: Scheme) -> Scheme:
    """The scheme that is kept: there is nothing to gain by 7 bits, so such codes become signed bytes."""
    return dataclasses.replace(scheme, bits=8, zero=0) if scheme.kind == "int" and scheme.bits == 7 else scheme


def widen(rows: QuantizedRows, scheme: Scheme) -> QuantizedRows:
    """Rows of :func:`widened`."""
    if widened(scheme) == scheme:
        return rows
    return dataclasses.replace(rows, codes=(rows.codes.astype(np.int16) - scheme.zero).astype(np.int8))


def join_rows(parts: Sequence[tuple[int, QuantizedRows]], num_rows: int, scheme: Scheme, num_inputs: int) -> QuantizedRows:
    """``num_rows`` rows made of parts that begin at some of them, and zeros between."""
    if len(parts) == 1 and len(parts[0][1].codes) == num_rows:
        return parts[0][1]
    joined = {name: np.zeros((num_rows, columns), dtype) for name, (columns, dtype) in scheme.arrays(num_inputs).items()}
    for first, part in parts:
        for name, array in joined.items():
            array[first:first + len(part.codes)] = getattr(part, name)
    return QuantizedRows(**joined)
