"""Flash attention's kernels through the real compilers, at the shapes of models, and the memory that they need."""
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.tiling import device_of
from tpllm.aot.kernel_memory import lower_flash_attention, temporary_bytes
from tpllm.aot.report import ProgramFacts, compile_lowered
from tpllm.aot.topologies import describe_devices

pytestmark = pytest.mark.aot
ACCELERATORS = ("h200:1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call of a model; ``window``, ``softcap`` and sinks as it has them."""

    name: str
    num_queries: int
    num_keys: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int = 1
    dtype: str = "bfloat16"
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    @property
    def own_bytes(self) -> int:
        """Queries, keys, values and result, heads in whole registers of a TPU."""
        heads = 2 * self.rows * (self.num_queries * self.heads + self.num_keys * self.kv_heads)
        return heads * -(-self.head_dim // 128) * 128 * jnp.dtype(self.dtype).itemsize


SHAPES = (
    Shape("llama-8b", 8192, 8192, 32, 8, 128),
    Shape("chunk of llama-8b", 512, 4096, 32, 8, 128, rows=4),
    Shape("gpt-oss", 4096, 4096, 64, 8, 64, window=128, has_sinks=True),
    Shape("gemma 2", 4096, 4096, 8, 4, 256, window=4096, softcap=50.0),
    Shape("phi 3", 2048, 2048, 32, 32, 96, window=2047),
    Shape("h2o", 2048, 2048, 32, 8, 80),
    Shape("odd", 1000, 3001, 8, 8, 192),
)


def compiled(accelerator: str, shape: Shape) -> ProgramFacts:
    target = describe_devices(accelerator)[0]
    mesh = jax.sharding.Mesh([target], "x", axis_types=(jax.sharding.AxisType.Auto,))

    def array(dims, dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    B, T, S = shape.rows, shape.num_queries, shape.num_keys
    kv = array((B, S, shape.kv_heads, shape.head_dim), shape.dtype)

    def attend(q, k, v, positions, key_positions, sinks):
        return flash_attention(q, k, v, positions, key_positions_BS=key_positions, sinks_N=sinks if shape.has_sinks else None, returns_lse=True,
                               scale=shape.head_dim**-0.5, window=shape.window, softcap=shape.softcap, device=device_of(target),
                               implementation="mosaic_gpu" if target.platform == "gpu" else "mosaic_tpu")
    with jax.set_mesh(mesh):
        return compile_lowered(jax.jit(attend).lower(array((B, T, shape.heads, shape.head_dim), shape.dtype), kv, kv, array((B, T), "int32"),
                                                     array((B, S), "int32"), array((shape.heads,), "float32")))


@pytest.mark.parametrize(("accelerator", "shape"), [pytest.param(accelerator, shape, id=f"{accelerator} {shape.name}") for accelerator in ACCELERATORS
                                                     for shape in (SHAPES if accelerator in ACCELERATORS[:2] else SHAPES[1:4])])
def test_the_kernel_compiles_at_the_shapes_of_models_and_no_scores_lie_in_memory(accelerator, shape):
    program = compiled(accelerator, shape)
    assert sum("tpu_custom_call" in target or "mosaic_gpu" in target for target in program.custom_calls) == 1
    is_padded = shape.num_keys % 128 or shape.num_queries % 128
    moved = shape.own_bytes if is_padded or not accelerator.startswith("h200") else 0  # a TPU wants heads before tokens
    assert program.temporary_bytes <= 1.2 * moved + 2 * MIB


@pytest.mark.parametrize("accelerator", ["v5e:2x2", "v6e:2x2"])
def test_a_tpu_takes_float32(accelerator):
    compiled(accelerator, Shape("float32", 2048, 2048, 8, 8, 128, dtype="float32"))


@pytest.mark.parametrize("accelerator", ACCELERATORS[:2])
def test_temporaries_grow_no_faster_than_the_sequence(accelerator):
    for length, needed in temporary_bytes(lambda length: lower_flash_attention(accelerator, length), (1024, 16384, 131072)).items():
        assert needed <= 1.2 * Shape("", length, length, 32, 8, 128).own_bytes + 2 * MIB


@pytest.mark.parametrize("accelerator", ACCELERATORS[:2])
def test_those_of_the_gradient_do_neither(accelerator):
    needed = temporary_bytes(lambda length: lower_flash_attention(accelerator, length, differentiates=True), (32768,))[32768]
    assert needed <= 3 * Shape("", 32768, 32768, 32, 8, 128).own_bytes
    assert needed < 2 * 32768**2  # the scores of one head of 32
