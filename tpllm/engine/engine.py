"""The engine's loop: plan, dispatch, read, commit."""
import collections
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from tpllm.engine.admission import Admission
from tpllm.engine.batch import places_of
from tpllm.engine.metrics import Metrics
from tpllm.engine.outputs import Logprob
from tpllm.engine.pace import Pace
from tpllm.engine.plan import StepPlan
from tpllm.engine.programs import FULL, NO_CHOICE, NO_TOKEN, NOT_FINITE, RUNNING, StepOutput
from tpllm.engine.prompts import Prompt, encode_prompt
from tpllm.engine.request import Prepared, Request, Sequence, new_request
from tpllm.engine.runner import Dispatched, Runner
from tpllm.engine.sampling_params import SamplingParams
from tpllm.engine.scheduler import Scheduler
from tpllm.engine.turns import Turns
from tpllm.errors import ConfigError, log
from tpllm.model.sampling import TokenScores
from tpllm.tokenizer import Tokenizer

Found = TypeVar("Found")

MAX_IN_FLIGHT = 2  # programs dispatched and not yet read: one runs while the next is queued
ERRORS = {
    NOT_FINITE: "the model's logits are not finite (NaN or infinity); check the weights and the dtype",
    NO_CHOICE: "allowed_token_ids, bad_words and min_tokens together leave no token to draw; allow more tokens",
}


