"""The gated product of quantized weights on a TPU: a tile of both is dequantized into vector memory once, for all rows of activations."""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_mlp.reference import Activation, gated
from pallas_kernels.quant_matmul import tpu as quant_tpu
from pallas_kernels.quant_matmul.packing import PackedArrays, WeightFormat
from pallas_kernels.quant_matmul.tpu import Tiles, candidates
from pallas_kernels.tiling import Device, choose_tiles


def on_chip_bytes(tiles: Tiles, *, num_inputs: int, weight_format: WeightFormat, item_bytes: int) -> int:
    """Vector memory: that of two products."""
    return 2 * quant_tpu.on_chip_bytes(tiles, num_inputs=num_inputs, weight_format=weight_format, item_bytes=item_bytes)


def gated_product(x_MD: jax.Array, gate: PackedArrays, up: PackedArrays, biases: tuple[jax.Array | None, jax.Array | None], *,
                  activation: Activation, weight_format: WeightFormat, device: Device, interpret: bool) -> jax.Array:
    """[M, N] in the dtype of ``x_MD``, N and K as the weights are packed; see ``gated_product_reference``."""
    (M, K), N, f = x_MD.shape, weight_format.shape(gate.codes)[0], weight_format
    needed = functools.partial(on_chip_bytes, num_inputs=K, weight_format=f, item_bytes=x_MD.dtype.itemsize)
    key = (M, N, K, f.bits, f.kind, f.group, f.mins, f.super_group, str(x_MD.dtype))
    tiles = choose_tiles("gated_mlp", device, key, candidates(M, N), needed)
    padded = pl.cdiv(M, tiles.rows) * tiles.rows
    arrays = {"x": jnp.pad(x_MD, ((0, padded - M), (0, 0)))}
    for prefix, weight, bias in (("gate", gate, biases[0]), ("up", up, biases[1])):
        own = {**weight._asdict(), "bias": None if bias is None else bias[None]}
        arrays |= {f"{prefix} {name}": jax.lax.bitcast_convert_type(array, jnp.int16) if array.dtype == jnp.float16 else array
                   for name, array in own.items() if array is not None}  # a TPU loads no float16
    blocks = [pl.BlockSpec((tiles.rows, K), lambda n, m: (m, 0)) if name == "x" else
              pl.BlockSpec((array.shape[0], tiles.outputs), lambda n, m: (0, n)) for name, array in arrays.items()]
    scales = pltpu.VMEM((K // f.group if f.group else 1, tiles.outputs), jnp.float32)
    out_MN = pl.pallas_call(
        functools.partial(_body, names=tuple(arrays), weight_format=f, activation=activation), name="gated_product",
        out_shape=jax.ShapeDtypeStruct((padded, N), x_MD.dtype), grid=(N // tiles.outputs, padded // tiles.rows), in_specs=blocks,
        out_specs=pl.BlockSpec((tiles.rows, tiles.outputs), lambda n, m: (m, n)),
        scratch_shapes=[*[pltpu.VMEM((K, tiles.outputs), jnp.bfloat16)] * 2, scales, scales],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=needed(tiles) + quant_tpu.MARGIN_BYTES),
        interpret=pltpu.InterpretParams() if interpret else False)(*arrays.values())
    return out_MN[:M]


def _body(*refs, names: tuple[str, ...], weight_format: WeightFormat, activation: Activation):
    inputs, (out_ref, *weight_refs, scales_ref, mins_ref) = dict(zip(names, refs, strict=False)), refs[len(names):]
    both = [{name.removeprefix(prefix): ref for name, ref in inputs.items() if name.startswith(prefix)} for prefix in ("gate ", "up ")]

    @pl.when(pl.program_id(1) == 0)
    def _():
        for own, weight_ref in zip(both, weight_refs, strict=True):
            quant_tpu.dequantize(own, weight_ref, scales_ref, mins_ref, weight_format)

    def product(own, weight_ref):
        y = quant_tpu.product(inputs["x"], weight_ref, out_ref.shape, jnp.float32)
        y = y if weight_format.group else y * quant_tpu.as_float(own["scales"][...])
        return y + quant_tpu.as_float(own["bias"][...]) if "bias" in own else y
    out_ref[...] = gated(*map(product, both, weight_refs), activation).astype(out_ref.dtype)
