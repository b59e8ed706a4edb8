"""Limits of Excel files: what a small archive may become, and what its cells may repeat."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO
from xml.etree import ElementTree as ET

from ftdata.errors import InputRefused
from ftdata.readers.streams import MAX_LINE, MAX_REPEATED, Input, expansion

MAX_ROWS = 1_048_576
"""Rows of a sheet, as in Excel."""

MAX_CELL = 32_767
"""Characters of a cell, as in Excel."""

_FREE, _MAX_RATIO = 16 << 20, 100
"""How many times its size the XML of a workbook may become, once it is more than `_FREE` bytes. Sheets that people make
become ten to forty times their size."""

_MAX_PARTS, _MAX_ROW = 10_000, 8 << 20
"""Files in the archive, and bytes of XML of a row, which is in memory as a whole."""

_ROW_TAG = re.compile(rb"""<(?:\w+:)?row(?=[\s/>])(?:[^>]*?\sr=["'](\d{1,18})["'])?""")
_LONGEST_TAG = 512
_CHUNK = 1 << 20
_AS_CSV = "if all of it is data, save it as CSV"


def check_archive(stream: BinaryIO, file: Input) -> int:
    """Return the size of a workbook, before anything of it is parsed.

    Raises:
        InputRefused: `expansion`, `too_many_rows` or `row_too_long`: parsing it would take far more time or memory than
            its size explains.
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    with zipfile.ZipFile(stream) as archive:
        parts = archive.infolist()
        if len(parts) > _MAX_PARTS:
            found = f"holds {len(parts):,} files, expected at most {_MAX_PARTS:,}"
            raise InputRefused("expansion", found, where=file.path, hint=_AS_CSV)
        # No more than these sizes is ever unpacked.
        plain = sum(part.file_size for part in parts)
        if plain > max(_FREE, _MAX_RATIO * size):
            raise expansion(plain, size, file.path, _MAX_RATIO, _AS_CSV)
        for part in parts:
            if "/worksheets/" in f"/{part.filename}":
                with archive.open(part) as sheet:
                    _check_rows(sheet, f"{file.path}#{part.filename}")
    stream.seek(0)
    return size


def _check_rows(sheet: Any, path: str) -> None:
    """Refuse a sheet with too many rows, or with one that is too long."""
    rows = 0
    for number, length in _rows(sheet):
        if number is not None:
            if 0 < number <= rows:
                # openpyxl would leave it out.
                found = f"has row {number:,} after row {rows:,}"
                raise InputRefused("row_order", found, where=path, hint="open it in Excel and save it")
            rows = number or rows + 1
        if length > _MAX_ROW:
            found = f"has a row of {length:,} bytes of XML, at most {_MAX_ROW:,} are read"
            raise InputRefused("row_too_long", found, where=path, hint="make several rows of it")
        if rows > MAX_ROWS:
            found = f"has a row {rows:,}, and a sheet may have {MAX_ROWS:,}"
            raise InputRefused(
                "too_many_rows", found, where=path, hint="open it in Excel and save it, or save it as CSV"
            )


def _rows(sheet: Any) -> Iterator[tuple[int | None, int]]:
    """Yield the number of each row (0 if it has none), or `None` for a chunk, and the bytes since the row before."""
    before, rest = 0, b""
    while chunk := sheet.read(_CHUNK):
        data, at = rest + chunk, 0
        for tag in _ROW_TAG.finditer(data):
            yield int(tag[1] or 0), before + tag.start() - at
            before, at = 0, tag.start()
        # A tag may go on in the next chunk.
        kept = max(len(data) - _LONGEST_TAG, at + 1)
        before, rest = before + kept - at, data[kept:]
        yield None, before
    yield None, before + len(rest)


def shared_strings(stream: BinaryIO) -> list[str]:
    """Return the shared strings of a workbook as they are stored, escapes included; phonetic text is left out."""
    found = list[str]()
    with zipfile.ZipFile(stream) as archive:
        name = next((name for name in archive.namelist() if name.lower().endswith("sharedstrings.xml")), None)
        if name is not None:
            with archive.open(name) as part:
                root: ET.Element | None = None
                # Expat, which reads it, limits what entities become.
                for event, element in ET.iterparse(part, ("start", "end")):  # noqa: S314  (sizes are checked before)
                    root = element if root is None else root
                    if event == "end" and element.tag.endswith("}si"):
                        texts = element.findall("{*}t") + element.findall("{*}r/{*}t")
                        found.append("".join(text.text or "" for text in texts))
                        root.clear()
    stream.seek(0)
    return found


class TextLimit:
    """Counts the text of cells: one long string may be shared by all of them."""

    def __init__(self, file: Input, size: int) -> None:
        self._file, self._size, self._total = file, size, 0

    def fault(self, cells: Sequence[Any]) -> tuple[str, str, str, str] | None:
        """Count a row; return code, field, reason and fix if it is too long.

        Raises:
            InputRefused: `expansion`: all rows together are far more than the file.
        """
        lengths = [len(cell.value) for cell in cells if isinstance(cell.value, str)]
        self._total += sum(lengths)
        if self._total > max(MAX_LINE, MAX_REPEATED * self._size):
            raise expansion(self._total, self._size, self._file.path, MAX_REPEATED, _AS_CSV)
        if max(lengths, default=0) > MAX_CELL:
            told = f"has a cell of {max(lengths):,} characters; a cell of Excel has {MAX_CELL:,} at most"
            return "cell_too_long", "", told, "write it as CSV or JSON Lines"
        return None
