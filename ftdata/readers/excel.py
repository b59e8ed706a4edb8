"""Read the sheets of Excel workbooks. Every cell is read as text."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ftdata.errors import FtdataError, InputRefused, MissingDependency
from ftdata.readers.streams import FREE_REPEATED, MAX_LINE, MAX_REPEATED, Input, expansion_error
from ftdata.readers.table_checks import check_names, check_seekable, damaged_file_error
from ftdata.readers.workbook import AS_CSV, Cell, SharedStrings, Sheet, SheetRow, Workbook, open_workbook
from ftdata.readers.xml_scan import unescape_xml_string
from ftdata.types import Reject, Row, Source

MAX_CELL = 32_767
"""Maximum number of characters in a cell, as in Excel."""

_SMALLEST_CELL = len("<c t='s'><v>0</v></c>")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_excel(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of all visible sheets in an Excel file. Every cell is read as text.

    The first row of each sheet that is not empty contains the column names.
    """
    try:
        import openpyxl  # noqa: F401  (checked before the file is opened)
    except ImportError:
        message = "reading Excel files requires openpyxl"
        raise MissingDependency("no_excel", message, where=file.path, hint="pip install 'ftdata[excel]'") from None
    index = 0
    with file.open() as stream:
        check_seekable(stream, file)
        try:
            for row in _read_workbook(open_workbook(stream, file.path)):
                source = row.source._replace(row=index)
                yield row._replace(source=source) if isinstance(row, Row) else replace(row, source=source)
                index += 1
        except FtdataError:
            raise
        except Exception as error:  # noqa: BLE001  (the zip and XML libraries have their own exception classes)
            raise damaged_file_error(error, file, "Excel") from None
    if index == 0:
        hint = "add rows to the file, or leave the file out"
        raise InputRefused("no_rows", "the file contains no rows", where=file.path, hint=hint)


def _read_workbook(book: Workbook) -> Iterator[Row | Reject]:
    sheets = [sheet for sheet in book.sheets if sheet.visible]
    size = book.check_size(sheets)
    strings = book.strings()
    try:
        _check_repeated(book, sheets, strings, size)
        for sheet in sheets:
            path = f"{book.path}#{sheet.title}" if len(sheets) > 1 else book.path
            yield from _read_sheet(book.rows(sheet), path, _CellReader(book, strings))
    finally:
        strings.close()


