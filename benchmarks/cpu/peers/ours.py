"""tpllm's side: an engine over random weights of a shape, and its turns, through the public ``generate``."""
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from benchmarks.cpu.peers.cells import PAUSE_S, Cell
from sharding_rules import DATA_TENSOR, make_mesh
from tpllm import LLM, SamplingParams
from tpllm.bench.shapes import llm_of_shape
from tpllm.bench.timing import Workload
from tpllm.bench.traffic import decode_traffic
from tpllm.checkpoint.entries import find_entries
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import load_params, stored_schemes
from tpllm.environment.compile_cache import enable_compile_cache
from tpllm.errors import ConfigError, TpllmError
from tpllm.model.partition import fit_to_mesh
from tpllm.weights.storage import Storage

LONG_PROMPT = 1024


def open_ours(shape: str = "", quantization: str | None = None, *, path: str | None = None, context_len: int, num_seqs: int) -> LLM:
    """Our side on one CPU device, computed in bfloat16: random weights of a shape, or a GGUF file's.

    Args:
        shape, quantization: as for ``llm_of_shape``; None leaves the weights in bfloat16.
        path: the file, which may have no vocabulary; then there is neither shape nor quantization.
        context_len: tokens of a row, prompt and completion.
        num_seqs: rows.
    """
    if path is not None:
        checkpoint = open_checkpoint(path)
        config = fit_to_mesh(checkpoint.config, make_mesh({"tp": 1}), DATA_TENSOR)
        enable_compile_cache()
        storage = Storage.on(config.partition, np.dtype(jnp.bfloat16), stored=stored_schemes(find_entries(checkpoint, config), config))
        params = load_params(checkpoint, config, dtype=jnp.bfloat16, storage=storage)
        return LLM.from_params(config, params, max_model_len=context_len, max_num_seqs=num_seqs)
    return llm_of_shape(shape, mesh="tp=1", dtype="bfloat16", quantization=quantization, max_model_len=context_len, max_num_seqs=num_seqs)


def our_turns(cell: Cell, llm: LLM, rng: np.random.Generator) -> Callable[[], dict[str, float]]:
    """A function that takes one turn of ours. All is compiled, and a short prompt has shown the engine how long a step takes."""
    lengths = {"batch_size": cell.num_rows, "prompt_len": cell.prompt_len, "output_len": cell.num_steps + 1}
    llm.warm_up()
    workload = Workload(llm.config.vocab_size, **lengths)
    Workload(llm.config.vocab_size, **{**lengths, "prompt_len": min(16, cell.prompt_len)}).time_run(llm)
    if not cell.num_steps:
        return lambda: _time_prefill(llm, cell.prompt_len, rng)
    if cell.prompt_len >= LONG_PROMPT:
        return lambda: _time_long_decode(llm, cell, rng)
    traffic = decode_traffic(llm.config, llm.params, kv_dtype=llm.fingerprint()["kv_cache_dtype"], **lengths)

    def run_ours() -> dict[str, float]:
        time.sleep(PAUSE_S)
        run = workload.time_run(llm)
        speed = workload.speeds([run]).decode_tokens_per_s
        if speed is None:
            raise ConfigError(f"{cell.num_steps} decode steps are too short to measure; raise --decode-steps")
        return {"prefill_s": run.short, "tokens_per_s": speed, "decode_bytes_per_s": traffic.bytes_per_token * speed}
    return run_ours


def _time_long_decode(llm: LLM, cell: Cell, rng: np.random.Generator) -> dict[str, float]:
    """Of one row from its first token on: a second prefill to take off would be longer than the decoding, and its noise as large."""
    prompt = {"prompt_token_ids": rng.integers(0, llm.config.vocab_size, cell.prompt_len).tolist()}
    params = SamplingParams(temperature=0, max_tokens=cell.num_steps + 1, ignore_eos=True)
    time.sleep(PAUSE_S)
    [output] = llm.generate([prompt], params, use_tqdm=False)
    if len(output.outputs[0].token_ids) != cell.num_steps + 1:
        raise TpllmError(f"a row gave {len(output.outputs[0].token_ids)} of {cell.num_steps + 1} tokens: {output.outputs[0].error}")
    times = output.metrics
    traffic = decode_traffic(llm.config, llm.params, kv_dtype=llm.fingerprint()["kv_cache_dtype"], batch_size=1, prompt_len=cell.prompt_len,
                             output_len=cell.num_steps + 1)
    speed = cell.num_steps / (times.finished_time - times.first_token_time)
    return {"prefill_s": times.first_token_time - times.arrival_time, "tokens_per_s": speed, "decode_bytes_per_s": traffic.bytes_per_token * speed}


def _time_prefill(llm: LLM, prompt_len: int, rng: np.random.Generator) -> dict[str, float]:
    prompt = {"prompt_token_ids": rng.integers(0, llm.config.vocab_size, prompt_len).tolist()}
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    time.sleep(PAUSE_S)
    start = time.perf_counter()
    [output] = llm.generate([prompt], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    if len(output.outputs[0].token_ids) != 1:
        raise TpllmError(f"the prefill gave no token: {output.outputs[0].error or output.outputs[0].finish_reason}")
    return {"prefill_s": seconds, "tokens_per_s": prompt_len / seconds}
