"""Tables: CSV and TSV as text, Parquet and Arrow, Excel sheets, data frames and data sets in memory.

Every cell of a table has some value, so a null in one says no more than an absent key: both are left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from ftdata.errors import InputRefused, MissingDependency
from ftdata.readers.lines import MAX_LINE
from ftdata.readers.streams import Input
from ftdata.types import Reject, Row, Source

BATCH = 1024
_DELIMITERS = ",;\t|"
_BOM = "\ufeff"


def read_csv(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of a CSV file (comma, semicolon, tab or bar, as the header has it), every cell as its text.

    `line` is where a row begins; with quotes it may go on over several. Blank lines are skipped.
    """
    with file.text() as stream:
        lines = _Lines(stream, file)
        head = next(lines, "")
        yield from _cells(head, lines, file, max(_DELIMITERS, key=_outside_quotes(head).count))


def read_tsv(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of a file of tab-separated values, as `read_csv`."""
    with file.text() as stream:
        lines = _Lines(stream, file)
        yield from _cells(next(lines, ""), lines, file, "\t")


class _Lines:
    """The lines of a text, with how many there were and how many bytes."""

    def __init__(self, stream: io.BufferedReader, file: Input) -> None:
        self._stream, self._file = stream, file
        self.line = self.offset = 0
        self.taken: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._stream.readline(MAX_LINE + 1)
        if not raw:
            raise StopIteration
        if len(raw) > MAX_LINE:
            raise InputRefused(
                "line_too_long", f"is longer than {MAX_LINE:,} bytes", where=f"{self._file.path}:{self.line + 1}"
            )
        self.line += 1
        self.offset += len(raw)
        self.taken.append(raw.decode("utf-8", "surrogateescape"))
        return self.taken[-1]


def _cells(head: str, lines: _Lines, file: Input, delimiter: str) -> Iterator[Row | Reject]:
    csv.field_size_limit(MAX_LINE)
    try:
        # Names may have line breaks inside quotes.
        names = next(csv.reader(chain([head.removeprefix(_BOM)], lines), delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        hint = "lines must end in LF or CRLF, and a quote inside quotes is written twice"
        raise InputRefused("csv", f"the header is not valid CSV: {error}", where=file.path, hint=hint) from None
    while names and not names[-1]:
        names.pop()
    if not any(names):
        raise InputRefused("no_rows", "the file is empty, or its header is", where=file.path)
    _check_names(names, file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    index, after_fault = 0, False
    while True:
        source = Source(file.path, index, lines.line + 1, lines.offset)
        lines.taken.clear()
        try:
            cells = next(reader)
            # What follows a fault may be the rest of the row that has it.
            if after_fault and sum(line.count('"') for line in lines.taken) % 2:
                raise csv.Error("a quote stands alone")
            after_fault = False
        except StopIteration:
            break
        except csv.Error as error:
            after_fault = True
            more = f", with {len(lines.taken) - 1:,} lines after it" if len(lines.taken) > 1 else ""
            raw = "".join(lines.taken)[:4096].encode("utf-8", "backslashreplace").decode()
            fix = "a quote inside quotes is written twice"
            yield Reject(source, "csv", "", f"is not valid CSV{more}: {error}", fix, raw)
            index += 1
            continue
        if not cells:
            continue
        yield _row(names, cells, source)
        index += 1
    if index == 0:
        raise InputRefused("no_rows", "the file holds no rows below its header", where=file.path)


def _check_names(names: Sequence[str], file: Input) -> None:
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InputRefused("repeated_column", f"names columns twice: {', '.join(map(repr, twice))}", where=file.path)


def _row(names: Sequence[str], cells: Sequence[str], source: Source) -> Row | Reject:
    while len(cells) > len(names) and not cells[-1]:
        cells = cells[:-1]
    raw = ",".join(cells)[:4096].encode("utf-8", "backslashreplace").decode()
    if len(cells) != len(names):
        found = f"has {len(cells)} cells, and the header {len(names)}"
        return Reject(source, "ragged_row", "", found, "text with a comma or a line break in it needs quotes", raw)
    for name, cell in zip(names, cells, strict=True):
        if not cell.isascii() and any("\ud800" <= char <= "\udfff" for char in cell):
            fix = "say what it is written in, e.g. encoding='cp1252'"
            return Reject(source, "encoding", name, "is not UTF-8 text", fix, raw)
    return Row(dict(zip(names, cells, strict=True)), source)


def _outside_quotes(line: str) -> str:
    return "".join(line.split('"')[::2])


def read_parquet(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of a Parquet file, a batch in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file.open() as stream:
        _check_seekable(stream, file)
        try:
            table = pq.ParquetFile(stream)
            _check_names(table.schema_arrow.names, file)
            yield from _batches(table.iter_batches(BATCH), file)
        except (pa.ArrowInvalid, OSError) as error:
            raise _damaged(error, file, "Parquet") from None


def parquet_rows(file: Input) -> int | None:
    """Return how many rows a Parquet file says that it has, or `None` where it cannot be asked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file.open() as stream:
        try:
            return int(pq.ParquetFile(stream).metadata.num_rows) if stream.seekable() else None
        except (pa.ArrowInvalid, OSError):
            return None


def read_arrow(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of an Arrow file or stream (also Feather, and the files of `datasets.save_to_disk`)."""
    import pyarrow as pa

    with file.open() as stream:
        try:
            if stream.peek(6)[:6] == b"ARROW1":
                _check_seekable(stream, file)
                found = pa.ipc.open_file(stream)
                _check_names(found.schema.names, file)
                yield from _batches((found.get_batch(n) for n in range(found.num_record_batches)), file)
            else:
                yield from _batches(iter(pa.ipc.open_stream(stream)), file)
        except (pa.ArrowInvalid, OSError) as error:
            raise _damaged(error, file, "Arrow") from None


def _batches(batches: Iterable[Any], file: Input) -> Iterator[Row | Reject]:
    index = 0
    for batch in batches:
        for start in range(0, len(batch), BATCH):
            for item in _values(batch.slice(start, BATCH)):
                source = Source(file.path, index)
                yield Row(item, source) if isinstance(item, dict) else Reject(source, *item)
                index += 1
    if index == 0:
        raise InputRefused("no_rows", "the file holds no rows", where=file.path)


def _values(batch: Any) -> Iterator[dict[str, Any] | tuple[str, str, str]]:
    try:
        found = batch.to_pylist()
    except (OverflowError, ValueError):
        for row in range(len(batch)):
            try:
                yield from map(present, batch.slice(row, 1).to_pylist())
            except UnicodeDecodeError as error:
                yield "encoding", "", f"holds text that is not UTF-8: {error}"
            except (OverflowError, ValueError) as error:
                yield "value_range", "", f"holds a value that Python does not: {error}"
        return
    yield from map(present, found)


def read_excel(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of all sheets of an Excel file, every cell as text; the first row of each names its columns."""
    try:
        import openpyxl  # noqa: F401  (pandas reads with it)
        import pandas as pd
    except ImportError:
        raise MissingDependency(
            "no_excel", "Excel files need openpyxl", where=file.path, hint="pip install 'ftdata[excel]'"
        ) from None
    with file.open() as stream:
        _check_seekable(stream, file)
        try:
            sheets = pd.read_excel(
                stream, sheet_name=None, header=None, dtype=str, keep_default_na=False, na_filter=False
            )
        except Exception as error:  # noqa: BLE001  (zip, XML and openpyxl each have errors of their own)
            raise _damaged(error, file, "Excel") from None
    index = 0
    for name, frame in sheets.items():
        path = f"{file.path}#{name}" if len(sheets) > 1 else file.path
        lines = [[cell if isinstance(cell, str) else "" for cell in line] for line in frame.to_numpy().tolist()]
        names = lines[0] if lines else []
        _check_names([one for one in names if one], file)
        for line, cells in enumerate(lines[1:], start=2):
            if not any(cells):
                continue
            source = Source(path, index, line)
            index += 1
            if any(cell and not name for name, cell in zip(names, cells, strict=True)):
                yield Reject(source, "ragged_row", "", "has a cell in a column without a name")
            else:
                yield Row({name: cell for name, cell in zip(names, cells, strict=True) if cell}, source)
    if index == 0:
        raise InputRefused("no_rows", "the file holds no rows", where=file.path)


def from_dataframe(frame: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a pandas `DataFrame`."""
    if not frame.columns.is_unique:
        raise InputRefused("repeated_column", "names a column twice", where="<DataFrame>")
    step = range(0, len(frame), BATCH)
    for part in (frame.iloc[start : start + BATCH] for start in step):
        known = part.notna().to_numpy()
        columns = [part[name].tolist() for name in part]
        for at, cells in enumerate(zip(*columns, strict=True)):
            yield {
                str(name): present(plain(cell))
                for name, cell, there in zip(part, cells, known[at], strict=True)
                if there
            }


def from_dataset(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a `datasets.Dataset`, as they are stored."""
    for batch in dataset.with_format("arrow").iter(BATCH):
        yield from map(present, batch.to_pylist())


def present(value: Any) -> Any:
    """Return a JSON value without the nulls in its objects."""
    if isinstance(value, dict):
        return {key: present(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [present(item) for item in value]
    return value


def plain(value: Any) -> Any:
    """Return a cell with lists for the arrays in it, as which pandas reads the lists of Parquet."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _check_seekable(stream: io.BufferedReader, file: Input) -> None:
    if not stream.seekable():
        raise InputRefused(
            "not_seekable",
            "cannot be read from a pipe: this format is read from its end",
            where=file.path,
            hint="write it to a file first",
        )


def _damaged(error: Exception, file: Input, kind: str) -> InputRefused:
    return InputRefused(
        "damaged_file", f"is no whole {kind} file: {error}", where=file.path, hint="copy or download it again"
    )
