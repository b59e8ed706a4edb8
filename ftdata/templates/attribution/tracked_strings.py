"""Strings that remember who wrote them.

A `TrackedString` is a `str` that carries, for each stretch of its characters, the owner who wrote it: 0 for the
template, anything else for a field of the row. The operations that templates use (`+`, `~`, slices, `strip`,
`split`, `replace`, `join`, loops, `tojson`) keep the memory; any other operation yields a plain string, which
belongs to the template. Where the memory is lost, the row's text seems not to arrive: such rows are flagged, or
refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any, Self, SupportsIndex

from markupsafe import Markup

Run = tuple[int, int]
"""(number of characters, owner)"""

BLOCK = 40
"""The bits of an owner from here on number the `{% generation %}` block that the text stands in (0: none)."""


class TrackedString(str):
    """A string with the owners of its characters in `runs`, which tile it."""

    __slots__ = ("runs",)
    runs: tuple[Run, ...]

    def __new__(cls, text: str, runs: Iterable[Run] | None = None) -> Self:
        """Make a string whose characters belong to the owners in `runs`, by default the template."""
        self = super().__new__(cls, text)
        self.runs = (((len(text), 0),) if text else ()) if runs is None else tuple(runs)
        return self

    @classmethod
    def of(cls, text: str) -> TrackedString:
        """Return `text` itself if it is tracked, else as the template's own."""
        return text if isinstance(text, TrackedString) else cls(text)

    def in_block(self, number: int) -> TrackedString:
        """Return the string with the block number set in every owner."""
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
                return self._cut(start, max(start, stop))
            return concat_tracked(self[i] for i in range(start, stop, step))
        index = int(key) + (len(self) if int(key) < 0 else 0)
        if not 0 <= index < len(self):
            message = "string index out of range"
            raise IndexError(message)
        return self._cut(index, index + 1)

    def _cut(self, start: int, stop: int) -> TrackedString:
        runs: list[Run] = []
        at = 0
        for length, owner in self.runs:
            taken = min(stop, at + length) - max(start, at)
            if taken > 0:
                runs.append((taken, owner))
            at += length
        return TrackedString(str.__getitem__(self, slice(start, stop)), runs)

    def strip(self, chars: str | None = None, /) -> str:
        """As `str.strip`."""
        return TrackedString.of(self.lstrip(chars)).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> str:
        """As `str.lstrip`."""
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        """As `str.rstrip`."""
        return self._cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> str:
        """As `str.removeprefix`."""
        return self._cut(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        """As `str.removesuffix`."""
        return self._cut(0, len(str.removesuffix(self, suffix)))

    def upper(self) -> str:
        """As `str.upper`."""
        return self._recased(str.upper)

    def lower(self) -> str:
        """As `str.lower`."""
        return self._recased(str.lower)

    def capitalize(self) -> str:
        """As `str.capitalize`."""
        return self._recased(str.capitalize)

    def title(self) -> str:
        """As `str.title`."""
        return self._recased(str.title)

    def casefold(self) -> str:
        """As `str.casefold`."""
        return self._recased(str.casefold)

    def swapcase(self) -> str:
        """As `str.swapcase`."""
        return self._recased(str.swapcase)

    def _recased(self, change: Callable[[str], str]) -> str:
        text = change(str.__str__(self))
        if len(text) == len(self):
            return TrackedString(text, self.runs)
        # A few letters change their number (ß, ŉ), whatever follows them.
        ends = [len(change(str.__getitem__(self, slice(at)))) for at in accumulate(length for length, _ in self.runs)]
        return TrackedString(
            text, [(b - a, owner) for a, b, (_, owner) in zip([0, *ends], ends, self.runs, strict=False)]
        )

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str.split`."""
        return self._located(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str.rsplit`."""
        return self._located(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        """As `str.splitlines`."""
        return self._located(str.splitlines(self, keepends), None)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """As `str.partition`."""
        before, middle, after = self._located(str.partition(self, sep), "")
        return before, middle, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """As `str.rpartition`."""
        before, middle, after = self._located(str.rpartition(self, sep), "")
        return before, middle, after

    def _located(self, pieces: Iterable[str], sep: str | None) -> list[str]:
        # Pieces come in order, `sep` apart. Where there is no `sep` they are apart by white space, which is
        # in no piece, so the next occurrence is the right one.
        found: list[str] = []
        at = 0
        for piece in pieces:
            start = str.find(self, piece, at) if sep is None else at
            found.append(self._cut(start, start + len(piece)))
            at = start + len(piece) + len(sep or "")
        return found

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        """As `str.replace`; what is put in keeps its own owners."""
        if not old:
            return str.replace(self, old, new, count)
        return TrackedString.of(new).join(self.split(old, count))

    def join(self, pieces: Iterable[str], /) -> str:
        """As `str.join`."""
        parts: list[str] = []
        for piece in pieces:
            if parts and self:
                parts.append(self)
            parts.append(piece)
        return concat_tracked(parts)


class TrackedMarkup(Markup):
    """What Jinja's `safe` makes of a tracked string: it remembers where it is printed as it stands."""

    __slots__ = ("tracked",)
    tracked: TrackedString

    def __str__(self) -> str:
        return getattr(self, "tracked", str.__str__(self))


def mark_safe(text: str) -> Markup:
    """As Jinja's filter of that name."""
    marked = TrackedMarkup(text)
    marked.tracked = TrackedString.of(text)
    return marked


def concat_tracked(pieces: Iterable[str]) -> str:
    """Join strings, tracked or not, into a tracked one; neighbours of the same owner are one run, and none is empty.

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
    """Serialise `value` with `plain` (a `json.dumps` that does not sort), keeping the owners of what is in it.

    The strings are first replaced by noncharacters that name them, so that their places in the output are
    known; each is then put back as JSON escapes it, character by character. An object or a list that holds strings of
    one owner, and no others, is that owner's as a whole: brackets, numbers and all.

    Raises:
        ValueError: the value holds every noncharacter there is for this.
    """
    found = plain(value)
    mark = next(
        (chr(point) for point in range(0xFDD1, 0xFDF0) if not {chr(point), f"\\u{point:04x}"} & _parts(found)), None
    )
    if mark is None:
        message = "the data holds all noncharacters"
        raise ValueError(message)
    taken: list[TrackedString] = []

    def named(item: Any) -> Any:
        owners = _owners(item)
        if isinstance(item, TrackedString):
            taken.append(_escaped(item, plain))
        elif len(owners) == 1 and _NOBODY not in owners:
            whole = plain(_sorted(item) if sort_keys else item)
            taken.append(TrackedString(whole, ((len(whole), owners.pop()),)))
        elif isinstance(item, dict):
            pairs = sorted(item.items()) if sort_keys else item.items()
            return {named(key): named(inner) for key, inner in pairs}
        elif isinstance(item, list | tuple):
            return [named(inner) for inner in item]
        else:
            return item
        return f"{mark}{len(taken) - 1}{mark}"

    skeleton = plain(named(value)).replace(f"\\u{ord(mark):04x}", mark)
    return concat_tracked(_filled(skeleton, re.compile(f'"{mark}([0-9]+){mark}"'), taken))


def _filled(skeleton: str, places: re.Pattern[str], taken: list[TrackedString]) -> Iterator[str]:
    at = 0
    for place in places.finditer(skeleton):
        yield skeleton[at : place.start()]
        line = skeleton[skeleton.rfind("\n", 0, place.start()) + 1 : place.start()]
        margin = line[: len(line) - len(line.lstrip())]
        yield TrackedString.of(taken[int(place.group(1))]).replace("\n", f"\n{margin}")
        at = place.end()
    yield skeleton[at:]


_NOBODY = -1


def _owners(value: Any) -> set[int]:
    """Return who owns the strings in a JSON value; strings that are not tracked are nobody's."""
    if isinstance(value, TrackedString):
        return {owner for _, owner in value.runs}
    if isinstance(value, str):
        return {_NOBODY}
    inner = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(_owners, inner)) if inner else set()


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(inner) for key, inner in sorted(value.items())}
    return [_sorted(inner) for inner in value] if isinstance(value, list | tuple) else value


def _parts(text: str) -> set[str]:
    """Return the noncharacters in a JSON text, as they are or escaped."""
    return set(re.findall(r"[\ufdd0-\ufdef]|\\ufd[de][0-9a-f]", text))


def _escaped(text: TrackedString, plain: Callable[[Any], str]) -> TrackedString:
    whole = plain(str.__str__(text))
    runs: list[Run] = [(1, 0)]
    if len(whole) == len(text) + 2:
        runs += text.runs
    else:
        at = 0
        for length, owner in text.runs:
            runs.append((len(plain(str.__getitem__(text, slice(at, at + length)))) - 2, owner))
            at += length
    return TrackedString(whole, [*runs, (1, 0)])
