"""Codes of 2 to 8 bits out of 32-bit words. Each place in a word or byte is a long strided write: ten times as fast as a broadcast shift."""
import numpy as np


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes that follow one another from the lowest bit on, also across words: GPTQ's 3-bit layout, and compressed-tensors'.

    Args:
        words: int32 [..., W] with ``32 * W >= bits * count``.
        bits: of a code.
        count: codes of a line.

    Returns:
        uint8 [..., count].
    """
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return octets[..., :count]
    if bits in (2, 4):
        return _split(octets, bits, 8 // bits)[..., :count]
    missing = -octets.shape[-1] % bits
    if missing:
        octets = np.concatenate([octets, np.zeros((*octets.shape[:-1], missing), np.uint8)], axis=-1)
    # Eight codes are as many bytes as a code has bits.
    parts, dtype = octets.reshape(*octets.shape[:-1], -1, bits), np.uint32 if bits < 4 else np.uint64
    eights = np.zeros(parts.shape[:-1], dtype)
    for index in range(bits):
        eights |= parts[..., index].astype(dtype) << dtype(8 * index)
    return _split(eights, bits, 8)[..., :count]


def unpack_whole_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """As :func:`unpack` where no code crosses into another word, so that ``32 % bits`` bits of each are left over."""
    return _split(words.view(np.uint32), bits, 32 // bits)[..., :count]


def nibbles(octets: np.ndarray, *, is_lower_first: bool = True) -> np.ndarray:
    """uint8 [..., 2 B]: the two codes of each byte of [..., B]."""
    codes = np.empty((*octets.shape, 2), np.uint8)
    np.bitwise_and(octets, np.uint8(15), out=codes[..., 0 if is_lower_first else 1])
    np.right_shift(octets, np.uint8(4), out=codes[..., 1 if is_lower_first else 0])
    return codes.reshape(*octets.shape[:-1], -1)


def look_up_nibbles(values: np.ndarray, octets: np.ndarray, *, is_lower_first: bool = True) -> np.ndarray:
    """float32 [..., 2 B]: of 16 values those that the two codes of each byte of [..., B] stand for, both by one look-up."""
    pairs = values[nibbles(np.arange(256, dtype=np.uint8), is_lower_first=is_lower_first)].astype(np.float32, copy=False).view(np.complex64)
    return np.take(pairs, octets, mode="clip").view(np.float32)


def _split(units: np.ndarray, bits: int, num_codes: int) -> np.ndarray:
    """uint8 [..., num_codes * U]: the codes of each unsigned integer of [..., U], the lowest first."""
    codes = np.empty((*units.shape, num_codes), np.uint8)
    for index in range(num_codes):
        np.copyto(codes[..., index], units >> units.dtype.type(bits * index), casting="unsafe")
    codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(*units.shape[:-1], -1)
