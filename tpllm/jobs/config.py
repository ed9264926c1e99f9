"""The job file: what to run, on what, and where the results go.

Paths in it are relative to the working directory, as on a command line, never to the file's own folder.
"""
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tpllm.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from tpllm.engine.whole_numbers import whole, whole_sampling
from tpllm.errors import JobError, SamplingError, did_you_mean
from tpllm.jobs.prompt_template import fields_of
from tpllm.jobs.shard import WHOLE, Shard, parse_shard
from tpllm.jobs.yaml_file import parse_document, parse_value

SAMPLING_KEYS = tuple(field.name for field in dataclasses.fields(SamplingParams) if field.name != "output_kind")  # rows are written when finished
MAX_ROWS_PER_PART = 10_000_000
MAX_ROWS = 2**53
WHOLE_KEYS = {"seed": (-(2**63), 2**64 - 1), "rows_per_part": (1, MAX_ROWS_PER_PART), "limit": (1, MAX_ROWS), "max_failures": (0, MAX_ROWS)}
OPTIONAL_KEYS = ("limit", "max_failures")
OUTPUT_FORMATS = ("auto", "jsonl", "parquet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One batch job.

    Attributes:
        model: a folder in Hugging Face layout, a GGUF file, a hub id, or 'demo'.
        input: a path, glob or URL of files of rows, or several: JSONL, CSV or Parquet.
        output: a folder for manifest, journal and parts, made if it is not there; or the URL of one that gets a copy of them.
        output_format: the format of the parts: jsonl, parquet, or auto, which is Parquet for a Parquet input.
        work_dir: the local folder of a job whose output is a URL; by default one in the cache folder.
        prompt_template: makes each row's prompt of its fields, as in 'Summarize: {text}'; {{ and }} are braces.
        limit: run only this many rows, the first ones of the input.
        max_failures: stop with exit code 1 once more rows than this have failed; by default all rows are run.
        mesh: the mesh of devices, as tpllm.LLM takes it: auto, tp=4, dp=2,tp=4, or a mapping.
        dtype: of activations, and of weights that are not quantized.
        seed: each row's own seed is derived from this and the row's number.
        rows_per_part: input rows of one part file.
        shard: run only shard I (from 0) of N, in a folder of its own below the output; by default all rows.
        engine: further keyword arguments of tpllm.LLM.
        sampling: fields of tpllm.SamplingParams; a row's own go before it, the model's defaults come after.
        allow_environment_change: go on with a job that was begun under other versions, hardware, mesh or batch size.

    Raises:
        JobError: a value of the wrong type or out of its range.
        SamplingError: a sampling value out of its range.
    """

    model: str
    input: str | Sequence[str]
    output: str
    output_format: str = "auto"
    work_dir: str | None = None
    prompt_template: str | None = None
    limit: int | None = None
    max_failures: int | None = None
    mesh: str | Mapping[str, int] = "auto"
    dtype: str = "auto"
    seed: int = 0
    rows_per_part: int = 256
    shard: str | None = None
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    allow_environment_change: bool = False

    def __post_init__(self):
        _check_input(self.input)
        if self.output_format not in OUTPUT_FORMATS:
            raise JobError(f"output_format is {self.output_format!r}; it must be {', '.join(OUTPUT_FORMATS[:-1])} or {OUTPUT_FORMATS[-1]}")
        for key in ("model", "output", "dtype", *(key for key in ("work_dir", "prompt_template") if getattr(self, key) is not None)):
            _check_type(key, getattr(self, key), str, "text")
            if not getattr(self, key).strip():
                raise JobError(f"{key} is empty; give a value")
        if self.work_dir is not None and "://" not in self.output:
            raise JobError(f"work_dir is {self.work_dir!r} and output is {self.output!r}, which is local: a job writes there at once; "
                           "leave work_dir out")
        _check_type("mesh", self.mesh, str | Mapping, "text such as 'auto' or 'tp=4', or a mapping such as {tp: 4}")
        for key, (low, high) in WHOLE_KEYS.items():
            object.__setattr__(self, key, whole(getattr(self, key)))
            if getattr(self, key) is not None or key not in OPTIONAL_KEYS:
                _check_type(key, getattr(self, key), int, "a whole number")
                if not low <= getattr(self, key) <= high:
                    raise JobError(f"{key} is {getattr(self, key)}; it must be from {low} to {high}")
        if self.shard is not None:
            parse_shard(self.shard)
        if self.prompt_template is not None and not fields_of(self.prompt_template):
            raise JobError(f"prompt_template is {self.prompt_template!r}, the same prompt for every row; name a field of the rows, as in {{text}}")
        _check_type("allow_environment_change", self.allow_environment_change, bool, "true or false")
        for key in ("engine", "sampling"):
            _check_type(key, getattr(self, key), Mapping, "a mapping")
        check_keys(self.sampling, SAMPLING_KEYS, prefix="sampling.")
        object.__setattr__(self, "sampling", whole_sampling(self.sampling))
        try:
            SamplingParams(**self.sampling).check_logprobs(self.engine.get("max_logprobs", MAX_LOGPROBS))
        except SamplingError as error:
            raise SamplingError(f"sampling: {error}") from None

    @property
    def own_shard(self) -> Shard:
        """The shard that runs; ``WHOLE`` without one."""
        return WHOLE if self.shard is None else parse_shard(self.shard)

    @property
    def folder(self) -> str:
        """Where manifest, journal and parts go: ``output``, or the shard's folder below it."""
        return self.output if self.shard is None else f"{self.output.rstrip('/')}/{self.own_shard.folder_name}"


JOB_KEYS = tuple(field.name for field in dataclasses.fields(JobConfig))
DATA_SUFFIXES = (".jsonl", ".csv", ".parquet", ".pq", ".gz", ".bz2", ".xz", ".zst")
REQUIRED_KEYS = ("model", "input", "output")
TEXT_KEYS = ("model", "input", "output", "work_dir", "dtype", "prompt_template")


def load_job(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job file.

    Args:
        path: a YAML file.
        overrides: command-line words that set any key: ``["--sampling.max-tokens", "32", "--seed=7"]``.

    Raises:
        JobError: an unreadable file, an unknown key (the nearest known one is named), or a value of the wrong type.
        SamplingError: a sampling value out of its range.
    """
    return make_job(read_job_file(path), parse_overrides(overrides), name=str(path))


def read_job_file(path: str | pathlib.Path) -> dict[str, Any]:
    """The keys and values of a job file.

    Raises:
        JobError: an unreadable file, or an unknown key; the nearest known one is named.
    """
    if pathlib.PurePath(str(path)).suffix.lower() in DATA_SUFFIXES:
        raise JobError(f"{path} holds rows and is no job file; give it as the input: -i {path} -o OUTPUT -m MODEL")
    try:
        text = pathlib.Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cannot read the job file {path}: {getattr(error, 'strerror', None) or error}") from None
    data, lines = parse_document(text, str(path))
    if not isinstance(data, dict):
        raise JobError(f"{path}: a job file is a mapping with the keys {', '.join(JOB_KEYS)}")
    check_keys(data, JOB_KEYS, name=str(path), lines=lines)
    if isinstance(data.get("sampling"), dict):
        check_keys(data["sampling"], SAMPLING_KEYS, prefix="sampling.", name=str(path), lines=lines)
    return {key: value for key, value in data.items() if value is not None or key in REQUIRED_KEYS}


def make_job(data: Mapping[str, Any], options: Iterable[tuple[tuple[str, ...], Any]] = (), *, name: str = "") -> JobConfig:
    """A job of its keys and values.

    Args:
        data: of a job file; empty without one.
        options: (key path, value) pairs that go before them.
        name: how errors call the file; empty without one.

    Raises:
        JobError: a required key that is missing, or a value of the wrong type.
        SamplingError: a sampling value out of its range.
    """
    data, where = dict(data), f"{name}: " if name else ""
    for key_path, value in options:
        _set(data, key_path, value)
    if missing := [key for key in REQUIRED_KEYS if data.get(key) is None]:
        fix = f"add '{missing[0]}: ...' or give --{missing[0]} ..." if name else f"give --{missing[0]} ..., or a job file"
        raise JobError(f"{where}{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; {fix}")
    try:
        return JobConfig(**data)
    except (JobError, SamplingError) as error:
        raise type(error)(f"{where}{error}") from None


def parse_overrides(words: Sequence[str]) -> list[tuple[tuple[str, ...], Any]]:
    """Command-line words as (key path, value) pairs; ``--a.b-c 1`` and ``--a.b_c=1`` are the same, and a lone ``--key`` is true.

    Raises:
        JobError: a word that is no ``--key``, or an unknown key; the nearest known one is named.
    """
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise JobError(f"{word!r} is not an override; write --key value, as in --sampling.max-tokens 32")
        flag, has_value, text = word[2:].partition("=")
        key_path = tuple(part.replace("-", "_") for part in flag.split("."))
        check_keys(key_path[:1], JOB_KEYS, flags=True)
        if key_path[0] == "sampling" and len(key_path) > 1:
            check_keys(key_path[1:2], SAMPLING_KEYS, prefix="sampling.", flags=True)
        if not has_value:
            is_lone = not rest or rest[0].startswith("--")
            if is_lone and key_path != ("allow_environment_change",):
                raise JobError(f"--{flag} has no value; write --{flag} VALUE")
            text = "true" if is_lone else rest.pop(0)
        is_text = key_path[0] in TEXT_KEYS and not (key_path[0] == "input" and text.startswith("[") and text.endswith("]"))
        pairs.append((key_path, text if is_text else parse_value(text, f"--{flag}")))
    return pairs


def check_keys(keys: Iterable[str], known: Sequence[str], *, prefix: str = "", name: str = "", flags: bool = False,
               lines: Mapping[tuple[str, ...], int] | None = None) -> None:
    """Refuse keys that are not known.

    Raises:
        JobError: the first unknown key, with its line where ``lines`` has it, the nearest known key, and all known ones.
    """
    for key in keys:
        if key in known:
            continue
        line = (lines or {}).get((*prefix.rstrip(".").split("."), str(key)) if prefix else (str(key),))
        where = f"{name}{f' line {line}' if line else ''}: " if name else ""
        form, mark = ("--" + prefix + "{}", "-") if flags else (prefix + "{}", "_")
        key, names = str(key).replace("_", mark), [name.replace("_", mark) for name in known]
        raise JobError(f"{where}unknown key {form.format(key)!r}; {did_you_mean(key, names, form)}known: {', '.join(known)}")


def _set(data: dict[str, Any], key_path: tuple[str, ...], value: Any) -> None:
    for key in key_path[:-1]:
        inner = data.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise JobError(f"--{'.'.join(key_path)}: {key} is {inner!r}, which has no keys below it")
        if inner is None:
            data[key] = {}
        data = data[key]
    data[key_path[-1]] = value


def _check_input(given: object) -> None:
    paths = [given] if isinstance(given, str) else given
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str) for path in paths):
        raise JobError(f"input is {given!r}; it must be a path, a glob or a URL, or a list of them")
    if not paths or not all(path.strip() for path in paths):
        raise JobError(f"input is {given!r}; give at least one file, and no empty name" if paths != [given] else "input is empty; give a value")


def _check_type(key: str, value: object, wanted: Any, text: str) -> None:
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise JobError(f"{key} is {value!r}; it must be {text}")
