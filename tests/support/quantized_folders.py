"""Tiny Llama folders in every quantized format, packed here from each format's own definition, with numpy and nothing of tpllm's readers.

``make_folder(path, kind)`` writes one and returns the weights that it stands for; ``KINDS`` lists them.
"""
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.support.tiny_models import TinyModel, config_json

SIZES = {"vocab_size": 208, "hidden_size": 128, "intermediate_size": 256, "head_dim": 16}
"""Groups of 128 divide the inputs, and words of 32-bit the outputs; 8 query heads, 2 for keys and values, biases everywhere."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NF4 = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
Packed = tuple[dict[str, np.ndarray], np.ndarray]
"""(what follows the module's name and a dot -> tensor, the float32 matrix that they stand for)."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way to write a folder.

    Attributes:
        config: its quantization_config.
        pack: a float32 matrix [N, K] to its tensors.
        has_head: whether the head is quantized as the others are.
        override: modules whose names end so are packed otherwise.
    """

    config: Mapping[str, Any]
    pack: Callable[[np.ndarray], Packed]
    has_head: bool = False
    override: Mapping[str, Callable[[np.ndarray], Packed]] = dataclasses.field(default_factory=dict)


def make_folder(path: pathlib.Path, kind: str, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Write config.json and model.safetensors of a tiny Llama; every tensor that is not quantized is float32.

    Returns:
        plain name -> the float32 weight that the folder stands for.
    """
    how, model = KINDS[kind], TinyModel("quantized", config_json("llama", **SIZES), seed=seed)
    tensors, weights = {}, {}
    for name, array in model.weights().items():
        module = name.removesuffix(".weight")
        is_plain = array.ndim != 2 or module.endswith("embed_tokens") or (module == "lm_head" and not how.has_head)
        pack = next((pack for ending, pack in how.override.items() if module.endswith(ending)), how.pack)
        parts, weights[name] = ({}, array) if is_plain else pack(array)
        tensors |= {name: array} if is_plain else {f"{module}.{part}": np.ascontiguousarray(value) for part, value in parts.items()}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**model.hf, "quantization_config": how.config}))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return weights


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., ceil(count * bits / 32)]: code i takes bits ``i * bits`` and on of the line, the lowest first."""
    flat = ((codes[..., None].astype(np.uint32) >> np.arange(bits, dtype=np.uint32)) & 1).astype(np.uint8).reshape(*codes.shape[:-1], -1)
    padded = np.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % 32)])
    return np.packbits(padded, axis=-1, bitorder="little").view("<i4")


def integers(weight_NK: np.ndarray, bits: int, group: int, *, is_symmetric: bool,
             scale_dtype=np.float16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes [N, K], scales [N, groups], zeros [N, groups]), unsigned; the groups follow one another."""
    grouped = weight_NK.reshape(weight_NK.shape[0], -1, group)
    highest, lowest, most = np.maximum(grouped.max(-1), 0), np.minimum(grouped.min(-1), 0), 2**bits - 1
    spread = 2 * np.maximum(highest, -lowest) if is_symmetric else highest - lowest
    scales = (spread / most).astype(scale_dtype)
    used = scales.astype(np.float32)
    zeros = np.full(used.shape, 2**(bits - 1)) if is_symmetric else np.clip(np.rint(-lowest / used), 0, most).astype(int)
    codes = np.clip(np.rint(grouped / used[..., None]) + zeros[..., None], 0, most).astype(np.uint8)
    return codes.reshape(weight_NK.shape), scales, zeros


def from_integers(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, groups_K: np.ndarray) -> np.ndarray:
    """float32 [N, K] of unsigned codes, each input of the group that ``groups_K`` says."""
    return (scales.astype(np.float64)[:, groups_K] * (codes.astype(np.float64) - zeros[:, groups_K])).astype(np.float32)


