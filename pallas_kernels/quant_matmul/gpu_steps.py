"""One step of a product on a Hopper GPU: ``total`` [64, rows] and the products of the step's inputs.

Of float activations and quantized weights: a warp group unpacks the codes of its 64 outputs, applies the scales of groups, and multiplies: wgmma
takes its left operand from registers.

Of 8-bit activations and 8-bit weights: wgmma takes both from shared memory. Tensor cores add products of fp8 with fewer bits than float32 has
(DeepSeek-V3, arXiv:2412.19437, section 3.3.2). So the products of 128 inputs are summed there, and these sums in float32; scales of groups of 128 are
applied between.
"""
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quant_matmul.byte_codes import BLOCK
from pallas_kernels.quant_matmul.gpu_tiles import Problem
from pallas_kernels.quant_matmul.warp_group import MAGIC, WarpGroup


def add_weight_only(problem: Problem, machine: WarpGroup, smem, warp_group, total):
    """A step of float activations."""
    return machine.add_products(total, _operands(problem, machine, smem, warp_group))


def _operands(problem: Problem, machine: WarpGroup, smem, warp_group):
    """Pairs (weights [64, inputs], activations [rows, inputs]) of one step."""
    f, dtype, width = problem.format, jnp.dtype(problem.dtype), problem.slice_width
    if f.bits == 8:
        codes = machine.load(smem["codes"].at[warp_group], plgpu.Layout.WGMMA_UPCAST_2X)
        codes = codes.astype(jnp.float32) if f.kind != "int" else codes
        values, bias = machine.as_operand(codes.astype(dtype)), 0
    else:
        words = (machine.load(smem[name].at[warp_group], plgpu.Layout.WGMMA) for name in ("codes", "high") if name in smem)
        words, high = (*words, None)[:2]
        values, bias = machine.unpack(words, high, f.bits, dtype), MAGIC[dtype.name][1]
    values = values - dtype.type(bias + f.zero) if bias + f.zero else values
    groups = [_scale_and_min(problem, machine, smem, warp_group, group) for group in range(pl.cdiv(problem.tiles.inputs, f.group) if f.group else 0)]
    for first in range(0, problem.tiles.inputs, width):
        weight = values[:, first:first + width]
        for values_N, apply in groups[first // f.group] if groups else ():
            weight = apply(weight, jax.lax.broadcast_in_dim(values_N.astype(dtype), weight.shape, (0,)))
        yield weight, smem["x"].at[:, first:first + width]


def _scale_and_min(problem: Problem, machine: WarpGroup, smem, warp_group, group: int):
    """What is done to a group's codes: pairs (float32 [64], operation)."""
    f = problem.format

    def load(name: str, index: int):
        return machine.load_rows(smem[name].at[index, warp_group])
    scale = load("scales", group)
    super_group = group * f.group // f.super_group if f.super_group else 0
    scale = scale * load("super_scales", super_group) if f.super_group else scale
    if f.mins == "none":
        return [(scale, jnp.multiply)]
    smallest = load("mins", group)
    if f.mins == "zeros":
        return [(smallest, jnp.subtract), (scale, jnp.multiply)]
    return [(scale, jnp.multiply), (smallest, jnp.add) if f.mins == "float" else (smallest * load("super_mins", super_group), jnp.subtract)]


def add_eight_bit(problem: Problem, machine: WarpGroup, smem, warp_group, total):
    """A step of 8-bit activations."""
    codes, x = smem["codes"].at[warp_group], smem["x"]
    if problem.format.activations == "int8":
        return machine.add_products(total, [(codes, x)])
    for block in range(problem.tiles.inputs // BLOCK):
        some = slice(block * BLOCK, (block + 1) * BLOCK)
        part = machine.add_products(machine.zeros(problem.tiles.rows, problem.sum_dtype), [(codes.at[:, some], x.at[:, some])])
        if problem.format.group:
            part = part * jax.lax.broadcast_in_dim(machine.load_columns(smem["row_scales"].at[block]), part.shape, (1,))
            part = part * jax.lax.broadcast_in_dim(machine.load_rows(smem["scales"].at[block, warp_group]), part.shape, (0,))
        total = total + part
    return total
