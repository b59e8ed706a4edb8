"""Read CSV and TSV files. Every cell is read as text."""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, count
from typing import Literal

from ftdata.errors import InputRefused
from ftdata.readers.quote_detection import detect_quoting
from ftdata.readers.streams import MAX_LINE, MAX_VALUES, Input
from ftdata.readers.table_checks import check_names
from ftdata.types import Reject, Row, Source

_DELIMITERS = ",;\t|"
_BOM = "\ufeff"
_RAW_LIMIT = 4096
_MAX_LINES_AHEAD = 10_000
"""Maximum number of lines in which to search for the end of a quote that an invalid row left open."""


_MAX_ROW_LIKE = 10
"""Maximum number of lines of a row that look like rows. More are probably rows after a quote that is not closed."""

_QUOTES_ARE_TEXT = frozenset({"quotes"})
_LONG_QUOTES = frozenset({"long quotes"})


def read_csv(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of a CSV file. Every cell is read as text.

    The delimiter is detected from the header: a comma, a semicolon, a tab or a vertical bar. A line `sep=;` before the
    header sets it explicitly. `line` is the first line of a row, because a quoted cell may contain line breaks. Blank
    lines are skipped.
    """
    yield from _read_delimited(file, None)


def read_tsv(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of a TSV (tab-separated) file. Every cell is read as text.

    Quotes either enclose cells, as in CSV, or are part of the text (see `detect_quoting`).
    """
    yield from _read_delimited(file, "\t")


def _read_delimited(file: Input, delimiter: str | None) -> Iterator[Row | Reject]:
    with file.text() as stream:
        lines = _LineReader(stream, file)
        header = next(filter(str.strip, lines), "").removeprefix(_BOM)
        if separator := re.fullmatch(r"sep=(.)\s*", header):
            header, delimiter = next(lines, ""), separator[1]
        quoting = file.quoting or "csv"
        if delimiter == "\t":
            quoting = detect_quoting(file, lines.ahead(), b"\t")
        notes = _QUOTES_ARE_TEXT if delimiter == "\t" and quoting != "csv" else frozenset[str]()
        delimiter = delimiter or max(_DELIMITERS, key=_remove_quoted(header).count)
        yield from _parse_rows(header, lines, file, delimiter, quoted=quoting == "csv", notes=notes)


class _LineReader:
    """Iterates over the lines of a CSV or TSV file, and counts lines and bytes. It can also look ahead to later lines.

    Attributes:
        line: number of lines read so far.
        offset: number of bytes read so far.
        row_lines: number of lines read so far in the current row.
        row_like: number of these lines that have as many delimiters as the header, so that they look like rows.
    """

    def __init__(self, stream: io.BufferedReader, file: Input) -> None:
        self._stream, self._file = stream, file
        self._delimiter, self._delimiters = "", 0
        self._ahead: deque[bytes] = deque()
        self.line = self.offset = self._ahead_bytes = self._searched = self.row_like = 0
        self.start_row()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._ahead:
            raw = self._ahead.popleft()
            self._ahead_bytes -= len(raw)
        else:
            raw = self._read_line()
        if not raw:
            raise StopIteration
        self.line += 1
        self.offset += len(raw)
        self.row_lines += 1
        if self._delimiter and self.row_lines > 1:
            self.row_like += raw.count(self._delimiter.encode()) == self._delimiters
        text = raw.decode("utf-8", "surrogateescape")
        if len(self._row_text) < _RAW_LIMIT:
            self._row_text += text[:_RAW_LIMIT]
        return text

    def ahead(self) -> Iterator[bytes]:
        """Yield the lines after the current line without consuming them."""
        for number in count():
            if number == len(self._ahead):
                self._read_ahead()
            if not self._ahead[number]:
                return
            yield self._ahead[number]

    def _read_ahead(self) -> None:
        self._ahead.append(self._read_line())
        self._ahead_bytes += len(self._ahead[-1])

    def start_row(self) -> None:
        """Reset the line count and the stored text at the beginning of a row."""
        self.row_lines, self.row_like, self._row_text = 0, 0, ""

    def count_rows(self, delimiter: str, delimiters: int) -> None:
        """Start to count lines with a number of delimiters as `row_like`."""
        self._delimiter, self._delimiters = delimiter, delimiters

    def _read_line(self) -> bytes:
        raw = self._stream.readline(MAX_LINE + 1)
        if len(raw) > MAX_LINE:
            where = f"{self._file.path}:{self.line + len(self._ahead) + 1}"
            raise InputRefused("line_too_long", f"the line is longer than {MAX_LINE:,} bytes", where=where)
        if len(raw) > MAX_VALUES and sum(map(raw.count, _DELIMITERS.encode())) > MAX_VALUES:
            where = f"{self._file.path}:{self.line + len(self._ahead) + 1}"
            raise InputRefused("row_too_long", f"the line has more than {MAX_VALUES:,} delimiters", where=where)
        return raw

    def skip_quoted(self, delimiter: str) -> bool:
        """Skip the remaining lines of an invalid row that contains an unclosed quote.

        The next quote that can begin or end a cell decides. If it ends a cell, that cell began in the invalid row. If
        it begins a cell, the row has no unclosed quote. Without a next quote, no line is skipped.

        Returns:
            Whether the last skipped line contains another unclosed quote, so that the method must be called again.
        """
        mark = delimiter.encode()
        opening = re.compile(rb"(?:^|" + re.escape(mark) + rb')"')
        closing = re.compile(rb'"(?:' + re.escape(mark) + rb"|[\r\n]|$)")
        # Lines without such a quote are searched only once, even if many rows are invalid.
        for number in range(max(0, self._searched - self.line), _MAX_LINES_AHEAD):
            if number == len(self._ahead):
                self._read_ahead()
            raw = self._ahead[number]
            if not raw:
                self._ahead.pop()
                return False
            opened, closed = opening.search(raw), closing.search(raw)
            if self._ahead_bytes > MAX_LINE or (opened and (not closed or opened.start() <= closed.start())):
                return False
            if closed:
                for _ in range(number + 1):
                    next(self)
                return raw.count(b'"', closed.start() + 1) % 2 == 1
            self._searched = self.line + number + 1
        return False

    @property
    def raw(self) -> str:
        """The text of the current row, truncated to `_RAW_LIMIT` characters."""
        return self._row_text[:_RAW_LIMIT].encode("utf-8", "backslashreplace").decode()


def _parse_rows(
    header: str, lines: _LineReader, file: Input, delimiter: str, *, quoted: bool, notes: frozenset[str]
) -> Iterator[Row | Reject]:
    csv.field_size_limit(MAX_LINE)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    try:
        # A quoted name may contain line breaks.
        names = next(csv.reader(chain([header], lines), delimiter=delimiter, strict=True, quoting=quoting), [])
    except csv.Error as error:
        hint = "end lines with LF or CRLF, and double each quote inside a quoted cell"
        raise InputRefused("csv", f"the header is not valid CSV: {error}", where=file.path, hint=hint) from None
    while names and not names[-1]:
        names.pop()
    if not any(names):
        hint = "add rows to the file, or leave the file out"
        raise InputRefused("no_rows", "the file or its header is empty", where=file.path, hint=hint)
    check_names(names, file)
    lines.count_rows(delimiter, len(names) - 1 if quoted and len(names) > 1 else -1)
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)
    index = 0
    while True:
        source = Source(file.path, index, lines.line + 1, lines.offset)
        lines.start_row()
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            yield _reject_row(error, source, lines, delimiter, quoted=quoted)
            index += 1
            continue
        if not cells:
            continue
        is_suspicious = lines.row_like > _MAX_ROW_LIKE
        yield _make_row(names, cells, source, lines.raw, notes | _LONG_QUOTES if is_suspicious else notes)
        index += 1
    if index == 0:
        hint = "add rows to the file, or leave the file out"
        raise InputRefused("no_rows", "the file contains no rows below its header", where=file.path, hint=hint)


