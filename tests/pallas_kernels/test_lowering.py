"""Every kernel lowered for its device. That takes no compiler of such a device, and finds what another jax names otherwise where kernels leave the
interpreter's path.
"""
import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.flash_attention import cases as flash_cases
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.gated_mlp import cases as mlp_cases
from pallas_kernels.gated_mlp import gated_product
from pallas_kernels.kv_append import kv_append
from pallas_kernels.page_table import PageTable
from pallas_kernels.paged_attention import cases as paged_cases
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.quant_matmul import layout_for, quant_matmul
from pallas_kernels.quant_matmul.cases import FORMATS, packed_shapes, with_layout
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.tiling import Device

DEVICES = {"mosaic_gpu": Device("gpu", "NVIDIA H200", (9, 0)), "mosaic_tpu": Device("tpu", "TPU v5 lite"),
           "triton": Device("gpu", "NVIDIA A100", (8, 0))}
PLATFORMS = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu", "triton": "cuda"}
CALLED = {"mosaic_gpu": "mosaic_gpu", "mosaic_tpu": "tpu_custom_call", "triton": "triton"}


def flash(how):
    arrays, others = flash_cases.CASES[0].arrays(0)
    return functools.partial(flash_attention, **others, **how), arrays


def paged(how, case=paged_cases.DECODE[0]):
    arguments = case.arguments(0)
    names = ("q_BTNH", "k_PKSH", "v_PKSH", "positions_BT", "table")
    settings = {name: arguments[name] for name in ("scale", "window", "softcap")}
    return lambda arrays: paged_attention(**arrays, **settings, **how), ({name: arguments[name] for name in names},)


def append(how):
    cache, new = jax.ShapeDtypeStruct((8, 2, 32, 128), jnp.bfloat16), jax.ShapeDtypeStruct((2, 1, 2, 128), jnp.bfloat16)
    table = PageTable(jax.ShapeDtypeStruct((2, 3), jnp.int32), None)
    run = lambda caches, entries, positions, table: kv_append(caches, entries, positions, table=table, **how)  # noqa: E731
    return run, ((cache, cache), (new, new), jax.ShapeDtypeStruct((2, 1), jnp.int32), table)


def product(how, name):
    f = with_layout(FORMATS[name], "rows" if how["implementation"] == "triton" else layout_for(how["device"]))
    x = jax.ShapeDtypeStruct((3, 256), jnp.bfloat16)
    return (lambda x, arrays: quant_matmul(x, arrays, weight_format=f, **how)), (x, packed_shapes(f, 256, 256))


def gated(how, case):
    x, weights, biases, f = case.arrays(0, layout_for(how["device"]))
    settings = {"activation": case.activation, "weight_format": f, "num_outputs": None if f is None else case.F}
    return (lambda x, weights, biases: gated_product(x, *weights, biases=biases, **settings, **how)), (x, weights, biases)


def norm(how):
    rows, vector = jax.ShapeDtypeStruct((3, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256,), jnp.bfloat16)
    return (lambda x, weight, residual: rms_norm(x, weight, eps=1e-5, residual_D=residual, **how)), (rows, vector, rows)


def a_gpu():
    """What Pallas' route to Triton asks for since jax 0.11, though it is told the platform."""
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA A100-SXM4-80GB", num_cores=None, platform="gpu")))


BOTH = ("mosaic_gpu", "mosaic_tpu")
CALLS = {
    "flash_attention": (flash, BOTH), "paged_attention": (paged, BOTH), "kv_append": (append, ("mosaic_tpu",)),
    "paged_attention of a chunk": (functools.partial(paged, case=paged_cases.CHUNKS[0]), BOTH),
    **{f"quant_matmul {name}": (functools.partial(product, name=name), BOTH) for name in ("int8", "q6_k", "w8a8", "fp8-g128-a8")},
    "quant_matmul int4": (functools.partial(product, name="int4"), (*BOTH, "triton")),
    "gated_mlp": (functools.partial(gated, case=mlp_cases.CASES[0]), BOTH),
    "packed gated_mlp": (functools.partial(gated, case=mlp_cases.PACKED_CASES[0]), BOTH), "rms_norm": (norm, (*BOTH, "triton")),
}


@pytest.mark.newest
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(("name", "implementation"), [(name, implementation) for name, (_, known) in CALLS.items() for implementation in known])
def test_a_kernel_is_lowered_for_its_device(name, implementation):
    function, arrays = CALLS[name][0]({"device": DEVICES[implementation], "implementation": implementation})
    with a_gpu() if implementation == "triton" else contextlib.nullcontext():
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=(PLATFORMS[implementation],))
    assert CALLED[implementation] in lowered.as_text()
