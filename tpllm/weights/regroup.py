"""Scales for smaller groups: where a shard's boundary would cut a group, or kernels know no group of that size, its scale is repeated."""
import dataclasses
from collections.abc import Sequence

import numpy as np

from sharding_rules import ShardingError
from tpllm.weights.scheme import QuantizedRows, Scheme, widen, widened

LARGEST = 256
UNIT = 32


def fit_groups(scheme: Scheme, num_inputs: int, num_shards: int, *, allowed: Sequence[int] | None, name: str) -> Scheme:
    """The scheme with the largest groups that shards do not cut and kernels read. It quantizes inputs where an output has one scale only.

    Args:
        scheme: of the whole matrix.
        num_inputs: K.
        num_shards: into how many parts K is cut.
        allowed: the groups there are kernels for, 0 among them where an output may have one scale; None for any.
        name: of the parameter, for errors.

    Raises:
        ShardingError: there are none.
    """
    scheme = widened(scheme)
    if scheme.group == 0 and (allowed is None or (0 in allowed and scheme.mins == "none")):
        return scheme if scheme.mins == "none" else dataclasses.replace(scheme, quantizes_input=False, num_outliers=0)
    width = num_inputs // num_shards
    extent = width if num_shards > 1 else -(-width // UNIT) * UNIT

    def serves(group: int) -> bool:
        return (scheme.group or group) % group == 0 and (extent % group == 0 or (num_shards == 1 and allowed is None))
    candidates = [2**i for i in range(8, 2, -1)] if allowed is None else sorted(allowed, reverse=True)
    candidates = [scheme.group, *candidates] if allowed is None or scheme.group in allowed else candidates
    group = next((group for group in candidates if group and serves(group) and (scheme.mins == "none" or allowed is None or group >= UNIT)), None)
    if group is None:
        raise ShardingError(f"{name}: {num_inputs} inputs in groups of {scheme.group or num_inputs} cannot be cut into {num_shards} shards of "
                            f"{width}; choose a smaller mesh, whose shards are a multiple of {UNIT}")
    super_group = scheme.super_group
    while super_group and num_shards > 1 and width % super_group:
        super_group //= 2
    return dataclasses.replace(scheme, group=group, super_group=max(super_group, group) if super_group else 0, quantizes_input=False, num_outliers=0)


def regroup(rows: QuantizedRows, scheme: Scheme, target: Scheme) -> QuantizedRows:
    """The same values with the groups of ``target``, which :func:`fit_groups` made of ``scheme``."""
    num_inputs = rows.codes.shape[1]

    rows = widen(rows, scheme)

    def spread(values: np.ndarray | None, old: int, new: int) -> np.ndarray | None:
        if values is None or old == new:
            return values
        return values[:, np.arange(0, num_inputs, new) // (old or num_inputs)]
    return QuantizedRows(rows.codes, spread(rows.scales, scheme.group, target.group), spread(rows.mins, scheme.group, target.group),
                         spread(rows.super_scales, scheme.super_group, target.super_group),
                         spread(rows.super_mins, scheme.super_group, target.super_group))


def shard_of(rows: QuantizedRows, scheme: Scheme, shard: int, num_shards: int) -> QuantizedRows:
    """The columns of one shard of K, with their scales; the one scale of an output stays whole."""
    def cut(values: np.ndarray | None, is_cut: bool) -> np.ndarray | None:
        if values is None or not is_cut or num_shards == 1:
            return values
        width = values.shape[1] // num_shards
        return values[:, shard * width:(shard + 1) * width]
    has_groups, has_supers = scheme.group > 0, scheme.super_group > 0
    return QuantizedRows(cut(rows.codes, True), cut(rows.scales, has_groups), cut(rows.mins, has_groups), cut(rows.super_scales, has_supers),
                         cut(rows.super_mins, has_supers))
