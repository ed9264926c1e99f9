"""What the gated product is tested and measured on."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_mlp.reference import Activation, ClampedGlu
from pallas_kernels.quant_matmul.packing import PackedArrays, WeightFormat, pack


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: M rows of activations of D inputs, F outputs; ``weight_format`` but for the layout, or None for dense weights."""

    M: int
    D: int
    F: int
    activation: Activation = "silu"
    has_bias: bool = False
    weight_format: WeightFormat | None = None
    dtype: str = "bfloat16"

    def arrays(self, seed: int, layout: str = "rows") -> tuple[jax.Array, tuple, tuple, WeightFormat | None]:
        """(x, (gate, up), biases, format with this layout) of a seed; products are of size 1."""
        rng = np.random.default_rng(seed)
        f = None if self.weight_format is None else dataclasses.replace(self.weight_format, layout=layout)
        weights = tuple(jnp.asarray(rng.normal(size=(self.F, self.D)) / self.D**0.5, self.dtype) if f is None else self._packed(rng, f)
                        for _ in range(2))
        biases = tuple(jnp.asarray(rng.normal(size=self.F), self.dtype) if self.has_bias else None for _ in range(2))
        return jnp.asarray(rng.normal(size=(self.M, self.D)), self.dtype), weights, biases, f

    def _packed(self, rng: np.random.Generator, f: WeightFormat) -> PackedArrays:
        codes = rng.integers(-127, 128, (self.F, self.D)).astype(np.int8) if f.bits == 8 else rng.integers(0, 2**f.bits, (self.F, self.D))
        groups = -(-self.D // f.group) if f.group else 1
        scales = rng.uniform(0.5, 1.5, (self.F, groups)) * 3 / 2**f.bits / self.D**0.5
        mins = -scales * 2**(f.bits - 1) if f.mins == "float" else None
        return jax.tree.map(jnp.asarray, pack(f, codes, scales.astype(np.float32), None if mins is None else mins.astype(np.float32)))


INT8, INT4 = WeightFormat(), WeightFormat(bits=4, group=32, zero=8)
CASES = (
    Case(1, 128, 128),
    Case(3, 256, 128, "gelu", has_bias=True),
    Case(17, 128, 256, "gelu_tanh"),
    Case(130, 256, 128, "relu", has_bias=True),
    Case(5, 128, 128, ClampedGlu(limit=1.0), has_bias=True),
)
PACKED_CASES = (
    Case(1, 256, 128, weight_format=INT8),
    Case(20, 200, 100, "gelu_tanh", has_bias=True, weight_format=INT8),
    Case(3, 256, 128, weight_format=INT4),
    Case(70, 256, 128, "gelu", weight_format=WeightFormat(bits=4, group=128, mins="float"), has_bias=True),
)

SHAPES = (Case(1, 4096, 14336), Case(16, 4096, 14336), Case(4096, 4096, 14336), Case(1, 4096, 14336, weight_format=INT8),
          Case(16, 4096, 14336, weight_format=INT4), Case(2048, 4096, 14336, weight_format=INT8))
"""Of production."""
