"""Loading by shard: every device holds its slice of what the file holds, heads repeated and vocabulary padded."""
import dataclasses
import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tpllm.checkpoint.read
from sharding_rules import DATA_TENSOR, REPLICATED, TENSOR, make_mesh
from tpllm.checkpoint.folder import open_checkpoint
from tpllm.checkpoint.load import load_params
from tpllm.errors import CheckpointError
from tpllm.model.params import named_leaves, param_specs
from tpllm.model.partition import fit_to_mesh

MESHES = {"tp1": ({"tp": 1}, TENSOR), "tp2": ({"tp": 2}, TENSOR), "tp4": ({"tp": 4}, TENSOR), "tp8": ({"tp": 8}, TENSOR),
          "dp2tp4": ({"dp": 2, "tp": 4}, DATA_TENSOR), "replicated": ({"tp": 8}, REPLICATED)}


def expected_params(checkpoint, config, tensors, dtype) -> dict[str, np.ndarray]:
    """The plain way: whole tensors, converted, repeated and padded in memory."""
    expected = {}
    for name, spec in named_leaves(param_specs(config)):
        value = tensors[checkpoint.family.checkpoint_name(name)].astype(np.float32).astype(dtype)
        if "kv_heads" == spec.axes[0]:
            heads = value.reshape(config.num_kv_heads, config.head_dim, -1)
            value = np.repeat(heads, config.kv_repeat, axis=0)
        if "vocab" == spec.axes[0]:
            value = np.concatenate([value, np.zeros((config.padded_vocab_size - config.vocab_size, value.shape[1]), dtype)])
        expected[name] = value.reshape(spec.shape)
    return expected


def assert_loaded(params, expected):
    leaves = dict(named_leaves(params))
    assert leaves.keys() == expected.keys()
    for name, array in leaves.items():
        assert array.dtype == expected[name].dtype
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[name][shard.index], err_msg=name)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_device_holds_its_slice_of_the_file(make_checkpoint, mesh, num_shards):
    folder, tensors = make_checkpoint("BF16", num_shards=num_shards)
    checkpoint = open_checkpoint(folder)
    sizes, rules = MESHES[mesh]
    config = fit_to_mesh(checkpoint.config, make_mesh(sizes), rules)
    params = load_params(checkpoint, config, dtype=np.float32)
    assert_loaded(params, expected_params(checkpoint, config, tensors, np.float32))
    assert params.layers[0].attn.q.sharding.is_equivalent_to(config.partition.sharding(("heads", "embed")), 2)


