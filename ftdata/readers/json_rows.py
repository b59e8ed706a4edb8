"""Read JSON and JSON Lines files. The source of each row contains its line number and byte offset in the file.

The JSON reader accepts arrays, concatenated objects, column-oriented objects, and rows in a list under a key, with any
indentation. A scan for brackets outside strings determines where each row begins and ends; then each row is parsed
separately. Only the current row is in memory.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from ftdata.errors import InputRefused
from ftdata.readers.json_scan import COLUMNS, json_depth, scan_json, scan_outline
from ftdata.readers.streams import CHUNK, MAX_LINE, MAX_VALUES, Input, prepend, prepend_to_file, read_chunks
from ftdata.types import Reject, Row, Source

_BOM = b"\xef\xbb\xbf"
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"%PDF": "a PDF",
    b"SQLite format 3": "an SQLite database",
}
_WEB_PAGES = (b"<!doctype", b"<html", b"<?xml")
_LFS_POINTER = b"version https://git-lfs"
_RAW_LIMIT = 4096

_MIN_BLOCK_LINES, _MAX_BLOCK_LINES, _MAX_BLOCK_BYTES = 4, 64, 1 << 16
"""Limits of the lines that are parsed together."""

MAX_DEPTH = 128
"""Maximum number of nested brackets in a row."""

_STRAY_VALUE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[^\s,\[\]"]+', re.DOTALL)
_KEY = re.compile(rb'"[ \t\r\n]*:')
# To search for a number of 19 digits quickly, all digits are replaced by zeros.
_DIGITS, _LONG_NUMBER = bytes.maketrans(b"123456789", b"000000000"), b"0" * 19
_QUOTE_ESCAPE = rb"\u0022"
_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
_PUNCTUATION = re.compile(rb"[\[\]]*|,")
# Escapes that hide a quote, a space or a colon, so that a text looks like a key or a key like a text.
_ESCAPES = (rb"\u0022", rb"\u0020", rb"\u003a", rb"\u003A")


Rows = Generator[Row | Reject, None, int | None]
"""A generator of rows that returns the number of lines, if it is known."""


def read_jsonl(file: Input) -> Rows:
    """Yield one row per line of a JSON Lines file. Empty lines are skipped.

    Line numbers start at 1 and count empty lines, too.

    If the input has a span, rows and lines are counted from the beginning of the span.
    """
    with file.text() as stream:
        _check_format(stream.peek(512), file)
        return (yield from _read_lines(stream, file))


def is_line_format(file: Input, reader: str) -> bool:
    """Return whether a file can be divided into parts at line breaks.

    The file must be seekable and uncompressed, with one row per line.
    """
    with file.open() as stream:
        if not stream.seekable() or not file.is_plain(stream.peek(8)[:8]):
            return False
        return reader in ("jsonl", "ndjson") or (reader == "json" and _looks_like_lines(_read_head(stream)))


def read_json(file: Input) -> Rows:
    """Yield the rows of a JSON file, each with the number of its first line.

    Rows are one of:

    - the elements of a top-level array;
    - concatenated top-level objects;
    - the entries of a column-oriented object (`{"question": {"0": ...}, "answer": {"0": ...}}` or
      `{"question": [...], ...}`);
    - the elements of the only list of objects in an object (`{"version": 1, "data": [...]}`).

    A file is read as JSON Lines if its first line is a complete object and more lines follow.
    """
    if file.span is not None:
        return (yield from read_jsonl(file))
    with file.text() as stream:
        head = _read_head(stream)
        _check_format(head, file)
        if _looks_like_lines(head):
            with prepend_to_file(head, stream) as full_stream:
                return (yield from _read_lines(full_stream, file))
        with closing(prepend(head, read_chunks(stream))) as parts:
            is_object = head.removeprefix(_BOM).lstrip().startswith(b"{")
            examined, key = _find_key_of_rows(parts, file.path) if is_object else ([], None)
            yield from _expand_columns(_scan_rows(chain(examined, parts), file, key), head, file)
    return None


def _read_head(stream: io.BufferedReader) -> bytes:
    """Read the beginning of a text: at least two non-empty lines, but at most `CHUNK` bytes."""
    head = b""
    while len(head) < CHUNK and sum(1 for line in head.split(b"\n", 64)[:-1] if line.strip()) < 2:
        chunk = stream.read1(CHUNK - len(head))
        if not chunk:
            break
        head += chunk
    return head


def _find_key_of_rows(parts: Iterator[bytes], path: str) -> tuple[list[bytes], str | None]:
    """Find the key under which a JSON object stores its list of rows.

    An object that is longer than `MAX_LINE` is not a row.

    Returns:
        The parts of the text that were read, and the key; `None` if no key stores rows.
    """
    examined: list[bytes] = []

    def take_parts() -> Iterator[bytes]:
        size = 0
        for part in parts:
            examined.append(part)
            size += len(part)
            yield part
            if size > MAX_LINE:
                return

    outline = scan_outline(take_parts())
    if outline.end is not None:
        # If the examined parts end with the object, the next parts decide whether the text continues after it.
        text_after, size = b"".join(examined)[outline.end :].strip(), 0
        while not text_after and size < CHUNK and (part := next(parts, b"")):
            examined.append(part)
            text_after, size = part.strip(), size + len(part)
        if text_after:
            return examined, None
    return examined, outline.key_of_rows(path)


def _read_lines(stream: io.BufferedReader, file: Input) -> Rows:
    index = number = 0
    offset, end = file.span or (0, None)
    if offset:
        # The bytes before the first line break belong to a line of the previous part.
        stream.seek(offset - 1)
        offset += _skip_line(stream) - 1
    block = _LineBlock()
    while (end is None or offset < end) and (raw := stream.readline(MAX_LINE + 1)):
        number += 1
        if raw == b"\n":
            # Runs of many line breaks are skipped quickly.
            skipped = _skip_line_breaks(stream) if end is None else 0
            offset, number = offset + 1 + skipped, number + skipped
            continue
        source = Source(file.path, index, number, offset)
        size = len(raw) if raw.endswith(b"\n") else len(raw) + _skip_line(stream)
        offset += size
        text = raw.removeprefix(_BOM)  # concatenated files have a mark in the middle
        if size > MAX_LINE:
            yield from block.parse()
            yield _too_long_reject(source, size)
        elif not text or text.isspace():
            continue
        elif block.add(text, source):
            yield from block.parse()
        index += 1
    yield from block.parse()
    if index == 0 and file.span is None:
        raise no_rows_error(file.path)
    return number


@dataclass
class _LineBlock:
    """Consecutive lines that are parsed and checked together, which is faster than line by line.

    Attributes:
        texts: the lines.
        sources: the sources of the lines.
        characters: total length of the lines.
        size: maximum number of lines. It begins with 1, so that the first row of a slow stream is available at once.
    """

    texts: list[bytes] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    characters: int = 0
    size: int = 1

    def add(self, text: bytes, source: Source) -> bool:
        """Add a line, and return whether the block is full."""
        self.texts.append(text)
        self.sources.append(source)
        self.characters += len(text)
        return len(self.texts) >= self.size or self.characters >= _MAX_BLOCK_BYTES

    def parse(self) -> list[Row | Reject]:
        """Parse and remove all lines of the block."""
        texts, sources, characters = self.texts, self.sources, self.characters
        self.texts, self.sources, self.characters, self.size = [], [], 0, min(2 * self.size, _MAX_BLOCK_LINES)
        return _parse_lines(texts, sources) if characters <= 2 * _MAX_BLOCK_BYTES else _parse_each(texts, sources)


def _parse_lines(texts: list[bytes], sources: list[Source]) -> list[Row | Reject]:
    """Parse lines together. If this fails, or the lines need a slower check, parse each half."""
    if len(texts) < _MIN_BLOCK_LINES:
        return _parse_each(texts, sources)
    try:
        values = [*map(orjson.loads, texts)]
    except orjson.JSONDecodeError:
        values = []
    if values and {*map(type, values)} <= {dict, list} and _are_lossless(values, texts):
        return [*map(Row, values, sources)]
    middle = len(texts) // 2
    return _parse_lines(texts[:middle], sources[:middle]) + _parse_lines(texts[middle:], sources[middle:])


def _parse_each(texts: list[bytes], sources: list[Source]) -> list[Row | Reject]:
    return [_parse_line(text, source) for text, source in zip(texts, sources, strict=True)]


def _parse_line(text: bytes, source: Source) -> Row | Reject:
    row = parse_row(text, source, whole_line=True)
    if isinstance(row, Reject) and not text.endswith(b"\n"):
        reason = f"{row.reason}; the file ends inside this line"
        return replace(row, code="partial_file", reason=reason, fix="write the file again, it is probably truncated")
    return row


def _skip_line_breaks(stream: io.BufferedReader) -> int:
    """Skip consecutive line breaks, and return how many were skipped."""
    count = 0
    while (buffer := stream.peek(1)) and (size := len(buffer) - len(buffer.lstrip(b"\n"))):
        count += len(stream.read(size))
        if size < len(buffer):
            break
    return count


def no_rows_error(path: str) -> InputRefused:
    """Create the error for a file without rows."""
    return InputRefused("no_rows", "the file contains no rows", where=path)


def _skip_line(stream: io.BufferedReader) -> int:
    """Skip the remainder of the current line, and return the number of skipped bytes."""
    size = 0
    while chunk := stream.readline(CHUNK):
        size += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return size


def _check_format(head: bytes, file: Input) -> None:
    for magic, name in _OTHER_FORMATS.items():
        if head.startswith(magic):
            message = f"the file is {name}, expected JSON"
            raise InputRefused("not_json", message, where=file.path, hint="convert it to JSON, or correct its suffix")
    if head.removeprefix(_BOM).lstrip().lower().startswith(_WEB_PAGES):
        message = "the file is a web page (HTML or XML), expected JSON"
        raise InputRefused("not_json", message, where=file.path, hint="download the raw file")
    if head.startswith(_LFS_POINTER):
        message = "the file is a Git LFS pointer, expected JSON"
        raise InputRefused("not_json", message, where=file.path, hint="run git lfs pull")


def _looks_like_lines(head: bytes) -> bool:
    lines = [line.strip() for line in head.removeprefix(_BOM).split(b"\n", 64) if line.strip()]
    if len(lines) < 2 or lines[0][:1] != lines[1][:1] or lines[0][:1] not in (b"{", b"[") or lines[0] == b"[":
        return False
    return any(_is_complete(line) for line in lines if line[:1] == lines[0][:1])


def _is_complete(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _expand_columns(rows: Iterator[Row | Reject], head: bytes, file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of a JSON file. If the file is a single object with a list per column, convert it to rows."""
    first, second = next(rows, None), next(rows, None)
    if first is None:
        raise no_rows_error(file.path)
    # An element of an array is always a row.
    is_single = isinstance(first, Row) and second is None and not head.removeprefix(_BOM).lstrip().startswith(b"[")
    expanded = _rows_from_columns(first.data) if isinstance(first, Row) and is_single else None
    if expanded is not None:
        for index, cells in enumerate(expanded):
            yield Row(cells, first.source._replace(row=index))
        return
    yield first
    if second is not None:
        yield second
    yield from rows


