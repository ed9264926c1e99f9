"""The gated product of a Hopper GPU in Mosaic GPU: both products share the activations that they read, and only their gated product is written.

Computed is its transpose: weights are the left operand of the tensor cores, of which a warp group multiplies 64 rows at a time, and activations the
right one, of which it takes 8 columns and up. So a few rows of activations cost no more than their weights' way to the chip.

Few rows: a block has one warp group, which starts copies some steps ahead of its products. Many: two multiply, and one more only copies.
"""
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_mlp.reference import Activation, gated
from pallas_kernels.interpreter import gpu_interpreter
from pallas_kernels.quant_matmul.warp_group import swizzled
from pallas_kernels.tiling import Device, choose_tiles

DTYPES = ("bfloat16", "float16")
DIM_STEP = GROUP_OUTPUTS = 64
"""Outputs of one warp group: the rows of the tensor cores' left operand; dims of weights are multiples of it."""
STEP_INPUTS = 64
"""Inputs of one step: 128 bytes, the widest swizzle."""
TRANSFORMS = swizzled(2 * STEP_INPUTS, 2)
MIN_ROWS = 8
FEW_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a block computes.

    Attributes:
        rows: of activations; a multiple of 8.
        num_groups: warp groups that multiply, each for 64 outputs; where there is more than one, one more copies.
        num_stages: steps that are in shared memory at a time.
    """

    rows: int
    num_groups: int
    num_stages: int


def candidates(num_rows: int, num_outputs: int) -> Iterator[Tiles]:
    """Tiles for so many rows of activations, the best known first."""
    padded = pl.cdiv(num_rows, MIN_ROWS) * MIN_ROWS
    if num_rows <= FEW_ROWS:
        yield from (Tiles(padded, 1, num_stages) for num_stages in (5, 8, 4, 3))
    elif num_outputs % (2 * GROUP_OUTPUTS) == 0:
        yield from (Tiles(rows, 2, num_stages) for rows in (128, 64) for num_stages in (4, 3))
    else:
        yield from (Tiles(rows, 1, num_stages) for rows in (128, 64) for num_stages in (4, 3))


def on_chip_bytes(tiles: Tiles) -> int:
    """The stages' activations and weights, what is written, and room for barriers and alignment."""
    outputs = tiles.num_groups * GROUP_OUTPUTS
    return 2 * (tiles.num_stages * STEP_INPUTS * (tiles.rows + 2 * outputs) + tiles.rows * outputs) + 4096


def gated_product(x_MD: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, biases: tuple[jax.Array | None, jax.Array | None], *,
                  activation: Activation, device: Device, interpret: bool) -> jax.Array:
    """[M, F] in the dtype of ``x_MD``; see ``gated_product_reference``."""
    (M, D), F = x_MD.shape, gate_FD.shape[0]
    tiles = choose_tiles("gated_mlp", device, (pl.cdiv(M, MIN_ROWS) * MIN_ROWS, D, F, str(x_MD.dtype)), candidates(M, F), on_chip_bytes)
    # Rows beyond the last TMA reads as zeros and does not write; but it counts in eights of them, or has fewer. The interpreter does neither.
    step = tiles.rows if interpret else MIN_ROWS if M > MIN_ROWS else 1
    padded = pl.cdiv(M, step) * step
    x_MD = jnp.pad(x_MD, ((0, padded - M), (0, 0)))
    num_blocks = pl.cdiv(M, tiles.rows) * (F // (tiles.num_groups * GROUP_OUTPUTS))
    scratch = {"out_smem": plgpu.SMEM((tiles.num_groups, tiles.rows, GROUP_OUTPUTS), x_MD.dtype, transforms=TRANSFORMS)}
    if interpret:
        scratch["sums"] = plgpu.SMEM((tiles.num_groups, 2, GROUP_OUTPUTS, tiles.rows), jnp.float32)
    body = functools.partial(_body, tiles=tiles, activation=activation, has_bias=tuple(bias is not None for bias in biases),
                             operations=Interpreted if interpret else Hopper)
    threads = {"num_threads": tiles.num_groups + 1, "thread_name": "group"} if tiles.num_groups > 1 else {}
    out_MF = plgpu.kernel(body, out_type=jax.ShapeDtypeStruct((padded, F), x_MD.dtype), scratch_types=scratch, grid=(num_blocks,),
                          grid_names=("block",), **threads, kernel_name="gated_product", interpret=gpu_interpreter(interpret),
                          compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup))(
        x_MD, gate_FD, up_FD, *(bias for bias in biases if bias is not None))
    return out_MF[:M]


