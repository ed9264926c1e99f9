"""A GGUF file's metadata as the config.json that the model had (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "LLM")."""
import collections
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tpllm.checkpoint.gguf.header import GgufFile
from tpllm.checkpoint.gguf.metadata import count, count_or_none, is_zero, needed, needed_count, number, number_or_none, same_in_every_layer
from tpllm.checkpoint.gguf.rope import rope_fields
from tpllm.errors import CheckpointError, log

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EMBEDDING, NORM_EPS = "token_embd.weight", "attention.layer_norm_rms_epsilon"
TOKEN_IDS = ("bos", "eos", "padding")


def config_from_gguf(gguf: GgufFile) -> dict[str, Any]:
    """The fields of config.json, as transformers 4 writes them. What the file leaves out is what llama.cpp takes then, and a null where it is none.

    Raises:
        CheckpointError: an architecture that is not known, or a key that is missing or has a value that cannot be.
    """
    if gguf.arch not in ARCHITECTURES:
        raise CheckpointError(f"{gguf.path}: general.architecture is {gguf.arch!r}, which is not known; known: {', '.join(ARCHITECTURES)}")
    if EMBEDDING not in gguf.tensors or len(gguf.tensors[EMBEDDING].shape) != 2:
        raise CheckpointError(f"{gguf.path}: tensor {EMBEDDING!r} is missing or no matrix; a vocabulary without a model cannot be run")
    (name, model_type, more), hidden_size = ARCHITECTURES[gguf.arch], needed_count(gguf, "embedding_length")
    num_heads, head_dim = _heads(gguf, hidden_size)
    fields = {
        "architectures": [name], "model_type": model_type, "vocab_size": gguf.tensors[EMBEDDING].shape[0],
        "hidden_size": hidden_size, "num_hidden_layers": _num_layers(gguf), "num_attention_heads": num_heads,
        "num_key_value_heads": same_in_every_layer(gguf, "attention.head_count_kv") or num_heads, "head_dim": head_dim,
        "intermediate_size": _inner_size(gguf), "max_position_embeddings": needed_count(gguf, "context_length"),
        "rms_norm_eps": needed(gguf, number(gguf, NORM_EPS), NORM_EPS), "hidden_act": "silu", "torch_dtype": _dtype(gguf),
        "tie_word_embeddings": "output.weight" not in gguf.tensors, **_token_ids(gguf), **rope_fields(gguf, head_dim)}
    fields |= more(gguf, fields)
    return {**fields, "intermediate_size": needed(gguf, fields["intermediate_size"], "feed_forward_length")}


