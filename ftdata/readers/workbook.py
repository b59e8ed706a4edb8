"""Parse the XML files inside an .xlsx file as streams, in bounded memory.

    zip archive ──> XML part ──> events ──> sheets, styles, shared strings, rows of cells

openpyxl keeps all shared strings in memory, adds cells and rows that are missing in the file, and parses a sheet twice
for its formulas. Therefore a small file can exhaust the memory, or take unlimited time. This module keeps only a single
row in memory. The format is ECMA-376 (ISO/IEC 29500).
"""

from __future__ import annotations

import posixpath
import re
import tempfile
import zipfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BufferedReader
from pathlib import PurePosixPath
from typing import NamedTuple

from ftdata.errors import InputRefused, StorageError
from ftdata.readers.streams import FREE, MAX_LINE, MAX_RATIO, expansion_error
from ftdata.readers.xml_scan import CHUNK, XmlParser, unescape_xml_string

MAX_COLUMNS, MAX_ROWS = 16_384, 1_048_576
"""Maximum number of columns and rows of a sheet, as in Excel."""

AS_CSV = "if the content is correct, save it as CSV"
_RESAVE = "open it in Excel and save it, or save it as CSV"
_SPOOL, _MAX_DIRECTORY = 32 << 20, 16 << 20
_FREE = FREE // 2
"""Bytes of XML that a file of any size may have. XML takes twice as long to parse as other text."""
_FREE_ELEMENTS, _MAX_ELEMENTS = 1_000_000, 3
"""XML elements that a file of any size may have, and elements per byte that a larger file may have. An element takes a
microsecond or two to parse. Sheets of equal cells have 0.9 elements per byte."""
_PART_ELEMENTS = 1_000
"""Number of elements that take as long to parse as opening a part takes."""
_COORDINATE = re.compile(r"([A-Za-z]{1,3})[0-9]*")
_NUMBER = re.compile(r"[0-9]{1,18}")


class Cell(NamedTuple):
    """The stored value, type and style of a cell in a sheet.

    Attributes:
        column: number of the column, counted from 1.
        kind: the `t` attribute: `n` (number), `s` (shared string), `inlineStr`, `str`, `b`, `d`, `e`.
        style: index of the cell's style.
        value: the text of the value, unescaped if it is an inline string; `None` if the cell has no value.
        formula: whether the cell has a formula.
    """

    column: int
    kind: str
    style: int
    value: str | None
    formula: bool


class SheetRow(NamedTuple):
    """The cells in one row of a sheet.

    Attributes:
        number: number of the row, counted from 1.
        cells: the cells that have a value or a formula; empty if `size` is more than `MAX_LINE`.
        size: size of the text in the row, in bytes.
    """

    number: int
    cells: list[Cell]
    size: int


class Sheet(NamedTuple):
    """The title, path and visibility of a worksheet.

    Attributes:
        title: title of the sheet.
        part: path of the sheet in the archive.
        visible: whether the sheet is visible.
    """

    title: str
    part: str
    visible: bool


