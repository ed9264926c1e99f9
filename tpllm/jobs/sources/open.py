"""The source for an input, by the kind of its files."""
import importlib.util
from collections.abc import Sequence

from tpllm.errors import JobError
from tpllm.jobs.config import JobConfig
from tpllm.jobs.prompt_template import require_fields
from tpllm.jobs.sources.csv_rows import CsvSource
from tpllm.jobs.sources.files import CSV, JSONL
from tpllm.jobs.sources.find import find_files
from tpllm.jobs.sources.jsonl import jsonl_rows
from tpllm.jobs.sources.line_rows import LineRows
from tpllm.jobs.sources.row_source import RowSource


def open_source(given: str | Sequence[str], *, limit: int | None = None) -> RowSource:
    """The source for an ``input`` of a job file.

    Args:
        given: a path, glob or URL, or several.
        limit: the most rows to take, from the first; None for all.

    Raises:
        JobError: no such file, a kind of input that is not supported or that needs a package which is not installed, files of several kinds, or
            tables that cannot be read or have different columns.
    """
    files = find_files(given)
    if files[0].kind == JSONL:
        return RowSource(JSONL, [LineRows(file, jsonl_rows) for file in files], limit=limit)
    if files[0].kind == CSV:
        return CsvSource(files, limit=limit)
    need_pyarrow(files[0].name)
    from tpllm.jobs.sources.parquet import ParquetSource
    return ParquetSource(files, limit=limit)


def open_job_source(job: JobConfig) -> RowSource:
    """The source for a job.

    Raises:
        JobError: as :func:`open_source`; or a prompt template that names no column of a table.
    """
    source = open_source(job.input, limit=job.limit)
    if job.prompt_template is not None and source.columns is not None:
        require_fields(job.prompt_template, source.columns, "the input")
    return source


def need_pyarrow(name: str) -> None:
    """Make sure that Parquet can be read and written.

    Raises:
        JobError: pyarrow is not installed; ``name`` says what needs it.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise JobError(f"{name}: Parquet needs a package: pip install pyarrow (or 'tpllm[parquet]')")
