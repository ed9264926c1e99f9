"""Variants of the formats that few files have, what is logged, and which modules a list names."""
import logging

import numpy as np
import pytest

from tests.support.quantized_folders import KINDS, compressed_config, integers, pack_bits, pack_compressed, pack_float8, pack_gptq, pack_int8
from tpllm.checkpoint.formats.bits import unpack, unpack_whole_words
from tpllm.checkpoint.formats.names import ModuleNames, compile_pattern
from tpllm.errors import CheckpointError

WEIGHT = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 5, 8, 31, 32, 33, 64, 100])
def test_codes_come_out_of_words_as_they_went_in(bits, count):
    codes = np.random.default_rng(count).integers(0, 2**bits, (3, 2, count)).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack_bits(codes, bits), bits, count), codes)


def test_a_3_bit_code_has_two_bits_in_one_word_and_one_in_the_next():
    words = np.array([[3 << 30, 1, 0]], np.int64).astype(np.uint32).view(np.int32)
    assert unpack(words, 3, 32).tolist() == [[0] * 10 + [7] + [0] * 21]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_older_packed_files_let_no_code_cross_words(write_module, read, bits):
    parts, expected = pack_compressed(WEIGHT, bits=bits, is_symmetric=False)
    codes, _, zeros = integers(WEIGHT, bits, 32, is_symmetric=False, scale_dtype=parts["weight_scale"].dtype)
    parts["weight_packed"], parts["weight_zero_point"] = whole_words(codes, bits), whole_words(zeros.T, bits).T
    config = compressed_config("pack-quantized", {**W4, "num_bits": bits, "symmetric": False})
    np.testing.assert_array_equal(read(write_module(parts, config).find("m.weight", WEIGHT.shape)), expected)


def whole_words(codes: np.ndarray, bits: int) -> np.ndarray:
    per_word = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word))).reshape(codes.shape[0], -1, per_word).astype(np.uint32)
    words = (padded << (np.arange(per_word, dtype=np.uint32) * np.uint32(bits))).sum(-1, dtype=np.uint32).view(np.int32)
    np.testing.assert_array_equal(unpack_whole_words(words, bits, codes.shape[1]), codes)
    return words


def test_zeros_of_packed_codes_may_be_bytes(write_module, read):
    parts, expected = pack_compressed(WEIGHT, is_symmetric=False)
    zeros = unpack(np.ascontiguousarray(parts["weight_zero_point"].T), 4, 32).T
    parts["weight_zero_point"] = zeros.astype(np.int8) - np.int8(8)
    config = compressed_config("pack-quantized", {**W4, "symmetric": False})
    np.testing.assert_array_equal(read(write_module(parts, config).find("m.weight", WEIGHT.shape)), expected)


@pytest.mark.parametrize("is_used", [True, False])
def test_an_order_of_packed_inputs(write_module, read, is_used):
    order = np.random.default_rng(1).permutation(64)
    parts, sorted_weight = pack_compressed(WEIGHT[:, order])
    codes, expected, groups = unpack(parts["weight_packed"], 4, 64), np.empty_like(WEIGHT), np.empty(64, np.int32)
    expected[:, order], groups[order] = sorted_weight, np.arange(64) // 32
    stored = np.empty_like(codes)
    stored[:, order] = codes
    if is_used:
        parts |= {"weight_packed": pack_bits(stored, 4), "weight_g_idx": groups}
    else:  # the library's sign that there is none
        parts |= {"weight_g_idx": np.full(64, -1, np.int32)}
    config = compressed_config("pack-quantized", {**W4, "actorder": "group"})
    matrix = write_module(parts, config).find("m.weight", WEIGHT.shape)
    assert (matrix.order is not None) == is_used
    np.testing.assert_array_equal(read(matrix), expected if is_used else sorted_weight)