def pack_gptq(weight_NK: np.ndarray, *, bits: int = 4, group: int = 32, is_symmetric: bool = True, has_order: bool = False,
              is_v2: bool = False) -> Packed:
    """AutoGPTQ's tensors; with ``has_order`` inputs come in a random order of groups."""
    K = weight_NK.shape[1]
    size = K if group == -1 else group
    order = np.random.default_rng(K).permutation(K) if has_order else np.arange(K)
    sorted_codes, scales, zeros = integers(weight_NK[:, order], bits, size, is_symmetric=is_symmetric)
    codes, groups_K = np.empty_like(sorted_codes), np.empty(K, np.int32)
    codes[:, order], groups_K[order] = sorted_codes, np.arange(K) // size
    stored = zeros if is_v2 else (zeros - 1) % 2**bits
    parts = {"qweight": pack_bits(codes, bits).T, "qzeros": pack_bits(stored.T, bits), "scales": scales.T, "g_idx": groups_K}
    return parts, from_integers(codes, scales, zeros, groups_K)


def pack_awq(weight_NK: np.ndarray, *, group: int = 32, has_zeros: bool = True) -> Packed:
    """AutoAWQ's gemm tensors."""
    K = weight_NK.shape[1]
    codes, scales, zeros = integers(weight_NK, 4, group, is_symmetric=not has_zeros)

    def words(values: np.ndarray) -> np.ndarray:
        eights = values.reshape(values.shape[0], -1, 8)[..., list(AWQ_ORDER)]
        return pack_bits(eights.reshape(values.shape), 4)
    parts = {"qweight": words(codes.T), "scales": scales.T} | ({"qzeros": words(zeros.T)} if has_zeros else {})
    return parts, from_integers(codes, scales, zeros, np.arange(K) // group)


def pack_float8(weight_NK: np.ndarray, *, block: tuple[int, int], part: str, scale_dtype=np.float32, shape: tuple[int, ...] | None = None) -> Packed:
    """E4M3 with a scale for each block of outputs and inputs; 0 is all of them."""
    (N, K), (height, width) = weight_NK.shape, (block[0] or weight_NK.shape[0], block[1] or weight_NK.shape[1])
    lines, columns = np.arange(N) // height, np.arange(K) // width
    scales = np.zeros((lines[-1] + 1, columns[-1] + 1), np.float32)
    np.maximum.at(scales, (lines[:, None], columns[None]), np.abs(weight_NK) / np.float32(448))
    scales = scales.astype(scale_dtype)
    spread = scales.astype(np.float32)[lines][:, columns]
    codes = np.clip(weight_NK / spread, -448, 448).astype(E4M3)
    return {"weight": codes, part: scales if shape is None else scales.reshape(shape)}, codes.astype(np.float32) * spread


def pack_compressed(weight_NK: np.ndarray, *, bits: int = 4, group: int = 32, is_symmetric: bool = True) -> Packed:
    """compressed-tensors' pack-quantized; ``group`` 0 is one scale an output."""
    N, K = weight_NK.shape
    codes, scales, zeros = integers(weight_NK, bits, group or K, is_symmetric=is_symmetric, scale_dtype=BF16)
    parts = {"weight_packed": pack_bits(codes, bits), "weight_scale": scales, "weight_shape": np.array([N, K])}
    if not is_symmetric:
        parts["weight_zero_point"] = pack_bits(zeros.T, bits).T
    return parts, from_integers(codes, scales, zeros, np.arange(K) // (group or K))


def pack_int8(weight_NK: np.ndarray, *, is_symmetric: bool = True) -> Packed:
    """compressed-tensors' int-quantized, one scale an output."""
    K = weight_NK.shape[1]
    codes, scales, zeros = integers(weight_NK, 8, K, is_symmetric=is_symmetric, scale_dtype=BF16)
    parts = {"weight": (codes.astype(np.int16) - 128).astype(np.int8), "weight_scale": scales}
    if not is_symmetric:
        parts["weight_zero_point"] = (zeros - 128).astype(np.int8)
    return parts, from_integers(codes, scales, zeros, np.zeros(K, int))


def pack_float4(weight_NK: np.ndarray, *, group: int, has_global: bool) -> Packed:
    """compressed-tensors' nvfp4 (E4M3 scales that one float32 divides) and mxfp4 (powers of two)."""
    N = weight_NK.shape[0]
    wanted = np.abs(weight_NK.reshape(N, -1, group)).max(-1) / np.float32(6)
    if has_global:
        whole = np.float32(448) / wanted.max()
        parts = {"weight_scale": (wanted * whole).astype(E4M3), "weight_global_scale": whole.reshape(1)}
        scales = parts["weight_scale"].astype(np.float32) / whole
    else:
        exponents = np.ceil(np.log2(wanted)).astype(int) + 127
        parts, scales = {"weight_scale": exponents.astype(np.uint8)}, (2.0 ** (exponents - 127)).astype(np.float32)
    spread = np.repeat(scales, group, axis=1)
    codes = np.abs(weight_NK[..., None] / spread[..., None] - E2M1).argmin(-1).astype(np.uint8)
    return {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, **parts}, E2M1[codes] * spread


def pack_bnb_int8(weight_NK: np.ndarray) -> Packed:
    """LLM.int8()."""
    absmax = np.abs(weight_NK).max(1)
    codes = np.rint(weight_NK / absmax[:, None] * 127).astype(np.int8)
    return {"weight": codes, "SCB": absmax, "weight_format": np.array(0, np.uint8)}, codes * (absmax / np.float32(127))[:, None]


def pack_bnb_4bit(weight_NK: np.ndarray, *, kind: str = "nf4", block: int = 64, nested_block: int = 0) -> Packed:
    """QLoRA's 4-bit blocks of the flattened matrix; with ``nested_block`` their absmax has codes of 8 bits."""
    values, blocks = NF4 if kind == "nf4" else FP4, weight_NK.reshape(-1, block)
    absmax, state = np.abs(blocks).max(1), {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight_NK.shape)}
    scales = {"absmax": absmax}
    if nested_block:
        table, offset = np.linspace(-1, 1, 256, dtype=np.float32), absmax.mean()
        centered = np.pad(absmax - offset, (0, -absmax.size % nested_block)).reshape(-1, nested_block)
        nested = np.abs(centered).max(1)
        indices = np.abs((centered / nested[:, None])[..., None] - table).argmin(-1).astype(np.uint8)
        scales = {"absmax": indices.reshape(-1)[:absmax.size], "nested_absmax": nested, "nested_quant_map": table}
        state |= {"nested_blocksize": nested_block, "nested_dtype": "float32", "nested_offset": float(offset)}
        absmax = (table[indices] * nested[:, None]).reshape(-1)[:absmax.size] + offset
    codes = np.abs((blocks / absmax[:, None])[..., None] - values).argmin(-1).astype(np.uint8).reshape(-1)
    scales |= {"quant_map": values, f"quant_state.bitsandbytes__{kind}": np.frombuffer(json.dumps(state).encode(), np.uint8)}
    parts = {"weight": (codes[::2] << 4 | codes[1::2])[:, None], **{f"weight.{name}": value for name, value in scales.items()}}
    return parts, (values[codes].reshape(-1, block) * absmax[:, None]).reshape(weight_NK.shape)


def compressed_config(form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None, **more) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": ["lm_head"],
            "config_groups": {"group_0": group}, **more}