@dataclass
class Workbook:
    """An open .xlsx file, with the list of its worksheets and the cell styles that show numbers as dates.

    Attributes:
        path: path of the file.
        archive: the zip archive.
        packed: size of the file in bytes.
        sheets: the worksheets, in order.
        dates: indexes of the styles that show a number as a date or time.
        durations: the part of `dates` that shows a number as a duration.
        date1904: whether dates are counted from 1904.
        strings_part: path of the shared strings in the archive; empty if the workbook has no shared strings.
        elements: number of elements parsed so far.
        plain: number of bytes decompressed so far.
    """

    path: str
    archive: zipfile.ZipFile
    packed: int
    sheets: list[Sheet] = field(default_factory=list)
    dates: set[int] = field(default_factory=set)
    durations: set[int] = field(default_factory=set)
    date1904: bool = False
    strings_part: str = ""
    elements: int = 0
    plain: int = 0

    def count(self, elements: int) -> None:
        """Add `elements` to the number of parsed XML elements, and check the limit.

        Raises:
            InputRefused: The file has far more elements than its size explains.
        """
        self.elements += elements
        if self.elements > (limit := max(_FREE_ELEMENTS, _MAX_ELEMENTS * self.packed)):
            message = f"has too many XML elements for a file of {self.packed:,} bytes, expected at most {limit:,}"
            hint = f"remove empty rows, columns and sheets; or, {AS_CSV}"
            raise InputRefused("expansion", message, where=self.path, hint=hint)

    def parse(self, part: str, parser: XmlParser) -> Iterator[None]:
        """Parse an XML file in the archive. Yield after each chunk, so that the caller can use the results so far.

        Raises:
            InputRefused: The part is not valid in an Excel file, or is far larger than the file.
        """
        try:
            info = self.archive.getinfo(part)
        except KeyError:
            raise self.damaged_error(f"the archive does not contain the file {part}") from None
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.damaged_error(f"the file {part} has compression type {info.compress_type}, expected deflate")
        self._count_plain(info.file_size)
        self.count(_PART_ELEMENTS)
        parser.make_error = lambda message: self.damaged_error(f"{part}: {message}")
        with self.archive.open(info) as stream:
            while chunk := stream.read(CHUNK):
                self.count(parser.feed(chunk))
                yield
            parser.feed(b"", last=True)

    def _count_plain(self, size: int) -> None:
        self.plain += size
        if self.plain > max(_FREE, MAX_RATIO * self.packed):
            raise expansion_error(self.plain, self.packed, self.path, MAX_RATIO, AS_CSV)

    def damaged_error(self, message: str) -> InputRefused:
        """Create the error for a file that is not a valid Excel file."""
        hint = "copy or download it again, or open it in Excel and save it"
        message = f"the file is not a valid Excel file: {message}"
        return InputRefused("damaged_file", message, where=self.path, hint=hint)

    def strings(self) -> SharedStrings:
        """Read the shared strings of the workbook."""
        strings = SharedStrings()
        if self.strings_part:
            self.parse_all(self.strings_part, _SharedStringParser(strings))
        return strings

    def parse_all(self, part: str, parser: XmlParser) -> None:
        """Parse an XML file in the archive completely."""
        for _ in self.parse(part, parser):
            pass

    def rows(self, sheet: Sheet) -> Iterator[SheetRow]:
        """Yield the rows of a sheet. Rows without a value or formula are skipped.

        Raises:
            InputRefused: The sheet has more rows than Excel allows, or its rows are not in ascending order.
        """
        parser = _SheetParser(f"{self.path}#{sheet.title}")
        for _ in self.parse(sheet.part, parser):
            yield from parser.rows
            parser.rows.clear()

    def check_size(self, sheets: Sequence[Sheet]) -> int:
        """Return the total XML size of `sheets` in bytes, after checking this size against the limit.

        Raises:
            InputRefused: The sheets and the shared strings are far larger than the file.
        """
        sizes = {info.filename: info.file_size for info in self.archive.infolist()}
        size = sum(sizes.get(sheet.part, 0) for sheet in sheets)
        before = self.plain
        self._count_plain(size + sizes.get(self.strings_part, 0))
        self.plain = before
        return size


def open_workbook(stream: BufferedReader, path: str) -> Workbook:
    """Open an .xlsx file, and read its list of sheets and its styles.

    Raises:
        InputRefused: The file is not a valid Excel file.
        zipfile.BadZipFile: The file is not a zip archive.
    """
    size = stream.seek(0, 2)
    book = Workbook(path, zipfile.ZipFile(_LimitedStream(stream, path)), size)
    names = set(book.archive.namelist())
    main = next((part for _, part, _ in _related_parts(book, "", "officeDocument")), "xl/workbook.xml")
    parts = _related_parts(book, main, "worksheet", "styles", "sharedStrings")
    by_id = {identity: part for identity, part, kind in parts if kind == "worksheet"}
    defaults = {"sharedStrings": "xl/sharedStrings.xml", "styles": "xl/styles.xml"}
    part_names = {**defaults, **{kind: part for _, part, kind in parts if kind != "worksheet"}}
    _read_main(book, main, by_id)
    if part_names["sharedStrings"] in names:
        book.strings_part = part_names["sharedStrings"]
    if part_names["styles"] in names:
        _read_styles(book, part_names["styles"])
    return book


