"""Show a model's configuration, its parameters on a mesh, and the memory they take; weights are not loaded.

A mesh larger than this machine can be tried with virtual devices: tpllm --cpu-devices 8 inspect MODEL --mesh tp=8
"""
import argparse
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from tpllm.cli.help_text import MODEL_TEXT

COLUMNS = ("parameter", "count", "shape", "stored", "kept", "axes", "sharding", "bytes/device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_TEXT)
    parser.add_argument("--mesh", default="auto", help="such as 'tp=4'; by default all local devices")
    parser.add_argument("--dtype", default="auto", help="of the weights once loaded: float32, bfloat16 or float16")
    parser.add_argument("--quantization", help="how weights are quantized while they are loaded, such as int4, or '*.mlp.*=int4,*=none'")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--json", action="store_true", help="print JSON, with one entry for each parameter")


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    report = inspect_model(args.model, mesh=args.mesh, dtype=args.dtype, quantization=args.quantization, revision=args.revision)
    print(json.dumps(report, indent=1) if args.json else "\n".join(_text(report)))
    return 0


def inspect_model(model: str, *, mesh: str = "auto", dtype: str = "auto", quantization: Any = None,
                  revision: str | None = None) -> dict[str, Any]:
    """What a model is and what it takes on a mesh, as JSON-able data.

    Args:
        model: a folder, a GGUF file, a hub id, or ``"demo"``.
        mesh: as :class:`tpllm.LLM` takes it.
        dtype: of the weights once loaded.
        quantization: as :class:`tpllm.LLM` takes it.
        revision: of a hub id.

    Raises:
        TpllmError: a checkpoint that is damaged or does not fit the mesh.
    """
    from sharding_rules import DATA_TENSOR, mesh_text
    from tpllm.checkpoint.entries import find_entries
    from tpllm.checkpoint.folder import open_checkpoint
    from tpllm.checkpoint.load import stored_schemes
    from tpllm.loading import choose_dtype, choose_mesh
    from tpllm.model.kv_cache import cache_bytes_per_device
    from tpllm.model.params import named_leaves, param_specs
    from tpllm.model.partition import fit_to_mesh
    from tpllm.weights.policy import parse_policy
    from tpllm.weights.storage import Storage
    checkpoint = open_checkpoint(model, revision=revision)
    config = fit_to_mesh(checkpoint.config, choose_mesh(mesh, checkpoint.config), DATA_TENSOR)
    weight_dtype = choose_dtype(dtype, checkpoint.hf_config, config.partition, tensors=checkpoint.tensors)
    entries = find_entries(checkpoint, config)
    storage = Storage.on(config.partition, weight_dtype, parse_policy(quantization), stored=stored_schemes(entries, config))
    parameters = [_parameter(name, spec, config.partition, source=entries[name], storage=storage)
                  for name, spec in named_leaves(param_specs(config))]
    num_parameters = sum(entry.num_values for entry in entries.values())
    num_rows = config.partition.mesh.shape.get("dp", 1)  # the least batch that the mesh cuts evenly
    kv_bytes = {name: cache_bytes_per_device(config, num_rows, 1, name) for name in ("float32", "bfloat16", "float16")}
    return {
        "model": model, "family": checkpoint.family.name, "folder": str(checkpoint.folder), "revision": checkpoint.revision,
        "mesh": mesh_text(config.partition.mesh), "platform": config.partition.platform, "dtype": str(weight_dtype), "quantization": quantization,
        "format": "safetensors" if checkpoint.weights is None else checkpoint.weights.name,
        "stored_bits_per_weight": round(sum(entry.num_values * entry.bits_per_weight for entry in entries.values()) / num_parameters, 3),
        "config": _config(config), "num_parameters": num_parameters,
        "weight_bytes_per_device": sum(parameter["bytes_per_device"] for parameter in parameters),
        "kv_bytes_per_token_per_device": kv_bytes, "parameters": parameters,
    }


def _parameter(name: str, spec: Any, partition: Any, *, source: Any, storage: Any) -> dict[str, Any]:
    layout = storage.layout(spec.shape, spec.axes, partition, name=name)
    arrays = [(spec.shape, storage.dtype, spec.axes)] if layout is None else layout.arrays().values()
    num_bytes = sum(math.prod(partition.sharding(axes, shape=shape, name=name).shard_shape(shape)) * dtype.itemsize for shape, dtype, axes in arrays)
    sharding = partition.sharding(spec.axes, shape=spec.shape, name=name)
    kept = str(storage.dtype) if layout is None or layout.scheme is None else layout.scheme.name
    return {"name": name, "shape": list(spec.shape), "stored_dtype": str(source.kind), "kept": kept, "axes": list(spec.axes),
            "sharding": [",".join(axes) if isinstance(axes, tuple) else axes for axes in sharding.spec],
            "bytes_per_device": num_bytes}


def _config(config: Any) -> dict[str, Any]:
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "partition"}
    fields["rope"] = dataclasses.asdict(config.rope)
    fields["activation"] = config.activation if isinstance(config.activation, str) else dataclasses.asdict(config.activation)
    fields["layer_ropes"] = [rope and dataclasses.asdict(rope) for rope in config.layer_ropes]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def _text(report: dict[str, Any]) -> Iterator[str]:
    yield f"{report['model']}: {report['family']}, {report['num_parameters']:,} parameters, mesh {report['mesh']} ({report['platform']}), " \
          f"{report['format']} of {report['stored_bits_per_weight']:g} bits a weight, activations {report['dtype']}"
    for key, value in report["config"].items():
        if key == "layer_windows":
            value = "none" if not any(value) else value
        if key == "rope":
            value = _rope(value)
        if key == "layer_ropes":
            value = "rope in every layer" if all(rope == report["config"]["rope"] for rope in value) else ", ".join(map(_rope, value))
        yield f"  {key:<18} {value}"
    yield ""
    rows = [COLUMNS, *_grouped(report["parameters"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) if name in ("count", "bytes/device") else cell.ljust(width)
                        for cell, width, name in zip(row, widths, COLUMNS, strict=True)).rstrip()
    yield ""
    yield f"weights: {report['weight_bytes_per_device']:,} bytes a device"
    cache = ", ".join(f"{size:,} in {name}" for name, size in report["kv_bytes_per_token_per_device"].items())
    yield f"KV cache: bytes a token a device: {cache}"


def _rope(rope: dict[str, Any] | None) -> str:
    """A rope rule in few words: what is not as in most models."""
    if rope is None:
        return "none"
    plain = {"kind": None, "theta": None, "factor": 1.0, "partial_rotary_factor": 1.0, "original_max_position": 0}
    return " ".join(str(rope[name]) if name == "kind" else f"{name}={rope[name]:g}" for name, usual in plain.items() if rope[name] != usual)


def _grouped(parameters: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row for all layers' parameters of one name and shape."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for parameter in parameters:
        key = (re.sub(r"^layers\.\d+\.", "layers.*.", parameter["name"]), str(tuple(parameter["shape"])), parameter["stored_dtype"],
               parameter["kept"], " ".join(axis or "-" for axis in parameter["axes"]), " ".join(axis or "-" for axis in parameter["sharding"]))
        groups.setdefault(key, []).append(parameter["bytes_per_device"])
    return [(name, str(len(sizes)), *rest, f"{sum(sizes):,}") for (name, *rest), sizes in groups.items()]