def _gptq(*, config: Mapping[str, Any] | None = None, has_head: bool = False, override=(), **how) -> Kind:
    described = {"quant_method": "gptq", "bits": how.get("bits", 4), "group_size": how.get("group", 32), "sym": how.get("is_symmetric", True),
                 "desc_act": how.get("has_order", False), "checkpoint_format": "gptq_v2" if how.get("is_v2") else "gptq", "lm_head": has_head}
    return Kind({**described, **(config or {})}, functools.partial(pack_gptq, **how), has_head, dict(override))


def _compressed(bits: int, group: int, *, is_symmetric: bool = True) -> Kind:
    weights = {"num_bits": bits, "type": "int", "symmetric": is_symmetric, "group_size": group or None, "strategy": "group" if group else "channel"}
    return Kind(compressed_config("pack-quantized", weights), functools.partial(pack_compressed, bits=bits, group=group, is_symmetric=is_symmetric))


def _float8(pack, **config) -> Kind:
    return Kind({"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"], **config}, pack)


def _compressed_float8(strategy: str, block: tuple[int, int], shape=None, **weights) -> Kind:
    config = compressed_config("float-quantized", {"num_bits": 8, "type": "float", "strategy": strategy, **weights},
                               {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True})
    return Kind(config, functools.partial(pack_float8, block=block, part="weight_scale", scale_dtype=BF16, shape=shape))


