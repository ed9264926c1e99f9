"""What an append writes into a cache, and what it leaves alone."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_append import as_bits, from_bits, kv_append, kv_append_reference, scatter_entries
from pallas_kernels.page_table import PageTable, one_page_a_row
from pallas_kernels.tiling import Device

P, K, S, H = 4, 2, 24, 3
CPU, V5E = Device("cpu"), Device("tpu", "TPU v5 lite")
append, scatter = jax.jit(kv_append_reference), jax.jit(scatter_entries)


def random(shape, dtype="float32", seed=0, times=1):
    """A numpy array: what is computed of it outside of the ops costs no compile."""
    return (times * np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=2)
def pages_of(table, positions, page_size):
    return table.pages_of(positions, page_size)


def padded(positions, rows, shapes):
    """Positions, and rows of each call's row or token, in the first of a few shapes that holds them: each compiles programs of its own."""
    B, T = np.shape(positions)
    more = next((b - B, t - T) for b, t in shapes if b >= B and t >= T)
    positions = np.pad(np.array(positions, np.int32), ((0, more[0]), (0, more[1])), constant_values=-1)
    return positions, None if rows is None else np.pad(np.array(rows, np.int32), [(0, n) for n in more[:np.ndim(rows)]])


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
    positions, rows = padded(positions, rows, [(4, 5)] if rows is None else [(3, 5)])
    cache = random((P, K, S, H), dtype)
    new = random((*positions.shape, K, H), seed=1, times=5)
    out = append(cache, new, positions, None if rows is None else one_page_a_row(P, rows))
    assert out.dtype == cache.dtype
    wanted = expected(cache, new.astype(dtype), positions, range(len(positions)) if rows is None else rows)
    assert np.asarray(out).tobytes() == wanted.tobytes()
    pages = np.asarray(pages_of(one_page_a_row(P, rows), positions, S))
    by_entries = scatter(cache, new.astype(dtype), np.where(pages < 0, P, pages), positions % S)
    assert np.asarray(by_entries).tobytes() == wanted.tobytes()


PAGES = [[5, 2, -1], [5, 6, 1], [0, -1, 4], [3, 2**28, -7]]  # of 8 tokens each; rows 0 and 1 share their first
NUM_PAGES, PAGE_SIZE = 9, 8


