"""Timing ``generate``: each run is a call for one token, then a call for many.

The first token comes with the prefill. So the short call is the prefill, and what the long call takes beyond it is decoding: nothing that
happens between tokens is left out. The times at which tokens are read would flatter: the device decodes on while the host reads the first.
"""
import dataclasses
import statistics
import time
from collections.abc import Sequence

import numpy as np

from tpllm.engine.outputs import RequestOutput
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import TpllmError
from tpllm.llm import LLM


@dataclasses.dataclass(frozen=True)
class RunTimes:
    """One run, in seconds.

    Attributes:
        short: the call for one token a row.
        long: the call for all tokens.
        ttft: from a row's arrival until the host had its first token, in the long call; the median of the rows.
    """

    short: float
    long: float
    ttft: float


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What some runs come to; medians.

    Attributes:
        ttft_s: time to first token.
        prefill_tokens_per_s: of all rows together.
        step_s: one decode step, which gives each row a token; None where decoding was too short for the clock.
        decode_tokens_per_s: of all rows together; None likewise.
    """

    ttft_s: float
    prefill_tokens_per_s: float
    step_s: float | None
    decode_tokens_per_s: float | None


class Workload:
    """Prompts of random token ids, new ones at each call so that nothing can be reused.

    Args:
        vocab_size: ids are below it.
        batch_size: rows computed together.
        prompt_len, output_len: tokens of each row; at least two are generated.
    """

    def __init__(self, vocab_size: int, *, batch_size: int, prompt_len: int, output_len: int):
        self.vocab_size, self.batch_size, self.prompt_len, self.output_len = vocab_size, batch_size, prompt_len, output_len
        self._rng = np.random.default_rng(0)

    def time_run(self, llm: LLM) -> RunTimes:
        """Run once.

        Raises:
            TpllmError: a row that failed.
        """
        short, _ = self._generate(llm, 1)
        long, outputs = self._generate(llm, self.output_len)
        return RunTimes(short, long, statistics.median(output.metrics.first_token_time - output.metrics.arrival_time for output in outputs))

    def speeds(self, runs: Sequence[RunTimes]) -> Speeds:
        """The medians of some runs."""
        step_s = statistics.median(run.long - run.short for run in runs) / (self.output_len - 1)
        return Speeds(ttft_s=statistics.median(run.ttft for run in runs),
                      prefill_tokens_per_s=self.batch_size * self.prompt_len / statistics.median(run.short for run in runs),
                      step_s=step_s if step_s > 0 else None, decode_tokens_per_s=self.batch_size / step_s if step_s > 0 else None)

    def _generate(self, llm: LLM, num_tokens: int) -> tuple[float, list[RequestOutput]]:
        """(seconds, outputs) of one call: greedy, to the last token."""
        prompts = [{"prompt_token_ids": ids} for ids in self._rng.integers(0, self.vocab_size, (self.batch_size, self.prompt_len)).tolist()]
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        for completion in (output.outputs[0] for output in outputs):
            if len(completion.token_ids) != num_tokens:
                raise TpllmError(f"a row gave {len(completion.token_ids)} of {num_tokens} tokens: {completion.error or completion.finish_reason}")
        return seconds, outputs
