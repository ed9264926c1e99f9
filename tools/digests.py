"""Digests of tokens, log probabilities and weights, so that a refactoring can show that it changed no token and no bit.

    python tools/digests.py --out old.json                      # on the tree before: every part
    python tools/digests.py --write-old DIR                     # there too: a job that is half done, and orbax stores
    python tools/digests.py --out new.json                      # on the tree after
    python tools/digests.py --compare old.json new.json         # exit code 1, and the names that differ
    python tools/digests.py --out jobs.json --check-old DIR     # on each: the job resumed and the stores opened; the part `jobs`
    python tools/digests.py --out some.json requests isa        # some parts
    python tools/digests.py --out some.json --only 'requests/tp*' --add

Parts: `requests` is what engines (meshes, schemes, caches, with native kernels and without) answer 300 drawn requests of every sampling parameter;
`weights` the dequantized values of every checkpoint format and scheme on meshes; `isa` greedy text under every instruction set of this machine;
`jobs` what `--check-old` adds. Digests compare on one machine and one version of jax only; what they were made with is in the file, beside them.

Names inside `tpllm` that a refactoring may move are looked up in tools/digesting/tree.py only. The helpers of the tests make the small models.
"""
from __future__ import annotations

import argparse
import fnmatch
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
NUM_DEVICES = 8
PARTS = ("requests", "weights", "isa")
JOBS = "jobs"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - {*PARTS, JOBS}:
        parser.error(f"there is no part {min(unknown)!r}; parts are {', '.join((*PARTS, JOBS))}")
    if options.compare:
        return compare(*(json.loads(pathlib.Path(path).read_text()) for path in options.compare), parts=options.parts)
    if options.write_old is None and options.out is None:
        parser.error("give --out, --write-old or --compare")
    if JOBS in options.parts and options.check_old is None:
        parser.error(f"the part {JOBS!r} needs --check-old DIR, with what --write-old made on the tree before")
    _prepare_devices()
    if options.write_old is not None:
        from tools.digesting import old_folders
        old_folders.write(pathlib.Path(options.write_old))
    if options.out is not None:
        _write(options)
    return 0


def compare(first: Mapping, second: Mapping, *, parts: Sequence[str] = ()) -> int:
    """Print what differs between two files; returns 1 where something does, or where there is nothing to compare."""
    old, new = ({name: value for name, value in each["digests"].items() if not parts or name.partition("/")[0] in parts} for each in (first, second))
    lines = [f"differs: {name}" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    for which, here, there in (("first", old, new), ("second", new, old)):
        lines += [f"only in the {which}: {name}" for name in sorted(here.keys() - there.keys())]
    if not old and not new:
        lines.append("nothing to compare")
    for line in lines:
        print(line)
    if lines and first["about"] != second["about"]:
        print(f"made with {first['about']} and {second['about']}: digests compare on one machine and one version of jax only")
    print(f"{sum(old[name] == new[name] for name in old.keys() & new.keys())} digests are equal, {len(lines)} are not")
    return int(bool(lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} and {JOBS}; without one all that can be had")
    parser.add_argument("--out", metavar="FILE", help="write digests there, as JSON")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="of the parts, the cases whose names match")
    parser.add_argument("--add", action="store_true", help="keep what FILE holds already, and run only the cases that it lacks")
    parser.add_argument("--write-old", metavar="DIR", help="make the folders that --check-old takes")
    parser.add_argument("--check-old", metavar="DIR", help="resume the job and open the stores that --write-old made; DIR stays as it is")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="say which digests of two files differ")
    return parser


def _prepare_devices() -> None:
    """Virtual devices, before jax is imported; the command line and other processes of these parts get them too."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flag = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def _write(options: argparse.Namespace) -> None:
    """Run the chosen cases; the file is written after each, so that ``--add`` can go on with a run that was stopped."""
    path, digests = pathlib.Path(options.out), {}
    if options.add and path.exists():
        digests = json.loads(path.read_text())["digests"]
    cases = [case for case in chosen_cases(options.parts, options.only, options.check_old)
             if not any(name.startswith(f"{case.name}/") for name in digests)]
    for case in cases:
        start = time.monotonic()
        if case.runs_here:
            with tempfile.TemporaryDirectory() as folder:
                digests |= {f"{case.name}/{name}": value for name, value in case.run(pathlib.Path(folder)).items()}
            print(f"{time.monotonic() - start:7.1f} s  {case.name}", file=sys.stderr, flush=True)
        elif not any(name.startswith(f"{case.name}/") for name in digests):  # with those of the same process it may be there by now
            digests |= _in_a_process([each.name for each in cases if each.environment == case.environment], case.environment)
        path.write_text(json.dumps({"about": _about(), "digests": dict(sorted(digests.items()))}, indent=1) + "\n")


def chosen_cases(parts: Sequence[str], patterns: Sequence[str], old: str | None) -> list:
    """The cases of some parts.

    Args:
        parts: their names; without one all of them, ``jobs`` where ``old`` is there.
        patterns: of their names; none takes all.
        old: what ``--write-old`` made, or None.

    Raises:
        SystemExit: there are none.
    """
    from tools.digesting import engines, old_folders, weights
    made = {"requests": engines.request_cases, "weights": weights.cases, "isa": engines.isa_cases}
    if old is not None:
        made[JOBS] = lambda: old_folders.cases(pathlib.Path(old).absolute())
    cases = [case for part in parts or made for case in made[part]()]
    cases = [case for case in cases if not patterns or any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]
    if not cases:
        raise SystemExit(f"digests: no case matches {', '.join(patterns) or ', '.join(parts)}")
    return cases


def _in_a_process(names: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Digests of cases that need a process started with some variables."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "digests.json"
        only = [word for name in names for word in ("--only", name)]
        subprocess.run([sys.executable, __file__, "--out", str(out), *only, *sorted({name.partition("/")[0] for name in names})], check=True,
                       env={**os.environ, **environment})
        return json.loads(out.read_text())["digests"]


def _about() -> dict[str, str | list[str]]:
    """What decides the last bits beside the tree."""
    import platform

    import jax
    import jaxlib

    from tools.digesting import tree
    return {"machine": platform.machine(), "jax": jax.__version__, "jaxlib": jaxlib.__version__, "instruction_sets": list(tree.instruction_sets()),
            "xla_flags": os.environ.get("XLA_FLAGS", "")}


if __name__ == "__main__":
    sys.exit(main())
