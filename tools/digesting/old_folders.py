"""``--write-old`` and ``--check-old``: a job that one tree left half done, and folders that it wrote, for the other to go on with and to open."""
from __future__ import annotations

import json
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping

from tools.digesting import hashing, tree
from tools.digesting.case import Case
from tools.digesting.drawn_requests import TEXTS, values
from tools.digesting.engines import greedy_digests, tiny_folder
from tools.digesting.weights import command_environment, loaded_digests, run_command

NUM_ROWS, ROWS_A_PART = 240, 10
JOB = f"""\
model: demo
mesh: tp=2
engine: {{max_num_seqs: 4, max_model_len: 256}}
sampling: {{max_tokens: 24}}
input: rows.jsonl
output: out
rows_per_part: {ROWS_A_PART}
"""
WAIT_S = 300
STORES = {"demo-int8": ("demo", "int8"), "demo-q4_k": ("demo", "q4_k"), "mixtral-int4": ("mixtral", "int4"), "demo-none": ("demo", "none")}
"""Name -> (model, scheme) of orbax stores."""
FOLDER = "demo-int4-folder"
"""A compressed-tensors folder of the demo."""
STORE_MESHES: Mapping[str, tuple[str, ...]] = {"demo": ("tp=1", "tp=2", "tp=4"), "mixtral": ("tp=1", "tp=2", "ep=2,tp=2")}


def write(folder: pathlib.Path) -> None:
    """Make everything.

    Args:
        folder: where there is none yet.

    Raises:
        FileExistsError: it is there.
        RuntimeError: the job was over before it could be stopped.
    """
    folder.mkdir(parents=True)
    for name, (model, scheme) in STORES.items():
        path = "demo" if model == "demo" else str(tiny_folder(folder / model, model))
        run_command("quantize", path, str(folder / name), "--scheme", scheme, "--format", "orbax")
    run_command("quantize", "demo", str(folder / FOLDER), "--scheme", "int4")
    _write_half_a_job(folder / "job")


def _write_half_a_job(folder: pathlib.Path) -> None:
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB)
    (folder / "rows.jsonl").write_text("".join(json.dumps(_row(number)) + "\n" for number in range(NUM_ROWS)))
    process = subprocess.Popen([*tree.COMMAND, "run", "job.yaml"], cwd=folder, env=command_environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + WAIT_S
    while num_parts(folder / "out") < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=WAIT_S)
    if not 2 <= num_parts(folder / "out") < NUM_ROWS // ROWS_A_PART or process.returncode != 128 + signal.SIGTERM:
        raise RuntimeError(f"the job was to be stopped half done; it has {num_parts(folder / 'out')} parts, and ended with {process.returncode}: "
                           f"{errors[-2000:]}")


def _row(number: int) -> dict:
    sampling = {name: value for name, value in values(number).items() if name not in ("prompt_logprobs", "logit_bias")}
    return {"custom_id": f"row-{number}", "prompt": f"{TEXTS[number % len(TEXTS)]} {number}", "sampling": sampling}


def num_parts(out: pathlib.Path) -> int:
    """Committed parts of a job's output."""
    return len(list(out.glob("part-?????.jsonl")))


def cases(folder: pathlib.Path) -> list[Case]:
    """Of a folder that :func:`write` made; it stays as it is."""
    stores = [Case(f"jobs/store/{name}", lambda _, name=name, model=model: _opened(folder / name, model)) for name, (model, _) in STORES.items()]
    return [Case("jobs/job", lambda work: _resumed(folder / "job", work)), *stores, Case("jobs/folder", lambda _: _opened(folder / FOLDER, "demo"))]


def _resumed(old: pathlib.Path, work: pathlib.Path) -> dict[str, str]:
    """The parts of the old job once it is resumed, and of the same job as this tree alone runs it."""
    job = work / "job"
    shutil.copytree(old, job)
    if not 0 < num_parts(job / "out") < NUM_ROWS // ROWS_A_PART:
        raise RuntimeError(f"{old}: the job there is not half done; make it again with --write-old")
    found = {"before": hashing.of_files(job / "out", "part-?????.jsonl")}
    for name, words in (("resumed", ()), ("whole", ("--output", "whole"))):
        run_command("run", "job.yaml", *words, cwd=job)
        found[name] = hashing.of_files(job / ("out" if name == "resumed" else name), "part-*.jsonl")
    return found


def _opened(path: pathlib.Path, model: str) -> dict[str, str]:
    found = dict(loaded_digests(path, STORE_MESHES[model]))
    return found | {f"greedy/{name}": value for name, value in greedy_digests(str(path), mesh="tp=2").items()}
