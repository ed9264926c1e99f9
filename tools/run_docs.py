"""Run what README.md and docs/ say: every shell and Python block, in order, compared with what the page shows of its output.

    make setup && .venv/bin/python tools/run_docs.py               # the check; a block that fails ends it with code 1
    .venv/bin/python tools/run_docs.py docs/cli.md --write         # the same for one page, then outputs that differ are renewed in it

Each page has a working folder of its own, a copy of the repository in which ``.venv`` is the environment that runs this tool, and a Python
process of its own. Which blocks run is decided by the fence's language:

    sh        a script; it has to end with code 0
    console   lines after "$ " are commands; the lines below each are what it prints, standard error included, and are compared where there
              are any. A command with a line "tpllm: error: ..." below it has to end with code 2, any other with 0
    python    runs in one namespace for the whole page; a text block directly below is what it prints
    others    text, yaml, json, mermaid, toml, jinja and Sphinx directives are not run; a block with another language, or none, is refused

A comment directly above a block says what the fence cannot:

    <!-- not run: needs a GPU -->     it is not run, and this tool prints the reason
    <!-- model text -->               it is run; it has to print something, which differs with the model's training and is not compared
    <!-- file: job.yaml -->           it is written to that file in the working folder
    <!-- file: rows.jsonl             the lines up to the end of the comment are written to that file, which the page does not show
    ... -->

In a comparison ``...`` stands for any text, ``MASKS`` of tools/doc_blocks.py for what differs from run to run, and a path in the working
folder may be shown without that folder.
"""
import argparse
import concurrent.futures
import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.doc_blocks import RUN, Block, PageError, Shown, matches, read_blocks, with_outputs  # noqa: E402

TIMEOUT_S = 300
USER_ERROR = 2  # the code of a command whose error the page shows
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "COLUMNS": "110", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
               "TPLLM_CACHE_DIR": str(ROOT / "build" / "docs-cache")}


@dataclasses.dataclass
class Report:
    """What became of a page.

    Attributes:
        num_run: blocks that were run.
        not_run, problems, differences: lines to print: blocks that the page says are not run, those that failed, outputs that differ.
        renewed: (where the page shows an output, what was printed) of what differs, and of all that a model wrote.
    """

    num_run: int = 0
    not_run: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    differences: list[str] = dataclasses.field(default_factory=list)
    renewed: list[tuple[Shown, str]] = dataclasses.field(default_factory=list)


