"""After warm-up nothing compiles: a compile is an error in tests and a warning in production."""
import logging
import os
import threading

import jax

from tpllm.environment.memory import return_freed_memory

log = logging.getLogger("tpllm")

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


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
        """From now on every compile is unexpected."""
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
