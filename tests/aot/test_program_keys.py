"""What makes a compiler's result another one, and what does not: where code stands."""
import importlib.metadata
import types

import jax
import jax.numpy as jnp
import pytest

from tests.aot import program_keys
from tests.aot.program_keys import canonical_text, compiler_flags, describe_compiler, describe_devices, identify
from tpllm.aot.topologies import accelerator_mesh

X = jax.ShapeDtypeStruct((64, 128), jnp.float32)
SOURCE = """
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu, tpu, triton

def body(x_ref, o_ref):
    o_ref[...] = x_ref[...] * FACTOR

def run(x, kind):
    if kind == "mosaic_gpu":
        return mosaic_gpu.kernel(body, out_type=x, kernel_name="scale")(x)
    params = {"tpu": tpu, "triton": triton}[kind].CompilerParams()
    return pl.pallas_call(body, out_shape=x, compiler_params=params)(x)
"""


def run_of(*, path="kernel.py", line=0, factor=2.0):
    """``run`` as it would be in this file, at this line."""
    names = {"FACTOR": factor}
    exec(compile("\n" * line + SOURCE, path, "exec"), names)
    return names["run"]


def test_a_kernel_that_moves_to_another_line_and_folder_lowers_to_the_same_text():
    def text(**place):
        run = run_of(**place)
        return canonical_text(jax.jit(lambda x: run(x, "tpu") + 1).trace(X).lower(lowering_platforms=("tpu",)))
    assert text() == text(path="elsewhere/moved.py", line=70)
    assert "kernel.py" not in text()
    assert "vector.load" in text(), "the kernel's own code"
    assert text() != text(factor=3.0)


@pytest.mark.aot
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(("accelerator", "kind"), [("h200:1", "mosaic_gpu"), ("h200:1", "triton"), ("v5e:2x2", "tpu")])
def test_it_also_keeps_its_key_which_another_kernel_or_topology_has_not(accelerator, kind):
    def program(name=accelerator, **place):
        mesh, run = accelerator_mesh(name, {"tp": 1}), run_of(**place)
        x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=jax.NamedSharding(mesh, jax.P()))
        with jax.set_mesh(mesh):
            return identify(jax.jit(lambda x: run(x, kind)).lower(x))
    assert program() == program(path="elsewhere/moved.py", line=70)
    others = [program(factor=3.0), program("h100:1" if kind != "tpu" else "v6e:2x2"), program("h200:2" if kind != "tpu" else "v5e:2x4")]
    assert len({program().key, *(other.key for other in others)}) == 4
    assert program().compiler.endswith("tpu" if kind == "tpu" else "gpu")
    assert program().name.startswith("jit__lambda(float32[64,128]) on 1 x ") or program().name.startswith("jit__lambda_(float32[64,128]) on 1 x ")


def test_devices_are_told_by_kind_place_and_topology():
    client = types.SimpleNamespace(devices=lambda: devices)
    devices = [types.SimpleNamespace(device_kind="TPU v9", id=index, coords=(index, 0, 0), client=client) for index in range(3)]
    assert describe_devices((devices[2], devices[1])) == "('TPU v9', [(2, 2, 0, 0), (1, 1, 0, 0)], [(0, 0, 0, 0), (1, 1, 0, 0), (2, 2, 0, 0)])"


def test_a_compiler_is_told_by_the_versions_of_its_packages_and_what_it_knows_of_gpus(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1.2 of {name}")
    assert describe_compiler("tpu") == "jaxlib 1.2 of jaxlib; libtpu 1.2 of libtpu"
    assert describe_compiler("gpu").startswith("jaxlib 1.2 of jaxlib; jax-cuda13-pjrt 1.2 of")
    assert "nvidia-cuda-nvcc 1.2 of nvidia-cuda-nvcc; nvidia-nvvm 1.2 of" in describe_compiler("gpu")
    assert 'platform_name: "CUDA"' in describe_compiler("gpu")


def test_flags_count_in_any_order_but_for_those_of_the_host_and_of_dumps(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_b=2 --xla_force_host_platform_device_count=8  --xla_a=1 --xla_dump_to=x")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_c=3")
    assert compiler_flags() == ["--xla_a=1", "--xla_gpu_b=2", "--xla_tpu_c=3"]
    monkeypatch.delenv("XLA_FLAGS")
    assert compiler_flags() == ["--xla_tpu_c=3"]


def test_programs_for_cpus_have_no_key():
    assert identify(jax.jit(lambda x: x + 1).lower(X)) is None
    assert set(program_keys.PACKAGES) == {"gpu", "tpu"}
