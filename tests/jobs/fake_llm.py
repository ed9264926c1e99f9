"""A small engine with the facade's contract: rows take turns, end out of order, and say what only (prompt, params) decide."""
import hashlib
import itertools
import json
import pathlib
import random
import time

from tpllm.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from tpllm.errors import PromptError

VERSIONS = {"jax": "0.0-fake", "platform": "fake"}


class FakeLLM:
    """``tick_s`` is the time of a step; ``calls`` names a file that gets one line for each prompt begun."""

    def __init__(self, model, *, mesh="auto", dtype="auto", quantization=None, seed=0, max_num_seqs=4, max_model_len=None,
                 tick_s=0.0, calls=None, revision=None):
        self.model, self.mesh, self.dtype, self.max_num_seqs = model, mesh, dtype, max_num_seqs
        self.tick_s, self.calls, self.max_model_len = tick_s, calls, max_model_len
        self.default_sampling = {"temperature": 0.5}
        self.is_closed = False

    def fingerprint(self):
        return {"model": {"name": self.model, "sha256": "0" * 8}, "mesh": str(self.mesh), "max_num_seqs": self.max_num_seqs, **VERSIONS}

    def close(self):
        self.is_closed = True

    def generate_iter(self, requests, *, on_error="raise"):
        assert on_error == "return"
        waiting = enumerate(requests)
        running = []
        while True:
            for number, (prompt, params) in itertools.islice(waiting, self.max_num_seqs - len(running)):
                running.append([self._num_ticks(prompt, params), number, prompt, params])
                if self.calls:
                    with pathlib.Path(self.calls).open("a") as log:
                        log.write(json.dumps(prompt) + "\n")
            if not running:
                return
            if self.tick_s:
                time.sleep(self.tick_s)
            for row in running:
                row[0] -= 1
            ended = [row for row in running if row[0] <= 0]
            running = [row for row in running if row[0] > 0]
            for _, number, prompt, params in ended:
                yield self._output(number, prompt, params)

    def stream(self, prompt, params):
        for word in (f"[{prompt}]", " max", f" {params.max_tokens}", f" t {params.temperature}"):
            yield CompletionOutput(0, word)

    def _num_ticks(self, prompt, params):
        return random.Random(_digest(prompt, params)).randint(1, 6)

    def _output(self, number, prompt, params):
        outputs = []
        if prompt in ("", "FAIL"):
            error = str(PromptError("the prompt is empty; give at least one token"))
            outputs = [CompletionOutput(0, finish_reason="error", error=error)]
        for index in range(0 if outputs else params.n):
            draw = random.Random(_digest(prompt, params) + str(index))
            ids = [draw.randrange(1000) for _ in range(params.max_tokens or draw.randint(1, 9))]
            logprobs = [{i: Logprob(-float("inf") if k else -0.5, 1, f"<{i}>")} for k, i in enumerate(ids)] if params.logprobs is not None else None
            outputs.append(CompletionOutput(index, f" é{ids}", ids, -0.5, logprobs, "length"))
        return RequestOutput(str(number), prompt if isinstance(prompt, str) else None, [1, 2, 3], outputs, RequestMetrics(0.0), finished=True)


def _digest(prompt, params):
    return hashlib.sha256((json.dumps(prompt) + repr(params)).encode()).hexdigest()


class FailingLLM(FakeLLM):
    """Refuses every third row, as an engine short of memory might."""

    def _output(self, number, prompt, params):
        return super()._output(number, prompt if number % 3 else "FAIL", params)


class DyingLLM(FakeLLM):
    """One whose engine is gone after ``num_outputs`` outputs."""

    num_outputs = 7

    def generate_iter(self, *arguments, **options):
        for number, output in enumerate(super().generate_iter(*arguments, **options)):
            if number == self.num_outputs:
                raise RuntimeError("the engine is gone")
            yield output
