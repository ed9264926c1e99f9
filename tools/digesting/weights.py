"""The part ``weights``: the values that loaded parameters stand for, of every checkpoint format, scheme and several families, on meshes."""
from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tools.digesting import hashing, tree
from tools.digesting.case import Case
from tools.digesting.engines import add_tokenizer, byte_tokenizer

MESHES = ("tp=1", "tp=2", "tp=4")
EXPERT_MESHES = (*MESHES, "ep=2,tp=2")
SIZES = {"vocab_size": 208, "hidden_size": 256, "intermediate_size": 256, "head_dim": 32}
"""Groups of 256 are whole on one device, and shards of four hold whole blocks of 32: no value depends on padding."""
EXPERTS = {"mixtral": {"num_local_experts": 4}, "qwen2moe": {"num_experts": 4, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128},
           "qwen3moe": {"num_experts": 4, "moe_intermediate_size": 128}, "gpt-oss": {"num_local_experts": 4}}
FEW = ("int8", "int4", "q4_k")
SCHEMES = ("int8", "w8a8", "llm.int8", "fp8", "fp8-e5m2", "int4", "*=int4", "int4-g64", "int4-g128", "q4_k", "*.mlp.*=int4,*.attn.*=fp8,*=none")
FAMILIES = {"llama": SCHEMES, "gemma2": SCHEMES, "mixtral": SCHEMES, "gpt-oss": SCHEMES, "phi3": FEW, "qwen2moe": FEW, "qwen3moe": FEW}
"""By the schemes that they are quantized to."""
DTYPES = ("float32", "bfloat16", "float16")
WRITTEN = ("int8", "w8a8", "fp8", "int4", "int4-g128", "*.mlp.*=int4,*=int8")
"""Schemes that the command line writes as compressed-tensors."""
GGUF_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ4_NL", "IQ4_XS",
              "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4")


def cases() -> list[Case]:
    """Of schemes by family, of checkpoint formats, and of what is written."""
    families = [Case(f"weights/{family}", functools.partial(_of_family, family)) for family in FAMILIES]
    formats = [Case(f"weights/format/{kind}", functools.partial(_of_format, kind)) for kind in tree.test_support("quantized_folders").KINDS]
    types = [Case(f"weights/gguf/{kind}", functools.partial(_of_gguf, kind)) for kind in GGUF_TYPES]
    return [*families, *formats, Case("weights/mxfp4", _of_mxfp4), *types, Case("weights/written", _of_written)]


def loaded_digests(path: pathlib.Path, meshes: Sequence[str], **options: Any) -> Iterator[tuple[str, str]]:
    """(mesh and layout, digest) of a checkpoint: as XLA has it and, where there are native kernels, as they have it. A mesh that the checkpoint does
    not fit is told, and is a digest too."""
    from sharding_rules import ShardingError
    from tpllm import load_model
    for mesh in meshes:
        for is_packed in (False, True) if tree.instruction_sets() else (False,):
            name = f"{mesh}/{'kernels' if is_packed else 'xla'}"
            try:
                _, params, _ = load_model(str(path), mesh, packed=is_packed, **options)
            except ShardingError as error:
                print(f"refused: {path.name} on {name} with {options}: {error}", file=sys.stderr)
                yield name, hashing.of_text("refused")
                continue
            yield name, hashing.of_parameters(params)


def _of_family(family: str, folder: pathlib.Path) -> dict[str, str]:
    models, files, found = tree.test_support("tiny_models"), tree.test_support("checkpoint_files"), {}
    model = models.TinyModel(family, models.config_json(family, **{**SIZES, **EXPERTS.get(family, {})}))
    files.write_folder(folder, dict(model.hf), model.weights())
    add_tokenizer(folder)
    meshes = EXPERT_MESHES if family in EXPERTS else MESHES
    for dtype in DTYPES:
        found |= {f"{dtype}/{name}": value for name, value in loaded_digests(folder, meshes, dtype=dtype)}
    for scheme in FAMILIES[family]:
        found |= {f"{scheme}/{name}": value for name, value in loaded_digests(folder, meshes, dtype="float32", quantization=scheme)}
    return found


