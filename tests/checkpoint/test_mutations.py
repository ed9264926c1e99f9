"""Damaged config.json, tokenizer.json, tokenizer_config.json, generation_config.json, safetensors headers and GGUF headers of six families: a typed
error or a model, within 5 s and 1 GB.

``TPLLM_NUM_MUTATIONS=5000 pytest tests/checkpoint/test_mutations.py`` tries as many of each kind and family; ``TPLLM_FIRST_MUTATION`` is the number
of the first, so that another run tries others.
"""
import collections
import itertools
import os

import pytest

from tests.support import damaged_models, damaged_tokenizers
from tests.support.outcomes import tried

NUM_EACH, FIRST = (int(os.environ.get(f"TPLLM_{name}", default)) for name, default in (("NUM_MUTATIONS", "100"), ("FIRST_MUTATION", "0")))
MOST_SHOWN = 20
TYPED = ("CheckpointError", "ConfigError", "TokenizerError", "SamplingError", "PromptError")


@pytest.mark.parametrize(("files", "kind"), [pytest.param(files, kind, id=kind) for files in (damaged_models, damaged_tokenizers)
                                             for kind in files.KINDS])
def test_damaged_files_are_refused_by_a_typed_error_or_taken(files, kind, tmp_path):
    outcomes = tried(files.loader(kind, tmp_path), itertools.chain(files.whole(kind), files.cases(kind, NUM_EACH, first=FIRST)))
    assert [outcome.error for outcome in itertools.islice(outcomes, len(files.FAMILIES))] == [None] * len(files.FAMILIES)
    faults, kinds = [], collections.Counter()
    for outcome in outcomes:
        kinds[(outcome.error or "taken").partition(":")[0]] += 1
        faults += [outcome.fault] if outcome.fault else []
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:MOST_SHOWN])
    assert kinds.keys() <= {"taken", *TYPED}
    assert sum(kinds.values()) == NUM_EACH * len(files.FAMILIES)
    assert kinds["taken"] < sum(kinds.values()) - NUM_EACH  # most of it is damage