def _compressed_float4(form: str, group: int, *, has_global: bool) -> Kind:
    weights = {"num_bits": 4, "type": "float", "group_size": group, "strategy": "tensor_group" if has_global else "group"}
    return Kind(compressed_config(form, weights), functools.partial(pack_float4, group=group, has_global=has_global))


def pack_mxfp8(weight_NK: np.ndarray) -> Packed:
    """E4M3 with a power of two for 32 inputs."""
    exponents = np.ceil(np.log2(np.abs(weight_NK.reshape(len(weight_NK), -1, 32)).max(-1) / np.float32(448))).astype(int) + 127
    spread = np.repeat(2.0 ** (exponents - 127), 32, axis=1).astype(np.float32)
    codes = (weight_NK / spread).astype(E4M3)
    return {"weight": codes, "weight_scale": exponents.astype(np.uint8)}, codes.astype(np.float32) * spread


def _auto_round(pack: Callable[[np.ndarray], Packed], packing: str | None, **config) -> Kind:
    """AutoRound's own config; where its packing has no ``g_idx``, there is none."""
    def packed(weight_NK: np.ndarray) -> Packed:
        parts, weight = pack(weight_NK)
        return {name: value for name, value in parts.items() if name != "g_idx" or packing == "auto_round:gptqmodel"}, weight
    override, packs = config.pop("override", {}), {"packing_format": packing} if packing else {}
    described = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int", "autoround_version": "0.9.0",
                 "block_name_to_quantize": "model.layers", **packs, **config}
    return Kind(described, packed, override=override)


def _mixed() -> Kind:
    """Down projections of 8 bits, all others of 4."""
    config = dict(_compressed(4, 32).config)
    eight = {"targets": ["re:.*down_proj$"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}}
    config["config_groups"] = {**config["config_groups"], "group_1": eight}
    return Kind(config, pack_compressed, override={"down_proj": functools.partial(pack_compressed, bits=8, group=0)})


