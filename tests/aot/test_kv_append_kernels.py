"""Appending to the cache as the compilers of TPUs make it: in place, of any dtype, with little beside."""
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.kv_append import kv_append
from pallas_kernels.page_table import PageTable
from tests.aot.kernels import TPUS, compile_kernel, device

pytestmark = pytest.mark.aot


def abstract(rows, tokens, *, dtype="bfloat16", page_size=32, kv_heads=8, head_dim=128):
    """(keys, values, new keys, new values, positions, pages) of a pool of 1024 pages."""
    cache = jax.ShapeDtypeStruct((1024, kv_heads, page_size, head_dim), jnp.dtype(dtype))
    new = jax.ShapeDtypeStruct((rows, tokens, kv_heads, head_dim), jnp.bfloat16 if cache.dtype.itemsize > 1 else cache.dtype)
    return cache, cache, new, new, jax.ShapeDtypeStruct((rows, tokens), jnp.int32), jax.ShapeDtypeStruct((rows, 64), jnp.int32)


@pytest.mark.parametrize("accelerator", TPUS)
@pytest.mark.parametrize("shapes", [
    abstract(64, 1), abstract(1, 512), abstract(64, 1, dtype="int8"), abstract(1, 512, dtype="float8_e4m3fn"),
    abstract(16, 1, dtype="float32", page_size=16, kv_heads=1), abstract(4, 128, page_size=128, kv_heads=32, head_dim=256)],
    ids=["decode", "chunk", "int8", "fp8 chunk", "float32", "many wide heads"])
def test_the_kernel_compiles_and_writes_each_cache_once(accelerator, shapes):
    def append(keys, values, new_keys, new_values, positions, pages):
        return kv_append((keys, values), (new_keys, new_values), positions, device=device(accelerator), table=PageTable(pages),
                         implementation="mosaic_tpu")
    program = compile_kernel(accelerator, append, *shapes, donated=(0, 1))
    assert program.num_aliased == 2
    large = [array for found in program.materialized for array in found.results if array.num_elements >= shapes[0].size]
    assert len(large) == 2, "in place"
    new_bytes = 2 * shapes[2].size * shapes[0].dtype.itemsize
    assert program.temporary_bytes <= 4 * new_bytes + 2**20
