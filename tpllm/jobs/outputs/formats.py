"""In which format a job's parts are written."""
from collections.abc import Mapping, Sequence
from typing import Any

from tpllm.jobs.openai_rows import BATCH_KEYS, PROMPT_KEYS, is_batch_row
from tpllm.jobs.outputs.part_files import JSONL, PartFormat
from tpllm.jobs.rows import RowError
from tpllm.jobs.sources import files
from tpllm.jobs.sources.open import need_pyarrow
from tpllm.jobs.sources.raw_row import InputSummary
from tpllm.jobs.sources.row_source import RowSource


def resolve_output_format(wanted: str, source: RowSource) -> str:
    """``"jsonl"`` or ``"parquet"``: what is wanted; for ``"auto"`` Parquet of a Parquet input, but always JSONL of OpenAI batch rows.

    Raises:
        JobError: pyarrow is needed and not installed.
    """
    if wanted == "auto":
        return files.PARQUET if source.kind == files.PARQUET and not _has_batch_rows(source.columns) else files.JSONL
    if wanted == files.PARQUET:
        need_pyarrow("output_format: parquet")
    return wanted


def refuse_batch_row(fields: Mapping[str, Any], output_format: str) -> None:
    """Make sure that a row's output has a form in the job's format.

    Raises:
        RowError: an OpenAI batch row, whose output row is OpenAI's own, in a job that writes Parquet.
    """
    if output_format == files.PARQUET and is_batch_row(fields):
        raise RowError("an OpenAI batch row gets OpenAI's own output row, which is JSON; set output_format: jsonl")


def needs_columns(output_format: str, source: RowSource) -> bool:
    """Whether the scan has to find the types of the input's columns."""
    return output_format == files.PARQUET and source.kind != files.PARQUET


def open_part_format(output_format: str, source: RowSource, summary: InputSummary) -> PartFormat:
    """What writes the parts of an input in a format.

    Args:
        output_format: ``"jsonl"`` or ``"parquet"``.
        source: the input.
        summary: of its scan, with the columns where they are needed.
    """
    if output_format == files.JSONL:
        return JSONL
    from tpllm.jobs.outputs.parquet_parts import parts_of_jsonl_input, parts_of_parquet_input
    return parts_of_parquet_input(source.schema, source.slice) if source.kind == files.PARQUET else parts_of_jsonl_input(summary.columns)


def _has_batch_rows(columns: Sequence[str]) -> bool:
    return {*BATCH_KEYS} <= {*columns} and not {*PROMPT_KEYS} & {*columns}
