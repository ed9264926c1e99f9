"""Attention, with a cache and without, against softmax in float64; and what a row's result may not depend on."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention_reference
from pallas_kernels.paged_attention import BLOCK, paged_attention_reference

SCALE = 0.37
flash = jax.jit(flash_attention_reference, static_argnames=("scale", "window"))
paged = jax.jit(paged_attention_reference, static_argnames=("scale", "window"))


def attention_in_float64(q_BTNH, k_PKSH, v_PKSH, positions_BT, *, rows=None, window=None):
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
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ values / weights.sum()
    return out


def arrays(seed, *, batch, tokens, heads, kv_heads, head_dim, rows, length, dtype="float32"):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(2 * rng.normal(size=shape), jnp.dtype(dtype)) for shape in (
        (batch, tokens, heads, head_dim), (rows, kv_heads, length, head_dim), (rows, kv_heads, length, head_dim)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("window", [None, 5, 150])
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
    out = paged(q, k, v, positions, rows_B=None if rows is None else np.array(rows, np.int32), scale=SCALE, window=window)
    assert out.dtype == q.dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()
    real = positions >= 0
    wanted = attention_in_float64(q, k, v, positions, rows=rows, window=window)
    np.testing.assert_allclose(np.asarray(out, np.float64)[real], wanted[real], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("num_tokens", [1, 40, 150])
def test_attention_without_a_cache_is_softmax_in_float64_and_equals_attention_to_one(num_tokens, window):
    q, k, v = arrays(5, batch=3, tokens=num_tokens, heads=4, kv_heads=2, head_dim=8, rows=3, length=num_tokens)
    positions = np.where(np.arange(num_tokens) < np.array([[num_tokens], [(num_tokens + 1) // 2], [1]]), np.arange(num_tokens), -1)
    positions = positions.astype(np.int32)
    out = flash(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), positions, scale=SCALE, window=window)
    real = positions >= 0
    wanted = attention_in_float64(q, k, v, positions, window=window)
    np.testing.assert_allclose(np.asarray(out)[real], wanted[real], rtol=3e-6, atol=3e-6)
    cached = paged(q, k, v, positions, scale=SCALE, window=window)
    np.testing.assert_allclose(np.asarray(cached)[real], np.asarray(out)[real], rtol=3e-6, atol=3e-6)


@functools.cache
def neighbours():
    return arrays(9, batch=4, tokens=1, heads=4, kv_heads=2, head_dim=8, rows=4, length=2 * BLOCK + 40)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("length", [1, 60, BLOCK, BLOCK + 5])
def test_a_row_is_bit_equal_whatever_its_neighbours_are_and_whatever_slot_it_has(length, window, dtype):
    q, k, v = (x.astype(dtype) for x in neighbours())
    results = set()
    for slot in (0, 3):
        for others in (-1, 2, 2 * BLOCK + 39):
            for scale in (1, 100):
                in_slot = [jnp.roll((x * scale).at[0].set(x[0]), slot, axis=0) for x in (q, k, v)]
                positions = np.full((4, 1), others, np.int32)
                positions[slot] = length - 1
                results.add(np.asarray(paged(*in_slot, positions, scale=SCALE, window=window))[slot].tobytes())
    assert len(results) == 1


def test_what_an_earlier_row_left_in_a_slot_does_not_matter_not_even_nan():
    q, k, v = neighbours()
    positions = np.full((4, 1), 10, np.int32)
    clean = paged(q, k, v, positions, scale=SCALE)
    stale = paged(q, k.at[:, :, 11:].set(jnp.nan), v.at[:, :, 11:].set(jnp.nan), positions, scale=SCALE)
    assert np.asarray(clean).tobytes() == np.asarray(stale).tobytes()
