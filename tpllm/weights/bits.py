"""Codes of 2 to 7 bits one after the other: eight of them in as many bytes as a code has bits, the first in the lowest bits."""
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)
RUN = 8
"""Codes that begin at a byte together."""


def num_bytes(num_codes: int, bits: int) -> int:
    """What so many codes take; the last run is padded."""
    return -(-num_codes // RUN) * bits


def pack_bits(codes_K: Array, bits: int) -> Array:
    """uint8 [..., bytes] of uint8 codes [..., K] below ``2**bits``."""
    numpy = jnp if isinstance(codes_K, jax.Array) else np
    *lead, num_codes = codes_K.shape
    padded_K = numpy.pad(codes_K, (*((0, 0),) * len(lead), (0, -num_codes % RUN)))
    runs = padded_K.reshape(*lead, padded_K.shape[-1] // RUN, RUN)
    packed = []
    for byte in range(bits):
        value = numpy.zeros_like(runs[..., 0])
        for code in range(RUN):
            shift = code * bits - 8 * byte
            if -bits < shift < 8:
                value = value | (runs[..., code] << shift if shift >= 0 else runs[..., code] >> -shift)
        packed.append(value)
    return numpy.stack(packed, axis=-1).reshape(*lead, num_bytes(num_codes, bits))


def unpack_bits(bytes_B: Array, bits: int, num_codes: int) -> Array:
    """The ``num_codes`` codes that :func:`pack_bits` was given."""
    numpy = jnp if isinstance(bytes_B, jax.Array) else np
    *lead, size = bytes_B.shape
    runs = bytes_B.reshape(*lead, size // bits, bits)
    codes = []
    for code in range(RUN):
        byte, shift = divmod(code * bits, 8)
        value = runs[..., byte] >> shift
        if shift + bits > 8:
            value = value | runs[..., byte + 1] << (8 - shift)
        codes.append(value & (2**bits - 1))
    return numpy.stack(codes, axis=-1).reshape(*lead, size // bits * RUN)[..., :num_codes]
