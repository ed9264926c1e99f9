"""What ``tpllm inspect`` says of models whose layers differ and whose projections are fused."""
import json

import pytest

from tests.support.checkpoint_files import write_folder
from tests.support.tiny_models import MODELS
from tpllm.cli.inspect import _text, inspect_model

BY_NAME = {model.name: model for model in MODELS}


@pytest.mark.parametrize(("name", "lines"), [
    ("phi3-partial", ["rope               longrope theta=100 factor=4 partial_rotary_factor=0.75 original_max_position=32",
                      "layer_ropes        rope in every layer"]),
    ("gemma3-linear", ["layer_ropes        default theta=30, default theta=30, linear theta=700 factor=4 original_max_position=32",
                       "norm_offset        1.0"]),
    ("smollm3-windows", ["layer_ropes        none, default theta=100, default theta=100"]),
])
def test_features_that_differ_between_layers_are_shown_and_json_holds_them(name, lines, tmp_path):
    model = BY_NAME[name]
    weights = model.weights()
    write_folder(tmp_path, dict(model.hf), weights)
    report = inspect_model(str(tmp_path), mesh="tp=1")
    shown = [line.strip() for line in _text(report)]
    assert not set(lines) - set(shown)
    assert len(json.loads(json.dumps(report))["config"]["layer_ropes"]) == model.config.num_layers
    assert report["num_parameters"] == sum(array.size for array in weights.values())
