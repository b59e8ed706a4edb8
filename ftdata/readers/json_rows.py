"""Read JSON and JSON Lines files. The source of each row contains its line number and byte offset in the file.

The JSON reader accepts arrays, concatenated objects, column-oriented objects, and rows in a list under a key, with any
indentation. A scan for brackets outside strings determines where each row begins and ends; then each row is parsed
separately. Only the current row is in memory.
"""

from __future__ import annotations

import io
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import orjson

from ftdata.errors import InputRefused
from ftdata.readers.json_parse import RAW_BYTES, parse_each_line, parse_lines, parse_row, raw_text
from ftdata.readers.json_scan import COLUMNS, scan_json, scan_outline
from ftdata.readers.streams import CHUNK, MAX_LINE, Input, prepend, prepend_to_file, read_chunks
from ftdata.readers.traces import is_session_head
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

_MAX_BLOCK_LINES, _MAX_BLOCK_BYTES = 64, 1 << 16
"""Limits of the lines that are parsed together."""

_STRAY_VALUE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[^\s,\[\]"]+', re.DOTALL)
_PUNCTUATION = re.compile(rb"[\[\]]*|,")


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
        head = _read_head(stream)
        if is_session_head(head.removeprefix(_BOM)):
            return False
        return reader in ("jsonl", "ndjson") or (reader == "json" and _looks_like_lines(head))


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
    try:
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
    except Exception:  # whatever the stream raises, the lines before a damaged part of the file are rows
        yield from block.parse()
        raise
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
        size: maximum number of lines. It begins with 1, so that the first row of a slow stream is yielded immediately.
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
        return parse_lines(texts, sources) if characters <= 2 * _MAX_BLOCK_BYTES else parse_each_line(texts, sources)


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
    hint = "add rows to the file, or leave the file out"
    return InputRefused("no_rows", "the file contains no rows", where=path, hint=hint)


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
            raw = raw_text(piece.gap[position : position + RAW_BYTES])
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
    return Reject(source, "line_too_long", "", f"the row is too long: {size:,} bytes, expected at most {MAX_LINE:,}")
