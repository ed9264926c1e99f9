"""Small checkpoints written by the safetensors package, which tpllm itself does not use."""
import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tpllm.families.family import Family
from tpllm.families.registry import find_family
from tpllm.model.config import ModelConfig
from tpllm.model.params import named_leaves, param_specs

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
          "F8_E5M2": ml_dtypes.float8_e5m2}
# Odd sizes: 8 shards need padding of the vocabulary and KV heads repeated four times; queries, keys and values have biases.
HF_CONFIG = {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 67, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
             "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}


def tensor_shapes(family: Family, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model's checkpoint by its name there."""
    shapes = {}
    for name, spec in named_leaves(param_specs(config)):
        fused, num_rows = family.row_range(name, config), spec.shape[0] if spec.stack is None else spec.stack.rows
        if (columns := family.columns_of(name)) is not None:
            shapes[family.checkpoint_name(name)] = (spec.stack.num, *spec.shape[1:], num_rows * columns.every)
            continue
        for tensor in family.checkpoint_names(name, spec.stack):
            shapes[tensor] = (num_rows if fused is None else fused[2], *spec.shape[1:])
    return shapes


def tensors_of(hf_config: dict, stored: str = "F32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of a config.json's model, by their names in the checkpoint."""
    family, rng = find_family(hf_config), np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(DTYPES[stored]) for name, shape in tensor_shapes(family, family.config_from_hf(hf_config)).items()}


def write_folder(folder: pathlib.Path, hf_config: dict, tensors: dict[str, np.ndarray], *, num_shards: int = 1) -> None:
    """A checkpoint's folder with one file, or with several and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config))
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {name: f"model-{i % num_shards + 1:05d}-of-{num_shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