def _body(x_gmem, gate_gmem, up_gmem, *refs, out_smem, sums=None, tiles: Tiles, activation, has_bias, operations):
    """One block: ``tiles.rows`` rows of activations and 64 outputs of each warp group."""
    *bias_refs, out_gmem = refs
    num_tiles = pl.cdiv(out_gmem.shape[0], tiles.rows), out_gmem.shape[1] // (tiles.num_groups * GROUP_OUTPUTS)
    row, output = plgpu.planar_snake(jax.lax.axis_index("block"), num_tiles, 0, 8)
    rows = pl.ds(row * tiles.rows, tiles.rows)
    group = jax.lax.axis_index("group") if tiles.num_groups > 1 else 0
    first = output * (tiles.num_groups * GROUP_OUTPUTS)
    outputs, own = pl.ds(first, tiles.num_groups * GROUP_OUTPUTS), pl.ds(group * GROUP_OUTPUTS, GROUP_OUTPUTS)

    both_sums = []

    def compute(run_pipeline):
        @functools.partial(operations.run_with_sums, (GROUP_OUTPUTS, tiles.rows), sums)
        def _(gate_sums, up_sums):
            both_sums.extend((gate_sums, up_sums))
            run_pipeline(0)
            finish(gate_sums[...], up_sums[...])

    def step(_, x_smem, gate_smem, up_smem, carry=0):
        for sums, smem in zip(both_sums, (gate_smem, up_smem), strict=True):
            operations.multiply(sums, smem.at[own], x_smem)
        plgpu.wgmma_wait(2)  # the step before is done: its stage may be filled again
        return carry

    def finish(gate, up):
        place = pl.ds(first + group * GROUP_OUTPUTS, GROUP_OUTPUTS)
        biases = list(bias_refs)
        gate, up = (product + jax.lax.broadcast_in_dim(biases.pop(0)[place].astype(jnp.float32), product.shape, (0,)) if has else product
                    for product, has in zip((gate, up), has_bias, strict=True))
        operations.store_transposed(out_smem.at[group], gated(gate, up, activation).astype(out_smem.dtype))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[group], out_gmem.at[rows, place])
        plgpu.wait_smem_to_gmem(0)
    _pipeline(step, compute, x_gmem.shape[1] // STEP_INPUTS, tiles)(x_gmem.at[rows], gate_gmem.at[outputs], up_gmem.at[outputs])


def _pipeline(step, compute, num_steps: int, tiles: Tiles):
    """A function of (activations, gate, up) that runs ``compute``, which runs ``step`` over all inputs."""
    def spec(height):
        return plgpu.BlockSpec((height, STEP_INPUTS), lambda k: (0, k), transforms=TRANSFORMS, delay_release=1, memory_space=plgpu.SMEM)
    weights = spec(tiles.num_groups * GROUP_OUTPUTS)
    how = {"grid": (num_steps,), "in_specs": [spec(tiles.rows), weights, weights], "max_concurrent_steps": tiles.num_stages}
    if tiles.num_groups > 1:
        return plgpu.emit_pipeline_warp_specialized(step, **how, wg_axis="group", num_compute_wgs=tiles.num_groups, memory_registers=40,
                                                    compute_context=compute)
    return lambda *refs: compute(lambda _: plgpu.emit_pipeline(step, **how)(*refs))


class Hopper:
    """What a warp group does."""

    @staticmethod
    def run_with_sums(shape, _, run):
        """Run with two accumulators."""
        pl.run_scoped(run, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))

    @staticmethod
    def multiply(sums, left_smem, right_smem):
        """Add left right.T"""
        plgpu.wgmma(sums, left_smem, right_smem.transpose((1, 0)))

    @staticmethod
    def store_transposed(smem, x):
        """Write x.T"""
        smem.transpose((1, 0))[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


class Interpreted:
    """The same for the interpreter, which knows no transposed references."""

    @staticmethod
    def run_with_sums(_, sums, run):
        """See :class:`Hopper`."""
        group = jax.lax.axis_index("group") if sums.shape[0] > 1 else 0
        sums[group] = jnp.zeros(sums.shape[1:], jnp.float32)
        run(sums.at[group, 0], sums.at[group, 1])

    @staticmethod
    def multiply(sums, left_smem, right_smem):
        """See :class:`Hopper`."""
        sums[...] += jax.lax.dot_general(left_smem[...], right_smem[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    @staticmethod
    def store_transposed(smem, x):
        """See :class:`Hopper`."""
        smem[...] = x.T