@pytest.mark.parametrize(("config", "message"), [
    ({"packing_format": "auto_round:marlin"}, "packing_format is 'auto_round:marlin'; it is not read; known are auto"),
    ({"data_type": "mx_int"}, "data_type is 'mx_int'; with packing_format"), ({"act_bits": 8}, "act_bits is 8; integers whose activations"),
    ({"packing_format": "auto_round:llm_compressor_nvfp4_e5m3", "data_type": "nvfp4_v2"}, "data_type is 'nvfp4_v2'"),
    ({"rotation_config": {"type": "hadamard"}}, "models with rotations are not run"), ({"extra_config": {"m": 4}}, "extra_config: m is 4; it must"),
    ({"bits": "4"}, "bits is '4'; it must be a whole number"), ({"packing_format": 3}, "packing_format is 3; it must be a string"),
    ({"extra_config": {"(a*)*m": {"bits": 8}}}, "repeats a group"),
    ({"packing_format": "auto_round:auto_awq", "bits": 8}, "bits is 8; it must be one of 4"),
])
def test_what_autoround_writes_and_we_do_not_read_is_refused_by_its_field(write_module, config, message):
    with pytest.raises(CheckpointError, match=message):
        write_module(pack_gptq(WEIGHT)[0], {"quant_method": "auto-round", "bits": 4, "group_size": 32, **config})


@pytest.mark.parametrize("name", ["auto-round", "auto_round", "intel/auto-round"])
def test_autoround_is_known_by_each_name_that_its_writers_gave(write_module, read, name):
    parts, expected = pack_gptq(WEIGHT)
    found = write_module(parts, {"quant_method": name, "bits": 4, "group_size": 32})
    np.testing.assert_array_equal(read(found.find("m.weight", WEIGHT.shape)), expected)


def test_whole_floats_of_a_quantization_config_count_as_whole_numbers(write_module, read):
    parts, expected = pack_gptq(WEIGHT)
    np.testing.assert_array_equal(read(write_module(parts, {"quant_method": "gptq", "bits": 4.0, "group_size": 32.0}).find("m.weight", WEIGHT.shape)),
                                  expected)
    with pytest.raises(CheckpointError, match=r"group_size is 32\.5; it must be a whole number"):
        write_module(parts, {"quant_method": "gptq", "bits": 4, "group_size": 32.5})


