"""The gated product of a TPU: both products share the activations they read, and only what the down projection multiplies is written."""
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_mlp.reference import Activation, gated
from pallas_kernels.precision import matmul_precision
from pallas_kernels.tiling import KIB, Device, choose_tiles

DTYPES = ("bfloat16",)
DIM_STEP = LANES = 128
ROW_STEP = 16
MAX_INPUTS = 2048
"""The most inputs of one step: the compiler unrolls it."""
SPARE = 2 * KIB**2
"""Bytes of vector memory left for the compiler's own use."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a step of the grid multiplies: rows of activations, outputs of both weights, and inputs."""

    rows: int
    outputs: int
    inputs: int


def candidates(num_rows: int, num_inputs: int, num_outputs: int) -> Iterator[Tiles]:
    """Tiles that divide the weights, the best known first: wide ones."""
    widest = pl.cdiv(num_rows, ROW_STEP) * ROW_STEP
    for rows, outputs in ((512, 512), (512, 256), (256, 512), (256, 256), (128, 256), (128, LANES)):
        for inputs in range(MAX_INPUTS, 0, -LANES):
            if num_inputs % inputs == 0 and num_outputs % outputs == 0:
                yield Tiles(min(rows, widest), outputs, inputs)


def on_chip_bytes(tiles: Tiles, itemsize: int) -> int:
    """Two buffers of each block, and float32 sums: what is kept, what a step adds, and what the activation makes of them."""
    blocks = tiles.rows * tiles.inputs + 2 * tiles.outputs * tiles.inputs + tiles.rows * tiles.outputs
    return 2 * itemsize * blocks + 5 * 4 * tiles.rows * tiles.outputs + SPARE


def gated_product(x_MD: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, biases: tuple[jax.Array | None, jax.Array | None], *,
                  activation: Activation, device: Device, interpret: bool) -> jax.Array:
    """[M, F] in the dtype of ``x_MD``; see ``gated_product_reference``."""
    (M, D), F = x_MD.shape, gate_FD.shape[0]
    needed = functools.partial(on_chip_bytes, itemsize=x_MD.dtype.itemsize)
    tiles = choose_tiles("gated_mlp", device, (pl.cdiv(M, ROW_STEP) * ROW_STEP, D, F, str(x_MD.dtype)), candidates(M, D, F), needed)
    weight_block = pl.BlockSpec((tiles.outputs, tiles.inputs), lambda m, f, k: (f, k))
    bias_block = pl.BlockSpec((1, tiles.outputs), lambda m, f, k: (0, f))
    own_biases = [bias[None] for bias in biases if bias is not None]
    num_steps = D // tiles.inputs
    sums = [] if num_steps == 1 else [pltpu.VMEM((tiles.rows, tiles.outputs), jnp.float32)] * 2
    body = functools.partial(_body, activation=activation, has_bias=tuple(bias is not None for bias in biases), num_steps=num_steps)
    return pl.pallas_call(
        body, out_shape=jax.ShapeDtypeStruct((M, F), x_MD.dtype), grid=(pl.cdiv(M, tiles.rows), F // tiles.outputs, num_steps),
        in_specs=[pl.BlockSpec((tiles.rows, tiles.inputs), lambda m, f, k: (m, k)), weight_block, weight_block, *[bias_block] * len(own_biases)],
        out_specs=pl.BlockSpec((tiles.rows, tiles.outputs), lambda m, f, k: (m, f)), scratch_shapes=sums, name="gated_product",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=needed(tiles)),
        interpret=pltpu.InterpretParams() if interpret else False)(x_MD, gate_FD, up_FD, *own_biases)


def _body(x_ref, gate_ref, up_ref, *refs, activation, has_bias, num_steps: int):
    *bias_refs, out_ref = refs[:1 + sum(has_bias)]
    sums_refs = refs[1 + sum(has_bias):]

    def product(weight_ref):
        return jax.lax.dot_general(x_ref[...], weight_ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32,
                                   precision=matmul_precision(x_ref.dtype))

    def finish(gate, up):
        own = list(bias_refs)
        gate, up = (total + own.pop(0)[...].astype(jnp.float32) if has else total for total, has in zip((gate, up), has_bias, strict=True))
        out_ref[...] = gated(gate, up, activation).astype(out_ref.dtype)
    if num_steps == 1:
        finish(product(gate_ref), product(up_ref))
        return

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref in sums_refs:
            ref[...] = jnp.zeros_like(ref)
    for ref, weight_ref in zip(sums_refs, (gate_ref, up_ref), strict=True):
        ref[...] += product(weight_ref)
    pl.when(pl.program_id(2) == num_steps - 1)(lambda: finish(*(ref[...] for ref in sums_refs)))