_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
_STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
_ROW8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
_EIGHT = functools.partial(pack_gptq, bits=8, group=64)
KINDS: dict[str, Kind] = {
    **{f"gptq-{bits}bit-g{group}-{'sym' if is_symmetric else 'asym'}": _gptq(bits=bits, group=group, is_symmetric=is_symmetric)
       for bits in (2, 3, 4, 8) for group in (-1, 32, 64, 128) for is_symmetric in (True, False)},
    "gptq-4bit-g32-sym-act": _gptq(has_order=True),
    "gptq-3bit-g64-asym-act": _gptq(bits=3, group=64, is_symmetric=False, has_order=True),
    "gptq_v2-4bit-g32-asym": _gptq(is_symmetric=False, is_v2=True),
    "gptq_v2-8bit-g32-asym": _gptq(bits=8, is_symmetric=False, is_v2=True),
    "gptq-4bit-g32-sym-head": _gptq(has_head=True),
    "gptq-4bit-g32-sym-dynamic": _gptq(config={"dynamic": {r"-:lm_head": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": 64}}},
                                       override={"down_proj": _EIGHT}.items()),
    "awq-g32": Kind({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, pack_awq),
    "awq-g128": Kind({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "GEMM",
                      "modules_to_not_convert": ["lm_head"]}, functools.partial(pack_awq, group=128)),
    "awq-g32-sym": Kind({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False}, functools.partial(pack_awq, has_zeros=False)),
    "fp8-block": _float8(functools.partial(pack_float8, block=(128, 128), part="weight_scale_inv"), weight_block_size=[128, 128]),
    "fp8-block-bf16": _float8(functools.partial(pack_float8, block=(64, 96), part="weight_scale_inv", scale_dtype=BF16), weight_block_size=[64, 96]),
    "fp8-tensor": _float8(functools.partial(pack_float8, block=(0, 0), part="weight_scale", shape=()), ignored_layers=["lm_head"]),
    "fp8-channel": _float8(functools.partial(pack_float8, block=(1, 0), part="weight_scale")),
    "fbgemm_fp8": Kind({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
                       functools.partial(pack_float8, block=(1, 0), part="weight_scale")),
    "bnb-int8": Kind({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}, pack_bnb_int8),
    "bnb-nf4": Kind({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, pack_bnb_4bit),
    "bnb-nf4-nested": Kind({"quant_method": "bitsandbytes", "load_in_4bit": True}, functools.partial(pack_bnb_4bit, nested_block=256)),
    "bnb-fp4": Kind({"quant_method": "bitsandbytes", "load_in_4bit": True}, functools.partial(pack_bnb_4bit, kind="fp4")),
    **{f"compressed-w{bits}a16-{f'g{group}' if group else 'channel'}-{'sym' if is_symmetric else 'asym'}":
       _compressed(bits, group, is_symmetric=is_symmetric) for bits in range(2, 9) for group in (0, 32) for is_symmetric in (True, False)},
    "compressed-mixed": _mixed(),
    "compressed-w8a8": Kind(compressed_config("int-quantized", _ROW8, _TOKEN), pack_int8),
    "compressed-w8a8-static": Kind(compressed_config("int-quantized", _ROW8, _STATIC), pack_int8),
    "compressed-w8a8-asym": Kind(compressed_config("int-quantized", {**_ROW8, "symmetric": False}, _TOKEN),
                                 functools.partial(pack_int8, is_symmetric=False)),
    "compressed-naive-int8": Kind(compressed_config("naive-quantized", _ROW8), pack_int8),
    "compressed-fp8-tensor": _compressed_float8("tensor", (0, 0), (1,)),
    "compressed-fp8-channel": _compressed_float8("channel", (1, 0)),
    "compressed-fp8-block": _compressed_float8("block", (128, 128), block_structure=[128, 128]),
    "compressed-nvfp4": _compressed_float4("nvfp4-pack-quantized", 16, has_global=True),
    "compressed-mxfp4": _compressed_float4("mxfp4-pack-quantized", 32, has_global=False),
    "auto-round-auto_gptq": _auto_round(pack_gptq, "auto_round:auto_gptq"),
    "auto-round-gptq-asym": _auto_round(functools.partial(pack_gptq, bits=2, is_symmetric=False), "auto_round:gptq", bits=2, sym=False),
    "auto-round-without-packing": _auto_round(functools.partial(pack_gptq, group=-1), None, group_size=-1),
    "auto-round-own-packing": _auto_round(functools.partial(pack_gptq, bits=8, is_symmetric=False, is_v2=True), "auto_round", bits=8, sym=False),
    "auto-round-gptqmodel": _auto_round(functools.partial(pack_gptq, bits=3, is_symmetric=False, is_v2=True), "auto_round:gptqmodel", bits=3),
    "auto-round-auto_awq": _auto_round(pack_awq, "auto_round:auto_awq", sym=False),
    "auto-round-mixed": _auto_round(
        pack_gptq, "auto_round:auto_gptq", override={"down_proj": _EIGHT}, extra_config={
            "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64, "data_type": None},
            r".*layers\.1.*down_proj.*": {"bits": 8, "group_size": 64}, "lm_head": {"bits": 16}}),
    "auto-round-mxfp4": _auto_round(functools.partial(pack_float4, group=32, has_global=False), "auto_round:llm_compressor", data_type="mx_fp",
                                    act_bits=4, override={"down_proj": pack_mxfp8}, extra_config={".*down_proj.*": {"bits": 8}}),
    "auto-round-nvfp4": _auto_round(functools.partial(pack_float4, group=16, has_global=True), "auto_round:llm_compressor", data_type="nv_fp",
                                    group_size=16, act_bits=4),
    "auto-round-fp8-static": _auto_round(functools.partial(pack_float8, block=(1, 0), part="weight_scale", scale_dtype=BF16), "auto_round:fp8_static",
                                         data_type="fp", bits=8, group_size=-1, act_bits=8),
    "auto-round-fp8-block": _auto_round(functools.partial(pack_float8, block=(128, 128), part="weight_scale_inv", scale_dtype=BF16), None,
                                        data_type="fp", bits=8, group_size=[128, 128]),
}
