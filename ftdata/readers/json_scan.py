"""Split a JSON text into rows. A single pass over the text finds the brackets outside strings, which enclose rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import orjson

from ftdata.errors import InputRefused
from ftdata.readers.streams import MAX_VALUES
from ftdata.traces.formats import has_trace_columns

_STRING = rb'[^"\\]*+(?:\\.[^"\\]*+)*+'
_OUTSIDE = rb'(?:[^"{}\[\]]++|"' + _STRING + rb'")*+'
_BRACKET = re.compile(_OUTSIDE + rb"[{}\[\]]", re.DOTALL)
_SKIP = re.compile(_OUTSIDE, re.DOTALL)
_STRING_END = re.compile(_STRING + rb'("?)', re.DOTALL)
_KEY = re.compile(rb'("' + _STRING + rb'")(\s*:)?', re.DOTALL)
_MESSAGE_KEYS = {"role", "from", "speaker"}
COLUMNS = {"question", "answer", "instruction", "output", "prompt", "completion", "response", "chosen", "rejected"}
COLUMNS |= {"text", "messages", "conversations", "conversation", "input_ids", "labels"}
"""Columns of rows in known schemas. An object with such a column is a row."""

_ROW_COLUMNS = (
    ("question", "answer"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
)
"""Combinations of columns that only rows have."""

MAX_GAP = 1 << 20
"""Maximum number of bytes between two rows."""


@dataclass(frozen=True, slots=True)
class JsonPiece:
    """The text of a row, and the text between the previous row and this row.

    The last piece of a file has no row, so its `size` is 0.

    Attributes:
        gap: text between the previous row and this row.
        text: text of the row; `None` if it is longer than the limit.
        size: size of the row in bytes.
        line: physical line where the row begins, counted from 1.
        offset: byte where the row begins, counted from 0.
        listed: whether the row is an element of a list, in which rows are separated by commas.
    """

    gap: bytes
    text: bytes | None
    size: int
    line: int
    offset: int
    listed: bool = False


def scan_json(parts: Iterable[bytes], path: str, limit: int, under: str | None = None) -> Iterator[JsonPiece]:
    """Yield the rows of a JSON text. The rows are the elements of an array or, without an array, all top-level values.

    Args:
        parts: the text, in parts.
        path: path of the file, for errors.
        limit: maximum size in bytes of a row whose text is kept.
        under: key of the array that contains the rows, if the text is a single object.

    Raises:
        InputRefused: The text ends inside a row, or is not JSON.
    """
    splitter = _RowSplitter(path, limit, under)
    for part, brackets in _find_brackets(parts):
        yield from splitter.split(part, brackets)
    yield splitter.last_piece()


def json_depth(text: bytes) -> int:
    """Return the maximum nesting depth of a JSON text."""
    depth = deepest = 0
    for position in next(_find_brackets([text]))[1]:
        depth += 1 if text[position] in b"{[" else -1
        deepest = max(depth, deepest)
    return deepest


@dataclass(frozen=True, slots=True)
class Outline:
    """The keys and the lists of the first object in a JSON text.

    Attributes:
        keys: keys of the object.
        lists: text of the first element of each list in the object, by the key of the list.
        end: offset of the end of the object; `None` if the object is not complete in the text.
    """

    keys: tuple[str, ...]
    lists: Mapping[str, bytes]
    end: int | None

    def key_of_rows(self, path: str) -> str | None:
        """Return the key of the list that contains the rows. Return `None` if the object itself is a row.

        An object is a row if it has a list of messages, or another column of a row.

        Raises:
            InputRefused: Several lists may contain the rows.
        """
        first_elements = {name: _parse_object(text) for name, text in self.lists.items()}
        if any(_MESSAGE_KEYS & set(element) for element in first_elements.values()):
            return None
        if has_trace_columns(self.keys):
            return None
        row_keys = [name for name, element in first_elements.items() if element]
        if not row_keys:
            return None
        if columns := COLUMNS & set(self.keys) - set(row_keys):
            if any(_is_row(element) for element in first_elements.values()):
                names = ", ".join(sorted(columns))
                message = f"the object has columns of a row ({names}) and also a list of rows under {row_keys[0]!r}"
                hint = "write only the rows to a separate file"
                raise InputRefused("several_lists", message, where=path, hint=hint)
            return None
        if len(row_keys) > 1:
            raise _several_lists_error(row_keys, path)
        return row_keys[0]


def _is_row(value: Mapping[str, object]) -> bool:
    return any(set(columns) <= set(value) for columns in _ROW_COLUMNS)


def scan_outline(parts: Iterable[bytes]) -> Outline:
    """Find the keys and the lists of the first object in a JSON text.

    Only the parts of the text that contain the object are consumed.
    """
    text, depth = bytearray(), 0
    keys, lists = list[str](), dict[str, bytes]()
    list_key, element_start, bracket_end = "", 0, 0
    for part, brackets in _find_brackets(parts):
        part_start = len(text)
        text += part
        for position in (part_start + bracket for bracket in brackets):
            if depth == 1:
                # Between two brackets at depth 1, the text contains only keys and scalars of the object.
                keys += _find_keys(text[bracket_end:position])
            bracket_end = position + 1
            if text[position] in b"{[":
                if depth == 1:
                    list_key = keys[-1] if text[position] in b"[" and keys else ""
                elif depth == 2:
                    element_start = position
                depth += 1
                continue
            depth -= 1
            if depth == 2 and list_key and list_key not in lists:
                lists[list_key] = bytes(text[element_start:bracket_end])
            if depth == 0:
                return Outline(tuple(keys), lists, bracket_end)
    return Outline(tuple(keys), lists, None)


def _several_lists_error(keys: Iterable[str], path: str) -> InputRefused:
    message = f"the object contains rows under several keys: {', '.join(keys)}"
    hint = "write the rows of each key to a separate file, e.g. with jq"
    return InputRefused("several_lists", message, where=path, hint=hint)


def _parse_object(text: bytes) -> Mapping[str, object]:
    """Parse a JSON object. Return an empty mapping if the text is not a valid object."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _find_keys(text: bytes | bytearray) -> list[str]:
    """Return the keys in a part of the text of an object. The part must not contain brackets outside strings."""
    return [str(_parse_string(match[1])) for match in _KEY.finditer(text) if match[2]]


