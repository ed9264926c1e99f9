"""Kinds of weights that are compared, one after the other, each with a file of llama.cpp's own type."""
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.cpu.peers import gguf_file
from benchmarks.cpu.peers import llama_cpp_model as peer
from tpllm.errors import ConfigError
from tpllm.model.config import ModelConfig

PEER_TYPES = {"bf16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
FILE_TYPES = {kind: kind.upper() for kind in ("q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k")}
ALL_TYPES = PEER_TYPES | FILE_TYPES


def check_build(*, is_slow_allowed: bool) -> None:
    """Refuse a llama.cpp that was built for a lesser CPU: it would be a bad peer."""
    line = peer.system_line()
    if (missing := peer.missing_features(line, peer.cpu_flags())) and not is_slow_allowed:
        raise ConfigError(f"this CPU has {', '.join(missing)}, which this build of llama.cpp does not use ({line}); build it here, by "
                          "CMAKE_ARGS=-DGGML_NATIVE=ON pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python, "
                          "or measure against it as it is with --allow-slow-peer")


def check_disk(config: ModelConfig, kinds: list[str], folder: str) -> None:
    """Refuse a temporary folder that cannot hold the F16 file and the largest other one."""
    needed = gguf_file.file_bytes(config, "F16") + max(gguf_file.file_bytes(config, ALL_TYPES[kind]) if kind != "bf16" else 0 for kind in kinds)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(f"the files need {needed / 1e9:.1f} GB, {tempfile.gettempdir()} has {free / 1e9:.1f} free; name another folder with TMPDIR")


def compare_kinds(report: dict[str, Any], path: pathlib.Path, config: ModelConfig, compare_kind: Callable[[str, pathlib.Path], dict[str, Any]],
                  print_kind: Callable[[dict[str, Any], str], None], *, needs_file: bool = True) -> int:
    """Fill ``report["kinds"]``, write the report after each kind, and print that; returns the exit code.

    Args:
        report: with the kinds' names in ``report["setup"]["kinds"]``.
        path: where it is written to.
        config: the model's.
        compare_kind: gives a kind's entry, of its name and of the F16 file that other types are made of.
        print_kind: shows it.
        needs_file: whether the F16 file is written.
    """
    kinds = report["setup"]["kinds"]
    with tempfile.TemporaryDirectory(prefix="tpllm-gguf-") as folder:
        check_disk(config, kinds, folder)
        f16 = pathlib.Path(folder) / "F16.gguf"
        if needs_file:
            gguf_file.write_f16(f16, config)
        for kind in kinds:
            report["kinds"][kind] = compare_kind(kind, f16)
            path.write_text(json.dumps({**report, "load_average_after": list(os.getloadavg())}, indent=1) + "\n")
            print_kind(report, kind)
    print(f"written to {path}")
    return 0
