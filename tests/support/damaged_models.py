"""Tiny models of six families whose config.json, GGUF file or safetensors header is damaged, and everything that is done with a model's files before
a device computes. Functions of a module of its own, so that a process of its own can call them."""
import functools
import json
import math
import pathlib
import random
from collections.abc import Callable, Iterator

import numpy as np
from safetensors.numpy import save

from tests.support.gguf_files import random_weights, raw_model
from tests.support.mutations import byte_mutation, mutation, near
from tests.support.tiny_models import config_json
from tpllm.checkpoint.entries import find_entries
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import load_params
from tpllm.loading import stored_dtype
from tpllm.model.params import named_leaves
from tpllm.tokenizer.gguf import defaults_from_gguf, tokenizer_from_gguf

FAMILIES = ("llama", "mistral", "qwen2", "gemma3", "phi3", "mixtral")
ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 40, "num_attention_heads": 4, "head_dim": 8,
             "layer_types": None}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 100.0}
MORE = {"phi3": {"rope_parameters": LONGROPE}, "gemma3": {"rope_parameters": None, "num_key_value_heads": 1},
        "mistral": {"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}}}
FILES = {"config": "config.json", "safetensors": "model.safetensors"}
KINDS = (*FILES, "gguf")
ODD_METADATA = (0, 1, 7, 2**31 - 1, 2**32 - 1, 0.0, 1e-38, 3e38, math.nan, math.inf, -1.0, "", "x", True, False, [0], [1.5], ["a"], ["a b", "", " "],
                [1] * 3000)
MOST_EACH = 1_000_000
"""Numbers of mutations that a family has to itself."""
Case = tuple[str, bytes]


def described(family: str) -> dict:
    """The config.json of a family's tiny model."""
    hf = config_json(family, **ONE_LAYER, eos_token_id=3, bos_token_id=1, dtype="float32", architectures_of=None, **MORE.get(family, {}))
    return {key: value for key, value in hf.items() if key not in ("architectures_of", "layer_types")}


@functools.cache
def files(family: str) -> tuple[bytes, bytes]:
    """(config.json, model.safetensors)."""
    hf = described(family)
    weights = random_weights(hf)
    return json.dumps(hf).encode(), save(weights, {"format": "pt"})


@functools.cache
def gguf_file(family: str) -> tuple[bytes, int]:
    """(a GGUF file of the same sizes, the bytes of its header)."""
    metadata, tensors = _gguf_parts(family)
    data = raw_model(metadata, tensors)
    return data, len(data) - sum(values.nbytes + -values.nbytes % 32 for values in tensors.values())


@functools.cache
def _gguf_parts(family: str) -> tuple[dict, dict[str, np.ndarray]]:
    """(metadata, tensors)."""
    arch = {"mistral": "qwen3", "mixtral": "gpt-oss"}.get(family, family)
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32, "attention.head_count": 4,
               "attention.head_count_kv": 2, "attention.key_length": 8, "attention.value_length": 8, "attention.layer_norm_rms_epsilon": 1e-5,
               "rope.freq_base": 10000.0, "attention.sliding_window": 16, "expert_count": 0, "expert_used_count": 0}
    if arch == "gpt-oss":
        numbers |= {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 32}
    tokens = ["<unk>", "<s>", "</s>", *(chr(33 + i) for i in range(36)), "!\""]
    vocabulary = {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "token_type": [3] * 3 + [1] * 37, "merges": ["! \""], "bos_token_id": 1,
                  "eos_token_id": 2}
    metadata = {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in numbers.items()},
                **{f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}, "tokenizer.chat_template": "{{ messages }}"}
    return metadata, {name: np.ones(shape, np.float32) for name, shape in _gguf_shapes(arch).items()}


