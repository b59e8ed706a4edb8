"""JSON and JSON Lines, with the physical line and the byte of every row.

One JSON reader serves arrays, pretty-printed or not, concatenated objects, column-oriented objects and rows that lie
under a key: a scan for brackets outside strings finds where each row begins and ends, and only then is a row parsed.
Nothing is held but the row at hand.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import orjson

from ftdata.errors import InputRefused
from ftdata.readers.scan import depth_of, key_of_rows, pieces
from ftdata.readers.streams import CHUNK, Input, before, chunks, joined
from ftdata.types import Reject, Row, Source

_BOM = b"\xef\xbb\xbf"
_FOREIGN = {
    b"PK\x03\x04": "a zip file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"%PDF": "a PDF",
    b"SQLite format 3": "an SQLite database",
}
_WEB = (b"<!doctype", b"<html", b"<?xml")
_LFS = b"version https://git-lfs"
_RAW_LIMIT = 4096

MAX_LINE = 64 << 20
"""Bytes that a row may have; longer ones are rejected, since one would fill the memory of every later stage."""

MAX_DEPTH = 128
"""Levels of brackets that a row may have."""

_VALUE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[^\s,\[\]"]+', re.DOTALL)
_SPACED = re.compile(rb'"\s+:')
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_PUNCTUATION = re.compile(rb"[\[\]]*|,")
# What hides a colon after a quote, or looks like one.
_ESCAPES = (rb"\u0022", rb"\u0020", rb"\u003a", rb"\u003A")


def read_jsonl(file: Input) -> Iterator[Row | Reject]:
    """Yield one row per non-blank physical line; `line` counts from 1 and blank lines count too."""
    with file.text() as stream:
        _refuse_foreign(stream.peek(512), file)
        yield from _lines(stream, file)


def read_json(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of a JSON file; `line` is where each row begins.

    Rows are the elements of a top-level array, or top-level objects one after another, or the entries of one
    column-oriented object (`{"question": {"0": ...}, "answer": {"0": ...}}` or `{"question": [...], ...}`), or those
    of the only list of objects in one object (`{"version": 1, "data": [...]}`).
    A file whose first line is a whole object and that goes on is read as JSON Lines.
    """
    with file.text() as stream:
        head = stream.read(CHUNK)
        _refuse_foreign(head, file)
        if _looks_like_lines(head):
            with joined(head, stream) as whole:
                yield from _lines(whole, file)
            return
        with closing(before(head, chunks(stream))) as parts:
            key = key_of_rows(head.removeprefix(_BOM), file.path, whole=len(head) < CHUNK)
            yield from _by_columns(_scan(parts, file, key), head, file)


def _lines(stream: io.BufferedReader, file: Input) -> Iterator[Row | Reject]:
    index = number = offset = 0
    while raw := stream.readline(MAX_LINE + 1):
        number += 1
        source = Source(file.path, index, number, offset)
        size = len(raw) if raw.endswith(b"\n") else len(raw) + _to_end_of_line(stream)
        offset += size
        text = raw.removeprefix(_BOM) if number == 1 else raw
        if size > MAX_LINE:
            yield _too_long(source, size)
        elif not text.strip():
            continue
        else:
            row = parse(text, source)
            if isinstance(row, Reject) and not raw.endswith(b"\n"):
                reason = f"{row.reason}; the file ends inside this line"
                row = replace(row, code="partial_file", reason=reason, fix="write the file again, it looks cut off")
            yield row
        index += 1
    if index == 0:
        raise InputRefused("no_rows", "the file holds no rows", where=file.path)


def _to_end_of_line(stream: io.BufferedReader) -> int:
    size = 0
    while more := stream.readline(CHUNK):
        size += len(more)
        if more.endswith(b"\n"):
            break
    return size


def _refuse_foreign(head: bytes, file: Input) -> None:
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            raise InputRefused(
                "not_json",
                f"this is {name}, not JSON",
                where=file.path,
                hint="convert it, or give it the suffix of what it is",
            )
    if head.removeprefix(_BOM).lstrip().lower().startswith(_WEB):
        raise InputRefused(
            "not_json", "this is a web page (HTML or XML), not JSON", where=file.path, hint="download the raw file"
        )
    if head.startswith(_LFS):
        raise InputRefused(
            "not_json", "this is a Git LFS pointer, not the file itself", where=file.path, hint="run git lfs pull"
        )


def _looks_like_lines(head: bytes) -> bool:
    lines = [line for line in head.removeprefix(_BOM).split(b"\n", 64) if line.strip()][:2]
    if len(lines) < 2 or lines[0].lstrip()[:1] != lines[1].lstrip()[:1] or lines[0].lstrip()[:1] not in (b"{", b"["):
        return False
    return any(map(_is_whole, lines))