def _check_repeated(book: Workbook, sheets: Sequence[Sheet], strings: SharedStrings, size: int) -> None:
    """Check that the text of all cells is not far larger than the file. Many cells can refer to the same string.

    Raises:
        InputRefused: The text of the cells is far larger than the file.
    """
    limit = max(FREE_REPEATED, MAX_REPEATED * book.packed)
    if max(strings.sizes, default=0) * (size // _SMALLEST_CELL) <= limit:
        return
    total, sizes, before = 0, strings.sizes, (book.plain, book.elements)
    for sheet in sheets:
        for row in book.rows(sheet):
            numbers = [_string_index(cell.value, sizes) for cell in row.cells if cell.kind == "s" and cell.value]
            total += sum(sizes[number] for number in numbers if number is not None)
            if total > limit:
                raise expansion_error(total, book.packed, book.path, MAX_REPEATED, AS_CSV)
    book.plain, book.elements = before


def _string_index(text: str, sizes: Sequence[int]) -> int | None:
    """Parse the index of a shared string. Return `None` if the index is invalid."""
    return number if text.isdecimal() and len(text) < 19 and (number := int(text)) < len(sizes) else None


class CellFault(NamedTuple):
    """The reason for rejecting a row: the error code, the affected cell, an explanation and a fix."""

    code: str
    field: str
    reason: str
    fix: str


def _read_sheet(rows: Iterator[SheetRow], path: str, cell_reader: _CellReader) -> Iterator[Row | Reject]:
    names: dict[int, str] = {}
    width = 0
    for row in rows:
        source, texts = Source(path, 0, row.number), dict[int, str]()
        fault = cell_reader.read(row, texts)
        if not texts and not fault:
            continue
        if not names:
            _check_header(texts, fault, source)
            names, width = texts, max(texts)
        elif fault := fault or _check_columns(names, width, texts):
            yield Reject(source, *fault, _raw_text(texts))
        else:
            yield Row({names.get(column, ""): text for column, text in texts.items()}, source, flat=True)


def _check_header(names: Mapping[int, str], fault: CellFault | None, source: Source) -> None:
    """Check that the first row contains valid column names.

    Raises:
        InputRefused: A column name is repeated, or a cell cannot be read.
    """
    # The text of an error such as #REF! is accepted as a column name.
    if fault and not (names and fault.code in ("excel_error", "excel_formula")):
        message = f"the first row must contain the column names, but {fault.field or 'it'} {fault.reason}"
        raise InputRefused(fault.code, message, where=str(source), hint=fault.fix)
    check_names([*names.values()], Input(source.path))


def _check_columns(names: Mapping[int, str], width: int, texts: Mapping[int, str]) -> CellFault | None:
    """Return a fault if a row has text in a column without a name. A single such column, e.g. an index, is allowed."""
    unnamed = [column for column in texts if column not in names]
    if unnamed and (width - len(names) != 1 or max(unnamed) > width):
        fix = "name every column in the first row, and remove titles above the column names"
        return CellFault("ragged_row", "", "has a cell in a column without a name", fix)
    return None


def _raw_text(texts: Mapping[int, str]) -> str:
    text = "\t".join(text[:4096] for text in texts.values())[:4096]
    return text.encode("utf-8", "backslashreplace").decode()


class _CellReader:
    """Converts the cells of a workbook to text."""

    def __init__(self, book: Workbook, strings: SharedStrings) -> None:
        from openpyxl.utils import get_column_letter

        self._book, self._strings, self._column_name = book, strings, get_column_letter
        self._readers: dict[str, Callable[[str, int], str]] = {
            "s": lambda text, _: self._read_shared(text),
            "inlineStr": lambda text, _: text,
            "str": lambda text, _: unescape_xml_string(text),
            "b": lambda text, _: str(bool(int(text))),
            "d": lambda text, _: _read_iso_date(text),
            "n": self._read_number,
        }

    def read(self, row: SheetRow, texts: dict[int, str]) -> CellFault | None:
        """Add the text of each non-empty cell to `texts`, by column number. Return the first fault, if any."""
        sizes = self._strings.sizes
        shared = [_string_index(cell.value, sizes) for cell in row.cells if cell.kind == "s" and cell.value]
        size = row.size + sum(sizes[number] for number in shared if number is not None)
        if size > MAX_LINE:
            reason = f"has {size:,} bytes, expected at most {MAX_LINE:,}"
            return CellFault("row_too_long", "", reason, "split it into several rows")
        faults = [fault for cell in row.cells if (fault := self._read_cell(cell, row.number, texts))]
        return faults[0] if faults else None

    def _read_cell(self, cell: Cell, row: int, texts: dict[int, str]) -> CellFault | None:
        """Add the text of a cell to `texts`. Return a fault if the cell is invalid."""
        name = f"{self._column_name(cell.column)}{row}"
        resave = "open the file in Excel and save it"
        if cell.column in texts:
            return CellFault("excel_error", name, "occurs twice in the row", resave)
        if cell.value is None:
            fault = CellFault("excel_formula", name, "is a formula without a stored value", resave)
            return fault if cell.kind == "n" else None
        try:
            text = cell.value if cell.kind == "e" else self._readers[cell.kind](cell.value, cell.style)
        except (LookupError, ValueError, OverflowError):
            reason = f"has the value {cell.value[:100]!r}, which is invalid for the cell type {cell.kind[:20]!r}"
            return CellFault("excel_error", name, reason, "correct the cell in Excel")
        if text:
            texts[cell.column] = text
        return _check_text(text, cell, name)

    def _read_shared(self, text: str) -> str:
        if (number := _string_index(text, self._strings.sizes)) is None:
            raise LookupError
        return self._strings[number]

    def _read_number(self, text: str, style: int) -> str:
        value = float(text) if {".", "E", "e"} & {*text} else int(text)
        if style in self._book.dates:
            from openpyxl.utils.datetime import CALENDAR_MAC_1904, WINDOWS_EPOCH, from_excel

            epoch = CALENDAR_MAC_1904 if self._book.date1904 else WINDOWS_EPOCH
            return _date_text(from_excel(value, epoch, timedelta=style in self._book.durations))
        if math.isinf(value):
            raise OverflowError
        return str(value)


def _check_text(text: str, cell: Cell, name: str) -> CellFault | None:
    if cell.kind == "e":
        return CellFault("excel_error", name, f"contains the error {text[:100]}", "correct the formula")
    if len(text) > MAX_CELL:
        reason = f"has {len(text):,} characters, expected at most {MAX_CELL:,} as in Excel"
        return CellFault("cell_too_long", name, reason, "save the data as CSV or JSON Lines")
    if text.isascii() or not _SURROGATE.search(text):
        return None
    reason = "contains a lone surrogate, which is not a valid character"
    return CellFault("lone_surrogate", name, reason, "correct the cell in Excel")


def _read_iso_date(text: str) -> str:
    from openpyxl.utils.datetime import from_ISO8601

    if (value := from_ISO8601(text)) is None:
        raise ValueError
    return _date_text(value)


def _date_text(value: Any) -> str:
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        value = value.date()
    return str(value)
