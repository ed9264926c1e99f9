"""Small GGUF files: written with the gguf package as llama.cpp's converter writes them, and quantized by llama.cpp itself.

``write_gguf(path, hf_config, type="Q4_K_M")`` is all that most tests need; it needs the oracle extra.
"""
import ctypes
import json
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

ARCHS = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
         "MixtralForCausalLM": "llama", "Qwen2MoeForCausalLM": "qwen2moe", "Qwen3MoeForCausalLM": "qwen3moe",
         "GemmaForCausalLM": "gemma", "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3", "Phi3ForCausalLM": "phi3",
         "GptOssForCausalLM": "gpt-oss"}
HF_LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": False}
"""Rows of 256, so that K-quants fit."""
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
         **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"}, **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
         **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
         "mlp.gate": "ffn_gate_inp", "mlp.router": "ffn_gate_inp",
         "block_sparse_moe.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
         **{f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")}}
LAYER |= {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up", "pre_feedforward_layernorm": "ffn_norm",
          "post_feedforward_layernorm": "post_ffw_norm"}
SANDWICH = {"post_attention_layernorm": "post_attention_norm"}
"""In Gemma 2 and 3 it follows attention, and does not go before the MLP."""
KEYS = {"sliding_window": "attention.sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping"}
"""Of Gemma's config.json: the key."""
EXPERT = re.compile(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.\d+\.(\w+)\.weight")
EXPERT_PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


def write_gguf(path: pathlib.Path, hf: Mapping[str, Any] | pathlib.Path = HF_LLAMA, type: str = "F16", *, seed: int = 0,  # noqa: A002
               metadata: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """A GGUF file of a Llama, Mistral, Qwen2 or Qwen3.

    Args:
        path: of the file.
        hf: a config.json, for random weights; or a folder with config.json, model.safetensors and, if there is one, a byte-level tokenizer.json.
        type: of the matrices: ``"F32"``, ``"F16"``, ``"BF16"``, or what llama.cpp's quantizer makes of F16, such as ``"Q4_K_M"``; ``"MXFP4"`` of
            experts, the others being float32.
        seed: of random weights.
        metadata: more keys without the architecture's prefix: text, int, float or bool.

    Returns:
        Hugging Face name -> float32 weight before quantization.
    """
    folder = hf if isinstance(hf, pathlib.Path) else None
    config = json.loads((folder / "config.json").read_text()) if folder else hf
    weights = _read_weights(folder) if folder else random_weights(config, seed)
    tokenizer = json.loads((folder / "tokenizer.json").read_text()) if folder and (folder / "tokenizer.json").exists() else None
    is_plain = type in ("F32", "F16", "BF16", "MXFP4")
    plain = path if is_plain else path.with_suffix(".f16.gguf")
    _write_plain(plain, config, weights, type if is_plain else "F16", tokenizer, metadata or {})
    if not is_plain:
        quantize(plain, path, type)
        plain.unlink()
    return weights


def random_weights(hf: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Normal weights of a config.json's model; norms about 1."""
    from tests.support.checkpoint_files import tensor_shapes
    from tpllm.families.registry import find_family

    family, rng = find_family(hf), np.random.default_rng(seed)
    return {name: (rng.normal(size=shape) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5) + ("norm" in name)).astype(np.float32)
            for name, shape in tensor_shapes(family, family.config_from_hf(hf)).items()}


def _stacked(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One tensor [E, N, K] for the experts of a layer, under the first one's name."""
    found: dict[str, Any] = {}
    for name, weight in weights.items():
        match = EXPERT.fullmatch(name)
        found.setdefault(name if match is None else f"{match[1]}.experts.{match[2]}.weight", []).append(weight)
    return {name: np.stack(parts) if ".experts." in name else parts[0] for name, parts in found.items()}


def _of_gpt_oss(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By GGUF's names: gate and up apart, rows as rows."""
    found = {}
    for name, weight in weights.items():
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        experts, _, kind = part.removeprefix("mlp.experts.").partition("_proj")
        kind = "bias" if kind == "_bias" else "weight"
        if part == "self_attn.sinks":
            found[f"blk.{layer}.attn_sinks.weight"] = weight
        elif part.startswith("mlp.experts."):
            rows = weight if kind == "bias" else weight.swapaxes(1, 2)
            parts = {"gate": rows[:, ::2], "up": rows[:, 1::2]} if experts == "gate_up" else {"down": rows}
            found |= {f"blk.{layer}.ffn_{one}_exps.{kind}": part for one, part in parts.items()}
        else:
            found[gguf_tensor_name(name, "gpt-oss")] = weight
    return found


def gguf_tensor_name(name: str, arch: str = "llama") -> str:
    """The GGUF name of a Hugging Face tensor, or of a stack of experts."""
    stem, _, kind = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    if module.startswith("experts."):
        return f"blk.{layer}.ffn_{EXPERT_PARTS[module.removeprefix('experts.')]}_exps.{kind}"
    return f"blk.{layer}.{(LAYER | SANDWICH if arch in ('gemma2', 'gemma3', 'gpt-oss') else LAYER)[module]}.{kind}"


def alternate_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head as llama.cpp's converter lays them for the architecture ``llama``."""
    return weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def quantize(source: pathlib.Path, target: pathlib.Path, type: str) -> None:  # noqa: A002
    """llama.cpp's own quantizer; the type's name is that of its ``LLAMA_FTYPE_MOSTLY_*``."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type}"), 1
    silence(llama_cpp)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source} to {type}")


def silence(llama_cpp) -> None:
    """No log of llama.cpp's on the terminal."""
    global _callback
    _callback = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept, since llama.cpp goes on calling it
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))


def _read_weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    import ml_dtypes  # noqa: F401  (safetensors knows bfloat16 by it)
    from safetensors.numpy import load_file

    return {name: tensor.astype(np.float32) for name, tensor in load_file(folder / "model.safetensors").items()}


def _write_plain(path: pathlib.Path, hf: Mapping[str, Any], weights: Mapping[str, np.ndarray], dtype: str, tokenizer: Mapping[str, Any] | None,
                 metadata: Mapping[str, Any]) -> None:
    import gguf

    arch = ARCHS[hf["architectures"][0]]
    writer = gguf.GGUFWriter(path, arch)
    add_config(writer, hf)
    if arch.startswith("gemma"):
        metadata = {key: hf[field] for field, key in KEYS.items() if field in hf} | metadata
    add_byte_level_tokenizer(writer, tokenizer) if tokenizer else writer.add_tokenizer_model("none")
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    for key, value in metadata.items():
        add[type(value)](f"{arch}.{key}", value)
    if arch == "gpt-oss":
        writer.add_expert_feed_forward_length(hf["intermediate_size"])
        writer.add_sliding_window(hf["sliding_window"])
        for name, weight in _of_gpt_oss(weights).items():
            is_expert, is_matrix = weight.ndim == 3, weight.ndim == 2 and name.endswith("weight") and "gate_inp" not in name
            kind = gguf.GGMLQuantizationType[dtype if is_expert or (is_matrix and dtype != "MXFP4") else "F32"]
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
        weights = {}
    for name, weight in _stacked(weights).items():
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if arch == "llama" and part in name:
                weight = alternate_halves(weight, hf[heads])
        weight = weight[0] if weight.shape[0] == 1 else weight  # the gate of a shared expert
        kind = gguf.GGMLQuantizationType[dtype if weight.ndim > 1 and "gate_inp" not in gguf_tensor_name(name) else "F32"]
        weight = weight + 1 if arch.startswith("gemma") and "norm" in name else weight
        writer.add_tensor(gguf_tensor_name(name, arch), gguf.quants.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_config(writer, hf: Mapping[str, Any]) -> None:
    """The keys that every Llama-like model has."""
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(float((hf.get("rope_parameters") or hf).get("rope_theta", 10000.0)))
    writer.add_vocab_size(hf["vocab_size"])
    if num_experts := hf.get("num_local_experts") or hf.get("num_experts"):
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(hf["num_experts_per_tok"])
        for add, field in ((writer.add_expert_feed_forward_length, "moe_intermediate_size"),
                           (writer.add_expert_shared_feed_forward_length, "shared_expert_intermediate_size")):
            if field in hf:
                add(hf[field])


def add_byte_level_tokenizer(writer, tokenizer: Mapping[str, Any], *, pre: str = "gpt-2", bos: int | None = 0, eos: int | None = 1,
                             add_bos: bool | None = True) -> None:
    """A tokenizer.json with byte-level BPE; added tokens that are not special become user-defined ones."""
    import gguf

    vocabulary = dict(tokenizer["model"]["vocab"])
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    vocabulary |= {text: token["id"] for text, token in added.items()}
    texts = sorted(vocabulary, key=vocabulary.get)
    kinds = [gguf.TokenType.NORMAL if text not in added else gguf.TokenType.CONTROL if added[text]["special"] else gguf.TokenType.USER_DEFINED
             for text in texts]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]])
    for add, value in ((writer.add_bos_token_id, bos), (writer.add_eos_token_id, eos), (writer.add_add_bos_token, add_bos)):
        if value is not None:
            add(value)


def write_vocabulary(path: pathlib.Path, add, *, arch: str = "llama") -> pathlib.Path:
    """A file with a tokenizer only; ``add`` is given the writer."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_sentencepiece(writer, pieces: list[tuple[str, float, int]], **keys: bool) -> None:
    """SentencePiece's BPE: (text, score, kind) of each token; keys such as ``add_space_prefix=False``."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    for name, token_id in (("unk", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{name}_token_id")(token_id)
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)


