"""The ``engine`` of a job against what the engine's constructor takes: its keys, and of what type each value may be."""
import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin

from tpllm.engine.whole_numbers import as_kind
from tpllm.errors import JobError
from tpllm.jobs.config import JOB_KEYS, JobConfig, check_keys

NOT_FOR_YAML = ("rules", "hf_token", "download_dir")
"""Arguments of the engine's constructor that are Python objects, or that a manifest should not tell: the hub's client reads HF_TOKEN and HF_HOME."""
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Mapping: "a mapping"}


def check_engine_options(job: JobConfig, make_llm: Callable[..., Any]) -> JobConfig:
    """The job, whole numbers in its ``engine`` made whole where they are written as 4.0.

    Raises:
        JobError: an unknown key; the nearest known one is named. A value of another type than the constructor's annotation, for Python takes a
            text such as "false" for true, and true for 1. Or ``batch_invariant``: a job that resumes must give the rows it would have given,
            whatever then shares their batch.
    """
    if "batch_invariant" in job.engine:
        raise JobError("engine.batch_invariant cannot be set in a job: its rows never depend on their batch, so that a job that is resumed "
                       "gives the same ones; leave it out")
    parameters = inspect.signature(make_llm).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        known = [name for name, parameter in parameters.items()
                 if parameter.kind is parameter.KEYWORD_ONLY and name not in (*JOB_KEYS, *NOT_FOR_YAML)]
        check_keys(job.engine, known, prefix="engine.")
    kinds = {name: parameter.annotation for name, parameter in parameters.items()}
    engine = {key: as_kind(value, kinds.get(key)) for key, value in job.engine.items()}
    for key, value in engine.items():
        _check_kind(key, value, kinds.get(key, inspect.Parameter.empty))
    return dataclasses.replace(job, engine=engine)


def _check_kind(key: str, value: object, annotation: Any) -> None:
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    kinds = [get_origin(option) or option for option in options]
    if annotation is inspect.Parameter.empty or not all(kind in NAMES or kind is types.NoneType for kind in kinds):
        return
    taken = (*kinds, int) if float in kinds else tuple(kinds)
    if not isinstance(value, taken) or (isinstance(value, bool) and bool not in kinds):
        raise JobError(f"engine.{key} is {value!r}; it must be {' or '.join(NAMES[kind] for kind in kinds if kind in NAMES)}"
                       + (", or left out" if types.NoneType in kinds else ""))
