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

from pallas_kernels.page_table import one_page_a_row
from sharding_rules import TENSOR, Rules, make_mesh
from sharding_rules.axes import KV_HEADS, VOCAB
from tests.support.checkpoint_files import tensor_shapes
from tpllm.families.family import Family
from tpllm.families.registry import find_family
from tpllm.model.config import ALL_LAYERS, ModelConfig
from tpllm.model.decoder import forward
from tpllm.model.kv_cache import init_cache
from tpllm.model.params import DecoderParams, map_specs, param_specs
from tpllm.model.partition import fit_to_mesh

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Of the families that are compared with every kind of rope."""
MORE_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM", "phi3": "Phi3ForCausalLM", "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM", "smollm3": "SmolLM3ForCausalLM", "starcoder2": "Starcoder2ForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen2moe": "Qwen2MoeForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM",
    "gpt-oss": "GptOssForCausalLM"}
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
    "gemma": {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma2": {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 9, "query_pre_attn_scalar": 11,
               "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "head_dim": 12},
    "gemma3": {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 9,
               "sliding_window_pattern": 3, "query_pre_attn_scalar": 11, "num_hidden_layers": 3, "rope_theta": 1000.0, "rope_local_base_freq": 50.0,
               "attention_bias": True},
    "phi3": {"original_max_position_embeddings": TRAINED_CONTEXT, "hidden_size": 64, "sliding_window": 15, "pad_token_id": 0},
    "olmo2": {"attention_bias": True, "vocab_size": 97},
    "granite": {"attention_bias": True, "mlp_bias": True, "embedding_multiplier": 12.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4,
                "logits_scaling": 3.0},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layer_interval": 2, "mlp_bias": True, "tie_word_embeddings": True,
                "pad_token_id": 0},
    "starcoder2": {"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-3, "sliding_window": 13, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2moe": {"model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
                 "shared_expert_intermediate_size": 40, "norm_topk_prob": False, "use_sliding_window": False},
    "qwen3moe": {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
                 "use_sliding_window": False, "num_hidden_layers": 3, "mlp_only_layers": [1], "head_dim": 12},
    "gpt-oss": {"model_type": "gpt_oss", "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 7, "swiglu_limit": 0.7,
                "num_hidden_layers": 3, "head_dim": 12},
}


def config_json(family: str, rope: str = "default", *, writer: int = 5, rope_fields: Mapping[str, Any] | None = None,
                **sizes) -> dict[str, Any]:
    """The config.json of a tiny model.

    Args:
        family, rope: keys of ``FAMILY_FIELDS`` and ``ROPE``.
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
    architectures = {**ARCHITECTURES, **MORE_ARCHITECTURES}
    return {"architectures": [architectures[family]], "model_type": family, **SIZES, **FAMILY_FIELDS[family], **extended, **rope_json, **sizes}


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
        """Every tensor of the checkpoint by its name there, float32: matrices of std 0.2, biases of std 0.12, norms that scale by 1 +- 0.2."""
        shapes = tensor_shapes(find_family(self.hf), self.config)
        return {name: _uniform(self.seed, name, shape, 1 - self.config.norm_offset) for name, shape in shapes.items()}

    def checksum(self) -> int:
        """CRC-32 of all weights: what a golden file says it was made with."""
        return functools.reduce(lambda crc, name_array: zlib.crc32(name_array[1].tobytes(), crc), sorted(self.weights().items()), 0)

    def on_mesh(self, tp: int, rules: Rules = TENSOR, **axes: int) -> tuple[DecoderParams, ModelConfig]:
        """Its parameters, placed, and its configuration, fitted to ``tp`` devices, or to a mesh of more axes."""
        config = fit_to_mesh(self.config, make_mesh({"tp": tp, **axes}), rules)
        return place(self.weights(), config, find_family(self.hf)), config


def place(weights: Mapping[str, np.ndarray], config: ModelConfig, family: Family) -> DecoderParams:
    """Parameters for a fitted ``config`` from a checkpoint's tensors. Padding is NaN, so that any use of it shows."""
    def one(name, spec):
        if spec.stack is not None:
            array, columns = np.full(spec.shape, np.nan, np.float32), family.columns_of(name)
            if columns is None:
                of_experts = [weights[each] for each in family.checkpoint_names(name, spec.stack)]
            else:
                of_experts = [expert.T[columns.first::columns.every] for expert in weights[family.checkpoint_name(name)]]
            for stored, expert, start, stop in spec.stack.runs(0, spec.shape[0]):
                array[stored:stored + stop - start] = of_experts[expert][start:stop]
            return jax.device_put(array, config.partition and config.partition.sharding(spec.axes, shape=spec.shape, name=name))
        array, fused = weights[family.checkpoint_name(name)], family.row_range(name, config)
        array = array if fused is None else array[fused[0]:fused[1]]
        if spec.axes[0] == KV_HEADS:
            heads = array.reshape(config.num_kv_heads, config.head_dim, *array.shape[1:])
            array = np.repeat(heads, config.kv_repeat, axis=0).reshape(spec.shape)
        if spec.axes[0] == VOCAB:
            padding = np.full((spec.shape[0] - array.shape[0], array.shape[1]), np.nan, array.dtype)
            array = np.concatenate([array, padding])
        return jax.device_put(array, config.partition and config.partition.sharding(spec.axes, shape=spec.shape, name=name))
    return map_specs(one, param_specs(config))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def step(params, tokens_BT, positions_BT, cache, config, table=None, prompt_lens=None):
    """``forward`` to logits, compiled once for each model, mesh and shape."""
    return forward(params, tokens_BT, positions_BT, cache, config, tables=table and {ALL_LAYERS: table}, prompt_lens=prompt_lens)


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
    prompt_lens, table = jnp.full(1, len(prompt), jnp.int32), one_page_a_row(2, jnp.ones(1, jnp.int32))

    def run(tokens, start, width, cache):
        tokens_1T, positions_1T = np.zeros((1, width), np.int32), np.full((1, width), -1, np.int32)
        tokens_1T[0, :len(tokens)], positions_1T[0, :len(tokens)] = tokens, np.arange(start, start + len(tokens))
        logits, cache = step(params, tokens_1T, positions_1T, cache, config, table=table, prompt_lens=prompt_lens)
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


