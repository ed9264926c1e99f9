"""Quantizing float weights while they are loaded, each code rounded to the nearest.

``int8``, ``w8a8``, ``llm.int8`` and ``fp8`` have one scale an output, the largest magnitude over the largest code. In ``int4`` the entry of a group's
largest magnitude comes near -8, as in llama.cpp's Q4_0, so that all sixteen codes serve. ``q4_k`` has the two levels of llama.cpp's Q4_K: a scale and
a min for 32 inputs, of 6 bits each, times the float16 scales of 256. Both search their scales (:mod:`tpllm.weights.search`).
"""
import dataclasses

import ml_dtypes
import numpy as np

from tpllm.weights.scheme import HALF, QuantizedRows, Scheme
from tpllm.weights.search import NIBBLE_STEPS, asymmetric_scales, inverse, symmetric_scales

NIBBLE_ZERO = 8
NUM_OUTLIERS = 16
"""How many inputs ``llm.int8`` multiplies as they are: models of up to 13 B parameters have no more dims with outliers (Dettmers et al. 2022,
arXiv:2208.07339, section 4)."""
SUPER_GROUP, SUPER_STEPS = 256, 63

MXFP4 = Scheme("mxfp4", 4, 32, kind="e2m1", scale_dtype=np.dtype(np.uint8))
"""OCP Microscaling Formats 1.0; read, and not made."""
SCHEMES = {scheme.name: scheme for scheme in (
    Scheme("int8", 8), Scheme("w8a8", 8, quantizes_input=True),
    Scheme("llm.int8", 8, quantizes_input=True, num_outliers=NUM_OUTLIERS), Scheme("fp8", 8, kind="e4m3"), Scheme("fp8-e5m2", 8, kind="e5m2"),
    *(Scheme(name, 4, group, zero=NIBBLE_ZERO, scale_dtype=HALF) for name, group in (("int4", 32), ("int4-g64", 64), ("int4-g128", 128))),
    Scheme("q4_k", 4, 32, mins="super", super_group=SUPER_GROUP, scale_dtype=np.dtype(np.uint8)))}
"""The schemes by the names that users give them."""


def quantize(rows_NK: np.ndarray, scheme: Scheme) -> QuantizedRows:
    """Quantize some rows.

    Args:
        rows_NK: float32.
        scheme: one of :data:`SCHEMES`.
    """
    if scheme.mins == "super":
        return _quantize_two_levels(rows_NK, scheme)
    groups_NGg = _in_groups(rows_NK, scheme.group)
    if scheme.bits == 4:
        scales, least, most = symmetric_scales(groups_NGg), -NIBBLE_ZERO, NIBBLE_ZERO - 1
    else:
        most = 127 if scheme.kind == "int" else float(ml_dtypes.finfo(scheme.code_dtype).max)
        scales, least = np.maximum(groups_NGg.max(-1), -groups_NGg.min(-1)) / np.float32(most), -most
    scales = scales.astype(scheme.scale_dtype)
    codes = groups_NGg * inverse(scales.astype(np.float32))[..., None]  # scales rounded first, so that the codes fit those that are kept
    if scheme.kind == "int":
        np.rint(codes, out=codes)
    np.clip(codes, least, most, out=codes)
    codes = _flat(codes, rows_NK.shape[1])
    return QuantizedRows((codes + np.float32(scheme.zero) if scheme.zero else codes).astype(scheme.code_dtype), scales)


def _quantize_two_levels(rows_NK: np.ndarray, scheme: Scheme) -> QuantizedRows:
    groups_NGg = _in_groups(rows_NK, scheme.group)
    step, down = asymmetric_scales(groups_NGg)
    kept, supers = {}, {}
    for name, values in (("scales", step), ("mins", down)):
        ratio = scheme.super_group // scheme.group
        padded = _in_groups(values, ratio)
        supers[name] = (padded.max(-1) / np.float32(SUPER_STEPS)).astype(HALF)
        codes = np.rint(padded * inverse(supers[name].astype(np.float32))[..., None]).clip(0, SUPER_STEPS)
        kept[name] = _flat(codes, values.shape[1]).astype(np.uint8)

    def effective(name: str) -> np.ndarray:
        spread = np.repeat(supers[name].astype(np.float32), scheme.super_group // scheme.group, axis=1)[:, :kept[name].shape[1]]
        return kept[name].astype(np.float32) * spread
    codes = np.rint((groups_NGg + effective("mins")[..., None]) * inverse(effective("scales"))[..., None]).clip(0, NIBBLE_STEPS)
    codes = _flat(codes, rows_NK.shape[1]).astype(np.uint8)
    return QuantizedRows(codes, kept["scales"], kept["mins"], supers["scales"], supers["mins"])


def _in_groups(rows_NK: np.ndarray, group: int) -> np.ndarray:
    """[N, groups, group], zeros where K ends before its last group."""
    N, K = rows_NK.shape
    group = group or max(K, 1)
    if K % group:
        rows_NK = np.pad(rows_NK, ((0, 0), (0, -K % group)))
    return rows_NK.reshape(N, rows_NK.shape[1] // group, group)


def _flat(groups_NGg: np.ndarray, num_inputs: int) -> np.ndarray:
    """[N, K] of what :func:`_in_groups` made."""
    N, num_groups, group = groups_NGg.shape
    return groups_NGg.reshape(N, num_groups * group)[:, :num_inputs]


def weight_only(scheme: Scheme) -> Scheme:
    """The scheme without quantized activations."""
    return dataclasses.replace(scheme, name="int8", quantizes_input=False, num_outliers=0) if scheme.quantizes_input else scheme
