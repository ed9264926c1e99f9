"""Flash attention's implementations, kernels interpreted, against the reference in float32; gradients; and what is refused."""
import functools
import logging
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import implementations
from pallas_kernels.flash_attention import flash_attention, flash_attention_reference, op, tpu
from pallas_kernels.flash_attention.cases import CASES, Case
from pallas_kernels.flash_attention.spans import Spans
from pallas_kernels.tiling import Device
from tests.pallas_kernels import quick_interpreter

SEED = random.randrange(2**32)
CPU, A100, H200, V5E = Device("cpu"), Device("gpu", "NVIDIA A100", (8, 0)), Device("gpu", "NVIDIA H200", (9, 0)), Device("tpu", "TPU v5 lite")
KERNELS = {"mosaic_gpu": H200, "mosaic_tpu": V5E, "blocked": CPU}
BOUNDS = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2}
RARE = ("offset=60", "head_dim=128 lengths", "head_dim=256")


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch):
    """Small blocks, so that short rows have several of them."""
    quick_interpreter.install(monkeypatch)
    monkeypatch.setattr(tpu, "candidates", lambda *_: (tpu.TpuTiles(128, 128),))


def in_float32(arrays):
    return tuple(x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays)


def jitted(function, how):
    """``function`` of the arrays, jitted, with what is no array held fast."""
    static = {name: value for name, value in how.items() if not isinstance(value, jax.Array)}
    traced = {name: value for name, value in how.items() if name not in static}
    return functools.partial(jax.jit(functools.partial(function, **static)), **traced)


def assert_close(actual, expected, bound):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all(), f"seed {SEED}"
    assert np.linalg.norm(actual - expected) <= bound * np.linalg.norm(expected), f"seed {SEED}"


def pairs():
    for name in KERNELS:
        for case in CASES:
            if (name, case.dtype) not in (("mosaic_gpu", "float32"), ("mosaic_tpu", "float16")):  # refused, see below
                marks = [pytest.mark.slow] if any(part in str(case) for part in RARE) else [pytest.mark.newest] if case is CASES[0] else []
                yield pytest.param(name, case, id=f"{name} {case}", marks=marks)


@pytest.mark.parametrize(("implementation", "case"), list(pairs()))
def test_an_implementation_gives_what_the_reference_gives(implementation, case):
    arrays, how = case.arrays(SEED)
    kernel = {"device": KERNELS[implementation], "implementation": implementation, "interpret": True}
    out, lse = jitted(flash_attention, {**how, **kernel, "returns_lse": True})(*arrays)
    expected, expected_lse = jitted(flash_attention_reference, {**how, "returns_lse": True})(*in_float32(arrays))
    assert (out.dtype, out.shape, lse.dtype) == (arrays[0].dtype, arrays[0].shape, jnp.float32)
    assert_close(out, expected, BOUNDS[case.dtype])
    assert_close(lse, expected_lse, BOUNDS[case.dtype])


DIFFERENTIATED = (
    Case(300, 300, 2, 1, 64, lengths=(300, 130), dtype="float32"),
    Case(40, 600, 4, 2, 64, offset=550, window=90, softcap=2.0, has_sinks=True, dtype="float32"),
    Case(520, 520, 1, 1, 64, segment_lengths=(260, 30, 230), dtype="float32"),
)


@pytest.mark.parametrize(("implementation", "case"), [
    *(("blocked", case) for case in DIFFERENTIATED), ("mosaic_tpu", DIFFERENTIATED[1]),
    pytest.param("mosaic_gpu", Case(130, 130, 2, 1, 64, has_sinks=True), marks=pytest.mark.slow),
], ids=str)
def test_its_gradient_is_the_references(implementation, case):
    arrays, how = case.arrays(SEED)
    sinks = how.pop("sinks_N", jnp.zeros(case.heads) if case.has_sinks else None)
    weights = jnp.asarray(np.random.default_rng(SEED + 1).normal(size=arrays[0].shape), jnp.float32)

    def loss(function, q, k, v, sinks):
        out, lse = function(q, k, v, arrays[3], sinks_N=sinks, returns_lse=True, **how)
        return (out.astype(jnp.float32) * weights).sum() + jnp.sin(jnp.where(lse > -1e29, lse, 0)).sum()
    kernel = functools.partial(flash_attention, device=KERNELS[implementation], implementation=implementation, interpret=True)
    argnums = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    gradients = jax.jit(jax.grad(functools.partial(loss, kernel), argnums))(*arrays[:3], sinks)
    expected = jax.jit(jax.grad(functools.partial(loss, flash_attention_reference), argnums))(*in_float32(arrays[:3]), sinks)
    for actual, wanted, array in zip(gradients, expected, (*arrays[:3], sinks), strict=False):
        assert actual.dtype == array.dtype
        assert_close(actual, wanted, BOUNDS[case.dtype])


@pytest.mark.parametrize("is_ascending", [True, False])
def test_blocks_leave_out_no_visible_key_and_call_full_only_what_is(is_ascending):
    rng = np.random.default_rng(SEED)
    for _ in range(30):
        ranks, high = (np.sort(x) if is_ascending else x for x in (rng.integers(-3, 60, 48), rng.integers(-1, 60, 32)))
        low = np.where(high < 0, 2**31 - 1, np.maximum(high - rng.integers(1, 70), 0))
        spans = Spans(*(jnp.asarray(x[None], jnp.int32) for x in (low, high, np.maximum(ranks, -1))))
        is_seen = (ranks[None] >= low[:, None]) & (ranks[None] <= high[:, None])
        for tile, (first, full_first, full_end, end) in enumerate(np.asarray(spans.blocks(8, 4))[0]):
            rows = is_seen[8 * tile:8 * tile + 8]
            assert 0 <= first <= full_first <= full_end <= end <= 12, f"seed {SEED}"
            assert first < end
            assert rows.sum() == rows[:, 4 * first:4 * end].sum(), f"seed {SEED}"
            assert rows[:, 4 * full_first:4 * full_end].all(), f"seed {SEED}"


