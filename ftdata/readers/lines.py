"""JSON and JSON Lines, with the physical line of every row.

One JSON reader serves arrays, pretty-printed or not, concatenated objects and column-oriented objects: a
scan for brackets outside strings finds where each row begins and ends, and only then is a row parsed.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from ftdata.errors import InputRefused
from ftdata.types import Reject, Row, Source

_BOM = b"\xef\xbb\xbf"
_FOREIGN = {
    b"\xff\xfe": "UTF-16 or UTF-32 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file",
    b"PAR1": "a Parquet file",
}
_BRACKETS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]]', re.DOTALL)
_RAW_LIMIT = 4096

MAX_LINE = 64 << 20
"""Bytes that a row may have; longer ones are rejected, since one would fill the memory of every later stage."""


def read_jsonl(path: Path) -> Iterator[Row | Reject]:
    """Yield one row per non-blank physical line; `line` counts from 1 and blank lines count too."""
    _refuse_foreign(path)
    index = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            text = raw.removeprefix(_BOM) if number == 1 else raw
            if not text.strip():
                continue
            source = Source(str(path), index, number)
            row = _parse(text, source) if len(raw) <= MAX_LINE else _too_long(source, len(raw))
            if isinstance(row, Reject) and not raw.endswith(b"\n"):
                row = Reject(
                    row.source,
                    "partial_file",
                    "",
                    f"{row.reason}; the file ends inside this line",
                    "write the file again, it looks cut off",
                    row.raw,
                )
            yield row
            index += 1
    if index == 0:
        raise InputRefused("no_rows", "the file holds no rows", where=str(path))


def read_json(path: Path) -> Iterator[Row | Reject]:
    """Yield the rows of a JSON file; `line` is where each row begins.

    Rows are the elements of a top-level array, or top-level objects one after another, or the entries of one
    column-oriented object (`{"question": {"0": ...}, "answer": {"0": ...}}` or `{"question": [...], ...}`).
    A file whose first line is a whole object and that goes on is read as JSON Lines.
    """
    _refuse_foreign(path)
    if path.stat().st_size == 0:
        raise InputRefused("no_rows", "the file is empty", where=str(path))
    if _looks_like_lines(path):
        yield from read_jsonl(path)
        return
    with path.open("rb") as file:
        # Not closed by hand: a reader that stops early leaves the scan holding on to it.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    rows = _scan_rows(data, path)
    first = next(rows, None)
    second = next(rows, None)
    if first is None:
        raise InputRefused("no_rows", "the file holds no rows", where=str(path))
    columns = _columns(first.data) if isinstance(first, Row) and second is None else None
    if columns is not None and isinstance(first, Row):
        for index, cells in enumerate(columns):
            yield Row(cells, Source(str(path), index, first.source.line))
        return
    yield first
    if second is not None:
        yield second
    yield from rows


def _refuse_foreign(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(64)
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            raise InputRefused(
                "not_json",
                f"this is {name}, not JSON in UTF-8",
                where=str(path),
                hint="convert it, or give it the suffix of what it is",
            )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputRefused("not_json", "this is a web page, not JSON", where=str(path), hint="download the raw file")


def _looks_like_lines(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline().removeprefix(_BOM)
        more = next((line for line in file if line.strip()), b"")
        if not first.lstrip().startswith(b"{") or not more.lstrip().startswith(b"{"):
            return False
    try:
        orjson.loads(first)
    except orjson.JSONDecodeError:
        return False
    return True


def _scan_rows(data: mmap.mmap, path: Path) -> Iterator[Row | Reject]:
    """Yield the rows of a JSON text, and a reject for each thing that stands where a row should."""
    index, lines = 0, _Lines(data)
    gap = len(_BOM) if data[:3] == _BOM else 0
    for start, end in chain(_extents(data, path), [(len(data), len(data))]):
        for reason in _strays(data[gap:start]):
            yield Reject(Source(str(path), index, lines.of(gap)), "not_a_row", "", reason)
            index += 1
        if start < end:
            source = Source(str(path), index, lines.of(start))
            yield _parse(data[start:end], source) if end - start <= MAX_LINE else _too_long(source, end - start)
            index += 1
        gap = end


def _extents(data: mmap.mmap, path: Path) -> Iterator[tuple[int, int]]:
    """Yield where each row begins and ends, by bracket depth alone: 1 inside a top-level array, else 0."""
    depth = row_depth = start = 0
    for found in _BRACKETS.finditer(data):
        symbol = data[found.start()]
        if symbol in b"{[":
            if depth == 0:
                row_depth = 1 if symbol in b"[" else 0
            if depth == row_depth:
                start = found.start()
            depth += 1
        elif symbol in b"}]" and depth:
            depth -= 1
            if depth == row_depth:
                yield start, found.end()
    if depth:
        line = 1 + data[:start].count(b"\n")
        raise InputRefused(
            "partial_file",
            "the JSON ends inside the row that begins here: a bracket or a quote is never closed",
            where=f"{path}:{line}",
            hint="write the file again, it looks cut off",
        )


class _Lines:
    """Line numbers of ascending positions, each stretch counted once."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._line, self._at = data, 1, 0

    def of(self, position: int) -> int:
        if position > self._at:
            self._line += self._data[self._at : position].count(b"\n")
            self._at = position
        return self._line


