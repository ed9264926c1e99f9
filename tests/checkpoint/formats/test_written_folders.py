"""Whole folders that transformers with bitsandbytes and compressed-tensors write: names, config.json and values as they come."""
import json

import numpy as np
import pytest

from tests.support.quantized_folders import SIZES
from tests.support.tiny_models import TinyModel, config_json

torch = pytest.importorskip("torch", reason="the oracle extra brings torch")
pytestmark = pytest.mark.oracle
MODEL = TinyModel("written", config_json("llama", **SIZES))


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the oracle extra brings transformers")


@pytest.fixture
def check(read, find_in):
    """``check(folder, expected)``: every matrix of the folder is quantized as ``expected`` has it, or plain, and every tensor is read."""
    def check(folder, expected, *, max_ulp=0):
        found, tensors = find_in(folder)
        read_names = set()
        for name, weight in MODEL.weights().items():
            matrix = found.find(name, weight.shape)
            assert (matrix is not None) == (name in expected), name
            read_names |= {name} if matrix is None else set(matrix.names)
            if matrix is not None:
                np.testing.assert_array_max_ulp(read(matrix), expected[name].float().numpy(), maxulp=max_ulp)
        assert set(tensors) - read_names == set()
        return found
    return check


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
                                     {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, {"load_in_8bit": True}], ids=str)
def test_a_folder_of_transformers_with_bitsandbytes(transformers, check, tmp_path, options):
    library = pytest.importorskip("bitsandbytes", reason="the oracle extra brings bitsandbytes")
    pytest.importorskip("accelerate", reason="transformers needs it to quantize")
    from tests.support import transformers_oracle
    transformers_oracle.build(MODEL).save_pretrained(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=transformers.BitsAndBytesConfig(**options), device_map="cpu")
    model.save_pretrained(tmp_path / "quantized")
    four = {f"{name}.weight": library.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            for name, module in model.named_modules() if isinstance(module, library.nn.Linear4bit)}
    eight = {f"{name}.weight": library.functional.int8_vectorwise_dequant(module.weight.CB if module.weight.CB is not None else module.weight.data,
                                                                          module.weight.SCB)
             for name, module in model.named_modules() if isinstance(module, library.nn.Linear8bitLt)}
    assert len(four) + len(eight) == 14
    check(tmp_path / "quantized", four | eight, max_ulp=2 if eight else 0)


GROUP4 = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}}
ROW8 = {"targets": ["re:.*down_proj$", "model.layers.1.self_attn.o_proj"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}}
FLOAT8 = {"targets": ["re:.*self_attn.[qk]_proj"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
          "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}}


@pytest.mark.parametrize("groups", [{"only": GROUP4}, {"one": GROUP4, "two": ROW8}, {"one": FLOAT8, "two": ROW8, "three": GROUP4}], ids=list)
def test_a_folder_of_compressed_tensors(transformers, check, tmp_path, groups):
    library = pytest.importorskip("compressed_tensors", reason="the oracle extra brings compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    from tests.support import transformers_oracle
    model = transformers_oracle.build(MODEL)
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="frozen")
    apply_quantization_config(model, config, show_progress=False)
    quantized = {name: module for name, module in model.named_modules() if getattr(module, "quantization_scheme", None) is not None}
    for module in quantized.values():
        args = module.quantization_scheme.weights
        grouped = module.weight.reshape(module.weight.shape[0], -1, args.group_size or module.weight.shape[1])
        scale, zero = calculate_qparams(grouped.amin(2), grouped.amax(2), args)
        module.weight_scale.data, module.weight_zero_point.data = scale, zero.to(module.weight_zero_point.dtype)
    compressor = library.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    expected = {}
    for name, module in quantized.items():
        form = BaseCompressor.get_value_from_registry(str(getattr(module.quantization_scheme.format, "value", module.quantization_scheme.format)))
        expected[f"{name}.weight"] = form.decompress(dict(module.state_dict()), module.quantization_scheme)["weight"]
    assert len(expected) == 14
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["format"] == ("mixed-precision" if len(groups) > 1 else "pack-quantized")
    found = check(tmp_path, expected)
    if len(groups) > 1:
        assert found.find("model.layers.0.mlp.down_proj.weight", (128, 256)).scheme.quantizes_input
        assert found.find("model.layers.1.self_attn.o_proj.weight", (128, 128)).scheme.bits == 8
        assert found.find("model.layers.0.self_attn.o_proj.weight", (128, 128)).scheme.bits == 4
