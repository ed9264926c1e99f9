"""The soak: what it counts, and that it can fail."""
import itertools
import json

import pytest

from tests.bench.conftest import load_script

pytestmark = pytest.mark.slow
SHORT = ["--shape", "tiny", "--minutes", "0.1", "--warm-up-minutes", "0.05", "--period", "1", "--max-slope", "1000"]


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks.cpu.soak")


def test_every_kind_of_request_comes_and_nothing_compiles(script, tmp_path):
    path = tmp_path / "soak.json"
    assert script.main([*SHORT, "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    assert all(report[name] > 0 for name in ("num_done", "num_aborted", "num_refused", "num_preemptions", "num_generated_tokens"))
    assert report["num_compiles"] == 0
    assert len(report["times_s"]) == len(report["rss_mb"]) >= 3


def test_memory_that_grows_fails(script, tmp_path, monkeypatch):
    grown = itertools.count(2**30, 2**20)  # 1 MiB each second
    monkeypatch.setattr(script, "_resident_bytes", lambda: next(grown))
    path = tmp_path / "soak.json"
    assert script.main([*SHORT, "--max-slope", "1", "--output", str(path)]) == 1
    report = json.loads(path.read_text())
    seconds, grown_mb = report["times_s"][-1], len(report["rss_mb"]) - 1
    assert report["slope_mb_per_minute"] == pytest.approx(60 * grown_mb / seconds, rel=0.5)
