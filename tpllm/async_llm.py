"""``AsyncLLM``: one engine behind many coroutines."""
import asyncio
import contextlib
import dataclasses
import math
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from tpllm.engine.metrics import Snapshot
from tpllm.engine.outputs import RequestOutput, failed_output, new_part
from tpllm.engine.prompts import Prompt
from tpllm.engine.request import Request
from tpllm.engine.sampling_params import RequestOutputKind, SamplingParams
from tpllm.errors import ConfigError, TpllmError, log
from tpllm.llm import LLM
from tpllm.tokenizer import Tokenizer


class AsyncLLM:
    """An :class:`.LLM` for services: requests come and go while others run, each an async iterator of its growing output.

    A thread of its own steps the engine. A request that fails ends with ``finish_reason="error"`` and its message; the others go on. Use it as
    an async context manager, or call :meth:`close`. Event loops in several threads may share it.

    Args:
        model: as for :class:`.LLM`, or one that is there already; it is closed with this.
        options: as for :class:`.LLM`.
    """

    def __init__(self, model: str | LLM, **options: Any):
        self._llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._engine = self._llm.engine
        self._inbox: queue.SimpleQueue[tuple[_Answer | _Stream | None, Callable[[], None]]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._thread = threading.Thread(target=self._run, name="tpllm-engine", daemon=True)
        self._is_closed, self._closing = False, threading.RLock()
        self._thread.start()

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None, *,
                       priority: int = 0) -> AsyncIterator[RequestOutput]:
        """Complete one prompt.

        Args:
            prompt: as for :meth:`.LLM.generate`.
            sampling_params: None takes the model's own defaults.
            request_id: unique among those that run; None for a new one.
            priority: lower ones come first.

        Yields:
            The output so far, each time it has grown, or what is new in it, as ``output_kind`` of the parameters says; the last one is finished.
            Leaving the iterator early aborts the request.

        Raises:
            ConfigError: it is closed, or a request of this id runs.
        """
        kind, before = getattr(sampling_params, "output_kind", RequestOutputKind.CUMULATIVE), None
        stream = _Stream(uuid.uuid4().hex if request_id is None else request_id, prompt, asyncio.get_running_loop())
        if self._streams.setdefault(stream.request_id, stream) is not stream:
            raise ConfigError(f"a request {request_id!r} runs already; give each its own request_id")
        try:
            self._send(stream, lambda: self._submit(stream, prompt, sampling_params, priority))
            is_finished = False
            while not is_finished:
                output = await stream.next()
                is_finished = output.finished
                if kind == RequestOutputKind.FINAL_ONLY and not is_finished:
                    continue
                yield new_part(output, before) if kind == RequestOutputKind.DELTA else output
                before = output
        finally:
            self._forget(stream)
            with contextlib.suppress(ConfigError):  # closing ends it, too
                self._send(stream, lambda: self._abort(stream))

    async def abort(self, request_id: str) -> None:
        """End a request now; its iterator gives what it has, with ``finish_reason="abort"``. One that has ended is left as it is."""
        stream = self._streams.get(request_id)
        if stream is not None:
            with contextlib.suppress(ConfigError):
                self._send(stream, lambda: self._abort(stream))

    async def metrics(self) -> Snapshot:
        """What the engine is doing and has done."""
        return await self._ask(self._llm.metrics)

    async def reset_prefix_cache(self) -> None:
        """See :meth:`.LLM.reset_prefix_cache`."""
        await self._ask(self._llm.reset_prefix_cache)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._llm.get_tokenizer()

    def close(self) -> None:
        """Abort what runs, end the thread and give the memory back. Closing twice is fine."""
        with self._closing:
            if not self._is_closed:
                self._is_closed = True
                self._inbox.put((None, lambda: None))  # wakes the thread, which ends when it has done all that was asked for before
        self._thread.join()
        self._llm.close()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_) -> None:
        await asyncio.to_thread(self.close)

    async def _ask(self, function: Callable[[], Any]) -> Any:
        """What a function gives, or raises, that the engine's thread calls between two steps."""
        answer = _Answer(asyncio.get_running_loop())
        self._send(answer, lambda: answer.give(function()))
        return await answer.future

    def _send(self, who: "_Answer | _Stream", task: Callable[[], None]) -> None:
        """Have the engine's thread do something between two steps; who waits for it is told where it fails."""
        with self._closing:
            if self._is_closed:
                raise ConfigError("this AsyncLLM is closed; make a new one")
            if not self._thread.is_alive():
                raise ConfigError("this AsyncLLM was made before its process was forked, which threads do not survive; make a new one")
            self._inbox.put((who, task))

    def _forget(self, stream: "_Stream") -> None:
        if self._streams.get(stream.request_id) is stream:
            self._streams.pop(stream.request_id, None)

    # --- the engine's thread ----------------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        """Whatever fails, this goes on until it is told to end: nobody else could tell those who wait."""
        while not (self._is_closed and self._inbox.empty()):
            try:
                self._handle_inbox()
                self._tell(self._engine.wait(self._news, is_watched=True))
            except BaseException:
                with contextlib.suppress(BaseException):
                    self._engine.recover()  # where that fails, the next call tries again, and tells
                with contextlib.suppress(BaseException):
                    log.exception("the engine failed")
                with contextlib.suppress(BaseException):
                    self._tell(self._news())
        with contextlib.suppress(BaseException):
            self._engine.close()
        for stream in list(self._streams.values()):
            with contextlib.suppress(BaseException):
                self._tell([(stream, *stream.look())])

    def _handle_inbox(self) -> None:
        """Do what was asked for, waiting where there is nothing else to do."""
        with contextlib.suppress(queue.Empty):
            while True:
                is_idle = not (self._is_closed or self._engine.has_work or any(stream.has_news for stream in list(self._streams.values())))
                self._do(*self._inbox.get(block=is_idle))

    def _do(self, who: "_Answer | _Stream | None", task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            who.fail(error)

    def _submit(self, stream: "_Stream", prompt: Prompt, params: SamplingParams | None, priority: int) -> None:
        if self._streams.get(stream.request_id) is not stream:  # its iterator was left before it began
            return
        stream.request = self._llm.submit(stream.request_id, prompt, params, priority=priority)

    def _abort(self, stream: "_Stream") -> None:
        if stream.request is not None and not stream.request.is_finished:
            self._engine.abort(stream.request)

    def _news(self) -> list[tuple["_Stream", RequestOutput, float]]:
        return [(stream, *stream.look()) for stream in list(self._streams.values()) if stream.has_news]

    def _tell(self, news: list[tuple["_Stream", RequestOutput, float]]) -> None:
        for stream, output, num_changes in news:
            if not stream.put(output, num_changes):
                self._forget(stream)
                self._abort(stream)


class _Stream:
    """Outputs on their way from the engine's thread to a coroutine; of those that it has not taken yet only the last counts.

    Attributes:
        request: once it has begun.
    """

    def __init__(self, request_id: str, prompt: Prompt, loop: asyncio.AbstractEventLoop):
        self.request_id, self._prompt = request_id, prompt if isinstance(prompt, str) else None
        self.request: Request | None = None
        self._error: BaseException | None = None  # that ended it outside the engine
        self._loop, self._latest, self._has_more = loop, None, asyncio.Event()
        self._num_told: float = 0

    @property
    def has_news(self) -> bool:
        """Whether there is more than what was put."""
        return self._num_changes > self._num_told

    @property
    def _num_changes(self) -> float:
        return math.inf if self._error is not None else 0 if self.request is None else self.request.num_changes

    def fail(self, error: BaseException) -> None:
        """End it with an error: what the request gives from now on is not looked at."""
        self._error = error
        if not isinstance(error, TpllmError):
            log.error("request %s failed", self.request_id, exc_info=error)

    def look(self) -> tuple[RequestOutput, float]:
        """A copy of its request's output, and how far that is; an output that names the error where there was one."""
        num_changes = self._num_changes
        if self._error is None:
            try:
                return output_so_far(self.request), num_changes
            except BaseException as error:
                self.fail(error)
        message = str(self._error) if isinstance(self._error, TpllmError) else f"internal error: {self._error!r}"
        return failed_output(self.request_id, self._prompt, message), math.inf

    def put(self, output: RequestOutput, num_changes: float) -> bool:
        """From the engine's thread; False where the coroutine's event loop is closed, so that nobody reads on."""
        try:
            self._loop.call_soon_threadsafe(self._set, output)
        except RuntimeError:
            return False
        self._num_told = num_changes
        return True

    async def next(self) -> RequestOutput:
        """The latest output that was not taken yet."""
        await self._has_more.wait()
        self._has_more.clear()
        return self._latest

    def _set(self, output: RequestOutput) -> None:
        self._latest = output
        self._has_more.set()


class _Answer:
    """What a function gives or raises, on its way from the engine's thread to a coroutine that may not wait any more."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.future, self._loop = loop.create_future(), loop

    def give(self, value: Any) -> None:
        """From the engine's thread."""
        self._settle(self.future.set_result, value)

    def fail(self, error: BaseException) -> None:
        """From the engine's thread."""
        is_plain = isinstance(error, Exception) and not isinstance(error, StopIteration)  # a future takes no others
        self._settle(self.future.set_exception, error if is_plain else RuntimeError(repr(error)))

    def _settle(self, settle: Callable[[Any], None], value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # its event loop is closed
            self._loop.call_soon_threadsafe(lambda: None if self.future.done() else settle(value))


def output_so_far(request: Request) -> RequestOutput:
    """A copy of a request's output that does not grow, without text that a stop string may still take back."""
    completions = []
    for sequence in request.sequences:
        completion = sequence.completion
        logprobs = None if completion.logprobs is None else list(completion.logprobs)
        completions.append(dataclasses.replace(completion, text=completion.text[:sequence.num_certain_chars], token_ids=list(completion.token_ids),
                                               logprobs=logprobs))
    return dataclasses.replace(request.output, outputs=completions, metrics=dataclasses.replace(request.output.metrics))
