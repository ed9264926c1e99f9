"""The command: options, the run, the table, and the exit code."""
import argparse
import pathlib
import signal
import sys
from typing import Any

from benchmarks import gpu
from benchmarks.gpu.sections import SECTIONS, begin
from benchmarks.gpu.session import Session
from benchmarks.gpu.table import print_report
from benchmarks.gpu.worker import TaskError
from tpllm.bench.command import above_zero, check_writable
from tpllm.environment.software import package_versions
from tpllm.errors import ConfigError

NAMES = [section.name for section in SECTIONS]
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-triton", "torch", "triton", "transformers", "tokamax", "nvidia-cublas",
            "nvidia-cudnn-cu13", "nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-cuda-nvcc")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 where a result was wrong or a correctness case failed, 2 where it could not begin."""
    args = _parse(argv)
    try:
        if args.out:
            check_writable(str(args.out))
    except ConfigError as error:
        print(f"error: {error}")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers are ended too
    session = Session(is_tiny=args.tiny, seconds=60 * args.minutes, path=args.out)
    chosen = [section for section in SECTIONS if section.name in args.only]
    session.report["setup"] |= {"sections": [section.name for section in chosen], "packages": package_versions(PACKAGES)}
    try:
        begin(session, [section.name for section in chosen])
        session.run(chosen)
    except TaskError as error:
        print(f"error: {error}\n{error.details}")
        return 2
    finally:
        session.close()
    session.report["sections"] |= {name: {"status": "not run", "not_run": ["not asked for: --only"]} for name in NAMES if name not in args.only}
    session.write()
    print_report(session.report)
    print(f"{session.report['seconds']:.0f} s" + (f", written to {args.out}" if args.out else ""))
    return int(has_wrong_results(session.report))


def has_wrong_results(report: dict[str, Any]) -> bool:
    """Whether a case of a kernel, or its result in a contest, was not what it should be."""
    entries = [entry for section in report["sections"].values() for entry in section.get("entries", [])]
    results = [*entries, *(side for entry in entries for side in entry.get("sides", {}).values())]
    return any(result.get("is_right") is False for result in results)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU; nothing it prints is a measurement")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE.json", help="write the result there, section by section")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="SECTION", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--minutes", type=above_zero, default=8.5, metavar="N", help="the budget (default 8.5); what it leaves no time for is listed")
    return parser.parse_args(argv)
