"""The parts ``requests`` and ``isa``: what engines answer."""
from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from tools.digesting import hashing, tree
from tools.digesting.case import Case
from tools.digesting.drawn_requests import MAX_MODEL_LEN, TEXTS, draw

SLICE = 30
"""Requests that share a digest."""
SHAPES = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 8}
GREEDY = {"temperature": 0, "max_tokens": 24, "logprobs": 5, "ignore_eos": True}


@dataclasses.dataclass(frozen=True)
class Setup:
    """An engine that answers the drawn requests.

    Attributes:
        options: of ``LLM``.
        environment: variables that its process needs.
        model: ``"demo"``, or a family of ``tests/support/tiny_models.py``.
        num_requests: how many.
    """

    options: Mapping[str, Any]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    model: str = "demo"
    num_requests: int = 300


ONE, TWO = {"mesh": "tp=1"}, {"mesh": "tp=2"}
TIGHT = {"kv_cache_tokens": 320, "page_size": 16}
"""Room for fewer tokens than eight rows need."""
XLA = {"TPLLM_NATIVE": "0"}
SETUPS = {
    "tp1": Setup(ONE), "tp2": Setup(TWO), "dp2-tp2": Setup({"mesh": "dp=2,tp=2"}), "preempting": Setup({**ONE, **TIGHT}),
    "preempting-dp2-tp2": Setup({"mesh": "dp=2,tp=2", **TIGHT, "kv_cache_tokens": 640}),
    **{scheme: Setup({**ONE, "quantization": scheme}) for scheme in ("int8", "int4", "q4_k", "w8a8")},
    "int4-tp2": Setup({**TWO, "quantization": "int4"}),
    "kv-int8": Setup({**ONE, "kv_cache_dtype": "int8"}), "kv-fp8": Setup({**ONE, "kv_cache_dtype": "fp8"}),
    "xla": Setup(ONE, XLA), "xla-dp2-tp2": Setup({"mesh": "dp=2,tp=2"}, XLA, num_requests=60),
    "xla-preempting": Setup({**ONE, **TIGHT}, XLA, num_requests=120), "xla-int8": Setup({**ONE, "quantization": "int8"}, XLA, num_requests=60),
    "mixtral-ep2-tp2": Setup({"mesh": "ep=2,tp=2", "quantization": "int8"}, model="mixtral", num_requests=60),
}
TINY = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 128, "max_position_embeddings": 512, "tie_word_embeddings": True}


def request_cases() -> list[Case]:
    """One for each engine."""
    return [Case(f"requests/{name}", lambda folder, setup=setup: _answers(setup, folder), setup.environment) for name, setup in SETUPS.items()]


def isa_cases() -> list[Case]:
    """One for each instruction set of this machine and each kind of weights."""
    return [Case(f"isa/{isa}/{scheme or 'bfloat16'}", lambda folder, scheme=scheme: greedy_digests("demo", **ONE, quantization=scheme),
                 {"TPLLM_ISA": isa}) for isa in tree.instruction_sets() for scheme in (None, "int8", "int4", "q4_k")]


def greedy_digests(model: str, **options: Any) -> dict[str, str]:
    """Of a few prompts of text, each answered greedily."""
    from tpllm import LLM, SamplingParams
    with LLM(model, **SHAPES, **options) as llm:
        outputs = llm.generate(list(TEXTS), SamplingParams(**GREEDY))
    return {"tokens": hashing.of_tokens(outputs), "logprobs": hashing.of_logprobs(outputs)}


def _answers(setup: Setup, folder: pathlib.Path) -> dict[str, str]:
    from tpllm import LLM
    model = setup.model if setup.model == "demo" else str(tiny_folder(folder / "model", setup.model))
    prompts, params, priorities = draw(setup.num_requests)
    with LLM(model, **SHAPES, **setup.options) as llm:
        outputs = llm.generate(prompts, params, priority=priorities)
    return dict(_digests(outputs))


def _digests(outputs: list[Any]) -> Iterator[tuple[str, str]]:
    for first in range(0, len(outputs), SLICE):
        part = outputs[first:first + SLICE]
        yield f"{first}-{first + len(part) - 1}/tokens", hashing.of_tokens(part)
        yield f"{first}-{first + len(part) - 1}/logprobs", hashing.of_logprobs(part)


def tiny_folder(folder: pathlib.Path, family: str, **sizes: int) -> pathlib.Path:
    """A checkpoint of a tiny model with the demo's tokenizer."""
    models, files = tree.test_support("tiny_models"), tree.test_support("checkpoint_files")
    model = models.TinyModel(family, models.config_json(family, **{**TINY, **sizes}))
    files.write_folder(folder, dict(model.hf), model.weights())
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder: pathlib.Path) -> None:
    """Copy the demo's tokenizer into a checkpoint."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tree.DEMO_FOLDER / name, folder / name)


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json of single bytes and one merge, for vocabularies that are smaller than the demo's."""
    tokenizer = json.loads((tree.DEMO_FOLDER / "tokenizer.json").read_text())
    added = tokenizer["added_tokens"]
    texts = [*sorted(text for text in tokenizer["model"]["vocab"] if len(text) == 1), "th"]
    return {"added_tokens": added, "model": {"merges": ["t h"], "vocab": {text: len(added) + number for number, text in enumerate(texts)}}}
