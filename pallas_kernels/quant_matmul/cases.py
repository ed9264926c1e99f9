"""Cases that tests and the benchmark share: how a weight is quantized, and of what shape the product is."""
import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.quant_matmul.packing import Layout, PackedArrays, WeightFormat, pack

FLOAT8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
FORMATS = {
    "int8": WeightFormat(),
    "int8-g32": WeightFormat(group=32),
    "int4": WeightFormat(bits=4, group=32, zero=8),
    "int4-g64": WeightFormat(bits=4, group=64, zero=8),
    "int4-g128": WeightFormat(bits=4, group=128, zero=8),
    "int4-g128-zeros": WeightFormat(bits=4, group=128, mins="zeros"),
    "int4-g32-mins": WeightFormat(bits=4, group=32, mins="float"),
    "q4_k": WeightFormat(bits=4, group=32, mins="super", super_group=256),
    "q5_k": WeightFormat(bits=5, group=32, mins="super", super_group=256),
    "q6_k": WeightFormat(bits=6, group=16, zero=32, super_group=256),
    "fp8": WeightFormat(kind="e4m3"),
    "fp8-e5m2": WeightFormat(kind="e5m2"),
    "fp8-g128": WeightFormat(kind="e4m3", group=128),
    "w8a8": WeightFormat(activations="int8"),
    "fp8-a8": WeightFormat(kind="e4m3", activations="e4m3"),
    "fp8-g128-a8": WeightFormat(kind="e4m3", group=128, activations="e4m3"),
}
"""The formats by the name of a quantization."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One product: [M, K] activations times an [N, K] weight."""

    name: str
    M: int
    N: int
    K: int
    dtype: str = "bfloat16"
    has_bias: bool = False
    is_slow: bool = False

    @property
    def weight_format(self) -> WeightFormat:
        """As the name says."""
        return FORMATS[self.name]

    def __str__(self) -> str:
        return f"{self.name}-{self.M}x{self.N}x{self.K}-{self.dtype}{'-bias' if self.has_bias else ''}"


CASES = (
    Case("int8", 3, 128, 256), Case("int8", 70, 130, 300, has_bias=True), Case("int8", 5, 128, 1024, is_slow=True),
    Case("int8-g32", 2, 128, 128, "float16", is_slow=True), Case("int4", 9, 128, 1024, has_bias=True), Case("int4-g64", 1, 128, 256, is_slow=True),
    Case("int4-g128", 4, 128, 256), Case("int4-g128-zeros", 33, 128, 384), Case("int4-g32-mins", 2, 128, 128, "float16", is_slow=True),
    Case("q4_k", 3, 128, 256), Case("q5_k", 3, 100, 256), Case("q6_k", 3, 128, 256), Case("fp8", 3, 128, 256),
    Case("fp8-e5m2", 2, 128, 128, is_slow=True), Case("fp8-g128", 17, 128, 256, is_slow=True),
    Case("w8a8", 3, 128, 1024), Case("w8a8", 70, 128, 256, is_slow=True),
    Case("fp8-a8", 3, 128, 256, has_bias=True), Case("fp8-g128-a8", 70, 128, 256),
)


def with_layout(weight_format: WeightFormat, layout: Layout) -> WeightFormat:
    """The same quantization in another layout."""
    return dataclasses.replace(weight_format, layout=layout)


def random_weight(weight_format: WeightFormat, N: int, K: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Canonical arrays, by the names of :func:`pack`'s arguments, of random codes and scales like those of real weights."""
    f = weight_format
    if f.kind != "int":
        codes = (64 * rng.standard_normal((N, K))).astype(FLOAT8[f.kind])
    else:
        codes = rng.integers(-127, 128, (N, K)).astype(np.int8) if f.bits == 8 else rng.integers(0, 2**f.bits, (N, K)).astype(np.uint8)
    groups, supers = (N, -(-K // f.group) if f.group else 1), (N, -(-K // f.super_group) if f.super_group else 0)
    half, size = np.float16, 1 / (0.3 * 2**f.bits * K**0.5)
    if f.super_group:
        found = {"scales": rng.integers(1, 64, groups).astype(np.uint8 if f.mins == "super" else np.int8),
                 "super_scales": rng.uniform(size / 64, size / 32, supers).astype(half)}
        if f.mins == "super":
            found["mins"] = rng.integers(0, 64, groups).astype(np.uint8)
            found["super_mins"] = rng.uniform(0, size * 2**f.bits / 128, supers).astype(half)
        return {"codes_NK": codes, **found}
    found = {"scales": rng.uniform(size, 2 * size, groups).astype(half if f.bits < 8 else np.float32)}
    if f.mins == "zeros":
        found["mins"] = rng.integers(0, 2**f.bits, groups).astype(np.uint8)
    elif f.mins == "float":
        found["mins"] = (-size * 2**f.bits * rng.uniform(0.5, 1, groups)).astype(half)
    return {"codes_NK": codes, **found}


def random_arrays(case: Case, layout: Layout, seed: int) -> tuple[jax.Array, PackedArrays, jax.Array | None]:
    """(activations, packed weight, bias or None) of a case."""
    rng, f = np.random.default_rng(seed), with_layout(case.weight_format, layout)
    arrays = jax.tree.map(jnp.asarray, pack(f, **random_weight(f, case.N, case.K, rng)))
    x_MK = jnp.asarray(rng.standard_normal((case.M, case.K)), case.dtype)
    return x_MK, arrays, jnp.asarray(rng.standard_normal(case.N), jnp.float32) if case.has_bias else None


def packed_shapes(weight_format: WeightFormat, N: int, K: int) -> PackedArrays:
    """Shapes and dtypes of a packed weight, to compile for."""
    row = random_weight(weight_format, 1, K, np.random.default_rng(0))
    arrays = {name: jax.ShapeDtypeStruct((N, array.shape[1]), array.dtype) for name, array in row.items()}
    return jax.eval_shape(lambda arrays: pack(weight_format, **arrays), arrays)
