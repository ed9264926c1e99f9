"""compressed-tensors: files of its own compressors, against what its decompressors make of them.

With float32 scales both round each product once: equal. With bfloat16 scales the library rounds to bfloat16: equal after rounding ours. Only
8-bit codes with zeros and float32 scales differ, by the rounding of the float32 min (see integer_scheme).
"""
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle extra brings torch")
pytestmark = pytest.mark.oracle
N, K = 48, 96


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("compressed_tensors", reason="the oracle extra brings compressed-tensors")


@pytest.fixture
def compress(library, write_module):
    """(format, expected float32 [N, K]) of random weights, compressed by the library."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    def make(form: str, *, dtype=torch.float32, inputs=None, named_format: str | None = None, ignore=(), targets=("Linear",), **args):
        weights = QuantizationArgs(**args)
        scheme = QuantizationScheme(targets=list(targets), weights=weights, input_activations=inputs and QuantizationArgs(**inputs))
        torch.manual_seed(0)
        weight = torch.randn(N, K) * torch.rand(N, 1) + (0 if weights.symmetric else 0.3)
        state = {"weight": weight.to(dtype), **parameters(weight, weights, dtype)}
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(state, scheme)
        config = QuantizationConfig(config_groups={"group_0": scheme}, format=named_format or form, quantization_status="compressed",
                                    ignore=list(ignore)).model_dump(mode="json")
        found = write_module({part: to_numpy(value) for part, value in stored.items()}, config, module="model.layers.0.mlp.up_proj")
        return found.find("model.layers.0.mlp.up_proj.weight", (N, K)), compressor.decompress(stored, scheme)["weight"]
    return make


def parameters(weight, args, dtype) -> dict:
    """Scales and zeros as the library's own observer would have them."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy == "tensor":
        low, high = (bound.reshape(1) for bound in weight.aminmax())
    elif strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -K % width, 0, -N % height))
        blocks = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        groups = weight.reshape(N, -1, args.group_size)
        low, high = groups.amin(2), groups.amax(2)
    extra = {"weight_global_scale": generate_gparam(*(bound.reshape(1) for bound in weight.aminmax()))} if strategy == "tensor_group" else {}
    scale, zero = calculate_qparams(low, high, args, global_scale=extra.get("weight_global_scale"))
    scale = scale if scale.dtype in (torch.uint8, torch.float8_e4m3fn) else scale.to(dtype)
    return {"weight_scale": scale, "weight_zero_point": zero, **extra}


def to_numpy(tensor) -> np.ndarray:
    import ml_dtypes
    views = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16), torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn)}
    if tensor.dtype in views:
        integer, dtype = views[tensor.dtype]
        return tensor.detach().contiguous().view(integer).numpy().view(dtype)
    return tensor.detach().contiguous().numpy()


def assert_equal(matrix, expected, read):
    ours = read(matrix)
    if expected.dtype == torch.bfloat16:
        np.testing.assert_array_equal(torch.from_numpy(ours).to(torch.bfloat16).float().numpy(), expected.float().numpy())
    else:
        np.testing.assert_array_equal(ours, expected.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16, 32, 96])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_integers(compress, read, bits, group, symmetric, dtype):
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    matrix, expected = compress("pack-quantized", num_bits=bits, type="int", symmetric=symmetric, dtype=dtype, **strategy)
    assert matrix.scheme.bits == bits
    if bits == 8 and not symmetric and dtype == torch.float32:
        np.testing.assert_allclose(read(matrix), expected.numpy(), rtol=0, atol=2 * np.spacing(expected.abs().max().item() * 2, dtype=np.float32))
    else:
        assert_equal(matrix, expected, read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", [{"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "group", "group_size": 32}], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["int-quantized", "naive-quantized"])
def test_plain_integers(compress, read, form, bits, strategy, dtype):
    matrix, expected = compress(form, num_bits=bits, type="int", symmetric=True, dtype=dtype, **strategy)
    assert matrix.scheme.bits == bits
    assert_equal(matrix, expected, read)


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_integers_with_zeros(compress, read, bits):
    matrix, expected = compress("int-quantized", num_bits=bits, type="int", symmetric=False, strategy="channel", dtype=torch.bfloat16)
    assert_equal(matrix, expected, read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", [{"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "group", "group_size": 32},
                                      {"strategy": "block", "block_structure": [16, 32]}, {"strategy": "block", "block_structure": [32, 64]}],
                         ids=str)
@pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
def test_8_bit_floats(compress, read, form, strategy, dtype):
    matrix, expected = compress(form, num_bits=8, type="float", symmetric=True, dtype=dtype, **strategy)
    assert matrix.scheme.kind == "e4m3"
    assert_equal(matrix, expected, read)


def test_8_bit_floats_whose_scales_are_powers_of_two(compress, read):
    matrix, expected = compress("mxfp8-quantized", num_bits=8, type="float", symmetric=True, strategy="group", group_size=32,
                                scale_dtype=torch.uint8)
    assert matrix.scheme.group == 32
    assert_equal(matrix, expected, read)


@pytest.mark.parametrize(("form", "args"), [
    ("nvfp4-pack-quantized", {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}),
    ("mxfp4-pack-quantized", {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8})])
def test_4_bit_floats_are_kept_where_scales_are_powers_of_two_and_dequantized_else(compress, read, caplog, form, args):
    matrix, expected = compress(form, num_bits=4, type="float", symmetric=True, **args)
    is_kept = form.startswith("mxfp4")
    assert (None if matrix.scheme is None else matrix.scheme.name) == ("mxfp4" if is_kept else None)
    assert_equal(matrix, expected.to(torch.bfloat16), read)
    assert sum("are dequantized while they are read" in line for line in caplog.messages) == (not is_kept)


@pytest.mark.parametrize("inputs", [{"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True},
                                    {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}, None], ids=str)
def test_activations_of_8_bits(compress, caplog, inputs):
    caplog.set_level("INFO", logger="tpllm")
    matrix, _ = compress("int-quantized", num_bits=8, type="int", symmetric=True, strategy="channel", inputs=inputs)
    assert matrix.scheme.quantizes_input == (inputs is not None)
    assert any("each row gets its own" in line for line in caplog.messages) == (inputs is not None and not inputs["dynamic"])


@pytest.mark.parametrize(("targets", "ignore"), [
    (["Linear"], []), (["re:.*up_proj"], []), (["model.layers.0.mlp.up_proj"], ["lm_head"]), (["Linear"], ["re:.*down_proj", "model.layers.1.mlp"])])
def test_targets_that_hold_the_module(compress, read, targets, ignore):
    matrix, expected = compress("pack-quantized", num_bits=4, type="int", strategy="channel", targets=targets, ignore=ignore,
                                named_format="mixed-precision")
    assert_equal(matrix, expected, read)


def test_packing_is_what_the_library_unpacks(library):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    from tests.support.quantized_folders import pack_bits
    for bits in range(2, 9):
        for count in (1, 8, 31, 32, 96, 97):
            codes = np.random.default_rng(bits).integers(0, 2**bits, (3, count)).astype(np.uint8)
            signed = torch.from_numpy(codes.astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
            np.testing.assert_array_equal(pack_bits(codes, bits), pack_to_int32(signed, bits).numpy())
