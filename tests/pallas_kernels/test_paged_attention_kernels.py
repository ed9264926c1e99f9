"""Paged attention's kernels, interpreted, against the reference in float32; and what a row's bits may not depend on."""
import functools
import logging
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from pallas_kernels import implementations
from pallas_kernels.page_table import PageTable
from pallas_kernels.paged_attention import paged_attention, paged_attention_reference
from pallas_kernels.paged_attention.cases import CHUNKS, DECODE, RARER, Case
from pallas_kernels.tiling import Device
from tests.pallas_kernels import quick_interpreter
from tests.pallas_kernels.newest import first_is_newest

SEED = random.randrange(2**32)
CPU, H200, V5E = Device("cpu"), Device("gpu", "NVIDIA H200", (9, 0)), Device("tpu", "TPU v5 lite")
KERNELS = {"mosaic_gpu": H200, "mosaic_tpu": V5E}
reference = jax.jit(paged_attention_reference, static_argnames=("scale", "window", "softcap"))
BOUNDS = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_interpreter.install(monkeypatch)


def interpreted(implementation, arguments):
    arrays = {name: arguments[name] for name in ("q_BTNH", "k_PKSH", "v_PKSH", "positions_BT", "scales", "table", "sinks_N")}
    how = {name: arguments[name] for name in ("scale", "window", "softcap")}
    run = functools.partial(paged_attention, device=KERNELS[implementation], implementation=implementation, interpret=True, **how)
    return jax.jit(lambda arrays: run(**arrays))(arrays)


def check(implementation, case):
    arguments = case.arguments(SEED)
    out = interpreted(implementation, arguments)
    exact = {name: jnp.asarray(arguments[name], jnp.float32) for name in ("q_BTNH", *(("k_PKSH", "v_PKSH") if arguments["scales"] is None else ()))}
    expected = np.asarray(reference(**{**arguments, **exact}), np.float64)
    assert (out.shape, out.dtype) == (arguments["q_BTNH"].shape, arguments["q_BTNH"].dtype)
    out, is_real = np.asarray(out, np.float64), np.asarray(arguments["positions_BT"]) >= 0
    assert np.isfinite(out).all(), f"seed {SEED}"
    error = np.linalg.norm(out[is_real] - expected[is_real]) / np.linalg.norm(expected[is_real])
    assert error <= BOUNDS[case.dtype], f"seed {SEED}"


@pytest.mark.parametrize("case", first_is_newest([*DECODE, *CHUNKS]), ids=str)
@pytest.mark.parametrize("implementation", KERNELS)
def test_a_kernel_gives_what_the_reference_gives(implementation, case):
    check(implementation, case)


@pytest.mark.parametrize("implementation", [*KERNELS, "reference"])
def test_a_ragged_call_gives_what_jaxs_own_reference_gives(implementation):
    case = Case((70, 200, 2), num_tokens=(10, 1, 2), page_size=16, num_parts=14, window=60, softcap=5.0)
    arguments = case.arguments(SEED)
    k_PSKH, v_PSKH = (arguments[name].swapaxes(1, 2) for name in ("k_PKSH", "v_PKSH"))
    pages_PSCH = jnp.stack([k_PSKH, v_PSKH], axis=3).reshape(*k_PSKH.shape[:2], -1, case.head_dim)  # a head's keys, then its values
    num_tokens = sum(case.num_tokens)
    expected = ref_ragged_paged_attention(
        arguments["q_BTNH"][0, :num_tokens].astype(jnp.float32), pages_PSCH.astype(jnp.float32), jnp.array(case.lengths), arguments["table"].pages_RL,
        jnp.cumsum(jnp.array([0, *case.num_tokens])), jnp.array([len(case.lengths)]), sm_scale=arguments["scale"], sliding_window=case.window,
        soft_cap=case.softcap)
    out = reference(**arguments) if implementation == "reference" else interpreted(implementation, arguments)
    out = np.asarray(out, np.float64)[0, :num_tokens]
    assert np.linalg.norm(out - expected) <= 1e-2 * np.linalg.norm(expected), f"seed {SEED}"


@pytest.mark.slow
@pytest.mark.parametrize("case", RARER, ids=str)
@pytest.mark.parametrize("implementation", KERNELS)
def test_a_kernel_gives_what_the_reference_gives_in_rarer_cases(implementation, case):
    check(implementation, case)


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "case"), [
    ("mosaic_gpu", Case((90, 33), head_dim=64, dtype="float16", cache_dtype="float16")),
    ("mosaic_gpu", Case((90, 33), head_dim=192, num_tokens=5)),
    ("mosaic_tpu", Case((90, 300), dtype="float32", cache_dtype="float32", num_parts=10, window=70)),
], ids=str)
def test_a_kernel_gives_what_the_reference_gives_where_only_it_runs(implementation, case):
    check(implementation, case)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", pytest.param("mosaic_tpu", marks=pytest.mark.slow)])
