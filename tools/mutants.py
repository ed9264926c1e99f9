"""Whether the tests notice faults: each of about a hundred one-line faults is made in a copy of the tree, and its tests have to fail.

    python tools/mutants.py                               # all of them, before a release (`make mutants`)
    python tools/mutants.py --only seed-of-a-row          # some, by name
    python tools/mutants.py --count 5 --seed 3            # some, by chance
    python tools/mutants.py --list                        # what there is
    python tools/mutants.py --draw 20 --seed 3            # new ones for tools/mutation/drawn.toml, each to be given its tests

The faults are in tools/mutation/: ``by_hand.toml`` where they would hurt most, ``drawn.toml`` by a seeded draw; ``equivalent.toml`` says of drawn
ones that were left out why no test can see them. A table is printed at the end. The exit code is 1 where a mutant survived, where its line is
no longer in the tree exactly once, or where its tests cannot tell: they fail without it, or all of them are skipped.
"""
from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import queue
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.mutation.copied_tree import copied_tree  # noqa: E402
from tools.mutation.draw import draw, to_toml  # noqa: E402
from tools.mutation.mutant import Mutant, StaleError, read_mutants  # noqa: E402
from tools.mutation.trial import CAUGHT, FAILED, STALE, Outcome, Trials  # noqa: E402

DATA = pathlib.Path("tools/mutation")
TIMEOUT_S = 600.0
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None, *, root: pathlib.Path = ROOT) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.draw is not None:
            print(to_toml(draw(root, options.draw, seed=options.seed)))
            return 0
        mutants = _chosen(read_mutants(root / DATA), options)
    except ValueError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name:44} {mutant.file:44} {' '.join(mutant.tests)}")
        return 0
    outcomes, is_interrupted = _try_all(root, mutants, num_workers=options.workers, timeout_s=options.timeout)
    outcomes.sort(key=lambda outcome: mutants.index(outcome.mutant))
    print(_table(outcomes))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    if is_interrupted:
        return INTERRUPTED
    return int(any(outcome.verdict in FAILED for outcome in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants")
    parser.add_argument("--count", type=int, metavar="N", help="N of them, chosen by --seed")
    parser.add_argument("--seed", type=int, default=0, help="of --count and --draw")
    parser.add_argument("--list", action="store_true", help="print names, files and tests, and run nothing")
    parser.add_argument("--draw", type=int, metavar="N", help="print N new mutants that are drawn by --seed, and run nothing")
    parser.add_argument("--json", metavar="FILE", help="write the outcomes there too")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="mutants tried at a time, each in a copy of the tree (2)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help=f"seconds after which tests hang ({TIMEOUT_S:g})")
    return parser


def _chosen(mutants: list[Mutant], options: argparse.Namespace) -> list[Mutant]:
    if options.only:
        if unknown := set(options.only) - {mutant.name for mutant in mutants}:
            raise ValueError(f"there is no mutant {min(unknown)!r}; --list prints their names")
        mutants = [mutant for mutant in mutants if mutant.name in options.only]
    if options.count is not None:
        chosen = random.Random(options.seed).sample(mutants, min(max(options.count, 0), len(mutants)))
        mutants = [mutant for mutant in mutants if mutant in chosen]
    if not mutants:
        raise ValueError("no mutant is chosen")
    return mutants


def _try_all(root: pathlib.Path, mutants: Sequence[Mutant], *, num_workers: int, timeout_s: float) -> tuple[list[Outcome], bool]:
    """(outcomes, whether Ctrl-C ended it)."""
    outcomes, fresh = [], []
    for mutant in mutants:
        try:
            mutant.applied(root)
            fresh.append(mutant)
        except StaleError as error:
            outcomes.append(Outcome(mutant, STALE, str(error), 0.0))
            _say(outcomes[-1])
    groups, trials, flags = _groups(fresh), Trials(timeout_s), _xla_flags(root)
    with contextlib.ExitStack() as stack:
        trees: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(min(max(num_workers, 1), len(groups))):
            trees.put(stack.enter_context(copied_tree(root, flags)))

        def try_group(group: list[Mutant]) -> None:
            tree = trees.get()
            try:
                for outcome in trials.of_group(tree, group):
                    outcomes.append(outcome)
                    _say(outcome)
            finally:
                trees.put(tree)
        executor = stack.enter_context(concurrent.futures.ThreadPoolExecutor(max(trees.qsize(), 1)))
        futures = [executor.submit(try_group, group) for group in groups]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except KeyboardInterrupt:
            executor.shutdown(wait=False, cancel_futures=True)
            trials.stop()
            return outcomes, True
    return outcomes, False


def _groups(mutants: Sequence[Mutant]) -> list[list[Mutant]]:
    """Mutants whose tests run once without any of them: those of the same tests; of C++ all that one build serves, and first, for they take long."""
    groups: dict[tuple, list[Mutant]] = {}
    for mutant in sorted(mutants, key=lambda mutant: not mutant.needs_compiler):
        groups.setdefault(("C++", mutant.isa) if mutant.needs_compiler else mutant.tests, []).append(mutant)
    return list(groups.values())


def _xla_flags(root: pathlib.Path) -> str:
    """Those of `make test`, which the Makefile knows."""
    if not (root / "Makefile").exists():
        return ""
    return subprocess.run(["make", "-s", "--no-print-directory", f"VENV={sys.prefix}", "test-flags"], cwd=root, check=True, capture_output=True,
                          text=True).stdout.strip()


def _say(outcome: Outcome) -> None:
    print(f"{outcome.verdict:9} {outcome.seconds:6.1f} s  {outcome.mutant.name}  {outcome.by}", file=sys.stderr, flush=True)


def _rows(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    yield "mutant", "file", "tests", "outcome", "by", "s"
    for outcome in outcomes:
        by = outcome.by.partition("\n")[0].replace("|", "\\|")
        yield outcome.mutant.name, outcome.mutant.file, " ".join(outcome.mutant.tests), outcome.verdict, by, f"{outcome.seconds:.1f}"


def _table(outcomes: Sequence[Outcome]) -> str:
    header, *rows = _rows(outcomes)
    counts = collections.Counter(outcome.verdict for outcome in outcomes)
    summary = ", ".join([f"{counts[CAUGHT]} of {len(outcomes)} caught", *(f"{counts[name]} {name}" for name in FAILED if counts[name])])
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]
    return "\n".join([*lines, "", f"{summary}; {sum(outcome.seconds for outcome in outcomes):.0f} s of tests."])


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # so that copies and running tests go with it
    sys.exit(main())
