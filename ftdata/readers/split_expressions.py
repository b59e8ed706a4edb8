"""Splits: which rows of which files `train[:10%]+validation` means, as in `datasets`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ftdata.errors import UsageError

_PART = re.compile(r"\s*([^\s\[\]+:]+)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\]\s*)?")
_LONGEST_BOUND = 18
"""Characters of a row number: larger numbers are not row numbers of any data set."""


class SplitPart(NamedTuple):
    """Rows of one split: all of them, or from `start` on and up to `stop`: numbers, or percentages such as `-10%`."""

    name: str
    start: str | None = None
    stop: str | None = None

    @property
    def whole(self) -> bool:
        """Whether these are all rows."""
        return self.start is None and self.stop is None


def parse_split(split: str) -> tuple[SplitPart, ...]:
    """Return the parts of an expression.

    Raises:
        UsageError: it is none.

    >>> parse_split("train[:10%]+test")
    (SplitPart(name='train', start=None, stop='10%'), SplitPart(name='test', start=None, stop=None))
    """
    found = [_PART.fullmatch(part) for part in split.split("+")]
    bounds = [[bound for bound in one.groups()[1:] if bound] for one in found if one]
    percent = [[bound for bound in pair if bound.endswith("%")] for pair in bounds]
    mixed = any(len(some) not in (0, len(pair)) for some, pair in zip(percent, bounds, strict=True))
    too_long = any(len(bound) > _LONGEST_BOUND for pair in bounds for bound in pair)
    if not all(found) or mixed or too_long or any(abs(int(bound[:-1])) > 100 for some in percent for bound in some):
        hint = "e.g. train, train[:10%], train[100:200], train+validation"
        raise UsageError("split", f"split is {split!r}, which names no rows", hint=hint)
    return tuple(SplitPart(*one.groups()) for one in found if one)


def split_ranges(
    part: SplitPart, counts: Sequence[Callable[[int | None], int]]
) -> Iterator[tuple[int, int, int | None]]:
    """Yield the files that a part has rows of: number of the file, its first row, and the one after its last (or all).

    Args:
        part: rows of the split whose files these are, all together.
        counts: for each file: how many rows it has, or at most as many as asked for; files are counted only as far as
            must be.
    """
    begin, end = _bounds(part, counts)
    at = 0
    for number, count in enumerate(counts):
        first, last = max(begin - at, 0), None if end is None else end - at
        if last is not None and last <= first:
            return
        if first == 0 and last is None:
            yield number, 0, None
            continue
        size = count(first + 1 if last is None else last)
        if size > first:
            yield number, first, last
        at += size


def _bounds(part: SplitPart, counts: Sequence[Callable[[int | None], int]]) -> tuple[int, int | None]:
    if any(bound and (bound.startswith("-") or bound.endswith("%")) for bound in (part.start, part.stop)):
        total = sum(count(None) for count in counts)
        return slice(_row(part.start, total), _row(part.stop, total)).indices(total)[:2]
    return int(part.start or 0), None if part.stop is None else int(part.stop)


def _row(bound: str | None, total: int) -> int | None:
    if bound is None:
        return None
    # As `datasets` rounds.
    return round(int(bound[:-1]) * total / 100) if bound.endswith("%") else int(bound)