def _heads(gguf: GgufFile, hidden_size: int) -> tuple[int, int]:
    """(query heads, head dim)."""
    num_heads = needed(gguf, same_in_every_layer(gguf, "attention.head_count"), "attention.head_count")
    head_dim = count(gguf, "attention.key_length", max(1, hidden_size // num_heads))
    if (value_dim := count(gguf, "attention.value_length", head_dim)) != head_dim:
        raise CheckpointError(f"{gguf.path}: {gguf.arch}.attention.value_length is {value_dim} and key_length {head_dim}; they must be equal")
    return num_heads, head_dim


def _inner_size(gguf: GgufFile) -> int | None:
    """The inner size of a plain MLP; None where there is none, as beside experts."""
    return None if is_zero(gguf.metadata.get(f"{gguf.arch}.feed_forward_length")) else same_in_every_layer(gguf, "feed_forward_length")


def _num_layers(gguf: GgufFile) -> int:
    """No more than there are tensors: a layer costs memory here before anything is read of it."""
    num_layers = needed_count(gguf, "block_count")
    if num_layers > len(gguf.tensors):
        raise CheckpointError(f"{gguf.path}: {gguf.arch}.block_count is {num_layers}; the file has {len(gguf.tensors)} tensors. Convert it again")
    return num_layers


def _dtype(gguf: GgufFile) -> str:
    """The dtype of the matrices that are not quantized; bfloat16 where all are."""
    kinds = collections.Counter(tensor.type.name for tensor in gguf.tensors.values() if len(tensor.shape) > 1)
    return DTYPES.get(kinds.most_common(1)[0][0], "bfloat16")


def _token_ids(gguf: GgufFile) -> dict[str, int]:
    found = {}
    for name in TOKEN_IDS:
        token_id = gguf.get(f"tokenizer.ggml.{name}_token_id", int)
        if token_id is not None and 0 <= token_id < gguf.tensors[EMBEDDING].shape[0]:
            found[f"{'pad' if name == 'padding' else name}_token_id"] = token_id
        elif token_id is not None:
            log.warning("%s: tokenizer.ggml.%s_token_id is %d, outside of the vocabulary; it is not used", gguf.path, name, token_id)
    return found


def _llama(gguf: GgufFile, _: Mapping[str, Any]) -> dict[str, Any]:
    window = count_or_none(gguf, "attention.sliding_window")
    if experts := count_or_none(gguf, "expert_count"):
        return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": experts,
                "num_experts_per_tok": needed_count(gguf, "expert_used_count"), "sliding_window": window}
    if window:
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return {"attention_bias": "blk.0.attn_q.bias" in gguf.tensors, "mlp_bias": "blk.0.ffn_down.bias" in gguf.tensors}


def _qwen2(gguf: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    window = count_or_none(gguf, "attention.sliding_window")
    return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {"use_sliding_window": False}


def _qwen3(gguf: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in gguf.tensors, **_qwen2(gguf, fields)}


def _qwen_moe(gguf: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    is_third = gguf.arch == "qwen3moe"
    used, dense = needed_count(gguf, "expert_used_count"), fields["intermediate_size"]
    inner = count_or_none(gguf, "expert_feed_forward_length") or (dense and max(1, dense // used)) or needed_count(gguf, "feed_forward_length")
    more = {"num_experts": needed_count(gguf, "expert_count"), "num_experts_per_tok": used, "moe_intermediate_size": inner,
            "intermediate_size": dense or inner, "norm_topk_prob": is_third, "decoder_sparse_step": 1, "mlp_only_layers": []}
    shared = {} if is_third else {"shared_expert_intermediate_size":
                                  count_or_none(gguf, "expert_shared_feed_forward_length") or _shared_rows(gguf) or dense or inner}
    return {**(_qwen3 if is_third else _qwen2)(gguf, fields), **more, **shared}


def _shared_rows(gguf: GgufFile) -> int | None:
    tensor = gguf.tensors.get("blk.0.ffn_up_shexp.weight")
    return tensor.shape[0] if tensor else None


def _gemma(gguf: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}


def _gemma2(gguf: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**_gemma(gguf, fields), **_windows(gguf, fields, every=2, largest=46),
            "attn_logit_softcapping": number_or_none(gguf, "attn_logit_softcapping", 50.0),
            "final_logit_softcapping": number_or_none(gguf, "final_logit_softcapping", 30.0)}


def _gemma3(gguf: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without a window every layer is a full one, with the rope of those."""
    windows = _windows(gguf, fields, every=6, largest=62)
    if windows["sliding_window"] is None:
        windows["layer_types"] = ["full_attention"] * len(windows["layer_types"])
    return {**_gemma(gguf, fields), **windows,
            "rope_local_base_freq": number_or_none(gguf, "rope.freq_base_swa", 10000.0) or 10000.0,
            "final_logit_softcapping": number_or_none(gguf, "final_logit_softcapping")}


def _windows(gguf: GgufFile, fields: Mapping[str, Any], *, every: int, largest: int) -> dict[str, Any]:
    """The window, in all layers but each ``every``-th; and the divisor of scores, which is the head dim in all but the largest model."""
    num_layers, window = fields["num_hidden_layers"], count_or_none(gguf, "attention.sliding_window", 4096 if every == 2 else None)
    pattern = gguf.get(f"{gguf.arch}.attention.sliding_window_pattern", (int, np.ndarray))
    every = pattern if isinstance(pattern, int) and pattern > 0 else every
    is_local = [(i + 1) % every != 0 for i in range(num_layers)]
    if isinstance(pattern, np.ndarray) and len(pattern) == num_layers:
        is_local = [bool(item) for item in pattern]
    scale = fields["hidden_size"] // fields["num_attention_heads"] if num_layers == largest else fields["head_dim"]
    return {"sliding_window": window, "query_pre_attn_scalar": scale,
            "layer_types": ["sliding_attention" if local else "full_attention" for local in is_local]}


def _phi3(gguf: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": count_or_none(gguf, "attention.sliding_window")}


def _gpt_oss(gguf: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The file does not say that YaRN's bounds are not rounded; the model's config.json does."""
    inner = count_or_none(gguf, "expert_feed_forward_length") or needed_count(gguf, "feed_forward_length")
    windows = _windows(gguf, fields, every=2, largest=0)
    return {"num_local_experts": needed_count(gguf, "expert_count"), "num_experts_per_tok": needed_count(gguf, "expert_used_count"),
            "intermediate_size": inner, "attention_bias": "blk.0.attn_q.bias" in gguf.tensors, "layer_types": windows["layer_types"],
            "sliding_window": count_or_none(gguf, "attention.sliding_window", 128),
            "rope_scaling": {"rope_type": "default"} if "rope_scaling" not in fields else fields["rope_scaling"] | {"truncate": False}}


ARCHITECTURES: dict[str, tuple[str, str, Callable[[GgufFile, Mapping[str, Any]], dict[str, Any]]]] = {
    "llama": ("LlamaForCausalLM", "llama", _llama), "qwen2": ("Qwen2ForCausalLM", "qwen2", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", _qwen3), "qwen2moe": ("Qwen2MoeForCausalLM", "qwen2_moe", _qwen_moe),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe", _qwen_moe), "gemma": ("GemmaForCausalLM", "gemma", _gemma),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", _gemma2), "gemma3": ("Gemma3ForCausalLM", "gemma3_text", _gemma3),
    "phi3": ("Phi3ForCausalLM", "phi3", _phi3), "gpt-oss": ("GptOssForCausalLM", "gpt_oss", _gpt_oss),
}
"""By ``general.architecture``: config.json's ``architectures`` and ``model_type``, and the fields, made of the file and the common ones, that differ
from those or go beyond them."""
