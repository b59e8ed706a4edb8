"""JSON and JSON Lines, with the physical line and the byte of every row.

One JSON reader serves arrays, pretty-printed or not, concatenated objects, column-oriented objects and rows that lie
under a key: a scan for brackets outside strings finds where each row begins and ends, and only then is a row parsed.
Nothing is held but the row at hand.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain
from typing import Any

import orjson

from ftdata.errors import InputRefused
from ftdata.readers.json_scan import COLUMNS, json_depth, scan_json, scan_outline
from ftdata.readers.streams import CHUNK, MAX_LINE, Input, prepend, prepend_to_file, read_chunks
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

MAX_DEPTH = 128
"""Levels of brackets that a row may have."""

_VALUE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[^\s,\[\]"]+', re.DOTALL)
_KEY = re.compile(rb'"[ \t\r\n]*:')
# Nineteen digits in a row are found fastest as nineteen zeros.
_DIGITS, _LONG_NUMBER = bytes.maketrans(b"123456789", b"000000000"), b"0" * 19
_BLANKS = b" \t\r\n"
_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
_PUNCTUATION = re.compile(rb"[\[\]]*|,")
# What hides a colon after a quote, or looks like one.
_ESCAPES = (rb"\u0022", rb"\u0020", rb"\u003a", rb"\u003A")


Rows = Generator[Row | Reject, None, int | None]
"""Rows, and then how many lines they stood in, where that is known."""


def read_jsonl(file: Input) -> Rows:
    """Yield one row per non-blank physical line; `line` counts from 1 and blank lines count too.

    Of a span, rows and lines are counted from its own beginning.
    """
    with file.text() as stream:
        _refuse_foreign(stream.peek(512), file)
        return (yield from _lines(stream, file))


def is_line_format(file: Input, reader: str) -> bool:
    """Whether a file is read line by line, and so can be in parts."""
    with file.open() as stream:
        if not stream.seekable() or not file.is_plain(stream.peek(8)[:8]):
            return False
        return reader in ("jsonl", "ndjson") or (reader == "json" and _looks_like_lines(_head(stream)))


def read_json(file: Input) -> Rows:
    """Yield the rows of a JSON file; `line` is where each row begins.

    Rows are the elements of a top-level array, or top-level objects one after another, or the entries of one
    column-oriented object (`{"question": {"0": ...}, "answer": {"0": ...}}` or `{"question": [...], ...}`), or those
    of the only list of objects in one object (`{"version": 1, "data": [...]}`).
    A file whose first line is a whole object and that goes on is read as JSON Lines.
    """
    if file.span is not None:
        return (yield from read_jsonl(file))
    with file.text() as stream:
        head = _head(stream)
        _refuse_foreign(head, file)
        if _looks_like_lines(head):
            with prepend_to_file(head, stream) as whole:
                return (yield from _lines(whole, file))
        with closing(prepend(head, read_chunks(stream))) as parts:
            seen, key = _seen(parts, file.path) if head.removeprefix(_BOM).lstrip().startswith(b"{") else ([], None)
            yield from _by_columns(_scan(chain(seen, parts), file, key), head, file)
    return None


def _head(stream: io.BufferedReader) -> bytes:
    """Return how the text begins: two lines that are not blank, if they are not long; what a pipe has already."""
    head = b""
    while len(head) < CHUNK and sum(1 for line in head.split(b"\n", 64)[:-1] if line.strip()) < 2:
        more = stream.read1(CHUNK - len(head))
        if not more:
            break
        head += more
    return head


def _seen(parts: Iterator[bytes], path: str) -> tuple[list[bytes], str | None]:
    """Return the parts of a text that were looked at, and the key under which its rows lie, if they do.

    An object that goes on for longer than a row may is no row.
    """
    seen: list[bytes] = []

    def taken() -> Iterator[bytes]:
        size = 0
        for part in parts:
            seen.append(part)
            size += len(part)
            yield part
            if size > MAX_LINE:
                return

    found = scan_outline(taken())
    if found.end is not None:
        # Whether it is all of the text, the next part says, where this one ends with it.
        while not (rest := b"".join(seen)[found.end :].strip()) and (part := next(parts, b"")):
            seen.append(part)
        if rest:
            return seen, None
    return seen, found.key_of_rows(path)


def _lines(stream: io.BufferedReader, file: Input) -> Rows:
    index = number = 0
    offset, end = file.span or (0, None)
    if offset:
        # What stands before the first line break is of the line that begins before.
        stream.seek(offset - 1)
        offset += _to_end_of_line(stream) - 1
    while (end is None or offset < end) and (raw := stream.readline(MAX_LINE + 1)):
        number += 1
        if raw == b"\n":
            # Many of them stand together, or none.
            more = _breaks(stream) if end is None else 0
            offset, number = offset + 1 + more, number + more
            continue
        source = Source(file.path, index, number, offset)
        size = len(raw) if raw.endswith(b"\n") else len(raw) + _to_end_of_line(stream)
        offset += size
        text = raw.removeprefix(_BOM)  # also where files with marks were joined
        if size > MAX_LINE:
            yield _too_long(source, size)
        elif not text or text.isspace():
            continue
        else:
            row = parse_row(text, source, whole_line=True)
            if isinstance(row, Reject) and not raw.endswith(b"\n"):
                reason = f"{row.reason}; the file ends inside this line"
                row = replace(row, code="partial_file", reason=reason, fix="write the file again, it looks cut off")
            yield row
        index += 1
    if index == 0 and file.span is None:
        raise no_rows_error(file.path)
    return number


def _breaks(stream: io.BufferedReader) -> int:
    """Read the line breaks that come next, and return how many there were."""
    count = 0
    while (seen := stream.peek(1)) and (here := len(seen) - len(seen.lstrip(b"\n"))):
        count += len(stream.read(here))
        if here < len(seen):
            break
    return count


def no_rows_error(path: str) -> InputRefused:
    """Return what is said of a file without rows."""
    return InputRefused("no_rows", "the file holds no rows", where=path)


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
    lines = [line.strip() for line in head.removeprefix(_BOM).split(b"\n", 64) if line.strip()]
    if len(lines) < 2 or lines[0][:1] != lines[1][:1] or lines[0][:1] not in (b"{", b"[") or lines[0] == b"[":
        return False
    return any(_is_whole(line) for line in lines if line[:1] == lines[0][:1])


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
        raise no_rows_error(file.path)
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
    listed = all(isinstance(cell, list) and len(cell) == len(cells[0]) for cell in cells)
    # Ids and labels are lists themselves.
    listed = listed and not any(isinstance(one, int) for one in data.get("input_ids", ())[:1])
    texts = any(name in COLUMNS and all(isinstance(one, str | list) for one in data[name]) for name in data)
    if listed and cells[0] and (texts or not any(isinstance(item, dict) for column in cells for item in column)):
        return [dict(zip(data, values, strict=True)) for values in zip(*cells, strict=True)]
    return None


def _scan(parts: Iterable[bytes], file: Input, under: str | None) -> Iterator[Row | Reject]:
    """Yield the rows of a JSON text, and a reject for each thing that stands where a row should."""
    index = 0
    for piece in scan_json(parts, file.path, MAX_LINE, under):
        source = Source(file.path, index, piece.line, piece.offset)
        line, counted = piece.line - piece.gap.count(b"\n"), 0
        commas = None if not piece.listed else int(source.row > 0 and piece.size > 0)
        for at, stray in _strays(piece.gap, commas):
            line += piece.gap.count(b"\n", counted, at)
            counted = at
            place = source._replace(line=line, offset=piece.offset - len(piece.gap) + at)
            yield Reject(place, "not_a_row", "", stray, "", _raw(piece.gap[at : at + _RAW_LIMIT]))
            source = source._replace(row=source.row + 1)
        if piece.size:
            yield (
                _too_long(source, piece.size) if piece.text is None else parse_row(piece.text, source, whole_line=False)
            )
            source = source._replace(row=source.row + 1)
        index = source.row


def _strays(gap: bytes, commas: int | None) -> Iterator[tuple[int, str]]:
    """Yield place and reason for each thing between rows that is none: numbers, texts, left-overs, commas too many.

    `commas`: how many there must be, if that is known.
    """
    values = [found for found in _VALUE.finditer(gap) if found[0] != _BOM]
    for found in values:
        shown = found[0].removeprefix(_BOM)[:40].decode("utf-8", "replace")
        yield found.start(), f"is {shown!r}, expected an object or a list of messages"
    between = b"".join(gap.removeprefix(_BOM).split())
    odd = commas is not None and between.count(b",") != commas
    if not values and (odd or not _PUNCTUATION.fullmatch(between)):
        reason = f"{between.decode()!r} stands between rows, expected one comma: this is not valid JSON"
        yield max(gap.find(b","), 0), reason


def _too_long(source: Source, size: int) -> Reject:
    return Reject(source, "line_too_long", "", f"is {size:,} bytes long, at most {MAX_LINE:,} are read")


def parse_row(text: bytes, source: Source, *, whole_line: bool) -> Row | Reject:
    """Parse the JSON text of one row; of a whole line errors say the column, else the byte in the file.

    Exactly: what two parsers would read differently (a key that stands twice, half a character) is rejected.
    """
    try:
        value = _value(text, source, whole_line=whole_line)
        if type(value) is not dict and type(value) is not list:
            raise _Fault("not_a_row", f"is a {type(value).__name__}, expected an object or a list of messages")
    except _Fault as fault:
        return Reject(source, fault.code, "", fault.reason, fault.fix, _raw(text))
    return Row(value, source)


class _Fault(Exception):
    def __init__(self, code: str, reason: str, fix: str = "") -> None:
        super().__init__(code)
        self.code, self.reason, self.fix = code, reason, fix


def _too_deep() -> _Fault:
    return _Fault("too_deep", f"is nested deeper than {MAX_DEPTH} levels")


def _value(text: bytes, source: Source, *, whole_line: bool) -> Any:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if json_depth(text) > MAX_DEPTH:
            raise _too_deep() from None
        return _second_opinion(text.rstrip(), source, error, whole_line=whole_line)
    if _says_all(value, text):
        return value
    keys, floats = _walked(value)
    # orjson makes floats of integers beyond 64 bits.
    if floats and _LONG_NUMBER in text.translate(_DIGITS):
        return _second_opinion(text, source, None, whole_line=whole_line)
    if _may_repeat(text, value, keys):
        json.loads(text, object_pairs_hook=_unique)
    return value


def _says_all(value: Any, text: bytes) -> bool:
    """Whether a value is seen to be all that the text says, nested no deeper than a row may be.

    That is so where its own text is the same but for blanks: then neither has a key, or a digit, more than the other.
    """
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH:
        return False
    own = orjson.dumps(value)
    return own == text.rstrip() or own.translate(None, _BLANKS) == text.translate(None, _BLANKS)


def _walked(value: Any, depth: int = 1) -> tuple[int, bool]:
    """Return how many keys there are in a JSON value, and whether there are floats."""
    if depth > MAX_DEPTH:
        raise _too_deep()
    keys, floats = len(value) if type(value) is dict else 0, type(value) is float
    inside = value.values() if type(value) is dict else value if type(value) is list else ()
    for one in inside:
        kind = type(one)
        if kind is str:
            continue
        if kind is dict or kind is list:
            inner, some = _walked(one, depth + 1)
            keys, floats = keys + inner, floats or some
        elif kind is float:
            floats = True
    return keys, floats


def _second_opinion(text: bytes, source: Source, error: orjson.JSONDecodeError | None, *, whole_line: bool) -> Any:
    # orjson refuses NaN, which is harmless in columns that nobody trains on.
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as broken:
        raise _Fault("encoding", *describe_invalid_utf8(text[broken.start : broken.start + 3], broken.start)) from None
    except UnicodeEncodeError:
        raise _Fault("lone_surrogate", "holds half a character (a lone surrogate escape)") from None
    except ValueError:
        assert error is not None  # what orjson reads, Python reads
        line = (source.line or 1) + error.lineno - 1
        at = f"line {line}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        if error.lineno == 1 and not whole_line:
            at = f"byte {(source.offset or 0) + len(error.doc[: error.pos].encode())}"
        raise _Fault("json", f"is not valid JSON at {at}: {error.msg}") from None
    return value


def describe_invalid_utf8(found: bytes, at: int) -> tuple[str, str]:
    """Say that bytes are no text, and what to do: those of UTF-8 that is none, or of what another encoding lacks."""
    half = found.decode("utf-8", "surrogatepass") if _SURROGATE.fullmatch(found) else ""
    if "\udc80" <= half <= "\udcff":
        return f"is no text in its encoding: byte 0x{ord(half) - 0xDC00:02x}", "say another encoding"
    return f"is not UTF-8 text: byte 0x{found[0]:02x} at {at} bytes into it", "say its encoding, e.g. encoding='cp1252'"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Fault("duplicate_key", f"has the key {twice!r} twice in one object")
    return found


def _may_repeat(text: bytes, value: Any, keys: int) -> bool:
    """Whether the text may have a key twice, of which the parser kept the last: it has more colons after quotes."""
    written = len(_KEY.findall(text))
    if written == keys:
        return False
    # Texts may have some, too, which the parser's own writer shows.
    hidden = b"\\u00" in text and any(escape in text for escape in _ESCAPES)
    return hidden or written != len(_KEY.findall(orjson.dumps(value)))


def _raw(text: bytes) -> str:
    return text[:_RAW_LIMIT].decode("utf-8", "backslashreplace").rstrip("\r\n")
