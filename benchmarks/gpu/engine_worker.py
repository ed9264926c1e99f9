"""Tasks of the worker that runs JAX: a model of random weights through the engine. One engine is open at a time."""
import contextlib
import dataclasses
import time
from typing import Any

import jax

from benchmarks.gpu.weights import device_params
from sharding_rules import DATA_TENSOR, make_mesh
from tpllm import LLM
from tpllm.bench.shapes import find_shape, random_params
from tpllm.bench.timing import RunTimes, Workload
from tpllm.bench.traffic import decode_traffic
from tpllm.engine.roofline import num_matrix_values
from tpllm.environment.memory import return_freed_memory
from tpllm.loading import choose_dtype
from tpllm.model.partition import fit_to_mesh
from tpllm.weights.policy import parse_policy
from tpllm.weights.storage import Storage

_OPEN: list[LLM] = []


def open_engine(shape: str, quantization: str | None, max_model_len: int, max_num_seqs: int, kv_cache_tokens: int) -> dict[str, Any]:
    """Make random weights and an engine over them; what they are and how long that took.

    Decode computes as many rows as are busy, so that one engine serves every batch size: at full slots the program is the same as a
    batch-invariant engine's of as many.
    """
    close_engine()
    began = time.perf_counter()
    config = fit_to_mesh(find_shape(shape), make_mesh({"tp": 1}, jax.devices()[:1]), DATA_TENSOR)
    storage = Storage.on(config.partition, choose_dtype("bfloat16", {}, config.partition), parse_policy(quantization))
    params = random_params(config, storage) if storage.is_native else device_params(config, storage)
    llm = LLM.from_params(config, params, max_model_len=max_model_len, max_num_seqs=max_num_seqs, kv_cache_tokens=kv_cache_tokens,
                          batch_invariant=False)
    _OPEN.append(llm)
    found = llm.fingerprint()
    return {"open_s": time.perf_counter() - began, "kernels": found["kernels"], "dtype": found["dtype"], "kv_cache_dtype": found["kv_cache_dtype"],
            "prefill_chunk": llm.shapes.prefill_chunk, "page_size": llm.shapes.page_size}


def decode(batch_size: int, prompt_len: int, output_len: int, num_runs: int) -> dict[str, Any]:
    """Decoding by as many rows, after a run that compiles: seconds of a step, and what it reads."""
    lengths = {"batch_size": batch_size, "prompt_len": prompt_len, "output_len": output_len}
    llm, workload = _OPEN[0], Workload(_OPEN[0].config.vocab_size, **lengths)
    first_s, runs = _run(llm, workload, num_runs)
    speeds = workload.speeds(runs)
    traffic = decode_traffic(llm.config, llm.params, kv_dtype=llm.fingerprint()["kv_cache_dtype"], **lengths)
    bytes_per_s = None if speeds.step_s is None else traffic.bytes_per_step / speeds.step_s
    return {**lengths, **dataclasses.asdict(speeds), "first_run_s": first_s, "runs_s": [dataclasses.asdict(run) for run in runs],
            "weight_bytes_read": traffic.weight_bytes_read, "kv_bytes_valid": traffic.kv_bytes_valid, "bytes_per_s": bytes_per_s}


def prefill(prompt_len: int, num_runs: int) -> dict[str, Any]:
    """A prompt alone: its time to the first token, and the operations of it that a second had."""
    llm = _OPEN[0]
    first_s, runs = _run(llm, workload := Workload(llm.config.vocab_size, batch_size=1, prompt_len=prompt_len, output_len=2), num_runs)
    speeds, config = workload.speeds(runs), llm.config
    attention = 2 * prompt_len * (prompt_len + 1) * config.num_heads * config.head_dim * config.num_layers
    flops = 2 * num_matrix_values(config) * prompt_len + attention
    return {"prompt_len": prompt_len, "ttft_s": speeds.ttft_s, "prefill_tokens_per_s": speeds.prefill_tokens_per_s, "first_run_s": first_s,
            "runs_s": [dataclasses.asdict(run) for run in runs], "flops": flops, "flops_per_s": flops * speeds.prefill_tokens_per_s / prompt_len}


def _run(llm: LLM, workload: Workload, num_runs: int) -> tuple[float, list[RunTimes]]:
    began = time.perf_counter()
    workload.time_run(llm)
    return time.perf_counter() - began, [workload.time_run(llm) for _ in range(num_runs)]


def close_engine() -> None:
    """Give the memory of the engine and of its weights back."""
    while _OPEN:
        llm = _OPEN.pop()
        leaves = jax.tree.leaves(llm.params)
        llm.close()
        for leaf in leaves:
            with contextlib.suppress(RuntimeError):
                leaf.delete()
    jax.clear_caches()
    return_freed_memory()
