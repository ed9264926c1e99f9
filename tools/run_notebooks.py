"""Run the notebooks, each in a fresh kernel: as a check in CI, or to renew the outputs that are committed.

    pip install -e .[notebooks]
    python tools/run_notebooks.py              # the check: a cell that fails ends it with code 1; no file changes
    python tools/run_notebooks.py --write      # the same, then the notebooks are written with their new outputs

A notebook that shows a path of this machine, or that is committed without its outputs, fails the check too.
"""
import argparse
import concurrent.futures
import functools
import os
import pathlib
import sys

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
CELL_TIMEOUT_S = 600
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
    """A notebook with fresh outputs, and without what differs from run to run for no reason.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; it holds the cell and the traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of the run
        if cell.cell_type == "code":
            cell.outputs = _joined_streams(cell.outputs)
    nbformat.validate(notebook)
    return notebook


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What keeps a notebook from being committed: code cells that were not run, paths of this machine."""
    found = [f"cell {number} was not run; use --write" for number, cell in enumerate(notebook.cells, 1)
             if cell.cell_type == "code" and cell.execution_count is None]
    text = nbformat.writes(notebook)
    places = {str(ROOT), str(pathlib.Path.home()), sys.prefix} - {"/"}
    return found + [f"it shows the path {place}" for place in sorted(places) if place + "/" in text or f'"{place}"' in text]


def _joined_streams(outputs: list) -> list:
    """Neighbouring pieces of one stream as one: where a stream is cut depends on timing."""
    joined: list = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].output_type == "stream" and joined[-1].name == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def run(path: pathlib.Path, *, writes: bool) -> list[str]:
    """Execute one; what is wrong with it. Its new outputs are written where nothing is and ``writes`` asks for it."""
    try:
        fresh = execute(path)
    except nbclient.exceptions.CellExecutionError as error:
        return [f"a cell failed\n{error}"]
    found = problems(fresh) + ([] if writes else problems(nbformat.read(path, as_version=4)))
    if writes and not found:
        nbformat.write(fresh, path)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=pathlib.Path, help="which; by default all of notebooks/")
    parser.add_argument("--write", action="store_true", help="write the new outputs")
    arguments = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore::DeprecationWarning"  # of the kernel's own packages
    paths, has_failed = arguments.notebooks or sorted(FOLDER.glob("*.ipynb")), False
    # Two at a time, but for the outputs that are kept: they hold times.
    with concurrent.futures.ThreadPoolExecutor(1 if arguments.write else 2) as pool:
        for path, found in zip(paths, pool.map(functools.partial(run, writes=arguments.write), paths), strict=True):
            for problem in found:
                print(f"{path.name}: {problem}", file=sys.stderr)
            has_failed |= bool(found)
            print(f"{path.name}: {'failed' if found else 'written' if arguments.write else 'runs'}", flush=True)
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
