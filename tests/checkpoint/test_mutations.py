"""Damaged config.json, safetensors headers and GGUF headers of six families: a typed error or a model, soon and in little memory.

``TPLLM_NUM_MUTATIONS=5000 pytest tests/checkpoint/test_mutations.py`` tries as many of each kind and family.
"""
import collections
import os

import pytest
from damaged_models import FAMILIES, KINDS, cases, loader, whole
from outcomes import tried

NUM_EACH = int(os.environ.get("TPLLM_NUM_MUTATIONS", "100"))
MOST_SHOWN = 20


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_by_a_typed_error_or_taken(kind, tmp_path):
    assert [outcome.error for outcome in tried(loader(kind, tmp_path), whole(kind))] == [None] * len(FAMILIES)
    faults, kinds = [], collections.Counter()
    for outcome in tried(loader(kind, tmp_path), cases(kind, NUM_EACH)):
        kinds[(outcome.error or "taken").partition(":")[0]] += 1
        faults += [outcome.fault] if outcome.fault else []
    assert not faults, "\n".join(faults[:MOST_SHOWN])
    assert kinds["CheckpointError"] > NUM_EACH