def _is_whole(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _by_columns(rows: Iterator[Row | Reject], head: bytes, file: Input) -> Iterator[Row | Reject]:
    """Yield the rows; where one alone holds columns, the rows that these make."""
    first, second = next(rows, None), next(rows, None)
    if first is None:
        raise InputRefused("no_rows", "the file holds no rows", where=file.path)
    # In an array it is a row, whatever it holds.
    alone = isinstance(first, Row) and second is None and not head.removeprefix(_BOM).lstrip().startswith(b"[")
    columns = _columns(first.data) if isinstance(first, Row) and alone else None
    if columns is not None:
        for index, cells in enumerate(columns):
            yield Row(cells, first.source._replace(row=index))
        return
    yield first
    if second is not None:
        yield second
    yield from rows


def _columns(data: Any) -> list[dict[str, Any]] | None:
    """Return the rows of a column-oriented object, or None where `data` is a row itself."""
    if not isinstance(data, dict) or not data:
        return None
    cells = list(data.values())
    keyed = all(isinstance(cell, dict) and list(cell) == list(cells[0]) for cell in cells)
    if keyed and cells[0] and all(key.isdecimal() for key in cells[0]):
        return [{name: column[key] for name, column in data.items()} for key in cells[0]]
    # Ids and labels are lists themselves.
    listed = "input_ids" not in data and all(isinstance(cell, list) and len(cell) == len(cells[0]) for cell in cells)
    if listed and cells[0] and not any(isinstance(item, dict) for column in cells for item in column):
        return [dict(zip(data, values, strict=True)) for values in zip(*cells, strict=True)]
    return None


def _scan(parts: Iterable[bytes], file: Input, under: str | None) -> Iterator[Row | Reject]:
    """Yield the rows of a JSON text, and a reject for each thing that stands where a row should."""
    index = 0
    for piece in pieces(parts, file.path, MAX_LINE, under):
        source = Source(file.path, index, piece.line, piece.offset)
        for at, stray in _strays(piece.gap):
            line = piece.line - piece.gap.count(b"\n", at)
            place = source._replace(line=line, offset=piece.offset - len(piece.gap) + at)
            yield Reject(place, "not_a_row", "", stray)
            source = source._replace(row=source.row + 1)
        if piece.size:
            yield _too_long(source, piece.size) if piece.text is None else parse(piece.text, source)
            source = source._replace(row=source.row + 1)
        index = source.row


def _strays(gap: bytes) -> Iterator[tuple[int, str]]:
    """Yield place and reason for each thing between rows that is none: numbers, texts, left-overs, commas too many."""
    values = [found for found in _VALUE.finditer(gap) if found[0] != _BOM]
    for found in values:
        shown = found[0].removeprefix(_BOM)[:40].decode("utf-8", "replace")
        yield found.start(), f"is {shown!r}, expected an object or a list of messages"
    between = b"".join(gap.removeprefix(_BOM).split())
    if not values and not _PUNCTUATION.fullmatch(between):
        reason = f"{between.decode()!r} stands between rows, expected one comma: this is not valid JSON"
        yield max(gap.find(b","), 0), reason


def _too_long(source: Source, size: int) -> Reject:
    return Reject(source, "line_too_long", "", f"is {size:,} bytes long, at most {MAX_LINE:,} are read")


def parse(text: bytes, source: Source) -> Row | Reject:
    """Parse the JSON text of one row.

    Exactly: what two parsers would read differently (a key that stands twice, half a character) is rejected.
    """
    try:
        if text.count(b"{") + text.count(b"[") > MAX_DEPTH and depth_of(text) > MAX_DEPTH:
            raise _Fault("too_deep", f"is nested deeper than {MAX_DEPTH} levels")
        value = _value(text, source)
        if not isinstance(value, dict | list):
            raise _Fault("not_a_row", f"is a {type(value).__name__}, expected an object or a list of messages")
    except _Fault as fault:
        return Reject(source, fault.code, "", fault.reason, fault.fix, _raw(text))
    return Row(value, source)


class _Fault(Exception):
    def __init__(self, code: str, reason: str, fix: str = "") -> None:
        super().__init__(code)
        self.code, self.reason, self.fix = code, reason, fix


def _value(text: bytes, source: Source) -> Any:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return _second_opinion(text, source, error)
    # orjson makes floats of integers beyond 64 bits.
    if _LONG_NUMBER.search(text):
        return _second_opinion(text, source, None)
    if _may_repeat(text, value):
        json.loads(text, object_pairs_hook=_unique)
    return value


def _second_opinion(text: bytes, source: Source, error: orjson.JSONDecodeError | None) -> Any:
    # orjson refuses NaN, which is harmless in columns that nobody trains on.
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as broken:
        found = f"byte 0x{text[broken.start]:02x} at {broken.start} bytes into it"
        fix = "say what it is written in, e.g. encoding='cp1252'"
        raise _Fault("encoding", f"is not UTF-8 text: {found}", fix) from None
    except UnicodeEncodeError:
        raise _Fault("lone_surrogate", "holds half a character (a lone surrogate escape)") from None
    except ValueError:
        assert error is not None  # what orjson reads, Python reads
        line = (source.line or 1) + error.lineno - 1
        at = f"line {line}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise _Fault("json", f"is not valid JSON at {at}: {error.msg}") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Fault("duplicate_key", f"has the key {twice!r} twice in one object")
    return found


def _may_repeat(text: bytes, value: Any) -> bool:
    """Whether the text may have a key twice, of which the parser kept the last: it has more colons after quotes."""
    hidden = b"\\u00" in text and any(escape in text for escape in _ESCAPES)
    return hidden or _SPACED.search(text) is not None or text.count(b'":') != orjson.dumps(value).count(b'":')


def _raw(text: bytes) -> str:
    return text[:_RAW_LIMIT].decode("utf-8", "backslashreplace").rstrip("\r\n")
