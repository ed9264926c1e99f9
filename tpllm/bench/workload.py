"""A seeded workload of mixed lengths, like what people ask a chat model, and what its lengths allow batching to gain.

Prompts are log-uniform: 143 tokens in the mean for 16 to 512. Outputs are log-normal and cut at both ends, as ``max_tokens`` would cut them: with
a median of 128 and a sigma of 0.9 their mean is 168, and one in sixteen has all 512. (ShareGPT's conversations, as the paper on vLLM measured
them, have 161 and 338.) Token ids are random, so that nothing is shared but the prefix asked for; requests arrive in order, all at once or as a
Poisson process.
"""
import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from tpllm.engine.engine import Engine
from tpllm.engine.request import Prepared
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import ConfigError

LENGTHS, TOKENS, ARRIVALS, PREFIX = range(4)  # each drawn from a stream of its own: a rate or a prefix changes nothing else


@dataclasses.dataclass(frozen=True)
class MixedLengths:
    """What a workload is made of.

    Attributes:
        num_requests: how many.
        seed: chooses lengths, tokens and arrivals.
        prompt_lens: shortest and longest prompt, without the shared prefix.
        output_lens: shortest and longest output.
        output_median, output_sigma: of the log-normal outputs before they are cut; sigma is of the logarithm.
        shared_prefix_len: tokens that all prompts begin with.
        rate: mean arrivals a second; None for all at once.
    """

    num_requests: int = 256
    seed: int = 0
    prompt_lens: tuple[int, int] = (16, 512)
    output_lens: tuple[int, int] = (8, 512)
    output_median: float = 128.0
    output_sigma: float = 0.9
    shared_prefix_len: int = 0
    rate: float | None = None

    def __post_init__(self):
        for name in ("prompt_lens", "output_lens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ConfigError(f"{name} are {low} to {high}; give at least 1, and the smaller one first")
        if self.num_requests < 1 or self.output_median <= 0 or self.output_sigma < 0 or self.shared_prefix_len < 0:
            raise ConfigError(f"num_requests is {self.num_requests}, output_median {self.output_median}, output_sigma {self.output_sigma}, "
                              f"shared_prefix_len {self.shared_prefix_len}; they must be at least 1, above 0, and not negative")
        if self.rate is not None and self.rate <= 0:
            raise ConfigError(f"rate is {self.rate}; it must be above 0 requests a second")

    @property
    def context_len(self) -> int:
        """Tokens of the longest row that can come."""
        return self.shared_prefix_len + self.prompt_lens[1] + self.output_lens[1]


@dataclasses.dataclass(frozen=True)
class Item:
    """One request: its prompt, how many tokens it gets, and when it comes, in seconds from the start."""

    prompt_token_ids: list[int]
    output_len: int
    arrival_s: float = 0.0

    @property
    def params(self) -> SamplingParams:
        """Greedy, to the last token."""
        return SamplingParams(temperature=0.0, max_tokens=self.output_len, ignore_eos=True)

    def prepared(self, engine: Engine) -> Prepared:
        """The request, checked by an engine."""
        return engine.prepare({"prompt_token_ids": self.prompt_token_ids}, self.params)


def make_workload(vocab_size: int, lengths: MixedLengths) -> list[Item]:
    """The requests, in order of arrival; the same for the same arguments.

    Args:
        vocab_size: token ids are below it.
        lengths: their number and distributions.
    """
    streams = [np.random.default_rng([lengths.seed, stream]) for stream in (LENGTHS, TOKENS, ARRIVALS, PREFIX)]
    count, (low, high) = lengths.num_requests, lengths.prompt_lens
    prompts = np.floor(np.exp(streams[LENGTHS].uniform(np.log(low), np.log(high + 1), count))).astype(int).clip(low, high)
    outputs = np.rint(streams[LENGTHS].lognormal(np.log(lengths.output_median), lengths.output_sigma, count)).clip(*lengths.output_lens).astype(int)
    arrivals = np.zeros(count) if lengths.rate is None else streams[ARRIVALS].exponential(1 / lengths.rate, count).cumsum()
    prefix = streams[PREFIX].integers(0, vocab_size, lengths.shared_prefix_len).tolist()
    return [Item(prefix + streams[TOKENS].integers(0, vocab_size, prompt_len).tolist(), output_len, arrival)
            for prompt_len, output_len, arrival in zip(prompts.tolist(), outputs.tolist(), arrivals.tolist(), strict=True)]


def mean_context(items: Iterable[Item]) -> int:
    """Tokens that a drawn token has before it, in the mean."""
    items = list(items)
    total = sum(item.output_len * len(item.prompt_token_ids) + item.output_len * (item.output_len - 1) // 2 for item in items)
    return round(total / sum(item.output_len for item in items))


@dataclasses.dataclass(frozen=True)
class Steps:
    """The decode steps that some lengths need.

    Attributes:
        by_rows: how many steps had so many rows; the first is for none.
        until_empty: the same, of those until the last request had its slot.
    """

    by_rows: tuple[int, ...]
    until_empty: tuple[int, ...]

    @property
    def count(self) -> int:
        """All steps."""
        return sum(self.by_rows)

    @property
    def occupancy(self) -> float | None:
        """Share of the slots that had a row, until no request waited any more; None where there was no step by then."""
        busy = sum(rows * steps for rows, steps in enumerate(self.until_empty))
        return busy / (sum(self.until_empty) * (len(self.by_rows) - 1)) if busy else None

    def seconds(self, step_s: Sequence[float]) -> float:
        """How long they take where a step with n rows takes ``step_s[n - 1]``."""
        return sum(steps * seconds for steps, seconds in zip(self.by_rows[1:], step_s, strict=True))


@dataclasses.dataclass(frozen=True)
class Replay:
    """What static and continuous batching need for the same lengths."""

    static: Steps
    continuous: Steps

    def allowed_gain(self, *, prefill_s: float, step_s: Sequence[float]) -> float:
        """Seconds of static batching over those of continuous batching.

        Args:
            prefill_s: of all prompts together, the same for both.
            step_s: of a decode step with 1, 2, ... rows.
        """
        return (prefill_s + self.static.seconds(step_s)) / (prefill_s + self.continuous.seconds(step_s))


def replay(output_lens: Iterable[int], num_slots: int) -> Replay:
    """Count the decode steps of both kinds of batching. A row's first token comes with its prefill, each step gives it one more.

    Args:
        output_lens: tokens of each request, in order of arrival.
        num_slots: rows at once. Static batching fills them only when all are free, continuous batching whenever one is.
    """
    lengths = list(output_lens)
    return Replay(_count_steps(lengths, num_slots, is_static=True), _count_steps(lengths, num_slots, is_static=False))


def _count_steps(output_lens: list[int], num_slots: int, *, is_static: bool) -> Steps:
    waiting, rows = collections.deque(output_lens), []
    by_rows, until_empty = [0] * (num_slots + 1), None
    while waiting or rows:
        num_taken = 0 if is_static and rows else num_slots - len(rows)
        for _ in range(min(num_taken, len(waiting))):
            rows.append(waiting.popleft() - 1)
        rows = [steps for steps in rows if steps]  # one token is all that a prefill gives
        if waiting and not is_static and len(rows) < num_slots:
            continue
        if not waiting and until_empty is None:
            until_empty = tuple(by_rows)
        if rows:
            by_rows[len(rows)] += 1
            rows = [steps - 1 for steps in rows if steps > 1]
    return Steps(tuple(by_rows), until_empty or tuple(by_rows))
