"""Files and configurations that do not fit: each is refused with what is wrong and what to do."""
import copy
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.quantized_folders import (
    KINDS,
    compressed_config,
    make_folder,
    pack_awq,
    pack_bnb_4bit,
    pack_bnb_int8,
    pack_compressed,
    pack_float4,
    pack_float8,
    pack_gptq,
    pack_int8,
)
from tpllm.checkpoint.formats import find_format
from tpllm.checkpoint.index import read_index
from tpllm.checkpoint.read import TensorReader
from tpllm.errors import CheckpointError, TpllmError

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = KINDS["awq-g32"].config
FP8 = KINDS["fp8-block"].config
W4 = KINDS["compressed-w4a16-g32-asym"].config
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
WEIGHT = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
MODULES = {
    "gptq": (pack_gptq, GPTQ, {"g_idx"}),
    "gptq-act": (lambda weight: pack_gptq(weight, has_order=True), {**GPTQ, "desc_act": True}, set()),
    "awq": (pack_awq, AWQ, set()),
    "fp8": (lambda weight: pack_float8(weight, block=(16, 32), part="weight_scale_inv"), {**FP8, "weight_block_size": [16, 32]}, set()),
    "packed": (lambda weight: pack_compressed(weight, is_symmetric=False), W4, {"weight_shape"}),
    "int8": (pack_int8, KINDS["compressed-w8a8"].config, set()),
    "nvfp4": (lambda weight: pack_float4(weight, group=16, has_global=True), KINDS["compressed-nvfp4"].config, set()),
    "bnb-int8": (pack_bnb_int8, {**BNB, "load_in_8bit": True}, {"weight_format"}),
    "bnb-nf4": (lambda weight: pack_bnb_4bit(weight, nested_block=16), BNB, set()),
}
PARTS = [(name, part) for name, (pack, _, _) in MODULES.items() for part in pack(WEIGHT)[0]]


def read_all(found, shape=WEIGHT.shape, name="m.weight"):
    matrix = found.find(name, shape)
    if matrix is not None:
        with TensorReader(1) as reader:
            matrix.open(reader)(0, shape[0])
    return matrix


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_missing_part_is_named(write_module, name, part):
    pack, config, optional = MODULES[name]
    whole = pack(WEIGHT)[0]
    parts = {key: value for key, value in whole.items() if key != part}
    found = write_module(parts, config, plain={f"other.{key}": np.ascontiguousarray(value) for key, value in whole.items()})
    if part in optional:
        assert read_all(found) is not None
        return
    with pytest.raises(CheckpointError, match=f"m.{part.partition('__')[0]}.*is missing"):
        read_all(found)


@pytest.mark.parametrize(("name", "part"), [case for case in PARTS if case[1] != "weight_format"])
def test_a_part_of_another_shape_is_refused(write_module, name, part):
    pack, config, _ = MODULES[name]
    parts = dict(pack(WEIGHT)[0])
    value = np.atleast_1d(parts[part])
    parts[part] = np.concatenate([value, value[-1:]])
    with pytest.raises(CheckpointError, match=part.rpartition("_")[0] if "quant_state" in part else part):
        read_all(write_module(parts, config))


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_part_of_another_dtype_is_refused(write_module, name, part):
    pack, config, _ = MODULES[name]
    parts = dict(pack(WEIGHT)[0])
    parts[part] = np.zeros(np.shape(parts[part]), np.uint64)
    with pytest.raises(CheckpointError, match=part.rpartition("_")[0] if "quant_state" in part else part):
        read_all(write_module(parts, config))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("shape", [(32, 128), (64, 64), (16, 64), (33, 64), (32, 65), (1, 1)])
def test_a_matrix_of_another_shape_than_the_configurations_is_refused(write_module, name, shape):
    pack, config, _ = MODULES[name]
    with pytest.raises(CheckpointError):
        read_all(write_module(pack(WEIGHT)[0], config), shape)


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, part in PARTS if part in (
    "scales", "weight_scale", "weight_scale_inv", "SCB", "weight.nested_absmax", "weight.quant_map", "weight_global_scale")])
