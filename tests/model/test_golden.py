"""Tiny models against what ``transformers`` answered when tools/make_golden.py ran; needs no torch."""
import json

import numpy as np
import pytest

from tests.support.tiny_models import GOLDEN, GOLDEN_FOLDER, NUM_STEPS, TinyModel, cached_greedy

NAMES = sorted(path.stem for path in GOLDEN_FOLDER.glob("*.npz"))


def every_model_on_every_mesh():
    """Each model on one device and on one of the meshes 2, 4, 8; what is left of the product is marked slow, as each case compiles."""
    for index, name in enumerate(NAMES):
        for tp in (1, 2, 4, 8):
            is_plain = tp in (1, (2, 4, 8)[index % 3])
            yield pytest.param(name, tp, marks=() if is_plain else pytest.mark.slow)


def load(name):
    golden = dict(np.load(GOLDEN_FOLDER / f"{name}.npz"))
    return golden, TinyModel(name, json.loads(str(golden["config_json"])), seed=int(golden["seed"]), prompt_len=len(golden["prompt"]))


def test_there_is_a_file_for_every_golden_model_and_it_holds_that_model():
    assert sorted(model.name for model in GOLDEN) == NAMES
    for model in GOLDEN:
        golden, stored = load(model.name)
        assert stored.hf == model.hf
        assert len(golden["tokens"]) == NUM_STEPS


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_prompt_are_those_the_file_was_made_with(name):
    golden, model = load(name)
    assert model.checksum() == golden["checksum"]
    assert model.prompt() == golden["prompt"].tolist()


@pytest.mark.parametrize(("name", "tp"), list(every_model_on_every_mesh()))
def test_logits_and_greedy_tokens_are_those_of_transformers(name, tp):
    golden, model = load(name)
    params, config = model.on_mesh(tp)
    width = {1: 1, 2: 16, 4: 1, 8: 16}[tp]  # one shape for prompt and decode halves the compiles: tokens one by one, or padded chunks
    logits, tokens = cached_greedy(params, config, model.prompt(), num_steps=NUM_STEPS, prefill_chunk=width, decode_width=width)
    error = np.abs(logits[golden["positions"]] - golden["logits"]).max() / golden["logits"].std()
    assert error <= (1e-4 if tp == 1 else 3e-4)
    assert tokens == golden["tokens"].tolist()
