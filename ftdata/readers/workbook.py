"""Workbooks: the parts of an .xlsx file, parsed as a stream in bounded memory.

    zip archive ──> XML part ──> events ──> sheets, styles, shared strings, rows of cells

openpyxl holds all shared strings in memory, fills rows with cells and rows that the file does not have, and parses a
sheet twice for its formulas. A small file can so fill the memory or never end. This module holds no more than a row.
The format is ECMA-376 (ISO/IEC 29500).
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import PurePosixPath
from typing import NamedTuple

from ftdata.errors import InputRefused, StorageError
from ftdata.readers.streams import FREE, MAX_LINE, MAX_RATIO, expansion_error
from ftdata.readers.xml_scan import CHUNK, ElementParser, XmlParser, unescape_xml_string

MAX_COLUMNS, MAX_ROWS = 16_384, 1_048_576
"""Columns and rows of a sheet, as in Excel."""

AS_CSV = "if all of it is data, save it as CSV"
_BY_EXCEL = "open it in Excel and save it, or save it as CSV"
_SPOOL, _MAX_DIRECTORY = 32 << 20, 16 << 20
_FREE = FREE // 2
"""Bytes of XML that any file may have: they take twice as long to parse as other text."""
_FREE_ELEMENTS, _MAX_ELEMENTS = 1_000_000, 3
"""XML elements that any file may have, and that a larger one may have for each of its bytes: each takes a microsecond
or two to parse. Sheets of equal cells have 0.9."""
_PART_ELEMENTS = 1_000
"""Elements that take as long to parse as it takes to open a part."""
_COORDINATE = re.compile(r"([A-Za-z]{1,3})[0-9]*")
_NUMBER = re.compile(r"[0-9]{1,18}")


class Cell(NamedTuple):
    """One cell as the sheet has it.

    Attributes:
        column: counted from 1.
        kind: the `t` attribute: `n` (number), `s` (shared string), `inlineStr`, `str`, `b`, `d`, `e`.
        style: the number of its style.
        value: the text of its value, unescaped if it is an inline string; `None` if it has none.
        formula: whether it has a formula.
    """

    column: int
    kind: str
    style: int
    value: str | None
    formula: bool


class SheetRow(NamedTuple):
    """One row of a sheet: its number, counted from 1, its cells, and how many bytes of text they hold.

    Cells of a row with more text than `MAX_LINE` are left out.
    """

    number: int
    cells: list[Cell]
    size: int


class Sheet(NamedTuple):
    """A worksheet: its title, its part of the archive, and whether it is visible."""

    title: str
    part: str
    visible: bool


@dataclass
class Workbook:
    """An open workbook.

    Attributes:
        path: the file.
        archive: its parts.
        packed: the bytes of the file.
        sheets: its worksheets, in order.
        dates: the styles that show a number as a date or time.
        durations: those of them that show it as a duration.
        date1904: whether dates are counted from 1904.
        strings_part: the part with the shared strings; empty if there is none.
        elements: how many elements were parsed.
        plain: how many bytes were unpacked.
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
        """Count parsed elements.

        Raises:
            InputRefused: the file has far more of them than its size explains.
        """
        self.elements += elements
        if self.elements > (most := max(_FREE_ELEMENTS, _MAX_ELEMENTS * self.packed)):
            found = f"has more than {most:,} XML elements in {self.packed:,} bytes"
            hint = f"remove empty rows, columns and sheets; or, {AS_CSV}"
            raise InputRefused("expansion", found, where=self.path, hint=hint)

    def parse(self, part: str, scan: XmlParser) -> Iterator[None]:
        """Parse a part, and yield after each piece of it.

        Raises:
            InputRefused: it is not XML that an Excel file may have, or far longer than the file.
        """
        try:
            info = self.archive.getinfo(part)
        except KeyError:
            raise self.damaged(f"it has no {part}") from None
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.damaged(f"{part} has the compression {info.compress_type}, expected deflate")
        self._unpack(info.file_size)
        self.count(_PART_ELEMENTS)
        scan.refuse = lambda found: self.damaged(f"{part} {found}")
        with self.archive.open(info) as stream:
            while piece := stream.read(CHUNK):
                self.count(scan.feed(piece))
                yield
            scan.feed(b"", last=True)

    def _unpack(self, size: int) -> None:
        self.plain += size
        if self.plain > max(_FREE, MAX_RATIO * self.packed):
            raise expansion_error(self.plain, self.packed, self.path, MAX_RATIO, AS_CSV)

    def damaged(self, found: str) -> InputRefused:
        """Return the refusal of a workbook that is not as Excel files are."""
        hint = "copy or download it again, or open it in Excel and save it"
        return InputRefused("damaged_file", f"is no whole Excel file: {found}", where=self.path, hint=hint)

    def strings(self) -> SharedStrings:
        """Return the shared strings."""
        found = SharedStrings()
        if self.strings_part:
            self.parse_all(self.strings_part, _StringScan(found))
        return found

    def parse_all(self, part: str, scan: XmlParser) -> None:
        """Parse a part."""
        for _ in self.parse(part, scan):
            pass

    def rows(self, sheet: Sheet) -> Iterator[SheetRow]:
        """Yield the rows of a sheet that have cells with a value or a formula.

        Raises:
            InputRefused: it has more rows than a sheet may have, or rows in another order.
        """
        scan = _SheetScan(f"{self.path}#{sheet.title}")
        for _ in self.parse(sheet.part, scan):
            yield from scan.rows
            scan.rows.clear()

    def check_size(self, sheets: Sequence[Sheet]) -> int:
        """Return how many bytes of XML some sheets are.

        Raises:
            InputRefused: they and the shared strings are far more than the file.
        """
        known = {info.filename: info.file_size for info in self.archive.infolist()}
        size = sum(known.get(sheet.part, 0) for sheet in sheets)
        before = self.plain
        self._unpack(size + known.get(self.strings_part, 0))
        self.plain = before
        return size