def test_under_a_causal_mask_half_of_the_blocks_are_visited_and_one_of_a_tile_is_masked():
    positions = jnp.arange(1024, dtype=jnp.int32)[None]
    blocks = np.asarray(Spans(jnp.zeros_like(positions), positions, positions).blocks(128, 128))[0]
    np.testing.assert_array_equal(blocks, [(0, 0, tile, tile + 1) for tile in range(8)])


@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
def test_a_token_of_padding_and_one_that_sees_no_key_get_zero(implementation):
    q, k, v = (jnp.ones((1, 2, 1, 64), jnp.bfloat16) for _ in range(3))
    how = {"scale": 1.0, "device": KERNELS.get(implementation, CPU), "implementation": implementation, "interpret": True, "returns_lse": True}
    out, lse = flash_attention(q, k, v, jnp.array([[-1, 5]]), key_positions_BS=jnp.array([[6, -1]]), **how)
    assert not out.any()
    assert (lse == -1e30).all()


def arguments(head_dim=64, dtype="bfloat16", kv_heads=1, num_keys=2, kv_dtype=None):
    shapes = ((1, 2, 2, head_dim), (1, num_keys, kv_heads, head_dim), (1, num_keys, kv_heads, head_dim))
    return (*(jnp.ones(shape, kv_dtype if i and kv_dtype else dtype) for i, shape in enumerate(shapes)), jnp.arange(2, dtype=jnp.int32)[None])


@pytest.mark.parametrize(("implementation", "device", "how", "words"), [
    ("mosaic_gpu", A100, {}, "needs an NVIDIA Hopper GPU.*this is NVIDIA A100"),
    ("mosaic_tpu", H200, {}, "needs a TPU, and this is NVIDIA H200"),
    ("mosaic_gpu", H200, {"head_dim": 32}, "head dims from 64 to 256 that are multiples of 16, and this one is 32"),
    ("mosaic_tpu", V5E, {"head_dim": 72}, "head dims from 64 to 256.*72"),
    ("mosaic_gpu", H200, {"dtype": "float32"}, "takes bfloat16 and float16, and the arrays are float32"),
    ("mosaic_tpu", V5E, {"dtype": "float16"}, "takes bfloat16 and float32, and the arrays are float16"),
    ("mosaic_gpu", H200, {"kv_dtype": "float16"}, "of one dtype, and these are bfloat16, float16"),
    ("mosaic_gpu", H200, {"scale": -1.0}, "takes a positive scale, and this one is -1.0"),
    ("cudnn", V5E, {}, "needs an NVIDIA GPU"),
    ("cudnn", H200, {"softcap": 3.0}, "takes neither soft cap"),
    ("cudnn", H200, {"head_dim": 256}, "head dims up to 128"),
    ("triton", H200, {}, "no implementation 'triton'; there are mosaic_gpu, mosaic_tpu, blocked, cudnn, reference"),
    (None, CPU, {"kv_heads": 3}, r"do not go together; wanted are \[B, T, N, H\]"),
    (None, CPU, {"num_keys": 5}, "2 queries and 5 keys; give the keys' own key_positions_BS"),
    (None, CPU, {"window": 0}, "a window of 0 tokens; it is at least 1"),
], ids=str)
def test_what_cannot_be_done_is_refused_with_what_can(implementation, device, how, words):
    how = dict(how)
    arrays = arguments(**{name: how.pop(name) for name in ("head_dim", "dtype", "kv_heads", "num_keys", "kv_dtype") if name in how})
    with pytest.raises(ValueError, match=words):
        flash_attention(*arrays, **{"scale": 1.0, **how}, device=device, implementation=implementation)


@pytest.mark.parametrize(("device", "how", "chosen"), [
    (H200, {}, "mosaic_gpu"), (V5E, {}, "mosaic_tpu"), (V5E, {"dtype": "float32"}, "mosaic_tpu"), (H200, {"dtype": "float32"}, "reference"),
    (H200, {"head_dim": 32}, "reference"), (A100, {}, "reference"), (CPU, {}, "reference"), (Device("metal", "Apple M9"), {}, "reference"),
], ids=str)
def test_where_none_is_named_the_kernel_of_the_device_runs_if_it_can_and_the_log_says_so_once(device, how, chosen, monkeypatch, caplog):
    implementations._say.cache_clear()
    asked = []
    for module, name in ((op.gpu, "flash_attention_gpu"), (op.tpu, "flash_attention_tpu")):
        monkeypatch.setattr(module, name, lambda q, *_, name=name, **__: asked.append(name) or (q, q[..., 0]))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            flash_attention(*arguments(**how), scale=1.0, device=device)
    assert asked == 2 * {"mosaic_gpu": ["flash_attention_gpu"], "mosaic_tpu": ["flash_attention_tpu"], "reference": []}[chosen]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith(f"flash_attention on {device.kind or device.platform}: {chosen}")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_tiles_fit_into_an_h200_and_a_v5e(head_dim):
    assert all(op.gpu.on_chip_bytes(tiles, head_dim) <= H200.on_chip_bytes for tiles in op.gpu.candidates(head_dim)[:1])
    for tiles in (tpu.TpuTiles(512, 1024), tpu.TpuTiles(1024, 1024)):
        assert tpu.on_chip_bytes(tiles, head_dim, 2) <= V5E.on_chip_bytes