def _gguf_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    shapes = {"token_embd": (40, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,)}
    qkv = {"attn_q": 32, "attn_k": 16, "attn_v": 16}
    shapes |= {"blk.0.attn_qkv": (64, 32)} if arch == "phi3" else {f"blk.0.{name}": (rows, 32) for name, rows in qkv.items()}
    biases = {f"blk.0.{name}.bias": (rows,) for name, rows in qkv.items()} if arch in ("qwen2", "gpt-oss") else {}
    if arch == "phi3":
        shapes |= {"blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 32)}
    elif arch == "gpt-oss":
        shapes |= {f"blk.0.ffn_{part}_exps": (2, 32, 32) for part in ("gate", "up", "down")} | {"blk.0.ffn_gate_inp": (2, 32)}
        shapes |= {"blk.0.attn_sinks": (4,)}
        shapes = {name.replace("ffn_norm", "post_attention_norm"): shape for name, shape in shapes.items()}
        biases |= {f"blk.0.ffn_{part}_exps.bias": (2, 32) for part in ("gate", "up", "down")} | {
            "blk.0.ffn_gate_inp.bias": (2,), "blk.0.attn_output.bias": (32,)}
    else:
        shapes |= {f"blk.0.ffn_{part}": (32, 32) for part in ("gate", "up", "down")}
    norms = {"qwen3": ("attn_q_norm", "attn_k_norm"), "gemma3": ("attn_q_norm", "attn_k_norm")}.get(arch, ())
    shapes |= {f"blk.0.{name}": (8,) for name in norms} | ({f"blk.0.{name}": (32,) for name in ("post_attention_norm", "post_ffw_norm")}
                                                            if arch == "gemma3" else {})
    return {f"{name}.weight": shape for name, shape in shapes.items()} | biases


def cases(kind: str, num_each: int, *, first: int = 0) -> Iterator[Case]:
    """``num_each`` damaged files of each family; a label begins with the family's name."""
    for number, family in enumerate(FAMILIES):
        for seed in range(number * MOST_EACH + first, number * MOST_EACH + first + num_each):
            label, data = _damaged(kind, family, seed)
            yield f"{family} {label}", family.encode().ljust(16) + data


def whole(kind: str) -> Iterator[Case]:
    """The files before they are damaged."""
    for family in FAMILIES:
        data = files(family)[0] if kind == "config" else files(family)[1] if kind == "safetensors" else gguf_file(family)[0]
        yield f"{family} whole", family.encode().ljust(16) + data


def _damaged(kind: str, family: str, seed: int) -> Case:
    config, weights = files(family)
    if kind == "config":
        return mutation(config, seed)
    if kind == "gguf" and random.Random(seed).random() < 0.5:
        return _with_odd_values(family, seed)
    if kind == "gguf":
        data, length = gguf_file(family)
        label, header = byte_mutation(data[:length], seed)
        return label, header + data[length:]
    length = 8 + int.from_bytes(weights[:8], "little")
    if random.Random(seed).random() < 0.5:
        label, header = byte_mutation(weights[:length], seed)
    else:
        label, text = mutation(weights[8:length], seed)
        header = len(text).to_bytes(8, "little") + text
    return label, header + weights[length:]


def _with_odd_values(family: str, seed: int) -> Case:
    """A GGUF file whole in its form, with one to three values of metadata that are others, of another type, or left out."""
    rng, (metadata, tensors) = random.Random(seed), _gguf_parts(family)
    metadata, keys = dict(metadata), rng.sample(sorted(metadata), rng.randint(1, 3))
    for key in keys:
        metadata[key] = rng.choice((near(metadata[key], rng), rng.choice(ODD_METADATA)))
        if metadata[key] == [] or rng.random() < 0.2:
            del metadata[key]
    return f"{seed}: other values of {', '.join(keys)}", raw_model(metadata, tensors)


def loader(kind: str, folder: pathlib.Path) -> Callable[[bytes], None]:
    """What loads one case in ``folder``."""
    return functools.partial(_load, kind, folder)


def _load(kind: str, folder: pathlib.Path, case: bytes) -> None:
    family, data = case[:16].decode().strip(), case[16:]
    path = folder / kind / family
    if kind == "gguf":
        path.mkdir(parents=True, exist_ok=True)
        (path / "model.gguf").write_bytes(data)
        use(path / "model.gguf")
        return
    if not path.exists():
        path.mkdir(parents=True)
        for name, content in zip(FILES.values(), files(family), strict=True):
            (path / name).write_bytes(content)
    (path / FILES[kind]).write_bytes(data)
    use(path)


def use(path: pathlib.Path) -> None:
    """Everything up to the first program: the configuration, where each parameter lies, its values."""
    checkpoint = open_checkpoint(path)
    stored_dtype(checkpoint.hf_config, checkpoint.tensors)
    entries = find_entries(checkpoint, checkpoint.config)
    for _, array in named_leaves(load_params(checkpoint, checkpoint.config, dtype=np.float32, entries=entries)):
        array.block_until_ready()
    checkpoint.fingerprint()
    if checkpoint.gguf is not None:
        tokenizer = tokenizer_from_gguf(checkpoint.gguf)
        tokenizer.decode(tokenizer.encode("! ab"))
        tokenizer.encode_chat([{"role": "user", "content": "ab"}])
        defaults_from_gguf(checkpoint.gguf)
