"""Integer codes with a scale, and perhaps a zero, for each output and group, as a scheme keeps them."""
import dataclasses

import numpy as np

from tpllm.checkpoint.convert import STORED
from tpllm.weights.scheme import QuantizedRows, Scheme


def integer_scheme(bits: int, group: int, stored: str, *, has_zeros: bool, quantizes_input: bool = False) -> Scheme:
    """The scheme of integer codes.

    Codes of 8 bits become signed, so that zeros of them would be -128 to 127, which no unsigned min holds. They become float32 mins
    ``-scale * zero``: a product of at most 11 and 8 bits, which float32 has exactly, as it has the sum with ``scale * code``; so weights
    are those of the file to the last bit for scales of 16 bits. For float32 scales the min is rounded once.

    Args:
        bits: 2 to 8.
        group: inputs that share a scale; 0 where an output has one.
        stored: the scales' dtype in the file.
        has_zeros: whether zeros differ from the middle of the codes.
        quantizes_input: see :class:`~tpllm.weights.scheme.Scheme`.
    """
    name = f"int{bits}" + (f"-g{group}" if group else "") + ("-zeros" if has_zeros else "")
    dtype = STORED[stored]
    if bits == 8:
        mins, dtype = ("float", np.dtype(np.float32)) if has_zeros else ("none", dtype)
        return Scheme(name, bits, group, mins=mins, scale_dtype=dtype, quantizes_input=quantizes_input)
    return Scheme(name, bits, group, zero=0 if has_zeros else middle(bits), mins="zeros" if has_zeros else "none", scale_dtype=dtype)


def middle(bits: int) -> int:
    """The unsigned code that stands for zero in symmetric quantization."""
    return 1 << (bits - 1)


@dataclasses.dataclass(frozen=True)
class IntegerScales:
    """The scales of a matrix of integer codes.

    Attributes:
        scheme: see :func:`integer_scheme`.
        scales: [lines, groups] in the scheme's dtype.
        mins: [lines, groups] or None: zeros or float mins, as the scheme has them.
    """

    scheme: Scheme
    scales: np.ndarray
    mins: np.ndarray | None = None

    @classmethod
    def of(cls, scheme: Scheme, scales: np.ndarray, zeros: np.ndarray | None) -> "IntegerScales":
        """Make it from scales and from unsigned zeros in the range of the codes; zeros are ignored where the scheme has none."""
        scales = np.ascontiguousarray(scales.astype(scheme.scale_dtype, copy=False))
        if scheme.mins == "none":
            return cls(scheme, scales)
        if scheme.mins == "zeros":
            return cls(scheme, scales, np.ascontiguousarray(zeros.astype(np.uint8, copy=False)))
        return cls(scheme, scales, -scales * (zeros.astype(np.float32) - np.float32(middle(scheme.bits))))

    def rows(self, codes: np.ndarray, lines: slice | np.ndarray) -> QuantizedRows:
        """Rows of unsigned codes [n, K] that some lines serve."""
        if self.scheme.bits == 8:
            codes = (codes ^ np.uint8(0x80)).view(np.int8)
        return QuantizedRows(codes, self.scales[lines], None if self.mins is None else self.mins[lines])
