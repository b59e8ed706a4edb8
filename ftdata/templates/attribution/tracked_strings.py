"""A `str` subclass that records which field of the row each character comes from, or that it is template text.

A `TrackedString` is a `str` that also stores the owner of each range of its characters: 0 for the template, any other
number for a field of the row. The operations that templates use (`+`, `~`, slices, `strip`, `split`, `replace`,
`join`, loops, `tojson`) keep the owners. Any other operation returns a plain string, whose owner is the template. If
owners are lost, a field of the row seems to be missing from the rendered text, so the row is flagged or rejected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, pairwise
from typing import Any, Self, SupportsIndex

from markupsafe import Markup

Run = tuple[int, int]
"""(number of characters, owner)"""

BLOCK = 40
"""The position of the bits of an owner that contain the number of the `{% generation %}` block, or 0."""


class TrackedString(str):
    """A string that records which field of the row each character comes from, or that it is template text.

    Attributes:
        runs: (number of characters, owner) of each range of characters with the same owner. The ranges tile the string.
    """

    __slots__ = ("runs",)
    runs: tuple[Run, ...]

    def __new__(cls, text: str, runs: Iterable[Run] | None = None) -> Self:
        """Create a string. `runs` records where its characters come from. By default, they are template text."""
        self = super().__new__(cls, text)
        self.runs = (((len(text), 0),) if text else ()) if runs is None else tuple(runs)
        return self

    @classmethod
    def from_str(cls, text: str) -> TrackedString:
        """Mark a plain `str` as template text. If `text` is already a `TrackedString`, return it unchanged."""
        return text if isinstance(text, TrackedString) else cls(text)

    def in_block(self, number: int) -> TrackedString:
        """Return a copy in which every character is marked as part of the `{% generation %}` block `number`."""
        return TrackedString(str.__str__(self), ((length, owner | number << BLOCK) for length, owner in self.runs))

    def __str__(self) -> str:
        return self

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: str) -> str:
        return concat_tracked((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return concat_tracked((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> str:
        return TrackedString(str.__mul__(self, times), self.runs * max(int(times), 0))

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._slice(start, max(start, stop))
            return concat_tracked(self[i] for i in range(start, stop, step))
        index = int(key) + (len(self) if int(key) < 0 else 0)
        if not 0 <= index < len(self):
            raise IndexError("string index out of range")
        return self._slice(index, index + 1)

    def _slice(self, start: int, stop: int) -> TrackedString:
        runs: list[Run] = []
        position = 0
        for length, owner in self.runs:
            overlap = min(stop, position + length) - max(start, position)
            if overlap > 0:
                runs.append((overlap, owner))
            position += length
        return TrackedString(str.__getitem__(self, slice(start, stop)), runs)

    def strip(self, chars: str | None = None, /) -> str:
        """Apply `str.strip`. The result still records which field each character comes from."""
        return TrackedString.from_str(self.lstrip(chars)).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> str:
        """Apply `str.lstrip`. The result still records which field each character comes from."""
        return self._slice(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        """Apply `str.rstrip`. The result still records which field each character comes from."""
        return self._slice(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> str:
        """Apply `str.removeprefix`. The result still records which field each character comes from."""
        return self._slice(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        """Apply `str.removesuffix`. The result still records which field each character comes from."""
        return self._slice(0, len(str.removesuffix(self, suffix)))

    def upper(self) -> str:
        """Apply `str.upper`. The result still records which field each character comes from."""
        return self._change_case(str.upper)

    def lower(self) -> str:
        """Apply `str.lower`. The result still records which field each character comes from."""
        return self._change_case(str.lower)

    def capitalize(self) -> str:
        """Apply `str.capitalize`. The result still records which field each character comes from."""
        return self._change_case(str.capitalize)

    def title(self) -> str:
        """Apply `str.title`. The result still records which field each character comes from."""
        return self._change_case(str.title)

    def casefold(self) -> str:
        """Apply `str.casefold`. The result still records which field each character comes from."""
        return self._change_case(str.casefold)

    def swapcase(self) -> str:
        """Apply `str.swapcase`. The result still records which field each character comes from."""
        return self._change_case(str.swapcase)

    def _change_case(self, change: Callable[[str], str]) -> str:
        text = change(str.__str__(self))
        if len(text) == len(self):
            return TrackedString(text, self.runs)
        # A few characters (ß, ŉ) become several characters.
        ends = [len(change(str.__getitem__(self, slice(end)))) for end in accumulate(length for length, _ in self.runs)]
        runs = [(end - start, owner) for (start, end), (_, owner) in zip(pairwise([0, *ends]), self.runs, strict=True)]
        return TrackedString(text, runs)

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """Apply `str.split`. The results still record which field each character comes from."""
        return self._track_pieces(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """Apply `str.rsplit`. The results still record which field each character comes from."""
        return self._track_pieces(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        """Apply `str.splitlines`. The results still record which field each character comes from."""
        return self._track_pieces(str.splitlines(self, keepends), None)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """Apply `str.partition`. The results still record which field each character comes from."""
        before, middle, after = self._track_pieces(str.partition(self, sep), "")
        return before, middle, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """Apply `str.rpartition`. The results still record which field each character comes from."""
        before, middle, after = self._track_pieces(str.rpartition(self, sep), "")
        return before, middle, after

    def _track_pieces(self, pieces: Iterable[str], sep: str | None) -> list[str]:
        # The pieces are in order, with `sep` between them. Without `sep`, they are separated by whitespace, which
        # no piece contains, so the next occurrence of a piece is the correct one.
        tracked: list[str] = []
        position = 0
        for piece in pieces:
            start = str.find(self, piece, position) if sep is None else position
            tracked.append(self._slice(start, start + len(piece)))
            position = start + len(piece) + len(sep or "")
        return tracked

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        """Apply `str.replace`. The result still records which field each character comes from, even in new text."""
        if not old:
            return str.replace(self, old, new, count)
        return TrackedString.from_str(new).join(self.split(old, count))

    def join(self, pieces: Iterable[str], /) -> str:
        """Apply `str.join`. The result still records which field each character comes from."""
        parts: list[str] = []
        for piece in pieces:
            if parts and self:
                parts.append(self)
            parts.append(piece)
        return concat_tracked(parts)


class TrackedMarkup(Markup):
    """The result of Jinja's `safe` filter for a `TrackedString`. It also stores this `TrackedString`."""

    __slots__ = ("tracked",)
    tracked: TrackedString

    def __str__(self) -> str:
        return getattr(self, "tracked", str.__str__(self))