def _reject_row(error: csv.Error, source: Source, lines: _LineReader, delimiter: str, *, quoted: bool) -> Reject:
    """Return the rejection of a row that is not valid CSV, and skip its remaining lines.

    Raises:
        InputRefused: the row consists of many lines that look like rows, because a quote is not closed.
    """
    while quoted and lines.skip_quoted(delimiter):
        pass
    if lines.row_like > _MAX_ROW_LIKE:
        problem = (
            f"a quote in this row is not closed correctly, so the row has {lines.row_lines:,} lines, of which "
            f"{lines.row_like:,} look like rows"
        )
        hint = "remove the quote or close it; or set quoting='none' if quotes do not enclose cells"
        raise InputRefused("csv", problem, where=str(source), hint=hint) from None
    extent = f" (the row has {lines.row_lines:,} lines)" if lines.row_lines > 1 else ""
    fix = "double each quote inside a quoted cell"
    return Reject(source, "csv", "", f"is not valid CSV{extent}: {error}", fix, lines.raw)


def _make_row(
    names: Sequence[str], cells: Sequence[str], source: Source, raw: str, notes: frozenset[str]
) -> Row | Reject:
    size = len(cells)
    while size > len(names) and not cells[size - 1]:
        size -= 1
    cells = cells[:size]
    if len(cells) != len(names):
        reason = f"has {len(cells)} cells, expected {len(names)} as in the header"
        return Reject(source, "ragged_row", "", reason, "quote cells that contain a delimiter or a line break", raw)
    for name, cell in zip(names, cells, strict=True):
        if not cell.isascii() and any("\ud800" <= char <= "\udfff" for char in cell):
            fix = "set the encoding, e.g. encoding='cp1252', or {path: ..., encoding: cp1252} if only this file has it"
            return Reject(source, "encoding", name, "is not valid text in the encoding of the file", fix, raw)
    return Row(dict(zip(names, cells, strict=True)), source, flat=True, notes=notes)


def _remove_quoted(line: str) -> str:
    return "".join(line.split('"')[::2])