def _rows_from_columns(data: Any) -> list[dict[str, Any]] | None:
    """Convert an object of columns, e.g. `{"question": ["a", "b"]}`, to rows. Return `None` if it is a single row."""
    if not isinstance(data, dict) or not data:
        return None
    cells = list(data.values())
    keyed = all(isinstance(cell, dict) and list(cell) == list(cells[0]) for cell in cells)
    if keyed and cells[0] and all(key.isdecimal() for key in cells[0]):
        return [{name: column[key] for name, column in data.items()} for key in cells[0]]
    listed = all(isinstance(cell, list) and len(cell) == len(cells[0]) for cell in cells)
    # A pretokenized row also contains lists: input_ids and labels.
    listed = listed and not any(isinstance(token_id, int) for token_id in data.get("input_ids", ())[:1])
    has_texts = any(name in COLUMNS and all(isinstance(cell, str | list) for cell in data[name]) for name in data)
    if listed and cells[0] and (has_texts or not any(isinstance(item, dict) for column in cells for item in column)):
        return [dict(zip(data, values, strict=True)) for values in zip(*cells, strict=True)]
    return None


def _scan_rows(parts: Iterable[bytes], file: Input, under: str | None) -> Iterator[Row | Reject]:
    """Yield the rows of a JSON text. For invalid text between two rows, yield a `Reject`."""
    index = 0
    for piece in scan_json(parts, file.path, MAX_LINE, under):
        source = Source(file.path, index, piece.line, piece.offset)
        line, counted = piece.line - piece.gap.count(b"\n"), 0
        commas = None if not piece.listed else int(source.row > 0 and piece.size > 0)
        for position, reason in _find_strays(piece.gap, commas):
            line += piece.gap.count(b"\n", counted, position)
            counted = position
            stray_source = source._replace(line=line, offset=piece.offset - len(piece.gap) + position)
            raw = _raw_text(piece.gap[position : position + _RAW_LIMIT])
            yield Reject(stray_source, "not_a_row", "", reason, "", raw)
            source = source._replace(row=source.row + 1)
        if piece.size:
            yield _too_long_reject(source, piece.size) if piece.text is None else parse_row(piece.text, source)
            source = source._replace(row=source.row + 1)
        index = source.row


