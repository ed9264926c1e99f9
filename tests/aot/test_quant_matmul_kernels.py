"""What the compilers of H200s and TPUs make of quantized products at the shapes of Llama 3.1 8B: all compile, and no dense weight is made."""
import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.quant_matmul import jax_triton, layout_for, quant_matmul
from pallas_kernels.quant_matmul.cases import FORMATS, packed_shapes, with_layout
from pallas_kernels.tiling import device_of
from tpllm.aot.report import ProgramFacts, compile_lowered
from tpllm.aot.topologies import accelerator_mesh

pytestmark = pytest.mark.aot
SHAPES = {"attention": (4096, 4096), "up": (14336, 4096), "down": (4096, 14336), "shard": (1408, 4096), "cut inputs": (4096, 1408)}
"""(N, K)."""
TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


@dataclasses.dataclass(frozen=True)
class Product:
    """One product on one accelerator."""

    accelerator: str
    name: str
    M: int
    shape: str = "attention"
    implementation: str | None = None
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return "-".join(map(str, (self.accelerator, self.name, self.M, self.shape, self.implementation or "best", self.dtype)))


FEW, MANY = 16, 512
PRODUCTS = [
    *(Product("h200:1", name, FEW) for name in FORMATS),
    *(Product("h200:1", name, M, shape) for name, M, shape in (
        ("int8", 1, "up"), ("int4", 1, "down"), ("int8", MANY, "up"), ("int4", MANY, "down"), ("q4_k", MANY, "up"), ("q5_k", MANY, "attention"),
        ("q6_k", MANY, "down"), ("fp8", MANY, "up"), ("w8a8", MANY, "down"), ("fp8-a8", MANY, "up"), ("fp8-g128-a8", MANY, "down"),
        ("int8", 32, "shard"), ("int4", 64, "shard"), ("w8a8", FEW, "shard"), ("fp8-g128-a8", FEW, "cut inputs"), ("int4-g128-zeros", 1, "shard"))),
    *(Product("h200:1", name, FEW, dtype="float16") for name in ("int8", "int4", "q6_k", "fp8")),
    *(Product("h200:1", name, M, implementation="triton") for name in ("int4", "int4-g128-zeros") for M in (1, MANY)),
    *(Product("v5e:2x2", name, FEW) for name in FORMATS),
    *(Product(name, quantization, MANY, "down") for name in TPUS for quantization in ("int8", "int4", "w8a8", "q6_k", "fp8-g128-a8")),
    Product("v5e:2x2", "int4", FEW, "shard"), Product("v5e:2x2", "q5_k", FEW, "cut inputs"),
]


def compiled(product: Product) -> ProgramFacts:
    mesh = accelerator_mesh(product.accelerator, {"tp": 1})
    device, sharding = device_of(mesh.devices.flat[0]), NamedSharding(mesh, PartitionSpec())
    (N, K), layout = SHAPES[product.shape], "rows" if product.implementation in ("triton", "jax_triton") else layout_for(device)
    f = with_layout(FORMATS[product.name], layout)
    arrays, bias = packed_shapes(f, N, K), jax.ShapeDtypeStruct((N,), jnp.float32)
    x = jax.ShapeDtypeStruct((product.M, K), jnp.dtype(product.dtype))
    abstract = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), (x, arrays, bias))

    def run(x, arrays, bias):
        implementation = product.implementation or ("mosaic_tpu" if device.platform == "tpu" else "mosaic_gpu")
        return quant_matmul(x, arrays, weight_format=f, device=device, num_outputs=N, bias=bias, implementation=implementation)
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else contextlib.nullcontext():
        lowered = jax.jit(run).lower(*abstract)
    return compile_lowered(lowered)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_a_kernel_compiles_and_needs_less_memory_than_its_weight(product):
    program = compiled(product)
    N, K = SHAPES[product.shape]
    assert program.custom_calls
    assert program.temporary_bytes < max(FORMATS[product.name].bits * N * K // 8 // 4, 8 * product.M * (N + K)) + 2**20
    assert not [found for found in program.materialized if any(array.shape in ((N, K), (K, N)) for array in found.results)]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_jax_triton_compiles_where_it_is_installed():
    if refusal := jax_triton.refusal():
        pytest.skip(refusal)
    assert compiled(Product("h200:1", "int4", 16, implementation="jax_triton")).custom_calls
