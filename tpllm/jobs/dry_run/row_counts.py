"""What a job's rows would take: parsed, and their prompts made into tokens, but not run."""
import dataclasses
from collections.abc import Mapping
from typing import Any

from tpllm.engine.prompts import Prompt, encode_prompt
from tpllm.errors import PromptError, TpllmError
from tpllm.jobs.config import JobConfig
from tpllm.jobs.dry_run.speed import SampleRow
from tpllm.jobs.outputs.formats import refuse_batch_row
from tpllm.jobs.rows import RowError, RowRequest, read_row, row_request
from tpllm.jobs.sources.raw_row import RawRow

NUM_REASONS = 5


@dataclasses.dataclass
class RowCounts:
    """What looking at the rows that are left gave. Every row is parsed; of the readable ones, all or an evenly spaced sample is tokenized.

    Attributes:
        num_rows: that are left.
        num_unreadable: that would fail because of what stands in them.
        num_tokenized: readable ones whose prompts were made into tokens.
        num_refused: of these, those whose prompts would fail, because the template or the tokenizer refuses them or they are too long.
        num_too_long: of these, those over the context.
        num_prompts: of the tokenized ones that would run; a row may have several.
        num_completions: of these.
        prompt_tokens: of these.
        prefill_tokens: the same, each as often as its prompt is completed.
        completion_tokens: at most.
        longest_prompt: in tokens.
        reasons: why rows would fail, the first few.
    """

    num_rows: int = 0
    num_unreadable: int = 0
    num_tokenized: int = 0
    num_refused: int = 0
    num_too_long: int = 0
    num_prompts: int = 0
    num_completions: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    completion_tokens: int = 0
    longest_prompt: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_sample(self) -> bool:
        """Whether not every readable row was tokenized."""
        return self.num_tokenized < self.num_rows - self.num_unreadable

    @property
    def scale(self) -> float:
        """Readable rows for each tokenized one."""
        return (self.num_rows - self.num_unreadable) / self.num_tokenized if self.num_tokenized else 0.0

    def note(self, raw: RawRow, reason: object) -> None:
        """Keep a reason, if it is one of the first."""
        if len(self.reasons) < NUM_REASONS:
            self.reasons.append(f"{raw}: {reason}")


class RowCounting:
    """Looks at rows, one after the other.

    Args:
        job: whose rows.
        llm: the loaded model.
        num_left: rows that will be looked at.
        max_tokenized: rows whose prompts are tokenized, about.

    Attributes:
        counts: of the rows so far.
        sample: prompts that fill the batch, evenly spaced, to measure the speed on.
    """

    def __init__(self, job: JobConfig, llm: Any, *, num_left: int, max_tokenized: int):
        self.counts, self.sample = RowCounts(), []
        self._job, self._llm = job, llm
        self._sampling = {**llm.default_sampling, **job.sampling}
        self._num_slots, self._context = llm.shapes.max_num_seqs, llm.shapes.max_model_len
        self._step = -(-num_left // max_tokenized)
        self._sample_step = max(1, num_left // self._step // self._num_slots)

    def add(self, raw: RawRow) -> None:
        """Look at one row."""
        self.counts.num_rows += 1
        try:
            row = read_row(raw)
            refuse_batch_row(row.fields, self._job.output_format)
            request = row_request(row, job_seed=self._job.seed, sampling=self._sampling, prompt_template=self._job.prompt_template)
        except RowError as error:
            self.counts.num_unreadable += 1
            self.counts.note(raw, error)
            return
        if (self.counts.num_rows - self.counts.num_unreadable - 1) % self._step == 0:
            self._tokenize(raw, request)

    def _tokenize(self, raw: RawRow, request: RowRequest) -> None:
        counts = self.counts
        counts.num_tokenized += 1
        try:
            prompts = [SampleRow(self._encoded(prompt), params) for prompt, params in request.prompts]
        except TpllmError as error:
            counts.num_refused += 1
            counts.num_too_long += isinstance(error, _TooLongError)
            counts.note(raw, error)
            return
        if (counts.num_tokenized - counts.num_refused - 1) % self._sample_step == 0:
            self.sample += prompts[:self._num_slots - len(self.sample)]
        for prompt in prompts:
            num_tokens, num_completions = len(prompt.prompt_token_ids), prompt.params.n
            counts.num_prompts += 1
            counts.num_completions += num_completions
            counts.prompt_tokens += num_tokens
            counts.prefill_tokens += num_tokens * num_completions
            counts.completion_tokens += prompt.longest_completion(self._context) * num_completions
            counts.longest_prompt = max(counts.longest_prompt, num_tokens)

    def _encoded(self, prompt: Prompt) -> list[int]:
        """A prompt's tokens; refuses what the engine would."""
        has_ids = isinstance(prompt, Mapping) and "prompt_token_ids" in prompt
        ids = encode_prompt(prompt, None if has_ids else self._llm.get_tokenizer())["prompt_token_ids"]
        if not ids:
            raise PromptError("the prompt is empty; give at least one token")
        if len(ids) >= self._context:
            raise _TooLongError(f"the prompt has {len(ids)} tokens, but the context holds {self._context} and at least one must be generated")
        if outside := [token for token in ids if not 0 <= token < self._llm.config.vocab_size]:
            raise PromptError(f"the prompt holds token id {outside[0]}; ids are from 0 to {self._llm.config.vocab_size - 1}")
        return ids


class _TooLongError(PromptError):
    """A prompt over the context."""
