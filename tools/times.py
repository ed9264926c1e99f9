"""What the checks cost: the share of each part, and the slowest tests.

    python tools/times.py            # of what `make` and `.ci/run` last wrote to build/times

`build/times/parts.tsv` has a line "part, seconds" for each part of `.ci/run`; `build/times/<part>.xml` is what pytest says of its tests.
"""
import argparse
import collections
import pathlib
import sys
import xml.etree.ElementTree as ElementTree

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "build" / "times"


def read_parts(folder: pathlib.Path) -> dict[str, float]:
    """Seconds of each part of `.ci/run`, in its order; empty where it did not run."""
    path = folder / "parts.tsv"
    rows = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
    return {part: float(seconds) for part, seconds in rows}


def read_tests(folder: pathlib.Path) -> list[tuple[float, str, str]]:
    """(seconds, suite, test) of every test of the last runs; a test with its module, setup included."""
    return [(float(case.get("time", 0)), path.stem, f"{case.get('classname')}::{case.get('name')}")
            for path in sorted(folder.glob("*.xml")) for case in ElementTree.parse(path).iter("testcase")]


def report(parts: dict[str, float], tests: list[tuple[float, str, str]], count: int) -> str:
    """The tables, as text."""
    lines = []
    if parts:
        total = sum(parts.values())
        lines += [f"{'part':24}{'seconds':>9}{'share':>8}"]
        lines += [f"{part:24}{seconds:9.0f}{seconds / total:8.1%}" for part, seconds in parts.items()]
        lines += [f"{'all':24}{total:9.0f}{1:8.1%}", ""]
    modules = collections.Counter()
    for seconds, suite, test in tests:
        modules[suite, test.split("::")[0]] += seconds
    of_modules = [(seconds, suite, module) for (suite, module), seconds in modules.most_common(count)]
    for title, rows in ((f"modules, of {sum(modules.values()):.0f} seconds in all processes together", of_modules),
                        ("tests", sorted(tests, reverse=True)[:count])):
        if rows:
            lines += [f"the slowest {len(rows)} {title}", *(f"{seconds:8.1f}  {suite:14}{name}" for seconds, suite, name in rows), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=30, help="rows of each table")
    count = parser.parse_args().count
    parts, tests = read_parts(FOLDER), read_tests(FOLDER)
    if not parts and not tests:
        print(f"times: nothing was measured yet in {FOLDER.relative_to(FOLDER.parents[1])}; run `make test` first", file=sys.stderr)
        return 1
    print(report(parts, tests, count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
