"""Tasks of the worker that runs transformers: the same shape with random weights, a static cache, and torch.compile."""
import inspect
import time
from typing import Any

import torch
import transformers

from benchmarks.gpu.torch_worker import device, wait
from tpllm.bench.shapes import find_shape

_KEPT: dict[str, Any] = {}


def open_model(shape: str, batch_sizes: list[int], prompt_len: int, output_len: int, is_compiled: bool) -> dict[str, Any]:
    """Make the model and its compiled step, and run it once at each number of rows, which compiles; seconds of each part."""
    config, began = find_shape(shape), time.perf_counter()
    hf_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, head_dim=config.head_dim,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, intermediate_size=config.intermediate_size,
        max_position_embeddings=max(config.max_position, prompt_len + output_len), rms_norm_eps=config.norm_eps, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0)
    with device():
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    wait(None)
    _KEPT["model"], _KEPT["step"] = model, torch.compile(_step, mode="reduce-overhead", fullgraph=True, dynamic=False) if is_compiled else _step
    seconds = {"open_s": time.perf_counter() - began}
    for batch_size in batch_sizes:
        began = time.perf_counter()
        decode(batch_size, prompt_len, output_len, 1)
        seconds[f"first_run_s_of_{batch_size}"] = time.perf_counter() - began
    return {**seconds, "attention": model.config._attn_implementation, "transformers": transformers.__version__,
            "step": "torch.compile(mode='reduce-overhead', fullgraph=True)" if is_compiled else "not compiled: tiny"}


def _step(model: Any, tokens: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
    """The next token of each row."""
    logits = model(tokens, **_places(model, positions), **{_cache_name(model): cache}, use_cache=True, return_dict=False, logits_to_keep=1)[0]
    return logits[:, -1:].argmax(-1)


def _cache_name(model: Any) -> str:
    """What this version calls the cache."""
    return "past_key_values" if "past_key_values" in inspect.signature(model.forward).parameters else "cache"


def _places(model: Any, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {"position_ids": positions[None]}
    if "cache_position" in inspect.signature(model.forward).parameters:
        named["cache_position"] = positions
    return named


@torch.inference_mode()
def decode(batch_size: int, prompt_len: int, output_len: int, num_runs: int) -> dict[str, Any]:
    """Prefill random tokens, then decode greedily; medians are the caller's."""
    runs = [_time_run(batch_size, prompt_len, output_len) for _ in range(num_runs)]
    return {"batch_size": batch_size, "prompt_len": prompt_len, "output_len": output_len, "runs_s": runs}


def _time_run(batch_size: int, prompt_len: int, output_len: int) -> dict[str, float]:
    model, step = _KEPT["model"], _KEPT["step"]
    ids = torch.randint(0, model.config.vocab_size, (batch_size, prompt_len), device=device())
    cache = _KEPT.setdefault(f"cache {batch_size}", transformers.StaticCache(config=model.config, max_cache_len=prompt_len + output_len))
    cache.reset()
    wait(None)
    began = time.perf_counter()
    token = _step(model, ids, torch.arange(prompt_len, device=device()), cache)
    token.tolist()
    ttft_s = time.perf_counter() - began
    position = torch.full((1,), prompt_len, device=device())
    began = time.perf_counter()
    for _ in range(output_len - 1):
        token = step(model, token, position, cache).clone()  # a CUDA graph writes its result over the last one
        position = position + 1
    token.tolist()
    return {"ttft_s": ttft_s, "step_s": (time.perf_counter() - began) / (output_len - 1)}