def test_scales_that_are_not_finite_are_refused(write_module, name, part):
    pack, config, _ = MODULES[name]
    parts = {key: value.copy() for key, value in pack(WEIGHT)[0].items()}
    parts[part].reshape(-1)[0] = np.nan
    with pytest.raises(CheckpointError, match="not finite"):
        read_all(write_module(parts, config))


BAD_ORDERS = {
    "a group that is not there": (lambda order: order + 1, "holds groups 1 to 2; they must be of 0 to 1"),
    "a negative group": (lambda order: order - 1, "holds groups -1 to 0"),
    "a group of too many inputs": (lambda order: np.where(np.arange(64) == 63, 0, order), "gives group 0 33 inputs; each must have group_size = 32"),
}


@pytest.mark.parametrize("case", BAD_ORDERS)
def test_a_g_idx_that_does_not_fill_its_groups_is_refused(write_module, case):
    change, message = BAD_ORDERS[case]
    parts = dict(pack_gptq(WEIGHT)[0])
    parts["g_idx"] = change(parts["g_idx"]).astype(np.int32)
    with pytest.raises(CheckpointError, match=message):
        read_all(write_module(parts, {**GPTQ, "desc_act": True}))


CONFIGS = {
    "an unknown method": ("gptq", {**GPTQ, "quant_method": "hqq"}, "'hqq' is not read; known are gptq, awq, fp8"),
    "no method": ("gptq", {"bits": 4}, "must say one of gptq"),
    "a method that is no string": ("gptq", {**GPTQ, "quant_method": 3}, "quant_method is 3; it must be a string"),
    "a list": ("gptq", [GPTQ], "must be a JSON object"),
    "another format's tensors": ("awq", W4, "tensor 'm.qweight' is what gptq or awq or auto-round has"),
    "the other layout of a name": ("awq", GPTQ, "by config.json's sizes and quantization_config"),
    "no config": ("gptq", None, "'m.g?qweight' is of quantized weights, but config.json has no quantization_config"),
    "groups that do not divide": ("gptq", {**GPTQ, "group_size": 48}, "groups of 48 inputs do not divide its 64, and a partial last"),
    "groups of nothing": ("gptq", {**GPTQ, "group_size": 0}, "group_size is 0; it must be positive, or -1"),
    "other bits": ("gptq", {**GPTQ, "bits": 5}, "bits is 5; it must be one of 2, 3, 4, 8"),
    "marlin": ("gptq", {**GPTQ, "checkpoint_format": "marlin"}, "of GPTQ's layouts gptq and gptq_v2 are read"),
    "a module the config leaves out": ("gptq", {**GPTQ, "dynamic": {"-:m": {}}}, "says that module 'm' is not quantized"),
    "gemv": ("awq", {**AWQ, "version": "gemv"}, "of AWQ's layouts gemm is read"),
    "exllama": ("awq", {**AWQ, "version": "exllama"}, "of AWQ's layouts gemm is read"),
    "awq of 8 bits": ("awq", {**AWQ, "bits": 8}, "bits is 8; it must be one of 4"),
    "blocks that are one number": ("fp8", {**FP8, "weight_block_size": 128}, "two positive whole numbers"),
    "other blocks": ("fp8", {**FP8, "weight_block_size": [32, 32]}, r"weight_scale_inv' is F32 of shape \(2, 2\); it must be"),
    "an ignored module": ("packed", {**W4, "ignore": ["m"]}, "it is ignored or in no config group; name it in the targets"),
    "no group for it": ("packed", compressed_config("pack-quantized", {}, config_groups={}), "at least one group"),
    "sparse weights": ("packed", {**W4, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights are not read"),
    "rotations": ("packed", {**W4, "transform_config": {"config_groups": {"R1": {}}}}, "models with transforms"),
    "an unknown format": ("packed", {**W4, "format": "marlin-24"}, "format 'marlin-24' is not read"),
    "a format that is not the tensors'": ("packed", {**W4, "format": "int-quantized"}, "m.weight .I8 .* is missing, while m.weight_packed is there"),
    "an expression that never ends": ("packed", {**W4, "ignore": ["re:(a+)+$"]}, "repeats a group"),
    "no expression": ("packed", {**W4, "ignore": ["re:("]}, "is not a regular expression"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_fit_is_refused_with_what_is_wrong(write_module, case):
    name, config, message = CONFIGS[case]
    with pytest.raises(CheckpointError, match=message):
        read_all(write_module(MODULES[name][0](WEIGHT)[0], config))


def test_a_config_over_plain_weights_is_refused_with_the_fix(write_module):
    with pytest.raises(CheckpointError, match=r"no tensor ends with .qweight: the weights are not quantized. Remove quantization_config"):
        write_module({"weight": WEIGHT}, GPTQ)


def test_plain_weights_have_no_format(write_module):
    assert write_module({"weight": WEIGHT}, None) is None


def test_codes_that_need_more_bits_than_the_config_says_are_refused(write_module):
    parts = {"weight": np.full((4, 8), 9, np.int8), "weight_scale": np.ones((4, 1), np.float32)}
    found = write_module(parts, compressed_config("naive-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}))
    with pytest.raises(CheckpointError, match="holds codes of more than 4 bits; correct num_bits"):
        read_all(found, (4, 8))


@pytest.mark.parametrize("state", [b"", b"[]", b"{", b"\xff", b'{"shape": [32, 64]}', b'{"shape": [32, 64], "blocksize": 0}',
                                   b'{"shape": [32, 64], "blocksize": 1e400}', b'{"shape": null, "blocksize": 64}', b"[" * 9000], ids=repr)
def test_a_bitsandbytes_state_that_cannot_be_is_refused(write_module, state):
    parts = pack_bnb_4bit(WEIGHT)[0] | {"weight.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8)}
    with pytest.raises(CheckpointError, match="quant_state"):
        read_all(write_module(parts, BNB))


FUZZED = ("gptq-4bit-g32-sym-dynamic", "awq-g32", "fp8-block", "fbgemm_fp8", "compressed-w4a16-g32-asym", "compressed-w8a8", "compressed-mixed",
          "compressed-nvfp4", "bnb-nf4-nested", "bnb-int8")
JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=8)
                    | st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 16, 32, 128, "int", "float", "group", "channel", "tensor", "block", "token",
                                       "re:.*", "re:(", "Linear", "lm_head", "gemm", "gptq", "pack-quantized", "128x128", [128, 128]]),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> (config.json, shapes of the weights, tensors)."""
    made = {}
    for kind in FUZZED:
        folder = tmp_path_factory.mktemp("folder")
        shapes = {name: weight.shape for name, weight in make_folder(folder, kind).items()}
        made[kind] = (json.loads((folder / "config.json").read_text()), shapes, read_index(folder)[0])
    return made


def tables_of(value):
    """Every dict and list in a JSON value, itself first."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tables_of(inner)


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(FUZZED), changes=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.booleans(), JSON), min_size=1, max_size=3))
def test_a_mutated_config_is_read_or_refused_and_nothing_else(folders, kind, changes):
    hf_config, shapes, tensors = folders[kind]
    config = {"root": copy.deepcopy(hf_config["quantization_config"])}
    for where, which, is_removed, value in copy.deepcopy(changes):
        tables = list(tables_of(config))
        table = tables[where % len(tables)]
        keys = list(table) if isinstance(table, dict) else list(range(len(table)))
        if keys and is_removed and table is not config:
            del table[keys[which % len(keys)]]
        elif keys:
            table[keys[which % len(keys)]] = value
    message = error_of({**hf_config, "quantization_config": config["root"]}, shapes, tensors)
    assert message is None or (len(message) < 1200 and "\n" not in message)


def error_of(hf_config, shapes, tensors) -> str | None:
    """Of reading a layer; None where it is read. Any error but our own comes through."""
    try:
        found = find_format(hf_config, tensors)
        for name in shapes if found is not None else ():
            if "layers.1" not in name:
                read_all(found, shapes[name], name)
    except TpllmError as error:
        return str(error)
    return None
