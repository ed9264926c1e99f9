"""What an append writes into a cache, and what it leaves alone."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_append import as_bits, from_bits, kv_append_reference, scatter_entries
from pallas_kernels.page_table import PageTable, one_page_a_row

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
    out = append(cache, new, jnp.array(positions, jnp.int32), None if rows is None else one_page_a_row(P, jnp.array(rows, jnp.int32)))
    assert out.dtype == cache.dtype
    wanted = expected(cache, new.astype(dtype), positions, range(len(positions)) if rows is None else rows)
    assert np.asarray(out).tobytes() == wanted.tobytes()
    positions = jnp.array(positions, jnp.int32)
    pages = one_page_a_row(P, None if rows is None else jnp.array(rows)).pages_of(positions, S)
    by_entries = scatter_entries(cache, new.astype(dtype), jnp.where(pages < 0, P, pages), positions % S)
    assert np.asarray(by_entries).tobytes() == wanted.tobytes()


PAGES = [[5, 2, -1], [5, 6, 1], [0, -1, 4], [3, 2**28, -7]]  # of 8 tokens each; rows 0 and 1 share their first
NUM_PAGES, PAGE_SIZE = 9, 8


def expected_pages(cache, new, positions, rows):
    """By a loop; rows are of each token."""
    cache = np.array(cache)
    for (b, t), position in np.ndenumerate(np.array(positions)):
        if 0 <= rows[b][t] < len(PAGES) and 0 <= position < PAGE_SIZE * 3 and 0 <= (page := PAGES[rows[b][t]][position // PAGE_SIZE]) < NUM_PAGES:
            cache[page, :, position % PAGE_SIZE] = np.asarray(new[b, t])
    return cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize(("positions", "rows"), [
    ([[8], [23], [16], [-1]], None),
    ([[8, 9, 10], [14, 15, 16]], [0, 1]),  # over the end of a page
    ([[15, 16, -1], [7, 8, -1]], [0, 2]),  # on to pages that are not there
    ([[8, 9], [16, 17], [3, 24]], [3, 3, 2]),  # an index beyond the pages, a negative one, a position beyond the row
    ([[3], [3], [5]], [-1, 4, 2]),  # rows that are not there
    ([[9, 10, 11, 12, 2, 22, -1]], [[1, 1, 1, 1, 3, 2, 0]]),  # ragged
    ([[8, 3, -1], [17, 18, 3]], [[0, 2, 2], [1, 1, 3]]),
])
def test_new_entries_are_written_to_their_pages_and_nothing_else_changes(positions, rows, dtype):
    cache = random((NUM_PAGES, K, PAGE_SIZE, H)).astype(dtype)
    new = (5 * random((len(positions), len(positions[0]), K, H), seed=1)).astype(dtype)
    table = PageTable(jnp.array(PAGES, jnp.int32), None if rows is None else jnp.array(rows, jnp.int32))
    positions = jnp.array(positions, jnp.int32)
    by_token = np.broadcast_to(np.reshape(range(len(positions)) if rows is None else rows, (len(positions), -1)), positions.shape)
    wanted = expected_pages(cache, new, positions, by_token)
    assert np.asarray(append(cache, new, positions, table)).tobytes() == wanted.tobytes()
    pages = table.pages_of(positions, PAGE_SIZE)
    is_there = (pages >= 0) & (pages < NUM_PAGES)
    by_entries = scatter_entries(cache, new, jnp.where(is_there, pages, NUM_PAGES), positions % PAGE_SIZE)
    assert np.asarray(by_entries).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int32"])
def test_bits_and_back_is_the_same_array(dtype):
    x = (random((3, 5)) * 10).astype(dtype)
    assert jnp.issubdtype(as_bits(x).dtype, jnp.integer) or dtype == "float32"
    back = from_bits(as_bits(x), x.dtype)
    assert back.dtype == x.dtype
    assert np.asarray(back).tobytes() == np.asarray(x).tobytes()
