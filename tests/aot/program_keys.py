"""What a compiler's result depends on, as one hash: the lowered program, its devices, the compiler and its flags."""
import base64
import dataclasses
import hashlib
import importlib.metadata
import importlib.resources
import json
import os
import re

import jax
from jax._src.interpreters import mlir
from jax._src.lib import mosaic_gpu_dialect, tpu, triton
from jaxlib.mlir import ir

from tests.aot.stored_facts import FORMAT

PACKAGES = {"gpu": ("jaxlib", "jax-cuda13-pjrt", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvvm"), "tpu": ("jaxlib", "libtpu")}
_FLAGS_OF_NO_CONSEQUENCE = ("--xla_force_host_platform_device_count", "--xla_dump_")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(rb"\\([0-9A-F]{2}|[\\\"])")
_BYTECODE, _ESCAPED_BYTECODE, _BASE64_BYTECODE = b"ML\xefR", "ML\\EFR", re.compile(rb"TUzvU[A-Za-z0-9+/]+=*")
# A hash of the kernel's bytecode, which knows lines; and a name with a count of the kernels that the process has lowered.
_OF_THE_PROCESS = re.compile(r'kernel_hash = "(?:[^"\\]|\\.)*", |mosaic_gpu\.dump_basename = "[^"]*", ')


@dataclasses.dataclass(frozen=True)
class Program:
    """A lowered program as its stored facts know it.

    Attributes:
        name: what it is called and takes, and on what devices.
        key: hash of all that its compiler's result depends on.
        compiler: version of jax and platform, such as ``"jax-0.10-gpu"``.
    """

    name: str
    key: str
    compiler: str


def identify(lowered: jax.stages.Lowered) -> Program | None:
    """The program's identity; None where it is for a CPU, whose compiler is this machine's own."""
    devices = _devices(lowered)
    platform = devices[0].platform
    if platform not in PACKAGES:
        return None
    version = ".".join(map(str, jax.__version_info__[:2]))
    parts = (FORMAT, canonical_text(lowered), describe_devices(devices), describe_compiler(platform), compiler_flags())
    return Program(_name(lowered, devices), hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32], f"jax-{version}-{platform}")


def canonical_text(lowered: jax.stages.Lowered) -> str:
    """StableHLO, and the code of kernels in it, without places in source code: code that moves to another line or folder lowers to the same text."""
    text = lowered.compiler_ir("stablehlo").operation.get_asm(enable_debug_info=False)
    context = _kernel_context()
    return _OF_THE_PROCESS.sub("", _STRING.sub(lambda string: _with_readable_kernels(string[1], context), text))


def _with_readable_kernels(escaped: str, context: ir.Context) -> str:
    """A string of StableHLO; where it holds a kernel's bytecode, as it is (Mosaic GPU, Triton) or in base64 (Mosaic TPU), with the kernel's text."""
    if _ESCAPED_BYTECODE not in escaped and "TUzvU" not in escaped:
        return f'"{escaped}"'
    data = _ESCAPED.sub(lambda found: found[1] if len(found[1]) == 1 else bytes.fromhex(found[1].decode()), escaped.encode())
    if data.startswith(_BYTECODE):
        return _kernel_text(data, context)
    return _BASE64_BYTECODE.sub(lambda found: _kernel_text(base64.b64decode(found[0]), context).encode(), data).decode(errors="backslashreplace")


def _kernel_text(bytecode: bytes, context: ir.Context) -> str:
    with context:
        return ir.Module.parse(bytecode).operation.get_asm(enable_debug_info=False, print_generic_op_form=True)


def _kernel_context() -> ir.Context:
    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True  # a kernel's operations have the names of their serialized form
    for dialect in (tpu, triton.dialect, mosaic_gpu_dialect):
        dialect.register_dialect(context)
    context.load_all_available_dialects()
    return context


def describe_devices(devices: tuple[jax.Device, ...]) -> str:
    """A program's devices in their order, and all of their topology."""
    def places(some):
        return [(device.id, *(device.coords or ())) for device in some]
    return repr((devices[0].device_kind, places(devices), places(devices[0].client.devices())))


def describe_compiler(platform: str) -> str:
    """Versions of what compiles, and what XLA is told of GPUs."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES[platform]]
    targets = [file.read_text() for file in sorted(importlib.resources.files("tpllm.aot").iterdir(), key=str) if file.name.endswith(".txtpb")]
    return "; ".join(versions + (targets if platform == "gpu" else []))


def compiler_flags() -> list[str]:
    """Those of the environment that can change what is compiled."""
    words = [word for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") for word in os.environ.get(name, "").split()]
    return sorted(word for word in words if not word.startswith(_FLAGS_OF_NO_CONSEQUENCE))


def _devices(lowered: jax.stages.Lowered) -> tuple[jax.Device, ...]:
    arguments = lowered._lowering.compile_args  # a lowered program says nowhere else which devices it is for
    shardings = [one for one in (*arguments["in_shardings"], *arguments["out_shardings"]) if isinstance(one, jax.sharding.Sharding)]
    return shardings[0]._device_assignment if shardings else tuple(jax.devices()[:1])


def _name(lowered: jax.stages.Lowered, devices: tuple[jax.Device, ...], num_shown: int = 4) -> str:
    function = lowered.compiler_ir("stablehlo").operation.attributes["sym_name"].value
    arrays = [array.str_short() for array in jax.tree.leaves(lowered.in_avals)]
    more = [f"{len(arrays) - num_shown} more"] if len(arrays) > num_shown else []
    return f"{function}({', '.join(arrays[:num_shown] + more)}) on {len(devices)} x {devices[0].device_kind}"
