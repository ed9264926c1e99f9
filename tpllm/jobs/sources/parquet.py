"""The rows of Parquet files: as JSON for requests, and as Arrow for a Parquet output. Nothing is ever read whole: a row group is decoded in
batches of about ``BATCH_BYTES``, however large it is."""
import collections
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from tpllm.errors import JobError
from tpllm.jobs.json_line import to_line
from tpllm.jobs.sources.arrow_json import json_rows, json_values
from tpllm.jobs.sources.files import BUFFER_BYTES, PARQUET, InputFile, reading
from tpllm.jobs.sources.raw_row import FileSummary, RawRow
from tpllm.jobs.sources.row_source import RowSource

BATCH_BYTES, MAX_BATCH_ROWS = 8 << 20, 1024
KEPT_BYTES = 16 << 20


class ParquetRows:
    """One Parquet file.

    Attributes:
        file: where it is.
        schema: its columns, without the file's own metadata, which would not fit what is made of it.
        num_rows: in all its row groups.
    """

    def __init__(self, file: InputFile):
        self.file = file
        with self._opened() as parquet:
            self.schema, self._groups = _layout(parquet)
        self.num_rows = sum(num_rows for num_rows, _ in self._groups)
        _check_columns(self.schema, file.name)

    def scan(self, first: int, note: Callable[[RawRow], None]) -> FileSummary:
        """Hash the file and decode all of it once, so that what is damaged is found before anything is run."""
        with self.file.scanned() as (_, digest):
            pass
        with self._opened() as parquet:
            if _layout(parquet) != (self.schema, self._groups):
                self.file.refuse_change()
        has_ids = "custom_id" in self.schema.names
        for start, batch in self.batches():
            with reading(self.file.name):
                batch.validate(full=True)
                ids = json_values("custom_id", batch.column("custom_id")) if has_ids else itertools.repeat(None, batch.num_rows)
            for number, custom_id in enumerate(ids, start):
                data = b"{}" if custom_id is None else to_line({"custom_id": custom_id})
                note(RawRow(first + number, data, self.file.name, file_row=number))
        return FileSummary(digest.hexdigest(), digest.num_bytes, self.num_rows)

    def rows(self, first: int, is_wanted: Callable[[int], bool], stop: float) -> Generator[RawRow, None, int]:
        """The wanted rows below ``stop`` in order, lazily; returns the number of the next file's first row."""
        def is_wanted_here(number: int) -> bool:
            return first + number < stop and is_wanted(first + number)
        for start, batch in self.batches(is_group_wanted=lambda rows: any(map(is_wanted_here, rows))):
            wanted = list(filter(is_wanted_here, range(start, start + batch.num_rows)))
            if len(wanted) < batch.num_rows:
                batch = batch.take(pa.array([number - start for number in wanted], pa.int64()))
            for number, fields in zip(wanted, json_rows(batch), strict=True):
                yield RawRow(first + number, to_line(fields), self.file.name, file_row=number)
        return first + self.num_rows

    def batches(self, *, is_group_wanted: Callable[[range], bool] = lambda rows: True) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Pieces of the file in order, each with the number of its first row in the file, cut in the same places every time.

        Args:
            is_group_wanted: of the rows of a row group; one that is not wanted is not read.
        """
        start = 0
        with self._opened() as parquet:
            for group, (num_rows, batch_rows) in enumerate(self._groups):
                if is_group_wanted(range(start, start + num_rows)):
                    num_read = 0
                    for batch in parquet.iter_batches(batch_rows, row_groups=[group], use_threads=False):
                        yield start + num_read, batch
                        num_read += batch.num_rows
                    if num_read != num_rows:
                        raise JobError(f"cannot read the input {self.file.name}: row group {group} has {num_read} rows where its metadata "
                                       f"says {num_rows}; the file is damaged")
                start += num_rows

    @contextlib.contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        with reading(self.file.name), contextlib.closing(self.file.open()) as file:
            # A buffer makes Arrow read column by column in pieces; without one it takes a row group's columns whole.
            yield pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)


class ParquetSource(RowSource):
    """Parquet files of the same columns.

    Attributes:
        schema: the columns.
    """

    def __init__(self, files: Sequence[InputFile], *, limit: int | None = None):
        super().__init__(PARQUET, [ParquetRows(file) for file in files], limit=limit)
        for other in self.files[1:]:
            if differences := _differences(self.files[0].schema, other.schema):
                raise JobError(f"the input files have different columns: {'; '.join(differences)} in {other.file.name}, against "
                               f"{files[0].name}; make their columns the same, or make each kind its own job")
        self.schema = pa.schema([field.with_nullable(any(file.schema.field(field.name).nullable for file in self.files))
                                 for field in self.files[0].schema])
        self.columns, self._slices = self.schema.names, _Slices(self.files, self.schema)

    def slice(self, start: int, stop: int) -> pa.Table:
        """The input's rows from ``start`` to ``stop`` as they stand in the files.

        Raises:
            JobError: a file that cannot be read, or that is not the one that was scanned.
        """
        return self._slices.read(start, stop)


class _Slices:
    """Reads slices that come mostly in order, as parts are committed: what was decoded last is kept, and going back further begins again at the
    row group."""

    def __init__(self, files: Sequence[ParquetRows], schema: pa.Schema):
        self._files, self._schema = files, schema
        self._firsts = list(itertools.accumulate((file.num_rows for file in files), initial=0))
        self._kept: collections.deque[tuple[int, pa.RecordBatch]] = collections.deque()
        self._kept_bytes = self._next = 0
        self._batches: Iterator[tuple[int, pa.RecordBatch]] = iter(())

    def read(self, start: int, stop: int) -> pa.Table:
        if not self._kept or not self._kept[0][0] <= start <= self._next:
            self._begin(start)
        while self._next < stop:
            first, batch = next(self._batches)
            self._next = first + batch.num_rows
            self._kept.append((first, batch))
            self._kept_bytes += batch.nbytes
            while self._kept_bytes > KEPT_BYTES and self._kept[0][0] + self._kept[0][1].num_rows <= start:
                self._kept_bytes -= self._kept.popleft()[1].nbytes
        return pa.Table.from_batches([batch.slice(max(start - first, 0), stop - max(start, first)) for first, batch in self._kept
                                      if first < stop and start < first + batch.num_rows], self._schema)

    def _begin(self, start: int) -> None:
        self._kept.clear()
        self._kept_bytes, self._next = 0, start
        self._batches = itertools.dropwhile(lambda item: item[0] + item[1].num_rows <= start, self._batches_from(start))

    def _batches_from(self, start: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches with the numbers of their first rows, from the row group that holds row ``start``."""
        for file, first in zip(self._files, self._firsts, strict=False):
            if start < first + file.num_rows:
                for number, batch in file.batches(is_group_wanted=lambda rows, first=first: first + rows.stop > start):
                    yield first + number, pa.RecordBatch.from_arrays(batch.select(self._schema.names).columns, schema=self._schema)