class _LimitedStream:
    """A stream that rejects very large reads, because `zipfile` reads the whole archive directory in a single read."""

    def __init__(self, stream: BufferedReader, path: str) -> None:
        self._stream, self._path = stream, path
        self.seek, self.tell, self.seekable, self.close = stream.seek, stream.tell, stream.seekable, stream.close

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes of the stream."""
        if size > _MAX_DIRECTORY:
            message = f"has an archive directory of {size:,} bytes, expected at most {_MAX_DIRECTORY:,}"
            raise InputRefused("expansion", message, where=self._path, hint="open it in Excel and save it")
        return self._stream.read(size)


class SharedStrings:
    """The string table of a workbook, to which cells refer by index. A large table is stored in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_SPOOL)  # noqa: SIM115  (closed by close)
        self._starts, self._end = array("q"), 0
        self.sizes = array("q")
        """Bytes of each string. The text of a string with more than `MAX_LINE` bytes is not stored."""

    def add(self, text: str, size: int) -> None:
        """Add a string of `size` bytes. `text` is empty if `size` is larger than `MAX_LINE`."""
        data = text.encode("utf-8", "surrogatepass")
        try:
            self._file.write(data)
        except OSError as error:
            hint = "free disk space in the folder for temporary files, or set TMPDIR"
            message = f"cannot write shared strings to a temporary file: {error.strerror}"
            raise StorageError("write", message, hint=hint) from None
        self._starts.append(self._end)
        self.sizes.append(size if size > MAX_LINE else len(data))
        self._end += len(data)

    def __getitem__(self, number: int) -> str:
        self._file.seek(self._starts[number])
        return self._file.read(self.sizes[number]).decode("utf-8", "surrogatepass")

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()


class _SharedStringParser(XmlParser):
    """A parser that adds each shared string to `strings`."""

    def __init__(self, strings: SharedStrings) -> None:
        super().__init__()
        self._strings, self._texts = strings, list[str]()

    def start(self, name: str, _attributes: dict[str, str]) -> None:
        if name == "t":
            self.collect_text(on=True)
        elif name == "si":
            self._texts, self.size = [], 0

    def end(self, name: str) -> None:
        if name == "t":
            self.collect_text(on=False)
            # The runs of a formatted text are escaped separately.
            self._texts.append(unescape_xml_string(self.text()))
        elif name == "si":
            self._strings.add("".join(self._texts) if self.size <= MAX_LINE else "", self.size)