def test_symmetric_zeros_are_told_by_the_file_and_not_by_the_config(write_module):
    for is_symmetric, sym in [(True, False), (False, True)]:
        found = write_module(pack_gptq(WEIGHT, is_symmetric=is_symmetric)[0], {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": sym})
        scheme = found.find("m.weight", WEIGHT.shape).scheme
        assert (scheme.zero, scheme.mins) == ((8, "none") if is_symmetric else (0, "zeros"))


def test_an_empty_g_idx_is_none(write_module, read):
    parts, expected = pack_gptq(WEIGHT)
    parts["g_idx"] = np.zeros(0, np.int32)
    found = write_module(parts, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    np.testing.assert_array_equal(read(found.find("m.weight", WEIGHT.shape)), expected)


def test_block_scales_may_be_powers_of_two_as_bytes(write_module, read):
    parts, _ = pack_float8(WEIGHT, block=(16, 32), part="weight_scale_inv")
    parts["weight_scale_inv"] = np.array([[120, 121], [127, 130]], np.uint8)
    found = write_module(parts, {"quant_method": "fp8", "weight_block_size": [16, 32]})
    scales = np.repeat(np.repeat(2.0 ** np.array([[-7, -6], [0, 3]]), 16, 0), 32, 1)
    np.testing.assert_array_equal(read(found.find("m.weight", WEIGHT.shape)), parts["weight"].astype(np.float32) * scales)


def test_blocks_need_not_divide_a_matrix(write_module, read):
    parts, expected = pack_float8(WEIGHT[:30, :50], block=(16, 32), part="weight_scale_inv")
    found = write_module(parts, {"quant_method": "fp8", "weight_block_size": [16, 32]})
    np.testing.assert_array_equal(read(found.find("m.weight", (30, 50))), expected)


def test_floats_of_two_mantissa_bits(write_module, read):
    import ml_dtypes
    codes, scales = WEIGHT.astype(ml_dtypes.float8_e5m2), np.linspace(0.5, 2, 32, dtype=np.float32)
    matrix = write_module({"weight": codes, "weight_scale": scales}, {"quant_method": "fp8"}).find("m.weight", WEIGHT.shape)
    assert matrix.scheme.kind == "e5m2"
    np.testing.assert_array_equal(read(matrix), codes.astype(np.float32) * scales[:, None])


@pytest.mark.parametrize("status", ["frozen", "compressed"])
def test_weights_saved_before_they_were_compressed_are_refused(write_module, status):
    parts = {"weight": WEIGHT, "weight_scale": np.ones((32, 1), np.float32)}
    config = compressed_config("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, quantization_status=status)
    with pytest.raises(CheckpointError, match=f"before it was compressed .quantization_status is '{status}'.; save the model with save_compressed"):
        write_module(parts, config).find("m.weight", WEIGHT.shape)


def test_compressed_weights_are_read_whatever_the_status_says(write_module, read):
    parts, expected = pack_int8(WEIGHT)
    config = compressed_config("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, quantization_status="frozen")
    np.testing.assert_array_equal(read(write_module(parts, config).find("m.weight", WEIGHT.shape)), expected)


@pytest.mark.parametrize("where", ["quantization_config", "compression_config"])
def test_the_config_has_two_names_and_may_leave_out_the_method(tmp_path, write_module, where):
    from tpllm.checkpoint.formats import find_format
    from tpllm.checkpoint.index import read_index
    config = dict(KINDS["compressed-w8a8"].config)
    write_module(pack_int8(WEIGHT)[0], config)
    del config["quant_method"]
    assert find_format({where: config}, read_index(tmp_path)[0]).name == "compressed-tensors"


@pytest.mark.parametrize("field", [{"input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}},
                                   {"output_activations": {"num_bits": 8, "type": "int"}}])
def test_what_is_not_used_is_logged(write_module, caplog, field):
    caplog.set_level(logging.INFO, logger="tpllm")
    config = compressed_config("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, kv_cache_scheme={"num_bits": 8})
    config["config_groups"]["group_0"] |= field
    assert not write_module(pack_int8(WEIGHT)[0], config).find("m.weight", WEIGHT.shape).scheme.quantizes_input
    assert any("kv_cache_scheme is not used" in line for line in caplog.messages)
    assert any("quantized" in line for line in caplog.messages)


def test_fp8_says_that_activations_are_not_quantized(write_module, caplog):
    caplog.set_level(logging.INFO, logger="tpllm")
    write_module(pack_float8(WEIGHT, block=(0, 0), part="weight_scale", shape=())[0], {"quant_method": "fp8", "activation_scheme": "static"})
    assert caplog.messages == ["fp8: activations are not quantized (activation_scheme is 'static')"]


def test_the_closest_name_of_a_module_counts():
    names = ModuleNames(["model.a", r"re:.*\.b", "Linear"], "here")
    assert [names.rank(module) for module in ("model.a", "model.b", "model.c", "model.embed_tokens")] == [0, 1, 2, None]
    assert ModuleNames(["Embedding"], "here").rank("model.embed_tokens") == 2


@pytest.mark.parametrize("expression", ["(a+)+", "(a|b)*c", "a*a*a*a*a*a*b", "(", "[", "a{2", "x" * 50 + "("])
def test_expressions_that_could_take_forever_or_are_none_are_refused(expression):
    if expression == "a{2":
        compile_pattern(expression, "here")  # plain text to Python
        return
    with pytest.raises(CheckpointError, match="here: "):
        compile_pattern(expression, "here")


@pytest.mark.parametrize("expression", [r".*\.layers\.\d+\.self_attn\.(q|k|v)_proj.*", r"^(?!.*lm_head).*proj$", "vision_tower.*", r".*mlp.gate$"])
def test_expressions_that_files_have_are_read(expression):
    compile_pattern(expression, "here")


@pytest.mark.parametrize(("strategy", "quantizes"), [({"strategy": "channel"}, True), ({"strategy": "tensor"}, True),
                                                     ({"strategy": "group", "group_size": 32}, False)], ids=str)
def test_activations_are_int8_where_an_output_has_one_scale(write_module, strategy, quantizes):
    shape = {"channel": (32, 1), "tensor": (1,), "group": (32, 2)}[strategy["strategy"]]
    parts = {"weight": np.ones((32, 64), np.int8), "weight_scale": np.ones(shape, np.float32)}
    config = compressed_config("int-quantized", {"num_bits": 8, "type": "int", **strategy},
                               {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True})
    assert write_module(parts, config).find("m.weight", (32, 64)).scheme.quantizes_input == quantizes
