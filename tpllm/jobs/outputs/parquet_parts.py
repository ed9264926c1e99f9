"""Parts as Parquet: the input's columns, then ``custom_id``, ``outputs``, ``prompt_logprobs`` and ``usage`` (which replace columns of that name).

The same rows give the same bytes: row groups are cut by the rows alone, and all options of the writer are fixed here.
"""
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from tpllm.jobs.json_line import to_line
from tpllm.jobs.outputs.journal import FinishedRow
from tpllm.jobs.sources.raw_row import custom_id_text

GROUP_ROWS, GROUP_BYTES = 4096, 32 << 20
LOGPROBS = pa.list_(pa.list_(pa.struct([("token_id", pa.int32()), ("logprob", pa.float64()), ("rank", pa.int32()), ("decoded_token", pa.string())])))
OUTPUT = pa.struct([("index", pa.int32()), ("text", pa.string()), ("token_ids", pa.list_(pa.int32())), ("finish_reason", pa.string()),
                    ("stop_reason", pa.string()), ("cumulative_logprob", pa.float64()), ("logprobs", LOGPROBS)])
USAGE = pa.struct([("prompt_tokens", pa.int64()), ("completion_tokens", pa.int64()), ("cached_tokens", pa.int64())])
OWN_COLUMNS = {"custom_id": pa.string(), "outputs": pa.list_(OUTPUT), "prompt_logprobs": LOGPROBS, "usage": USAGE}
JSONL_TYPES = {"null": pa.null(), "bool": pa.bool_(), "int64": pa.int64(), "double": pa.float64(), "string": pa.string(), "json": pa.string()}


class ParquetParts:
    """Parquet as a part format; made by :func:`parts_of_parquet_input` or :func:`parts_of_jsonl_input`.

    Args:
        columns: the input's, in their order. The type of a ``custom_id`` of numbers among them is kept, so that ids keep their values.
        read_input: the values of those that pass through, for finished rows and their parsed lines.
        kinds: of those that ``read_input`` takes from the lines, name -> type as in ``JSONL_TYPES``.
    """

    def __init__(self, columns: pa.Schema, read_input: Callable[[list[int], list[Mapping[str, Any]]], Mapping[str, pa.Array | pa.ChunkedArray]],
                 kinds: Mapping[str, str]):
        own = {**OWN_COLUMNS, "custom_id": _id_type(columns.field("custom_id").type) if "custom_id" in columns.names else pa.string()}
        fields = {**{field.name: field for field in columns}, **{name: pa.field(name, kind) for name, kind in own.items()}}
        self.schema = pa.schema(list(fields.values()))
        self._read_input, self._kinds = read_input, kinds

    def name(self, part: int) -> str:
        """The file's name."""
        return f"part-{part:05d}.parquet"

    def chunks(self, rows: Iterable[FinishedRow]) -> Iterator[bytes]:
        """The file's content, piece by piece."""
        sink = _Sink()
        with pq.ParquetWriter(sink, self.schema, version="2.6", compression="zstd", compression_level=1, data_page_version="1.0",
                              use_dictionary=True, write_statistics=True) as writer:
            for group in _groups(rows):
                table = self._table(group)
                writer.write_table(table, row_group_size=len(group))
                yield sink.take()
        yield sink.take()

    def lines(self, path: pathlib.Path) -> Iterator[bytes]:
        """The lines that its rows had, as far as columns were made of them."""
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from map(self._line, batch.select([*self._kinds, *OWN_COLUMNS]).to_pylist())

    def _line(self, record: Mapping[str, Any]) -> bytes:
        passed = {name: json.loads(record[name]) if kind == "json" and record[name] is not None else record[name]
                  for name, kind in self._kinds.items()}
        outputs = [{**completion, "logprobs": _logprobs_by_id(completion["logprobs"])} for completion in record["outputs"]]
        return to_line({**passed, "custom_id": record["custom_id"], "outputs": outputs,
                        "prompt_logprobs": _logprobs_by_id(record["prompt_logprobs"]), "usage": record["usage"]})

    def _table(self, rows: list[FinishedRow]) -> pa.Table:
        records = [json.loads(row.line) for row in rows]
        values = {**self._read_input([row.index for row in rows], records), **_own_columns(records, self.schema.field("custom_id").type)}
        return pa.table([values[name] for name in self.schema.names], schema=self.schema).combine_chunks()


