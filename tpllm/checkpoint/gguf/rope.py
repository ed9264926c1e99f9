"""The rope rule of a GGUF file as config.json writes it.

Llama 3's rule is stored as its result, a factor for each pair of dims (``rope_freqs.weight``); the rule is found again from them.
"""
import math
from typing import Any

import numpy as np

from tpllm.checkpoint.convert import STORED
from tpllm.checkpoint.gguf.header import GgufFile
from tpllm.checkpoint.gguf.metadata import MAX_COUNT, count, count_or_none, needed_count, number
from tpllm.checkpoint.safetensors import open_regular, read_exactly
from tpllm.errors import CheckpointError

FACTOR_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
"""No parameter is read from them."""
MAX_FACTORS = 2**16
TOLERANCE = 1e-4


def rope_fields(gguf: GgufFile, head_dim: int) -> dict[str, Any]:
    """``rope_theta``, ``rope_scaling`` and what goes with them.

    Raises:
        CheckpointError: a kind of scaling that is not known, or factors that do not follow Llama 3's rule.
    """
    theta = number(gguf, "rope.freq_base", 10000.0)
    rotated = count(gguf, "rope.dimension_count", head_dim)
    if theta < 1:
        raise CheckpointError(f"{gguf.path}: {gguf.arch}.rope.freq_base is {theta}; it must be at least 1. Convert the model again")
    fields: dict[str, Any] = {"rope_theta": theta} | ({"partial_rotary_factor": rotated / head_dim} if rotated != head_dim else {})
    if "rope_factors_long.weight" in gguf.tensors:
        return fields | _longrope(gguf)
    if "rope_freqs.weight" in gguf.tensors:
        factors = read_factors(gguf, "rope_freqs.weight")
        return fields if (factors == 1).all() else fields | {"rope_scaling": _llama3(gguf, factors, theta, rotated)}
    return fields | _scaling(gguf)


def read_factors(gguf: GgufFile, name: str) -> np.ndarray:
    """float64 of a small vector: one factor for each pair of rotated dims.

    Raises:
        CheckpointError: not a vector of plain floats above 0, or too long.
    """
    tensor = gguf.tensors[name]
    size = math.prod(tensor.shape)
    if tensor.type.dtype not in STORED or size > MAX_FACTORS:
        raise CheckpointError(f"{tensor.path}: tensor {name!r} is {tensor.type.name} of shape {tensor.shape}; it must be plain floats, at most "
                              f"{MAX_FACTORS}. Convert the model again")
    with open_regular(tensor.path) as file:
        raw = read_exactly(file, start=tensor.start, num_bytes=tensor.num_bytes)
    factors = np.frombuffer(raw, STORED[tensor.type.dtype]).astype(np.float64)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise CheckpointError(f"{tensor.path}: tensor {name!r} holds values that are not above 0. Convert the model again")
    return factors


def llama3_factors(rule: dict[str, Any], theta: float, dim: int) -> np.ndarray:
    """float64 [dim / 2]: what Llama 3.1's rule divides each frequency by (transformers' ``_compute_llama3_parameters``)."""
    turns = rule["original_max_position_embeddings"] / (2 * math.pi) / theta ** (np.arange(0, dim, 2) / dim)
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / rule["factor"] + smooth)


def _llama3(gguf: GgufFile, factors: np.ndarray, theta: float, dim: int) -> dict[str, Any]:
    rules = [{"rope_type": "llama3", "factor": float(str(np.float32(factors.max()))), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}]
    rules += _fitted(factors, theta, dim)
    for rule in rules:
        if len(factors) == dim // 2 and np.allclose(llama3_factors(rule, theta, dim), factors, rtol=TOLERANCE, atol=0):
            return rule
    raise CheckpointError(f"{gguf.path}: the {len(factors)} factors of rope_freqs.weight follow no rule of Llama 3's kind for {dim} rotated dims; "
                          "other factors are not supported")


def _fitted(factors: np.ndarray, theta: float, dim: int) -> list[dict[str, Any]]:
    """The rule by the dims between its two bounds, where ``smooth`` is linear in the turns of the old context. Rules that differ by one
    scale of context and bounds are the same; ``low_freq_factor`` 1 picks one."""
    factor = float(factors.max())
    between = (factors > 1 + TOLERANCE) & (factors < factor * (1 - TOLERANCE))
    if len(factors) != dim // 2 or between.sum() < 2:
        return []
    smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    frequencies = theta ** -(np.arange(0, dim, 2)[between] / dim) / (2 * math.pi)
    centered = frequencies - frequencies.mean()
    slope = float(centered @ smooth) / (float(centered @ centered) or math.inf)
    offset = float(smooth.mean()) - slope * float(frequencies.mean())
    high = 1 - 1 / min(offset, -1e-9)
    if offset >= 0 or slope <= 0 or not 1 < high < 1e6 or slope * high > MAX_COUNT:
        return []
    return [{"rope_type": "llama3", "factor": float(str(np.float32(factor))), "low_freq_factor": 1.0, "high_freq_factor": high,
             "original_max_position_embeddings": max(1, round(slope * (high - 1)))}]


def _longrope(gguf: GgufFile) -> dict[str, Any]:
    """Phi-3's two sets of factors (LongRoPE: Ding et al. 2024, arXiv:2402.13753)."""
    if "rope_factors_short.weight" not in gguf.tensors:
        raise CheckpointError(f"{gguf.path}: tensor 'rope_factors_short.weight' is missing beside rope_factors_long.weight. Convert the model again")
    long, short = (read_factors(gguf, f"rope_factors_{kind}.weight").tolist() for kind in ("long", "short"))
    scaling = {"rope_type": "longrope", "type": "longrope", "long_factor": long, "short_factor": short}
    if attention_factor := number(gguf, "rope.scaling.attn_factor"):
        scaling["attention_factor"] = attention_factor
    original = count_or_none(gguf, "rope.scaling.original_context_length") or needed_count(gguf, "context_length")
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _scaling(gguf: GgufFile) -> dict[str, Any]:
    """The kinds that have numbers only."""
    kind = gguf.get(f"{gguf.arch}.rope.scaling.type", str)
    factor = number(gguf, "rope.scaling.factor") or number(gguf, "rope.scale_linear") or 1.0
    kind = kind or ("none" if factor == 1 else "linear")
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(f"{gguf.path}: {gguf.arch}.rope.scaling.type is {kind!r}; known: none, linear, yarn, and longrope with its tensors")
    if kind == "none" or factor == 1:
        return {}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling |= {ours: value for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow"))
                    if (value := number(gguf, f"rope.scaling.{theirs}"))}
        scaling |= {"original_max_position_embeddings": original} if (original := count_or_none(gguf, "rope.scaling.original_context_length")) else {}
        more = number(gguf, "rope.scaling.yarn_attn_factor") or number(gguf, "rope.scaling.attn_factor") or 1.0
        # ggml multiplies what the file has by YaRN's own factor; config.json has the product (Peng et al. 2023, arXiv:2309.00071, eq. 22).
        scaling |= {"attention_factor": more * (0.1 * math.log(factor) + 1)} if more != 1 else {}
    return {"rope_scaling": scaling}