class Page:
    """One page being run in the current folder.

    Args:
        name: as problems call it.
        text: its text.
    """

    def __init__(self, name: str, text: str):
        self.name, self.blocks, self.report = name, read_blocks(name, text), Report()
        self._namespace = {"__name__": "__main__"}

    def run(self) -> Report:
        """Run its blocks in order."""
        for block, below in itertools.zip_longest(self.blocks, self.blocks[1:]):
            for verb, path, body in block.comments:
                if verb == "file":
                    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
                    pathlib.Path(path).write_text("\n".join(block.lines) + "\n" if body is None else body)
            if reason := block.comment("not run"):
                self.report.not_run.append(f"{self.name}:{block.line}: not run: {reason}")
                continue
            self.report.num_run += block.language in RUN
            if block.language == "sh":
                self._run_shell(block.line, "\n".join(block.lines), None)
            elif block.language == "console":
                self._run_console(block)
            elif block.language == "python":
                self._run_python(block, below)
        return self.report

    def _run_console(self, block: Block) -> None:
        starts = [number for number, line in enumerate(block.lines) if line.startswith("$ ")]
        if not starts or starts[0] != 0:
            self.report.problems.append(f"{self.name}:{block.line}: a console block begins with a line '$ command'")
            return
        for start, end in zip(starts, [*starts[1:], len(block.lines)], strict=True):
            first = start + 1
            while block.lines[first - 1].endswith("\\"):
                first += 1
            command = "\n".join(block.lines[start:first])[2:]
            shown = Shown(block.line + first, block.lines[first:end], block.is_model_text) if end > first else None
            self._run_shell(block.line + 1 + start, command, shown)

    def _run_shell(self, line: int, command: str, shown: Shown | None) -> None:
        is_error_shown = shown is not None and any(each.startswith("tpllm: error: ") for each in shown.lines)
        try:
            code, printed = run_shell(command)
        except subprocess.TimeoutExpired:
            self.report.problems.append(f"{self.name}:{line}: it ran longer than {TIMEOUT_S} s: {command}")
            return
        if code != (USER_ERROR if is_error_shown else 0):
            self.report.problems.append(f"{self.name}:{line}: it ended with code {code}: {command}\n{printed}")
        elif shown is not None:
            self._compare(line, shown, printed)

    def _run_python(self, block: Block, below: Block | None) -> None:
        printed = io.StringIO()
        try:
            code = compile("\n" * block.line + "\n".join(block.lines), self.name, "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, self._namespace)
        except BaseException:
            self.report.problems.append(f"{self.name}:{block.line}: it failed\n{traceback.format_exc()}")
            return
        if below is not None and below.is_below_previous and below.language == "text":
            shown = Shown(below.line, below.lines, block.is_model_text or below.is_model_text)
            self._compare(block.line, shown, printed.getvalue())

    def _compare(self, line: int, shown: Shown, printed: str) -> None:
        is_shown, printed = matches(shown.text, printed), printed.replace(f"{os.getcwd()}/", "").strip("\n")
        if shown.is_model_text:
            self.report.renewed.append((shown, printed))
            if not printed.strip():
                self.report.problems.append(f"{self.name}:{line}: it printed nothing, the page shows text of a model")
        elif not is_shown and not matches(shown.text, printed):
            self.report.renewed.append((shown, printed))
            self.report.differences.append(f"{self.name}:{line}: it printed\n{printed}\n--- and the page shows\n{shown.text}\n---")


def run_shell(command: str, timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
    """The exit code of a script, and what it prints; whatever it started ends with its time."""
    shell = subprocess.Popen(["bash", "-eu", "-o", "pipefail", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        printed, _ = shell.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.communicate()
        raise
    return shell.returncode, printed


def run_page(path: pathlib.Path) -> Report:
    """Run one page in a working folder of its own, and in a process that is not used for another page."""
    name = str(path.relative_to(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder).resolve() / ROOT.name
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
        lend_environment(copy / ".venv")
        os.chdir(copy)
        try:
            return Page(name, path.read_text()).run()
        except PageError as error:
            return Report(problems=[str(error)])
        finally:
            os.chdir(ROOT)


def lend_environment(place: pathlib.Path) -> None:
    """Let ``place`` be the running environment, for make one that is up to date; what a page installs all the same goes elsewhere."""
    place.mkdir()
    stamps, now = {".installed"}, time.time()
    for entry in pathlib.Path(sys.prefix).iterdir():
        if entry.name.startswith("."):
            stamps.add(entry.name)  # the Makefile's
        else:
            (place / entry.name).symlink_to(entry)
    for name in stamps:
        (place / name).touch()
        os.utime(place / name, (now, now))  # all alike: make builds again what is older than what it needs
    os.environ["PATH"] = f"{place / 'bin'}:{os.environ['PATH']}"
    os.environ["PIP_TARGET"] = str(place / "installed-by-a-page")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=pathlib.Path, help="which; by default README.md and all of docs/")
    parser.add_argument("--write", action="store_true", help="renew the outputs that differ, and those of models, in the pages")
    arguments = parser.parse_args()
    if sys.prefix == sys.base_prefix:
        parser.error("run it with the Python of a virtual environment that tpllm is installed in, such as .venv/bin/python")
    pages = [path.resolve() for path in arguments.pages] or [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    os.environ.update(ENVIRONMENT)
    has_failed = False
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for path, report in zip(pages, pool.map(run_page, pages), strict=True):
            if arguments.write:
                path.write_text(with_outputs(path.read_text(), report.renewed))
            failures = report.problems if arguments.write else report.problems + report.differences
            print("\n".join([f"{path.relative_to(ROOT)}: {report.num_run} blocks run", *report.not_run, *failures]), flush=True)
            has_failed |= bool(failures)
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
