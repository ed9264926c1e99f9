"""A tiny gpt-oss in both forms that its folders have: experts in MXFP4, as it is published, and the floats that they stand for."""
import pathlib

import numpy as np

from tests.support.checkpoint_files import write_folder
from tests.support.tiny_models import TinyModel, config_json

VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}  # a shard of 4 has half a group of inputs
CONFIG = {"quant_method": "mxfp4",
          "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}
EXPERTS = ("gate_up_proj", "down_proj")


def model(**sizes) -> TinyModel:
    """The tiny model, without the experts' weights that the folders have."""
    return TinyModel("gpt-oss", config_json("gpt-oss", **(SIZES | sizes)))


def quantized_experts(tiny: TinyModel, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(blocks and scales, the floats they stand for [E, K, N]) of all experts of a model, by their names."""
    rng, stored, dense = np.random.default_rng(seed), {}, {}
    for name, weight in tiny.weights().items():
        if name.rpartition(".")[2] not in EXPERTS:
            continue
        num_experts, K, N = weight.shape
        blocks = rng.integers(0, 256, (num_experts, N, K // 32, 16)).astype(np.uint8)
        scales = rng.integers(121, 124, (num_experts, N, K // 32)).astype(np.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense[name] = unpacked(blocks, scales)
    return stored, dense


def unpacked(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [E, K, N], one code at a time."""
    values = np.array(VALUES, np.float32)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1)  # [E, N, groups, 16, 2]
    weights = values[codes].reshape(*blocks.shape[:3], 32) * (np.float32(2) ** (scales.astype(np.float32) - 127))[..., None]
    return np.ascontiguousarray(weights.reshape(*blocks.shape[:2], -1).swapaxes(1, 2))


def write_both(folder: pathlib.Path, tiny: TinyModel, dtype=np.float32) -> None:
    """``folder/mxfp4`` and ``folder/dense``."""
    stored, dense = quantized_experts(tiny)
    rest = {name: weight.astype(dtype) for name, weight in tiny.weights().items() if name not in dense}
    write_folder(folder / "mxfp4", {**tiny.hf, "quantization_config": CONFIG}, rest | stored)
    write_folder(folder / "dense", dict(tiny.hf), rest | {name: weight.astype(dtype) for name, weight in dense.items()})
