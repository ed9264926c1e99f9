"""What the kernel in Mosaic GPU asks of a warp group, as the hardware does it and as the interpreter can.

The interpreter knows neither layouts of registers, nor a product whose left side lies in registers, nor accumulators with a first value.
"""
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.registers import load_registers


def pick(interpret: bool) -> type:
    """The operations of hardware or interpreter."""
    return Interpreted if interpret else Hopper


def tiled_smem(shape: tuple[int, ...], dtype):
    """Shared memory for matrices of ``shape[-2:]`` that tensor cores read: in swizzled tiles of 8 rows."""
    bits = jnp.finfo(dtype).bits
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Hopper:
    """Tensor cores, and arrays spread over a warp group's registers as these leave them."""

    MATRIX, ROWS, COLUMNS = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    @staticmethod
    def load(ref, index, layout):
        """What a reference holds."""
        return load_registers(ref.at[index], layout)

    @staticmethod
    def full(shape, value, layout):
        """An array of one value."""
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    @staticmethod
    def spread(x, shape, dim):
        """A vector along one dim of a matrix."""
        return lax.broadcast_in_dim(x, shape, (dim,))

    @staticmethod
    def product(left_smem, right_smem):
        """left right.T"""
        def run(acc_ref):
            plgpu.wgmma(acc_ref, left_smem, right_smem.transpose((1, 0)))
            return acc_ref[...]
        return pl.run_scoped(run, plgpu.ACC((left_smem.shape[0], right_smem.shape[0]), jnp.float32))

    @staticmethod
    def add_product(acc, left, right_smem):
        """acc + left right"""
        return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, left, right_smem))(plgpu.ACC.init(acc))

    @staticmethod
    def two_products(acc, left, right_smem, left_smem, next_smem, *, issued):
        """(acc + left right, left_smem next.T); ``issued`` is called as soon as both are on their way."""
        def run(refs):
            acc_ref, scores_ref = refs
            plgpu.wgmma(acc_ref, left, right_smem)
            plgpu.wgmma(scores_ref, left_smem, next_smem.transpose((1, 0)))
            issued()
        zeros = Hopper.full((left_smem.shape[0], next_smem.shape[0]), 0.0, Hopper.MATRIX)
        return pl.run_state(run)((plgpu.ACC.init(acc), plgpu.ACC.init(zeros)))


class Interpreted:
    """The same in plain ``jax.numpy``."""

    MATRIX = ROWS = COLUMNS = None

    @staticmethod
    def load(ref, index, layout):
        """See :class:`Hopper`."""
        return ref[index]

    @staticmethod
    def full(shape, value, layout):
        """See :class:`Hopper`."""
        return jnp.full(shape, value, jnp.float32)

    spread = Hopper.spread

    @staticmethod
    def product(left_smem, right_smem):
        """See :class:`Hopper`."""
        return lax.dot_general(left_smem[...], right_smem[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    @staticmethod
    def add_product(acc, left, right_smem):
        """See :class:`Hopper`."""
        return acc + jnp.dot(left, right_smem[...], preferred_element_type=jnp.float32)

    @staticmethod
    def two_products(acc, left, right_smem, left_smem, next_smem, *, issued):
        """See :class:`Hopper`."""
        out = Interpreted.add_product(acc, left, right_smem), Interpreted.product(left_smem, next_smem)
        issued()
        return out
