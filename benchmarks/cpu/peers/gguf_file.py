"""GGUF files of random weights for llama.cpp: a Llama of any shape, written tensor by tensor, then quantized by llama.cpp itself.

Every matrix of a file has one type, the embedding and the output head too; norm weights are float32. Such a file has no vocabulary, only its size.
"""
import ctypes
import math
import pathlib
from collections.abc import Iterator

import gguf
import llama_cpp
import numpy as np

from benchmarks.cpu.peers.llama_cpp_model import show_only_errors
from tpllm.errors import ConfigError
from tpllm.model.config import ModelConfig

FTYPES = {"F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
          **{name: getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}") for name in ("Q4_K_M", "Q5_K_M", "Q6_K")}}
BYTES_PER_WEIGHT = {"F16": 2.0, "Q8_0": 34 / 32, "Q4_0": 18 / 32, "Q4_K_M": 0.61, "Q5_K_M": 0.71, "Q6_K": 210 / 256}
MIXED = ("Q4_K_M", "Q5_K_M")
"""Of which the quantizer keeps some matrices larger."""


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape, [out, in] or [D], of every tensor, in the order they are written."""
    D, F = config.hidden_size, config.intermediate_size
    NH, KH = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "token_embd.weight", (config.vocab_size, D)
    yield "output_norm.weight", (D,)
    if not config.ties_embeddings:
        yield "output.weight", (config.vocab_size, D)
    for layer in range(config.num_layers):
        for name, shape in (("attn_norm", (D,)), ("attn_q", (NH, D)), ("attn_k", (KH, D)), ("attn_v", (KH, D)), ("attn_output", (D, NH)),
                            ("ffn_norm", (D,)), ("ffn_gate", (F, D)), ("ffn_up", (F, D)), ("ffn_down", (D, F))):
            yield f"blk.{layer}.{name}.weight", shape


def num_weights(config: ModelConfig) -> int:
    """How many numbers the tensors hold."""
    return sum(math.prod(shape) for _, shape in tensor_shapes(config))


def file_bytes(config: ModelConfig, weight_type: str) -> int:
    """About how large a file of the type is."""
    return round(sum(math.prod(shape) * (BYTES_PER_WEIGHT[weight_type] if len(shape) == 2 else 4) for _, shape in tensor_shapes(config)))


def write_f16(path: pathlib.Path, config: ModelConfig) -> None:
    """Random weights of standard deviation 1/sqrt(inputs), norm weights of 1. One tensor is in memory at a time.

    Raises:
        ConfigError: the shape has what a plain Llama has not.
    """
    _check_plain(config)
    writer = gguf.GGUFWriter(path, "llama")
    _add_sizes(writer, config)
    shapes = dict(tensor_shapes(config))
    for name, shape in shapes.items():
        dtype = np.dtype(np.float16 if len(shape) == 2 else np.float32)
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for shape in shapes.values():
        writer.write_tensor_data(_random_matrix(rng, shape) if len(shape) == 2 else np.ones(shape, np.float32))
    writer.close()


def quantize(source: pathlib.Path, target: pathlib.Path, weight_type: str) -> None:
    """Write an F16 file once more, with every matrix in the given type, or in the types that it mixes.

    Raises:
        ConfigError: llama.cpp could not.
    """
    show_only_errors()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure = FTYPES[weight_type], weight_type not in MIXED
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise ConfigError(f"llama.cpp could not write {target} as {weight_type} (error {code}); give another folder with TMPDIR, or another shape")


def check_types(path: pathlib.Path, config: ModelConfig, weight_type: str) -> None:
    """Read a file's tensors back: their names, their shapes, and the type of every matrix.

    Raises:
        ConfigError: one differs.
    """
    found = {tensor.name: (tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name) for tensor in gguf.GGUFReader(path).tensors}
    wanted = {name: (shape, weight_type if len(shape) == 2 else "F32") for name, shape in tensor_shapes(config)}
    if found != wanted:
        name = next(name for name in (*wanted, *found) if found.get(name) != wanted.get(name))
        raise ConfigError(f"{path.name}: {name} is {found.get(name)}, not {wanted.get(name)}; this build of llama.cpp quantizes in another way")


def _check_plain(config: ModelConfig) -> None:
    extras = {"rope.kind": config.rope.kind != "default", "layer_windows": any(config.layer_windows), "has_qkv_bias": config.has_qkv_bias,
              "has_output_bias": config.has_output_bias, "has_mlp_bias": config.has_mlp_bias, "has_qk_norm": config.has_qk_norm}
    if found := [name for name, is_present in extras.items() if is_present]:
        raise ConfigError(f"the shape has {', '.join(found)}, which these files cannot hold; take a plain Llama, such as tinyllama-1.1b")


def _add_sizes(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_file_type(FTYPES["F16"])
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _random_matrix(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    matrix = np.empty(shape, np.float16)
    for row in matrix:
        row[:] = rng.standard_normal(row.shape, np.float32) * (1 / math.sqrt(shape[-1]))
    return matrix
