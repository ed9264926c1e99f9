"""Quantized matrices in the canonical layout: what XLA computes with where there are no kernels of our own, and what defines them."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct

from sharding_rules import ONE_DEVICE, Partition
from tpllm.quant.code_bits import RUN, num_bytes, pack_bits, unpack_bits
from tpllm.quant.regroup import fit_groups, regroup, shard_of
from tpllm.quant.schemes import QuantizedRows, Scheme

SMALL_CODES = {2: np.dtype(ml_dtypes.uint2), 3: np.dtype(ml_dtypes.uint4), 4: np.dtype(ml_dtypes.uint4)}
ODD_BITS = (3, 5, 6)
"""Codes of so many bits, for which XLA has no type, lie in bytes together where no shard cuts a run of them."""
ARRAYS = ("codes", "scales", "mins", "super_scales", "super_mins")


@dataclasses.dataclass(frozen=True)
class QuantizedLayout:
    """What the arrays of a :class:`QuantizedTensor` mean; hashable.

    Attributes:
        scheme: how it is quantized.
        shape: (N, K).
        axes: the logical axes of N and K.
        partition: mesh and rules.
        name: of the parameter, for errors.
    """

    scheme: Scheme
    shape: tuple[int, int]
    axes: tuple[str | None, str | None] = (None, None)
    partition: Partition = ONE_DEVICE
    name: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        _ = self.kept

    @property
    def kept(self) -> Scheme:
        """The scheme with groups that no shard cuts."""
        kept = fit_groups(self.scheme, self.shape[1], self.num_shards[1], allowed=None, name=self.name)
        quantizes_input = kept.quantizes_input and kept.group == 0 and kept.mins == "none"
        return dataclasses.replace(kept, quantizes_input=quantizes_input, num_outliers=kept.num_outliers if quantizes_input else 0)

    @property
    def num_shards(self) -> tuple[int, int]:
        """Into how many parts N and K are cut."""
        return tuple(map(self.partition.size, self.axes))

    @property
    def has_packed_codes(self) -> bool:
        """Whether codes lie in bytes together, as ``tpllm.quant.code_bits`` packs them."""
        is_odd = self.kept.kind == "int" and self.kept.bits in ODD_BITS
        return is_odd and (self.num_shards[1] == 1 or self.shape[1] // self.num_shards[1] % RUN == 0)

    @property
    def source_dtype(self) -> np.dtype:
        """Of the floats that are quantized."""
        return np.dtype(np.float32)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype, tuple[str | None, ...]]]:
        """(shape, dtype, logical axes) of each array."""
        (N, K), kept = self.shape, self.kept
        group_axes = self.axes if kept.group else (self.axes[0], None)
        groups = ((N, kept.num_groups(K)), group_axes)
        supers = ((N, -(-K // kept.super_group) if kept.super_group else 0), np.dtype(np.float16), self.axes)
        code_dtype = kept.code_dtype if kept.kind in ("e4m3", "e5m2") else SMALL_CODES.get(kept.bits, kept.code_dtype)
        codes = ((N, num_bytes(K, kept.bits)), np.dtype(np.uint8)) if self.has_packed_codes else ((N, K), code_dtype)
        found = {"codes": (*codes, self.axes),
                 "scales": (groups[0], kept.scale_dtype, groups[1])}
        if kept.mins != "none":
            found["mins"] = (groups[0], kept.min_dtype, groups[1])
        if kept.super_group:
            found["super_scales"] = supers
            if kept.mins == "super":
                found["super_mins"] = supers
        return found

    def write(self, rows: QuantizedRows, first_row: int, shard: int, out: dict[str, np.ndarray]) -> None:
        """Put some whole rows into the arrays of K's ``shard``."""
        part = shard_of(regroup(rows, self.scheme, self.kept), self.kept, shard, self.num_shards[1])
        if self.has_packed_codes:
            part = dataclasses.replace(part, codes=pack_bits(part.codes, self.kept.bits))
        for name, array in out.items():
            array[first_row:first_row + len(rows.codes)] = getattr(part, name).astype(array.dtype)

    def build(self, arrays) -> "QuantizedTensor":
        """The tensor of these arrays."""
        return QuantizedTensor(**{name: arrays.get(name) for name in ARRAYS}, layout=self)