class _SheetParser(XmlParser):
    """A parser that collects the rows of a sheet in `rows`."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.rows: list[SheetRow] = []
        self._path = path
        self._number = self._column = 0
        self._cells: list[Cell] = []
        self._cell: dict[str, str] | None = None
        self._value: str | None = None
        self._formula = False

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "c":
            self._cell, self._value, self._formula = attributes, None, False
        elif name == "row":
            self._start_row(self._parse_number(attributes["r"]) if "r" in attributes else self._number + 1)
        elif self._cell is None:
            return
        elif name in ("v", "t"):
            self.collect_text(on=True)
        elif name == "f":
            self._formula = True

    def end(self, name: str) -> None:
        if name == "row":
            if self._cells or self.size > MAX_LINE:
                self.rows.append(SheetRow(self._number, self._cells, self.size))
        elif self._cell is None:
            return
        elif name == "v":
            self.collect_text(on=False)
            if (value := self.text()) and self._cell.get("t") != "inlineStr":
                self._value = value
        elif name == "t":
            self.collect_text(on=False)
            self._value = (self._value or "") + unescape_xml_string(self.text())
        elif name == "c":
            self._add_cell(self._cell)
            self._cell = None

    def _start_row(self, number: int) -> None:
        if number > MAX_ROWS:
            message = f"has a row with the number {number:,}, expected at most {MAX_ROWS:,}"
            raise InputRefused("too_many_rows", message, where=self._path, hint=_RESAVE)
        if number <= self._number:
            message = f"has row {number:,} after row {self._number:,}, expected ascending row numbers"
            raise InputRefused("row_order", message, where=self._path, hint=_RESAVE)
        self._number, self._column, self._cells, self.size = number, 0, [], 0

    def _add_cell(self, cell: Mapping[str, str]) -> None:
        self._column = _parse_column(cell["r"]) if "r" in cell else self._column + 1
        if not self._column:
            raise self.make_error(f"a cell has the coordinate {cell['r'][:40]!r}, expected a name such as A1")
        if self._column > MAX_COLUMNS or len(self._cells) == MAX_COLUMNS:
            message = f"has too many columns in row {self._number:,}, expected at most {MAX_COLUMNS:,}"
            raise InputRefused("row_too_long", message, where=self._path, hint=_RESAVE)
        if self._value is None and not self._formula:
            return
        if self.size > MAX_LINE:
            self._cells.clear()
            return
        style = self._parse_number(cell["s"]) if "s" in cell else 0
        self._cells.append(Cell(self._column, cell.get("t", "n"), style, self._value, self._formula))

    def _parse_number(self, text: str) -> int:
        if not _NUMBER.fullmatch(text):
            raise self.make_error(f"the value of an attribute is {text[:40]!r}, expected an integer")
        return int(text)


def _parse_column(coordinate: str) -> int:
    """Return the column number, from 1, of a cell coordinate such as `B7`. Return 0 for an invalid coordinate."""
    match = _COORDINATE.fullmatch(coordinate)
    return 0 if match is None else _column_number(match[1])


@cache
def _column_number(name: str) -> int:
    # The cache is bounded: there are at most 143,364 names of up to three characters.
    from openpyxl.utils import column_index_from_string

    return int(column_index_from_string(name))


def _related_parts(book: Workbook, part: str, *kinds: str) -> list[tuple[str, str, str]]:
    """Return the archive files to which the archive file `part` refers, as tuples of id, path and kind.

    If `part` is empty, return the files that the archive as a whole refers to.
    """
    folder, name = PurePosixPath(part).parent, PurePosixPath(part).name
    related: list[tuple[str, str, str]] = []

    def add(attributes: dict[str, str]) -> None:
        kind, target = attributes.get("Type", "").rpartition("/")[2], attributes.get("Target", "")
        if kind in kinds and attributes.get("TargetMode") != "External":
            path = target[1:] if target.startswith("/") else str(folder / target)
            related.append((attributes.get("Id", ""), _normalize_path(path), kind))

    relationships = str(folder / "_rels" / f"{name}.rels")
    if relationships in book.archive.NameToInfo:
        book.parse_all(relationships, XmlParser({"Relationship": add}))
    return related


def _normalize_path(path: str) -> str:
    """Resolve `.` and `..` in a path inside the archive."""
    return posixpath.normpath(f"/{path}").lstrip("/")


def _read_main(book: Workbook, part: str, by_id: Mapping[str, str]) -> None:
    def read_properties(attributes: dict[str, str]) -> None:
        book.date1904 = attributes.get("date1904", "0") in ("1", "true", "on")

    def add_sheet(attributes: dict[str, str]) -> None:
        identity = next((value for name, value in attributes.items() if name.endswith("elationships id")), "")
        # Chart sheets have no cells.
        if identity in by_id:
            visible = attributes.get("state", "visible") == "visible"
            book.sheets.append(Sheet(attributes.get("name", ""), by_id[identity], visible))

    book.parse_all(part, XmlParser({"workbookPr": read_properties, "sheet": add_sheet}))


def _read_styles(book: Workbook, part: str) -> None:
    from openpyxl.styles.numbers import builtin_format_code, is_date_format, is_timedelta_format

    parser = _StyleParser()
    book.parse_all(part, parser)
    for number, format_id in enumerate(parser.styles):
        code = parser.formats.get(format_id)
        if code is None and _NUMBER.fullmatch(format_id):
            code = builtin_format_code(int(format_id))
        if is_date_format(code):
            book.dates.add(number)
        if is_timedelta_format(code):
            book.durations.add(number)


class _StyleParser(XmlParser):
    """A parser that collects number formats and cell styles.

    Attributes:
        formats: number format codes, by format id.
        styles: the number format id of each cell style.
    """

    def __init__(self) -> None:
        super().__init__()
        self._in_cell_styles = False
        self.formats: dict[str, str] = {}
        self.styles: list[str] = []

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "numFmt":
            # In Excel, a format has at most 255 characters.
            self.formats[attributes.get("numFmtId", "")] = attributes.get("formatCode", "")[:1000]
        elif name == "cellXfs":
            self._in_cell_styles = True
        elif name == "xf" and self._in_cell_styles:
            self.styles.append(attributes.get("numFmtId", "0"))

    def end(self, name: str) -> None:
        if name == "cellXfs":
            self._in_cell_styles = False
