"""Where each row of a JSON text begins and ends, by its brackets outside strings, in one pass over parts of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import orjson

from ftdata.errors import InputRefused

_STRING = rb'[^"\\]*+(?:\\.[^"\\]*+)*+'
_OUTSIDE = rb'(?:[^"{}\[\]]++|"' + _STRING + rb'")*+'
_BRACKET = re.compile(_OUTSIDE + rb"[{}\[\]]", re.DOTALL)
_SKIP = re.compile(_OUTSIDE, re.DOTALL)
_REST = re.compile(_STRING + rb'("?)', re.DOTALL)
_KEY = re.compile(rb'("' + _STRING + rb'")(\s*:)?', re.DOTALL)
_MESSAGE_KEYS = {"role", "from", "speaker"}
COLUMNS = {"question", "answer", "instruction", "output", "prompt", "completion", "response", "chosen", "rejected"}
COLUMNS |= {"text", "messages", "conversations", "conversation", "input_ids", "labels"}
"""Columns of rows of known shapes: what has one is a row itself."""

_CERTAIN = (
    ("question", "answer"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
)
"""Columns that only rows have."""

MAX_GAP = 1 << 20
"""Bytes that may stand between two rows."""


@dataclass(frozen=True, slots=True)
class JsonPiece:
    """A row, with what stood between it and the row before; the last piece has no row, and a size of 0.

    Attributes:
        gap: bytes before the row.
        text: the row; `None` if it is longer than the limit.
        size: bytes of the row.
        line: the physical line where it begins, from 1.
        offset: the byte where it begins, from 0.
        listed: whether it stands in a list, where commas are between rows.
    """

    gap: bytes
    text: bytes | None
    size: int
    line: int
    offset: int
    listed: bool = False


def scan_json(parts: Iterable[bytes], path: str, limit: int, under: str | None = None) -> Iterator[JsonPiece]:
    """Yield the rows of a JSON text that comes in parts: elements of a top-level array, or else top-level values.

    Args:
        parts: the text.
        path: how errors name it.
        limit: bytes of the longest row that is kept.
        under: a key; a row is then an element of the array that lies under it, in the one object that the text is.

    Raises:
        InputRefused: the text ends inside a row, or is none.
    """
    cutter = _Cutter(path, limit, under)
    for part, brackets in _brackets(parts):
        yield from cutter.cut(part, brackets)
    yield cutter.last()


def json_depth(text: bytes) -> int:
    """Return how deep a JSON text is nested."""
    depth = deepest = 0
    for at in next(_brackets([text]))[1]:
        depth += 1 if text[at] in b"{[" else -1
        deepest = max(depth, deepest)
    return deepest


@dataclass(frozen=True, slots=True)
class Outline:
    """What the first object of a text holds: its keys, and the first element of each list in it.

    `end` is where it ends, `None` if it does not in what was read.
    """

    keys: tuple[str, ...]
    lists: Mapping[str, bytes]
    end: int | None

    def key_of_rows(self, path: str) -> str | None:
        """Return the key under which rows lie, if this is no row itself.

        A row has a list of messages, or another column that rows have.

        Raises:
            InputRefused: rows lie under several keys.
        """
        firsts = {name: _first(text) for name, text in self.lists.items()}
        if any(_MESSAGE_KEYS & set(first) for first in firsts.values()):
            return None
        with_rows = [name for name, first in firsts.items() if first]
        if not with_rows:
            return None
        if own := COLUMNS & set(self.keys) - set(with_rows):
            if any(_is_row(first) for first in firsts.values()):
                found = f"has columns of a row ({', '.join(sorted(own))}), and rows under {with_rows[0]!r}"
                hint = "which of them are the rows? write those to a file of their own"
                raise InputRefused("several_lists", found, where=path, hint=hint)
            return None
        if len(with_rows) > 1:
            raise _several(with_rows, path)
        return with_rows[0]


def _is_row(value: Mapping[str, object]) -> bool:
    return any(set(columns) <= set(value) for columns in _CERTAIN)


def scan_outline(parts: Iterable[bytes]) -> Outline:
    """Look at the first object of a text that comes in parts; no more of them are taken than that takes."""
    text = bytearray()
    depth = start = before = opened = 0
    key, keys, lists = "", list[str](), dict[str, bytes]()
    for part, brackets in _brackets(parts):
        start = len(text)
        text += part
        for at in (start + bracket for bracket in brackets):
            if depth == 1:
                keys += _keys(text[before:at])
            before = at + 1
            if text[at] in b"{[":
                if depth == 1:
                    key = keys[-1] if text[at] in b"[" and keys else ""
                opened = at if depth == 2 else opened
                depth += 1
                continue
            depth -= 1
            if depth == 2 and key and key not in lists:
                lists[key] = bytes(text[opened:before])
            if depth == 0:
                return Outline(tuple(keys), lists, before)
    return Outline(tuple(keys), lists, None)


def _several(keys: Iterable[str], path: str) -> InputRefused:
    return InputRefused(
        "several_lists",
        f"holds rows under several keys: {', '.join(keys)}",
        where=path,
        hint="write each to a file of its own, e.g. with jq",
    )


def _first(text: bytes) -> Mapping[str, object]:
    """Return the first element of a list, if it is an object."""
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _keys(text: bytes | bytearray) -> list[str]:
    """Return the keys in a stretch of an object without brackets."""
    return [str(_string(found[1])) for found in _KEY.finditer(text) if found[2]]


def _string(text: bytes) -> str | None:
    try:
        return str(orjson.loads(text))
    except orjson.JSONDecodeError:
        return None


def _brackets(parts: Iterable[bytes]) -> Iterator[tuple[bytes, list[int]]]:
    """Yield each part, with the places of the brackets in it that stand outside strings."""
    in_string = escaped = False
    for part in parts:
        at, found = 0, list[int]()
        if in_string:
            rest = _REST.match(part, int(escaped))
            assert rest is not None  # it matches nothing, too
            in_string, at = not rest[1], rest.end()
            escaped = at < len(part)
        if not in_string:
            while bracket := _BRACKET.match(part, at):
                at = bracket.end()
                found.append(at - 1)
            tail = _SKIP.match(part, at)
            assert tail is not None  # it matches nothing, too
            if in_string := tail.end() < len(part):
                rest = _REST.match(part, tail.end() + 1)
                escaped = rest is not None and rest.end() < len(part)
        yield part, found


_NEVER_CLOSED = 1_000_000


@dataclass(slots=True)
class _Cutter:
    path: str
    limit: int
    under: str | None
    depth: int = 0
    row_depth: int = 0
    inside: bool = False
    """whether rows can begin here"""
    in_row: bool = False
    gap: bytes = b""
    row: list[bytes] = field(default_factory=list)
    size: int = 0
    line: int = 1
    offset: int = 0
    other: str = ""
    """the key of another list than that of the rows"""
    ended: tuple[int, int] | None = None
    """the line and the offset where the list of rows ended"""
    begun: tuple[int, int] = (1, 0)
    """the line and the offset where the row at hand begins"""
    closed: bool = False
    """whether the object around the list of rows has ended"""
    between: bytes = b""
    """what stood since the last bracket, in the object around the list of rows"""

    def __post_init__(self) -> None:
        self.inside = self.under is None

    def cut(self, part: bytes, brackets: Iterable[int]) -> Iterator[JsonPiece]:
        """Yield the rows that end in this part."""
        mark = counted = before = 0
        for at in brackets:
            key = _keys(self.between + part[before:at])[-1:] if self.around else []
            self.between, before = b"", at + 1
            if part[at] in b"{[":
                if self._begins(part[at]):
                    self.in_row, self.gap = True, self.gap + part[mark:at]
                    self.line += part.count(b"\n", counted, at)
                    self.begun = self.line, self.offset + at
                    mark = counted = at
                elif self.under is not None and self._enters(part[at], key):
                    self.inside, self.row_depth, mark = True, 2, at + 1
                self.depth += 1
                continue
            self._close(part[at], at)
            if self.in_row and self.depth == self.row_depth:
                self._keep(part[mark : at + 1])
                mark = at + 1
                yield self._whole()
            elif self.under is not None and self.inside and self.depth == 1:
                self.inside, self.gap = False, self.gap + part[mark:at]
                self.ended = self.line + part.count(b"\n", counted, at), self.offset + at
        if self.depth > _NEVER_CLOSED:
            found = f"opens {self.depth:,} brackets, one in another: this is no data"
            raise InputRefused("too_deep", found, where=f"{self.path}:{self.begun[0]}")
        self._pass(part, mark, before)
        self.line += part.count(b"\n", counted)
        self.offset += len(part)

    @property
    def around(self) -> bool:
        """Whether this is in the object around the list of rows."""
        return self.under is not None and self.depth < 2 and not self.inside

    def _pass(self, part: bytes, mark: int, before: int) -> None:
        """Keep what a part ends with."""
        if self.in_row:
            self._keep(part[mark:])
        elif self.inside:
            self.gap += part[mark:]
        if self.around:
            self.between += part[before:]
        if len(self.gap) > MAX_GAP or len(self.between) > MAX_GAP:
            place = f"{self.path}:{self.line}"
            raise InputRefused("not_rows", f"holds {MAX_GAP:,} bytes and more that are no object or list", where=place)

    def last(self) -> JsonPiece:
        if self.depth:
            found = "the JSON ends inside the row that begins here: a bracket or a quote is never closed"
            line = self.begun[0]
            if not self.in_row:
                found, line = "the JSON ends before the list of its rows does: a bracket is never closed", self.line
            hint = "write the file again, it looks cut off"
            raise InputRefused("partial_file", found, where=f"{self.path}:{line}", hint=hint)
        if self.under is not None and self.between.strip():
            raise self._goes_on()
        return JsonPiece(self.gap, None, 0, *(self.ended or (self.line, self.offset)), self.under is not None)

    def _close(self, symbol: int, at: int) -> None:
        """Go one level up; brackets around rows must be closed by their own kind."""
        in_list = self.row_depth > 0 and not self.in_row and self.inside
        if self.depth == 0 or (in_list and self.depth == self.row_depth and symbol not in b"]"):
            place = f"{self.path}:{self.line}"
            found = f"has {chr(symbol)!r} where none is open, at byte {self.offset + at}"
            raise InputRefused("partial_file", found, where=place, hint="this is not valid JSON: write the file again")
        self.depth -= 1
        self.closed = self.depth == 0

    def _goes_on(self) -> InputRefused:
        return InputRefused(
            "not_rows",
            f"goes on after the object whose {self.under!r} holds the rows",
            where=f"{self.path}:{self.line}",
            hint="one object with rows in it, or rows one after another",
        )

    def _enters(self, symbol: int, key: list[str]) -> bool:
        """Whether this opens the list of rows; another list of rows than that is refused."""
        if self.depth == 0 and self.closed:
            raise self._goes_on()
        if self.depth == 1 and key == [self.under] and self.ended:
            raise _several((str(self.under), str(self.under)), self.path)
        if self.depth == 1:
            self.other = key[0] if key and symbol in b"[" and key != [self.under] else ""
            return key == [self.under] and symbol in b"["
        if self.depth == 2 and self.other and symbol in b"{":
            raise _several((str(self.under), self.other), self.path)
        return False

    def _begins(self, symbol: int) -> bool:
        if self.depth == 0 and self.under is None:
            self.row_depth = int(symbol in b"[")
        return self.inside and self.depth == self.row_depth

    def _keep(self, text: bytes) -> None:
        self.size += len(text)
        if self.size <= self.limit:
            self.row.append(text)
        else:
            self.row.clear()

    def _whole(self) -> JsonPiece:
        text = b"".join(self.row) if self.size <= self.limit else None
        piece = JsonPiece(self.gap, text, self.size, *self.begun, self.row_depth > 0)
        self.in_row, self.gap, self.size = False, b"", 0
        self.row.clear()
        return piece