@struct.dataclass
class QuantizedTensor:
    """One quantized matrix.

    Attributes:
        codes: [N, K] integers or fp8; or uint8 [N, bytes], where the layout packs them.
        scales, mins: [N, groups]; mins may be None.
        super_scales, super_mins: float16 [N, super groups] or None.
        layout: what they mean.
        order: int32 [K], the input that each column multiplies, or None where they are in order.
    """

    codes: jax.Array
    scales: jax.Array
    mins: jax.Array | None
    super_scales: jax.Array | None
    super_mins: jax.Array | None
    layout: QuantizedLayout = struct.field(pytree_node=False)
    order: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.layout.shape

    @property
    def num_outliers(self) -> int:
        """See :class:`~tpllm.quant.schemes.Scheme`."""
        return self.layout.kept.num_outliers

    def without_outliers(self, *, quantizes_input: bool) -> "QuantizedTensor":
        """The same weight for the inputs that are quantized, or for those that are not."""
        scheme = dataclasses.replace(self.layout.scheme, num_outliers=0, quantizes_input=quantizes_input)
        return self.replace(layout=dataclasses.replace(self.layout, scheme=scheme))

    def code_bytes(self) -> jax.Array:
        """[N, K] in the scheme's own dtype, a code a byte."""
        return _codes(self.codes, self.layout).astype(self.layout.kept.code_dtype)

    def dequantize(self, dtype=jnp.float32) -> jax.Array:
        """[N, K], computed in float32 as :func:`tpllm.quant.schemes.dequantize` does; columns as they are stored."""
        return _dequantize({name: getattr(self, name) for name in ARRAYS}, self.layout).astype(dtype)

    def rows(self, indices: jax.Array, dtype) -> jax.Array:
        """[..., K]: some rows, dequantized."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        taken = {name: None if array is None else array.at[indices].get(mode="clip") for name, array in arrays.items()}
        return _dequantize(taken, self.layout).astype(dtype)


def _codes(codes: jax.Array, layout: QuantizedLayout) -> jax.Array:
    return unpack_bits(codes, layout.kept.bits, layout.shape[1]) if layout.has_packed_codes else codes


def _dequantize(arrays: dict[str, Any], layout: QuantizedLayout) -> jax.Array:
    kept, num_inputs = layout.kept, layout.shape[1]

    def spread(name: str, group: int) -> jax.Array:
        values = _power_scales(arrays[name]) if name == "scales" and kept.has_power_scales else arrays[name].astype(jnp.float32)
        return jnp.repeat(values, group, axis=-1)[..., :num_inputs] if group else values
    scales = spread("scales", kept.group)
    if kept.super_group:
        scales = scales * spread("super_scales", kept.super_group)
    if kept.kind == "e2m1":
        return scales * _e2m1_values(arrays["codes"])
    codes = _codes(arrays["codes"], layout).astype(jnp.float32)
    if kept.mins == "zeros":
        return scales * (codes - spread("mins", kept.group))
    weights = scales * (codes - kept.zero)
    if kept.mins == "none":
        return weights
    mins = spread("mins", kept.group)
    return weights - mins * spread("super_mins", kept.super_group) if kept.mins == "super" else weights + mins


def _power_scales(exponents: jax.Array) -> jax.Array:
    """As :func:`tpllm.quant.schemes.power_scales`, but for 2**-127, which is no normal float32: 0."""
    return jax.lax.bitcast_convert_type(exponents.astype(jnp.uint32) << 23, jnp.float32)


def _e2m1_values(codes: jax.Array) -> jax.Array:
    """float32 of :data:`~tpllm.quant.schemes.E2M1_VALUES`, whose bits from 1 on are those of the code with another bias; no table, which XLA would
    gather from."""
    codes = codes.astype(jnp.uint32)
    size = codes & 7
    normal = jax.lax.bitcast_convert_type((size << 22) + jnp.uint32(126 << 23), jnp.float32)
    values = jnp.where(size < 2, size.astype(jnp.float32) * 0.5, normal)
    return jnp.where(codes > 7, -values, values)
