"""Runs the engine's programs. An executor gets names, static arguments and numpy arrays, so that it may be this process, or several in step."""
import dataclasses
import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from tpllm.engine.programs import StepOutput, jit_programs
from tpllm.engine.shapes import EngineShapes
from tpllm.engine.slots import TARGET, Cache, SlotState
from tpllm.environment.memory import return_freed_memory
from tpllm.errors import log
from tpllm.model.config import ModelConfig
from tpllm.model.kv_cache import init_cache
from tpllm.model.params import DecoderParams
from tpllm.model.per_row import empty_rows, shardings_of
from tpllm.model.sampling import STOP_IDS, TokenScores

MAX_STEPS = 32  # decode steps of one program, at most
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class ProgramCall:
    """One program to be run, or pages to be kept.

    Attributes:
        name: the name of a method of the executor: ``start``, ``step``, ``decode``, ``copy_page``, ``save``, ``restore`` or ``drop``.
        arguments: numpy arrays or trees of them; the last three also get the key of a row's saved pages.
        static: the arguments that choose among compiled programs.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Output = tuple[StepOutput, TokenScores | None]


class Executor(Protocol):
    """Holds models, cache and slots, and runs programs on them in the order in which they are given."""

    def run(self, calls: Iterable[ProgramCall]) -> Output | None:
        """Start the programs and return at once. Returns what the last ``step`` or ``decode`` gives, as arrays to come, with a prompt's scores."""

    def renew(self) -> None:
        """Make cache and slots anew, empty, if a failed program has taken them with it; forget what was saved."""

    def wait(self) -> None:
        """Wait until all that was started is done."""

    def close(self) -> None:
        """Free all memory at once."""


class LocalExecutor:
    """Runs the programs on the devices of this process. It waits for no result, except for pages that are saved to the host.

    Args:
        config: the model, fitted to its mesh.
        params: its parameters.
        shapes: sizes of the programs.
        num_pages: pages of the KV cache, all data groups together.
        num_stop_ids: the most stop ids of a row.
        cache_dtype: the dtype of keys and values.

    Attributes:
        params: the parameters of each model, by its name.
        cache, state: the rows' contexts and slots. They are donated to programs, which give them back.
    """

    def __init__(self, config: ModelConfig, params: DecoderParams, *, shapes: EngineShapes, num_pages: int, num_stop_ids: int, cache_dtype: Any):
        self.params = {TARGET: params}
        self._config, self._shapes, self._num_pages, self._num_stop_ids, self._cache_dtype = config, shapes, num_pages, num_stop_ids, cache_dtype
        self._saved: dict[int, Cache] = {}
        self._make_arrays()
        self.programs = jit_programs(config, self.cache, self.state, max_steps=MAX_STEPS, max_logprobs=shapes.max_logprobs)

    def run(self, calls: Iterable[ProgramCall]) -> Output | None:
        """See :meth:`.Executor.run`."""
        output = None
        for call in calls:
            output = getattr(self, call.name)(*call.arguments, **call.static) or output
        return output

    def start(self, *arguments: Any) -> None:
        """Run :func:`.programs.start` on a slot and a row."""
        per_row, self.state = self.programs.start(self.cache.per_row, self.state, *arguments)
        self.cache = self.cache.replace(per_row=per_row)

    def step(self, *arguments: Any, **static: Any) -> Output:
        """Run :func:`.programs.step` on a chunk, steps and tables."""
        self.cache, self.state, *output = self.programs.step(self.params, self.cache, self.state, *arguments, **static)
        return tuple(output)

    def decode(self, *arguments: Any, **static: Any) -> Output:
        """Run :func:`.programs.decode` on steps and tables."""
        self.cache, self.state, output = self.programs.decode(self.params, self.cache, self.state, *arguments, **static)
        return output, None

    def copy_page(self, *arguments: Any) -> None:
        """Run :func:`.programs.copy_page` on the numbers of two pages: from, and to."""
        self.cache = self.cache.replace(pages=self.programs.copy_page(self.cache.pages, *arguments))

    def save(self, key: int, *arguments: Any) -> None:
        """Copy a slot's row and its pages to the host by :func:`.programs.read_row`, and keep them under ``key``."""
        self._saved[key] = jax.device_get(self.programs.read_row(self.cache, *arguments))

    def restore(self, key: int, *arguments: Any) -> None:
        """Copy what was kept back to a slot and its pages by :func:`.programs.write_row`, and forget it."""
        self.cache = self.programs.write_row(self.cache, *arguments, self._saved[key])
        del self._saved[key]

    def drop(self, key: int) -> None:
        """Forget what was kept under ``key``."""
        del self._saved[key]

    def renew(self) -> None:
        """See :meth:`.Executor.renew`."""
        self._saved.clear()
        try:
            self.wait()
        except Exception:
            _delete((self.cache, self.state))  # what is left of them, before there is room for new ones
            self._make_arrays()

    def wait(self) -> None:
        """See :meth:`.Executor.wait`."""
        jax.block_until_ready((self.cache, self.state))

    def close(self) -> None:
        """See :meth:`.Executor.close`. The parameters are freed too, unless they were taken out of :attr:`params` before."""
        _delete((self.cache, self.state, self.params))
        self.cache = self.state = None
        self.params, self._saved = {}, {}

    def _make_arrays(self) -> None:
        shapes, config = self._shapes, self._config
        self.cache = Cache({TARGET: init_cache(config, self._num_pages, shapes.page_size, jnp.dtype(self._cache_dtype))})
        self.state = empty_slots(config, shapes, num_stop_ids=self._num_stop_ids)


def empty_slots(config: ModelConfig, shapes: EngineShapes, *, num_stop_ids: int) -> SlotState:
    """Slots that hold nothing, on the model's mesh."""
    make = jax.jit(_empty_slots, static_argnums=(0, 1, 2), out_shardings=shardings_of(SlotState, config.partition))
    return make(shapes.max_num_seqs, num_stop_ids, config.padded_vocab_size)


def _empty_slots(num_slots: int, num_stop_ids: int, vocab_size: int) -> SlotState:
    return empty_rows(SlotState, num_slots, vocab=vocab_size, **{STOP_IDS: num_stop_ids})


def _delete(arrays: Any) -> None:
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()


class UnexpectedCompileError(RuntimeError):
    """A program was compiled after warm-up."""


class CompileGuard:
    """A context manager around dispatches; once :meth:`arm` was called, a compile inside it raises or is logged.

    It raises where the environment variable ``TPLLM_COMPILE_GUARD`` is ``raise``, as in this project's tests.
    """

    def __init__(self):
        self.is_armed = False
        self.num_compiles = 0
        self._before = self._thread = 0

    def arm(self) -> None:
        """Treat every compile from here on as unexpected."""
        self.is_armed = True

    def __enter__(self) -> "CompileGuard":
        jax.monitoring.register_event_duration_secs_listener(self._count)
        self._before, self._thread = self.num_compiles, threading.get_ident()
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._count)
        compiled = self.num_compiles - self._before
        if compiled:
            return_freed_memory()
        if not self.is_armed or not compiled:
            return
        message = f"{compiled} program(s) compiled after warm-up"
        if os.environ.get("TPLLM_COMPILE_GUARD") == "raise":
            raise UnexpectedCompileError(message)
        log.warning("%s; the requests at hand wait for it", message)

    def _count(self, event: str, _duration: float, **_) -> None:
        self.num_compiles += event == _COMPILE_EVENT and threading.get_ident() == self._thread  # another thread's is none of ours