def _find_strays(gap: bytes, commas: int | None) -> Iterator[tuple[int, str]]:
    """Find values and wrong punctuation between two rows. Yield the position and an error message for each of them.

    Args:
        gap: the text between two rows.
        commas: expected number of commas, if it is known.
    """
    values = [match for match in _STRAY_VALUE.finditer(gap) if match[0] != _BOM]
    for match in values:
        excerpt = match[0].removeprefix(_BOM)[:40].decode("utf-8", "replace")
        yield match.start(), f"the value is {excerpt!r}, expected an object or a list of messages"
    punctuation = b"".join(gap.removeprefix(_BOM).split())
    is_invalid = commas is not None and punctuation.count(b",") != commas
    if not values and (is_invalid or not _PUNCTUATION.fullmatch(punctuation)):
        reason = f"the text between two rows is {punctuation.decode()!r}, expected a comma"
        yield max(gap.find(b","), 0), reason


def _too_long_reject(source: Source, size: int) -> Reject:
    return Reject(source, "line_too_long", "", f"has {size:,} bytes, expected at most {MAX_LINE:,}")


def parse_row(text: bytes, source: Source, *, whole_line: bool = False) -> Row | Reject:
    """Parse the JSON text of a row.

    A row that two parsers could read differently is rejected, e.g. a repeated key or a lone surrogate.

    Args:
        text: the JSON text.
        source: source of the row.
        whole_line: whether the text is a complete line, so that errors name a column instead of a byte in the file.
    """
    try:
        value = _parse_value(text, source, whole_line=whole_line)
        if type(value) is not dict and type(value) is not list:
            raise _Fault("not_a_row", f"the row is a {type(value).__name__}, expected an object or a list of messages")
    except _Fault as fault:
        return Reject(source, fault.code, "", fault.reason, fault.fix, _raw_text(text))
    return Row(value, source)


