"""One step of a product of float activations and quantized weights on a Hopper GPU.

A warp group unpacks the codes of its 64 outputs, applies the scales of groups, and multiplies: wgmma takes its left operand from registers.
"""
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quant_matmul.gpu_tiles import Problem
from pallas_kernels.quant_matmul.warp_group import MAGIC, WarpGroup


def advance(problem: Problem, machine: WarpGroup, smem, warp_group, total):
    """``total`` [64, rows] and the products of one step's inputs."""
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
