"""Detect whether the quotes in a TSV file enclose cells or are part of the text."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice

from ftdata.readers.streams import MAX_LINE, STDIN, Input, is_url

_log = logging.getLogger(__name__)
_SAMPLE, _MAX_LINES, _MAX_TRIES = 1000, 10_000, 20
"""Lines to examine if the input can be read only once; maximum lines of a quoted cell; and the maximum number of
attempts to find the end of a row."""


def detect_quoting(file: Input, ahead: Iterable[bytes], delimiter: bytes) -> str:
    """Return the quoting of a file: `csv` or `none`. If the user did not specify the quoting, detect it.

    Args:
        file: the file. A local file is read to its end once.
        ahead: the first lines, for input that can be read only once.
        delimiter: the delimiter between cells.
    """
    if file.quoting is not None:
        return file.quoting
    if file.path == STDIN or is_url(file.path):
        counts = _count_cells(islice(ahead, _SAMPLE), delimiter)
    else:
        with file.text() as stream:
            counts = _count_cells(stream, delimiter)
    if _is_csv(counts):
        return "csv"
    message = (
        "%s: %d cells contain quotes that are not CSV quoting, so quotes are text; pass --quoting csv to change this"
    )
    _log.warning(message, file.path, counts["literal"])
    return "none"


def _is_csv(counts: Counter[str]) -> bool:
    """Return whether a file appears to use CSV quoting, in which quotes enclose cells."""
    return counts["needed"] >= counts["literal"] or counts["quoted"] > counts["plain"]


def _count_cells(lines: Iterable[bytes], delimiter: bytes) -> Counter[str]:
    """Count the cells in the lines of a file, grouped by how they use quotes.

    Returns:
        The number of `plain` cells without quotes; of quoted cells that are `needed`, because they contain a line
        break, the delimiter or a doubled quote; of other `quoted` cells; and of `literal` cells with quotes that are
        not CSV quoting, such as `say "hi"` or `"hi" she said`.
    """
    counts, pending = Counter[str](), list[bytes]()
    size = tries = 0
    for line in lines:
        text = line.rstrip(b"\r\n")
        # An open cell can end only in a line with a quote that is not doubled, so other lines are skipped.
        may_end = not pending or b'"' in text.replace(b'""', b"")
        pending.append(text)
        size, tries = size + len(line), tries + may_end
        row = _count_row(b"\n".join(pending) if len(pending) > 1 else text, delimiter) if may_end else None
        if row is None and (len(pending) > _MAX_LINES or size > MAX_LINE or tries > _MAX_TRIES):
            # A quote that is never closed is text.
            row = {"literal": 1}
        if row is not None:
            counts.update(row)
            pending, size, tries = [], 0, 0
    counts["literal"] += bool(pending)
    return counts


def _count_row(row: bytes, delimiter: bytes) -> Mapping[str, int] | None:
    """Count the cells of a row. If the row ends inside a quoted cell, return `None`."""
    if b'"' not in row:
        return {"plain": 1 + row.count(delimiter)}
    counts, start = Counter[str](), 0
    while start <= len(row):
        end = row.find(delimiter, start)
        end = len(row) if end < 0 else end
        kind = "literal" if b'"' in row[start:end] else "plain"
        if row[start : start + 1] == b'"':
            quote_end = _find_closing_quote(row, start + 1)
            if quote_end < 0:
                return None
            if row[quote_end : quote_end + len(delimiter)] in (delimiter, b""):
                content = row[start + 1 : quote_end - 1]
                is_needed = any(mark in content for mark in (delimiter, b"\n", b'""'))
                kind, end = ("needed" if is_needed else "quoted"), quote_end
        counts[kind] += 1
        start = end + len(delimiter)
    return counts


def _find_closing_quote(row: bytes, start: int) -> int:
    """Return the position after the closing quote of a cell. Return -1 if the cell has no closing quote."""
    while (start := row.find(b'"', start)) >= 0:
        if row[start + 1 : start + 2] != b'"':
            return start + 1
        start += 2
    return -1
