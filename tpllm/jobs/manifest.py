"""The manifest: what a job is and under what it ran, so that a rerun can tell whether it is the same job."""
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from tpllm.errors import JobError
from tpllm.jobs.config import MAX_ROWS, MAX_ROWS_PER_PART, JobConfig
from tpllm.jobs.json_line import is_deeper
from tpllm.jobs.shard import WHOLE, Parts, parse_shard
from tpllm.jobs.sources.raw_row import InputSummary

FORMAT_VERSION = 3
ABSENT = "(absent)"
MAX_DEPTH = 40
NOT_RECORDED = ("input", "output", "work_dir", "shard", "max_failures", "allow_environment_change")
PATHS = "paths"
"""The section that says where the input is: a job is the same wherever it lies."""
# What may differ with ``allow_environment_change``: it changes where and how fast a job runs, and results only in their last bits.
ENVIRONMENT_KEYS = ("job.mesh", "job.engine.max_num_seqs", "environment")


def job_section(job: JobConfig, summary: InputSummary) -> dict[str, Any]:
    """The part of the manifest that is known before a model is loaded."""
    settings = {field.name: value for field in dataclasses.fields(job)
                if field.name not in NOT_RECORDED and (value := getattr(job, field.name)) is not None}
    if job.shard is not None:
        settings["shard"] = str(job.own_shard)
    paths = {"input": job.input, "working_directory": os.getcwd()}
    return as_json({"format": FORMAT_VERSION, "job": settings, PATHS: paths, "input": dataclasses.asdict(summary)})


def model_section(fingerprint: Mapping[str, Any], default_sampling: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The part that the loaded model gives.

    Args:
        fingerprint: of the engine: the model's files under ``"model"``; every other key is part of the environment.
        default_sampling: the model's own defaults, which complete the job's.
        version: of this package.
    """
    environment = {key: value for key, value in fingerprint.items() if key not in ("model", "environment")}
    environment.update(fingerprint.get("environment", {}))
    return as_json({"model": fingerprint.get("model"), "default_sampling": dict(default_sampling),
                     "environment": {"tpllm": version, **environment}})


def parse_manifest(data: bytes, name: str) -> dict[str, Any]:
    """The manifest in a file.

    Args:
        data: the file's.
        name: how errors call it.

    Raises:
        JobError: it is damaged, or none.
    """
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise JobError(f"cannot read {name}: {error}; restore it, or give this job another output") from None
    if not isinstance(manifest, dict) or is_deeper(manifest, MAX_DEPTH):
        raise JobError(f"{name} is no manifest; restore it, or give this job another output")
    history = manifest.get("environment_changes", [])
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise JobError(f"{name} is damaged: environment_changes is no list of objects; restore it, or give this job another output")
    return manifest


def parts_of(manifest: Mapping[str, Any]) -> Parts:
    """The parts that the folder of a manifest has in the end.

    Raises:
        JobError: a manifest without what says so.
    """
    try:
        job, shard = manifest["job"], manifest["job"].get("shard")
        num_rows, rows_per_part = manifest["input"]["num_rows"], job["rows_per_part"]
    except (KeyError, TypeError, AttributeError) as error:
        raise JobError(f"the manifest is damaged: {error} is missing or misplaced") from None
    if type(num_rows) is not int or type(rows_per_part) is not int or not 0 <= num_rows <= MAX_ROWS or not 1 <= rows_per_part <= MAX_ROWS_PER_PART:
        raise JobError(f"the manifest is damaged: it tells of {num_rows!r} rows, {rows_per_part!r} a part")
    return Parts(num_rows, rows_per_part, WHOLE if shard is None else parse_shard(shard))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Every (dotted key, old value, new value) at which the sections of ``new`` differ from ``old``; sections that only ``old`` has, and where
    the input is, are not compared."""
    found: list[tuple[str, Any, Any]] = []
    for section in (name for name in new if name != PATHS):
        _compare(section, old.get(section, ABSENT), new[section], found)
    return found


def refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], *, output: str, is_environment_free: bool) -> list[tuple[str, Any, Any]]:
    """Compare a job with the one that an output folder belongs to.

    Args:
        old: the folder's manifest.
        new: sections of this job's.
        output: the folder, for the error.
        is_environment_free: whether a changed environment is allowed.

    Returns:
        The allowed differences.

    Raises:
        JobError: a difference that is not allowed, with key, old and new value.
    """
    changes = differences(old, new)
    environment = [change for change in changes if is_environment(change[0])]
    job = [change for change in changes if not is_environment(change[0])]
    if job:
        raise JobError(f"the output folder {output} belongs to another job: {describe(job)}; give this job another output, or change it back")
    if environment and not is_environment_free:
        raise JobError(f"the job in {output} was begun in another environment: {describe(environment)}; tokens could differ in rare cases: "
                       "run it where it was begun, or allow it with --allow-environment-change")
    return environment


def is_environment(key: str) -> bool:
    """Whether a dotted key of the manifest tells of the environment, not of the job."""
    return any(key == name or key.startswith(name + ".") for name in ENVIRONMENT_KEYS)


def describe(changes: list[tuple[str, Any, Any]], form: str = "{key} was {old} and is now {new}") -> str:
    """The first few differences as text."""
    shown = [form.format(key=key.removeprefix("job."), old=_text(old), new=_text(new)) for key, old, new in changes[:5]]
    return "; ".join(shown) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")


def as_json(section: Mapping[str, Any]) -> dict[str, Any]:
    """What the section will be when it is read back, so that the two compare equal."""
    return json.loads(json.dumps(section, default=str))


def _compare(key: str, old: Any, new: Any, found: list[tuple[str, Any, Any]]) -> None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for inner in sorted({*old, *new}):
            _compare(f"{key}.{inner}", old.get(inner, ABSENT), new.get(inner, ABSENT), found)
    elif isinstance(old, list) and isinstance(new, list) and all(isinstance(item, Mapping) for item in old + new):
        if len(old) != len(new):
            found.append((f"the number of {key}", len(old), len(new)))
        for number, (former, present) in enumerate(zip(old, new, strict=False)):
            _compare(f"{key}.{number}", former, present, found)
    elif old != new:
        found.append((key, old, new))


def _text(value: Any) -> str:
    text = value if value == ABSENT else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
