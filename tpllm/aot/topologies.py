"""Meshes of accelerators that this machine does not have, to compile for.

The compilers come with plugins: for NVIDIA ``jax-cuda13-pjrt``, ``jax-cuda13-plugin``, ``nvidia-cuda-nvcc`` and ``nvidia-nvvm``, for TPUs
``libtpu``; no driver and no device is needed. What XLA has to know of a GPU stands in a text file here (``GpuTargetConfigProto``).
"""
import importlib.resources
import os
from collections.abc import Mapping

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from sharding_rules import make_mesh
from tpllm.errors import ConfigError

GPUS = ("h100", "h200")
TPUS = ("v4", "v5e", "v5p", "v6e")
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # or libtpu asks the metadata server of a cloud, and waits
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of no consequence: without one libtpu warns
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened, so other processes need not be kept out
}


def describe_devices(name: str) -> list[jax.Device]:
    """The devices of an accelerator, to compile for; nothing can be put on them.

    Args:
        name: a GPU and how many of them in one host, ``"h200:8"``; or a TPU and the shape of its slice, ``"v5e:2x4"``.

    Raises:
        ConfigError: an unknown accelerator, a shape it does not come in, or a compiler that is not installed.
    """
    kind, _, size = name.partition(":")
    if kind not in GPUS + TPUS:
        raise ConfigError(f"unknown accelerator {kind!r} in {name!r}; known: {', '.join(GPUS + TPUS)}; write 'h200:8' or 'v5e:2x4'")
    try:
        return _describe_gpus(kind, size, name) if kind in GPUS else _describe_tpus(name)
    except ConfigError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"no compiler for {name!r}: {str(error).strip().splitlines()[0]}; it needs {_packages(kind)}, and a shape that the "
                          "accelerator comes in") from error


def accelerator_mesh(name: str, sizes: Mapping[str, int]) -> Mesh:
    """A mesh over the first devices of an accelerator.

    Args:
        name: as for :func:`describe_devices`.
        sizes: axis name -> devices along it, as for ``sharding_rules.make_mesh``.

    Raises:
        ConfigError: see :func:`describe_devices`.
        MeshError: the mesh asks for more devices than the accelerator has.
    """
    return make_mesh(sizes, describe_devices(name))


def _describe_gpus(kind: str, size: str, name: str) -> list[jax.Device]:
    if not size.isdecimal() or int(size) < 1:
        raise ConfigError(f"accelerator {name!r}: write how many GPUs as a whole number of at least 1, as in '{kind}:8'")
    target = importlib.resources.files("tpllm.aot").joinpath(f"{kind}.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{int(size)}").devices


def _describe_tpus(name: str) -> list[jax.Device]:
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def _packages(kind: str) -> str:
    return "libtpu" if kind in TPUS else "jax-cuda13-pjrt and jax-cuda13-plugin of jax's version, nvidia-cuda-nvcc and nvidia-nvvm"
