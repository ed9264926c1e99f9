"""Ids that end a text and that no model can draw."""
import logging

import pytest

from tpllm.engine.options import drawable


@pytest.mark.parametrize("beyond", [7, 2**31, 2**63, 10**30])
def test_an_id_beyond_the_vocabulary_is_left_out_and_the_log_names_it(beyond, caplog):
    with caplog.at_level(logging.WARNING, logger="tpllm"):
        assert drawable(frozenset({2, 6, beyond}), 7) == {2, 6}
    (record,) = caplog.records
    assert str(beyond) in record.getMessage()


def test_ids_that_can_be_drawn_are_kept_and_nothing_is_said(caplog):
    assert drawable(frozenset({0, 6}), 7) == {0, 6}
    assert drawable(frozenset(), 7) == set()
    assert not caplog.records