def expected_pages(cache, new, positions, rows, pages):
    """By a loop; rows are of each token."""
    cache = np.array(cache)
    num_pages, _, page_size, _ = cache.shape
    for (b, t), position in np.ndenumerate(np.array(positions)):
        if 0 <= rows[b][t] < len(pages) and 0 <= position < page_size * len(pages[0]):
            page = pages[rows[b][t]][position // page_size]
            if 0 <= page < num_pages:
                cache[page, :, position % page_size] = np.asarray(new[b, t])
    return cache


def rows_by_token(positions, rows):
    return np.broadcast_to(np.reshape(range(len(positions)) if rows is None else rows, (len(positions), -1)), np.shape(positions))


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
    positions, rows = padded(positions, rows, [(4, 1)] if rows is None else [(3, 3), (2, 7)])
    cache = random((NUM_PAGES, K, PAGE_SIZE, H), dtype)
    new = random((*positions.shape, K, H), dtype, seed=1, times=5)
    table = PageTable(np.array(PAGES, np.int32), rows)
    wanted = expected_pages(cache, new, positions, rows_by_token(positions, rows), PAGES)
    assert np.asarray(append(cache, new, positions, table)).tobytes() == wanted.tobytes()
    pages = np.asarray(pages_of(table, positions, PAGE_SIZE))
    by_entries = scatter(cache, new, np.where((pages >= 0) & (pages < NUM_PAGES), pages, NUM_PAGES), positions % PAGE_SIZE)
    assert np.asarray(by_entries).tobytes() == wanted.tobytes()


MANY_ROWS = [[page] for page in np.random.default_rng(0).permutation(40)]


@jax.jit
def append_kernel(caches, new, positions, table):
    return kv_append(caches, new, positions, table=table, device=V5E, implementation="mosaic_tpu", interpret=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize(("positions", "rows", "pages"), [
    pytest.param([[8], [95], [64], [-1]], [0, 1, 2, 3], PAGES, marks=pytest.mark.newest),
    ([[31], [32]], [0, 1], PAGES),
    ([[3 * row % 32] for row in range(40)], None, MANY_ROWS),  # more than a group of tiles
    ([[*range(27, 41)]], [1], PAGES),  # over the end of a page
    ([[*range(96)]], [1], [[5, 6, 1], [2, 7, 3]] * 2),  # whole tiles
    ([[*range(1, 95)]], [1], [[5, 6, 1], [2, 7, 3]] * 2),
    ([[60, 61, 62, 63, 64, 65], [0, 1, 2, -1, -1, -1]], [0, 2], PAGES),  # on to a page that is not there; padding
    ([[-1] * 9] * 2, [0, 1], PAGES),
    ([[62, 63, 64], [30, 31, 32]], [3, 3], PAGES),  # an index beyond the pages, a negative one
    ([[40], [5], [7]], [-1, 4, 2], PAGES),  # rows that are not there
    ([[*range(29, 63), 64, 22, -1, -1]], [[*[1] * 34, 2, 3, 0, 0]], PAGES),  # ragged
], ids=["decode", "end of a page", "many rows", "chunk", "whole tiles", "all but two", "padding", "nothing", "no page", "no row", "ragged"])
def test_the_kernel_writes_new_entries_to_their_pages_and_changes_nothing_else(positions, rows, pages, dtype):
    rng, (positions, rows) = np.random.default_rng(), padded(positions, rows, [(4, 1), (40, 1), (2, 9), (1, 96)])
    caches = tuple(random((40, 2, 32, 128), dtype, seed=rng) for _ in range(2))
    new = tuple(random((*positions.shape, 2, 128), dtype, seed=rng, times=9) for _ in range(2))
    out = append_kernel(caches, new, positions, PageTable(np.array(pages, np.int32), rows))
    for written, cache, entries in zip(out, caches, new, strict=True):
        assert written.dtype == cache.dtype
        wanted = expected_pages(cache, entries, positions, rows_by_token(positions, rows), pages)
        assert np.asarray(written).tobytes() == wanted.tobytes()


def test_the_kernel_casts_takes_a_padded_cache_and_differentiates_as_the_reference_does():
    cache, new, positions = random((2, 2, 32, 128), "bfloat16"), random((2, 3, 2, 128), seed=1), jnp.array([[4, 5, 6], [30, 31, -1]])

    def total(cache, new, implementation):
        out, = kv_append((cache,), (new,), positions, device=V5E, implementation=implementation, interpret=implementation != "reference")
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out
    differentiate = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True), static_argnums=2)
    (kernel, written), (reference, wanted) = (differentiate(cache, new, name) for name in ("mosaic_tpu", "reference"))
    assert np.asarray(written).tobytes() == np.asarray(wanted).tobytes()
    for actual, expected_gradient in zip(kernel, reference, strict=True):
        assert np.asarray(actual).tobytes() == np.asarray(expected_gradient).tobytes()


@pytest.mark.parametrize(("shape", "dtype", "device", "message"), [
    ((4, 2, 32, 64), "bfloat16", V5E, "takes a head dim that is a multiple of 128, not 64"),
    ((4, 2, 8, 128), "bfloat16", V5E, "takes pages of a multiple of 16 tokens, not 8"),
    ((4, 2, 16, 128), "int8", V5E, "takes pages of a multiple of 32 tokens, not 16"),
    ((4, 2, 32, 128), "float16", V5E, "takes a cache of bfloat16, float32, int8, float8_e4m3fn, not float16"),
    ((4, 2, 32, 128), "bfloat16", CPU, "needs a TPU, not 'cpu'"),
])
def test_what_the_kernel_cannot_append_to_is_refused_and_goes_to_the_reference_unnamed(shape, dtype, device, message):
    cache, new, positions = jnp.zeros(shape, dtype), jnp.ones((1, 1, *shape[1::2]), dtype), jnp.array([[3]])
    with pytest.raises(ValueError, match=f"kv_append: implementation 'mosaic_tpu' {message}"):
        kv_append((cache,), (new,), positions, device=device, implementation="mosaic_tpu")
    out, = kv_append((cache,), (new,), positions, device=device)
    assert np.asarray(out).tobytes() == np.asarray(kv_append_reference(cache, new, positions)).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int32"])
def test_bits_and_back_is_the_same_array(dtype):
    x = (random((3, 5)) * 10).astype(dtype)
    assert jnp.issubdtype(as_bits(x).dtype, jnp.integer) or dtype == "float32"
    back = from_bits(as_bits(x), x.dtype)
    assert back.dtype == x.dtype
    assert np.asarray(back).tobytes() == np.asarray(x).tobytes()