class _Fault(Exception):
    def __init__(self, code: str, reason: str, fix: str = "") -> None:
        super().__init__(code)
        self.code, self.reason, self.fix = code, reason, fix


def _too_deep_fault() -> _Fault:
    return _Fault("too_deep", f"the row is nested deeper than {MAX_DEPTH} levels")


def _parse_value(text: bytes, source: Source, *, whole_line: bool) -> Any:
    if len(text) > MAX_VALUES and (values := text.count(b",")) > MAX_VALUES:
        reason = f"the row has {values:,} commas, expected at most {MAX_VALUES:,}"
        raise _Fault("row_too_long", reason, "split the row into several rows")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if json_depth(text) > MAX_DEPTH:
            raise _too_deep_fault() from None
        return _parse_with_json(text.rstrip(), source, error, whole_line=whole_line)
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH and orjson.dumps(value) == text.rstrip():
        return value
    keys, has_floats = _count_keys(value)
    # orjson converts integers beyond 64 bits to floats.
    if has_floats and _LONG_NUMBER in text.translate(_DIGITS):
        return _parse_with_json(text, source, None, whole_line=whole_line)
    if _may_repeat_keys(text, value, keys):
        json.loads(text, object_pairs_hook=_unique_keys)
    return value


def _are_lossless(values: Sequence[Any], texts: Sequence[bytes]) -> bool:
    r"""Check quickly whether parsed values contain all data of their JSON texts, and are not nested too deeply.

    `False` means that a slower check is necessary. Of an object that repeats a key, orjson keeps only the last value.
    Each key and each string has two quotes, and orjson writes a quote inside a string as the text does, except for
    the escape `\u0022`. So if the values have as many quotes as the texts, no key was lost.
    """
    joined = b"".join(texts)
    codes = np.frombuffer(joined, np.uint8)
    # "[" and "{" differ only in the bit 0x20.
    brackets = np.flatnonzero(codes | 0x20 == ord("{"))
    counts = np.searchsorted(brackets, [*accumulate(map(len, texts), initial=0)])
    if (counts[1:] - counts[:-1]).max() > MAX_DEPTH:
        return False
    dumped = orjson.dumps(values)
    if dumped == b"[%s]" % b",".join([text.rstrip() for text in texts]):
        return True
    if _has_quote_escape(codes) or _count_quotes(codes) != _count_quotes(np.frombuffer(dumped, np.uint8)):
        return False
    # orjson converts integers beyond 64 bits to floats. Such an integer has at least 19 digits, so among every fourth
    # character of the text, four consecutive characters are digits.
    are_digits = codes[::4] - ord("0") < 10
    are_pairs = are_digits[1:] & are_digits[:-1]
    may_have_long_number = bool((are_pairs[2:] & are_pairs[:-2]).any())
    return not (may_have_long_number and _LONG_NUMBER in joined.translate(_DIGITS))


