"""Experts in MXFP4: the floats that a numpy loop and transformers unpack, kept in 4.25 bits, on every mesh the logits of the dense folder."""
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sharding_rules import DATA_TENSOR, make_mesh
from tests.support.checkpoint_files import write_folder
from tests.support.mxfp4_folders import CONFIG, model, quantized_experts, unpacked, write_both
from tpllm import forward
from tpllm.checkpoint.entries import find_entries
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import _row_reader, load_params, stored_schemes
from tpllm.checkpoint.read import TensorReader
from tpllm.checkpoint.save import quantize_checkpoint
from tpllm.checkpoint.store import write_store
from tpllm.cli.inspect import inspect_model
from tpllm.errors import CheckpointError, ConfigError
from tpllm.families.registry import find_family
from tpllm.model.params import named_leaves, param_specs
from tpllm.model.partition import fit_to_mesh
from tpllm.weights.native import NativeWeight
from tpllm.weights.policy import parse_policy
from tpllm.weights.storage import NATIVE, Storage
from tpllm.weights.xla import XlaWeight

MODEL = model()
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
MESHES = [{}, {"tp": 2}, {"tp": 4}, {"ep": 2}, {"ep": 3, "tp": 2}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt-oss")
    write_both(folder, MODEL)
    return folder


def load(folder, axes, *, is_packed, policy=None, dtype="float32"):
    checkpoint = open_checkpoint(folder)
    config = fit_to_mesh(checkpoint.config, make_mesh(axes), DATA_TENSOR)
    entries = find_entries(checkpoint, config)
    storage = Storage(np.dtype(dtype), parse_policy(policy), device=NATIVE if is_packed else None, stored=stored_schemes(entries, config))
    return load_params(checkpoint, config, dtype=dtype, storage=storage, entries=entries), config


def run(params, config):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 200, (2, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), tokens.shape)
    return np.asarray(jax.jit(lambda params: forward(params, tokens, positions, None, config)[0])(params))[..., :config.vocab_size]


def test_rows_are_what_a_numpy_loop_unpacks(folders, read, find_in):
    dense = quantized_experts(MODEL)[1]
    found, tensors = find_in(folders / "mxfp4")
    assert found.name == "mxfp4"
    for name, weight in dense.items():
        matrix = found.find(name, (weight.shape[0] * weight.shape[2], weight.shape[1]))
        np.testing.assert_array_equal(read(matrix), weight.swapaxes(1, 2).reshape(matrix.shape))
        assert matrix.bits_per_weight == 4.25
        assert set(matrix.names) <= set(tensors)
    assert found.find("model.layers.0.self_attn.q_proj.weight", (96, 64)) is None
    assert found.find(f"{GATE_UP}_bias", (768,)) is None


@pytest.mark.oracle
def test_rows_are_what_transformers_unpacks():
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(3)
    blocks, scales = rng.integers(0, 256, (3, 40, 4, 16)).astype(np.uint8), rng.integers(100, 140, (3, 40, 4)).astype(np.uint8)
    expected = mxfp4.convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    np.testing.assert_array_equal(unpacked(blocks, scales), expected.numpy())


@pytest.mark.parametrize("name", [
    "layers.1.mlp.experts.gate", "layers.1.mlp.experts.up", "layers.0.mlp.experts.down", "layers.0.mlp.experts.up_bias"])
@pytest.mark.parametrize("folder", ["mxfp4", "dense"])
def test_each_parameter_gets_its_own_columns(folders, folder, name):
    checkpoint = open_checkpoint(folders / folder)
    source, spec = find_entries(checkpoint, checkpoint.config)[name], dict(named_leaves(param_specs(checkpoint.config)))[name]
    weights = {**MODEL.weights(), **quantized_experts(MODEL)[1]}
    columns = find_family(MODEL.hf).columns_of(name)
    whole = weights[find_family(MODEL.hf).checkpoint_name(name)]
    with TensorReader(1) as reader:
        rows = _row_reader(reader, source, spec, checkpoint.config, scheme=None, dtype=np.dtype(np.float32))(0, spec.shape[0])
    for stored, expert, start, stop in spec.stack.runs(0, spec.shape[0]):
        np.testing.assert_array_equal(rows[stored:stored + stop - start], whole[expert].T[columns.first::columns.every][start:stop])


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("is_packed", [False, True], ids=["canonical", "packed"])
def test_every_mesh_gives_the_logits_of_the_dense_folder(native_library, folders, axes, is_packed):
    expected = run(*load(folders / "dense", {}, is_packed=False))
    params, config = load(folders / "mxfp4", axes, is_packed=is_packed)
    for matrix in (params.layers[0].mlp.experts.up, params.layers[0].mlp.experts.down):
        assert isinstance(matrix, NativeWeight if is_packed else XlaWeight)
        bits = sum(array.nbytes * (4 if str(array.dtype) == "uint4" else 8) for array in jax.tree.leaves(matrix))
        assert bits <= 1.05 * 4.25 * np.prod(matrix.shape) or axes.get("tp") == 4  # whose shards hold scales of half a group
    found = run(params, config)
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("policy", ["int8", "*.experts.*=int4"])
def test_the_dense_folder_is_quantized_while_it_is_loaded_and_the_mxfp4_one_again(native_library, folders, policy):
    found = [run(*load(folders / folder, {"tp": 2}, is_packed=True, policy=policy)) for folder in ("dense", "mxfp4")]
    np.testing.assert_array_equal(*found)
    params, _ = load(folders / "mxfp4", {}, is_packed=True, policy="*.attn.*=int8")
    assert params.layers[0].mlp.experts.up.layout.format.name == "E2M1"