def _layout(parquet: pq.ParquetFile) -> tuple[pa.Schema, list[tuple[int, int]]]:
    """The columns, and of each row group its rows and how many of them are decoded at once."""
    groups = (parquet.metadata.row_group(number) for number in range(parquet.num_row_groups))
    return parquet.schema_arrow.remove_metadata(), [(group.num_rows, _batch_rows(group.num_rows, group.total_byte_size)) for group in groups]


def _batch_rows(num_rows: int, num_bytes: int) -> int:
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * num_rows // max(num_bytes, 1)))


def _check_columns(schema: pa.Schema, name: str) -> None:
    twins = [column for column, count in collections.Counter(schema.names).items() if count > 1]
    if twins:
        raise JobError(f"cannot read the input {name}: it has several columns called {twins[0]!r}; rename them")
    try:
        for field in schema:
            json_values(field.name, pa.nulls(0, field.type))
    except JobError as error:
        raise JobError(f"cannot read the input {name}: {error}") from None


def _differences(schema: pa.Schema, other: pa.Schema) -> list[str]:
    """In what the columns differ, as text; their order does not matter."""
    found = [f"{name!r} is missing" for name in schema.names if name not in other.names]
    found += [f"{name!r} is one more" for name in other.names if name not in schema.names]
    return found + [f"{name!r} is {other.field(name).type} instead of {schema.field(name).type}" for name in schema.names
                    if name in other.names and other.field(name).type != schema.field(name).type]
