"""Requests that a seed draws: every sampling parameter, prompts of every kind, prefixes that several share."""
from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

VOCABULARY = 4096
MAX_MODEL_LEN = 256
TEXTS = (
    "def add(a, b):\n    return", "import os\n", "class Stack:\n    def __init__(self):\n", "The quick brown fox", "for i in range(10):\n",
    "# A comment about", "x = [1, 2, 3]\n", "try:\n    import numpy\nexcept", "Once upon a time", "é ü 漢字 🙂")
WORDS = ("the", "def", "return", "in", " self", "import os", "x = ")
STOPS = ("\n", "(", "e", " a", "self", "\n\n", "):")
LONG = tuple(tuple(random.Random(f"prefix {number}").randrange(5, VOCABULARY) for _ in range(length)) for number, length in enumerate((40, 96, 150)))
"""Token ids that many prompts begin with."""
Draw = Callable[[random.Random], Any]


def _tokens(most: int) -> Draw:
    return lambda rng: [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, most))]


def _texts(texts: tuple[str, ...]) -> Draw:
    return lambda rng: rng.sample(texts, rng.randint(1, 3))


FIELDS: dict[str, tuple[float, Draw]] = {
    "n": (0.2, lambda rng: rng.randint(2, 3)),
    "temperature": (0.6, lambda rng: rng.choice([0, 0, 0.3, 0.7, 1.3, 2.0])),
    "top_p": (0.3, lambda rng: rng.choice([0.1, 0.5, 0.9, 0.99])),
    "top_k": (0.3, lambda rng: rng.choice([-1, 1, 2, 10, 200])),
    "min_p": (0.2, lambda rng: rng.choice([0.01, 0.1, 0.5])),
    "presence_penalty": (0.2, lambda rng: rng.uniform(-2, 2)),
    "frequency_penalty": (0.2, lambda rng: rng.uniform(-2, 2)),
    "repetition_penalty": (0.2, lambda rng: rng.uniform(0.5, 2)),
    "logit_bias": (0.2, lambda rng: {rng.randrange(VOCABULARY): rng.uniform(-20, 20) for _ in range(rng.randint(1, 8))}),
    "allowed_token_ids": (0.1, _tokens(50)),
    "bad_words": (0.2, _texts(WORDS)),
    "seed": (0.5, lambda rng: rng.randrange(-(2**63), 2**64)),
    "stop": (0.2, _texts(STOPS)),
    "include_stop_str_in_output": (0.3, lambda rng: True),
    "stop_token_ids": (0.2, lambda rng: [rng.randrange(300) for _ in range(20)]),
    "ignore_eos": (0.3, lambda rng: True),
    "max_tokens": (1.0, lambda rng: rng.randint(8, 24)),
    "min_tokens": (0.2, lambda rng: rng.randint(1, 8)),
    "logprobs": (0.6, lambda rng: rng.choice([0, 1, 5, 20])),
    "prompt_logprobs": (0.2, lambda rng: rng.choice([0, 1, 5])),
    "skip_special_tokens": (0.2, lambda rng: False),
    "detokenize": (0.1, lambda rng: False),
    "truncate_prompt_tokens": (0.1, lambda rng: -1),
    "output_kind": (0.1, lambda rng: 2),
}
"""How often each sampling parameter is given, and what it is then; the others stay at their defaults."""


def draw(count: int) -> tuple[list[Any], list[Any], list[int]]:
    """(prompts, sampling parameters, priorities) of the first requests. Each field of each request has a generator of its own, so that another
    one does not change them."""
    from tpllm import SamplingParams
    known = {field.name for field in dataclasses.fields(SamplingParams)}  # a tree from before a field has the same tokens without it
    params = [SamplingParams(**{name: value for name, value in values(number).items() if name in known}) for number in range(count)]
    return [_prompt(number) for number in range(count)], params, [_rng(number, "priority").choice([0, 0, 0, -1, 3]) for number in range(count)]


def values(number: int) -> dict[str, Any]:
    """The sampling parameters that a request is given."""
    found = {}
    for name, (share, one) in FIELDS.items():
        rng = _rng(number, name)
        if rng.random() < share:
            found[name] = one(rng)
    if "stop" in found:
        found.pop("detokenize", None)  # without text there is nothing to stop at
    return found


def _rng(number: int, what: str) -> random.Random:
    return random.Random(f"{number} {what}")


def _prompt(number: int) -> Any:
    """Text, a chat, or token ids, of which half begin as others do."""
    rng = _rng(number, "prompt")
    kind, text = rng.random(), " ".join(rng.choices(TEXTS, k=rng.randint(1, 3)))
    if kind < 0.3:
        return text
    if kind < 0.4:
        return {"messages": [{"role": "user", "content": text}]}
    prefix = list(rng.choice(LONG)) if kind < 0.7 else []
    prefix = prefix[:rng.choice([len(prefix), len(prefix) // 2, 33])]
    return {"prompt_token_ids": prefix + [rng.randrange(5, VOCABULARY) for _ in range(rng.choice([1, 5, 17, 40]))]}
