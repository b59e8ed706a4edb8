"""Excel: the sheets of a workbook, every cell as text."""

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
"""Characters of a cell, as in Excel."""

_SMALLEST_CELL = len("<c t='s'><v>0</v></c>")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_excel(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of all sheets of an Excel file that are not hidden, every cell as text.

    The first row of each that is not empty names its columns.
    """
    try:
        import openpyxl  # noqa: F401  (asked for before the file is opened)
    except ImportError:
        raise MissingDependency(
            "no_excel", "Excel files need openpyxl", where=file.path, hint="pip install 'ftdata[excel]'"
        ) from None
    index = 0
    with file.open() as stream:
        check_seekable(stream, file)
        try:
            for row in _rows(open_workbook(stream, file.path)):
                source = row.source._replace(row=index)
                yield row._replace(source=source) if isinstance(row, Row) else replace(row, source=source)
                index += 1
        except FtdataError:
            raise
        except Exception as error:  # noqa: BLE001  (zip and XML each have errors of their own)
            raise damaged_file_error(error, file, "Excel") from None
    if index == 0:
        raise InputRefused("no_rows", "the file holds no rows", where=file.path)


def _rows(book: Workbook) -> Iterator[Row | Reject]:
    sheets = [sheet for sheet in book.sheets if sheet.visible]
    size = book.check_size(sheets)
    strings = book.strings()
    try:
        _check_repeated(book, sheets, strings, size)
        for sheet in sheets:
            path = f"{book.path}#{sheet.title}" if len(sheets) > 1 else book.path
            yield from _sheet(book.rows(sheet), path, _Texts(book, strings))
    finally:
        strings.close()


def _check_repeated(book: Workbook, sheets: Sequence[Sheet], strings: SharedStrings, size: int) -> None:
    """Refuse a workbook whose cells repeat shared strings so often that their text never ends.

    Raises:
        InputRefused: their text is far more than the file.
    """
    most = max(FREE_REPEATED, MAX_REPEATED * book.packed)
    if max(strings.sizes, default=0) * (size // _SMALLEST_CELL) <= most:
        return
    total, sizes, before = 0, strings.sizes, (book.plain, book.elements)
    for sheet in sheets:
        for row in book.rows(sheet):
            numbers = [_index(cell.value, sizes) for cell in row.cells if cell.kind == "s" and cell.value]
            total += sum(sizes[number] for number in numbers if number is not None)
            if total > most:
                raise expansion_error(total, book.packed, book.path, MAX_REPEATED, AS_CSV)
    book.plain, book.elements = before


def _index(text: str, sizes: Sequence[int]) -> int | None:
    """Return the number of a shared string, if there is one."""
    return number if text.isdecimal() and len(text) < 19 and (number := int(text)) < len(sizes) else None


class CellFault(NamedTuple):
    """Why a row is rejected."""

    code: str
    field: str
    reason: str
    fix: str


def _sheet(rows: Iterator[SheetRow], path: str, texts: _Texts) -> Iterator[Row | Reject]:
    names: dict[int, str] = {}
    width = 0
    for row in rows:
        source, found = Source(path, 0, row.number), dict[int, str]()
        fault = texts.read(row, found)
        if not found and not fault:
            continue
        if not names:
            _check_header(found, fault, source)
            names, width = found, max(found)
        elif fault := fault or _unnamed(names, width, found):
            yield Reject(source, *fault, _raw(found))
        else:
            yield Row({names.get(column, ""): text for column, text in found.items()}, source, flat=True)


def _check_header(names: Mapping[int, str], fault: CellFault | None, source: Source) -> None:
    """Refuse a first row that cannot name the columns.

    Raises:
        InputRefused: two columns have one name, or a name cannot be read.
    """
    # An error such as #REF! is a bad name, but it is one.
    if fault and not (names and fault.code in ("excel_error", "excel_formula")):
        found = f"the first row, which names the columns, {fault.reason}"
        raise InputRefused(fault.code, found, where=str(source), hint=fault.fix)
    check_names([*names.values()], Input(source.path))


def _unnamed(names: Mapping[int, str], width: int, found: Mapping[int, str]) -> CellFault | None:
    """Return the fault of text in a column without a name; one column may have none, such as that of an index."""
    nameless = [column for column in found if column not in names]
    if nameless and (width - len(names) != 1 or max(nameless) > width):
        fix = "give every column a name in the first row, and take titles above it out"
        return CellFault("ragged_row", "", "has a cell in a column without a name", fix)
    return None


def _raw(found: Mapping[int, str]) -> str:
    text = "\t".join(text[:4096] for text in found.values())[:4096]
    return text.encode("utf-8", "backslashreplace").decode()


class _Texts:
    """Reads cells as text."""

    def __init__(self, book: Workbook, strings: SharedStrings) -> None:
        self._book, self._strings = book, strings
        self._reads: dict[str, Callable[[str, int], str]] = {
            "s": lambda text, _: self._shared(text),
            "inlineStr": lambda text, _: text,
            "str": lambda text, _: unescape_xml_string(text),
            "b": lambda text, _: str(bool(int(text))),
            "d": lambda text, _: _iso_date(text),
            "n": self._number,
        }

    def read(self, row: SheetRow, found: dict[int, str]) -> CellFault | None:
        """Put the texts of a row that are not empty into `found`, by column; return the row's first fault."""
        sizes = self._strings.sizes
        shared = [_index(cell.value, sizes) for cell in row.cells if cell.kind == "s" and cell.value]
        size = row.size + sum(sizes[number] for number in shared if number is not None)
        if size > MAX_LINE:
            told = f"is {size:,} bytes long, at most {MAX_LINE:,} are read"
            return CellFault("row_too_long", "", told, "make several rows of it")
        faults = [fault for cell in row.cells if (fault := self._read(cell, row.number, found))]
        return faults[0] if faults else None

    def _read(self, cell: Cell, row: int, found: dict[int, str]) -> CellFault | None:
        """Put the text of a cell into `found`, and return its fault if it has one."""
        place = f"{_letters(cell.column)}{row}"
        if cell.column in found:
            return CellFault("excel_error", place, "stands twice in the row", "open the file in Excel and save it")
        if cell.value is None:
            fault = CellFault("excel_formula", place, "is a formula without a value", "open it in Excel, and save it")
            return fault if cell.kind == "n" else None
        try:
            text = cell.value if cell.kind == "e" else self._reads[cell.kind](cell.value, cell.style)
        except (LookupError, ValueError, OverflowError):
            told = f"has the type {cell.kind[:20]!r}, and {cell.value[:100]!r} is no such value"
            return CellFault("excel_error", place, told, "correct the cell in Excel")
        if text:
            found[cell.column] = text
        return _fault_of(text, cell, place)

    def _shared(self, text: str) -> str:
        if (number := _index(text, self._strings.sizes)) is None:
            raise LookupError
        return self._strings[number]

    def _number(self, text: str, style: int) -> str:
        value = float(text) if {".", "E", "e"} & {*text} else int(text)
        if style in self._book.dates:
            from openpyxl.utils.datetime import CALENDAR_MAC_1904, WINDOWS_EPOCH, from_excel

            epoch = CALENDAR_MAC_1904 if self._book.date1904 else WINDOWS_EPOCH
            return _date_text(from_excel(value, epoch, timedelta=style in self._book.durations))
        if math.isinf(value):
            raise OverflowError
        return str(value)


def _fault_of(text: str, cell: Cell, place: str) -> CellFault | None:
    if cell.kind == "e":
        return CellFault("excel_error", place, f"is an error, {text[:100]}", "mend the formula")
    if len(text) > MAX_CELL:
        told = f"has a cell of {len(text):,} characters; a cell of Excel has {MAX_CELL:,} at most"
        return CellFault("cell_too_long", place, told, "write it as CSV or JSON Lines")
    if text.isascii() or not _SURROGATE.search(text):
        return None
    return CellFault("lone_surrogate", place, "holds half a character (a lone surrogate)", "correct the cell in Excel")


def _iso_date(text: str) -> str:
    from openpyxl.utils.datetime import from_ISO8601

    if (value := from_ISO8601(text)) is None:
        raise ValueError
    return _date_text(value)


def _date_text(value: Any) -> str:
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        value = value.date()
    return str(value)


def _letters(column: int) -> str:
    letters = ""
    while column:
        column, letter = divmod(column - 1, 26)
        letters = chr(65 + letter) + letters
    return letters
