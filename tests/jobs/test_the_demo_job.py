"""Jobs on the real engine and the model inside the package."""
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.jobs.small_job import all_errors, all_rows, contents
from tpllm.jobs.config import load_job
from tpllm.jobs.outputs.durable import Disk
from tpllm.jobs.rows import read_row, row_request
from tpllm.jobs.runner import run_job
from tpllm.jobs.sources.open import open_source

REPOSITORY = pathlib.Path(__file__).parents[2]
PROMPTS = ["def ", "class A:\n", "import os\n", "x = [", "for i in range(", "try:\n", "return ", "with open("]


@pytest.fixture
def quickstart(monkeypatch):
    """The quickstart's job; its paths are relative to the repository."""
    monkeypatch.chdir(REPOSITORY)
    return load_job("configs/jobs/quickstart.yaml")


def test_every_row_of_the_quickstart_can_be_read(quickstart):
    rows = [read_row(raw) for raw in open_source(quickstart.input).rows()]
    for row in rows:
        row_request(row, job_seed=0, sampling=quickstart.sampling)
    assert len({row.custom_id for row in rows}) == len(rows) == 12


class DyingDisk(Disk):
    """Stops the job at its third part."""

    def replace(self, source, target):
        if target.name == "part-00002.jsonl":
            raise RuntimeError("stopped here")
        super().replace(source, target)


@pytest.mark.slow
def test_on_the_real_engine_a_resumed_job_equals_an_uninterrupted_one_and_each_row_one_alone(tmp_path, quickstart):
    def job(rows, output, **changes):
        path = tmp_path / f"{output}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return dataclasses.replace(quickstart, input=str(path), output=str(tmp_path / output), mesh="tp=1",
                                   engine={"max_num_seqs": 4, "max_model_len": 64}, rows_per_part=2, **changes)
    rows = [{"custom_id": str(i), "prompt": prompt, "sampling": {"temperature": i % 2, "seed": i, "max_tokens": 4 + i}}
            for i, prompt in enumerate(PROMPTS)]
    rows.append({"custom_id": "empty", "prompt": ""})
    rows.append({"custom_id": "long", "prompt": "x " * 100})
    whole = job(rows, "whole")
    assert run_job(whole).is_complete
    resumed = dataclasses.replace(whole, output=str(tmp_path / "resumed"))
    with pytest.raises(RuntimeError, match="stopped here"):
        run_job(resumed, disk=DyingDisk())
    assert run_job(resumed).num_new > 0
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert [error["custom_id"] for error in all_errors(tmp_path / "whole")] == ["empty", "long"]
    backwards = job(rows[::-1], "backwards")
    assert run_job(backwards).is_complete
    assert all_rows(tmp_path / "backwards")[::-1] == all_rows(tmp_path / "whole")
    alone = job(rows[5:6], "alone")
    assert run_job(alone).is_complete
    assert all_rows(tmp_path / "alone") == all_rows(tmp_path / "whole")[5:6]


@pytest.mark.slow
def test_on_the_real_engine_two_shards_in_two_processes_merge_into_the_unsharded_job(tmp_path):
    rows = [{"custom_id": str(i), "prompt": prompt, "sampling": {"temperature": i % 2, "max_tokens": 3 + i}} for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"custom_id": "empty", "prompt": ""}]))
    (tmp_path / "job.yaml").write_text("model: demo\nmesh: tp=1\nengine: {max_num_seqs: 4, max_model_len: 64}\ninput: rows.jsonl\n"
                                       "output: out\nrows_per_part: 2\n")

    def start(*words):
        return subprocess.Popen([sys.executable, "-m", "tpllm.cli.main", *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    commands = [["run", "job.yaml", "--output", "whole"], *(["run", "job.yaml", "--shard", f"{index}/2"] for index in range(2))]
    for process in [start(*words) for words in commands]:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    for words in (["job", "merge", "out"], ["run", "job.yaml"]):
        process = start(*words)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert "nothing was left to do" in errors
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
