"""The engine's loop: plan, dispatch, read, commit."""
import collections
import hashlib
import logging
import time

import jax

from tpllm.engine.admission import Admission
from tpllm.engine.batch import places_of
from tpllm.engine.metrics import Metrics
from tpllm.engine.outputs import Logprob
from tpllm.engine.pace import Pace
from tpllm.engine.plan import StepPlan
from tpllm.engine.programs import FULL, NO_CHOICE, NO_TOKEN, NOT_FINITE, RUNNING, StepOutput
from tpllm.engine.request import Request, Sequence, new_request
from tpllm.engine.roofline import find_costs
from tpllm.engine.runner import Dispatched, Runner
from tpllm.engine.sampling_params import SamplingParams
from tpllm.engine.scheduler import Scheduler
from tpllm.model.sampling import TokenScores
from tpllm.tokenizer import Tokenizer

log = logging.getLogger("tpllm")

MAX_IN_FLIGHT = 2  # programs dispatched and not yet read: one runs while the next is queued
ERRORS = {
    NOT_FINITE: "the model's logits are not finite (NaN or infinity); check the weights and the dtype",
    NO_CHOICE: "allowed_token_ids, bad_words and min_tokens together leave no token to draw; allow more tokens",
}


class Engine:
    """Requests in, completions out, over a fixed number of slots and pages.

    Args:
        runner: the device side.
        scheduler: of the runner's sizes.
        tokenizer: makes text of tokens; None gives outputs without text.
        seed: chooses the seed of requests that bring none.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, tokenizer: Tokenizer | None, *, seed: int = 0):
        self.runner, self.scheduler, self.tokenizer, self.seed = runner, scheduler, tokenizer, seed
        self.admission = Admission(runner.config, max_model_len=runner.shapes.max_model_len,
                                   num_cache_tokens=runner.num_pages * runner.shapes.page_size, tokenizer=tokenizer)
        self.metrics = Metrics(find_costs(runner.config, runner.params, runner.cache_dtype))
        self._in_flight: collections.deque[tuple[Dispatched, float]] = collections.deque()
        self._pace = Pace(runner.shapes.buckets)
        self._num_requests = 0

    def step(self, *, is_watched: bool = False) -> list[Request]:
        """Dispatch the next program and read an earlier one.

        Args:
            is_watched: whether somebody waits for each token, as in streaming; results are then read more often, and a long prompt is cut finer.

        Returns:
            The requests that got tokens or ended.
        """
        start = time.monotonic()
        plan = self.scheduler.plan(self._pace.steps_at_once(is_watched), self._pace.token_budget(is_watched))
        if plan is not None:
            self._in_flight.append((self.runner.dispatch(plan, self._kept_slots(), self.scheduler.table), start))
        self.metrics.host_s += time.monotonic() - start
        if not self._in_flight or (plan is not None and len(self._in_flight) < MAX_IN_FLIGHT):
            return []
        return self._commit(*self._in_flight.popleft())

    def add_request(self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams, *, priority: int = 0) -> Request:
        """Queue a request; raises what :meth:`.Admission.check_request` raises."""
        bad_words = self.admission.check_request(prompt_token_ids, params, priority)
        seed = self._choose_seed() if params.seed is None else params.seed % 2**64
        self._num_requests += 1
        request = new_request(request_id, prompt, list(prompt_token_ids), params=params, seed=seed, max_len=self.admission.max_len,
                              tokenizer=self.tokenizer, priority=priority, number=self._num_requests, bad_words=bad_words)
        self.metrics.num_requests += 1
        for sequence in request.sequences:
            self.scheduler.add(sequence)
        return request

    def abort(self, request: Request) -> None:
        """End a request now; what it has so far stays in its output, and its pages are free at once."""
        for sequence in request.sequences:
            if not sequence.is_finished:
                self._finish(sequence, "abort")

    def fail(self, message: str) -> list[Request]:
        """End every unfinished request with an error, after one that no single request is to blame for; returns them."""
        sequences = [*self.scheduler.running, *self.scheduler.waiting]
        for sequence in sequences:
            self._finish(sequence, "error", error=message)
        self._in_flight.clear()
        return list({id(sequence.request): sequence.request for sequence in sequences}.values())

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    @property
    def num_waiting(self) -> int:
        """Sequences that have no slot yet."""
        return len(self.scheduler.waiting)

    def _commit(self, dispatched: Dispatched, dispatched_at: float) -> list[Request]:
        """Read a program's results and hand them to the rows that still want them."""
        plan, before = dispatched.plan, time.monotonic()
        output, prompt_scores = jax.device_get((dispatched.output, dispatched.prompt_scores))
        now = time.monotonic()
        owners = [owner for owner in plan.owners if owner.is_current]
        num_steps = 0 if output is None else int((output.token != NO_TOKEN).any(axis=1).sum())
        took_s = self._pace.measure(plan, now, dispatched_at=dispatched_at, num_steps=num_steps)
        self.metrics.count_program(plan, num_steps=num_steps, waited_s=now - before, took_s=took_s)
        if prompt_scores is not None:
            self._commit_prompt_scores(plan, prompt_scores)
        for owner in owners:
            try:
                self._commit_row(owner.sequence, output, owner.slot)
            except Exception as error:
                log.exception("request %s failed", owner.sequence.request.output.request_id)
                self._finish(owner.sequence, "error", error=f"internal error: {error!r}")
        self.metrics.host_s += time.monotonic() - now
        return list({id(owner.sequence.request): owner.sequence.request for owner in owners}.values())

    def _commit_row(self, sequence: Sequence, output: StepOutput, column: int) -> None:
        """Hand one row's tokens to its sequence, up to the one that ends it."""
        for step, token in enumerate(output.token[:, column].tolist()):
            if token == NO_TOKEN or sequence.is_finished:
                break
            status = int(output.status[step, column])
            if status in ERRORS:
                self._finish(sequence, "error", error=ERRORS[status])
                return
            top = self._logprobs(token, output.scores, (step, column), count=sequence.request.params.logprobs)
            self.metrics.count_token(sequence, sequence.push(token, float(output.scores.logprob[step, column]), top))
            is_shown = status in (RUNNING, FULL) or sequence.request.params.include_stop_str_in_output
            stop = sequence.show(token) if is_shown else None
            if stop is not None:
                self._finish(sequence, "stop", stop_reason=stop)
            elif status != RUNNING:
                is_own_stop = status != FULL and token in sequence.request.params.stop_token_ids
                self._finish(sequence, "length" if status == FULL else "stop", stop_reason=token if is_own_stop else None)
        self.scheduler.commit(sequence)

    def _commit_prompt_scores(self, plan: StepPlan, scores: TokenScores) -> None:
        """Keep the scores of prompt tokens; those of a piece that is computed again are there already."""
        for piece, group, where in places_of(plan, num_slots=len(self.scheduler.slots), num_groups=self.runner.num_groups):
            output, wanted = piece.sequence.request.output, piece.sequence.request.params.prompt_logprobs
            if wanted is None or piece.sequence.completion.index:
                continue
            first = group * plan.bucket + where.start
            for offset, token in enumerate(output.prompt_token_ids[piece.start + 1:piece.start + piece.count + 1]):
                if piece.start + 1 + offset == len(output.prompt_logprobs):
                    output.prompt_logprobs.append(self._logprobs(token, scores, (first + offset,), count=wanted))

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
        self.metrics.count_end(sequence)

    def _kept_slots(self) -> list[bool]:
        return [sequence is not None and not sequence.is_prefilling for sequence in self.scheduler.slots]

    def _choose_seed(self) -> int:
        digest = hashlib.blake2b(f"{self.seed}:{self._num_requests}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")
