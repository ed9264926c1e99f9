"""The engine's loop: plan, dispatch, read, commit."""
import collections
import hashlib
import time
from collections.abc import Iterable

import jax
import numpy as np

from tpllm.engine.bad_words import check_vocabulary, find_bad_words
from tpllm.engine.outputs import Logprob
from tpllm.engine.programs import FULL, NO_CHOICE, NO_TOKEN, NOT_FINITE, RUNNING, StepOutput
from tpllm.engine.request import Request, Sequence, new_request
from tpllm.engine.runner import MAX_STEPS, Dispatched, Runner
from tpllm.engine.sampling_params import SamplingParams
from tpllm.engine.scheduler import DecodePlan, PrefillPlan, Scheduler
from tpllm.errors import PromptError, SamplingError
from tpllm.model.sampling import TokenScores
from tpllm.tokenizer import Tokenizer

MAX_IN_FLIGHT = 2  # programs dispatched and not yet read: one runs while the next is queued
CHUNK_SECONDS = 0.25  # about how long the device decodes before the host looks, when nobody watches the tokens come
STREAM_SECONDS = 0.04
ERRORS = {
    NOT_FINITE: "the model's logits are not finite (NaN or infinity); check the weights and the dtype",
    NO_CHOICE: "allowed_token_ids, bad_words and min_tokens together leave no token to draw; allow more tokens",
}


