"""Attention, with a cache and without, against softmax in float64; and what a row's result may not depend on."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention_reference
from pallas_kernels.kv_append import quantize_entries
from pallas_kernels.page_table import PageTable, one_page_a_row
from pallas_kernels.paged_attention import BLOCK, paged_attention_reference

SCALE = 0.37
flash = jax.jit(flash_attention_reference, static_argnames=("scale", "window", "softcap"))
paged = jax.jit(paged_attention_reference, static_argnames=("scale", "window", "softcap"))
quantize = jax.jit(quantize_entries, static_argnums=1)


def attention_in_float64(q_BTNH, k_PKSH, v_PKSH, positions_BT, *, rows=None, window=None, softcap=None, sinks_N=None):
    """One query at a time, only the visible keys, float64."""
    q_BTNH, k_PKSH, v_PKSH = (np.asarray(x, np.float64) for x in (q_BTNH, k_PKSH, v_PKSH))
    out = np.zeros(q_BTNH.shape)
    group = q_BTNH.shape[2] // k_PKSH.shape[1]
    for b, t, n in np.ndindex(q_BTNH.shape[:3]):
        position = int(positions_BT[b, t])
        if position < 0:
            continue
        row, first = b if rows is None else rows[b], 0 if window is None else max(0, position - window + 1)
        keys, values = (x[row, n // group, first:position + 1] for x in (k_PKSH, v_PKSH))
        scores = keys @ q_BTNH[b, t, n] * SCALE
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ values / (weights.sum() + (0 if sinks_N is None else np.exp(float(sinks_N[n]) - scores.max())))
    return out


def arrays(seed, *, batch, tokens, heads, kv_heads, head_dim, rows, length, dtype="float32"):
    rng = np.random.default_rng(seed)
    return tuple(jax.device_put((2 * rng.normal(size=shape)).astype(np.float32).astype(jnp.dtype(dtype))) for shape in (
        (batch, tokens, heads, head_dim), (rows, kv_heads, length, head_dim), (rows, kv_heads, length, head_dim)))


@pytest.mark.parametrize(("window", "dtype", "tolerance"), [
    (None, "float32", 3e-6), (5, "float32", 3e-6), (150, "float32", 3e-6), (5, "bfloat16", 3e-2)])
@pytest.mark.parametrize(("lengths", "num_tokens", "length", "rows"), [
    ([1, 17, 300, 128], 1, 300, None),  # decode; a cache that is no multiple of the block
    ([129, 5], 1, 256, [3, 1]),
    ([200], 9, 300, [2]),  # the last chunk of a prefill
    ([3], 9, 300, [2]),  # a chunk with padding
    ([30, 7, 0], 8, 40, None),  # a cache shorter than a block, a row that is all padding
])
def test_attention_to_a_cache_is_softmax_in_float64(lengths, num_tokens, length, rows, window, dtype, tolerance):
    q, k, v = arrays(len(lengths), batch=len(lengths), tokens=num_tokens, heads=6, kv_heads=2, head_dim=8, rows=4, length=length, dtype=dtype)
    first = np.maximum(np.array(lengths) - num_tokens, 0)[:, None]
    positions = first + np.arange(num_tokens)
    positions = np.where(positions < np.array(lengths)[:, None], positions, -1).astype(np.int32)
    out = paged(q, k, v, positions, table=None if rows is None else one_page_a_row(4, np.array(rows, np.int32)), scale=SCALE, window=window)
    assert out.dtype == q.dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()
    real = positions >= 0
    wanted = attention_in_float64(q, k, v, positions, rows=rows, window=window)
    np.testing.assert_allclose(np.asarray(out, np.float64)[real], wanted[real], rtol=tolerance, atol=tolerance)


SINKS = np.array([-3, 0.5, 2, 9], np.float32)


@pytest.mark.parametrize("how", [{}, {"window": 7}, {"softcap": 1.5}, {"softcap": 0.7, "window": 11}, {"sinks_N": SINKS},
                                 {"sinks_N": SINKS, "window": 5}], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 40, 150])
def test_attention_without_a_cache_is_softmax_in_float64_and_equals_attention_to_one(num_tokens, how):
    q, k, v = arrays(5, batch=3, tokens=num_tokens, heads=4, kv_heads=2, head_dim=8, rows=3, length=num_tokens)
    positions = np.where(np.arange(num_tokens) < np.array([[num_tokens], [(num_tokens + 1) // 2], [1]]), np.arange(num_tokens), -1)
    positions = positions.astype(np.int32)
    out = flash(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), positions, scale=SCALE, **how)
    real = positions >= 0
    wanted = attention_in_float64(q, k, v, positions, **how)
    np.testing.assert_allclose(np.asarray(out)[real], wanted[real], rtol=3e-6, atol=3e-6)
    cached = paged(q, k, v, positions, scale=SCALE, **how)
    np.testing.assert_allclose(np.asarray(cached)[real], np.asarray(out)[real], rtol=3e-6, atol=3e-6)


def in_pages(row_caches, page_size, seed):
    """(pools of the same rows in pages of any order, NaN everywhere else; pages_RL) of rows [R, K, S, H]."""
    R, _, S, _ = row_caches[0].shape
    L = -(-S // page_size)
    pages_RL = np.random.default_rng(seed).permutation(R * L + 4)[:R * L].reshape(R, L).astype(np.int32)
    pools = []
    for rows in map(np.asarray, row_caches):
        pool = np.full((R * L + 4, rows.shape[1], page_size, rows.shape[3]), 99 if rows.dtype == np.int8 else np.nan, rows.dtype)
        for (r, part), page in np.ndenumerate(pages_RL):
            piece = rows[r, :, part * page_size:(part + 1) * page_size]
            pool[page, :, :piece.shape[1]] = piece
        pools.append(jax.device_put(pool))
    return (*pools, pages_RL)


@pytest.mark.parametrize(("page_size", "how", "dtype", "tolerance"), [
    *((page_size, {}, "float32", 3e-6) for page_size in (8, 16, 48, 128, 200)),
    *((page_size, how, "float32", 3e-6) for page_size in (16, 200) for how in ({"window": 5}, {"window": 150, "softcap": 1.5})),
    (48, {"window": 5}, "bfloat16", 3e-2)], ids=str)
@pytest.mark.parametrize(("starts", "num_tokens", "rows"), [((0, 16, 299, 127, -1), 1, None), ((128, 4), 1, (3, 1)), ((191,), 9, (2,))])
def test_attention_to_pages_is_softmax_in_float64_wherever_they_lie(starts, num_tokens, rows, page_size, how, dtype, tolerance):
    q, k, v = arrays(len(starts), batch=len(starts), tokens=num_tokens, heads=6, kv_heads=2, head_dim=8, rows=5, length=300, dtype=dtype)
    positions = np.where(np.array(starts)[:, None] < 0, -1, np.array(starts)[:, None] + np.arange(num_tokens)).astype(np.int32)
    results = []
    for seed in (0, 1):
        k_pages, v_pages, pages_RL = in_pages((k, v), page_size, seed)
        for b, row in enumerate(range(len(starts)) if rows is None else rows):
            pages_RL[row, positions[b].max() // page_size + 1:] = -1  # what a row has not reached
        results.append(paged(q, k_pages, v_pages, positions, table=PageTable(pages_RL, rows and np.array(rows, np.int32)), scale=SCALE, **how))
    real = positions >= 0
    wanted = attention_in_float64(q, k, v, positions, rows=rows, **how)
    np.testing.assert_allclose(np.asarray(results[0], np.float64)[real], wanted[real], rtol=tolerance, atol=tolerance)
    assert np.isfinite(np.asarray(results[0], np.float32)[real]).all()
    assert np.asarray(results[0])[real].tobytes() == np.asarray(results[1])[real].tobytes()


@pytest.mark.parametrize(("page_size", "how", "dtype", "tolerance"), [
    (16, {}, "float32", 3e-6), (64, {"window": 40}, "float32", 3e-6), (64, {"sinks_N": SINKS}, "float32", 3e-6),
    (300, {"sinks_N": SINKS}, "float32", 3e-6),
    (16, {"window": 40}, "bfloat16", 3e-2), (300, {}, "bfloat16", 3e-2)], ids=str)
def test_tokens_of_several_rows_in_one_call_attend_as_in_calls_of_their_own(page_size, how, dtype, tolerance):
    q, k, v = arrays(3, batch=1, tokens=16, heads=4, kv_heads=2, head_dim=8, rows=4, length=300, dtype=dtype)
    runs = ((2, 60, 10), (0, 299, 1), (3, 0, 2))  # row, start, tokens; then padding
    positions = np.concatenate([*(np.arange(start, start + count) for _, start, count in runs), [-1] * 3])[None].astype(np.int32)
    rows = np.concatenate([*(np.full(count, row) for row, _, count in runs), [0] * 3])[None].astype(np.int32)
    k_pages, v_pages, pages_RL = in_pages((k, v), page_size, 5)
    out = np.asarray(paged(q, k_pages, v_pages, positions, table=PageTable(pages_RL, rows), scale=SCALE, **how), np.float64)
    first = 0
    for row, _, count in runs:
        part = slice(first, first + count)
        alone = paged(q[:, part], k_pages, v_pages, positions[:, part], table=PageTable(pages_RL, np.array([row], np.int32)), scale=SCALE,
                      **how)
        np.testing.assert_allclose(out[:, part], np.asarray(alone, np.float64), rtol=tolerance, atol=tolerance)
        wanted = attention_in_float64(q[:, part], k, v, positions[:, part], rows=[row], **how)
        np.testing.assert_allclose(out[:, part], wanted, rtol=tolerance, atol=tolerance)
        first += count


@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("page_size", [16, 48, 128, 300])
def test_keys_and_values_with_scales_are_read_from_the_same_pages_as_these(page_size, cache_dtype):
    q, *kv = arrays(6, batch=3, tokens=1, heads=4, kv_heads=2, head_dim=8, rows=3, length=300)
    positions = np.array([[5], [299], [128]], np.int32)
    codes, scales = zip(*(quantize(x, jnp.dtype(cache_dtype)) for x in kv), strict=True)
    read = [np.asarray(x, np.float64) * np.asarray(steps)[..., None] for x, steps in zip(codes, scales, strict=True)]
    for x, near in zip(kv, read, strict=True):  # half a step of int8, or of three bits of mantissa
        most = np.abs(x).max(-1, keepdims=True)
        assert (np.abs(near - np.asarray(x)) <= (most / 127 * 0.501 if cache_dtype == "int8" else np.maximum(np.abs(x) / 16, most / 448))).all()
    wanted = attention_in_float64(q, *read, positions)
    results = []
    for seed in (7, 8):
        *pools, pages_RL = in_pages((*codes, *(steps[..., None] for steps in scales)), page_size, seed)
        caches, how = pools[:2], {"scales": tuple(steps[..., 0] for steps in pools[2:]), "scale": SCALE}
        results.append(np.asarray(paged(q, *caches, positions, table=PageTable(pages_RL), **how)))
        ragged = paged(q.reshape(1, 3, 4, 8), *caches, positions.reshape(1, 3), table=PageTable(pages_RL, np.arange(3, dtype=np.int32)[None]), **how)
        np.testing.assert_allclose(np.asarray(ragged)[0], results[-1][:, 0], rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(results[0], wanted, rtol=3e-6, atol=3e-6)
    assert results[0].tobytes() == results[1].tobytes()


def test_rows_that_share_pages_see_the_same_prefix():
    q, k, v = arrays(4, batch=2, tokens=1, heads=4, kv_heads=2, head_dim=8, rows=2, length=64)
    k, v = np.array(k), np.array(v)
    for x in (k, v):
        x[1, :, :32] = x[0, :, :32]
    k_pages, v_pages, pages_RL = in_pages((k, v), 16, 6)
    positions = np.array([[40], [63]], np.int32)
    own = paged(q, k_pages, v_pages, positions, table=PageTable(pages_RL), scale=SCALE)
    pages_RL[1, :2] = pages_RL[0, :2]
    shared = paged(q, k_pages, v_pages, positions, table=PageTable(pages_RL), scale=SCALE)
    assert np.asarray(own).tobytes() == np.asarray(shared).tobytes()


@functools.cache
def neighbours():
    return arrays(9, batch=4, tokens=1, heads=4, kv_heads=2, head_dim=8, rows=4, length=2 * BLOCK + 40)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("length", [1, 60, BLOCK, BLOCK + 5])
def test_a_row_is_bit_equal_whatever_its_neighbours_are_and_whatever_slot_it_has(length, window, dtype):
    q, k, v = (np.asarray(x).astype(jnp.dtype(dtype)) for x in neighbours())
    results = set()
    for slot in (0, 3):
        for others in (-1, 2, 2 * BLOCK + 39):
            for scale in (1, 100):
                in_slot = [np.roll(np.concatenate([x[:1], x[1:] * x.dtype.type(scale)]), slot, axis=0) for x in (q, k, v)]
                positions = np.full((4, 1), others, np.int32)
                positions[slot] = length - 1
                results.add(np.asarray(paged(*in_slot, positions, scale=SCALE, window=window))[slot].tobytes())
    assert len(results) == 1


def test_what_an_earlier_row_left_in_a_slot_does_not_matter_not_even_nan():
    q, k, v = map(np.array, neighbours())
    positions = np.full((4, 1), 10, np.int32)
    clean = np.asarray(paged(q, k, v, positions, scale=SCALE))
    k[:, :, 11:] = v[:, :, 11:] = np.nan
    assert np.asarray(paged(q, k, v, positions, scale=SCALE)).tobytes() == clean.tobytes()
