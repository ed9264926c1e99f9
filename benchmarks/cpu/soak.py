"""Many minutes of requests that come, share, lose their pages, fail and are aborted: resident memory must not grow, and nothing may compile.

  python -m benchmarks.cpu.soak
  python -m benchmarks.cpu.soak --shape tiny --minutes 1 --warm-up-minutes 0.2   # a trial

Three requests for each slot are there at any time, of mixed lengths and priorities; every second prompt begins as others do, some ask for two
samples, log probabilities, a seed or penalties, some are aborted on their way, and one in 64 is refused. The pool of pages holds a quarter of
what the slots could, so that rows lose their pages again and again.

The slope of the resident memory is that of a straight line through all samples after the warm-up. The exit code is 1 where it is not below
--max-slope, or where a program was compiled after the warm-up. The result is written to --output, by default
benchmarks/results/<date>-soak-<shape>.json.
"""
import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
import psutil

from tpllm import LLM, SamplingParams
from tpllm.bench.command import above_zero, at_least, check_writable
from tpllm.bench.machine import describe_machine
from tpllm.bench.shapes import find_shape, llm_of_shape
from tpllm.bench.workload import MixedLengths, make_workload
from tpllm.engine.request import Request
from tpllm.engine.shapes import DEFAULT_SEQS_CPU
from tpllm.errors import TpllmError

RESULTS = pathlib.Path(__file__).parents[1] / "results"
MAX_CONTEXT = 1024  # of which prefixes take an eighth, prompts up to three, and outputs up to four
ABORTED, REFUSED = 1 / 100, 1 / 64  # of the steps, and of the requests
MIB = 2**20


def main(argv: list[str] | None = None) -> int:
    """Run, print, write; 1 where a bar is not held."""
    args = _parse(argv)
    path = args.output or RESULTS / f"{datetime.datetime.now(datetime.UTC).date()}-soak-{args.shape}.json"
    check_writable(str(path))
    context = min(MAX_CONTEXT, find_shape(args.shape).max_position)
    options = {"max_model_len": context, "max_num_seqs": args.max_num_seqs, "kv_cache_tokens": args.max_num_seqs * context // 4,
               "preemption": args.preemption}
    with contextlib.closing(llm_of_shape(args.shape, mesh="tp=1", quantization=args.quantization, **options)) as llm:
        llm.warm_up()
        setup = {name: value for name, value in vars(args).items() if name != "output"}
        report = {"benchmark": "soak", "machine": describe_machine(jax.local_devices()[0]), "setup": {**setup, **options, **llm.fingerprint()},
                  **soak(llm, minutes=args.minutes, warm_up_minutes=args.warm_up_minutes, period_s=args.period, seed=args.seed)}
    report["load_average_after"] = list(os.getloadavg())
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['num_done']} requests in {args.minutes:g} minutes after {args.warm_up_minutes:g} of warm-up, "
          f"{report['num_preemptions']} rows lost their pages, {report['num_aborted']} aborted, {report['num_refused']} refused\n"
          f"resident memory {report['rss_mb'][0]:.1f} MB at first, {report['rss_mb'][-1]:.1f} MB at last, "
          f"{report['slope_mb_per_minute']:+.3f} MB a minute; {report['num_compiles']} programs compiled\nwritten to {path}")
    return int(report["slope_mb_per_minute"] >= args.max_slope or report["num_compiles"] > 0)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-160m", help="random weights of a known shape (default llama-160m)")
    parser.add_argument("--quantization", help="of the weights: int8 or int4")
    parser.add_argument("--max-num-seqs", type=at_least(1), default=DEFAULT_SEQS_CPU, metavar="N", help=f"slots (default {DEFAULT_SEQS_CPU})")
    parser.add_argument("--minutes", type=above_zero, default=20.0, metavar="X", help="that count (default 20)")
    parser.add_argument("--warm-up-minutes", type=above_zero, default=3.0, metavar="X", help="before them (default 3)")
    parser.add_argument("--period", type=above_zero, default=5.0, metavar="S", help="seconds between two samples (default 5)")
    parser.add_argument("--preemption", choices=("recompute", "swap"), default="recompute", help="default recompute")
    parser.add_argument("--max-slope", type=above_zero, default=1.0, metavar="X", help="MB a minute that are too many (default 1)")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N")
    parser.add_argument("--output", type=pathlib.Path, help="the file to write to")
    return parser.parse_args(argv)


