"""What the gated product is tested and measured on."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_mlp.reference import Activation, ClampedGlu
from pallas_kernels.quant_matmul.cases import FORMATS, random_weight
from pallas_kernels.quant_matmul.packing import WeightFormat, pack


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
        weights = tuple(jnp.asarray(rng.normal(size=(self.F, self.D)) / self.D**0.5, self.dtype) if f is None else
                        jax.tree.map(jnp.asarray, pack(f, **random_weight(f, self.F, self.D, rng))) for _ in range(2))
        biases = tuple(jnp.asarray(rng.normal(size=self.F), self.dtype) if self.has_bias else None for _ in range(2))
        return jnp.asarray(rng.normal(size=(self.M, self.D)), self.dtype), weights, biases, f


INT8, INT4 = FORMATS["int8"], FORMATS["int4"]
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
    Case(3, 256, 128, weight_format=FORMATS["q4_k"]),
    Case(2, 256, 128, weight_format=FORMATS["q6_k"]),
    Case(9, 128, 128, weight_format=FORMATS["fp8"]),
)
RARER_PACKED_CASES = (
    Case(3, 256, 100, weight_format=FORMATS["q5_k"], has_bias=True),
    Case(40, 128, 128, "gelu", weight_format=FORMATS["fp8-e5m2"]),
    Case(2, 256, 128, weight_format=FORMATS["fp8-g128"]),
    Case(5, 384, 128, weight_format=FORMATS["int4-g128-zeros"]),
    Case(33, 128, 128, weight_format=FORMATS["int8-g32"]),
)

SHAPES = (Case(1, 4096, 14336), Case(16, 4096, 14336), Case(4096, 4096, 14336), Case(1, 4096, 14336, weight_format=INT8),
          Case(16, 4096, 14336, weight_format=INT4), Case(2048, 4096, 14336, weight_format=INT8),
          *(Case(8, 4096, 14336, weight_format=FORMATS[name]) for name in ("q4_k", "q5_k", "q6_k", "fp8")))
"""Shapes of models in use."""