def mark_safe(text: str) -> Markup:
    """Apply Jinja's `safe` filter. The result still records which field each character comes from."""
    marked = TrackedMarkup(text)
    marked.tracked = TrackedString.from_str(text)
    return marked


def concat_tracked(pieces: Iterable[str]) -> str:
    """Concatenate strings. The result records which field each character comes from.

    Merge adjacent ranges that have the same owner.

    >>> concat_tracked(["a", "", TrackedString("bc", [(2, 9)]), "d", "e"]).runs
    ((1, 0), (2, 9), (2, 0))
    """
    texts: list[str] = []
    runs: list[Run] = []
    last = None
    for piece in pieces:
        texts.append(piece)
        for run in piece.runs if isinstance(piece, TrackedString) else ((len(piece), 0),):
            length, owner = run
            if owner == last:
                runs[-1] = (runs[-1][0] + length, owner)
            elif length:
                runs.append(run)
                last = owner
    return TrackedString("".join(texts), runs)


def dump_tracked_json(value: Any, plain: Callable[[Any], str], *, sort_keys: bool = False) -> str:
    """Serialize a JSON value to text that still records which field each character of its strings comes from.

    First, a number between two noncharacters replaces each string, which marks its position in the output. Then the
    escaped string replaces the number. If all strings of an object or a list have the same owner, this owner also owns
    the brackets and numbers of the object or list.

    Args:
        value: the JSON value.
        plain: a `json.dumps` that does not sort keys.
        sort_keys: whether to sort the keys of objects.

    Raises:
        ValueError: the value contains every noncharacter that could be used.
    """
    mark = _choose_mark(plain(value))
    strings: list[TrackedString] = []

    def replace_strings(item: Any) -> Any:
        """Replace each string, and each value whose strings have the same owner, by its number between two marks."""
        owners = _find_owners(item)
        if isinstance(item, TrackedString):
            strings.append(_escape(item, plain))
        elif len(owners) == 1 and _UNTRACKED not in owners:
            output = plain(_sort_keys(item) if sort_keys else item)
            strings.append(TrackedString(output, ((len(output), owners.pop()),)))
        elif isinstance(item, dict):
            pairs = sorted(item.items()) if sort_keys else item.items()
            return {replace_strings(key): replace_strings(inner) for key, inner in pairs}
        elif isinstance(item, list | tuple):
            return [replace_strings(inner) for inner in item]
        else:
            return item
        return f"{mark}{len(strings) - 1}{mark}"

    # `plain` may escape the marks.
    skeleton = plain(replace_strings(value)).replace(f"\\u{ord(mark):04x}", mark)
    return concat_tracked(_fill_skeleton(skeleton, mark, strings))