def _parse_string(text: bytes) -> str | None:
    try:
        return str(orjson.loads(text))
    except orjson.JSONDecodeError:
        return None


def _find_brackets(parts: Iterable[bytes]) -> Iterator[tuple[bytes, list[int]]]:
    """Yield each part of a JSON text, and the positions of the brackets in this part, except brackets in strings."""
    in_string = is_escaped = False
    for part in parts:
        position, positions = 0, list[int]()
        if in_string:
            position, in_string, is_escaped = _skip_string(part, int(is_escaped))
        if not in_string:
            while bracket := _BRACKET.match(part, position):
                position = bracket.end()
                positions.append(position - 1)
            tail = _SKIP.match(part, position)
            assert tail is not None  # the pattern also matches the empty string
            if tail.end() < len(part):
                # The pattern skips complete strings only, so the next character opens a string that this part cuts.
                _, in_string, is_escaped = _skip_string(part, tail.end() + 1)
        yield part, positions


def _skip_string(part: bytes, start: int) -> tuple[int, bool, bool]:
    """Find the end of the string that contains the position `start`.

    Returns:
        The position after the string, whether the string continues in the next part, and whether the last character of
        this part is a backslash that escapes the first character of the next part.
    """
    string_end = _STRING_END.match(part, start)
    assert string_end is not None  # the pattern also matches the empty string
    # The pattern stops before the end of the part at a closing quote, or at a backslash without a next character.
    return string_end.end(), not string_end[1], string_end.end() < len(part)


_MAX_OPEN_BRACKETS = 1_000_000


