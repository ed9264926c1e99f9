"""Which page a token lies in, and that a padded cache is the same with one page a row."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.page_table import PageTable, one_page_a_row

PAGES = np.array([[4, 7, -1], [0, 2, 9]], np.int32)
pages_of = jax.jit(PageTable.pages_of, static_argnames="page_size")


@pytest.mark.parametrize(("rows", "positions", "expected"), [
    (None, [[0, 3, 4, 7, 8], [8, 11, 12, -1, 5]], [[4, 4, 7, 7, -1], [9, 9, -1, -1, 2]]),
    ([1], [[0, 4, 11]], [[0, 2, 9]]),
    ([1, 1, 0], [[0], [4], [0]], [[0], [2], [4]]),
    ([2, -1, 0], [[0], [4], [-4]], [[-1], [-1], [-1]]),  # rows that are not there, a negative position
    ([[1, 1, 0, 0]], [[3, 4, 4, -1]], [[0, 2, 7, -1]]),
    ([[0, 5], [1, -2]], [[0, 0], [9, 9]], [[4, -1], [9, -1]]),
])
def test_the_page_of_a_token_is_that_of_its_row_and_part_and_negative_where_there_is_none(rows, positions, expected):
    table = PageTable(PAGES, None if rows is None else np.array(rows, np.int32))
    pages = pages_of(table, np.array(positions, np.int32), page_size=4)
    assert pages.dtype == jnp.int32
    assert pages.tolist() == expected


def test_one_page_a_row_is_a_padded_cache():
    assert one_page_a_row(3).pages_RL.tolist() == [[0], [1], [2]]
    assert one_page_a_row(3).rows is None
    rows = jnp.array([2, 0], jnp.int32)
    assert one_page_a_row(3, rows).pages_of(jnp.array([[0, 9, 10], [5, -1, 6]]), 10).tolist() == [[2, 2, -1], [0, -1, 0]]


@pytest.mark.parametrize("rows", [None, [1, 0], [[1, 1, 0], [0, 0, 1]]])
def test_by_token_every_token_keeps_its_page(rows):
    table = PageTable(PAGES, None if rows is None else np.array(rows, np.int32))
    positions = np.array([[0, 5, 8], [11, -1, 2]], np.int32)
    alone = table.by_token(3)
    assert alone.rows.shape == (6,)
    assert alone.pages_of(positions.reshape(-1, 1), 4).reshape(2, 3).tolist() == table.pages_of(positions, 4).tolist()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_table_is_a_lookup_in_python(data):
    num_rows, num_parts, page_size = (data.draw(st.integers(1, 5)) for _ in range(3))
    B, T = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    numbers = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    pages_RL = numbers.integers(-2, 20, (num_rows, num_parts), np.int32)
    positions, rows = (numbers.integers(-3, most + 3, (B, T), np.int32) for most in (num_parts * page_size, num_rows))
    found = PageTable(pages_RL, rows).pages_of(positions, page_size)
    for at in np.ndindex(B, T):
        row, part = rows[at], positions[at] // page_size
        is_there = 0 <= row < num_rows and 0 <= part < num_parts
        assert int(found[at]) == (pages_RL[row, part] if is_there else -1)