def open_workbook(stream: BufferedReader, path: str) -> Workbook:
    """Open a workbook, and read which sheets and styles it has.

    Raises:
        InputRefused: it is no Excel file.
        zipfile.BadZipFile: it is no zip archive.
    """
    size = stream.seek(0, 2)
    book = Workbook(path, zipfile.ZipFile(_Guarded(stream, path)), size)
    names = set(book.archive.namelist())
    main = next((part for _, part, _ in _related(book, "", "officeDocument")), "xl/workbook.xml")
    parts = _related(book, main, "worksheet", "styles", "sharedStrings")
    by_id = {identity: part for identity, part, kind in parts if kind == "worksheet"}
    usual = {"sharedStrings": "xl/sharedStrings.xml", "styles": "xl/styles.xml"}
    known = {**usual, **{kind: part for _, part, kind in parts if kind != "worksheet"}}
    _read_main(book, main, by_id)
    if known["sharedStrings"] in names:
        book.strings_part = known["sharedStrings"]
    if known["styles"] in names:
        _read_styles(book, known["styles"])
    return book


class _Guarded:
    """A stream of which no more can be read at once than the directory of an archive may be long."""

    def __init__(self, stream: BufferedReader, path: str) -> None:
        self._stream, self._path = stream, path
        self.seek, self.tell, self.seekable, self.close = stream.seek, stream.tell, stream.seekable, stream.close

    def read(self, size: int = -1) -> bytes:
        """Read some bytes."""
        if size > _MAX_DIRECTORY:
            found = f"has a list of its parts of {size:,} bytes, expected at most {_MAX_DIRECTORY:,}"
            raise InputRefused("expansion", found, where=self._path, hint="open it in Excel and save it")
        return self._stream.read(size)