def _strays(between: bytes) -> list[str]:
    """Return a reason for each thing between rows that is none: numbers, texts, left-overs."""
    text = between.strip(b" \t\r\n,[]")
    if not text:
        return []
    try:
        found = orjson.loads(b"[" + text + b"]")
    except orjson.JSONDecodeError:
        found = [text[:40].decode("utf-8", "replace")]
    return [f"is {str(item)[:40]!r}, expected an object or a list of messages" for item in found]


def _too_long(source: Source, size: int) -> Reject:
    return Reject(source, "line_too_long", "", f"is {size:,} bytes long, at most {MAX_LINE:,} are read")


def _parse(text: bytes, source: Source) -> Row | Reject:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        try:
            value = _parse_leniently(text)
        except (ValueError, RecursionError):
            return _reject_json(text, source, error)
    if not isinstance(value, dict | list):
        return Reject(
            source,
            "not_a_row",
            "",
            f"is a {type(value).__name__}, expected an object or a list of messages",
            raw=_raw(text),
        )
    return Row(value, source)


def _parse_leniently(text: bytes) -> Any:
    # orjson refuses NaN and integers beyond 64 bits, which are harmless in columns that nobody trains on.
    value = json.loads(text.decode("utf-8"))
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # lone surrogates are not text
    return value


def _reject_json(text: bytes, source: Source, error: orjson.JSONDecodeError) -> Reject:
    line = (source.line or 1) + error.lineno - 1
    at = f"line {line}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
    return Reject(source, "json", "", f"is not valid JSON at {at}: {error.msg}", raw=_raw(text))


def _raw(text: bytes) -> str:
    return text[:_RAW_LIMIT].decode("utf-8", "backslashreplace").rstrip("\r\n")


def _columns(data: Any) -> list[dict[str, Any]] | None:
    """Return the rows of a column-oriented object, or None where `data` is a row itself."""
    if not isinstance(data, dict) or not data:
        return None
    cells = list(data.values())
    keyed = all(isinstance(cell, dict) and list(cell) == list(cells[0]) for cell in cells)
    if keyed and cells[0] and all(key.isdecimal() for key in cells[0]):
        return [{name: column[key] for name, column in data.items()} for key in cells[0]]
    listed = all(isinstance(cell, list) and len(cell) == len(cells[0]) for cell in cells)
    if listed and cells[0] and not any(isinstance(item, dict) for column in cells for item in column):
        return [dict(zip(data, values, strict=True)) for values in zip(*cells, strict=True)]
    return None
