"""What a warp group of a Hopper GPU does with registers, and the same in plain jnp where the kernel is interpreted.

The interpreter knows no layouts, no transposed references and no products whose left operand lies in registers.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.quant_matmul.fragment_codes import WORD_TILE, high_place, unpack_fragments
from pallas_kernels.registers import load_registers

ROWS = 64
"""The rows of a warp group's product."""
MAGIC = {"bfloat16": (0x4300, 128), "float16": (0x6400, 1024)}
"""Bits of a 16-bit float that is a whole number once a code is in its lowest bits, and that number without it."""
WIDEST_SWIZZLE = 128


def swizzled(row_bytes: int, item_bytes: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """How rows of so many bytes lie in shared memory, so that a column of them is read without conflicts."""
    swizzle = min(row_bytes, WIDEST_SWIZZLE)
    return plgpu.TilingTransform((8, swizzle // item_bytes)), plgpu.SwizzleTransform(swizzle)


@dataclasses.dataclass(frozen=True)
class WarpGroup:
    """One warp group.

    Attributes:
        interpret: whether it is interpreted.
    """

    interpret: bool

    def zeros(self, num_columns: int, dtype) -> jax.Array:
        """A sum to begin with, [64, columns]."""
        zeros = jnp.zeros((ROWS, num_columns), dtype)
        return zeros if self.interpret else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)

    def load(self, ref, layout: plgpu.Layout) -> jax.Array:
        """A matrix of shared memory."""
        return ref[...] if self.interpret else load_registers(ref, layout, is_optimized=True)

    def load_rows(self, ref) -> jax.Array:
        """A vector with an element for each row of a product, as float32."""
        values = ref[...] if self.interpret else load_registers(ref, plgpu.Layout.WGMMA.reduce(1))
        return values.astype(jnp.float32)

    def load_columns(self, ref) -> jax.Array:
        """A vector with an element for each column of a product, as float32."""
        values = ref[...] if self.interpret else load_registers(ref, plgpu.Layout.WGMMA.reduce(0))
        return values.astype(jnp.float32)

    def as_operand(self, matrix: jax.Array) -> jax.Array:
        """A matrix as the left operand of a product."""
        return matrix if self.interpret else plgpu.layout_cast(matrix, plgpu.Layout.WGMMA)

    def add_products(self, total: jax.Array, operands) -> jax.Array:
        """``total + sum(a @ b.T)`` of pairs (a in registers [64, k] or a reference to shared memory, reference b [columns, k])."""
        if self.interpret:
            for a, b_ref in operands:
                a, b = a if isinstance(a, jax.Array) else a[...], b_ref[...]
                a, b = (x.astype(total.dtype) for x in (a, b))
                total = total + jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
            return total

        def run(total_ref):
            for a, b_ref in operands:
                plgpu.wgmma(total_ref, a, b_ref.transpose((1, 0)))
        return pl.run_state(run)(plgpu.ACC.init(total))

    def store_transposed(self, value: jax.Array, ref) -> None:
        """Write [64, columns] to shared memory [columns, 64]."""
        if self.interpret:
            ref[...] = value.T
        else:
            ref.transpose((1, 0))[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)

    def unpack(self, words: jax.Array, high: jax.Array | None, bits: int, dtype) -> jax.Array:
        """``code + MAGIC`` as 16-bit floats of words of :mod:`.fragment_codes`, in the layout of a left operand."""
        bias_bits, bias = MAGIC[jnp.dtype(dtype).name]
        if self.interpret:
            return (unpack_fragments(words, high, bits) + bias).astype(dtype)
        shape, arrays = (ROWS, words.shape[1] * 8), (words,) if high is None else (words, high)

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,) * len(arrays), return_type=plgpu.ShapeDtypeStruct(shape, dtype, plgpu.Layout.WGMMA))
        def run(_, words, high=None):
            return _unpack_registers(words, high, bits, dtype, bias_bits)
        return run(*arrays)


def _unpack_registers(words, high, bits: int, dtype, bias_bits: int):
    """Unpack each thread's registers: pair after pair of codes is shifted to where a mask leaves it in two mantissas."""
    i32 = ir.IntegerType.get_signless(32)
    pair_type = ir.VectorType.get((2,), mgpu_utils.dtype_to_ir_type(dtype))
    layout, num_tiles = plgpu.Layout.WGMMA.to_mgpu(), words.shape[1] // WORD_TILE
    registers = np.empty(layout.registers_shape((ROWS, words.shape[1] * 8)), dtype=object)

    def constant(value: int):
        return arith.constant(i32, value)

    def twice(mask: int) -> int:
        return mask | mask << 16

    def shifted(word, places: int):
        if places == 0:
            return word
        return arith.shrui(word, constant(places)) if places > 0 else arith.shli(word, constant(-places))
    for tile in range(num_tiles):
        for half in range(2):
            place = (0, tile, 0, 0, half, 0, 0, 0, 0)
            for pair in range(8):
                word = vector.extract(words.registers[place], [], [pair // 4])
                found = arith.andi(shifted(word, 4 * (pair % 4)), constant(twice(15)))
                if high is not None:
                    high_tile, high_word, bit = high_place(bits, tile, pair)
                    high_word = vector.extract(high.registers[0, high_tile, 0, 0, half, 0, 0, 0, 0], [], [high_word])
                    found = arith.ori(found, arith.andi(shifted(high_word, bit - 4), constant(twice((2**bits - 1) & ~15))))
                found = arith.ori(found, constant(twice(bias_bits)))
                registers[0, tile * 8 + pair, 0, 0, half, 0, 0, 0, 0] = mgpu_utils.bitcast(found, pair_type)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