@dataclass(slots=True)
class _RowSplitter:
    """Splits a JSON text into rows. The text arrives in parts of any size.

    The rows are the elements of the list under the key `under`, or else the elements of top-level lists and all
    top-level objects outside lists.

    Attributes:
        path: path of the file, for errors.
        limit: maximum size in bytes of a row whose text is kept.
        under: key of the list that contains the rows; `None` for a top-level list or top-level values.
        depth: number of open brackets.
        row_depth: number of open brackets around a row: 0 for top-level values, 1 for elements of a top-level list, 2
            for elements of the list under a key.
        inside: whether a row can begin at the current position.
        in_row: whether the current position is in a row.
        gap: text since the last row.
        row: chunks of the current row.
        size: size in bytes of the current row so far.
        row_brackets: number of objects and lists in the current row so far.
        row_start: line and offset of the beginning of the current row.
        other_list: key of the current list, if it is not the list of rows.
        list_end: line and offset of the end of the list of rows.
        closed: whether the last top-level value has ended.
        between: text since the last bracket, in the object around the list of rows.
        part: the current part.
        offset: offset of the current part.
        mark: position in the part; the text before it is stored in a row or in the gap.
        counted: position in the part; the line breaks before it are counted.
        bracket_end: position in the part after the last bracket.
        line: physical line of the position `counted`, from 1.
    """

    path: str
    limit: int
    under: str | None
    depth: int = 0
    row_depth: int = 0
    inside: bool = False
    in_row: bool = False
    gap: bytes = b""
    row: list[bytes] = field(default_factory=list)
    size: int = 0
    row_brackets: int = 0
    row_start: tuple[int, int] = (1, 0)
    other_list: str = ""
    list_end: tuple[int, int] | None = None
    closed: bool = False
    between: bytes = b""
    part: bytes = b""
    offset: int = 0
    mark: int = 0
    counted: int = 0
    bracket_end: int = 0
    line: int = 1

    def __post_init__(self) -> None:
        self.inside = self.under is None

    def split(self, part: bytes, brackets: Iterable[int]) -> Iterator[JsonPiece]:
        """Process the next part of the text, and yield the rows that end in this part."""
        self.part, self.mark, self.counted, self.bracket_end = part, 0, 0, 0
        for position in brackets:
            if part[position] in b"{[":
                self._open_bracket(position)
            else:
                self._close_bracket(position)
                if self.in_row and self.depth == self.row_depth:
                    self._add_to_row(position + 1)
                    yield self._finish_row()
            self.between, self.bracket_end = b"", position + 1
        self._check_brackets()
        self._store_tail()
        self.line += part.count(b"\n", self.counted)
        self.offset += len(part)

    @property
    def is_around(self) -> bool:
        """Whether the current position is in the object that contains the list of rows, but outside the list."""
        return self.under is not None and self.depth < 2 and not self.inside

    def last_piece(self) -> JsonPiece:
        """Return the text after the last row. Check that the text is complete, and that no other text follows it."""
        if self.depth:
            message = "the file ends inside the row that begins here, because a bracket or a quote is not closed"
            line = self.row_start[0]
            if not self.in_row:
                message, line = "the file ends inside the list of rows, because a bracket is not closed", self.line
            hint = "write the file again, it is probably truncated"
            raise InputRefused("partial_file", message, where=f"{self.path}:{line}", hint=hint)
        if self.under is not None and self.between.strip():
            raise self._trailing_text_error()
        return JsonPiece(self.gap, None, 0, *(self.list_end or (self.line, self.offset)), self.under is not None)

    def _open_bracket(self, position: int) -> None:
        symbol = self.part[position]
        if self.depth == 0 and self.under is None:
            self.row_depth = int(symbol in b"[")
        if self.inside:
            if self.depth == self.row_depth:
                self._start_row(position)
        elif self._is_list_start(symbol, position):
            self.inside, self.row_depth, self.mark = True, 2, position + 1
        self.depth += 1

    def _is_list_start(self, symbol: int, position: int) -> bool:
        """Return whether a bracket opens the list that contains the rows.

        Raises:
            InputRefused: The object contains a second list of rows, or text follows the object.
        """
        if self.depth == 0 and self.closed:
            raise self._trailing_text_error()
        if self.depth == 1:
            keys = _find_keys(self.between + self.part[self.bracket_end : position])
            is_rows_key = keys[-1:] == [self.under]
            if is_rows_key and self.list_end:
                raise _several_lists_error((keys[-1], keys[-1]), self.path)
            self.other_list = keys[-1] if keys and symbol in b"[" and not is_rows_key else ""
            return is_rows_key and symbol in b"["
        if self.depth == 2 and self.other_list and symbol in b"{":
            raise _several_lists_error((str(self.under), self.other_list), self.path)
        return False

    def _close_bracket(self, position: int) -> None:
        """Decrease the nesting depth. Check that an opening bracket exists, and that `]` closes the list of rows."""
        symbol = self.part[position]
        ends_list = self.inside and not self.in_row and self.depth == self.row_depth
        if self.depth == 0 or (ends_list and symbol not in b"]"):
            where = f"{self.path}:{self.line}"
            message = f"the bracket {chr(symbol)!r} at byte {self.offset + position} has no matching opening bracket"
            raise InputRefused("partial_file", message, where=where, hint="write the file again")
        self.depth -= 1
        self.row_brackets += 1
        self.closed = self.depth == 0
        if ends_list and self.under is not None:
            self._add_to_gap(position)
            self.inside, self.list_end = False, self._find_place(position)

    def _find_place(self, position: int) -> tuple[int, int]:
        """Return the line and the offset in the file of a position in the current part."""
        return self.line + self.part.count(b"\n", self.counted, position), self.offset + position

    def _start_row(self, position: int) -> None:
        self._add_to_gap(position)
        self.in_row, self.row_start = True, self._find_place(position)
        self.line, self.counted = self.row_start[0], position

    def _finish_row(self) -> JsonPiece:
        text = b"".join(self.row) if self.size <= self.limit else None
        piece = JsonPiece(self.gap, text, self.size, *self.row_start, self.row_depth > 0)
        self.in_row, self.gap, self.size, self.row_brackets = False, b"", 0, 0
        self.row.clear()
        return piece

    def _add_to_gap(self, end: int) -> None:
        self.gap += self.part[self.mark : end]
        self.mark = end

    def _add_to_row(self, end: int) -> None:
        text = self.part[self.mark : end]
        self.mark = end
        self.size += len(text)
        if self.size <= self.limit:
            self.row.append(text)
        else:
            self.row.clear()

    def _check_brackets(self) -> None:
        where = f"{self.path}:{self.row_start[0]}"
        if self.depth > _MAX_OPEN_BRACKETS:
            message = f"the text has {self.depth:,} nested brackets, expected rows"
            raise InputRefused("too_deep", message, where=where)
        if self.in_row and self.row_brackets > MAX_VALUES:
            message = f"the row has more than {MAX_VALUES:,} objects and lists"
            raise InputRefused("row_too_long", message, where=where)

    def _store_tail(self) -> None:
        """Store the incomplete text at the end of a part. It is processed together with the next part."""
        if self.in_row:
            self._add_to_row(len(self.part))
        elif self.inside:
            self._add_to_gap(len(self.part))
        elif self.is_around:
            self.between += self.part[self.bracket_end :]
        if len(self.gap) > MAX_GAP or len(self.between) > MAX_GAP:
            where = f"{self.path}:{self.line}"
            message = f"the file contains at least {MAX_GAP:,} bytes between two rows, expected objects or lists"
            raise InputRefused("not_rows", message, where=where)

    def _trailing_text_error(self) -> InputRefused:
        message = f"the file has more text after the object that contains the rows under {self.under!r}"
        hint = "write a single object that contains the rows, or only rows"
        return InputRefused("not_rows", message, where=f"{self.path}:{self.line}", hint=hint)