def raw_gguf(metadata: bytes = b"", table: bytes = b"", data: bytes = b"", *, num_keys: int = 0, num_tensors: int = 0, version: int = 3,
             magic: bytes = b"GGUF", alignment: int = 32) -> bytes:
    """A file from its parts, for damage that no writer makes."""
    header = magic + struct.pack("<IQQ", version, num_tensors, num_keys) + metadata + table
    return header + bytes(-len(header) % alignment) + data


def raw_text(text: str | bytes) -> bytes:
    """A text as GGUF has it."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def raw_key(key: str, kind: int, value: bytes) -> bytes:
    """A key and the bytes of its value."""
    return raw_text(key) + struct.pack("<I", kind) + value


def raw_tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A line of the table; dims in ggml's order, the row's length first."""
    return raw_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw_metadata(values: Mapping[str, Any]) -> bytes:
    """Keys with text, bool, int (uint32), float (float32), or a list of one of these (of int: int32)."""
    return b"".join(raw_key(key, *_raw_value(value)) for key, value in values.items())


def _raw_value(value: Any) -> tuple[int, bytes]:
    if isinstance(value, list):
        kind, items = (_raw_value(value[0])[0] if value else 8), [_raw_value(item)[1] for item in value]
        return 9, struct.pack("<IQ", 5 if kind == 4 else kind, len(value)) + b"".join(items)
    if isinstance(value, str):
        return 8, raw_text(value)
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    return (4, struct.pack("<I", value)) if isinstance(value, int) else (6, struct.pack("<f", value))


def raw_model(metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, alignment: int = 32) -> bytes:
    """A whole file of float32 tensors."""
    table, data = b"", b""
    for name, values in tensors.items():
        table += raw_tensor(name, values.shape[::-1], 0, len(data))
        data += values.astype("<f4").tobytes() + bytes(-values.nbytes % alignment)
    return raw_gguf(raw_metadata(metadata), table, data, num_keys=len(metadata), num_tensors=len(tensors), alignment=alignment)