def _uniform(seed: int, name: str, shape: tuple[int, ...], norm_mean: float) -> np.ndarray:
    unit = _raw_bits(seed, name, int(np.prod(shape))).astype(np.float64) / 2**23 - 1
    std = 0.2 if len(shape) == 2 else 0.12
    values = norm_mean + 0.2 * unit if name.endswith("norm.weight") else std * np.sqrt(3) * unit
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


def _longrope(num_pairs: int, **fields) -> dict[str, Any]:
    return {"rope_type": "longrope", "short_factor": [1 + 0.1 * i for i in range(num_pairs)], "long_factor": [2 + 1.3 * i for i in range(num_pairs)],
            "rope_theta": 100.0, **fields}


def _more() -> tuple[TinyModel, ...]:
    """The families with features of their own, in as many ways as they have."""
    extended = {"max_position_embeddings": 4 * TRAINED_CONTEXT}
    gemma3 = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0},
              "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}
    models = {
        "gemma-default": config_json("gemma"),
        "gemma2-default": config_json("gemma2"),
        "gemma2-layer-types": config_json("gemma2", num_hidden_layers=3, attention_bias=True,
                                          layer_types=["full_attention"] * 2 + ["sliding_attention"]),
        "gemma3-default": config_json("gemma3", rope_parameters=None),
        "gemma3-linear": config_json("gemma3", rope_parameters=gemma3, attn_logit_softcapping=4.0, final_logit_softcapping=3.0),
        "phi3-default": config_json("phi3", sliding_window=None, max_position_embeddings=TRAINED_CONTEXT),
        "phi3-longrope": config_json("phi3", rope_parameters=_longrope(4), **extended),
        "phi3-partial": config_json("phi3", rope_parameters=_longrope(3, partial_rotary_factor=0.75), tie_word_embeddings=True, **extended),
        "olmo2-default": config_json("olmo2"),
        "olmo2-kv-heads": config_json("olmo2", "yarn", num_key_value_heads=8, attention_bias=False),
        "granite-default": config_json("granite"),
        "smollm3-default": config_json("smollm3"),
        "smollm3-windows": config_json("smollm3", no_rope_layers=[0, 1, 1], use_sliding_window=True, sliding_window=7, attention_bias=True),
        "starcoder2-default": config_json("starcoder2"),
        "mixtral-default": config_json("mixtral"),
        "qwen2moe-default": config_json("qwen2moe"),
        "qwen2moe-every-other-layer": config_json("qwen2moe", num_hidden_layers=3, decoder_sparse_step=2, norm_topk_prob=True),
        "qwen3moe-default": config_json("qwen3moe"),
        "gpt-oss-default": config_json("gpt-oss"),
        "gpt-oss-yarn": config_json("gpt-oss", "yarn", rope_fields={"truncate": False}, swiglu_limit=7.0, intermediate_size=64, hidden_size=64),
        "gpt-oss-no-attention-bias": config_json("gpt-oss", attention_bias=False, num_key_value_heads=8, num_experts_per_tok=1,
                                                 layer_types=["full_attention", "sliding_attention", "full_attention"]),
        "starcoder2-no-bias": config_json("starcoder2", use_bias=False, sliding_window=None, num_key_value_heads=1),
    }
    short = TinyModel("phi3-short-prompt-grows-past-context", config_json("phi3", rope_parameters=_longrope(4), **extended), prompt_len=9)
    return *(TinyModel(name, hf) for name, hf in models.items()), short


MODELS = (
    *_matrix(),
    TinyModel("llama-yarn-attention-factor", config_json("llama", "yarn", rope_fields={"attention_factor": 1.3, "truncate": False})),
    TinyModel("qwen2-yarn-mscale", config_json("qwen2", "yarn", rope_fields={"mscale": 0.7, "mscale_all_dim": 1.2})),
    TinyModel("mistral-head-dim-of-hidden", config_json("mistral", head_dim=None, sliding_window=None, hidden_size=48)),
    TinyModel("llama-short-prompt-grows-past-context", config_json("llama", "dynamic"), prompt_len=9),
    *_more(),
)
GOLDEN = tuple(model for model in MODELS if model.name in {
    "llama-default", "llama-dynamic", "llama-llama3", "llama-yarn", "mistral-default", "mistral-linear", "mistral-yarn", "qwen2-default",
    "qwen2-dynamic", "qwen2-llama3", "qwen3-linear", "qwen3-yarn", "gemma-default", "gemma2-default", "gemma3-linear", "phi3-default",
    "phi3-partial", "phi3-short-prompt-grows-past-context", "olmo2-default", "granite-default", "smollm3-default", "starcoder2-default",
    "mixtral-default", "qwen2moe-default", "qwen3moe-default", "gpt-oss-yarn"})
GOLDEN_FOLDER = pathlib.Path(__file__).parents[1] / "golden"
NUM_STEPS = 64
LEAST_GAP = 1e-3  # a seed whose two best logits ever come closer decides nothing about tokens
LEAST_DISTINCT = 8  # nor does one that soon repeats itself