def test_the_step_holds_no_dense_copy_of_an_expert(native_library, folders):
    for dtype in ("float32", "bfloat16"):
        params, config = load(folders / "mxfp4", {}, is_packed=True, dtype=dtype)
        tokens = jnp.zeros((1, 1), jnp.int32)
        compiled = jax.jit(lambda params, tokens, config=config: forward(params, tokens, tokens, None, config)[0]).lower(params, tokens).compile()
        size = np.prod(params.layers[0].mlp.experts.up.shape)
        floats = re.findall(r"(?:f32|bf16|f16)\[([\d,]+)\]", compiled.as_text())
        assert max(int(np.prod([int(dim) for dim in dims.split(",")])) for dims in floats) < size / 2
        assert compiled.memory_analysis().temp_size_in_bytes < size


def test_a_store_of_it_comes_back_as_it_was(tmp_path, folders):
    params, config = load(folders / "mxfp4", {"tp": 2}, is_packed=False)
    write_store(tmp_path, params, config, source={})
    (tmp_path / "config.json").write_text(json.dumps(dict(MODEL.hf)))
    for axes in ({"tp": 2}, {"ep": 2}):
        again, _ = load(tmp_path, axes, is_packed=False)
        expected, _ = load(folders / "mxfp4", axes, is_packed=False)
        for found, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_inspect_says_how_experts_are_kept(tmp_path):
    write_both(tmp_path, MODEL, ml_dtypes.bfloat16)
    for folder, kind, kept, bits in (("mxfp4", "mxfp4", "mxfp4", 4.25), ("dense", "BF16", "bfloat16", 16)):
        report = inspect_model(str(tmp_path / folder), mesh="tp=1", dtype="bfloat16")
        up = next(parameter for parameter in report["parameters"] if parameter["name"] == "layers.0.mlp.experts.up")
        assert (report["family"], up["stored_dtype"], up["kept"]) == ("gpt-oss", kind, kept)
        assert report["stored_bits_per_weight"] >= bits
        assert json.dumps(report)


@pytest.mark.parametrize(("changes", "message"), [
    ({f"{GATE_UP}_scales": None}, r"gate_up_proj_scales .* is missing, while"),
    ({f"{GATE_UP}_blocks": np.zeros((6, 128, 1, 16), np.uint8)}, r"gate_up_proj_blocks' is U8 of shape .6, 128, 1, 16.; it must be U8 of shape"),
    ({f"{GATE_UP}_scales": np.zeros((6, 128, 2), np.float32)}, r"gate_up_proj_scales' is F32"),
    ({f"{GATE_UP}_scales": np.full((6, 128, 2), 255, np.uint8)}, "holds scales that are not finite"),
    ({f"{GATE_UP}_blocks": None, f"{GATE_UP}_scales": None}, r"tensor '.*gate_up_proj' of shape .768, 64. is missing"),
    ({f"{GATE_UP}_bias": np.zeros((6, 127), np.float32)}, r"gate_up_proj_bias' is F32 of shape .6, 127."),
])
def test_what_does_not_fit_is_refused_with_its_name(tmp_path, changes, message):
    stored, dense = quantized_experts(MODEL)
    tensors = {name: weight for name, weight in MODEL.weights().items() if name not in dense} | stored | changes
    write_folder(tmp_path, {**MODEL.hf, "quantization_config": CONFIG}, {name: value for name, value in tensors.items() if value is not None})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, {}, is_packed=False)


def test_what_is_no_multiple_of_a_group_and_what_cannot_be_written_are_refused(tmp_path, folders):
    checkpoint = open_checkpoint(folders / "mxfp4")
    with pytest.raises(CheckpointError, match=r"48 inputs are no multiple of 32"):
        checkpoint.weights.find(GATE_UP, (768, 48))
    with pytest.raises(ConfigError, match=r"keeps a layer's experts in one tensor"):
        quantize_checkpoint(folders / "dense", tmp_path / "out", "int4")