def test_eight_shards_own_a_repeated_kv_head_each_and_the_padding_is_zero(make_checkpoint):
    folder, tensors = make_checkpoint()
    checkpoint = open_checkpoint(folder)
    config = fit_to_mesh(checkpoint.config, make_mesh({"tp": 8}), TENSOR)
    assert (config.kv_repeat, config.padded_vocab_size) == (4, 72)
    params = load_params(checkpoint, config, dtype=np.float32)
    for i, shard in enumerate(params.layers[1].attn.v_bias.addressable_shards):
        np.testing.assert_array_equal(np.asarray(shard.data), tensors["model.layers.1.self_attn.v_proj.bias"].reshape(2, 6)[i // 4])
    assert not np.asarray(params.embed)[67:].any()
    assert not np.asarray(params.head)[67:].any()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("stored", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_every_stored_dtype_loads_as_every_dtype(make_checkpoint, stored, dtype):
    folder, tensors = make_checkpoint(stored)
    checkpoint = open_checkpoint(folder)
    config = fit_to_mesh(checkpoint.config, make_mesh({"tp": 2}), TENSOR)
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {stored}
    assert_loaded(load_params(checkpoint, config, dtype=dtype), expected_params(checkpoint, config, tensors, np.dtype(dtype)))


@pytest.mark.parametrize("block_bytes", [1, 100, 1000])
def test_the_size_of_a_block_changes_nothing(make_checkpoint, monkeypatch, block_bytes):
    monkeypatch.setattr(tpllm.checkpoint.read, "BLOCK_BYTES", block_bytes)
    folder, tensors = make_checkpoint("BF16")
    checkpoint = open_checkpoint(folder)
    for mesh in (None, make_mesh({"tp": 4})):
        config = checkpoint.config if mesh is None else fit_to_mesh(checkpoint.config, mesh, TENSOR)
        assert_loaded(load_params(checkpoint, config, dtype=np.float32), expected_params(checkpoint, config, tensors, np.float32))


def test_the_demo_loads_as_the_safetensors_package_reads_it():
    checkpoint = open_checkpoint("demo")
    tensors = load_file(checkpoint.folder / "model.safetensors")
    params = load_params(checkpoint, checkpoint.config, dtype=ml_dtypes.bfloat16)
    assert params.head is None
    assert_loaded(params, expected_params(checkpoint, checkpoint.config, tensors, ml_dtypes.bfloat16))


def test_replicas_on_cpu_share_the_buffer_that_was_read_into(make_checkpoint):
    folder, _ = make_checkpoint()
    checkpoint = open_checkpoint(folder)
    params = load_params(checkpoint, fit_to_mesh(checkpoint.config, make_mesh({"tp": 8}), TENSOR), dtype=np.float32)
    assert len({shard.data.unsafe_buffer_pointer() for shard in params.final_norm.addressable_shards}) == 1
    assert len({shard.data.unsafe_buffer_pointer() for shard in params.embed.addressable_shards}) == 8


def test_a_program_that_donates_a_loaded_array_leaves_the_others_alone(make_checkpoint):
    folder, tensors = make_checkpoint()
    checkpoint = open_checkpoint(folder)
    first, second = (load_params(checkpoint, checkpoint.config, dtype=np.float32) for _ in range(2))
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    np.testing.assert_array_equal(add_one(first.embed), tensors["model.embed_tokens.weight"] + 1)
    np.testing.assert_array_equal(second.embed, tensors["model.embed_tokens.weight"])


def test_a_wrong_shape_is_named_with_both_shapes(make_checkpoint):
    folder, tensors = make_checkpoint()
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": np.zeros((40, 23), np.float32)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    config = fit_to_mesh(checkpoint.config, make_mesh({"tp": 8}), TENSOR)
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.up_proj.weight' has shape \(40, 23\); config.json makes it \(40, 24\)"):
        load_params(checkpoint, config, dtype=np.float32)


def test_a_wrong_shape_of_a_repeated_head_is_told_in_the_files_own_terms(make_checkpoint):
    folder, tensors = make_checkpoint()
    save_file({**tensors, "model.layers.0.self_attn.k_proj.weight": np.zeros((48, 24), np.float32)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    config = fit_to_mesh(checkpoint.config, make_mesh({"tp": 8}), TENSOR)
    with pytest.raises(CheckpointError, match=r"k_proj.weight' has shape \(48, 24\); config.json makes it \(12, 24\)"):
        load_params(checkpoint, config, dtype=np.float32)


def test_a_missing_tensor_is_named(make_checkpoint):
    folder, tensors = make_checkpoint()
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"'model.layers.1.self_attn.q_proj.bias' of shape \(48,\) is missing"):
        load_params(checkpoint, checkpoint.config, dtype=np.float32)


def test_an_untied_model_without_a_head_is_refused_and_a_tied_one_may_store_it(make_checkpoint, caplog):
    folder, tensors = make_checkpoint(tie_word_embeddings=True)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with caplog.at_level(logging.WARNING, logger="tpllm"):
        assert load_params(checkpoint, checkpoint.config, dtype=np.float32).head is None
    assert not caplog.records
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' of shape .* is missing; if the head is the embedding, set tie_word_embeddings"):
        load_params(checkpoint, dataclasses.replace(checkpoint.config, ties_embeddings=False), dtype=np.float32)


def test_unknown_tensors_are_named_in_one_warning_and_harmless_ones_are_not(make_checkpoint, caplog):
    folder, tensors = make_checkpoint()
    extra = {f"model.extra.{i}": np.zeros(2, np.float32) for i in range(7)} | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3)}
    save_file({**tensors, **extra}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with caplog.at_level(logging.WARNING, logger="tpllm"):
        load_params(checkpoint, checkpoint.config, dtype=np.float32)
    (record,) = caplog.records
    assert "7 tensors are not part of a Qwen2 model" in record.getMessage()
    assert "model.extra.0" in record.getMessage()
    assert "inv_freq" not in record.getMessage()


def test_whole_numbers_are_not_weights(make_checkpoint):
    folder, tensors = make_checkpoint()
    save_file({**tensors, "model.norm.weight": np.zeros(24, np.int16)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"tensor 'model.norm.weight' is I16; weights are read from F64, F32"):
        load_params(checkpoint, checkpoint.config, dtype=np.float32)


def test_a_value_beyond_float16_is_refused_and_not_made_infinite(make_checkpoint):
    folder, tensors = make_checkpoint()
    save_file({**tensors, "model.norm.weight": np.full(24, 1e6, np.float32)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' \(F32\) holds values beyond the range of float16; load it as bfloat16"):
        load_params(checkpoint, checkpoint.config, dtype=np.float16)


def test_a_dtype_that_no_weight_can_have_is_refused(make_checkpoint):
    folder, _ = make_checkpoint()
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="cannot be loaded as int8; take one of float32, bfloat16, float16"):
        load_params(checkpoint, checkpoint.config, dtype=np.int8)


def test_a_file_cut_after_it_was_opened_is_an_error(make_checkpoint):
    folder, _ = make_checkpoint()
    checkpoint = open_checkpoint(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(checkpoint.headers["model.safetensors"].size // 2)
    with pytest.raises(CheckpointError, match=r"model.safetensors became shorter while it was read"):
        load_params(checkpoint, checkpoint.config, dtype=np.float32)


@pytest.mark.oracle
@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
def test_what_transformers_saves_loads_as_its_own_state(tmp_path, max_shard_size):
    import torch
    import transformers
    hf = transformers.Qwen3Config(vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=8,
                                  num_key_value_heads=2, head_dim=6, tie_word_embeddings=True)
    model = transformers.Qwen3ForCausalLM(hf).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "10KB")
    assert "Qwen3ForCausalLM" in json.loads((tmp_path / "config.json").read_text())["architectures"]
    checkpoint = open_checkpoint(tmp_path)
    config = fit_to_mesh(checkpoint.config, make_mesh({"tp": 8}), TENSOR)
    tensors = {name: value.float().numpy() for name, value in model.state_dict().items()}
    assert_loaded(load_params(checkpoint, config, dtype=np.float32), expected_params(checkpoint, config, tensors, np.float32))
