"""What an append writes into a cache, and what it leaves alone."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_append import as_bits, from_bits, kv_append_reference, scatter_entries

P, K, S, H = 4, 2, 24, 3
append = jax.jit(kv_append_reference)


def random(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.dtype(dtype))


def expected(cache, new, positions, rows):
    cache = np.array(cache)
    for b, row in enumerate(rows):
        for t, position in enumerate(positions[b]):
            if position >= 0:
                cache[row, :, position] = np.asarray(new[b, t])
    return cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize(("positions", "rows"), [
    ([[3], [0], [-1], [23]], None),  # decode of every row, one of them idle
    ([[7], [2]], [3, 1]),
    ([[4, 5, 6, 7, 8]], [2]),  # a chunk of one row
    ([[4, 5, 6, -1, -1]], [0]),
    ([[-1, -1, -1, -1]], [1]),
    ([[19, 20, 21, 22, 23]], None),
    ([[0, 1, -1], [5, 6, 7], [-1, -1, -1]], [3, 0, 2]),
])
def test_new_entries_are_written_to_their_rows_and_nothing_else_changes(positions, rows, dtype):
    cache = random((P, K, S, H)).astype(dtype)
    new = 5 * random((len(positions), len(positions[0]), K, H), seed=1)
    out = append(cache, new, jnp.array(positions, jnp.int32), None if rows is None else jnp.array(rows, jnp.int32))
    assert out.dtype == cache.dtype
    wanted = expected(cache, new.astype(dtype), positions, range(len(positions)) if rows is None else rows)
    assert np.asarray(out).tobytes() == wanted.tobytes()
    by_entries = scatter_entries(cache, new.astype(dtype), jnp.arange(len(positions)) if rows is None else jnp.array(rows),
                                 jnp.array(positions, jnp.int32))
    assert np.asarray(by_entries).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int32"])
def test_bits_and_back_is_the_same_array(dtype):
    x = (random((3, 5)) * 10).astype(dtype)
    assert jnp.issubdtype(as_bits(x).dtype, jnp.integer) or dtype == "float32"
    back = from_bits(as_bits(x), x.dtype)
    assert back.dtype == x.dtype
    assert np.asarray(back).tobytes() == np.asarray(x).tobytes()
