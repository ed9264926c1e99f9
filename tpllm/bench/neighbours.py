"""What requests do to each other: a long prompt among rows that decode, and prompts that begin alike."""
import itertools
import statistics
from typing import Any

import numpy as np

from tpllm.bench.batching import count
from tpllm.bench.serving import Served, Watch, inter_token, percentiles
from tpllm.bench.workload import Item, MixedLengths, make_workload
from tpllm.engine.engine import MAX_IN_FLIGHT
from tpllm.errors import ConfigError
from tpllm.llm import LLM

ROW_PROMPT = 16  # of the rows that decode while the long prompt comes
SETTLING = 2  # of each row's deliveries do not count
NUM_UNDISTURBED = 24  # of them count before the prompt comes, or half of a row's room


def measure_long_prompt(llm: LLM, prompt_len: int, *, num_runs: int, seed: int = 0) -> dict[str, Any]:
    """Inter-token times of rows that decode, undisturbed and while a long prompt is computed, and its time to first token beside that of running
    alone. JSON-able.

    Args:
        llm: warmed up; all its slots but one decode.
        prompt_len: tokens of the long prompt.
        num_runs: whose medians count.
        seed: chooses the tokens.

    Raises:
        ConfigError: the context is too short for the prompt, or for the rows to go on beside it.
    """
    if prompt_len + 2 > llm.shapes.max_model_len:
        raise ConfigError(f"--long-prompt is {prompt_len}; a row holds {llm.shapes.max_model_len}, so give at most {llm.shapes.max_model_len - 2}")
    rng, runs = np.random.default_rng([seed, prompt_len]), []

    def item(length: int, output_len: int) -> Item:
        return Item(rng.integers(0, llm.config.vocab_size, length).tolist(), output_len)
    for _ in range(num_runs + 1):
        runs.append(_run_long_prompt(llm, item(prompt_len, 2), item(prompt_len, 2),
                                     [item(ROW_PROMPT, llm.shapes.max_model_len - ROW_PROMPT) for _ in range(llm.shapes.max_num_seqs - 1)]))
    runs = runs[1:]  # the first has shown the engine how long its programs take
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name != "num_spans"}
    return {"prompt_len": prompt_len, "num_rows": llm.shapes.max_num_seqs - 1, "num_runs": num_runs, "medians": medians, "runs": runs}


def _run_long_prompt(llm: LLM, alone: Item, among: Item, rows: list[Item]) -> dict[str, float]:
    llm.reset_prefix_cache()
    engine = llm.engine
    ttft_alone, watch = _ttft_alone(llm, alone), Watch(engine)
    requests = [watch.add(row) for row in rows]
    watch.run_until(lambda: all(len(watch.of(row).deliveries) >= SETTLING for row in requests))
    settled = max(watch.of(row).deliveries[-1][0] for row in requests)
    watch.run_until(lambda: all(len(watch.of(row).deliveries) >= SETTLING + NUM_UNDISTURBED for row in requests)
                    or any(2 * len(row.output.outputs[0].token_ids) > row.params.max_tokens for row in requests))
    long = watch.add(among)
    watch.run_until(lambda: bool(watch.of(long).deliveries))
    first = watch.now
    watch.run_until(lambda: all(watch.of(row).deliveries[-1][0] > first for row in requests))
    is_cut = any(row.is_finished for row in requests)
    for one in (*requests, long):
        engine.abort(one)
    for _ in range(MAX_IN_FLIGHT):
        engine.step()
    if is_cut:
        raise ConfigError(f"the rows beside the long prompt ended before it was computed; give a shorter one than {len(among.prompt_token_ids)}")
    return _compare([watch.of(row) for row in requests], settled=settled, long=watch.of(long), ttft_alone=ttft_alone)


def _compare(rows: list[Served], *, settled: float, long: Served, ttft_alone: float) -> dict[str, Any]:
    first, spans = long.arrival + long.ttft, [span for row in rows for span in row.spans]
    parts = {"undisturbed": [span for span in spans if span[0] >= settled and span[1] <= long.arrival],
             "disturbed": [span for span in spans if span[0] < first and span[1] > long.arrival]}
    numbers: dict[str, Any] = {"ttft_s": long.ttft, "ttft_alone_s": ttft_alone, "ttft_ratio": long.ttft / ttft_alone,
                               "num_spans": {part: len(found) for part, found in parts.items()}}
    for name, values in (("inter_token", inter_token), ("delivery_gap", lambda spans: [now - before for before, now, _ in spans])):
        for part, found in parts.items():
            numbers[f"{name}_{part}_p99_s"] = percentiles(values(found))["p99"]
        numbers[f"{name}_p99_ratio"] = numbers[f"{name}_disturbed_p99_s"] / numbers[f"{name}_undisturbed_p99_s"]
    return numbers


def measure_shared_prefix(llm: LLM, prefix_len: int, *, num_requests: int, suffix_len: int, num_runs: int, seed: int = 0) -> dict[str, Any]:
    """Prefill work that a shared prefix saves, and the time to first token of prompts that find it beside those that do not. JSON-able.

    Args:
        llm: warmed up.
        prefix_len, suffix_len: tokens that all prompts share, and that each has of its own.
        num_requests: that come at once, to count the work.
        num_runs: hits and misses, one at a time, whose medians count.
        seed: chooses the tokens.
    """
    engine, scheduler = llm.engine, llm.engine.scheduler

    def prompts(number: int, seed: int) -> list[Item]:
        lengths = MixedLengths(number, seed, prompt_lens=(suffix_len, suffix_len), output_lens=(2, 2), shared_prefix_len=prefix_len)
        return make_workload(llm.config.vocab_size, lengths)
    llm.reset_prefix_cache()
    before, reused, context = count(engine), scheduler.num_reused_tokens, scheduler.num_context_tokens
    watch = Watch(engine)
    for item in prompts(num_requests, seed):
        watch.add(item)
    watch.run_until(lambda: False)
    num_prefilled = count(engine)["num_prefilled_tokens"] - before["num_prefilled_tokens"]
    num_prompt_tokens = num_requests * (prefix_len + suffix_len)
    numbers = itertools.count(seed + 1)
    misses, hits = [], []
    for _ in range(num_runs):
        first, second = prompts(2, next(numbers))
        misses.append(_ttft_alone(llm, first))
        hits.append(_ttft_alone(llm, second))
    miss, hit = statistics.median(misses), statistics.median(hits)
    return {"prefix_len": prefix_len, "suffix_len": suffix_len, "num_requests": num_requests, "num_prompt_tokens": num_prompt_tokens,
            "num_prefilled_tokens": num_prefilled, "prefill_work_saved": 1 - num_prefilled / num_prompt_tokens,
            "hit_rate": (scheduler.num_reused_tokens - reused) / (scheduler.num_context_tokens - context), "ttft_miss_s": miss, "ttft_hit_s": hit,
            "ttft_ratio": hit / miss, "num_runs": num_runs, "ttft_misses_s": misses, "ttft_hits_s": hits}


def _ttft_alone(llm: LLM, item: Item) -> float:
    watch = Watch(llm.engine)
    request = watch.add(item)
    watch.run_until(lambda: request.is_finished)
    return watch.of(request).ttft
