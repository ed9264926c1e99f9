"""FLOPs and bytes, counted by hand for small models."""
import dataclasses

import pytest

from sharding_rules import ONE_DEVICE
from tpllm.engine.roofline import num_matrix_values
from tpllm.model.config import ModelConfig
from tpllm.plan import PlanOptions
from tpllm.plan.costs import decode_work, prefill_work
from tpllm.plan.setup import Subject, prepare

DENSE = ModelConfig(vocab_size=512, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, intermediate_size=256,
                    max_position=512)
LAYER = 4 * 128 * 128 + 3 * 128 * 256
OPTIONS = PlanOptions("dense", "cpu:8", mesh="tp=1", dtype="float32", num_seqs=8, context_len=256, prompt_len=64, prefill_chunk=32)


@pytest.fixture(autouse=True)
def _plain_arrays(monkeypatch):
    """Weights without the native kernels' packing, so that bytes can be counted by hand."""
    monkeypatch.setattr("tpllm.ops.uses_native", lambda _: False)


def work(config=DENSE, **options):
    setup = prepare(dataclasses.replace(OPTIONS, **options), Subject(config, {}))
    return decode_work(setup), prefill_work(setup)


def test_a_dense_decode_step():
    decode, _ = work()
    vectors = 128 * (2 * 2 + 1)
    assert decode.weight_bytes == 4 * (2 * LAYER + 512 * 128 + vectors)  # of the embedding only one row a token
    assert decode.kv_bytes == 8 * 160 * 2 * 2 * 128 * 4
    assert decode.flops == 8 * (2 * (2 * LAYER + 512 * 128) + 4 * 128 * 2 * 160)


def test_a_prefill_is_the_sum_of_its_chunks():
    _, prefill = work()
    assert prefill.flops == 64 * 2 * (2 * LAYER + 512 * 128) + 4 * 128 * 2 * (32 * 16 + 32 * 48)
    assert prefill.kv_bytes == (32 + 64) * 2 * 2 * 128 * 4
    assert prefill.weight_bytes == 2 * work(prompt_len=32)[1].weight_bytes


def test_tensor_parallel_devices_share_all_and_data_groups_share_the_rows():
    one, four, groups = work()[0], work(mesh="tp=4")[0], work(mesh="dp=4")[0]
    assert four.flops == one.flops / 4 == groups.flops
    assert four.kv_bytes == one.kv_bytes / 4 == groups.kv_bytes
    assert groups.weight_bytes == one.weight_bytes
    assert four.weight_bytes == pytest.approx(one.weight_bytes / 4, rel=0.01)  # vectors are everywhere


def test_a_window_bounds_what_is_read():
    windowed = work(dataclasses.replace(DENSE, layer_windows=(64, None)))[0]
    assert windowed.kv_bytes == 8 * (64 + 160) * 2 * 128 * 4


def test_only_the_experts_that_tokens_choose_are_read():
    sparse = dataclasses.replace(DENSE, num_experts=8, num_experts_per_token=2, expert_size=256, sparse_layers=(True, True))
    few, many = work(sparse, num_seqs=1)[0], work(sparse, num_seqs=64)[0]
    experts = 2 * 8 * 3 * 128 * 256 * 4
    rest = few.weight_bytes - experts * 2 / 8
    assert many.weight_bytes == pytest.approx(rest + experts * (1 - 0.75**64))
    assert num_matrix_values(dataclasses.replace(sparse, partition=ONE_DEVICE)) == 2 * (4 * 128 * 128 + 2 * 3 * 128 * 256 + 8 * 128) + 512 * 128
