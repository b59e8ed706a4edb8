"""Delimited text: CSV and TSV, every cell as its text."""

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
from ftdata.readers.streams import MAX_LINE, Input
from ftdata.readers.table_checks import check_names
from ftdata.types import Reject, Row, Source

_DELIMITERS = ",;\t|"
_BOM = "\ufeff"
_RAW = 4096
_FAR = 10_000
"""Lines that a quote left open by a fault is looked for in."""


_QUOTES_ARE_TEXT = frozenset({"quotes"})


def read_csv(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of a CSV file (comma, semicolon, tab or bar, as the header has it), every cell as its text.

    `line` is where a row begins; with quotes it may go on over several. Blank lines are skipped, and `sep=;` before the
    header says the delimiter.
    """
    yield from _separated(file, None)


def read_tsv(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of a file of tab-separated values, as `read_csv`; quotes may be text (`quoting_of`)."""
    yield from _separated(file, "\t")


def _separated(file: Input, delimiter: str | None) -> Iterator[Row | Reject]:
    with file.text() as stream:
        lines = _Lines(stream, file)
        head = next(filter(str.strip, lines), "").removeprefix(_BOM)
        if said := re.fullmatch(r"sep=(.)\s*", head):
            head, delimiter = next(lines, ""), said[1]
        quoting = file.quoting or "csv"
        if delimiter == "\t":
            quoting = detect_quoting(file, lines.ahead(), b"\t")
        notes = _QUOTES_ARE_TEXT if delimiter == "\t" and quoting != "csv" else frozenset[str]()
        delimiter = delimiter or max(_DELIMITERS, key=_outside_quotes(head).count)
        yield from _cells(head, lines, file, delimiter, quoted=quoting == "csv", notes=notes)


class _Lines:
    """The lines of a text, with how many there were and how many bytes."""

    def __init__(self, stream: io.BufferedReader, file: Input) -> None:
        self._stream, self._file = stream, file
        self._ahead: deque[bytes] = deque()
        self.line = self.offset = 0
        self.forget()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._ahead.popleft() if self._ahead else self._read()
        if not raw:
            raise StopIteration
        self.line += 1
        self.offset += len(raw)
        self.taken += 1
        text = raw.decode("utf-8", "surrogateescape")
        if len(self._begin) < _RAW:
            self._begin += text[:_RAW]
        return text

    def ahead(self) -> Iterator[bytes]:
        """Yield the lines that come next, which are kept."""
        for number in count():
            if number == len(self._ahead):
                self._ahead.append(self._read())
            if not self._ahead[number]:
                return
            yield self._ahead[number]

    def forget(self) -> None:
        """Begin to count the lines of another row."""
        self.taken, self._begin = 0, ""

    def _read(self) -> bytes:
        raw = self._stream.readline(MAX_LINE + 1)
        if len(raw) > MAX_LINE:
            place = f"{self._file.path}:{self.line + len(self._ahead) + 1}"
            raise InputRefused("line_too_long", f"is longer than {MAX_LINE:,} bytes", where=place)
        return raw

    def within_quotes(self, delimiter: str) -> bool:
        """Take the lines that are the rest of a faulty row; return whether there are more of them.

        The next quote that can begin or end a cell tells: one that ends it was opened in the row, one that begins it
        was not. Where there is none, nothing was left open.
        """
        mark, size = delimiter.encode(), 0
        begins = re.compile(rb"(?:^|" + re.escape(mark) + rb')"')
        ends = re.compile(rb'"(?:' + re.escape(mark) + rb"|[\r\n]|$)")
        for number in range(_FAR):
            if number == len(self._ahead):
                self._ahead.append(self._read())
            raw = self._ahead[number]
            size += len(raw)
            if not raw:
                self._ahead.pop()
                return False
            begun, ended = begins.search(raw), ends.search(raw)
            if size > MAX_LINE or (begun and (not ended or begun.start() <= ended.start())):
                return False
            if ended:
                for _ in range(number + 1):
                    next(self)
                return raw.count(b'"', ended.start() + 1) % 2 == 1
        return False

    @property
    def raw(self) -> str:
        """How the lines taken last begin."""
        return self._begin[:_RAW].encode("utf-8", "backslashreplace").decode()


def _cells(
    head: str, lines: _Lines, file: Input, delimiter: str, *, quoted: bool, notes: frozenset[str]
) -> Iterator[Row | Reject]:
    csv.field_size_limit(MAX_LINE)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    try:
        # Names may have line breaks inside quotes.
        names = next(csv.reader(chain([head], lines), delimiter=delimiter, strict=True, quoting=quoting), [])
    except csv.Error as error:
        hint = "lines must end in LF or CRLF, and a quote inside quotes is written twice"
        raise InputRefused("csv", f"the header is not valid CSV: {error}", where=file.path, hint=hint) from None
    while names and not names[-1]:
        names.pop()
    if not any(names):
        raise InputRefused("no_rows", "the file is empty, or its header is", where=file.path)
    check_names(names, file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)
    index = 0
    while True:
        source = Source(file.path, index, lines.line + 1, lines.offset)
        lines.forget()
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            while quoted and lines.within_quotes(delimiter):
                pass
            more = f", with {lines.taken - 1:,} lines after it" if lines.taken > 1 else ""
            fix = "a quote inside quotes is written twice"
            yield Reject(source, "csv", "", f"is not valid CSV{more}: {error}", fix, lines.raw)
            index += 1
            continue
        if not cells:
            continue
        yield _row(names, cells, source, lines.raw, notes)
        index += 1
    if index == 0:
        raise InputRefused("no_rows", "the file holds no rows below its header", where=file.path)


def _row(names: Sequence[str], cells: Sequence[str], source: Source, raw: str, notes: frozenset[str]) -> Row | Reject:
    while len(cells) > len(names) and not cells[-1]:
        cells = cells[:-1]
    if len(cells) != len(names):
        found = f"has {len(cells)} cells, and the header {len(names)}"
        return Reject(source, "ragged_row", "", found, "text with a comma or a line break in it needs quotes", raw)
    for name, cell in zip(names, cells, strict=True):
        if not cell.isascii() and any("\ud800" <= char <= "\udfff" for char in cell):
            fix = "say what it is written in, e.g. encoding='cp1252'"
            return Reject(source, "encoding", name, "is no text in its encoding", fix, raw)
    return Row(dict(zip(names, cells, strict=True)), source, flat=True, notes=notes)


def _outside_quotes(line: str) -> str:
    return "".join(line.split('"')[::2])
