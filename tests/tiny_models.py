"""Tiny models of every family and rope kind: their config.json, their weights from a seed, and greedy decoding through the cache.

What makes golden files, what checks them and what compares with transformers all read the models from here.
"""
import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding_rules import TENSOR, Rules, make_mesh
from sharding_rules.axes import KV_HEADS, VOCAB
from tpllm.families.registry import find_family
from tpllm.model.config import ModelConfig
from tpllm.model.decoder import forward
from tpllm.model.kv_cache import init_cache
from tpllm.model.params import DecoderParams, map_specs, named_leaves, param_specs
from tpllm.model.partition import fit_to_mesh

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TRAINED_CONTEXT = 32
ROPE = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 3.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": TRAINED_CONTEXT},
    "yarn": {"factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5, "original_max_position_embeddings": TRAINED_CONTEXT},
}
SIZES = {"vocab_size": 203, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": TRAINED_CONTEXT, "hidden_act": "silu", "rms_norm_eps": 1e-5,
         "tie_word_embeddings": False}
FAMILY_FIELDS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
    "qwen3": {"attention_bias": True, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 2, "head_dim": 12},
}


def config_json(family: str, rope: str = "default", *, writer: int = 5, rope_fields: Mapping[str, Any] | None = None,
                **sizes) -> dict[str, Any]:
    """The config.json of a tiny model.

    Args:
        family, rope: keys of ``ARCHITECTURES`` and ``ROPE``.
        writer: the major version of transformers whose way of writing rope is used: 4 or 5.
        rope_fields: more fields of the rope rule.
        **sizes: fields that differ from ``SIZES`` and ``FAMILY_FIELDS``.
    """
    scaling, theta = {"rope_type": rope, **ROPE[rope], **(rope_fields or {})}, 100.0
    if writer == 5:
        rope_json = {"rope_parameters": {"rope_theta": theta, **scaling}}
    else:
        rope_json = {"rope_theta": theta, "rope_scaling": None if rope == "default" else scaling}
    extended = {"max_position_embeddings": 4 * TRAINED_CONTEXT} if rope in ("llama3", "yarn") else {}
    return {"architectures": [ARCHITECTURES[family]], "model_type": family, **SIZES, **FAMILY_FIELDS[family], **extended, **rope_json, **sizes}


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """One model of a list of cases.

    Attributes:
        name: in test ids and file names.
        hf: its config.json.
        seed: of its weights and prompt.
        prompt_len: tokens of its prompt.
    """

    name: str
    hf: Mapping[str, Any]
    seed: int = 0
    prompt_len: int = 41

    @property
    def config(self) -> ModelConfig:
        """The model without a mesh."""
        return find_family(self.hf).config_from_hf(self.hf)

    def prompt(self) -> list[int]:
        """Random token ids."""
        return (_raw_bits(self.seed, "prompt", self.prompt_len) % np.uint64(self.hf["vocab_size"])).tolist()

    def weights(self) -> dict[str, np.ndarray]:
        """Every tensor of the checkpoint by its name there, float32: matrices of std 0.2, biases of std 0.12, norms 1 +- 0.2."""
        checkpoint_name = find_family(self.hf).checkpoint_name
        return {checkpoint_name(name): _uniform(self.seed, checkpoint_name(name), spec.shape)
                for name, spec in named_leaves(param_specs(self.config))}

    def checksum(self) -> int:
        """CRC-32 of all weights: what a golden file says it was made with."""
        return functools.reduce(lambda crc, name_array: zlib.crc32(name_array[1].tobytes(), crc), sorted(self.weights().items()), 0)

    def on_mesh(self, tp: int, rules: Rules = TENSOR) -> tuple[DecoderParams, ModelConfig]:
        """Its parameters, placed, and its configuration, fitted to ``tp`` devices."""
        config = fit_to_mesh(self.config, make_mesh({"tp": tp}), rules)
        return place(self.weights(), config, find_family(self.hf).checkpoint_name), config


def place(weights: Mapping[str, np.ndarray], config: ModelConfig, checkpoint_name) -> DecoderParams:
    """Parameters for a fitted ``config`` from a checkpoint's tensors. Padding of the vocabulary is NaN, so that any use of it shows."""
    def one(name, spec):
        array = weights[checkpoint_name(name)]
        if spec.axes[0] == KV_HEADS:
            heads = array.reshape(config.num_kv_heads, config.head_dim, *array.shape[1:])
            array = np.repeat(heads, config.kv_repeat, axis=0).reshape(spec.shape)
        if spec.axes[0] == VOCAB:
            padding = np.full((spec.shape[0] - array.shape[0], array.shape[1]), np.nan, array.dtype)
            array = np.concatenate([array, padding])
        return jax.device_put(array, config.partition and config.partition.sharding(spec.axes, shape=spec.shape, name=name))
    return map_specs(one, param_specs(config))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def step(params, tokens_BT, positions_BT, cache, config, rows_B=None, prompt_lens_B=None):
    """``forward`` to logits, compiled once for each model, mesh and shape."""
    return forward(params, tokens_BT, positions_BT, cache, config, rows_B=rows_B, prompt_lens_B=prompt_lens_B)


