"""The gated product of quantized weights on a Hopper GPU: the body of ``quant_matmul``'s, with two weights and an activation at its end."""
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_mlp.reference import Activation, gated
from pallas_kernels.interpreter import gpu_interpreter
from pallas_kernels.quant_matmul import gpu as quant_gpu
from pallas_kernels.quant_matmul import gpu_tiles
from pallas_kernels.quant_matmul.gpu_steps import add_weight_only
from pallas_kernels.quant_matmul.gpu_tiles import PROCESSORS, Problem, Tiles
from pallas_kernels.quant_matmul.packing import PackedArrays, WeightFormat
from pallas_kernels.quant_matmul.warp_group import ROWS, WarpGroup, swizzled
from pallas_kernels.tiling import Device, choose_tiles

FEW_ROWS = 32


def candidates(num_rows: int, num_outputs: int, num_inputs: int, weight_format: WeightFormat) -> Iterator[Tiles]:
    """Tiles for these shapes, the best known first: those that keep the processors evenly busy, with few rows. Warp groups have two sums of their
    rows in registers, so those are no more than 64."""
    found = gpu_tiles.candidates(min(num_rows, 64), num_outputs, num_inputs, weight_format)
    if found[0].rows > FEW_ROWS:
        return iter(found)

    def busy(tiles: Tiles) -> float:
        blocks = num_outputs // ROWS // tiles.warp_groups
        return blocks / (pl.cdiv(blocks, PROCESSORS) * PROCESSORS)
    return iter(sorted((tiles for tiles in found if tiles.warp_groups <= 2), key=lambda tiles: (-busy(tiles), -tiles.warp_groups, tiles.inputs)))


def on_chip_bytes(tiles: Tiles, weight_format: WeightFormat) -> int:
    """Shared memory of a block: that of two products, which share the activations."""
    return 2 * gpu_tiles.on_chip_bytes(tiles, weight_format) - 2 * tiles.steps * tiles.rows * tiles.inputs


def gated_product(x_MD: jax.Array, gate: PackedArrays, up: PackedArrays, biases: tuple[jax.Array | None, jax.Array | None], *,
                  activation: Activation, weight_format: WeightFormat, device: Device, interpret: bool) -> jax.Array:
    """[M, N] in the dtype of ``x_MD``, N and K as the weights are packed; see ``gated_product_reference``."""
    (M, K), N, f = x_MD.shape, weight_format.shape(gate.codes)[0], weight_format
    key = (M, N, K, f.bits, f.kind, f.group, f.mins, f.super_group, str(x_MD.dtype))
    tiles = choose_tiles("gated_mlp", device, key, candidates(M, N, K, f), functools.partial(on_chip_bytes, weight_format=f))
    padded = pl.cdiv(M, tiles.rows) * tiles.rows
    problem = Problem(f, padded, N, K, str(x_MD.dtype), str(x_MD.dtype), tiles, False, interpret)
    inputs = {"x": jnp.pad(x_MD, ((0, padded - M), (0, 0)))}
    for prefix, weight, bias in (("gate", gate, biases[0]), ("up", up, biases[1])):
        inputs |= {f"{prefix} {name}": array for name, array in _by_warp_group(weight, bias).items()}
    item_bytes = x_MD.dtype.itemsize
    out = plgpu.kernel(
        functools.partial(_body, problem=problem, names=tuple(inputs), activation=activation),
        out_type=jax.ShapeDtypeStruct((padded, N), x_MD.dtype),
        scratch_types={"out_smem": plgpu.SMEM((tiles.warp_groups, tiles.rows, ROWS), x_MD.dtype, transforms=swizzled(ROWS * item_bytes, item_bytes))},
        grid=(N // ROWS // tiles.warp_groups, padded // tiles.rows), grid_names=("outputs", "rows"), num_threads=tiles.warp_groups + 1,
        thread_name="warp_group", interpret=gpu_interpreter(interpret), kernel_name="gated_product",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane))(*inputs.values())
    return out[:M]


def _by_warp_group(weight: PackedArrays, bias: jax.Array | None) -> dict[str, jax.Array]:
    """What there is: [N, ...] as [N / 64, 64, ...], [groups, N] as [groups, N / 64, 64]."""
    num_groups = weight.codes.shape[0] // ROWS
    found = {name: array.reshape(num_groups, ROWS, -1) for name, array in (("codes", weight.codes), ("high", weight.high)) if array is not None}
    grouped = {name: array for name, array in weight._asdict().items() if name not in ("codes", "high")} | {"bias": bias}
    return found | {name: array.reshape(-1, num_groups, ROWS) for name, array in grouped.items() if array is not None}


def _body(*gmem, out_smem, problem: Problem, names: tuple[str, ...], activation: Activation):
    """One block: its warp groups run the pipeline over all inputs, and write their tile."""
    *inputs, out_gmem = gmem
    tiles, machine = problem.tiles, WarpGroup(problem.interpret)
    outputs, rows, warp_group = (jax.lax.axis_index(name) for name in ("outputs", "rows", "warp_group"))
    refs = dict(zip(names, inputs, strict=True))
    both = [{name.removeprefix(prefix): ref for name, ref in refs.items() if name.startswith(prefix)} for prefix in ("gate ", "up ")]
    piped, specs = quant_gpu.pipelined(problem, {"x": refs["x"], **both[0]}, rows, outputs, 0)
    piped_up, specs_up = quant_gpu.pipelined(problem, both[1], rows, outputs, 0)

    def step(_, *smem_and_sums):
        *smem, sums = smem_and_sums
        gate = dict(zip(piped, smem[:len(piped)], strict=True))
        up = {"x": gate["x"], **dict(zip(piped_up, smem[len(piped):], strict=True))}
        return tuple(add_weight_only(problem, machine, weight, warp_group, total) for total, weight in zip(sums, (gate, up), strict=True))

    def compute(run):
        mine = outputs * tiles.warp_groups + warp_group
        gate, up = (quant_gpu.finish(machine, total, {name: ref for name, ref in own.items() if name not in names_piped}, rows, mine)
                    for total, own, names_piped in zip(run((machine.zeros(tiles.rows, jnp.float32),) * 2), both, (piped, piped_up), strict=True))
        machine.store_transposed(gated(gate, up, activation).astype(out_smem.dtype), out_smem.at[warp_group])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[warp_group], out_gmem.at[pl.ds(rows * tiles.rows, tiles.rows), pl.ds(mine * ROWS, ROWS)])
        plgpu.wait_smem_to_gmem(0)
    plgpu.emit_pipeline_warp_specialized(
        step, grid=(problem.num_inputs // tiles.inputs,), in_specs=specs + specs_up, memory_registers=quant_gpu.MEMORY_REGISTERS,
        max_concurrent_steps=tiles.steps, wg_axis="warp_group", num_compute_wgs=tiles.warp_groups,
        compute_context=compute)(*piped.values(), *piped_up.values())