class Engine:
    """Requests in, completions out, over a fixed number of slots and pages.

    Threads may share it: each call waits for its turn, and signals wait until it is over. A change that fails half way leaves the state in doubt;
    the next turn then begins with making it anew.

    Args:
        runner: the device side.
        scheduler: of the runner's sizes.
        tokenizer: makes text of tokens; None gives outputs without text.
        seed: the seed from which requests without one of their own get theirs.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, tokenizer: Tokenizer | None, *, seed: int = 0):
        self.runner, self.scheduler, self.tokenizer, self.seed = runner, scheduler, tokenizer, seed
        self._admission = Admission(runner.config, max_model_len=runner.shapes.max_model_len, max_logprobs=runner.shapes.max_logprobs,
                                    num_cache_tokens=runner.num_pages * runner.shapes.page_size, tokenizer=tokenizer)
        self.metrics = Metrics(runner.costs)
        self._in_flight: collections.deque[tuple[Dispatched, float]] = collections.deque()
        self._pace = Pace(runner.shapes.buckets)
        self._num_requests = 0
        self._unfinished: dict[Request, None] = {}
        self._given_up: collections.deque[Request] = collections.deque()  # to be ended in somebody's turn
        self._turns = Turns()
        self._doubt: str | None = None  # what made the state uncertain
        self._is_closed = False

    def step(self, *, is_watched: bool = False) -> list[Request]:
        """Dispatch the next program and read an earlier one.

        Args:
            is_watched: whether somebody waits for each token, as in streaming; results are then read more often, and a long prompt is cut finer.

        Returns:
            The requests that got tokens or ended.
        """
        with self.turn():
            return self._step(is_watched)

    def wait(self, news: Callable[[], list[Found]], *, is_watched: bool = False) -> list[Found]:
        """What ``news`` finds in this thread's turn: at once, if another thread's step has already brought it, else after a step."""
        with self.turn():
            found = news()
            if not found:
                self._step(is_watched)
                found = news()
            return found

    def _step(self, is_watched: bool) -> list[Request]:
        """Plan, dispatch, read, commit."""
        with self._change():
            start = time.monotonic()
            plan = self.scheduler.plan(self._pace.steps_at_once(is_watched), self._pace.token_budget(is_watched))
            if plan is not None:
                self._in_flight.append((self.runner.dispatch(plan, self.scheduler.tables), start))
            self.metrics.host_s += time.monotonic() - start
            if not self._in_flight or (plan is not None and len(self._in_flight) < MAX_IN_FLIGHT):
                return []
            return self._commit(*self._in_flight.popleft())

    def prepare(self, prompt: Prompt, params: SamplingParams, *, priority: int = 0) -> Prepared:
        """A request that can be queued; raises what :func:`.encode_prompt` and :meth:`.Admission.prepare` raise."""
        return self._admission.prepare(encode_prompt(prompt, self.tokenizer), params, priority)

    def add_request(self, request_id: str, prepared: Prepared) -> Request:
        """Queue a request."""
        with self.turn():
            seed = self._choose_seed() if prepared.params.seed is None else prepared.params.seed % 2**64
            request = new_request(request_id, prepared, seed=seed, max_len=self._admission.max_len, tokenizer=self.tokenizer,
                                  number=self._num_requests + 1)
            with self._change():
                self._num_requests += 1
                self.metrics.num_requests += 1
                self._unfinished[request] = None
                for sequence in request.sequences:
                    self.scheduler.add(sequence)
        return request

    def abort(self, *requests: Request) -> None:
        """End requests now; what they have so far stays in their outputs, and their pages are free at once.

        A finalizer may ask for it in the middle of another call of its thread: then they end with that call.
        """
        self._given_up.extend(requests)
        if not self.is_in_turn:
            with self._turns.take():
                try:
                    self._settle()
                except Exception:
                    log.exception("the engine could not be made anew")  # they have ended; the next call tries again, and tells

    def warm_up(self, *, has_prompt_logprobs: bool = False) -> None:
        """Compile every program now; afterwards nothing compiles."""
        programs, is_done = self.runner.warm_up(has_prompt_logprobs=has_prompt_logprobs), False
        while not is_done:
            with self.turn(), self._change():  # a turn for each: all together take minutes
                is_done = next(programs, None) is None

    def reset_prefix_cache(self) -> None:
        """Forget what pages hold; rows that run keep theirs."""
        with self.turn(), self._change():
            self.scheduler.reset_prefix_cache()

    def recover(self) -> None:
        """Make anew what a failed call left in doubt, as every other call does first; unfinished requests end with an error."""
        with self.turn():
            pass

    def close(self) -> None:
        """End what is unfinished, and refuse everything from now on."""
        with self._turns.take():
            self._is_closed, self._doubt = True, None
            self._end_all("abort")

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._unfinished)

    @property
    def num_waiting(self) -> int:
        """Sequences that have no slot yet."""
        return len(self.scheduler.waiting)

    @property
    def is_in_turn(self) -> bool:
        """Whether this thread is within a call of the engine."""
        return self._turns.are_mine

    # --- turns, and what becomes of state in doubt ------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A turn: this thread alone uses the engine, whose state is known."""
        with self._turns.take():
            if self._is_closed:
                raise ConfigError("this LLM is closed; make a new one")
            self._settle()
            yield
            self._end_given_up()

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """A change of host or device state. If it fails half way, the whole state is in doubt, and the next turn makes it anew."""
        self._doubt = "interrupted"
        try:
            yield
        except BaseException as error:
            self._doubt = f"internal error: {error!r}"
            raise
        self._doubt = None

    def _settle(self) -> None:
        if self._doubt is not None:
            self._end_all("error", error=self._doubt)
            try:
                self.runner.renew()
            except Exception as error:
                raise RuntimeError(f"a call failed ({self._doubt}), and since then there is no room for a new KV cache ({error}); free some memory "
                                   "and call again, or close this LLM and make a smaller one") from error
            doubt, self._doubt = self._doubt, None
            log.warning("the engine was made anew, and what was unfinished has ended with an error (%s)", doubt)
        self._end_given_up()

    def _end_given_up(self) -> None:
        while self._given_up:
            with self._change():
                for sequence in self._given_up.popleft().sequences:
                    if not sequence.is_finished:
                        self._finish(sequence, "abort")

    def _end_all(self, reason: str, **details: Any) -> None:
        """End every unfinished request and begin again with empty slots and pages; nothing that the scheduler knew is counted on."""
        for request in list(self._unfinished):
            for sequence in request.sequences:
                if not sequence.is_finished:
                    sequence.end(reason, **details)
                    self.metrics.count_end(sequence)
        self._unfinished.clear()
        self._in_flight.clear()
        self.scheduler.reset()

    # --- results ----------------------------------------------------------------------------------------------------------------------
    def _commit(self, dispatched: Dispatched, dispatched_at: float) -> list[Request]:
        """Read a program's results and hand them to the rows that still want them."""
        plan, before = dispatched.plan, time.monotonic()
        output, prompt_scores = jax.device_get((dispatched.output, dispatched.prompt_scores))
        now = time.monotonic()
        owners = [owner for owner in plan.owners if owner.is_current]
        num_steps = int(output.num_steps) if plan.owners else 0
        took_s = self._pace.measure(plan, now, dispatched_at=dispatched_at, num_steps=num_steps)
        self.metrics.count_program(plan, num_steps=num_steps, waited_s=now - before, took_s=took_s)
        if prompt_scores is not None:
            self._commit_prompt_scores(plan, prompt_scores)
        for owner in owners:
            sequence, ending = owner.sequence, None
            with self._alone(sequence):
                ending = self._push_tokens(sequence, output, owner.slot)
            if ending is not None:
                self._finish(sequence, **ending)
            else:
                self.scheduler.commit(owner)
        self.metrics.host_s += time.monotonic() - now
        return list({id(owner.sequence.request): owner.sequence.request for owner in owners}.values())

    def _push_tokens(self, sequence: Sequence, output: StepOutput, column: int) -> dict[str, Any] | None:
        """Give one row's tokens to its sequence. Returns how the sequence ends with the last of them, or None if it goes on."""
        params = sequence.request.params
        for step, token in enumerate(output.token[:, column].tolist()):
            if token == NO_TOKEN:
                break
            status = int(output.status[step, column])
            if status in ERRORS:
                return {"reason": "error", "error": ERRORS[status]}
            top = self._logprobs(token, output.scores, (step, column), count=params.logprobs)
            self.metrics.count_token(sequence, sequence.push(token, float(output.scores.logprob[step, column]), top))
            is_shown = status in (RUNNING, FULL) or params.include_stop_str_in_output
            stop = sequence.show(token) if is_shown else None
            if stop is not None:
                return {"reason": "stop", "stop_reason": stop}
            if status != RUNNING:
                is_own_stop = status != FULL and token in params.stop_token_ids
                return {"reason": "length" if status == FULL else "stop", "stop_reason": token if is_own_stop else None}
        return None

    def _commit_prompt_scores(self, plan: StepPlan, scores: TokenScores) -> None:
        """Keep the scores of prompt tokens; a piece that is computed again has its scores already."""
        for piece, group, where in places_of(plan, num_slots=len(self.scheduler.slots), num_groups=self.runner.num_groups):
            output, wanted = piece.sequence.request.output, piece.sequence.request.params.prompt_logprobs
            if wanted is None or piece.sequence.completion.index:
                continue
            first = group * plan.bucket + where.start
            with self._alone(piece.sequence):
                for offset, token in enumerate(output.prompt_token_ids[piece.start + 1:piece.start + piece.count + 1]):
                    if piece.start + 1 + offset == len(output.prompt_logprobs):
                        output.prompt_logprobs.append(self._logprobs(token, scores, (first + offset,), count=wanted))

    @contextlib.contextmanager
    def _alone(self, sequence: Sequence) -> Iterator[None]:
        """An error in here, such as in making text of tokens, ends this row and no other."""
        try:
            yield
        except Exception as error:
            if not sequence.is_finished:
                self._finish(sequence, "error", error=f"internal error: {error!r}")
            log.exception("request %s failed", sequence.request.output.request_id)

    def _logprobs(self, token: int, scores: TokenScores, at: tuple[int, ...], *, count: int | None) -> dict[int, Logprob] | None:
        """The log probabilities of the token itself and of the ``count`` likeliest tokens, from the scores at one place."""
        if count is None:
            return None
        found = {token: (float(scores.logprob[at]), int(scores.rank[at]))}
        for index, (top, logprob) in enumerate(zip(scores.top_ids[at][:count].tolist(), scores.top_logprobs[at][:count].tolist(), strict=True)):
            found.setdefault(top, (logprob, index + 1))
        text = self.tokenizer.token_text if self.tokenizer else str
        return {top: Logprob(logprob=logprob, rank=rank, decoded_token=text(top)) for top, (logprob, rank) in found.items()}

    def _finish(self, sequence: Sequence, reason: str, **details: Any) -> None:
        try:
            sequence.finish(reason, **details)
        except Exception as error:
            sequence.end("error", error=f"internal error: {error!r}")
            log.exception("the last text of request %s failed", sequence.request.output.request_id)
        if sequence.saved is not None:
            self.runner.drop(sequence.saved)
        self.scheduler.release(sequence)
        self.metrics.count_end(sequence)
        if sequence.request.is_finished:
            self._unfinished.pop(sequence.request, None)

    def _choose_seed(self) -> int:
        digest = hashlib.blake2b(f"{self.seed}:{self._num_requests}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")