def _has_quote_escape(codes: NDArray[np.uint8]) -> bool:
    """Return whether a text contains the escape of a quote, `u0022` after a backslash."""
    first, second = _QUOTE_ESCAPE[:2]
    candidates = np.flatnonzero((codes[:-1] == first) & (codes[1:] == second))
    for distance, code in enumerate(_QUOTE_ESCAPE):
        candidates = candidates[codes.take(candidates + distance, mode="clip") == code]
    return len(candidates) > 0


def _count_quotes(codes: NDArray[np.uint8]) -> int:
    # This is five times as fast as `bytes.count`.
    return int(np.count_nonzero(codes == ord('"')))


def _count_keys(value: Any, depth: int = 1) -> tuple[int, bool]:
    """Count the keys in a JSON value. Also return whether the value contains floats."""
    if depth > MAX_DEPTH:
        raise _too_deep_fault()
    keys, has_floats = len(value) if type(value) is dict else 0, type(value) is float
    items = value.values() if type(value) is dict else value if type(value) is list else ()
    for item in items:
        kind = type(item)
        if kind is str:
            continue
        if kind is dict or kind is list:
            inner_keys, has_inner_floats = _count_keys(item, depth + 1)
            keys, has_floats = keys + inner_keys, has_floats or has_inner_floats
        elif kind is float:
            has_floats = True
    return keys, has_floats


def _parse_with_json(text: bytes, source: Source, error: orjson.JSONDecodeError | None, *, whole_line: bool) -> Any:
    # Unlike orjson, the json module accepts NaN, which is harmless in columns that are not trained on.
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as fault:
        raise _Fault("encoding", *describe_invalid_utf8(text[fault.start : fault.start + 3], fault.start)) from None
    except UnicodeEncodeError:
        message = "the row contains an escaped lone surrogate, which is not a valid character"
        raise _Fault("lone_surrogate", message) from None
    except ValueError:
        assert error is not None  # text that orjson accepts is valid for the json module
        line = (source.line or 1) + error.lineno - 1
        position = f"line {line}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        if error.lineno == 1 and not whole_line:
            position = f"byte {(source.offset or 0) + len(error.doc[: error.pos].encode())}"
        raise _Fault("json", f"the row is not valid JSON at {position}: {error.msg}") from None
    return value


def describe_invalid_utf8(invalid: bytes, offset: int) -> tuple[str, str]:
    """Return an error message and a fix for text that is invalid in UTF-8 or in the encoding of the file.

    Args:
        invalid: up to three bytes from the first invalid byte on.
        offset: offset of the first invalid byte in the row.
    """
    surrogate = invalid.decode("utf-8", "surrogatepass") if _SURROGATE.fullmatch(invalid) else ""
    if "\udc80" <= surrogate <= "\udcff":
        reason = f"is not valid text in the encoding of the file: byte 0x{ord(surrogate) - 0xDC00:02x}"
        return reason, "pass a different encoding"
    reason = f"is not UTF-8 text: byte 0x{invalid[0]:02x} at offset {offset} of the row"
    return reason, "pass the encoding of the file, e.g. encoding='cp1252'"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Fault("duplicate_key", f"an object contains the key {repeated!r} more than once")
    return value


def _may_repeat_keys(text: bytes, value: Any, keys: int) -> bool:
    """Return whether an object in the text may contain a key twice. For such a key, orjson keeps only the last value.

    The text of a key ends with a quote and a colon, so a repeated key causes more such pairs than there are keys.
    """
    pairs = len(_KEY.findall(text))
    if pairs == keys:
        return False
    # Strings may contain such pairs, too; they remain when the value is serialized again.
    is_hidden = b"\\u00" in text and any(escape in text for escape in _ESCAPES)
    return is_hidden or pairs != len(_KEY.findall(orjson.dumps(value)))


def _raw_text(text: bytes) -> str:
    return text[:_RAW_LIMIT].decode("utf-8", "backslashreplace").rstrip("\r\n")