class Engine:
    """Requests in, completions out, over a fixed number of slots.

    Args:
        runner: the device side.
        tokenizer: makes text of tokens; None gives outputs without text.
        seed: chooses the seed of requests that bring none.
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer | None, *, seed: int = 0):
        self.runner, self.tokenizer, self.seed = runner, tokenizer, seed
        self.scheduler = Scheduler(runner.shapes.max_num_seqs, runner.num_groups, runner.shapes.buckets)
        self._in_flight: collections.deque[Dispatched] = collections.deque()
        self._num_requests = 0
        self._step_seconds: float | None = None  # of one decode step, about
        self._last_read = 0.0

    def step(self, *, is_watched: bool = False) -> list[Request]:
        """Dispatch the next program and read an earlier one.

        Args:
            is_watched: whether somebody waits for each token, as in streaming; results are then read more often.

        Returns:
            The requests that got tokens or ended.
        """
        plan = self.scheduler.plan(self._steps_at_once(STREAM_SECONDS if is_watched else CHUNK_SECONDS))
        if plan is not None:
            self._in_flight.append(self.runner.dispatch(plan, self._kept_slots()))
        if not self._in_flight or (plan is not None and len(self._in_flight) < MAX_IN_FLIGHT):
            return []
        return self._commit(self._in_flight.popleft())

    def add_request(self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams) -> Request:
        """Queue a request; raises what :meth:`check_request` raises."""
        bad_words = self.check_request(prompt_token_ids, params)
        seed = self._choose_seed() if params.seed is None else params.seed % 2**64
        self._num_requests += 1
        request = new_request(request_id, prompt, list(prompt_token_ids), params=params, seed=seed,
                              max_model_len=self.runner.shapes.max_model_len, tokenizer=self.tokenizer)
        request.bad_words = bad_words
        if params.prompt_logprobs is not None:
            request.output.prompt_logprobs = [None]
        for sequence in request.sequences:
            self.scheduler.add(sequence)
        return request

    def check_request(self, prompt_token_ids: list[int], params: SamplingParams) -> list[list[int]]:
        """Check what only the engine can; returns the token sequences of ``params.bad_words``.

        Raises:
            PromptError: an empty prompt, one that leaves no room in the context, or an id outside the vocabulary.
            SamplingError: no :class:`SamplingParams`, ids that the model does not have, stop strings or bad words without a tokenizer.
        """
        if not isinstance(params, SamplingParams):
            raise SamplingError(f"the sampling parameters are {params!r}; give SamplingParams(...)")
        self.check_prompt(prompt_token_ids)
        if params.stop and self.tokenizer is None:
            raise SamplingError(f"stop is {params.stop!r}, but this model has no tokenizer to make text; use stop_token_ids")
        check_vocabulary(params, self.runner.config.vocab_size)
        return find_bad_words(params.bad_words, self.tokenizer, vocab_size=self.runner.config.vocab_size)

    def check_prompt(self, token_ids: list[int]) -> None:
        """Raise ``PromptError`` for an empty prompt, one that leaves no room in the context, or an id outside the vocabulary."""
        limit, context, vocab_size = self.runner.shapes.max_model_len, self.runner.config.max_position, self.runner.config.vocab_size
        if not token_ids:
            raise PromptError("the prompt is empty; give at least one token")
        if len(token_ids) >= limit:
            longer = f", or raise max_model_len (the model's own context is {context})" if limit < context else ""
            raise PromptError(f"the prompt has {len(token_ids)} tokens, but the context holds {limit} and at least one must be generated; "
                              f"shorten it to {limit - 1}{longer}")
        for token in token_ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise PromptError(f"the prompt holds token id {token!r}; ids are whole numbers from 0 to {vocab_size - 1}")

    def abort(self, request: Request) -> None:
        """End a request now; what it has so far stays in its output."""
        for sequence in request.sequences:
            if not sequence.is_finished:
                self._finish(sequence, "abort")

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    @property
    def num_waiting(self) -> int:
        """Sequences that have no slot yet."""
        return len(self.scheduler.waiting)

    def _commit(self, dispatched: Dispatched) -> list[Request]:
        output, prompt_scores = jax.device_get((dispatched.output, dispatched.prompt_scores))
        now = time.monotonic()
        if isinstance(dispatched.plan, DecodePlan):
            self._measure(now, int((output.token != NO_TOKEN).any(axis=1).sum()))
            owners: Iterable[tuple[int, Sequence]] = dispatched.plan.owners
        else:
            owners = self._prefill_owners(dispatched.plan, prompt_scores)
        self._last_read = now
        for column, sequence in owners:
            self._commit_row(sequence, output, column)
        return list({id(sequence.request): sequence.request for _, sequence in owners}.values())

    def _commit_row(self, sequence: Sequence, output: StepOutput, column: int) -> None:
        """Hand one row's tokens to its sequence, up to the one that ends it."""
        for step, token in enumerate(output.token[:, column].tolist()):
            if token == NO_TOKEN or sequence.is_finished:
                return
            status = int(output.status[step, column])
            if status in ERRORS:
                self._finish(sequence, "error", error=ERRORS[status])
                return
            top = self._logprobs(token, output.scores, (step, column), count=sequence.request.params.logprobs)
            sequence.push(token, float(output.scores.logprob[step, column]), top)
            is_shown = status in (RUNNING, FULL) or sequence.request.params.include_stop_str_in_output
            stop = sequence.show(token) if is_shown else None
            if stop is not None:
                self._finish(sequence, "stop", stop_reason=stop)
            elif status != RUNNING:
                is_own_stop = status != FULL and token in sequence.request.params.stop_token_ids
                self._finish(sequence, "length" if status == FULL else "stop", stop_reason=token if is_own_stop else None)

    def _prefill_owners(self, plan: PrefillPlan, prompt_scores: TokenScores | None) -> list[tuple[int, Sequence]]:
        """(column, sequence) of a prefill's output; on the way, the scores of its prompt tokens are kept."""
        rows_per_group = self.runner.shapes.max_num_seqs // self.runner.num_groups
        owners = [(sequence.slot // rows_per_group, sequence) for sequence, _ in plan.rows]
        for (group, sequence), (_, start) in zip(owners, plan.rows, strict=True):
            wanted = sequence.request.params.prompt_logprobs
            if wanted is None or sequence.completion.index:
                continue
            prompt = sequence.request.output.prompt_token_ids
            for offset, token in enumerate(prompt[start + 1:start + plan.bucket + 1]):
                top = self._logprobs(token, prompt_scores, (group * plan.bucket + offset,), count=wanted)
                sequence.request.output.prompt_logprobs.append(top)
        return owners

    def _logprobs(self, token: int, scores: TokenScores, at: tuple[int, ...], *, count: int | None) -> dict[int, Logprob] | None:
        """The token itself and the ``count`` likeliest ones, of the scores at one place."""
        if count is None:
            return None
        found = {token: (float(scores.logprob[at]), int(scores.rank[at]))}
        for index, (top, logprob) in enumerate(zip(scores.top_ids[at][:count].tolist(), scores.top_logprobs[at][:count].tolist(), strict=True)):
            found.setdefault(top, (logprob, index + 1))
        text = self.tokenizer.token_text if self.tokenizer else str
        return {top: Logprob(logprob=logprob, rank=rank, decoded_token=text(top)) for top, (logprob, rank) in found.items()}

    def _finish(self, sequence: Sequence, reason: str, **details) -> None:
        sequence.finish(reason, **details)
        self.scheduler.release(sequence)

    def _kept_slots(self) -> list[bool]:
        return [sequence is not None and not sequence.is_prefilling for sequence in self.scheduler.slots]

    def _steps_at_once(self, seconds: float) -> int:
        return 1 if self._step_seconds is None else int(np.clip(round(seconds / self._step_seconds), 1, MAX_STEPS))

    def _measure(self, now: float, num_steps: int) -> None:
        """Follow a faster step at once and a slower one gradually: a compile or a busy machine makes single ones slow."""
        if num_steps:
            latest = (now - self._last_read) / num_steps
            known = latest if self._step_seconds is None else self._step_seconds
            self._step_seconds = max(min(latest, 0.8 * known + 0.2 * latest), 1e-6)

    def _choose_seed(self) -> int:
        digest = hashlib.blake2b(f"{self.seed}:{self._num_requests}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")
