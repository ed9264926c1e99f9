"""Rows of stacked matrices: every row of every matrix once, each shard's own one after the other."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpllm.model.stacks import ROW_MULTIPLE, Stack


@settings(max_examples=60, deadline=None)
@given(each=st.integers(1, 4), rows=st.integers(1, 90), groups=st.integers(1, 4), cuts=st.integers(1, 3), data=st.data())
def test_every_row_is_stored_once_in_its_shard(each, rows, groups, cuts, data):
    stack = Stack(each * groups, rows * cuts, groups, cuts)
    stored_by_row, per_shard = {}, stack.stored_rows // (groups * cuts)
    cut_at = data.draw(st.integers(0, stack.stored_rows))
    for first, last in ((0, cut_at), (cut_at, stack.stored_rows)):
        for stored, matrix, start, stop in stack.runs(first, last):
            assert first <= stored < stored + stop - start <= last
            for offset in range(stop - start):
                stored_by_row[matrix, start + offset] = stored + offset
    assert sorted(stored_by_row) == [(matrix, row) for matrix in range(stack.num) for row in range(stack.rows)]
    assert len(set(stored_by_row.values())) == len(stored_by_row)
    for (matrix, row), stored in stored_by_row.items():
        group, cut = matrix // stack.shard_matrices, row // stack.shard_rows
        assert stored == (group * cuts + cut) * per_shard + matrix % stack.shard_matrices * stack.step + row % stack.shard_rows


@pytest.mark.parametrize(("rows", "step"), [(1, 32), (32, 32), (33, 64)])
def test_matrices_begin_at_blocks(rows, step):
    assert Stack(5, rows).step == step
    assert Stack(5, rows).stored_rows == 5 * step
    assert step % ROW_MULTIPLE == 0
