"""One step of a product of 8-bit activations and 8-bit weights on a Hopper GPU: wgmma takes both from shared memory.

Tensor cores add products of fp8 with fewer bits than float32 has (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). So the products of 128 inputs are
summed there, and these sums in float32; scales of groups of 128 are applied between.
"""
import jax

from pallas_kernels.quant_matmul.byte_codes import BLOCK
from pallas_kernels.quant_matmul.gpu_tiles import Problem
from pallas_kernels.quant_matmul.warp_group import WarpGroup


def advance(problem: Problem, machine: WarpGroup, smem, warp_group, total):
    """``total`` [64, rows] and the products of one step's inputs."""
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
