"""What the compilers of H200s and TPUs make of paged attention's kernels at the shapes of Llama 3.1 8B, alone and after the cache is written."""
import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.kv_append import kv_append
from pallas_kernels.page_table import PageTable
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.tiling import device_of
from tpllm.aot.report import compile_lowered
from tpllm.aot.topologies import accelerator_mesh

pytestmark = pytest.mark.aot
MIB = 2**20
NAMES = {"h200:1": "mosaic_gpu", "v5e:2x2": "mosaic_tpu", "v5p:2x2x1": "mosaic_tpu", "v6e:2x2": "mosaic_tpu"}


@dataclasses.dataclass(frozen=True)
class Step:
    """One call: 64 rows of up to 8192 tokens in a pool of half as many."""

    tokens: int | None = None  # of a ragged call; None for decode
    page_size: int = 32
    cache_dtype: str = "bfloat16"
    heads: int = 32
    head_dim: int = 128
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    rows: int = 64
    kv_heads: int = 8
    max_len: int = 8192

    def __str__(self) -> str:
        shown = [f"{field.name}={value}" for field in dataclasses.fields(self) if (value := getattr(self, field.name)) != field.default]
        return " ".join(shown) or "decode"

    @property
    def cache_shape(self) -> tuple[int, ...]:
        return max(self.rows * self.max_len // 2 // self.page_size, self.rows), self.kv_heads, self.page_size, self.head_dim

    def abstract(self, sharding) -> dict:
        def array(shape, dtype):
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
        B, T = (self.rows, 1) if self.tokens is None else (1, self.tokens)
        cache, table = array(self.cache_shape, self.cache_dtype), array((self.rows, self.max_len // self.page_size), "int32")
        scales = (array(self.cache_shape[:3], "float32"),) * 2 if jnp.dtype(self.cache_dtype).itemsize == 1 else None
        return {"q_BTNH": array((B, T, self.heads, self.head_dim), "bfloat16"), "k_PKSH": cache, "v_PKSH": cache,
                "positions_BT": array((B, T), "int32"), "scales": scales, "sinks_N": array((self.heads,), "float32") if self.has_sinks else None,
                "table": PageTable(table, None if self.tokens is None else array((B, T), "int32"))}


DECODE, RAGGED = Step(), Step(tokens=512)
CASES = [
    *(("h200:1", step) for step in (
        DECODE, RAGGED, Step(cache_dtype="int8"), Step(cache_dtype="float8_e4m3fn"), Step(tokens=512, cache_dtype="int8", has_sinks=True),
        Step(page_size=16, window=4096, softcap=50.0, has_sinks=True), Step(page_size=8192, tokens=512, head_dim=256, heads=16),
        Step(head_dim=64, page_size=128))),
    *(("v5e:2x2", step) for step in (
        DECODE, RAGGED, Step(cache_dtype="int8"), Step(cache_dtype="float8_e4m3fn", page_size=16),
        Step(tokens=512, cache_dtype="int8", has_sinks=True),
        Step(page_size=128, window=4096, softcap=50.0, has_sinks=True), Step(page_size=8192, head_dim=256, heads=16))),
    *((name, step) for name in ("v5p:2x2x1", "v6e:2x2") for step in (DECODE, RAGGED, Step(cache_dtype="float8_e4m3fn"))),
]


def compile_for(name, step, run, donated=()):
    """``run(arrays, device)`` of this step, compiled for one device."""
    mesh = accelerator_mesh(name, {"tp": 1})
    device = device_of(mesh.devices.flat[0])
    on_mesh = jax.set_mesh(mesh) if jax.__version_info__ >= (0, 11) else contextlib.nullcontext()
    with on_mesh:
        arrays = step.abstract(NamedSharding(mesh, PartitionSpec()))
        caches = {key: arrays.pop(key) for key in ("k_PKSH", "v_PKSH", "scales")}
        return compile_lowered(jax.jit(lambda caches, arrays: run(caches, arrays, device), donate_argnums=donated).lower(caches, arrays))


def attend(step, name, caches, arrays, device):
    return paged_attention(**caches, **arrays, scale=step.head_dim ** -0.5, window=step.window, softcap=step.softcap, device=device,
                           implementation=NAMES[name])


def turned_scales_bytes(step):
    """Of the scales as a TPU's kernel takes them: in rows of at least 128."""
    num_pages, num_heads, page_size, _ = step.cache_shape
    return 0 if step.cache_dtype == "bfloat16" else 2 * 4 * num_pages * num_heads * max(page_size, 128)


@pytest.mark.parametrize(("name", "step"), CASES, ids=str)
def test_a_kernel_compiles_with_no_more_memory_than_queries_and_parts_of_the_sums_take(name, step):
    program = compile_for(name, step, lambda *arguments: attend(step, name, *arguments))
    queries = 2 * (step.tokens or step.rows) * step.heads * step.head_dim
    if name == "h200:1":
        parts = step.max_len // 1024 * (step.rows * step.heads * (step.head_dim + 2 * 64) * 4) if step.tokens is None else 0
        assert program.temporary_bytes <= 4 * queries + parts + MIB
    else:  # runs of 16 tokens, most of which are padding beside 64 rows that decode; and scales, which XLA lays out with pages innermost
        assert program.temporary_bytes <= 16 * queries + 16 * MIB + turned_scales_bytes(step)
    largest = max((array.num_elements for found in program.materialized for array in found.results), default=0)
    assert largest < math.prod(step.cache_shape) // 8, "the cache is copied"


@pytest.mark.parametrize(("name", "step"), [
    *((name, step) for name in ("h200:1", "v5e:2x2") for step in (DECODE, RAGGED, Step(cache_dtype="int8")))], ids=str)
def test_a_cache_that_is_written_and_then_read_is_never_copied(name, step):
    def append_and_attend(caches, arrays, device):
        new_BTKH = arrays["q_BTNH"][:, :, ::step.heads // step.kv_heads]
        keys_and_values = (caches["k_PKSH"], caches["v_PKSH"])
        caches["k_PKSH"], caches["v_PKSH"] = kv_append(keys_and_values, (new_BTKH, 2 * new_BTKH), arrays["positions_BT"], device=device,
                                                       table=arrays["table"])
        return caches, attend(step, name, caches, arrays, device)
    program = compile_for(name, step, append_and_attend, donated=(0,))
    assert program.num_aliased == (2 if step.cache_dtype == "bfloat16" else 4)
    cache_elements = math.prod(step.cache_shape)
    written = [array for found in program.materialized for array in found.results if array.num_elements >= cache_elements]
    assert len(written) == 2, written  # in place
    assert program.temporary_bytes < cache_elements // 4