def soak(llm: LLM, *, minutes: float, warm_up_minutes: float, period_s: float, seed: int) -> dict[str, Any]:
    """Keep a warm engine busy and watch its process; JSON-able.

    Args:
        llm: warmed up.
        minutes: that count.
        warm_up_minutes: before them.
        period_s: between two samples.
        seed: chooses the requests and what happens to them.
    """
    traffic, guard = Traffic(llm, seed), llm.engine.runner.guard
    traffic.run_until(time.monotonic() + 60 * warm_up_minutes)
    compiled, before, start = guard.num_compiles, traffic.counts(), time.monotonic()
    times, rss = [0.0], [_resident_bytes() / MIB]
    while times[-1] < 60 * minutes:
        traffic.run_until(start + min(times[-1] + period_s, 60 * minutes))
        times.append(time.monotonic() - start)
        rss.append(_resident_bytes() / MIB)
    counted = {name: value - before[name] for name, value in traffic.counts().items()}
    return {**counted, "num_compiles": guard.num_compiles - compiled, "slope_mb_per_minute": float(np.polyfit(np.divide(times, 60), rss, 1)[0]),
            "times_s": [round(value, 1) for value in times], "rss_mb": [round(value, 2) for value in rss]}


class Traffic:
    """Requests of every kind, so many that some always wait."""

    def __init__(self, llm: LLM, seed: int):
        self._llm, self._engine, self._rng = llm, llm.engine, np.random.default_rng(seed)
        self._open: dict[int, Request] = {}
        self._items: list = []
        self._num_sent = self._num_done = self._num_aborted = self._num_refused = 0

    def run_until(self, deadline: float) -> None:
        """Send, step and abort until then, by ``time.monotonic``."""
        while time.monotonic() < deadline:
            while len(self._open) < 3 * self._llm.shapes.max_num_seqs:
                self._send()
            for request in self._engine.step(is_watched=bool(self._rng.integers(2))):
                if request.is_finished:
                    self._num_done += self._open.pop(id(request), None) is not None
            if self._rng.random() < ABORTED:
                self._engine.abort(self._open.pop(self._rng.choice(list(self._open))))
                self._num_aborted += 1

    def counts(self) -> dict[str, int]:
        """What has happened by now."""
        return {"num_done": self._num_done, "num_aborted": self._num_aborted, "num_refused": self._num_refused,
                "num_preemptions": self._llm.metrics().num_preemptions, "num_generated_tokens": self._engine.metrics.num_generated_tokens}

    def _send(self) -> None:
        if not self._items:
            eighth = self._llm.shapes.max_model_len // 8
            lengths = MixedLengths(32, int(self._rng.integers(2**31)), prompt_lens=(8, 3 * eighth), output_lens=(4, 4 * eighth),
                                   output_median=eighth)
            self._items = [item for prefix_len in (0, eighth)
                           for item in make_workload(self._llm.config.vocab_size, dataclasses.replace(lengths, shared_prefix_len=prefix_len))]
            self._rng.shuffle(self._items)
        item, self._num_sent = self._items.pop(), self._num_sent + 1
        is_refused = self._rng.random() < REFUSED
        prompt = item.prompt_token_ids * (1 + is_refused * self._llm.shapes.max_model_len)
        try:
            request = self._llm.submit(str(self._num_sent), {"prompt_token_ids": prompt}, self._params(item.output_len),
                                       priority=int(self._rng.integers(3)))
        except TpllmError:
            if not is_refused:
                raise
            self._num_refused += 1
        else:
            self._open[id(request)] = request

    def _params(self, output_len: int) -> SamplingParams:
        rng, plain = self._rng, {"max_tokens": output_len, "ignore_eos": True}
        if rng.random() < 0.5:
            return SamplingParams(temperature=float(rng.integers(2)), **plain)
        return SamplingParams(n=int(rng.integers(1, 3)), temperature=0.8, top_k=int(rng.integers(1, 50)), top_p=0.9, seed=int(rng.integers(2**31)),
                              presence_penalty=0.5 * float(rng.integers(2)), logprobs=int(rng.integers(5)), **plain)


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    raise SystemExit(main())
