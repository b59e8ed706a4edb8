"""Decide whether a file of tab-separated values uses the quotes of CSV, or whether quotes are part of its text."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from ftdata.readers.streams import MAX_LINE, STDIN, Input, is_url

QUOTINGS = ("csv", "none")
"""`csv`: a cell in quotes ends with a quote, and a quote in it is written twice; `none`: quotes are text."""

_log = logging.getLogger(__name__)
_SAMPLE, _FAR, _MOST_TRIES = 1000, 10_000, 20
"""Lines that are looked at of what can be read only once; lines that a cell in quotes may go on over; and how often the
end of a row is looked for."""


def detect_quoting(file: Input, ahead: Iterable[bytes], delimiter: bytes) -> str:
    """Return how a file is quoted: as the user says, or as all of its quotes show.

    Args:
        file: the file; what is on this machine is looked through once.
        ahead: the first lines, for what can be read only once.
        delimiter: what separates cells.
    """
    if file.quoting is not None:
        return file.quoting
    if file.path == STDIN or is_url(file.path):
        found = _Quotes.count(islice(ahead, _SAMPLE), delimiter)
    else:
        with file.text() as stream:
            found = _Quotes.count(stream, delimiter)
    if found.is_csv:
        return "csv"
    _log.warning(
        "%s: %d cells contain quotes as CSV does not write them: quotes are text; --quoting csv changes that",
        file.path,
        found.literal,
    )
    return "none"


@dataclass
class _Quotes:
    """Counts of the cells of a file.

    Attributes:
        needed: cells in quotes that need them: with a line break, the delimiter or a doubled quote inside.
        quoted: other cells in quotes.
        plain: cells without quotes.
        literal: cells with quotes that CSV would write otherwise, such as `say "hi"` or `"hi" she said`.
    """

    needed: int = 0
    quoted: int = 0
    plain: int = 0
    literal: int = 0

    @property
    def is_csv(self) -> bool:
        """Whether the quotes are those of CSV."""
        return not self.literal or self.needed >= self.literal or self.quoted > self.plain

    @classmethod
    def count(cls, lines: Iterable[bytes], delimiter: bytes) -> _Quotes:
        """Count the cells of lines."""
        found, begun = cls(), list[bytes]()
        size = tries = 0
        for line in lines:
            text = line.rstrip(b"\r\n")
            # An open cell can end only in a line with a quote that is not doubled: others are not looked at again.
            may_end = not begun or b'"' in text.replace(b'""', b"")
            begun.append(text)
            size, tries = size + len(line), tries + may_end
            if may_end and found._take(b"\n".join(begun) if len(begun) > 1 else text, delimiter):
                begun, size, tries = [], 0, 0
            elif len(begun) > _FAR or size > MAX_LINE or tries > _MOST_TRIES:
                # A quote that is never closed is text.
                found.literal += 1
                begun, size, tries = [], 0, 0
        found.literal += bool(begun)
        return found

    def _take(self, row: bytes, delimiter: bytes) -> bool:
        """Count the cells of a row; return `False`, and count none, if a cell in quotes goes on after it."""
        if b'"' not in row:
            self.plain += 1 + row.count(delimiter)
            return True
        counts, at = {"needed": 0, "quoted": 0, "plain": 0, "literal": 0}, 0
        while at <= len(row):
            end = row.find(delimiter, at)
            end = len(row) if end < 0 else end
            kind = "literal" if b'"' in row[at:end] else "plain"
            if row[at : at + 1] == b'"':
                closed = _closing(row, at + 1)
                if closed < 0:
                    return False
                if row[closed : closed + len(delimiter)] in (delimiter, b""):
                    inside = row[at + 1 : closed - 1]
                    is_needed = any(mark in inside for mark in (delimiter, b"\n", b'""'))
                    kind, end = ("needed" if is_needed else "quoted"), closed
            counts[kind] += 1
            at = end + len(delimiter)
        for kind, count in counts.items():
            setattr(self, kind, getattr(self, kind) + count)
        return True


def _closing(row: bytes, at: int) -> int:
    """Return the position after the quote that closes a cell, -1 if there is none."""
    while (at := row.find(b'"', at)) >= 0:
        if row[at + 1 : at + 2] != b'"':
            return at + 1
        at += 2
    return -1
