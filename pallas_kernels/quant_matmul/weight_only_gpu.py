"""Products of float activations and quantized weights on a Hopper GPU.

Computed is y^T = w x^T, so that the weight is the left operand, which wgmma takes from registers: a warp group has 64 outputs, unpacks their codes,
applies the scales of groups and multiplies. Scales of whole outputs are applied to the sum. Activations are the right operand, as narrow as 8 rows.

K is cut into parts by N and K alone, and each part is summed in order, so that a row's result does not depend on how many rows there are: for few rows
by blocks of their own, whose sums are then added up; for many one after the other.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.interpreter import gpu_interpreter
from pallas_kernels.quant_matmul.packing import PackedArrays, WeightFormat
from pallas_kernels.quant_matmul.warp_group import MAGIC, ROWS, WarpGroup, swizzled
from pallas_kernels.tiling import Device, choose_tiles

MEMORY_REGISTERS = 40
WIDEST_SLICE = 64
SPLIT_INPUTS = 512
WARP_GROUPS_WANTED = 256
"""Warp groups for which K is cut, into parts of at least SPLIT_INPUTS: about two for each of the device's 132 processors."""
SPLIT_ROWS = 32
"""Up to so many rows the parts of K run side by side."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a block works on.

    Attributes:
        rows: of activations: 8, 16, 32, 64, 128 or 256.
        warp_groups: that multiply, each 64 outputs.
        inputs: of one step: 128 or 256.
        steps: that are on the way from main memory.
    """

    rows: int
    warp_groups: int
    inputs: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that the kernel is specialized for."""

    format: WeightFormat
    num_rows: int
    num_outputs: int
    num_inputs: int
    dtype: str
    out_dtype: str
    tiles: Tiles
    has_bias: bool
    interpret: bool

    @property
    def num_parts(self) -> int:
        return num_parts(self.num_outputs, self.num_inputs, self.format)

    @property
    def has_partial_sums(self) -> bool:
        """Whether blocks write sums of parts of K, and not results."""
        return self.num_parts > 1 and self.tiles.rows <= SPLIT_ROWS

    @property
    def slice_width(self) -> int:
        """Inputs that have one scale, and are multiplied together."""
        return min(self.format.group or WIDEST_SLICE, WIDEST_SLICE)

    @property
    def code_scale(self) -> bool:
        """Whether scales are applied to codes, and not to sums."""
        return self.format.group > 0


def num_parts(num_outputs: int, num_inputs: int, weight_format: WeightFormat) -> int:
    """Into how many parts K is cut."""
    parts, block = 1, max(256, weight_format.block)
    while num_outputs // ROWS * parts < WARP_GROUPS_WANTED and num_inputs % (2 * parts * block) == 0 and num_inputs // (2 * parts) >= SPLIT_INPUTS:
        parts *= 2
    return parts


def candidates(num_rows: int, num_outputs: int, num_inputs: int, weight_format: WeightFormat) -> list[Tiles]:
    """Tiles for these shapes, the best known first."""
    rows = next((rows for rows in (8, 16, 32, 64) if num_rows <= rows), 128)
    row_choices = (rows,) if rows <= 64 else (128, 256, 64)
    part, block = num_inputs // num_parts(num_outputs, num_inputs, weight_format), weight_format.block
    found = [Tiles(rows, warp_groups, inputs, steps) for rows in row_choices for warp_groups in ((1, 2) if rows <= SPLIT_ROWS else (2, 1))
             for inputs in ((256, 128) if rows <= SPLIT_ROWS else (128, 256)) for steps in ((4, 6, 3) if rows <= SPLIT_ROWS else (4, 3, 2))]
    return [tiles for tiles in found if num_outputs % (ROWS * tiles.warp_groups) == 0 and part % tiles.inputs == 0 and tiles.inputs % block == 0]


def on_chip_bytes(tiles: Tiles, weight_format: WeightFormat) -> int:
    """Shared memory of a block."""
    f, outputs = weight_format, tiles.warp_groups * ROWS
    codes = tiles.inputs * outputs * f.bits // 8
    groups = tiles.inputs // f.group if f.group else 0
    supers = tiles.inputs // f.super_group if f.super_group else 0
    scales = outputs * (1 if f.mins == "none" else 2) * ((groups + 2 * supers) if supers else 4 * groups)
    return tiles.steps * (codes + scales + 2 * tiles.rows * tiles.inputs) + 4 * tiles.rows * outputs + 4096


def weight_only_matmul(x_MK: jax.Array, arrays: PackedArrays, weight_format: WeightFormat, bias_N: jax.Array | None, *, out_dtype, device: Device,
                       interpret: bool) -> jax.Array:
    """[M, N] of activations [M, K] of bfloat16 or float16, N and K as they are packed."""
    (M, K), N, f = x_MK.shape, weight_format.shape(arrays.codes)[0], weight_format
    key = (M, N, K, f.bits, f.kind, f.group, f.mins, f.super_group, str(x_MK.dtype))
    tiles = choose_tiles("quant_matmul", device, key, candidates(M, N, K, f), functools.partial(on_chip_bytes, weight_format=f))
    problem = Problem(f, pl.cdiv(M, tiles.rows) * tiles.rows, N, K, str(x_MK.dtype), jnp.dtype(out_dtype).name, tiles, bias_N is not None, interpret)
    x_MK = jnp.pad(x_MK, ((0, problem.num_rows - M), (0, 0))) if problem.num_rows > M else x_MK
    y_MN = _run(problem, x_MK, arrays, bias_N)
    if problem.has_partial_sums:
        sums_MN = functools.reduce(jnp.add, [y_MN[part] for part in range(problem.num_parts)])
        sums_MN = sums_MN if problem.code_scale else sums_MN * arrays.scales[0].astype(jnp.float32)
        sums_MN = sums_MN if bias_N is None else sums_MN + bias_N.astype(jnp.float32)
        return sums_MN[:M].astype(out_dtype)
    return y_MN[0, :M]


def _run(problem: Problem, x_MK, arrays: PackedArrays, bias_N) -> jax.Array:
    tiles, groups_of_rows = problem.tiles, problem.num_outputs // ROWS

    def by_warp_group(array):
        """[N, ...] as [N / 64, 64, ...], [groups, N] as [groups, N / 64, 64]."""
        return array.reshape(groups_of_rows, ROWS, -1)
    inputs = {"x": x_MK, "codes": by_warp_group(arrays.codes)}
    if arrays.high is not None:
        inputs["high"] = by_warp_group(arrays.high)
    for name in ("scales", "mins", "super_scales", "super_mins"):
        if (array := getattr(arrays, name)) is not None:
            inputs[name] = array.reshape(-1, groups_of_rows, ROWS)
    if problem.has_bias:
        inputs["bias"] = bias_N.reshape(-1, groups_of_rows, ROWS)
    out_dtype = jnp.float32 if problem.has_partial_sums else problem.out_dtype
    parts = problem.num_parts if problem.has_partial_sums else 1
    item_bytes = jnp.dtype(out_dtype).itemsize
    return plgpu.kernel(
        functools.partial(_body, problem=problem, names=tuple(inputs)),
        out_type=jax.ShapeDtypeStruct((parts, problem.num_rows, problem.num_outputs), out_dtype),
        scratch_types={"out_smem": plgpu.SMEM((tiles.warp_groups, tiles.rows, ROWS), out_dtype, transforms=swizzled(ROWS * item_bytes, item_bytes))},
        grid=(groups_of_rows // tiles.warp_groups, problem.num_rows // tiles.rows, parts), grid_names=("outputs", "rows", "part"),
        num_threads=tiles.warp_groups + 1, thread_name="warp_group", interpret=gpu_interpreter(problem.interpret), kernel_name="quant_matmul",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane))(*inputs.values())


def _body(*gmem, out_smem, problem: Problem, names: tuple[str, ...]):
    """One block: its warp groups run the pipeline over one part of K or all of it, and write their tile of y."""
    *inputs, out_gmem = gmem
    refs, tiles, machine = dict(zip(names, inputs, strict=True)), problem.tiles, WarpGroup(problem.interpret)
    outputs, rows, part = (jax.lax.axis_index(name) for name in ("outputs", "rows", "part"))
    warp_group = jax.lax.axis_index("warp_group")
    parts_here = 1 if problem.has_partial_sums else problem.num_parts
    steps = problem.num_inputs // problem.num_parts // tiles.inputs
    piped, specs = _pipelined(problem, refs, rows, outputs, part * steps)
    pipelined_names = tuple(piped)

    def step(indices, *smem_and_carry):
        *smem, (done, total) = smem_and_carry
        smem = dict(zip(pipelined_names, smem, strict=True))
        total = machine.add_products(total, _operands(problem, machine, smem, warp_group))
        if parts_here == 1:
            return done, total
        return jax.lax.cond((indices[0] + 1) % steps == 0, lambda: (done + total, machine.zeros(tiles.rows)), lambda: (done, total))

    def compute(run):
        done = machine.zeros(tiles.rows) if parts_here > 1 else jnp.float32(0)
        done, total = run((done, machine.zeros(tiles.rows)))
        total = total if parts_here == 1 else done
        if not problem.has_partial_sums:
            mine = outputs * tiles.warp_groups + warp_group
            for name, apply in (("scales", jnp.multiply), ("bias", jnp.add)):
                if name in refs and name not in piped:
                    values = machine.load_rows(refs[name].at[0, mine])
                    total = apply(total, jax.lax.broadcast_in_dim(values, total.shape, (0,)))
        machine.store_transposed(total.astype(out_smem.dtype), out_smem.at[warp_group])
        plgpu.commit_smem()
        first = (outputs * tiles.warp_groups + warp_group) * ROWS
        plgpu.copy_smem_to_gmem(out_smem.at[warp_group], out_gmem.at[part, pl.ds(rows * tiles.rows, tiles.rows), pl.ds(first, ROWS)])
        plgpu.wait_smem_to_gmem(0)
    plgpu.emit_pipeline_warp_specialized(
        step, grid=(steps * parts_here,), in_specs=specs, memory_registers=MEMORY_REGISTERS, max_concurrent_steps=tiles.steps, wg_axis="warp_group",
        num_compute_wgs=tiles.warp_groups, compute_context=compute)(*piped.values())


def _pipelined(problem: Problem, refs, rows, outputs, first_step):
    """(references by name, their block specs) of what each step needs."""
    f, tiles, piped, specs = problem.format, problem.tiles, {}, []
    groups = {"scales": f.group, "mins": f.group, "super_scales": f.super_group, "super_mins": f.super_group}
    my_groups = pl.ds(outputs * tiles.warp_groups, tiles.warp_groups)
    for name, ref in refs.items():
        if name == "x":
            item_bytes = jnp.dtype(problem.dtype).itemsize
            piped[name] = ref.at[pl.ds(rows * tiles.rows, tiles.rows)]
            specs.append(plgpu.BlockSpec((tiles.rows, tiles.inputs), lambda k: (0, first_step + k),
                                         transforms=swizzled(problem.slice_width * item_bytes, item_bytes)))
        elif name in ("codes", "high"):
            width = ref.shape[2] * tiles.inputs // problem.num_inputs
            item_bytes = jnp.dtype(ref.dtype).itemsize
            piped[name] = ref.at[my_groups]
            specs.append(plgpu.BlockSpec((tiles.warp_groups, ROWS, width), lambda k: (0, 0, first_step + k),
                                         transforms=swizzled(width * item_bytes, item_bytes)))
        elif groups.get(name):
            piped[name] = ref.at[:, my_groups]
            specs.append(plgpu.BlockSpec((tiles.inputs // groups[name], tiles.warp_groups, ROWS), lambda k: (first_step + k, 0, 0)))
    return piped, specs


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
    scales = [_scale_and_min(problem, machine, smem, warp_group, group) for group in range(problem.tiles.inputs // f.group if f.group else 0)]
    for first in range(0, problem.tiles.inputs, width):
        weight = values[:, first:first + width]
        if scales:
            for values_N, apply in zip(scales[first // f.group], (jnp.multiply, jnp.add), strict=True):
                if values_N is not None:
                    weight = apply(weight, jax.lax.broadcast_in_dim(values_N.astype(dtype), weight.shape, (0,)))
        yield weight, smem["x"].at[:, first:first + width]


def _scale_and_min(problem: Problem, machine: WarpGroup, smem, warp_group, group: int):
    """Of a step's group, float32 [64]; None for a min that there is not."""
    f = problem.format

    def load(name: str, index: int):
        return machine.load_rows(smem[name].at[index, warp_group])
    scale = load("scales", group)
    super_group = group * f.group // f.super_group if f.super_group else 0
    scale = scale * load("super_scales", super_group) if f.super_group else scale
    if f.mins == "none":
        return scale, None
    smallest = load("mins", group)
    if f.mins == "super":
        return scale, -(smallest * load("super_mins", super_group))
    return scale, -(scale * smallest) if f.mins == "zeros" else smallest
