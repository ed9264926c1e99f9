"""Scales of 4-bit groups by search: of some steps about the one that spans a group, that of least squared error.

For codes c that a step gives, the best scale s and down-shift m of x ~ s c - m are a line fitted to (c, x) by least squares. Codes are then
rounded again with what is kept. llama.cpp's quantizer searches in the same way (its ``make_qx_quants`` and ``make_qkx2_quants``).
"""
from collections.abc import Callable

import numpy as np

BLOCK = 2**15
"""Entries searched at once: what a core's cache holds."""
LEVELS = 8
SYMMETRIC_STEPS = LEVELS + np.array([-0.6, 0, 0.6], np.float32)
NIBBLE_STEPS = 15
ASYMMETRIC_STEPS = NIBBLE_STEPS + np.array([-1, -0.8, -0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8, 1], np.float32)
"""How many steps the span of a group is cut in."""


def symmetric_scales(groups_NGg: np.ndarray) -> np.ndarray:
    """Scales of codes from -8 to 7, [N, G] float32; the entry of largest magnitude comes near -8, so a scale may be negative."""
    return _in_blocks(_symmetric, groups_NGg)[0]


def asymmetric_scales(groups_NGg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scales, mins) of codes from 0 to 15, [N, G] float32 each, neither negative: an entry is its code times the scale, minus the min."""
    return _in_blocks(_asymmetric, groups_NGg)


def _in_blocks(search: Callable[[np.ndarray], tuple[np.ndarray, ...]], groups_NGg: np.ndarray) -> tuple[np.ndarray, ...]:
    N, G, group = groups_NGg.shape
    flat_Mg = groups_NGg.reshape(N * G, group)
    size = max(BLOCK // group, 1)
    parts = [search(flat_Mg[start:start + size]) for start in range(0, max(N * G, 1), size)]
    return tuple(np.concatenate(part).reshape(N, G) for part in zip(*parts, strict=True))


def _symmetric(groups_Mg: np.ndarray) -> tuple[np.ndarray]:
    highest, lowest = groups_Mg.max(-1), groups_Mg.min(-1)
    peak, codes = np.where(highest > -lowest, highest, lowest), np.empty_like(groups_Mg)
    best, scale = np.full_like(peak, -1), np.zeros_like(peak)
    for steps in SYMMETRIC_STEPS:
        _round(groups_Mg, -steps * inverse(peak), codes, -LEVELS, LEVELS - 1)
        product, square = _dot(codes, groups_Mg), _dot(codes, codes)
        fitted = product * inverse(square)
        is_better = product * fitted > best  # the squared error is that of the entries themselves, less this
        np.copyto(best, product * fitted, where=is_better)
        np.copyto(scale, fitted, where=is_better)
    return (scale,)


def _asymmetric(groups_Mg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    group = np.float32(groups_Mg.shape[-1])
    lowest, total = np.minimum(groups_Mg.min(-1), 0), groups_Mg.sum(-1)
    raised_Mg, codes = groups_Mg - lowest[:, None], np.empty_like(groups_Mg)
    span = raised_Mg.max(-1)
    best, scale, down = np.full_like(span, -1), span / np.float32(NIBBLE_STEPS), -lowest
    for steps in ASYMMETRIC_STEPS:
        _round(raised_Mg, steps * inverse(span), codes, 0, NIBBLE_STEPS)
        product, square, count = _dot(codes, groups_Mg), _dot(codes, codes), codes.sum(-1)
        slope = (group * product - count * total) * inverse(group * square - count * count)
        below = (slope * count - total) / group
        is_raised = below < 0  # a min cannot be negative: the line then goes through zero
        slope, below = np.where(is_raised, product * inverse(square), slope), np.where(is_raised, 0, below)
        explained = slope * (2 * product - slope * square + 2 * below * count) - below * (2 * total + group * below)
        is_better = (explained > best) & (slope > 0)
        for kept, found in ((best, explained), (scale, slope), (down, below)):
            np.copyto(kept, found, where=is_better)
    return scale, down


def _round(values_Mg: np.ndarray, factors_M: np.ndarray, out: np.ndarray, least: int, most: int) -> None:
    np.multiply(values_Mg, factors_M[:, None], out=out)
    np.rint(out, out=out)
    np.clip(out, least, most, out=out)


def _dot(left_Mg: np.ndarray, right_Mg: np.ndarray) -> np.ndarray:
    return np.einsum("mg,mg->m", left_Mg, right_Mg)


def inverse(values: np.ndarray) -> np.ndarray:
    """One over each, and 0 for 0."""
    return np.divide(1, values, out=np.zeros_like(values), where=values != 0)
