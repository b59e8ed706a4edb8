"""JSON and JSON Lines, with the physical line of every row.

One JSON reader serves arrays, pretty-printed or not, concatenated objects and column-oriented objects: a
scan for brackets outside strings finds where each row begins and ends, and only then is a row parsed.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
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


def read_jsonl(path: Path) -> Iterator[Row | Reject]:
    """Yield one row per non-blank physical line; `line` counts from 1 and blank lines count too."""
    _refuse_foreign(path)
    index = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            text = raw.removeprefix(_BOM) if number == 1 else raw
            if not text.strip():
                continue
            row = _parse(text, Source(str(path), index, number))
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
        if not first.lstrip().startswith(b"{") or not file.readline():
            return False
    try:
        orjson.loads(first)
    except orjson.JSONDecodeError:
        return False
    return True


def _scan_rows(data: mmap.mmap, path: Path) -> Iterator[Row | Reject]:
    """Find the rows by bracket depth, without parsing: depth 1 of a top-level array, depth 0 of an object."""
    line, counted, index = 1, 0, 0
    depth, base, start, gap = 0, 0, 0, len(_BOM) if data[:3] == _BOM else 0
    for found in _BRACKETS.finditer(data):
        symbol = data[found.start()]
        if symbol == 0x22:
            continue
        if symbol in b"{[":
            if depth == 0 and symbol == 0x5B and base == 0:
                base, gap = 1, found.end()
            elif depth == base:
                start = found.start()
                _refuse_between(data, gap, start, path)
            depth += 1
            continue
        depth -= 1
        if depth < base and symbol == 0x5D:
            _refuse_between(data, gap, found.start(), path)
            base, gap = 0, found.end()
        elif depth == base:
            line += _count_lines(data, counted, start)
            counted, gap = start, found.end()
            yield _parse(data[start:gap], Source(str(path), index, line))
            index += 1
        if depth < 0:
            break
    if depth != 0:
        line += _count_lines(data, counted, start)
        raise InputRefused(
            "partial_file",
            f"the JSON ends inside row {index}, which begins here: a bracket or a quote is never closed",
            where=f"{path}:{line}",
            hint="write the file again, it looks cut off",
        )
    _refuse_between(data, gap, len(data), path)


def _count_lines(data: mmap.mmap, start: int, end: int) -> int:
    return data[start:end].count(b"\n")


def _refuse_between(data: mmap.mmap, start: int, end: int, path: Path) -> None:
    between = data[start:end].strip(b" \t\r\n,")
    if between:
        line = 1 + _count_lines(data, 0, start + data[start:end].find(between[:1]))
        found = between[:40].decode("utf-8", "replace")
        raise InputRefused(
            "not_a_row",
            f"found {found!r} where a row (an object or a list of messages) should stand",
            where=f"{path}:{line}",
        )


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
    if all(isinstance(c, dict) and c for c in cells) and all(list(c) == list(cells[0]) for c in cells):
        if not all(key.isdecimal() for key in cells[0]):
            return None
        return [{name: column[key] for name, column in data.items()} for key in cells[0]]
    if all(isinstance(c, list) and len(c) == len(cells[0]) for c in cells):
        if any(isinstance(item, dict) for column in cells for item in column):
            return None
        return [dict(zip(data, values, strict=True)) for values in zip(*cells, strict=True)]
    return None