def test_a_token_has_the_same_bits_alone_in_a_chunk_and_among_other_rows(implementation):
    case = Case((1100, 70), num_tokens=6, heads=4, kv_heads=1, num_parts=36)
    arguments = case.arguments(SEED)
    q, positions, pages = arguments["q_BTNH"], arguments["positions_BT"], arguments["table"].pages_RL
    chunk = interpreted(implementation, arguments)
    last = interpreted(implementation, {**arguments, "q_BTNH": q[:, -1:], "positions_BT": positions[:, -1:]})
    alone = interpreted(implementation, {**arguments, "q_BTNH": q[1:, -1:], "positions_BT": positions[1:, -1:],
                                         "table": PageTable(pages, jnp.array([1]))})
    rows = jnp.repeat(jnp.arange(2), 6)[None]
    ragged = interpreted(implementation, {**arguments, "q_BTNH": q.reshape(1, 12, *q.shape[2:]), "positions_BT": positions.reshape(1, 12),
                                          "table": PageTable(pages, rows)})
    assert np.asarray(chunk[:, -1:]).tobytes() == np.asarray(last).tobytes(), f"seed {SEED}"
    assert np.asarray(last[1:]).tobytes() == np.asarray(alone).tobytes(), f"seed {SEED}"
    assert np.asarray(ragged).tobytes() == np.asarray(chunk).tobytes(), f"seed {SEED}"


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_nan_of_one_row_stays_in_that_row(implementation):
    arguments = Case((40, 40), heads=2, kv_heads=1, num_parts=2).arguments(SEED)
    poisoned = {**arguments, "v_PKSH": arguments["v_PKSH"].at[arguments["table"].pages_RL[0, 0]].set(jnp.nan)}
    clean, out = (np.asarray(interpreted(implementation, x)) for x in (arguments, poisoned))
    assert np.isnan(out[0].astype(np.float32)).all()
    assert out[1].tobytes() == clean[1].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
def test_a_padded_cache_is_one_page_a_row(implementation):
    arguments = Case((40, 90), heads=2, kv_heads=1, page_size=128, num_parts=1).arguments(SEED)
    pages = arguments["table"].pages_RL[:, 0]
    padded = {**arguments, "k_PKSH": arguments["k_PKSH"][pages], "v_PKSH": arguments["v_PKSH"][pages], "table": None}
    assert np.asarray(interpreted(implementation, padded)).tobytes() == np.asarray(interpreted(implementation, arguments)).tobytes()


def test_it_differentiates_as_the_reference_does():
    arguments = Case((9, 40), page_size=64, num_parts=1).arguments(SEED)
    zeroed = {name: jnp.nan_to_num(arguments[name]) for name in ("k_PKSH", "v_PKSH")}

    def loss(q_BTNH, implementation):
        kernel = {"interpret": True} if implementation != "reference" else {}
        out = paged_attention(**{**arguments, **zeroed, "q_BTNH": q_BTNH}, device=V5E, implementation=implementation, **kernel)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))
    kernel, reference = (np.asarray(jax.grad(loss)(arguments["q_BTNH"], name), np.float32) for name in ("mosaic_tpu", "reference"))
    assert np.linalg.norm(kernel - reference) <= 1e-2 * np.linalg.norm(reference), f"seed {SEED}"


@pytest.mark.parametrize(("implementation", "case", "message"), [
    ("mosaic_gpu", Case((4,), head_dim=80), "a head dim of 64, 128, 192 or 256, not 80"),
    ("mosaic_gpu", Case((4,), dtype="float32"), "queries of bfloat16 or float16, not float32"),
    ("mosaic_gpu", Case((4,), cache_dtype="float32"), "a cache of bfloat16, float16, int8 or float8_e4m3fn, not float32"),
    ("mosaic_gpu", Case((4,), page_size=48), "pages of 16, 32, 64 tokens or a multiple of 64, not 48"),
    ("mosaic_gpu", Case((4,), page_size=16, cache_dtype="int8"), "pages of 32, 64 tokens or a multiple of 64, not 16"),
    ("mosaic_gpu", Case((4,), heads=65, kv_heads=1), "at most 64 query heads for each KV head, not 65"),
    ("mosaic_tpu", Case((4,), head_dim=64), "a head dim of 128 or 256, not 64"),
    ("mosaic_tpu", Case((4,), cache_dtype="float16"), "a cache of bfloat16, float32, int8, float8_e4m3fn, not float16"),
    ("mosaic_tpu", Case((4,), page_size=8), "pages of 16, 32 or 64 tokens, or a multiple of 128, not 8"),
], ids=str)
def test_what_a_kernel_cannot_do_is_refused_and_what_it_can_is_named(implementation, case, message):
    with pytest.raises(ValueError, match=f"'{implementation}' takes {message}"):
        paged_attention(**case.arguments(0), device=KERNELS[implementation], implementation=implementation)


@pytest.mark.parametrize(("implementation", "device", "message"), [
    ("mosaic_gpu", Device("gpu", "NVIDIA A100", (8, 0)), "needs a Hopper GPU, not 'NVIDIA A100'"),
    ("mosaic_tpu", CPU, "needs a TPU, not 'cpu'"), ("triton", CPU, "no implementation 'triton'"),
])
def test_a_device_that_a_kernel_is_not_for_is_refused(implementation, device, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**Case((4,)).arguments(0), device=device, implementation=implementation)


def test_without_a_name_what_no_kernel_can_do_goes_to_the_reference_and_the_log_says_why_once(caplog):
    implementations._say.cache_clear()
    arguments = Case((4,), head_dim=80).arguments(SEED)
    with caplog.at_level(logging.INFO):
        outs = [paged_attention(**arguments, device=H200) for _ in range(2)]
    assert np.asarray(outs[0]).tobytes() == np.asarray(paged_attention_reference(**arguments)).tobytes()
    said = [record.getMessage() for record in caplog.records if "paged_attention on NVIDIA H200" in record.getMessage()]
    assert len(said) == 1
    assert "reference" in said[0]
    assert "not 80" in said[0]
