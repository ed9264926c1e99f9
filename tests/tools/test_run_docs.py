"""The tool that runs the blocks of the pages: what it runs, what it compares, and that it leaves nothing out in silence."""
import itertools
import os
import pathlib
import subprocess
import textwrap
import time

import pytest

from tools.doc_blocks import PageError, matches, read_blocks, with_outputs
from tools.run_docs import Page, lend_environment, run_shell


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a page in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda text: Page("page.md", textwrap.dedent(text)).run()


def test_shell_and_python_blocks_run_in_order_in_one_folder(run, tmp_path):
    report = run("""\
        ```sh
        echo one > file
        ```
        ```python
        import pathlib
        text = pathlib.Path("file").read_text() + "two"
        ```
        ```yaml
        not: run
        ```
        ```python
        written = pathlib.Path("file").write_text(text)
        ```
        ```console
        $ cat file
        one
        two
        $ cat \\
          file
        one
        two
        ```
        """)
    assert (report.num_run, report.problems, report.differences) == (4, [], [])
    assert (tmp_path / "file").read_text() == "one\ntwo"


def test_no_stamp_of_the_lent_environment_is_older_than_another(tmp_path, monkeypatch):
    prefix = tmp_path / "prefix"
    prefix.mkdir()
    for name in (".installed", ".native", ".test", "bin"):
        (prefix / name).touch()
    touch, seconds = pathlib.Path.touch, itertools.count(1)

    def touch_later(path):
        touch(path)
        os.utime(path, (second := next(seconds), second))
    monkeypatch.setattr("pathlib.Path.touch", touch_later)
    monkeypatch.setattr("sys.prefix", str(prefix))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("PIP_TARGET", "")
    lend_environment(tmp_path / ".venv")
    stamps = [path.stat().st_mtime_ns for path in (tmp_path / ".venv").iterdir() if path.name != "bin"]
    assert len(stamps) == 3
    assert len(set(stamps)) == 1


def test_a_page_without_blocks_has_nothing_to_run(run):
    report = run("Words only.")
    assert (report.num_run, report.problems, report.differences) == (0, [], [])


@pytest.mark.parametrize(("block", "message"), [
    ("```sh\necho said; exit 3\n```", "page.md:1: it ended with code 3: echo said; exit 3\nsaid"),
    ("```sh\nfalse | true\n```", "it ended with code 1"),
    ("```console\n$ true\ntpllm: error: no\n```", "it ended with code 0"),
    ("```console\n$ sh -c 'echo tpllm: error: no; exit 1'\ntpllm: error: no\n```", "it ended with code 1"),
    ("```console\nls\n```", "begins with a line '$ command'"),
    ("```python\n\n1 / 0\n```", 'File "page.md", line 3'),
    ("<!-- model text -->\n```console\n$ true\nsome text\n```", "it printed nothing"),
])
def test_a_block_that_fails_is_a_problem(run, block, message):
    problem, = run(block).problems
    assert message in problem


@pytest.mark.parametrize("block", [
    "```console\n$ echo one; echo two >&2\none\n```",
    "```console\n$ echo one\none\ntwo\n```",
    "```python\nprint('one')\n```\n\n```text\ntwo\n```",
])
def test_an_output_that_the_page_does_not_show_is_a_difference(run, block):
    difference, = run(block).differences
    assert "page.md:" in difference


@pytest.mark.parametrize("shown", ["folder/file", "file", "/.../folder/file"])
def test_a_path_in_the_working_folder_may_be_shown_in_part(run, shown):
    is_right = shown != "file"
    assert bool(run(f"```console\n$ echo $PWD/folder/file\n{shown}\n```").differences) is not is_right


def test_a_shown_error_is_expected_with_code_2(run):
    assert not run("```console\n$ sh -c 'echo tpllm: error: no >&2; exit 2'\ntpllm: error: no\n```").problems


def test_a_text_block_further_down_is_not_the_output_of_a_python_block(run):
    assert not run("```python\nprint('one')\n```\nOther text.\n```text\ntwo\n```").differences