class SharedStrings:
    """The shared strings of a workbook, in a temporary file if they are many."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_SPOOL)  # noqa: SIM115  (closed by close)
        self._starts, self._end = array("q"), 0
        self.sizes = array("q")
        """Bytes of each; of one with more than `MAX_LINE` no text is kept."""

    def add(self, text: str, size: int) -> None:
        """Add a string of which `size` bytes were read; if they are more than `MAX_LINE`, `text` is empty."""
        data = text.encode("utf-8", "surrogatepass")
        try:
            self._file.write(data)
        except OSError as error:
            hint = "make room in the folder of temporary files, or set TMPDIR"
            found = f"cannot write shared strings to a temporary file: {error.strerror}"
            raise StorageError("write", found, hint=hint) from None
        self._starts.append(self._end)
        self.sizes.append(size if size > MAX_LINE else len(data))
        self._end += len(data)

    def __getitem__(self, number: int) -> str:
        self._file.seek(self._starts[number])
        return self._file.read(self.sizes[number]).decode("utf-8", "surrogatepass")

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


class _StringScan(XmlParser):
    """Puts shared strings into `strings`, without their phonetic text."""

    def __init__(self, strings: SharedStrings) -> None:
        super().__init__()
        self._strings, self._texts, self._phonetic = strings, list[str](), False

    def start(self, name: str, _attributes: dict[str, str]) -> None:
        if name == "t" and not self._phonetic:
            self.take(on=True)
        elif name == "si":
            self._texts, self.size = [], 0
        elif name == "rPh":
            self._phonetic = True

    def end(self, name: str) -> None:
        if name == "t":
            self.take(on=False)
            # Each run of a text with formats is escaped by itself.
            self._texts.append(unescape_xml_string(self.text()))
        elif name == "si":
            self._strings.add("".join(self._texts) if self.size <= MAX_LINE else "", self.size)
        elif name == "rPh":
            self._phonetic = False


class _SheetScan(XmlParser):
    """Collects rows in `rows`."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.rows: list[SheetRow] = []
        self._path, self._phonetic = path, False
        self._number = self._column = 0
        self._cells: list[Cell] = []
        self._cell: dict[str, str] | None = None
        self._value: str | None = None
        self._formula = False

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "c":
            self._cell, self._value, self._formula = attributes, None, False
        elif name == "row":
            self._begin(self._whole(attributes["r"]) if "r" in attributes else self._number + 1)
        elif self._cell is None:
            return
        elif name == "v" or (name == "t" and not self._phonetic):
            self.take(on=True)
        elif name == "f":
            self._formula = True
        elif name == "rPh":
            self._phonetic = True

    def end(self, name: str) -> None:
        if name == "row":
            if self._cells or self.size > MAX_LINE:
                self.rows.append(SheetRow(self._number, self._cells, self.size))
        elif self._cell is None:
            return
        elif name == "v":
            self.take(on=False)
            if (value := self.text()) and self._cell.get("t") != "inlineStr":
                self._value = value
        elif name == "t":
            self.take(on=False)
            self._value = (self._value or "") + unescape_xml_string(self.text())
        elif name == "rPh":
            self._phonetic = False
        elif name == "c":
            self._add(self._cell)
            self._cell = None

    def _begin(self, number: int) -> None:
        if number > MAX_ROWS:
            found = f"has a row {number:,}, and a sheet may have {MAX_ROWS:,}"
            raise InputRefused("too_many_rows", found, where=self._path, hint=_BY_EXCEL)
        if number <= self._number:
            found = f"has row {number:,} after row {self._number:,}"
            raise InputRefused("row_order", found, where=self._path, hint=_BY_EXCEL)
        self._number, self._column, self._cells, self.size = number, 0, [], 0

    def _add(self, cell: Mapping[str, str]) -> None:
        self._column = _column_of(cell["r"]) if "r" in cell else self._column + 1
        if not self._column:
            raise self.refuse(f"has a cell {cell['r'][:40]!r}, expected one such as A1")
        if self._column > MAX_COLUMNS or len(self._cells) == MAX_COLUMNS:
            found = f"has more than {MAX_COLUMNS:,} cells in row {self._number:,}"
            raise InputRefused("row_too_long", found, where=self._path, hint=_BY_EXCEL)
        if self._value is None and not self._formula:
            return
        if self.size > MAX_LINE:
            self._cells.clear()
            return
        style = self._whole(cell["s"]) if "s" in cell else 0
        self._cells.append(Cell(self._column, cell.get("t", "n"), style, self._value, self._formula))

    def _whole(self, text: str) -> int:
        if not _NUMBER.fullmatch(text):
            raise self.refuse(f"has {text[:40]!r} where a whole number is expected")
        return int(text)


