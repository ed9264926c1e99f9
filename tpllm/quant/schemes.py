"""Ways to quantize a weight while it is loaded: symmetric integers, rounded to the nearest.

    w[n, k] ~ scale[n, k // group] * code[n, k]

``int8`` has one scale an output, the largest magnitude over 127. ``int4`` has one for 32 inputs: the entry of the largest magnitude becomes -8,
as in llama.cpp's Q4_0, so that all sixteen codes serve.
"""
import dataclasses

import numpy as np

from tpllm.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to quantize.

    Attributes:
        name: as users write it.
        bits: of a code, 8 or 4.
        group: inputs that share a scale; 0 where an output has one.
    """

    name: str
    bits: int
    group: int

    @property
    def scale_dtype(self) -> np.dtype:
        """Scales of groups are float16, 16 bits for 32 codes; those of outputs float32."""
        return np.dtype(np.float16 if self.group else np.float32)

    def num_groups(self, num_inputs: int) -> int:
        """Scales of an output."""
        return -(-num_inputs // self.group) if self.group else 1


SCHEMES = {scheme.name: scheme for scheme in (Scheme("int8", 8, 0), Scheme("int4", 4, 32))}


def find_scheme(name: str | None) -> Scheme | None:
    """The scheme a user names; None for none.

    Raises:
        ConfigError: an unknown one.
    """
    if name is not None and name not in SCHEMES:
        raise ConfigError(f"quantization is {name!r}; it must be one of {', '.join(SCHEMES)}, or None to keep what the checkpoint holds")
    return None if name is None else SCHEMES[name]


def quantize(rows_NK: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of some rows.

    Args:
        rows_NK: float32.
        scheme: how.

    Returns:
        (int8 [N, K], scales [N, groups] in the scheme's dtype).
    """
    N, K = rows_NK.shape
    group = scheme.group or max(K, 1)
    num_groups = scheme.num_groups(K)
    if num_groups * group != K:
        rows_NK = np.pad(rows_NK, ((0, 0), (0, num_groups * group - K)))
    groups_NGg = rows_NK.reshape(N, num_groups, group)
    most, least = 2 ** (scheme.bits - 1) - 1, -(2 ** (scheme.bits - 1))
    highest, lowest = groups_NGg.max(-1), groups_NGg.min(-1)
    if scheme.bits == 4:
        scales = np.where(highest > -lowest, highest, lowest) / np.float32(least)
    else:
        scales, least = np.maximum(highest, -lowest) / np.float32(most), -most
    scales = scales.astype(scheme.scale_dtype)
    used = scales.astype(np.float32)  # rounded first, so that the codes fit the scale that is kept
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(used == 0, np.float32(0), np.float32(1) / used)
    codes = np.multiply(groups_NGg, inverse[..., None])
    np.clip(np.rint(codes, out=codes), least, most, out=codes)
    return codes.astype(np.int8).reshape(N, num_groups * group)[:, :K], scales
