"""Codes of 4 to 6 bits in 32-bit words, in the order in which the threads of a Hopper GPU need them.

The left operand of a warp group's product lies in registers: of each 16 inputs a thread has, of two rows, inputs 2 t, 2 t + 1, 2 t + 8 and 2 t + 9,
where t is its number modulo 4 (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16"). So of 64 inputs it needs 16 of a row, which here are two
words side by side: word 2 t + u has, of the 32 inputs from 32 u on, the pair p = 0 ... 3, inputs 16 (p // 2) + 8 (p % 2) + 2 t + {0, 1}, at bits 4 p
and 4 p + 16. A mask then leaves the codes of two neighbouring inputs in the mantissas of two 16-bit floats.

The bits above the low four have words of their own: of 256 inputs (5 bits) or 128 (6 bits) word 2 t + u has those of the first or second half.
"""
import jax
import jax.numpy as jnp
import numpy as np

WORD_TILE = 8
"""Words of a row that four threads read together."""
Array = jax.Array | np.ndarray


def pack_fragments(codes_NK: Array, bits: int) -> tuple[Array, Array | None]:
    """int32 (low four bits [N, K / 8], high bits [N, K (bits - 4) / 32] or None) of uint8 codes; K a multiple of 128, of 256 for 5 bits."""
    low = _words(codes_NK & 15, 4, 1)
    return low, _words(codes_NK >> 4, bits - 4, _blocks_a_word(bits)) if bits > 4 else None


def unpack_fragments(words: Array, high: Array | None, bits: int) -> Array:
    """int32 [N, K] codes of :func:`pack_fragments`."""
    codes_NK = _fields(words, 4, 1)
    return codes_NK if high is None else codes_NK | _fields(high, bits - 4, _blocks_a_word(bits)) << 4


def _blocks_a_word(bits: int) -> int:
    """Blocks of 64 inputs whose high bits are in one word."""
    return 2 // (bits - 4)


def high_place(bits: int, block: int, pair: int) -> tuple[int, int, int]:
    """(tile of words, word of a thread's two, bit) of the high bits of a pair of a block of 64 inputs; pairs count from 0 to 7."""
    word, inside = divmod(block, _blocks_a_word(bits))
    return word // 2, word % 2, (bits - 4) * (8 * inside + pair)


def _words(fields_NK: Array, bits: int, blocks: int) -> Array:
    """Words of so many blocks of 64, or of half a block where the fields have 4 bits; in [N, tile, word, block, pair (8 or 4), thread, element]."""
    N, pairs = len(fields_NK), 4 if bits == 4 else 8
    parts = fields_NK.reshape(N, -1, 2, blocks, pairs, 4, 2).astype(np.uint32)
    words = 0
    for block in range(blocks):
        for pair in range(pairs):
            for element in range(2):
                words = words | parts[:, :, :, block, pair, :, element] << np.uint32(bits * (pairs * block + pair) + 16 * element)
    return words.swapaxes(2, 3).reshape(N, -1).view(np.int32)


def _fields(words: Array, bits: int, blocks: int) -> Array:
    numpy, (N, _), pairs = np if isinstance(words, np.ndarray) else jnp, words.shape, 4 if bits == 4 else 8
    tiles = words.reshape(N, -1, 4, 2).swapaxes(2, 3)
    fields = [tiles >> np.int32(bits * (pairs * block + pair) + 16 * element) & np.int32(2**bits - 1)
              for block in range(blocks) for pair in range(pairs) for element in range(2)]
    stacked = numpy.stack(fields, axis=3).reshape(N, -1, 2, blocks, pairs, 2, 4)
    return stacked.swapaxes(5, 6).reshape(N, -1)
