"""The memory that a job needs does not grow with its input, beyond eight bytes a row."""
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
CEILINGS = {"jsonl": 96 << 20, "parquet": 160 << 20}  # Arrow decodes ahead, and gives memory back late


def measure(*arguments) -> int:
    """What :mod:`tests.jobs.measure_memory` prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "tests.jobs.measure_memory", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout or 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_million_rows_are_scanned_and_read_in_little_memory(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    measure("make", kind, path, 1_000_000, 160)
    assert measure("naive", path) > 1.5 * CEILINGS[kind]
    assert measure("read", path) < CEILINGS[kind]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "output_format"), [("jsonl", "jsonl"), ("parquet", "parquet")])
def test_a_job_over_many_rows_runs_in_little_memory(tmp_path, kind, output_format):
    path = tmp_path / f"rows.{kind}"
    measure("make", kind, path, 50_000, 4000)
    assert measure("naive", path) > 1.5 * CEILINGS[kind]
    assert measure("run", path, tmp_path / "out", output_format) < CEILINGS[kind]
