"""What a call of the facade is to the engine: its own requests among those of others, waited for and given up together.

Iterators that are left half way, and other threads, share one engine. Whoever waits steps it, for everybody's requests.
"""
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

from tpllm.engine.engine import Engine
from tpllm.engine.outputs import CompletionDelta, RequestOutput, failed_output
from tpllm.engine.prompts import Prompt
from tpllm.engine.request import Prepared, Request, Sequence
from tpllm.engine.sampling_params import SamplingParams
from tpllm.engine.turns import HeldSignals
from tpllm.errors import ConfigError, TpllmError

OnError = Literal["raise", "return"]


class Call:
    """The requests of one call. As a context manager it gives up those that are unfinished at its end."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.unfinished: dict[str, Request] = {}

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *_) -> None:
        if sys is not None and not sys.is_finalizing():  # at exit modules are None, and nothing runs on
            self._engine.abort(*self.unfinished.values())

    def submit(self, request_id: str, prepared: Prepared) -> Request:
        """Queue a request."""
        with HeldSignals():  # a request that is queued and not noted here could not be given up
            request = self.unfinished[request_id] = self._engine.add_request(request_id, prepared)
        return request

    @property
    def num_waiting(self) -> int:
        """Its sequences that have no slot yet."""
        return sum(sequence.slot is None and not sequence.is_finished for request in self.unfinished.values() for sequence in request.sequences)

    def take_finished(self) -> list[Request]:
        """Those of its requests that have ended since the last time."""
        found = [request_id for request_id, request in self.unfinished.items() if request.is_finished]
        return [self.unfinished.pop(request_id) for request_id in found]


def complete(engine: Engine, requests: Iterator[Prepared | tuple[Prompt, SamplingParams, int]], *, on_error: OnError) -> Iterator[RequestOutput]:
    """Outputs as they end; a bad prompt is raised, or given back as one. At most ``max_num_seqs`` of its sequences wait at a time.

    Args:
        engine: of all calls.
        requests: prepared, or a prompt, parameters and a priority each, which are encoded and checked when their turn comes.
        on_error: ``"raise"`` or ``"return"``.
    """
    numbered, is_exhausted = enumerate(requests), False
    with Call(engine) as call:
        while call.unfinished or not is_exhausted:
            room = 0 if is_exhausted else engine.runner.shapes.max_num_seqs - call.num_waiting
            while room > 0:
                index, request = next(numbered, (None, None))
                if index is None:
                    is_exhausted = True
                    break
                try:
                    prepared = request if isinstance(request, Prepared) else engine.prepare(*request[:2], priority=request[2])
                    room -= len(call.submit(str(index), prepared).sequences)
                except TpllmError as error:
                    if on_error == "raise" or isinstance(error, ConfigError):  # that one is about the engine
                        raise
                    yield failed_output(str(index), request[0] if isinstance(request[0], str) else None, str(error))
            for request in engine.wait(call.take_finished):
                yield request.output


def complete_all(engine: Engine, prepared: list[Prepared], done: Callable[[RequestOutput], None]) -> list[RequestOutput]:
    """Outputs in the order of their requests, of which those of a lower priority value begin first.

    Args:
        engine: of all calls.
        prepared: the requests.
        done: is told of each output when it ends.
    """
    order = sorted(range(len(prepared)), key=lambda index: prepared[index].priority)
    outputs: dict[int, RequestOutput] = {}
    with contextlib.closing(complete(engine, (prepared[index] for index in order), on_error="raise")) as completed:
        for output in completed:
            index = order[int(output.request_id)]
            output.request_id, outputs[index] = str(index), output
            done(output)
    return [outputs[index] for index in range(len(prepared))]


def stream(engine: Engine, prompt: Prompt, params: SamplingParams) -> Iterator[CompletionDelta]:
    """What is new of a request's completions, until the last of them ends; raises ``TpllmError`` where one fails."""
    with Call(engine) as call:
        growing = {sequence.completion.index: _Growing(sequence) for sequence in call.submit("0", engine.prepare(prompt, params)).sequences}

        def news() -> list[CompletionDelta]:
            return [delta for one in growing.values() if (delta := one.take_new()) is not None]
        while growing:
            for delta in engine.wait(news, is_watched=True):
                if delta.finish_reason == "error":
                    raise TpllmError(growing[delta.index].error)
                if delta.finish_reason is not None:
                    del growing[delta.index]
                yield delta


class _Growing:
    """A completion, and how much of it was given out."""

    def __init__(self, sequence: Sequence):
        self._sequence, self._num_tokens, self._num_chars = sequence, 0, 0

    @property
    def error(self) -> Any:
        """What went wrong."""
        return self._sequence.completion.error

    def take_new(self) -> CompletionDelta | None:
        """What has not been given out yet; None where it has not grown."""
        completion = self._sequence.completion
        if len(completion.token_ids) == self._num_tokens and not self._sequence.is_finished:
            return None
        end = self._sequence.num_certain_chars
        delta = CompletionDelta(completion.index, completion.text[self._num_chars:end], completion.token_ids[self._num_tokens:],
                                completion.finish_reason)
        self._num_tokens, self._num_chars = len(completion.token_ids), end
        return delta
