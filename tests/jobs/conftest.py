"""A small job on the fake engine."""
import pathlib

import pytest

from tests.jobs.fake_llm import FakeLLM
from tpllm.jobs.config import JobConfig
from tpllm.jobs.runner import run_job


@pytest.fixture
def make_job(tmp_path):
    """``make_job(text, **keys)``: a job over that input, in this test's own folder."""
    def make(text: str | bytes, *, output: str = "out", **keys) -> JobConfig:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return JobConfig(**{"model": "fake", "input": str(path), "output": str(tmp_path / output), "rows_per_part": 3,
                            "engine": {"max_num_seqs": 3}, **keys})
    return make


@pytest.fixture
def run_text(make_job):
    """``run_text(text, **keys)``: run such a job to its end; returns its folder."""
    def run(text: str | bytes, **keys) -> pathlib.Path:
        job = make_job(text, **keys)
        assert run_job(job, make_llm=FakeLLM).is_complete
        return pathlib.Path(job.output)
    return run