def cached_greedy(params: DecoderParams, config: ModelConfig, prompt: list[int], *, num_steps: int,
                  prefill_chunk: int, decode_width: int = 1) -> tuple[np.ndarray, list[int]]:
    """Greedy decoding as the engine does it: the prompt in chunks into row 1 of a cache of two rows, then token by token.

    Args:
        params, config: the model on its mesh.
        prompt: token ids.
        num_steps: how many tokens to choose.
        prefill_chunk: tokens of one prefill call; the last is padded.
        decode_width: tokens of one decode call; all but the first are padding.

    Returns:
        (logits [len(prompt), V] without the padding of the vocabulary, the chosen tokens).
    """
    length = -(-(len(prompt) + num_steps) // 16) * 16 + max(prefill_chunk, decode_width)
    cache = init_cache(config, 2, length)
    prompt_lens = jnp.full(1, len(prompt), jnp.int32)

    def run(tokens, start, width, cache):
        tokens_1T, positions_1T = np.zeros((1, width), np.int32), np.full((1, width), -1, np.int32)
        tokens_1T[0, :len(tokens)], positions_1T[0, :len(tokens)] = tokens, np.arange(start, start + len(tokens))
        logits, cache = step(params, tokens_1T, positions_1T, cache, config, rows_B=np.ones(1, np.int32), prompt_lens_B=prompt_lens)
        return np.asarray(logits)[0, :len(tokens)], cache

    prompt_logits = []
    for start in range(0, len(prompt), prefill_chunk):
        logits, cache = run(prompt[start:start + prefill_chunk], start, prefill_chunk, cache)
        prompt_logits.append(logits)
    tokens = []
    for position in range(len(prompt), len(prompt) + num_steps):
        tokens.append(int(logits[-1].argmax()))
        logits, cache = run(tokens[-1:], position, decode_width, cache)
    return np.concatenate(prompt_logits)[:, :config.vocab_size], tokens


def _raw_bits(seed: int, name: str, count: int) -> np.ndarray:
    """uint64 straight from the bit generator: the one stream numpy promises never to change."""
    return np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(count) >> np.uint64(40)


def _uniform(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    unit = _raw_bits(seed, name, int(np.prod(shape))).astype(np.float64) / 2**23 - 1
    std = 0.2 if len(shape) == 2 else 0.12
    values = 1 + 0.2 * unit if name.endswith("norm.weight") else std * np.sqrt(3) * unit
    return values.astype(np.float32).reshape(shape)


_HEADS = (
    {"num_attention_heads": 8, "num_key_value_heads": 2},  # repeated at tp 4 and 8
    {"num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 131},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 130, "hidden_size": 42},  # repeated at tp 2, replicated attention at 4 and 8
    {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 256},
    {"num_attention_heads": 5, "num_key_value_heads": 1, "vocab_size": 97},  # attention replicated wherever tp > 1
)
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def _matrix() -> tuple[TinyModel, ...]:
    """Every family with every rope kind; heads, activation, tying, window and the config's writer change from one to the next."""
    models = []
    for f, family in enumerate(ARCHITECTURES):
        for r, rope in enumerate(ROPE):
            sizes = {**_HEADS[(2 * f + r) % 5], "hidden_act": _ACTIVATIONS[(f + r) % 4], "tie_word_embeddings": (f + r) % 3 == 0}
            if family == "qwen3" and r % 2:
                sizes |= {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
            if family in ("llama", "qwen3") and r == 2:
                sizes |= {"attention_bias": False}
            models.append(TinyModel(f"{family}-{rope}", config_json(family, rope, writer=4 + (f + r) % 2, **sizes)))
    return tuple(models)


MODELS = (
    *_matrix(),
    TinyModel("llama-yarn-attention-factor", config_json("llama", "yarn", rope_fields={"attention_factor": 1.3, "truncate": False})),
    TinyModel("qwen2-yarn-mscale", config_json("qwen2", "yarn", rope_fields={"mscale": 0.7, "mscale_all_dim": 1.2})),
    TinyModel("mistral-head-dim-of-hidden", config_json("mistral", head_dim=None, sliding_window=None, hidden_size=48)),
    TinyModel("llama-short-prompt-grows-past-context", config_json("llama", "dynamic"), prompt_len=9),
)
GOLDEN = tuple(model for model in MODELS if model.name in {
    "llama-default", "llama-dynamic", "llama-llama3", "llama-yarn", "mistral-default", "mistral-linear", "mistral-yarn", "qwen2-default",
    "qwen2-dynamic", "qwen2-llama3", "qwen3-linear", "qwen3-yarn"})
GOLDEN_FOLDER = pathlib.Path(__file__).parent / "golden"
NUM_STEPS = 64
LEAST_GAP = 1e-3  # a seed whose two best logits ever come closer decides nothing about tokens
LEAST_DISTINCT = 8  # nor does one that soon repeats itself
