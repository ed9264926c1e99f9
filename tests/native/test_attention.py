"""Attention to the cache against its definition in float64 and the references, on every instruction set."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.kv_append import quantize_entries
from pallas_kernels.page_table import PageTable, one_page_a_row
from pallas_kernels.paged_attention import paged_attention_reference
from pallas_kernels.rope import rope_reference
from tests.native.cases import ATTENTIONS, AttentionCase, in_rows, make_attention
from tpllm.native import attention as native
from tpllm.native import library

attend, reference_attention = (jax.jit(function, static_argnames=("scale", "window", "softcap"))
                               for function in (native.attention, paged_attention_reference))
rotate, quantize = jax.jit(rope_reference), jax.jit(quantize_entries, static_argnums=1)
CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")


def wide(array):
    return np.asarray(array).astype(np.float64)


def opened(cache):
    """Keys and values in float64."""
    return tuple(wide(cache[i]) * wide(cache[i + 2])[..., None] for i in (0, 1)) if len(cache) == 4 else tuple(map(wide, cache))


def rotated(x_BTNH, rope):
    return wide(rotate(np.asarray(x_BTNH).astype(np.float32), *rope)) if rope[0].shape[-1] else wide(x_BTNH)


def rows_of(positions_BT, table):
    """[B, T]: the row of the cache of each token."""
    rows = np.arange(len(positions_BT)) if table is None or table.rows is None else np.asarray(table.rows)
    return np.broadcast_to(rows.reshape(len(positions_BT), -1), positions_BT.shape)


def place_of(case, table, b, t):
    """(page, entry) of a token."""
    row, position = rows_of(case.positions, table)[b, t], case.positions[b, t]
    return (row, position) if table is None else (int(table.pages_RL[row, position // case.tokens_a_page]), position % case.tokens_a_page)


def definition(q_BTNH, cache, positions_BT, *, table, scale, window, softcap, sinks_N=None):
    """softmax(cap(scale q k)) v in float64 of rotated queries, one by one; zeros for padding."""
    keys, values = opened(cache if table is None else in_rows(cache, table))
    rows_BT = rows_of(positions_BT, table)
    out = np.zeros(q_BTNH.shape)
    group = q_BTNH.shape[2] // keys.shape[1]
    for b, t, n in np.ndindex(q_BTNH.shape[:3]):
        position, row = int(positions_BT[b, t]), int(rows_BT[b, t])
        if position >= 0:
            seen = slice(max(0, position - window + 1) if window else 0, position + 1)
            scores = keys[row, n // group, seen] @ q_BTNH[b, t, n] * scale
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            weights = np.exp(scores - scores.max())
            total = weights.sum() + (0 if sinks_N is None else np.exp(float(sinks_N[n]) - scores.max()))
            out[b, t, n] = weights / total @ values[row, n // group, seen]
    return out


def error(out, expected):
    return np.linalg.norm(wide(out) - wide(expected)) / np.linalg.norm(wide(expected))


def bits(arrays):
    return [np.asarray(array).tobytes() for array in arrays]


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention_is_its_definition_and_the_reference(case, instruction_set):
    arrays = make_attention(case)
    out, *cache = attend(**arrays, **case.how())
    assert out.dtype == arrays["q_BTNH"].dtype
    assert [(x.shape, x.dtype) for x in cache] == [(x.shape, x.dtype) for x in arrays["cache"]]
    q = rotated(arrays["q_BTNH"], arrays["rope"])
    sinks = {"sinks_N": arrays.get("sinks_N")}
    assert error(out, definition(q, cache, case.positions, table=arrays["table"], **sinks, **case.how())) < 2e-3
    assert not np.asarray(out)[case.positions < 0].any()
    reference = reference_attention(*(x.astype(np.float32) for x in (q, *opened(cache))), arrays["positions_BT"], table=arrays["table"], **sinks,
                                    **case.how())
    assert error(out, np.where((case.positions >= 0)[..., None, None], reference, 0)) < 2e-3


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_the_cache_gets_the_rotated_keys_and_the_values_and_keeps_everything_else(case, instruction_set):
    arrays = make_attention(case)
    before, after = [np.array(x) for x in arrays["cache"]], [np.asarray(x) for x in attend(**arrays, **case.how())[1:]]
    for new, index in ((rotated(arrays["new_kv"][0], arrays["rope"]), 0), (wide(arrays["new_kv"][1]), 1)):
        for b, t in np.argwhere(case.positions >= 0):
            page, offset = place_of(case, arrays["table"], b, t)
            at = (page, slice(None), offset)
            entry = after[index][at]
            if case.cache_dtype in ("int8", "float8_e4m3fn"):
                codes, scales = map(np.asarray, quantize(new[b, t].astype(np.float32)[None, None], entry.dtype))
                np.testing.assert_allclose(after[index + 2][at], scales[0, 0], rtol=1e-6)
                is_same = entry.view(np.int8) == codes[0, 0].view(np.int8)
                assert is_same.mean() > 0.99
                assert (np.abs(entry.view(np.int8).astype(int) - codes[0, 0].view(np.int8).astype(int)) <= 1).all()
                before[index + 2][at] = after[index + 2][at]
            elif index == 1:
                assert entry.tobytes() == new[b, t].astype(entry.dtype).tobytes()
            else:
                np.testing.assert_allclose(wide(entry), new[b, t], rtol=2 * float(jnp.finfo(entry.dtype).eps), atol=1e-6)
            before[index][at] = entry
    assert bits(before) == bits(after)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("window", "softcap", "x_dtype"), [(None, None, "float32"), (33, 2.0, "bfloat16")])
def test_a_prompt_gives_the_same_bits_in_one_call_in_chunks_and_token_by_token(cache_dtype, window, softcap, x_dtype, instruction_set):
    length = 200
    case = AttentionCase(starts=(0,), num_tokens=length, rows=(1,), cache_dtype=cache_dtype, window=window, softcap=softcap, x_dtype=x_dtype,
                         num_heads=6, has_sinks=window is not None)
    arrays = make_attention(case)
    results = []
    for chunk in (length, 7, 1):
        cache, outs = tuple(map(jnp.array, arrays["cache"])), []
        for first in range(0, length, chunk):
            def cut(x, fill=0, first=first, chunk=chunk):
                part = np.asarray(x)[:, first:first + chunk]
                return np.pad(part, [(0, 0), (0, chunk - part.shape[1]), *[(0, 0)] * (part.ndim - 2)], constant_values=fill)
            out, *cache = attend(cut(arrays["q_BTNH"]), tuple(map(cut, arrays["new_kv"])), tuple(cache), cut(arrays["positions_BT"], fill=-1),
                                 rope=tuple(map(cut, arrays["rope"])), table=arrays["table"], sinks_N=arrays.get("sinks_N"), **case.how())
            outs.append(np.asarray(out))
        results.append(bits([np.concatenate(outs, axis=1)[:, :length], *cache]))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("max_len", [200, 1300])  # more than one segment, for several threads
def test_a_row_alone_gives_the_bits_it_gives_among_others(cache_dtype, max_len, instruction_set):
    starts = tuple(position % max_len for position in (1299, 0, 63, 64, 640, 130, 199, 5))
    case = AttentionCase(starts=starts, rows=tuple(range(7, -1, -1)), max_len=max_len, cache_dtype=cache_dtype, head_dim=32, num_rotated=32)
    arrays = make_attention(case)
    together, *cache = attend(**arrays, **case.how())
    rows = arrays["table"].rows
    for size in (1, 2, 7):
        for first in range(0, 8 - size + 1, 3):
            def cut(x, rows=slice(first, first + size)):
                return x[rows]
            alone, *own_cache = attend(cut(arrays["q_BTNH"]), tuple(map(cut, arrays["new_kv"])), arrays["cache"], cut(arrays["positions_BT"]),
                                       rope=tuple(map(cut, arrays["rope"])), table=arrays["table"].replace(rows=cut(rows)), **case.how())
            assert bits([alone]) == bits([cut(together)])
            for x, y in zip(own_cache, cache, strict=True):
                assert bits([x[cut(rows)]]) == bits([y[cut(rows)]])


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 20])
def test_what_an_earlier_row_left_beyond_a_rows_end_does_not_matter_not_even_nan(cache_dtype, head_dim, instruction_set):
    case = AttentionCase(starts=(70, 0, -1, 127), cache_dtype=cache_dtype, head_dim=head_dim, num_rotated=head_dim)
    arrays = make_attention(case)
    stale = [np.array(x) for x in arrays["cache"]]
    for x in stale:
        for row, start in enumerate(case.starts):
            x[row, :, start + 1:] = np.nan if x.dtype != np.int8 else 99
    clean = attend(**arrays, **case.how())[0]
    assert np.isfinite(wide(clean)).all()
    assert bits([clean]) == bits([attend(**arrays | {"cache": tuple(map(jnp.asarray, stale))}, **case.how())[0]])


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_a_loop_updates_a_donated_cache_in_place_and_never_widens_or_copies_it(cache_dtype, native_library):
    case = AttentionCase(starts=(0, 3), cache_dtype=cache_dtype, max_len=512)
    arrays = make_attention(case)
    cache = tuple(map(jnp.copy, arrays.pop("cache")))  # buffers of XLA's own, for only those can be donated

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(cache, arrays, num_steps):
        def step(state):
            index, cache, total = state
            out, *cache = native.attention(**arrays | {"cache": cache, "positions_BT": arrays["positions_BT"] + index}, **case.how())
            return index + 1, tuple(cache), total + out
        return jax.lax.while_loop(lambda state: state[0] < num_steps, step, (jnp.int32(0), cache, jnp.zeros_like(arrays["q_BTNH"])))[1:]
    text = decode.lower(cache, arrays, jnp.int32(5)).compile().as_text()
    shape = "[" + ",".join(map(str, cache[0].shape)) + "]"
    assert f"f32{shape}" not in text or cache_dtype == "float32"
    assert not [line for line in text.splitlines() if shape in line and (" copy(" in line or " convert(" in line or " fusion(" in line)]
    before = [x.unsafe_buffer_pointer() for x in cache]
    cache, _ = decode(cache, arrays, jnp.int32(5))
    assert [x.unsafe_buffer_pointer() for x in cache] == before
    assert cache[0].dtype == cache_dtype


@pytest.mark.parametrize("value", [1e4, 1e-40, 0.0])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_extreme_queries_keys_and_values_give_no_nan(value, cache_dtype, instruction_set):
    case = AttentionCase(starts=(0,), num_tokens=70, cache_dtype=cache_dtype, softcap=None)
    arrays = make_attention(case)
    signs = [jnp.sign(x) * value for x in (arrays["q_BTNH"], *arrays["new_kv"])]
    out, *cache = attend(**arrays | {"q_BTNH": signs[0], "new_kv": tuple(signs[1:])}, **case.how())
    assert np.isfinite(wide(out)).all()
    assert all(np.isfinite(wide(x)).all() for x in cache)


def test_positions_beyond_the_cache_are_not_written(instruction_set):
    case = AttentionCase(starts=(198,), num_tokens=4, rows=(1,))
    arrays = make_attention(case)
    out, keys, _ = attend(**arrays, **case.how())
    assert np.isfinite(wide(out)).all()
    assert bits([keys[0]]) == bits([arrays["cache"][0][0]])
    assert bits([keys[1, :, :198]]) == bits([arrays["cache"][0][1, :, :198]])


@pytest.mark.parametrize("row", [-1, 5, 10**7, -10**7])
def test_a_cache_row_that_is_not_there_gives_zeros_and_writes_nothing(row, instruction_set):
    case = AttentionCase(starts=(70, 3), rows=(2, 0))
    arrays = make_attention(case)
    out, *cache = attend(**arrays, **case.how())
    other, *other_cache = attend(**arrays | {"table": arrays["table"].replace(rows=jnp.array([row, 0], jnp.int32))}, **case.how())
    assert not np.asarray(other[0]).any()
    assert bits([other[1]]) == bits([out[1]])
    assert bits([x[0] for x in other_cache]) == bits([x[0] for x in cache])
    assert bits([x[1:] for x in other_cache]) == bits([x[1:] for x in arrays["cache"]])


@pytest.mark.parametrize(("starts", "num_tokens"), [((), 1), ((3,), 0), ((-1, -1), 2)])
def test_no_tokens_are_no_work(starts, num_tokens, instruction_set):
    case = AttentionCase(starts=(3,), rows=(1,))
    arrays = make_attention(case)
    B, T = len(starts), num_tokens
    arrays |= {"q_BTNH": jnp.zeros((B, T, 4, 64)), "new_kv": (jnp.ones((B, T, 2, 64)),) * 2, "positions_BT": jnp.full((B, T), -1, jnp.int32),
              "rope": (jnp.ones((B, T, 64)),) * 2, "table": one_page_a_row(2, jnp.zeros(B, jnp.int32))}
    out, *cache = attend(**arrays, **case.how())
    assert out.shape == (B, T, 4, 64)
    assert not np.asarray(out).any()
    assert bits(cache) == bits(arrays["cache"])


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_shape_is_the_definition(data, native_library):
    num_kv_heads, head_dim, max_len = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 150))
    num_tokens = data.draw(st.integers(1, min(max_len, 20)))
    page_size = data.draw(st.none() | st.sampled_from((16, 32, 48, 64, 128)))
    starts = tuple(data.draw(st.lists(st.integers(-1, max_len - num_tokens), min_size=1, max_size=4)))
    case = AttentionCase(starts=starts, num_tokens=num_tokens, num_heads=num_kv_heads * data.draw(st.integers(1, 5)), num_kv_heads=num_kv_heads,
                         head_dim=head_dim, num_rotated=2 * data.draw(st.integers(0, head_dim // 2)), max_len=max_len,
                         window=data.draw(st.none() | st.integers(1, 2 * max_len)), cache_dtype=data.draw(st.sampled_from(CACHE_DTYPES)),
                         page_size=page_size, pieces=(num_tokens,) * len(starts) if data.draw(st.booleans()) else None)
    arrays = make_attention(case)
    for name in library.instruction_sets():
        with library.use_instruction_set(name):
            out, *cache = map(np.asarray, attend(**arrays, **case.how()))
        wanted = definition(rotated(arrays["q_BTNH"], arrays["rope"]), cache, case.positions, table=arrays["table"], **case.how())
        np.testing.assert_allclose(out, wanted, atol=1e-3)
        if page_size is not None:
            with library.use_instruction_set(name):
                padded = attend(**arrays | {"cache": tuple(map(jnp.asarray, in_rows(arrays["cache"], arrays["table"]))),
                                            "table": one_page_a_row(case.num_rows, arrays["table"].rows)}, **case.how())
            assert bits([out, *in_rows(cache, arrays["table"])]) == bits(padded)


def changed(case, **changes):
    return make_attention(case) | {name: change(make_attention(case)[name]) for name, change in changes.items()}


@pytest.mark.parametrize(("changes", "error_type"), [
    ({"q_BTNH": lambda q: q[:, :, :3]}, ValueError),
    ({"new_kv": lambda kv: (kv[0][..., :5], kv[1])}, ValueError),
    ({"positions_BT": lambda positions: positions[:2]}, ValueError),
    ({"cache": lambda cache: (cache[0].astype(jnp.int8), cache[1].astype(jnp.int8))}, TypeError),
    ({"cache": lambda cache: (*cache, *cache)}, TypeError),
    ({"cache": lambda cache: tuple(x.astype(jnp.int32) for x in cache)}, TypeError),
    ({"cache": lambda cache: (cache[0], cache[1][:, :, :5])}, Exception),
    ({"cache": lambda cache: (cache[0][:2], cache[1][:2])}, Exception),
    ({"rope": lambda rope: (rope[0][..., :7], rope[1][..., :7])}, Exception),
    ({"rope": lambda rope: (rope[0], rope[1][..., :8])}, Exception),
    ({"rope": lambda rope: tuple(x.astype(jnp.bfloat16) for x in rope)}, Exception),
    ({"table": lambda _: one_page_a_row(4, jnp.zeros(2, jnp.int32))}, ValueError),
    ({"table": lambda _: one_page_a_row(4, jnp.zeros((4, 2), jnp.int32))}, ValueError),
    ({"table": lambda _: one_page_a_row(4, jnp.zeros(4))}, Exception),
    ({"table": lambda _: one_page_a_row(3)}, Exception),
    ({"table": lambda _: PageTable(jnp.zeros((4, 2)))}, Exception),
    ({"table": lambda _: PageTable(jnp.zeros(4, jnp.int32))}, ValueError),
    ({"table": lambda _: PageTable(jnp.zeros((4, 1, 1), jnp.int32))}, ValueError),
    ({"table": lambda _: one_page_a_row(4, jnp.zeros((1, 4), jnp.int32))}, ValueError),
    ({"positions_BT": lambda positions: positions.astype(jnp.float32)}, Exception),
    ({"cache": lambda cache: (cache[0][..., :60], cache[1][..., :60])}, Exception),
    ({"cache": lambda cache: (cache[0], cache[1].astype(jnp.bfloat16))}, Exception),
    ({"q_BTNH": lambda q: q.astype(jnp.int8)}, Exception),
    ({"sinks_N": lambda sinks: sinks[1:]}, Exception),
    ({"sinks_N": lambda sinks: sinks.astype(jnp.bfloat16)}, Exception),
])
def test_what_does_not_belong_together_is_an_error_that_python_raises(changes, error_type, native_library):
    case = AttentionCase(has_sinks="sinks_N" in changes)
    with pytest.raises(error_type):
        jax.block_until_ready(attend(**changed(case, **changes), **case.how()))


@pytest.mark.parametrize("scales", [(3, 2, 200), (4, 2, 199)])
def test_scales_of_an_int8_cache_must_be_its_own(scales, native_library):
    case = dataclasses.replace(AttentionCase(), cache_dtype="int8")
    arrays = changed(case, cache=lambda cache: (*cache[:2], jnp.ones(scales), jnp.ones(scales)))
    with pytest.raises(Exception, match="shape"):
        jax.block_until_ready(attend(**arrays, **case.how()))
