"""bitsandbytes, transformers' 8-bit floats, and AWQ and GPTQ, against what their own libraries or definitions make of a file."""
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle extra brings torch")
pytestmark = pytest.mark.oracle
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="the oracle extra brings bitsandbytes")


@pytest.fixture(scope="module")
def float8():
    return pytest.importorskip("transformers.integrations.finegrained_fp8", reason="the oracle extra brings transformers")


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(24, 96) * torch.rand(24, 1)


def to_numpy(tensor) -> np.ndarray:
    import ml_dtypes
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_matrices_of_bitsandbytes(bitsandbytes, write_module, read, kind, block, is_nested, storage):
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(block))
    quantized, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=is_nested,
                                                             quant_storage=storage)
    parts = {"weight": to_numpy(quantized), **{f"weight.{name}": to_numpy(value) for name, value in state.as_dict(packed=True).items()}}
    found = write_module(parts, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}, module=NAME)
    matrix = found.find(f"{NAME}.weight", tuple(weight.shape))
    assert matrix.scheme is None
    np.testing.assert_array_equal(read(matrix), bitsandbytes.functional.dequantize_4bit(quantized, state).numpy())


def test_4_bit_blocks_run_on_from_row_to_row(bitsandbytes, weight, write_module, read):
    # Its kernel for CPU reads such blocks as if they ended with rows, its general implementation does not.
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    quantized, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    parts = {"weight": to_numpy(quantized), **{f"weight.{name}": to_numpy(value) for name, value in state.as_dict(packed=True).items()}}
    matrix = write_module(parts, {"quant_method": "bitsandbytes", "load_in_4bit": True}, module=NAME).find(f"{NAME}.weight", (24, 96))
    expected = _dequantize_4bit_compute(quantized.reshape(-1), state.absmax, state.code, 64, (24, 96), torch.float32)
    np.testing.assert_array_equal(read(matrix), expected.numpy())


def test_the_names_of_a_4_bit_module_are_those_of_its_state_dict(bitsandbytes, weight, write_module, read):
    layer = bitsandbytes.nn.Linear4bit(96, 24, quant_type="nf4", compress_statistics=True, bias=True, device="cpu")
    layer.weight = bitsandbytes.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, requires_grad=False).to("cpu")
    parts = {name: to_numpy(value.detach()) for name, value in layer.state_dict().items()}
    found = write_module(parts, {"quant_method": "bitsandbytes", "load_in_4bit": True}, module=NAME)
    matrix = found.find(f"{NAME}.weight", (24, 96))
    assert set(matrix.names) == {f"{NAME}.{part}" for part in parts if part != "bias"}
    np.testing.assert_allclose(read(matrix), weight.numpy(), atol=0.2 * weight.abs().max().item())


def test_8_bit_modules_of_bitsandbytes(bitsandbytes, weight, write_module, read):
    codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.to(torch.float16))
    parts = {"weight": codes.numpy(), "SCB": absmax.numpy(), "weight_format": np.array(0, np.uint8)}
    found = write_module(parts, {"quant_method": "bitsandbytes", "load_in_8bit": True}, module=NAME)
    matrix = found.find(f"{NAME}.weight", (24, 96))
    # The library multiplies by SCB and then by 1/127, two roundings in another order.
    np.testing.assert_array_max_ulp(read(matrix), bitsandbytes.functional.int8_vectorwise_dequant(codes, absmax).numpy(), maxulp=2)


@pytest.mark.parametrize("block", [None, [8, 32], [24, 48]])
def test_8_bit_floats_that_transformers_writes(float8, weight, write_module, read, block):
    config = types.SimpleNamespace(weight_block_size=block, scale_fmt="float")
    stored = float8.Fp8Quantize(types.SimpleNamespace(quantization_config=config))._quantize_one(f"{NAME}.weight", weight)
    parts = {name.removeprefix(f"{NAME}."): to_numpy(value) for name, value in stored.items()}
    assert parts.keys() == {"weight", "weight_scale_inv"}
    found = write_module(parts, {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}, module=NAME)
    expected = float8.Fp8Dequantize(None)._dequantize_one(*stored.values(), torch.float32).numpy()
    np.testing.assert_array_equal(read(found.find(f"{NAME}.weight", (24, 96))), expected)


@pytest.mark.parametrize("has_zeros", [True, False])
def test_awq_is_what_compressed_tensors_converts_it_to(weight, write_module, read, has_zeros):
    awq = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq", reason="the oracle extra brings compressed-tensors")
    from tests.support.quantized_folders import pack_awq
    parts, _ = pack_awq(weight.numpy(), has_zeros=has_zeros)
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": has_zeros, "version": "gemm"}
    matrix = write_module(parts, config, module=NAME).find(f"{NAME}.weight", (24, 96))
    as_torch = {part: torch.from_numpy(np.ascontiguousarray(value)) for part, value in parts.items()}
    codes, scales, zeros = awq.AutoAWQConverter(group_size=32, zero_point=has_zeros)._convert_gemm_module(
        as_torch["qweight"], as_torch["scales"], as_torch.get("qzeros"))
    centered = codes.float() - (zeros.float().repeat_interleave(32, 1) if has_zeros else 0)
    np.testing.assert_array_equal(read(matrix), (centered * scales.float().repeat_interleave(32, 1)).numpy())


def unpack_columns(words, bits: int, count: int):
    """GPTQ's own packing, in torch: as many codes a word as fit, and for 3 bits the 11th and 22nd of each 32 across two words."""
    words = words.to(torch.int64) & 0xFFFFFFFF
    if bits != 3:
        shifts = torch.arange(0, 32, bits)
        return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)[..., :count]
    first, second, third = words.unflatten(-1, (-1, 3)).unbind(-1)
    tens = torch.arange(10) * 3
    parts = [(first[..., None] >> tens) & 7, ((first >> 30) & 3 | (second & 1) << 2)[..., None], (second[..., None] >> tens + 1) & 7,
             ((second >> 31) & 1 | (third & 3) << 1)[..., None], (third[..., None] >> tens + 2) & 7]
    return torch.cat(parts, -1).flatten(-2)[..., :count]


@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("has_order", [False, True])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_scale_times_code_minus_zero_of_each_inputs_group(write_module, read, bits, is_symmetric, has_order, is_v2):
    from tests.support.quantized_folders import pack_gptq
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits)).numpy()
    parts, _ = pack_gptq(weight, bits=bits, is_symmetric=is_symmetric, has_order=has_order, is_v2=is_v2)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": is_symmetric, "desc_act": has_order,
              "checkpoint_format": "gptq_v2" if is_v2 else "gptq"}
    matrix = write_module(parts, config, module=NAME).find(f"{NAME}.weight", (64, 96))
    qweight, qzeros, scales, g_idx = (torch.from_numpy(np.ascontiguousarray(parts[part])) for part in ("qweight", "qzeros", "scales", "g_idx"))
    zeros = (unpack_columns(qzeros, bits, 64) + (not is_v2)) & (2**bits - 1)
    codes = unpack_columns(qweight.T, bits, 96).T
    expected = (codes - zeros[g_idx]).double() * scales[g_idx].double()
    np.testing.assert_array_equal(read(matrix), expected.T.float().numpy())
    assert (matrix.order is None) != has_order