def test_a_block_that_is_marked_is_not_run_and_its_reason_is_told(run):
    report = run("<!-- not run: needs a GPU -->\n```sh\nexit 1\n```\n1. List\n\n   <!-- not run: slow -->\n   ```sh\n   exit 1\n   ```")
    assert report.not_run == ["page.md:2: not run: needs a GPU", "page.md:8: not run: slow"]
    assert (report.num_run, report.problems) == (0, [])


def test_files_are_written_from_blocks_and_from_comments(run, tmp_path):
    report = run("<!-- file: a/job.yaml -->\n```yaml\nmodel: demo\n```\n<!-- file: hidden\none\n-->\n```console\n$ cat hidden\none\n```")
    assert not report.problems + report.differences
    assert (tmp_path / "a" / "job.yaml").read_text() == "model: demo\n"


@pytest.mark.parametrize("page", [
    "```\n$ ls\n```",
    "```bash\nls\n```",
    "```text\n$ ls\n```",
    "```sh\nls\n",
    "1. Do:\n\n   <!-- not running: slow -->\n   ```sh\n   ls\n   ```",
    "<!-- not run -->\n```sh\nls\n```",
    "<!-- not run: -->\n```sh\nls\n```",
    "<!-- skipped: slow -->\n```sh\nls\n```",
    "<!-- not run: slow -->\nText between.\n```sh\nls\n```",
    "<!-- not run: slow -->\n",
    "<!-- not run: slow",
])
def test_a_page_that_could_hide_a_command_is_refused(page):
    with pytest.raises(PageError, match=r"page.md:\d+: "):
        read_blocks("page.md", page)


def test_blocks_in_lists_are_read_without_their_indent():
    block, = read_blocks("page.md", "1. Do this:\n\n   ```sh\n   if true; then\n     ls\n   fi\n   ```\n")
    assert block.lines == ("if true; then", "  ls", "fi")


@pytest.mark.parametrize(("shown", "printed", "is_match"), [
    ("a ... c", "a long b c", True),
    ("a ... c", "a long b d", False),
    ("...", "two\nlines", True),
    ("a.c", "abc", False),
    ("221.0 tokens/s, 0:00 left", "3.5 tokens/s, 1:02:03 left", True),
    ("12 rows", "13 rows", False),
    ("took 3 s, 9 prompt tokens/s", "took 1,000.5 s, 8.5 prompt tokens/s", True),
    ("took 3 sheep", "took 4 sheep", False),
    ("tpllm: 12/12 rows, 9.0 tokens/s", "tpllm: 1/12 rows, 1.0 tokens/s\ntpllm: 12/12 rows, 2.0 tokens/s", True),
    ("tpllm: 12/12 rows, 9.0 tokens/s", "tpllm: 11/11 rows, 9.0 tokens/s", False),
    ("trailing", "trailing  \n\n", True),
])
def test_outputs_are_compared_but_for_ellipses_times_and_speeds(shown, printed, is_match):
    assert matches(shown, printed) is is_match


def test_renewing_puts_what_was_printed_into_its_place(run):
    page = ("Top\n```console\n$ echo 1; echo 2\n{}\n$ echo 3\n3\n$ echo 4\n{}\n```\n"
            "<!-- model text -->\n```python\nprint('x')\n```\n```text\n{}\n```\nEnd\n")
    old, new = page.format("0", "5\n6", "y"), page.format("1\n2", "4", "x")
    assert with_outputs(old, run(old).renewed) == new
    assert not run(new).differences


def test_a_script_that_runs_too_long_is_ended_with_all_it_started(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        run_shell(f"(sleep 2; touch {tmp_path / 'late'}) & sleep 60", timeout_s=0.5)
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_what_a_page_installs_does_not_reach_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.environ["PATH"])  # both are put back after the test
    monkeypatch.setenv("PIP_TARGET", "")
    lend_environment(tmp_path / ".venv")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "tpllm-test-of-docs"\nversion = "1"\n[tool.setuptools]\npy-modules = []\n')
    run_shell(f"cd {tmp_path}; .venv/bin/pip install -q --no-deps --no-build-isolation -e .")
    assert run_shell(f"cd {tmp_path}; .venv/bin/pip show tpllm-test-of-docs")[0] == 1
    assert run_shell(f"cd {tmp_path}; .venv/bin/pip show tpllm")[0] == 0
