"""Parts: a long file of lines, or of row groups, is read in several, which are planned from its size alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from ftdata.readers.arrow import parquet_group_sizes
from ftdata.readers.json_rows import is_line_format
from ftdata.readers.sources import FileSource, MemorySource, file_version
from ftdata.readers.streams import STDIN

PART = 64 << 20
"""Bytes of a part: some ten seconds of work, so that one that is lost is no great loss."""

MOST = 1 << 15
"""Parts of all files together, or longer ones are made: what is asked of a build for each of them stays little."""


def split_into_parts(found: Sequence[FileSource | MemorySource]) -> list[FileSource | MemorySource]:
    """Return the files, in their order, those that are longer than a part in parts.

    What is read of rows, and how they are numbered, does not depend on it: a part counts from its own beginning, and
    who reads them adds what came before.
    """
    part = max(PART, sum(one.size for one in found) // MOST)
    return [
        piece
        for one in found
        for piece in (_of_one_version(one, part) if isinstance(one, FileSource) and one.size > part else [one])
    ]


def _of_one_version(source: FileSource, part: int) -> list[FileSource]:
    known = file_version(source.path) if source.path != STDIN else None
    parts = list(_parts(source, part))
    return [replace(one, version=known) for one in parts] if len(parts) > 1 else parts


def _parts(source: FileSource, part: int) -> Iterator[FileSource]:
    if source.first or source.last is not None or source.path == STDIN:
        yield source
    elif source.reader == "parquet":
        yield from _groups(source, part)
    elif source.reader in ("json", "jsonl", "ndjson") and is_line_format(source.input, source.reader):
        size = source.size
        edges = [*range(0, size - part // 2, part), size]
        for first, last in pairwise(edges):
            yield replace(source, span=(first, last), length=last - first)
    else:
        yield source


def _groups(source: FileSource, part: int) -> Iterator[FileSource]:
    groups = parquet_group_sizes(source.input) or []
    before = list(accumulate(groups, initial=0))
    edges = [0]
    for number in range(1, len(groups) + 1):
        if before[number] - before[edges[-1]] >= part or number == len(groups):
            edges.append(number)
    if len(edges) < 3:
        yield source
        return
    for first, last in pairwise(edges):
        share = (before[last] - before[first]) / max(before[-1], 1)
        yield replace(source, span=(first, last), length=int(source.size * share))
