"""Split large JSON Lines and Parquet files into parts. The boundaries depend only on sizes, not on content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from ftdata.readers.json_rows import is_line_format
from ftdata.readers.sources import FileSource, MemorySource, file_version
from ftdata.readers.streams import STDIN

PART = 64 << 20
"""Bytes of a part. A part is about ten seconds of work, so little work is repeated if a part is lost."""

MAX_PARTS = 1 << 15
"""Maximum number of parts of all files together; parts are longer if there would be more. It limits the bookkeeping per
part in a build."""


def split_into_parts(sources: Sequence[FileSource | MemorySource]) -> list[FileSource | MemorySource]:
    """Split each large source file into several sources, with one source per part. The order of the sources is kept.

    The rows and their numbers do not depend on the parts: each part counts from its own beginning, and the caller adds
    the counts of the parts before it.
    """
    part_size = max(PART, sum(source.size for source in sources) // MAX_PARTS)
    parts: list[FileSource | MemorySource] = []
    for source in sources:
        if isinstance(source, FileSource) and source.size > part_size:
            parts += _parts_with_version(source, part_size)
        else:
            parts.append(source)
    return parts


def _parts_with_version(source: FileSource, part_size: int) -> list[FileSource]:
    version = file_version(source.path) if source.path != STDIN else None
    parts = list(_split_file(source, part_size))
    return [replace(part, version=version) for part in parts] if len(parts) > 1 else parts


def _split_file(source: FileSource, part_size: int) -> Iterator[FileSource]:
    if source.first or source.last is not None or source.path == STDIN:
        yield source
    elif source.reader == "parquet":
        yield from _split_row_groups(source, part_size)
    elif source.reader in ("json", "jsonl", "ndjson") and is_line_format(source.input, source.reader):
        edges = [*range(0, source.size - part_size // 2, part_size), source.size]
        for first, last in pairwise(edges):
            yield replace(source, span=(first, last), length=last - first)
    else:
        yield source


def _split_row_groups(source: FileSource, part_size: int) -> Iterator[FileSource]:
    from ftdata.readers.parquet import parquet_group_sizes

    groups = parquet_group_sizes(source.input) or []
    before = list(accumulate(groups, initial=0))
    edges = [0]
    for number in range(1, len(groups) + 1):
        if before[number] - before[edges[-1]] >= part_size or number == len(groups):
            edges.append(number)
    if len(edges) < 3:
        yield source
        return
    for first, last in pairwise(edges):
        share = (before[last] - before[first]) / max(before[-1], 1)
        yield replace(source, span=(first, last), length=int(source.size * share))