def parts_of_parquet_input(schema: pa.Schema, read_slice: Callable[[int, int], pa.Table]) -> ParquetParts:
    """Parts whose input columns are exactly those of a Parquet input: read again, never converted.

    Args:
        schema: the input's columns.
        read_slice: its rows from a number up to another.
    """
    def read_input(indices: list[int], _: list[Mapping[str, Any]]) -> Mapping[str, pa.ChunkedArray]:
        table = read_slice(indices[0], indices[-1] + 1)
        if table.num_rows > len(indices):
            table = table.take(pa.array([index - indices[0] for index in indices], pa.int64()))
        return dict(zip(table.schema.names, table.columns, strict=True))
    return ParquetParts(schema, read_input, {})


def parts_of_jsonl_input(columns: Mapping[str, str]) -> ParquetParts:
    """Parts whose input columns have the types that :class:`tpllm.jobs.sources.column_types.ColumnTypes` found.

    Args:
        columns: name -> type.
    """
    kinds = {name: kind for name, kind in columns.items() if name not in OWN_COLUMNS}

    def read_input(_: list[int], records: list[Mapping[str, Any]]) -> Mapping[str, pa.Array]:
        return {name: _column([record.get(name) for record in records], kind) for name, kind in kinds.items()}
    return ParquetParts(pa.schema([(name, JSONL_TYPES[kind]) for name, kind in columns.items()]), read_input, kinds)


def _column(values: list[Any], kind: str) -> pa.Array:
    if kind == "json":
        values = [None if value is None else to_line(value).decode() for value in values]
    elif kind == "double":
        values = [None if value is None else float(value) for value in values]
    return pa.array(values, JSONL_TYPES[kind])


def _id_type(kind: pa.DataType) -> pa.DataType:
    """The type of the custom ids of an input column: its own where it holds numbers, and row numbers besides, else text."""
    if types.is_dictionary(kind):
        return _id_type(kind.value_type)
    if types.is_integer(kind):
        return kind if kind.bit_width >= 32 else pa.int64()
    if types.is_floating(kind):
        return kind if kind.bit_width >= 32 else pa.float64()
    return pa.string()


def _own_columns(records: list[Mapping[str, Any]], id_type: pa.DataType) -> dict[str, pa.Array]:
    as_id = custom_id_text if types.is_string(id_type) else int if types.is_integer(id_type) else float
    columns = {
        "custom_id": [as_id(record["custom_id"]) for record in records],
        "outputs": [[_completion(completion) for completion in record["outputs"]] for record in records],
        "prompt_logprobs": [_logprobs(record.get("prompt_logprobs")) for record in records],
        "usage": [record["usage"] for record in records],
    }
    return {name: pa.array(values, id_type if name == "custom_id" else OWN_COLUMNS[name]) for name, values in columns.items()}


def _completion(completion: Mapping[str, Any]) -> dict[str, Any]:
    reason = completion.get("stop_reason")
    return {**completion, "stop_reason": None if reason is None else str(reason), "logprobs": _logprobs(completion.get("logprobs"))}


def _logprobs(tokens: list[Mapping[str, Any] | None] | None) -> list[list[dict[str, Any]] | None] | None:
    return tokens and [token and [{"token_id": int(token_id), **entry} for token_id, entry in token.items()] for token in tokens]


def _logprobs_by_id(tokens: list[list[Mapping[str, Any]] | None] | None) -> list[Mapping[str, Any] | None] | None:
    """What :func:`_logprobs` made a column's value of."""
    return tokens and [token and {str(entry["token_id"]): {key: entry[key] for key in ("logprob", "rank", "decoded_token")} for entry in token}
                       for token in tokens]


def _groups(rows: Iterable[FinishedRow]) -> Iterator[list[FinishedRow]]:
    group, num_bytes = [], 0
    for row in rows:
        group.append(row)
        num_bytes += len(row.line)
        if len(group) == GROUP_ROWS or num_bytes >= GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


class _Sink:
    """A file that keeps what is written until it is taken."""

    closed = False

    def __init__(self):
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
