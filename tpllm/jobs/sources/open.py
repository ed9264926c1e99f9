"""The source for an input, by the kind of its files."""
import importlib.util
from collections.abc import Sequence

from tpllm.errors import JobError
from tpllm.jobs.sources.files import PARQUET
from tpllm.jobs.sources.find import find_files
from tpllm.jobs.sources.jsonl import JsonlRows
from tpllm.jobs.sources.row_source import RowSource


def open_source(given: str | Sequence[str]) -> RowSource:
    """The source for an ``input`` of a job file.

    Args:
        given: a path, glob or URL, or several.

    Raises:
        JobError: no such file, a kind of input that is not supported or that needs a package which is not installed, files of two kinds, or
            Parquet files that cannot be read or have different columns.
    """
    files = find_files(given)
    if files[0].kind != PARQUET:
        return RowSource(files[0].kind, [JsonlRows(file) for file in files])
    need_pyarrow(files[0].name)
    from tpllm.jobs.sources.parquet import ParquetSource
    return ParquetSource(files)


def need_pyarrow(name: str) -> None:
    """Make sure that Parquet can be read and written.

    Raises:
        JobError: pyarrow is not installed; ``name`` says what needs it.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise JobError(f"{name}: Parquet needs a package: pip install pyarrow (or 'tpllm[parquet]')")
