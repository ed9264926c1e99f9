"""Attention to pages in any order: the bits of one page a row, of each row's own call, and nothing written beside the tokens' entries."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.page_table import PageTable, one_page_a_row
from tests.native.cases import AttentionCase, in_rows, make_attention
from tests.native.test_attention import CACHE_DTYPES, attend, bits, definition, rotated, wide

PAGE_SIZES = (16, 32, 64, 128)
DECODE = {"starts": (70, 0, -1, 199, 130), "rows": (4, 0, 2, 3, 1)}
CALLS = {
    "decode": DECODE,
    "chunk": {"starts": (70, 64), "rows": (2, 0), "num_tokens": 45, "num_padding": 2, "num_heads": 6},
    "ragged": {"starts": (64, 199, 128, 70), "rows": (2, 0, 4, 3), "pieces": (40, 1, 2, 1), "num_padding": 5, "head_dim": 20, "num_rotated": 8},
    "long": {"starts": (1150, 530), "rows": (1, 0), "max_len": 1152, "num_tokens": 2, "head_dim": 32, "num_rotated": 32, "window": 600,
             "has_sinks": True},
}


def paged(call, page_size, **changes):
    case = AttentionCase(**CALLS[call] | {"page_size": page_size} | changes)
    return case, make_attention(case)


def in_padded_cache(case, arrays):
    """The same call with one page a row."""
    cache = tuple(map(jnp.asarray, in_rows(arrays["cache"], arrays["table"])))
    return arrays | {"cache": cache, "table": one_page_a_row(case.num_rows, arrays["table"].rows)}


def entries_of_tokens(case, table):
    """[P, S]: whether a token of the call is written there."""
    is_new = np.zeros((case.num_pages, case.tokens_a_page), bool)
    pages_BT = np.asarray(table.pages_of(jnp.asarray(case.positions), case.tokens_a_page))
    is_new[pages_BT[pages_BT >= 0], case.positions[pages_BT >= 0] % case.tokens_a_page] = True
    return is_new


@pytest.mark.parametrize(("cache_dtype", "page_size"), [*((dtype, size) for dtype in ("float32", "int8") for size in PAGE_SIZES),
                                                        ("bfloat16", 32), ("float16", 64), ("float8_e4m3fn", 16)])
@pytest.mark.parametrize("call", CALLS)
def test_pages_of_every_size_in_any_order_give_the_bits_of_one_page_a_row(call, page_size, cache_dtype, instruction_set):
    case, arrays = paged(call, page_size, cache_dtype=cache_dtype)
    out, *cache = attend(**arrays, **case.how())
    padded_out, *padded_cache = attend(**in_padded_cache(case, arrays), **case.how())
    assert bits([out]) == bits([padded_out])
    assert bits(in_rows(cache, arrays["table"])) == bits(padded_cache)
    wanted = definition(rotated(arrays["q_BTNH"], arrays["rope"]), cache, case.positions, table=arrays["table"], sinks_N=arrays.get("sinks_N"),
                        **case.how())
    np.testing.assert_allclose(np.asarray(out), wanted, atol=1e-3)


def test_the_cases_have_unused_pages_and_rows_that_share_some_which_nobody_writes_to():
    case, arrays = paged("decode", 16)
    pages_RL = np.asarray(arrays["table"].pages_RL)
    pages, counts = np.unique(pages_RL[pages_RL >= 0], return_counts=True)
    assert len(pages) < case.num_pages
    assert counts.max() == 2
    assert not entries_of_tokens(case, arrays["table"])[pages[counts == 2]].any()


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("call", CALLS)
def test_an_append_changes_the_entries_of_its_tokens_and_no_other_byte(call, page_size, cache_dtype, instruction_set):
    case, arrays = paged(call, page_size, cache_dtype=cache_dtype)
    is_new = entries_of_tokens(case, arrays["table"])
    assert is_new.sum() == (case.positions >= 0).sum()
    for before, after in zip(arrays["cache"], attend(**arrays, **case.how())[1:], strict=True):
        before, after = (np.moveaxis(np.asarray(x), 1, 2) for x in (before, after))  # [P, S, K, ...]
        assert bits([before[~is_new]]) == bits([after[~is_new]])
        is_same = (before == after).reshape(*before.shape[:3], -1).all(-1)
        assert not is_same[is_new].any()


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("page_size", [None, *PAGE_SIZES])
def test_tokens_of_several_rows_in_one_batch_row_get_the_bits_of_each_rows_own_call(page_size, cache_dtype, instruction_set):
    case, arrays = paged("ragged", page_size, cache_dtype=cache_dtype)
    together, *cache = attend(**arrays, **case.how())
    own_cache, first = arrays["cache"], 0
    for row, count in zip(case.rows, case.pieces, strict=True):
        def cut(x, part=slice(first, first + count)):
            return x[:, part]
        out, *own_cache = attend(cut(arrays["q_BTNH"]), tuple(map(cut, arrays["new_kv"])), tuple(own_cache), cut(arrays["positions_BT"]),
                                 rope=tuple(map(cut, arrays["rope"])), table=arrays["table"].replace(rows=jnp.array([row])), **case.how())
        assert bits([out]) == bits([cut(together)])
        first += count
    assert bits(own_cache) == bits(cache)
    assert not np.asarray(together)[:, first:].any()


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_a_step_of_rows_with_a_part_of_a_prompt_is_each_of_them_alone_in_any_mix(cache_dtype, instruction_set):
    case, arrays = paged("ragged", 16, cache_dtype=cache_dtype)
    T = case.positions.shape[1]
    order = np.r_[40, 43, 0:40, 41:43, 44:T]  # a decoding row, another, the chunk, two tokens, the padding

    def mixed(x):
        return x[:, order]
    one = attend(**arrays, **case.how())
    other = attend(mixed(arrays["q_BTNH"]), tuple(map(mixed, arrays["new_kv"])), arrays["cache"], mixed(arrays["positions_BT"]),
                   rope=tuple(map(mixed, arrays["rope"])), table=arrays["table"].replace(rows=mixed(arrays["table"].rows)), **case.how())
    assert bits([mixed(one[0]), *one[1:]]) == bits(other)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("page_size", [None, 16])
def test_tokens_of_several_rows_may_be_cut_into_batch_rows_anywhere(page_size, cache_dtype, instruction_set):
    case, arrays = paged("ragged", page_size, cache_dtype=cache_dtype, num_padding=4)
    together, *cache = attend(**arrays, **case.how())

    def cut(x):  # [1, 48, ...] to [3, 16, ...], within the part of a prompt
        return x.reshape(3, 16, *x.shape[2:])
    out, *cut_cache = attend(cut(arrays["q_BTNH"]), tuple(map(cut, arrays["new_kv"])), arrays["cache"], cut(arrays["positions_BT"]),
                             rope=tuple(map(cut, arrays["rope"])), table=arrays["table"].replace(rows=cut(arrays["table"].rows)), **case.how())
    assert bits([out, *cut_cache]) == bits([cut(together), *cache])


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 20])
@pytest.mark.parametrize("call", ["decode", "chunk", "ragged"])
def test_nan_in_unused_pages_and_behind_a_rows_end_does_not_matter(call, head_dim, cache_dtype, instruction_set):
    case, arrays = paged(call, 32, cache_dtype=cache_dtype, head_dim=head_dim, num_rotated=8)
    pages_RL = np.asarray(arrays["table"].pages_RL)
    is_used = np.zeros((case.num_pages, case.tokens_a_page), bool)
    for row, length in zip(case.rows, case.lengths, strict=True):
        for part, page in enumerate(pages_RL[row]):
            if page >= 0:
                is_used[page, :max(0, length - part * case.tokens_a_page)] = True
    assert 0 < is_used.mean() < 1
    stale = [np.moveaxis(np.array(x), 2, 1) for x in arrays["cache"]]
    for x in stale:
        x[~is_used] = np.nan if x.dtype != np.int8 else 99
    stale = [jnp.asarray(np.moveaxis(x, 1, 2)) for x in stale]
    clean = attend(**arrays, **case.how())[0]
    assert np.isfinite(wide(clean)).all()
    assert bits([clean]) == bits([attend(**arrays | {"cache": tuple(stale)}, **case.how())[0]])


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("page", [-1, -7, AttentionCase(**DECODE, page_size=16).num_pages, 10**3, 2**31 - 1, -2**31])
def test_a_page_that_is_not_there_gets_nothing_and_its_tokens_read_as_zeros(page, cache_dtype, instruction_set):
    case, arrays = paged("decode", 16, cache_dtype=cache_dtype)
    pages_RL = np.array(arrays["table"].pages_RL)
    pages_RL[3, 12], pages_RL[4, 1] = page, page  # the one that row 3 writes to; one that row 4 only reads
    table = PageTable(jnp.asarray(pages_RL), arrays["table"].rows)
    out, *cache = attend(**arrays | {"table": table}, **case.how())
    usual, *usual_cache = attend(**arrays, **case.how())
    assert np.isfinite(wide(out)).all()
    assert bits([out[1], out[2], out[4]]) == bits([usual[1], usual[2], usual[4]])
    lost = int(arrays["table"].pages_RL[3, 12])
    for before, after, expected in zip(arrays["cache"], cache, usual_cache, strict=True):
        assert bits([after[lost]]) == bits([before[lost]])
        assert bits([np.delete(after, lost, 0)]) == bits([np.delete(expected, lost, 0)])
    as_zeros = np.where(pages_RL == page, -1, pages_RL)
    wanted = definition(rotated(arrays["q_BTNH"], arrays["rope"]), cache, case.positions, table=PageTable(as_zeros, table.rows), **case.how())
    np.testing.assert_allclose(wide(out), wanted, atol=1e-3)


def test_positions_beyond_the_last_page_are_not_written(instruction_set):
    case = AttentionCase(starts=(206,), num_tokens=4, rows=(1,), max_len=208, page_size=16)
    arrays = make_attention(case)
    out, *cache = attend(**arrays, **case.how())
    assert np.isfinite(wide(out)).all()
    is_new = [(np.asarray(x) != np.asarray(y)).any((1, 3)) for x, y in zip(arrays["cache"], cache, strict=True)]
    last = int(arrays["table"].pages_RL[1, -1])
    assert [np.argwhere(x).tolist() for x in is_new] == [[[last, 14], [last, 15]]] * 2


@pytest.mark.parametrize("page_size", [1, 8, 24, 100])
def test_several_pages_a_row_hold_a_multiple_of_16_tokens(page_size, native_library):
    case, arrays = paged("decode", page_size)
    with pytest.raises(Exception, match="a multiple of 16"):
        jax.block_until_ready(attend(**arrays, **case.how()))


def test_the_keys_a_token_sees_are_those_of_its_own_row_even_where_rows_share_pages(instruction_set):
    case, arrays = paged("decode", 16)
    table = arrays["table"]
    private = np.array(table.pages_RL)
    spare = np.setdiff1d(np.arange(case.num_pages), private)
    shared = [page for page in np.unique(private[private >= 0]) if (private == page).sum() == 2]
    keys_values = [np.array(x) for x in arrays["cache"]]
    for page, copy in zip(shared, spare, strict=False):  # the second row's own copy of each shared page
        private[tuple(np.argwhere(private == page)[1])] = copy
        for x in keys_values:
            x[copy] = x[page]
    copied = attend(**arrays | {"cache": tuple(map(jnp.asarray, keys_values)), "table": table.replace(pages_RL=jnp.asarray(private))}, **case.how())
    assert shared
    assert bits([copied[0]]) == bits([attend(**arrays, **case.how())[0]])
