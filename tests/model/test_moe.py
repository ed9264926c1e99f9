"""Routed experts: against a sum over all of them, at any routing; what is not quantized, and what is refused."""
import dataclasses
import functools

import jax
import numpy as np
import pytest

from sharding_rules import DATA_TENSOR, Rules, ShardingError, make_mesh
from tests.support.checkpoint_files import write_folder
from tests.support.tiny_models import TinyModel, config_json, step
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import load_params
from tpllm.cli.inspect import inspect_model
from tpllm.cli.main import main
from tpllm.model.kv_cache import init_cache
from tpllm.model.mlp import mlp, moe, route
from tpllm.model.params import MlpParams, expert_stacks, init_params
from tpllm.model.partition import fit_to_mesh
from tpllm.weights.policy import parse_policy
from tpllm.weights.storage import NATIVE, Storage

MODEL = TinyModel("qwen2moe", config_json("qwen2moe"))
CUT_MODEL = TinyModel("qwen2moe", config_json("qwen2moe", moe_intermediate_size=128, shared_expert_intermediate_size=64, intermediate_size=64))
"""Whose groups of 32 two shards do not cut."""


MESHES = {"alone": {}, "tp": {"tp": 2}, "ep": {"ep": 2}, "both": {"ep": 3, "tp": 2}, "data": {"dp": 2, "ep": 2}}


def one_by_one(params, config):
    """The matrices of each expert."""
    inner, outer = expert_stacks(config)
    gate, up, down = (np.asarray(matrix).reshape(config.num_experts, -1, matrix.shape[1])
                      for matrix in (params.experts.gate, params.experts.up, params.experts.down))
    return [MlpParams(gate[e, :inner.rows], up[e, :inner.rows], down[e, :outer.rows]) for e in range(config.num_experts)]


@pytest.mark.parametrize("is_normalized", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5)])
def test_a_token_gets_the_weighted_sum_of_its_experts_and_padding_nothing(shape, is_normalized):
    config = dataclasses.replace(MODEL.config, normalizes_expert_weights=is_normalized, shared_expert_size=0)
    params = init_params(config, 0).layers[0].mlp
    x = np.random.default_rng(1).standard_normal((*shape, config.hidden_size), np.float32)
    positions = np.zeros(shape, np.int32)
    positions[-1, -1] = -1 if shape[1] > 1 else 0
    weights, experts = jax.jit(functools.partial(route, config=config))(x, params.router)
    assert np.allclose(np.sum(weights, -1), 1, atol=1e-6) == is_normalized
    run = jax.jit(functools.partial(mlp, config=config))
    every = np.stack([run(x, expert) for expert in one_by_one(params, config)], axis=2)
    expected = (np.take_along_axis(every, np.asarray(experts)[..., None], axis=2) * np.asarray(weights)[..., None]).sum(2)
    out = np.asarray(jax.jit(moe, static_argnames="config")(x, params, config=config, positions_BT=positions))
    is_token = positions >= 0
    np.testing.assert_allclose(out[is_token], expected[is_token], atol=2e-6)
    assert not out[~is_token].any()


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["mixtral", "qwen2moe", "qwen3moe", "gpt-oss"])
def test_every_mesh_gives_the_same(name, mesh):
    model = TinyModel(name, config_json(name, **({"num_local_experts": 6} if name == "mixtral" else {})))
    tokens, positions = np.array([model.prompt()[:16]] * 2, np.int32), np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    logits = []
    for axes in ({}, MESHES[mesh]):
        params, config = model.on_mesh(axes.get("tp", 1), DATA_TENSOR, **{axis: size for axis, size in axes.items() if axis != "tp"})
        logits.append(np.asarray(step(params, tokens, positions, init_cache(config, 2, 32), config)[0])[..., :config.vocab_size])
    assert np.isfinite(logits[1]).all()
    assert np.abs(logits[1] - logits[0]).max() / logits[0].std() <= 3e-4


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize(("scheme", "mesh"), [
    ("w8a8", "alone"),  # where a row is cut, each shard's part has its own scale, and XLA's one for all
    *((scheme, mesh) for scheme in (None, "int8", "*=int4", "q4_k", "fp8") for mesh in ("alone", "tp", "both"))])
def test_packed_experts_give_what_the_same_codes_dequantized_give(scheme, mesh, tmp_path):
    write_folder(tmp_path / "model", dict(CUT_MODEL.hf), CUT_MODEL.weights())
    checkpoint = open_checkpoint(tmp_path / "model")
    tokens, positions = np.array([CUT_MODEL.prompt()[:16]], np.int32), np.arange(16, dtype=np.int32)[None]
    logits = []
    for is_packed, axes in ((True, MESHES[mesh]), (False, MESHES[mesh]), (False, {})):
        config = fit_to_mesh(checkpoint.config, make_mesh(axes), DATA_TENSOR)
        storage = Storage(np.dtype(np.float32), parse_policy(scheme), device=NATIVE if is_packed else None)
        params = load_params(checkpoint, config, dtype="float32", storage=storage)
        logits.append(np.asarray(step(params, tokens, positions, init_cache(config, 1, 32), config)[0])[..., :config.vocab_size])
    assert np.abs(logits[1] - logits[2]).max() / logits[2].std() <= 3e-4
    assert np.abs(logits[0] - logits[1]).max() / logits[1].std() <= 1e-4


@pytest.mark.parametrize("name", ["layers.0.mlp.router", "layers.0.mlp.shared_gate"])
def test_what_chooses_and_weighs_experts_is_not_quantized(name):
    assert parse_policy("int4").choose(name) is None
    assert parse_policy("int4").choose("layers.0.mlp.experts.gate") is not None


@pytest.mark.parametrize(("name", "axes", "message"), [
    ("llama", {"ep": 2}, "an axis of 2 for experts, and the model has none"), ("qwen2moe", {"ep": 4}, "6 experts cannot be cut into 4 equal parts"),
    ("qwen2moe", {"tp": 5}, "24 inputs of an expert's down projection cannot be cut into 5")])
def test_meshes_that_do_not_fit_are_refused(name, axes, message):
    with pytest.raises(ShardingError, match=message):
        fit_to_mesh(TinyModel(name, config_json(name)).config, make_mesh(axes), DATA_TENSOR)


def test_rules_that_cut_experts_in_two_ways_are_refused():
    with pytest.raises(ShardingError, match=r"into 1 parts and its down projection's inputs .mlp. into 2"):
        fit_to_mesh(MODEL.config, make_mesh({"tp": 2}), Rules((("mlp", "tp"),)))


@pytest.mark.parametrize(("mesh", "sharding"), [("tp=2", ["tp", None]), ("ep=2,tp=2", ["ep,tp", None])])
def test_inspect_says_over_which_axes_experts_lie(mesh, sharding, tmp_path, capsys):
    write_folder(tmp_path / "model", dict(MODEL.hf), MODEL.weights())
    by_name = {parameter["name"]: parameter for parameter in inspect_model(str(tmp_path / "model"), mesh=mesh)["parameters"]}
    assert by_name["layers.0.mlp.experts.up"]["sharding"] == sharding
    assert main(["inspect", str(tmp_path / "model"), "--mesh", mesh]) == 0
    assert f"{sharding[0]} -" in capsys.readouterr().out