_columns: dict[str, int] = {}


def _column_of(coordinate: str) -> int:
    """Return the number of a cell's column, counted from 1; 0 if the coordinate names none."""
    found = _COORDINATE.fullmatch(coordinate)
    if found is None:
        return 0
    letters = found[1]
    if (known := _columns.get(letters)) is None:
        known = 0
        for letter in letters.upper():
            known = 26 * known + ord(letter) - 64
        # There are at most 143,364 names of up to three letters.
        _columns[letters] = known
    return known


def _related(book: Workbook, part: str, *kinds: str) -> list[tuple[str, str, str]]:
    """Return id, part and kind of the parts that a part (or the archive itself) refers to, of some kinds."""
    home, name = PurePosixPath(part).parent, PurePosixPath(part).name
    found: list[tuple[str, str, str]] = []

    def add(attributes: dict[str, str]) -> None:
        kind, target = attributes.get("Type", "").rpartition("/")[2], attributes.get("Target", "")
        if kind in kinds and attributes.get("TargetMode") != "External":
            whole = target[1:] if target.startswith("/") else str(home / target)
            found.append((attributes.get("Id", ""), _normal(whole), kind))

    listing = str(home / "_rels" / f"{name}.rels")
    if listing in book.archive.NameToInfo:
        book.parse_all(listing, ElementParser({"Relationship": add}))
    return found


def _normal(path: str) -> str:
    """Return a path of an archive without `.` and `..`."""
    names: list[str] = []
    for name in path.split("/"):
        if name == "..":
            names = names[:-1]
        elif name not in ("", "."):
            names.append(name)
    return "/".join(names)


def _read_main(book: Workbook, part: str, by_id: Mapping[str, str]) -> None:
    def properties(attributes: dict[str, str]) -> None:
        book.date1904 = attributes.get("date1904", "0") in ("1", "true", "on")

    def sheet(attributes: dict[str, str]) -> None:
        identity = next((value for name, value in attributes.items() if name.endswith("elationships id")), "")
        # Sheets of charts have no cells.
        if identity in by_id:
            visible = attributes.get("state", "visible") == "visible"
            book.sheets.append(Sheet(attributes.get("name", ""), by_id[identity], visible))

    book.parse_all(part, ElementParser({"workbookPr": properties, "sheet": sheet}))


def _read_styles(book: Workbook, part: str) -> None:
    from openpyxl.styles.numbers import builtin_format_code, is_date_format, is_timedelta_format

    scan = _StyleScan()
    book.parse_all(part, scan)
    for number, of in enumerate(scan.styles):
        code = scan.formats.get(of)
        if code is None and _NUMBER.fullmatch(of):
            code = builtin_format_code(int(of))
        if is_date_format(code):
            book.dates.add(number)
        if is_timedelta_format(code):
            book.durations.add(number)


class _StyleScan(XmlParser):
    """Collects the number formats of a workbook, and the format of each style of cells."""

    def __init__(self) -> None:
        super().__init__()
        self._of_cells = False
        self.formats: dict[str, str] = {}
        self.styles: list[str] = []

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "numFmt":
            # Excel has formats of at most 255 characters.
            self.formats[attributes.get("numFmtId", "")] = attributes.get("formatCode", "")[:1000]
        elif name == "cellXfs":
            self._of_cells = True
        elif name == "xf" and self._of_cells:
            self.styles.append(attributes.get("numFmtId", "0"))

    def end(self, name: str) -> None:
        if name == "cellXfs":
            self._of_cells = False
