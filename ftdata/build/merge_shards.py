"""Merge: what shards report, each for itself, as one account of the data.

Shards that are parts of one file are one source again: what they counted is added up, and where a row stands is counted
from the beginning of the file.
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
    """All shards of a build, in the order of the data."""

    results: Sequence[ShardResult]

    @cached_property
    def of(self) -> list[int]:
        """The number of the source of each shard."""
        numbers = [0] if self.results else []
        for before, now in pairwise(self.results):
            numbers.append(numbers[-1] + (not _goes_on(before.task.source, now.task.source)))
        return numbers

    @cached_property
    def sources(self) -> list[FileSource | MemorySource]:
        """The sources; of one in parts, the first part."""
        return [self.results[first].task.source for first in self._firsts]

    @cached_property
    def _firsts(self) -> list[int]:
        return [number for number, of in enumerate(self.of) if number == 0 or of != self.of[number - 1]]

    @cached_property
    def ledgers(self) -> tuple[Ledger, ...]:
        """What became of the rows of each source.

        Raises:
            InputRefused: one has none.
        """
        found = [Ledger(redact_for_storage(source.path)) for source in self.sources]
        for number, result in zip(self.of, self.results, strict=True):
            found[number].join(result.ledger)
        for source, ledger in zip(self.sources, found, strict=True):
            if not ledger.read and isinstance(source, FileSource) and source.span is not None:
                raise no_rows_error(source.path)
        return tuple(found)

    @cached_property
    def before(self) -> list[FileOffset]:
        """What stands in its file before each shard."""
        found, sums, firsts = list[FileOffset](), FileOffset(), set(self._firsts)
        for number, result in enumerate(self.results):
            if number in firsts:
                sums = FileOffset()
            found.append(sums)
            sums = FileOffset(sums.rows + result.ledger.read, sums.lines + (result.lines or 0))
        return found

    @cached_property
    def examples(self) -> ExampleTable:
        """All examples.

        Raises:
            InternalError: a ledger does not add up to what was written.
        """
        found = ExampleTable.open([result.folder for result in self.results], self.before)
        shards = len(self.results)
        counts, tokens = np.bincount(found.shard, minlength=shards), np.bincount(found.shard, found.lengths, shards)
        for result, *written in zip(self.results, counts.tolist(), tokens.tolist(), strict=True):
            result.ledger.check(written[0], int(written[1]), sum(1 for _ in read_rejects(result.folder)))
        return found

    def rejects(self) -> Iterator[Reject]:
        """Yield the rows that were rejected."""
        for result, before in zip(self.results, self.before, strict=True):
            if result.ledger.rejected:
                yield from read_rejects(result.folder, before)


def _goes_on(one: FileSource | MemorySource, other: FileSource | MemorySource) -> bool:
    """Whether the other is the next part of the same file."""
    if not isinstance(one, FileSource) or not isinstance(other, FileSource) or one.span is None or other.span is None:
        return False
    return one.path == other.path and one.span[1] == other.span[0] and one.place == other.place
