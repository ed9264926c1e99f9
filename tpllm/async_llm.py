"""``AsyncLLM``: one engine behind many coroutines."""
import asyncio
import dataclasses
import logging
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from tpllm.engine.outputs import RequestOutput, failed_output
from tpllm.engine.prompts import Prompt
from tpllm.engine.request import Request
from tpllm.engine.sampling_params import SamplingParams
from tpllm.engine.snapshot import Snapshot
from tpllm.errors import ConfigError, TpllmError
from tpllm.llm import LLM
from tpllm.tokenizer import Tokenizer

log = logging.getLogger("tpllm")


class AsyncLLM:
    """An :class:`.LLM` for services: requests come and go while others run, each an async iterator of its growing output.

    A thread of its own steps the engine. A request that fails ends with ``finish_reason="error"`` and its message; the others go on. Use it as
    an async context manager, or call :meth:`close`.

    Args:
        model: as for :class:`.LLM`, or one that is there already; it is closed with this, and nothing else may step it.
        options: as for :class:`.LLM`.
    """

    def __init__(self, model: str | LLM, **options: Any):
        self._llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._engine = self._llm._live_engine
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._thread = threading.Thread(target=self._run, name="tpllm-engine", daemon=True)
        self._is_closed = False
        self._thread.start()

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None,
                       priority: int = 0) -> AsyncIterator[RequestOutput]:
        """Complete one prompt.

        Args:
            prompt: as for :meth:`.LLM.generate`.
            sampling_params: None takes the model's own defaults.
            request_id: unique among those that run; None for a new one.
            priority: lower ones come first.

        Yields:
            The output so far, each time it has grown; the last one is finished. Leaving the iterator early aborts the request.

        Raises:
            ConfigError: it is closed, or a request of this id runs.
        """
        request_id = uuid.uuid4().hex if request_id is None else request_id
        if self._is_closed:
            raise ConfigError("this AsyncLLM is closed; make a new one")
        if request_id in self._streams:
            raise ConfigError(f"a request {request_id!r} runs already; give each its own request_id")
        stream = self._streams[request_id] = _Stream(asyncio.get_running_loop())
        self._inbox.put(lambda: self._submit(request_id, stream, prompt, sampling_params, priority))
        try:
            is_finished = False
            while not is_finished:
                output = await stream.next()
                is_finished = output.finished
                yield output
        finally:
            if self._streams.pop(request_id, None) is not None:
                self._inbox.put(lambda: self._abort(stream))

    async def abort(self, request_id: str) -> None:
        """End a request now; its iterator gives what it has, with ``finish_reason="abort"``. One that has ended is left as it is."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._inbox.put(lambda: self._abort(stream))

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
        if not self._is_closed:
            self._is_closed = True
            self._inbox.put(None)
            self._thread.join()
            self._llm.close()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_) -> None:
        await asyncio.to_thread(self.close)

    async def _ask(self, function: Callable[[], Any]) -> Any:
        """What a function gives that the engine's thread calls between two steps."""
        if self._is_closed:
            raise ConfigError("this AsyncLLM is closed; make a new one")
        loop, answer = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        self._inbox.put(lambda: loop.call_soon_threadsafe(answer.set_result, function()))
        return await answer

    # --- the engine's thread ----------------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while self._handle_inbox():
            try:
                requests = self._engine.step(is_watched=True)
            except Exception as error:
                log.exception("the engine failed")
                requests = self._engine.fail(f"internal error: {error!r}")
            for request in requests:
                self._show(request)
        for stream in list(self._streams.values()):
            self._abort(stream)

    def _handle_inbox(self) -> bool:
        """Do what was asked for, waiting where there is nothing else to do; False where it is time to end."""
        while True:
            try:
                task = self._inbox.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if task is None:
                return False
            task()

    def _submit(self, request_id: str, stream: "_Stream", prompt: Prompt, params: SamplingParams | None, priority: int) -> None:
        if self._streams.get(request_id) is not stream:  # its iterator was left before it began
            return
        try:
            stream.request = self._llm.submit(request_id, prompt, params, priority=priority)
        except Exception as error:
            if not isinstance(error, TpllmError):
                log.exception("request %s failed", request_id)
            message = str(error) if isinstance(error, TpllmError) else f"internal error: {error!r}"
            stream.put(failed_output(request_id, prompt if isinstance(prompt, str) else None, message))

    def _abort(self, stream: "_Stream") -> None:
        if stream.request is not None and not stream.request.is_finished:
            self._engine.abort(stream.request)
            self._show(stream.request)

    def _show(self, request: Request) -> None:
        stream = self._streams.get(request.output.request_id)
        if stream is not None and stream.request is request:  # else its iterator was left
            stream.put(output_so_far(request))


class _Stream:
    """Outputs on their way from the engine's thread to a coroutine; of those that it has not taken yet only the last counts."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.request: Request | None = None
        self._loop, self._latest, self._has_more = loop, None, asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        """From the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set, output)

    async def next(self) -> RequestOutput:
        """The latest output that was not taken yet."""
        await self._has_more.wait()
        self._has_more.clear()
        return self._latest

    def _set(self, output: RequestOutput) -> None:
        self._latest = output
        self._has_more.set()


def output_so_far(request: Request) -> RequestOutput:
    """A copy of a request's output that does not grow, without text that a stop string may still take back."""
    completions = []
    for sequence in request.sequences:
        completion = sequence.completion
        logprobs = None if completion.logprobs is None else list(completion.logprobs)
        completions.append(dataclasses.replace(completion, text=completion.text[:sequence.num_certain_chars], token_ids=list(completion.token_ids),
                                               logprobs=logprobs))
    return dataclasses.replace(request.output, outputs=completions, metrics=dataclasses.replace(request.output.metrics))
