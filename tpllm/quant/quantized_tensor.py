"""Quantized matrices in the canonical layout: what XLA computes with where there are no kernels of our own, and what defines them."""
import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct

from sharding_rules import Partition
from tpllm.quant.schemes import Scheme, quantize


@dataclasses.dataclass(frozen=True)
class QuantizedLayout:
    """What the arrays of a :class:`QuantizedTensor` mean; hashable.

    Attributes:
        scheme: how it is quantized.
        shape: (N, K).
        axes: the logical axes of N and K.
        partition: mesh and rules, or None for one device.
    """

    scheme: Scheme
    shape: tuple[int, int]
    axes: tuple[str | None, str | None] = (None, None)
    partition: Partition | None = None

    @property
    def num_shards(self) -> tuple[int, int]:
        """Into how many parts N and K are cut."""
        return (1, 1) if self.partition is None else tuple(map(self.partition.size, self.axes))

    @property
    def source_dtype(self) -> np.dtype:
        """What :meth:`write` takes."""
        return np.dtype(np.float32)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype, tuple[str | None, ...]]]:
        """(shape, dtype, logical axes) of each array; a group that a shard would cut has a scale on both."""
        N, K = self.shape
        k_parts = self.num_shards[1]
        groups = k_parts * self.scheme.num_groups(K // k_parts) if self.scheme.group else 1
        codes_dtype = np.dtype(np.int8 if self.scheme.bits == 8 else ml_dtypes.int4)
        return {"codes": ((N, K), codes_dtype, self.axes),
                "scales": ((N, groups), self.scheme.scale_dtype, self.axes if self.scheme.group else (self.axes[0], None))}

    def write(self, rows_NK: np.ndarray, first_row: int, shard: int, out: dict[str, np.ndarray]) -> None:
        """Quantize some whole rows into the arrays of K's ``shard``."""
        codes, scales = quantize_shard(rows_NK, self.scheme, shard, self.num_shards[1])
        rows = slice(first_row, first_row + rows_NK.shape[0])
        out["codes"][rows], out["scales"][rows] = codes.astype(out["codes"].dtype), scales

    def build(self, arrays) -> "QuantizedTensor":
        """The tensor of these arrays."""
        return QuantizedTensor(**arrays, layout=self)


@struct.dataclass
class QuantizedTensor:
    """One quantized matrix.

    Attributes:
        codes: int8 or int4 [N, K].
        scales: [N, groups].
        layout: what they mean.
    """

    codes: jax.Array
    scales: jax.Array
    layout: QuantizedLayout = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.layout.shape

    def dequantize(self, dtype=jnp.float32) -> jax.Array:
        """[N, K]: codes times scales, multiplied in float32."""
        return scale_codes(self.codes, self.scales, self.layout).astype(dtype)

    def rows(self, indices: jax.Array, dtype) -> jax.Array:
        """[..., K]: some rows, dequantized."""
        codes, scales = (x.at[indices].get(mode="clip") for x in (self.codes, self.scales))
        return scale_codes(codes, scales, self.layout).astype(dtype)


def quantize_shard(rows_NK: np.ndarray, scheme: Scheme, shard: int, num_shards: int) -> tuple[np.ndarray, np.ndarray]:
    """:func:`~tpllm.quant.schemes.quantize` of one shard of K. A scale of an output is of all its inputs, whatever the shard."""
    width = rows_NK.shape[1] // num_shards
    columns = slice(shard * width, (shard + 1) * width)
    if scheme.group:
        return quantize(rows_NK[:, columns], scheme)
    codes, scales = quantize(rows_NK, scheme)
    return codes[:, columns], scales


def scale_codes(codes_K: jax.Array, scales_G: jax.Array, layout: QuantizedLayout) -> jax.Array:
    """float32 [..., K] of codes [..., K] and scales [..., groups]."""
    K = codes_K.shape[-1]
    if layout.scheme.group:
        parts, width = layout.num_shards[1], K // layout.num_shards[1]
        per_shard = scales_G.reshape(*scales_G.shape[:-1], parts, -1)
        scales_G = jnp.repeat(per_shard, layout.scheme.group, axis=-1)[..., :width].reshape(*scales_G.shape[:-1], K)
    return codes_K.astype(jnp.float32) * scales_G.astype(jnp.float32)
