"""Which implementation an op takes."""
import logging

import pytest

from pallas_kernels.implementations import pick
from pallas_kernels.tiling import Device

DEVICE = Device("gpu", "a pretend GPU")


def test_the_first_that_can_is_taken_and_said_once_with_why_the_others_cannot(caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert pick("an op", DEVICE, None, {"first": "takes no float32", "second": None, "third": None}) == "second"
        assert pick("another op", DEVICE, None, {"first": "takes no float32"}) == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "an op on a pretend GPU: second (first takes no float32)", "another op on a pretend GPU: reference (first takes no float32)"]


def test_a_named_one_is_taken_or_refused_with_its_reason():
    assert pick("an op", DEVICE, "second", {"first": None, "second": None}) == "second"
    assert pick("an op", DEVICE, "reference", {"first": None}) == "reference"
    with pytest.raises(ValueError, match="an op: implementation 'first' takes no float32; or leave implementation at None"):
        pick("an op", DEVICE, "first", {"first": "takes no float32"})
    with pytest.raises(ValueError, match="there is no implementation 'last'; there are first, reference"):
        pick("an op", DEVICE, "last", {"first": None})


def test_kernels_can_be_turned_off_for_all_that_name_none(monkeypatch):
    monkeypatch.setenv("TPLLM_KERNELS", "0")
    assert pick("an op", DEVICE, None, {"first": None}) == "reference"
    assert pick("an op", DEVICE, "first", {"first": None}) == "first"
