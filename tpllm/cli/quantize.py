"""Save a checkpoint with quantized weights: a folder of compressed-tensors files, which transformers opens too, or an orbax store.

In compressed-tensors files the linear layers of the decoder are quantized; embedding, norms and head stay as they are. An orbax store takes every
scheme, and holds what loading made of the model: it opens on any mesh with nothing to quantize. A folder that is there already is never written
to, and one that could not be finished does not appear.
"""
import argparse
import contextlib
from collections.abc import Callable
from typing import Any

from tpllm.cli.entry import raise_interrupts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or 'demo'")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument("--scheme", required=True,
                        help="int8, w8a8, fp8, int4, int4-g64 or int4-g128, or one for each pattern of parameter names: '*.mlp.*=int4,*=int8'")
    parser.add_argument("--format", choices=["compressed-tensors", "orbax"], default="compressed-tensors", help="of the folder (default: the first)")
    parser.add_argument("--mesh", default="tp=1", help="of an orbax store: the devices to load on (default tp=1)")
    parser.add_argument("--max-shard-size", type=_gigabytes, default="5", metavar="GB", help="largest file of weights, in GB (default 5)")
    parser.add_argument("--revision", help="of a hub id")


def _gigabytes(text: str) -> int:
    try:
        size = int(float(text) * 10**9)
    except ValueError:
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size in GB above 0")
    return size


def run(args: argparse.Namespace, *, make_llm: Callable[..., Any] | None) -> int:
    """Run the command; returns the exit code."""
    if args.format == "orbax":
        from tpllm.loading import save_store
        raise_interrupts()
        folder = save_store(args.model, args.out, quantization=args.scheme, mesh=args.mesh, revision=args.revision)
    else:
        from tpllm.checkpoint.save import quantize_checkpoint
        raise_interrupts()
        folder = quantize_checkpoint(args.model, args.out, args.scheme, revision=args.revision, max_shard_bytes=args.max_shard_size)
    with contextlib.suppress(OSError):  # the folder is the result: it is there, whether or not that can be said
        print(f"{folder}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()):,} bytes", flush=True)
    return 0
