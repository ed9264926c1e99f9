"""Standard output or standard error may be closed, full, or a pipe whose reader has gone: work that is done is done, and what cannot be said is one
line or nothing."""
import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

from tests.jobs.fake_job_process import REPOSITORY, NoSleepLLM
from tests.jobs.small_job import contents, rows_text
from tpllm.jobs.config import JobConfig
from tpllm.jobs.runner import run_job

STATES = ("closed", "full", "gone")
NO_SPACE, NO_FILE = "No space left on device", "Bad file descriptor"
GENERATE = ("generate", "fake", "-p", "a", "--raw", "--quiet")
TEXT = rows_text(5, bad=(2,))


@contextlib.contextmanager
def stream(state: str):
    """What to give a process as one of its outputs, but for ``closed``."""
    if state == "gone":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full" if state == "full" else os.devnull, os.O_WRONLY)
    try:
        yield writer
    finally:
        os.close(writer)


def command(*words: str, stdout: str = "", stderr: str = "") -> tuple[int, str, str]:
    """Run ``tpllm`` with its outputs in the states named; the exit code and what it wrote."""
    closing = "".join(f" {fd}>&-" for fd, state in ((1, stdout), (2, stderr)) if state == "closed")
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(stream(state)) if state else subprocess.PIPE for state in (stdout, stderr)]
        program = [sys.executable, "-m", "tests.jobs.run_fake_command", *words]
        done = subprocess.run(["sh", "-c", f'exec "$@"{closing}', "sh", *program], cwd=REPOSITORY, stdout=outputs[0], stderr=outputs[1], timeout=120)
    return done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode()


@pytest.fixture
def job(tmp_path):
    (tmp_path / "rows.jsonl").write_text(TEXT)
    return JobConfig(model="fake", input=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "whole"), rows_per_part=2)


@pytest.mark.parametrize("words", [GENERATE, ("--help",), ("--version",), ("job", "status", "OUT"), ("run", "JOB", "--dry-run")])
def test_a_result_that_cannot_be_printed_is_one_line_and_code_1_and_a_reader_that_has_gone_is_none(job, tmp_path, words):
    run_job(job, make_llm=NoSleepLLM)
    (tmp_path / "job.yaml").write_text(f"model: fake\ninput: {job.input}\noutput: {tmp_path}/other\nsampling: {{max_tokens: 3}}\n")
    words = [{"OUT": job.output, "JOB": str(tmp_path / "job.yaml")}.get(word, word) for word in words]
    assert command(*words, stdout="full") == (1, "", f"tpllm: error: cannot write to standard output: {NO_SPACE}\n")
    assert command(*words, stdout="gone") == (141, "", "")


def test_a_closed_standard_output_is_as_a_full_one():
    assert command(*GENERATE, stdout="closed") == (1, "", f"tpllm: error: cannot write to standard output: {NO_FILE}\n")


@pytest.mark.parametrize("stderr", STATES)
def test_what_cannot_be_said_on_standard_error_changes_nothing(stderr):
    assert command(*GENERATE, "--temperature", "0", stderr=stderr) == (0, "[a] max 512 t 0\n", "")
    assert command("frobnicate", stderr=stderr) == (2, "", "")
    assert command(*GENERATE, stdout="full", stderr=stderr) == (1, "", "")


@pytest.mark.parametrize("state", STATES)
def test_a_finished_job_and_a_finished_merge_exit_0_with_their_files_whole(job, tmp_path, state):
    shards = [dataclasses.replace(job, output=str(tmp_path / "shards"), shard=f"{index}/2") for index in range(2)]
    for each in (job, *shards):
        run_job(each, make_llm=NoSleepLLM)
    (tmp_path / "job.yaml").write_text(f"model: fake\ninput: {job.input}\noutput: {tmp_path}/out\nrows_per_part: 2\n")
    assert command("run", str(tmp_path / "job.yaml"), stdout=state, stderr=state)[0] == 0
    assert command("job", "merge", str(tmp_path / "shards"), stdout=state, stderr=state)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "shards") == contents(pathlib.Path(job.output))


@pytest.mark.parametrize("state", STATES)
def test_a_finished_quantized_folder_is_whole_and_exits_0(tmp_path, state):
    assert command("quantize", "demo", str(tmp_path / "out"), "--scheme", "int8", stdout=state) == (0, "", "")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_descriptor_that_is_closed_is_given_to_no_file_of_the_job(job, tmp_path):
    """A library that writes to standard error would write into the journal."""
    (tmp_path / "job.yaml").write_text(f"model: fake\ninput: {job.input}\noutput: {tmp_path}/out\n")
    script = ("import os, sys\nfrom tests.jobs.fake_llm import FakeLLM\nfrom tpllm.cli.main import main\n"
              "class Noisy(FakeLLM):\n"
              "    def _output(self, *arguments):\n"
              "        for fd in (1, 2):\n"
              "            try: os.write(fd, b'noise')\n"
              "            except OSError: pass\n"
              "        return super()._output(*arguments)\n"
              "sys.exit(main(sys.argv[1:], make_llm=Noisy))")
    program = [sys.executable, "-c", script, "run", str(tmp_path / "job.yaml")]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *program], cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0
    assert not any(b"noise" in data for data in contents(tmp_path / "out").values())
