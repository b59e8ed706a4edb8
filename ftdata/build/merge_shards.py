"""Merge the results of all shards into counts per source, a table of all examples, and the rejected rows.

Shards that are parts of the same file become one source again: their counts are added, and row and line numbers are
counted from the beginning of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from ftdata.build.ledger import Ledger
from ftdata.build.shard_files import ExampleTable, FileOffset, read_rejects
from ftdata.build.shards import ShardResult
from ftdata.readers import FileSource, MemorySource
from ftdata.readers.json_rows import no_rows_error
from ftdata.redaction import redact_for_storage
from ftdata.types import Reject


@dataclass(frozen=True)
class MergedShards:
    """The merged results of all shards of a build, in the order of the data."""

    results: Sequence[ShardResult]

    @cached_property
    def source_numbers(self) -> list[int]:
        """For each shard, the index of its source in `sources`."""
        numbers = [0] if self.results else []
        for previous, current in pairwise(self.results):
            numbers.append(numbers[-1] + (not _is_next_part(previous.task.source, current.task.source)))
        return numbers

    @cached_property
    def sources(self) -> list[FileSource | MemorySource]:
        """The sources of the build. A file that is read in several parts is represented by its first part."""
        return [self.results[first].task.source for first in self._first_shards]

    @cached_property
    def _first_shards(self) -> list[int]:
        sources = self.source_numbers
        return [number for number, source in enumerate(sources) if number == 0 or source != sources[number - 1]]

    @cached_property
    def ledgers(self) -> tuple[Ledger, ...]:
        """For each source, the sums of the counts of its shards.

        Raises:
            InputRefused: a source has no rows.
        """
        ledgers = [Ledger(redact_for_storage(source.path)) for source in self.sources]
        for number, result in zip(self.source_numbers, self.results, strict=True):
            ledgers[number].join(result.ledger)
        for source, ledger in zip(self.sources, ledgers, strict=True):
            if not ledger.read and isinstance(source, FileSource) and source.span is not None:
                raise no_rows_error(source.path)
        return tuple(ledgers)

    @cached_property
    def offsets(self) -> list[FileOffset]:
        """For each shard, the number of rows and lines that precede it in its file."""
        offsets, offset, first_shards = list[FileOffset](), FileOffset(), set(self._first_shards)
        for number, result in enumerate(self.results):
            if number in first_shards:
                offset = FileOffset()
            offsets.append(offset)
            offset = FileOffset(offset.rows + result.ledger.read, offset.lines + (result.lines or 0))
        return offsets

    @cached_property
    def examples(self) -> ExampleTable:
        """The table of the examples of all shards.

        Raises:
            InternalError: the counts of a ledger differ from the written files.
        """
        table = ExampleTable.open([result.folder for result in self.results], self.offsets)
        shards = len(self.results)
        counts, tokens = np.bincount(table.shard, minlength=shards), np.bincount(table.shard, table.lengths, shards)
        for result, *written in zip(self.results, counts.tolist(), tokens.tolist(), strict=True):
            result.ledger.check(written[0], int(written[1]), sum(1 for _ in read_rejects(result.folder)))
        return table

    def rejects(self) -> Iterator[Reject]:
        """Yield the rejected rows of all shards."""
        for result, offset in zip(self.results, self.offsets, strict=True):
            if result.ledger.rejected:
                yield from read_rejects(result.folder, offset)


def _is_next_part(part: FileSource | MemorySource, other: FileSource | MemorySource) -> bool:
    """Return whether `part` and `other` are parts of the same file, and `other` directly follows `part`."""
    if not isinstance(part, FileSource) or not isinstance(other, FileSource) or part.span is None or other.span is None:
        return False
    return part.path == other.path and part.span[1] == other.span[0] and part.item_index == other.item_index