def _choose_mark(text: str) -> str:
    r"""Return a Unicode noncharacter that a JSON text does not contain, neither literally nor escaped as `\uXXXX`."""
    used = set(re.findall(r"[\ufdd0-\ufdef]|\\ufd[de][0-9a-f]", text))
    for point in range(0xFDD1, 0xFDF0):
        if used.isdisjoint({chr(point), f"\\u{point:04x}"}):
            return chr(point)
    raise ValueError("the data contains all Unicode noncharacters from U+FDD1 to U+FDEF, expected an unused one")


def _fill_skeleton(skeleton: str, mark: str, strings: list[TrackedString]) -> Iterator[str]:
    """Yield a JSON text in pieces, in which the marked numbers are replaced by the strings with these numbers."""
    position = 0
    for match in re.finditer(f'"{mark}([0-9]+){mark}"', skeleton):
        yield skeleton[position : match.start()]
        # An indented JSON value continues with the indentation of the line that contains its number.
        line_start = skeleton.rfind("\n", 0, match.start()) + 1
        line = skeleton[line_start : match.start()]
        indentation = line[: len(line) - len(line.lstrip())]
        yield TrackedString.from_str(strings[int(match[1])]).replace("\n", f"\n{indentation}")
        position = match.end()
    yield skeleton[position:]


_UNTRACKED = -1


def _find_owners(value: Any) -> set[int]:
    """Return the numbers of all fields that the strings in a JSON value come from.

    For a plain `str`, this number is unknown, so `_UNTRACKED` is returned instead.
    """
    if isinstance(value, TrackedString):
        return {owner for _, owner in value.runs}
    if isinstance(value, str):
        return {_UNTRACKED}
    inner = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(_find_owners, inner)) if inner else set()


def _sort_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sort_keys(inner) for key, inner in sorted(value.items())}
    return [_sort_keys(inner) for inner in value] if isinstance(value, list | tuple) else value


def _escape(text: TrackedString, plain: Callable[[Any], str]) -> TrackedString:
    """Return the JSON text of a string. Its quotes are template text; escaped characters keep their owners."""
    escaped = plain(str.__str__(text))
    runs: Iterable[Run] = text.runs
    quotes = len('""')
    if len(escaped) != len(text) + quotes:
        ends = list(accumulate(length for length, _ in text.runs))
        ranges = [str.__getitem__(text, slice(start, end)) for start, end in pairwise([0, *ends])]
        runs = [(len(plain(part)) - quotes, owner) for part, (_, owner) in zip(ranges, text.runs, strict=True)]
    return TrackedString(escaped, [(1, 0), *runs, (1, 0)])
