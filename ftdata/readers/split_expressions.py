"""Parse split expressions such as `train[:10%]+validation`. The syntax is the same as in `datasets`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ftdata.errors import UsageError

_PART = re.compile(r"\s*([^\s\[\]+:]+)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\]\s*)?")
_LONGEST_BOUND = 18
"""Maximum number of characters in a bound. No data set has row numbers with more digits."""


class SplitPart(NamedTuple):
    """One part of a split expression: a complete split or a slice of its rows.

    Attributes:
        name: name of the split.
        start: first row of the slice, as a row number or a percentage such as `-10%`; `None` for the beginning.
        stop: end of the slice, exclusive; `None` for the end of the split.
    """

    name: str
    start: str | None = None
    stop: str | None = None

    @property
    def is_full_split(self) -> bool:
        """Whether the part contains all rows of the split."""
        return self.start is None and self.stop is None


def parse_split(split: str) -> tuple[SplitPart, ...]:
    """Parse a split expression such as `train[:10%]+test`, and return its parts.

    Raises:
        UsageError: The expression is invalid.

    >>> parse_split("train[:10%]+test")
    (SplitPart(name='train', start=None, stop='10%'), SplitPart(name='test', start=None, stop=None))
    """
    parts = [_parse_part(part) for part in split.split("+")]
    if None in parts:
        hint = "e.g. train, train[:10%], train[100:200], train+validation"
        raise UsageError("split", f"split is {split!r}, expected a valid split expression", hint=hint)
    return tuple(part for part in parts if part is not None)


def _parse_part(text: str) -> SplitPart | None:
    """Parse one part of a split expression. Return `None` if it is invalid, e.g. if it mixes rows and percentages."""
    match = _PART.fullmatch(text)
    if match is None:
        return None
    name, *bounds = match.groups()
    lengths = [len(bound) for bound in bounds if bound]
    percentages = [
        int(bound[:-1]) for bound in bounds if bound and bound.endswith("%") and len(bound) <= _LONGEST_BOUND
    ]
    has_valid_lengths = max(lengths, default=0) <= _LONGEST_BOUND and len(percentages) in (0, len(lengths))
    return (
        SplitPart(name, *bounds) if has_valid_lengths and all(-100 <= share <= 100 for share in percentages) else None
    )


def split_ranges(
    part: SplitPart, counts: Sequence[Callable[[int | None], int]]
) -> Iterator[tuple[int, int, int | None]]:
    """Find the files with the rows that `part` selects from a split. Yield each file with the range of rows to read.

    Args:
        part: a part of the split that consists of these files.
        counts: a function for each file that returns its number of rows, up to the number it is called with (`None`
            for no limit). Files are counted only as far as necessary.

    Yields:
        The index of the file, its first row, and the row after its last row (`None` for the end of the file).
    """
    start, stop = _resolve_bounds(part, counts)
    offset = 0
    for number, count in enumerate(counts):
        first, last = max(start - offset, 0), None if stop is None else stop - offset
        if last is not None and last <= first:
            return
        if first == 0 and last is None:
            yield number, 0, None
            continue
        size = count(first + 1 if last is None else last)
        if size > first:
            yield number, first, last
        offset += size


def _resolve_bounds(part: SplitPart, counts: Sequence[Callable[[int | None], int]]) -> tuple[int, int | None]:
    if any(bound and (bound.startswith("-") or bound.endswith("%")) for bound in (part.start, part.stop)):
        total = sum(count(None) for count in counts)
        return slice(_row_number(part.start, total), _row_number(part.stop, total)).indices(total)[:2]
    return int(part.start or 0), None if part.stop is None else int(part.stop)


def _row_number(bound: str | None, total: int) -> int | None:
    if bound is None:
        return None
    # Percentages are rounded as `datasets` rounds them.
    return round(int(bound[:-1]) * total / 100) if bound.endswith("%") else int(bound)
