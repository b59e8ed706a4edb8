"""Excel: the sheets of a workbook, every cell as text."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, BinaryIO

from ftdata.errors import InputRefused, MissingDependency
from ftdata.readers.checks import check_names, check_seekable, damaged
from ftdata.readers.streams import Input
from ftdata.readers.workbook_limits import MAX_ROWS, TextLimit, check_archive, shared_strings
from ftdata.types import Reject, Row, Source

_ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")


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
    with file.open() as stream:
        check_seekable(stream, file)
        try:
            size = check_archive(stream, file)
            strings = shared_strings(stream)
            # Formulas stand in the one, and what they came to in the other.
            books = [_workbook(stream, strings, values=values) for values in (True, False)]
            sheets = [sheet for sheet in books[0].worksheets if sheet.sheet_state == "visible"]
            index, text = 0, TextLimit(file, size)
            for sheet in sheets:
                path = f"{file.path}#{sheet.title}" if len(sheets) > 1 else file.path
                for row in _sheet(sheet, books[1][sheet.title], path, text):
                    source = row.source._replace(row=index)
                    yield row._replace(source=source) if isinstance(row, Row) else replace(row, source=source)
                    index += 1
        except InputRefused:
            raise
        except Exception as error:  # noqa: BLE001  (zip, XML and openpyxl each have errors of their own)
            raise damaged(error, file, "Excel") from None
    if index == 0:
        raise InputRefused("no_rows", "the file holds no rows", where=file.path)


def _workbook(stream: BinaryIO, strings: list[str], *, values: bool) -> Any:
    """Open a workbook with the values of its formulas, or the formulas, and with shared strings as they are stored."""
    from openpyxl.reader.excel import ExcelReader

    class Reader(ExcelReader):  # type: ignore[misc]  # openpyxl has no types
        def read_strings(self) -> None:
            # openpyxl would remove "x005F_", so that a typed "_x000D_" could not be told from a carriage return.
            self.shared_strings = strings

    reader = Reader(stream, read_only=True, data_only=values)
    reader.read()
    return reader.wb


def _sheet(sheet: Any, formulas: Any, path: str, limit: TextLimit) -> Iterator[Row | Reject]:
    names: list[str] = []
    for each in (sheet, formulas):
        each.reset_dimensions()
    for line, (cells, written) in enumerate(zip(sheet.iter_rows(), formulas.iter_rows(), strict=True), start=1):
        if not cells and not written:
            # openpyxl makes up all rows that are missing before one with a high number.
            if line > MAX_ROWS:
                raise InputRefused(
                    "too_many_rows",
                    f"has a row with a number above {MAX_ROWS:,}, the most that a sheet may have",
                    where=path,
                    hint="open it in Excel and save it, or save it as CSV",
                )
            continue
        if fault := limit.fault(cells):
            yield Reject(Source(path, 0, line), *fault)
            continue
        texts = [_text(cell.value) for cell in cells]
        if not any(texts) and not any(cell.data_type == "f" for cell in written):
            continue
        source = Source(path, 0, line)
        if names:
            fault = _fault(names, texts, cells, written)
            row = {name: text for name, text in zip(names, texts, strict=False) if text}
            yield Reject(source, *fault, "\t".join(texts)[:4096]) if fault else Row(row, source, flat=True)
        else:
            names = texts
            check_names([one for one in names if one], Input(path))


def _fault(
    names: Sequence[str], texts: Sequence[str], cells: Sequence[Any], written: Sequence[Any]
) -> tuple[str, str, str, str] | None:
    """Return code, field, reason and way out of what is wrong with a row, if anything is."""
    # One column may be without a name, such as that of an index.
    if names.count("") > 1 and any(text and not name for name, text in zip_longest(names, texts, fillvalue="")):
        fix = "give every column a name in the first row, and take titles above it out"
        return "ragged_row", "", "has a cell in a column without a name", fix
    for cell, formula in zip(cells, written, strict=True):
        if cell.data_type == "e":
            return "excel_error", cell.coordinate, f"is an error, {cell.value}", "mend the formula"
        if formula.data_type == "f" and cell.value is None and cell.data_type == "n":
            return "excel_formula", formula.coordinate, "is a formula without a value", "open it in Excel, and save it"
    return None


def _text(value: Any) -> str:
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        value = value.date()
    # Characters that XML has no place for are written as _x000D_ (ECMA-376 Part 1, 22.9.2.19).
    return "" if value is None else _ESCAPED.sub(lambda found: chr(int(found[1], 16)), str(value))
