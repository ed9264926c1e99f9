"""Products of activations and quantized weights on a Hopper GPU.

Computed is y^T = w x^T: the weight is the left operand, 64 outputs a warp group, and activations are the right one, as narrow as 8 rows. A warp group
of its own reads ahead from main memory. Scales of whole outputs and of rows are applied to the sum.

K is cut into parts by N and K alone, and each part is summed in order, so that a row's result does not depend on how many rows there are: for few
rows by blocks of their own, whose sums are then added up; for many one after the other.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.interpreter import gpu_interpreter
from pallas_kernels.quant_matmul.gpu_steps import add_eight_bit, add_weight_only
from pallas_kernels.quant_matmul.gpu_tiles import Problem, candidates, on_chip_bytes
from pallas_kernels.quant_matmul.packing import PackedArrays, WeightFormat
from pallas_kernels.quant_matmul.warp_group import ROWS, WarpGroup, swizzled
from pallas_kernels.tiling import Device, choose_tiles

MEMORY_REGISTERS = 40


def gpu_matmul(x_MK: jax.Array, row_scales_MB: jax.Array | None, arrays: PackedArrays, weight_format: WeightFormat, bias_N: jax.Array | None, *,
               out_dtype, device: Device, interpret: bool) -> jax.Array:
    """[M, N] of activations [M, K] of bfloat16 or float16, or of their codes and scales [M, 1 or groups]; N and K as they are packed."""
    (M, K), N, f = x_MK.shape, weight_format.shape(arrays.codes)[0], weight_format
    key = (M, N, K, f.bits, f.kind, f.group, f.mins, f.super_group, f.activations, str(x_MK.dtype))
    tiles = choose_tiles("quant_matmul", device, key, candidates(M, N, K, f), functools.partial(on_chip_bytes, weight_format=f))
    num_rows = pl.cdiv(M, tiles.rows) * tiles.rows
    problem = Problem(f, num_rows, N, K, str(x_MK.dtype), jnp.dtype(out_dtype).name, tiles, bias_N is not None, interpret)
    if num_rows > M:
        x_MK, row_scales_MB = (None if x is None else jnp.pad(x, ((0, num_rows - M), (0, 0))) for x in (x_MK, row_scales_MB))
    y_MN = _run(problem, x_MK, row_scales_MB, arrays, bias_N)
    if not problem.has_partial_sums:
        return y_MN[0, :M]
    sums_MN = functools.reduce(jnp.add, [y_MN[part] for part in range(problem.num_parts)]).astype(jnp.float32)
    if not f.group:
        sums_MN = sums_MN if row_scales_MB is None else sums_MN * row_scales_MB
        sums_MN = sums_MN * arrays.scales[0].astype(jnp.float32)
    return (sums_MN if bias_N is None else sums_MN + bias_N.astype(jnp.float32))[:M].astype(out_dtype)


def _run(problem: Problem, x_MK, row_scales_MB, arrays: PackedArrays, bias_N) -> jax.Array:
    """[parts, M, N]: sums of parts of K, or the result."""
    tiles, num_groups = problem.tiles, problem.num_outputs // ROWS
    inputs = {"x": x_MK, "codes": arrays.codes.reshape(num_groups, ROWS, -1)}
    if arrays.high is not None:
        inputs["high"] = arrays.high.reshape(num_groups, ROWS, -1)
    vectors = {name: array for name, array in arrays._asdict().items() if name not in ("codes", "high")} | {"bias": bias_N}
    inputs |= {name: array.reshape(-1, num_groups, ROWS) for name, array in vectors.items() if array is not None}
    if row_scales_MB is not None:
        inputs["row_scales"] = row_scales_MB.T.reshape(-1, problem.num_rows // tiles.rows, tiles.rows)
    out_dtype = jnp.dtype(problem.sum_dtype if problem.has_partial_sums else problem.out_dtype)
    parts = problem.num_parts if problem.has_partial_sums else 1
    return plgpu.kernel(
        functools.partial(_body, problem=problem, names=tuple(inputs)),
        out_type=jax.ShapeDtypeStruct((parts, problem.num_rows, problem.num_outputs), out_dtype),
        scratch_types={"out_smem": plgpu.SMEM((tiles.warp_groups, tiles.rows, ROWS), out_dtype,
                                              transforms=swizzled(ROWS * out_dtype.itemsize, out_dtype.itemsize))},
        grid=(num_groups // tiles.warp_groups, problem.num_rows // tiles.rows, parts), grid_names=("outputs", "rows", "part"),
        num_threads=tiles.warp_groups + 1, thread_name="warp_group", interpret=gpu_interpreter(problem.interpret), kernel_name="quant_matmul",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane))(*inputs.values())


def _body(*gmem, out_smem, problem: Problem, names: tuple[str, ...]):
    """One block: its warp groups run the pipeline over one part of K or all of it, and write their tile of y."""
    *inputs, out_gmem = gmem
    refs, tiles, machine = dict(zip(names, inputs, strict=True)), problem.tiles, WarpGroup(problem.interpret)
    outputs, rows, part, warp_group = (jax.lax.axis_index(name) for name in ("outputs", "rows", "part", "warp_group"))
    steps = problem.num_inputs // tiles.inputs // (problem.num_parts if problem.has_partial_sums else 1)
    piped, specs = pipelined(problem, refs, rows, outputs, part * steps)
    in_turn, piped_names = problem.parts_in_turn, tuple(piped)
    advance = add_weight_only if problem.format.activations == "float" else add_eight_bit

    def step(indices, *smem_and_carry):
        *smem, (done, total) = smem_and_carry
        total = advance(problem, machine, dict(zip(piped_names, smem, strict=True)), warp_group, total)
        if in_turn == 1:
            return done, total
        is_last = (indices[0] + 1) % (steps // in_turn) == 0
        return jax.lax.cond(is_last, lambda: (done + total, machine.zeros(tiles.rows, jnp.float32)), lambda: (done, total))

    def compute(run):
        done = machine.zeros(tiles.rows, jnp.float32) if in_turn > 1 else jnp.float32(0)
        done, total = run((done, machine.zeros(tiles.rows, problem.sum_dtype)))
        total, mine = total if in_turn == 1 else done, outputs * tiles.warp_groups + warp_group
        if not problem.has_partial_sums:
            total = finish(machine, total.astype(jnp.float32), {name: ref for name, ref in refs.items() if name not in piped}, rows, mine)
        machine.store_transposed(total.astype(out_smem.dtype), out_smem.at[warp_group])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[warp_group], out_gmem.at[part, pl.ds(rows * tiles.rows, tiles.rows), pl.ds(mine * ROWS, ROWS)])
        plgpu.wait_smem_to_gmem(0)
    plgpu.emit_pipeline_warp_specialized(
        step, grid=(steps,), in_specs=specs, memory_registers=MEMORY_REGISTERS, max_concurrent_steps=tiles.steps, wg_axis="warp_group",
        num_compute_wgs=tiles.warp_groups, compute_context=compute)(*piped.values())


def finish(machine: WarpGroup, total, refs, rows, mine):
    """Scales of rows and outputs, and the bias."""
    if "row_scales" in refs:
        total = total * jax.lax.broadcast_in_dim(machine.load_columns(refs["row_scales"].at[0, rows]), total.shape, (1,))
    for name, apply in (("scales", jnp.multiply), ("bias", jnp.add)):
        if name in refs:
            total = apply(total, jax.lax.broadcast_in_dim(machine.load_rows(refs[name].at[0, mine]), total.shape, (0,)))
    return total


def pipelined(problem: Problem, refs, rows, outputs, first_step):
    """(references by name, their block specs) of what each step needs."""
    f, tiles, piped, specs = problem.format, problem.tiles, {}, []
    groups = {"scales": f.group, "mins": f.group, "super_scales": f.super_group, "super_mins": f.super_group, "row_scales": f.group}
    my_groups = pl.ds(outputs * tiles.warp_groups, tiles.warp_groups)
    for name, ref in refs.items():
        item_bytes = jnp.dtype(ref.dtype).itemsize
        if name == "x":
            piped[name] = ref.at[pl.ds(rows * tiles.rows, tiles.rows)]
            specs.append(plgpu.BlockSpec((tiles.rows, tiles.inputs), lambda k: (0, first_step + k),
                                         transforms=swizzled(problem.slice_width * item_bytes, item_bytes)))
        elif name in ("codes", "high"):
            width = ref.shape[2] * tiles.inputs // problem.num_inputs
            piped[name] = ref.at[my_groups]
            specs.append(plgpu.BlockSpec((tiles.warp_groups, ROWS, width), lambda k: (0, 0, first_step + k),
                                         transforms=swizzled(width * item_bytes, item_bytes)))
        elif groups.get(name):
            count, steps = pl.cdiv(tiles.inputs, groups[name]), max(1, groups[name] // tiles.inputs)
            piped[name] = ref.at[:, rows] if name == "row_scales" else ref.at[:, my_groups]
            block, zeros = ((count, tiles.rows), (0,)) if name == "row_scales" else ((count, tiles.warp_groups, ROWS), (0, 0))
            specs.append(plgpu.BlockSpec(block, lambda k, steps=steps, zeros=zeros: ((first_step + k) // steps, *zeros)))
    return piped, specs