def _of_format(kind: str, folder: pathlib.Path) -> dict[str, str]:
    tree.test_support("quantized_folders").make_folder(folder, kind)
    add_tokenizer(folder)
    return dict(loaded_digests(folder, MESHES, dtype="float32"))


def _of_mxfp4(folder: pathlib.Path) -> dict[str, str]:
    """gpt-oss as it is published."""
    makers, sizes = tree.test_support("mxfp4_folders"), {"hidden_size": 128, "intermediate_size": 128, "num_local_experts": 4}
    makers.write_both(folder, makers.model(**sizes))
    add_tokenizer(folder / "mxfp4")
    return dict(loaded_digests(folder / "mxfp4", EXPERT_MESHES, dtype="float32"))


def _of_gguf(kind: str, folder: pathlib.Path) -> dict[str, str]:
    """A Llama whose matrices are random blocks of a type."""
    path = folder / "model.gguf"
    write_gguf(path, kind)
    return dict(loaded_digests(path, MESHES, dtype="float32"))


def write_gguf(path: pathlib.Path, kind: str) -> None:
    """A GGUF file of a tiny Llama: matrices of ``kind``, vectors of float32, a tokenizer of bytes."""
    import gguf
    files = tree.test_support("gguf_files")
    writer = gguf.GGUFWriter(path, "llama")
    files.add_config(writer, files.HF_LLAMA)
    files.add_byte_level_tokenizer(writer, byte_tokenizer())
    for name, weight in files.random_weights(files.HF_LLAMA).items():
        is_plain = weight.ndim == 1 or kind == "F32"
        stored = gguf.GGMLQuantizationType["F32" if is_plain else kind]
        writer.add_tensor(files.gguf_tensor_name(name), weight if is_plain else _blocks(kind, weight, name), raw_dtype=stored)
    for finish in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        finish()


def _blocks(kind: str, weight: np.ndarray, name: str) -> np.ndarray:
    """uint8 [N, bytes of a row]: a float type's own bytes, else random ones whose scales are finite."""
    import gguf
    if kind in ("F16", "BF16"):
        return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    size, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    shape = (weight.shape[0], weight.shape[1] // size, num_bytes)
    seed = [ord(letter) for letter in name]
    blocks = (np.random.PCG64(seed).random_raw(int(np.prod(shape))) & 0xFF).astype(np.uint8).reshape(shape)
    if kind in ("MXFP4", "NVFP4"):  # scales of a byte: the first, and the first four
        blocks[..., :4] &= 0xBF
        blocks[..., 0] |= 0x20
    else:  # halves and floats begin at even bytes: no exponent of all ones
        blocks[..., 1::2] &= 0xBF
    return blocks.reshape(weight.shape[0], -1)


def _of_written(folder: pathlib.Path) -> dict[str, str]:
    """Files that ``tpllm quantize`` writes of the demo, to the byte."""
    found = {}
    for number, scheme in enumerate(WRITTEN):
        run_command("quantize", "demo", str(folder / str(number)), "--scheme", scheme)
        found[f"{scheme}/files"] = hashing.of_files(folder / str(number), "*.safetensors")
        config = json.loads((folder / str(number) / "config.json").read_text())
        found[f"{scheme}/config"] = hashing.of_text(json.dumps(config, sort_keys=True))
    return found


def run_command(*words: str, check: Callable[[int], bool] = lambda code: code == 0, cwd: pathlib.Path | None = None) -> None:
    """The tree's own command line.

    Raises:
        RuntimeError: it ends with another code.
    """
    done = subprocess.run([*tree.COMMAND, *words], cwd=cwd, env=command_environment(), capture_output=True, text=True)
    if not check(done.returncode):
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")


def command_environment() -> Mapping[str, str]:
    """With this tree first."""
    return {**os.environ, "PYTHONPATH": str(tree.ROOT)}
