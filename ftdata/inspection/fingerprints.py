"""Digests: a few bytes of each example, by which those of two sides are told from each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ftdata.inspection import stored_builds
from ftdata.inspection.survey import Progress
from ftdata.inspection.target import Target
from ftdata.pipeline.examples import Batch
from ftdata.types import Example

SAME, LABELS, TOKENS = "same", "labels differ", "tokens differ"
MOVED, REPEATED = "in another split", "another number of times"
ONLY_A, ONLY_B, NEITHER = "only in A", "only in B", "rejected by both"
KINDS = (SAME, LABELS, TOKENS, MOVED, REPEATED, ONLY_A, ONLY_B, NEITHER)

MOST_ROWS = 1 << 40
"""More than a source has; a row is known by the number of its source, times this, and its own."""


@dataclass(frozen=True)
class ExampleFingerprints:
    """What tells examples of one side from those of the other; uint64 `[examples]` each where nothing else is said.

    Attributes:
        paths: the names of the sources, by number.
        source: int64 `[examples]`, the number of the source of each.
        row: int64 `[examples]`, the number of the row there.
        split: hashes of the split.
        first: hashes of the tokens; across tokenizers, of the text.
        second: hashes of the labels; across tokenizers, of what is trained of the text.
        rejected: source and row of each that was rejected.
        tokens: how many there are on this side, and how many are trained.
    """

    paths: Sequence[str]
    source: NDArray[np.int64]
    row: NDArray[np.int64]
    split: NDArray[np.uint64]
    first: NDArray[np.uint64]
    second: NDArray[np.uint64]
    rejected: Sequence[tuple[int, int]]
    tokens: tuple[int, int]

    def by_row(self, keys: Mapping[str, int]) -> Rows:
        """Return the rows: their keys, what tells each from that of the other side, and where it comes first.

        Of several examples of a row the sums are told: in which order packs hold them is no difference.
        """
        own = np.asarray([keys[path] for path in self.paths], np.int64)
        rows, first, which, counts = np.unique(
            own[self.source] * MOST_ROWS + self.row, return_index=True, return_inverse=True, return_counts=True
        )
        sums = []
        for values in (self.first, self.second, self.split):
            sums.append(total := np.zeros(len(rows), np.uint64))
            np.add.at(total, which.reshape(-1), values)
        return rows, sums[0], sums[1], sums[2], counts.astype(np.uint64), first

    def rejected_as(self, keys: Mapping[str, int]) -> set[int]:
        """Return the keys of the rows that were rejected."""
        return {keys[self.paths[source]] * MOST_ROWS + row for source, row in self.rejected}


Rows = tuple[NDArray[Any], ...]


def match_sources(paths: Sequence[Sequence[str]]) -> list[dict[str, int]]:
    """Return, for each side, path -> a number, the same for what is the same source on both.

    Sources are matched by path; then by name, in order, where as many on each side have it; then what is left, if that
    is one on each side.
    """
    left, right = ([*dict.fromkeys(own)] for own in paths)
    keys = [{path: number for number, path in enumerate(left)}, dict[str, int]()]
    ways: tuple[Callable[[str], str], ...] = (str, os.path.abspath, os.path.basename, lambda _: "")
    for name in ways:
        open_a = [path for path in left if keys[0][path] not in keys[1].values()]
        open_b = [path for path in right if path not in keys[1]]
        for same in dict.fromkeys(map(name, open_b)):
            pair = [[path for path in own if name(path) == same] for own in (open_a, open_b)]
            if len(pair[0]) == len(pair[1]) and (name is not ways[-1] or len(pair[0]) == 1):
                keys[1] |= {b: keys[0][a] for a, b in zip(*pair, strict=True)}
    for path in right:
        keys[1].setdefault(path, len(left) + len(keys[1]))
    return keys


def fingerprint_examples(side: Target, progress: Progress | None, *, by_text: bool) -> ExampleFingerprints:
    """Go through a side once, and return what tells its examples; across tokenizers `by_text`."""
    columns: tuple[list[int], ...] = ([], [], [], [], [])
    paths, splits, rejected = dict[str, int](), [split for _, split in side.names], list[tuple[int, int]]()
    digests = [xxhash.xxh3_64_intdigest(split.encode()) for split in splits]
    rows = tokens = trained = 0
    for step in side.steps():
        batch = step.batch
        rows, tokens = rows + len(batch), tokens + int(batch.columns.lengths.sum())
        trained += int(batch.columns.trained_counts.sum())
        numbers = np.repeat(np.broadcast_to(step.source, len(batch.counts)), batch.counts).tolist()
        for one, number in zip(batch.columns.sources, numbers, strict=True):
            columns[0].append(paths.setdefault(one.path, len(paths)))
            columns[1].append(one.row)
            columns[2].append(digests[number])
        for pair in _texts(batch) if by_text else _tokens(batch):
            columns[3].append(pair[0])
            columns[4].append(pair[1])
        rejected += ((paths.setdefault(reject.source.path, len(paths)), reject.source.row) for reject in batch.rejects)
        if progress:
            progress(rows, tokens, step.share)
    for reject in stored_builds.read_build_rejects(side.folder) if side.folder else ():
        rejected.append((paths.setdefault(reject.source.path, len(paths)), reject.source.row))
    source, row = (np.asarray(one, np.int64) for one in columns[:2])
    split, first, second = (np.asarray(one, np.uint64) for one in columns[2:])
    return ExampleFingerprints([*paths], source, row, split, first, second, rejected, (tokens, trained))


def _tokens(batch: Batch) -> Iterator[tuple[int, int]]:
    columns, digest = batch.columns, xxhash.xxh3_64_intdigest
    for start, end in pairwise(np.append(0, np.cumsum(columns.lengths)).tolist()):
        yield digest(columns.ids[start:end].tobytes()), digest(columns.trained[start:end].tobytes())


def _texts(batch: Batch) -> Iterator[tuple[int, int]]:
    digest = xxhash.xxh3_64_intdigest
    for number in range(len(batch.conversations)):
        for one in batch.built(number).examples:
            learnt = "".join(one.text[start:end] for start, end in _runs(one))
            yield digest(one.text.encode("utf-8", "replace")), digest(learnt.encode("utf-8", "replace"))


def _runs(example: Example) -> Iterator[tuple[int, int]]:
    """Yield where the stretches of text stand that are trained."""
    edges = np.flatnonzero(np.diff(example.trained, prepend=False, append=False))
    for first, last in edges.reshape(-1, 2).tolist():
        yield int(example.offsets[first, 0]), int(example.offsets[last - 1, 1])


def classify_differences(a: Rows, b: Rows) -> dict[int, str]:
    """Return how each row differs that does."""
    kinds = dict.fromkeys(np.setdiff1d(a[0], b[0]).tolist(), ONLY_A)
    kinds |= dict.fromkeys(np.setdiff1d(b[0], a[0]).tolist(), ONLY_B)
    both, at_a, at_b = np.intersect1d(a[0], b[0], return_indices=True)
    _, first_a, second_a, split_a, count_a, _ = (column[at_a] for column in a)
    _, first_b, second_b, split_b, count_b, _ = (column[at_b] for column in b)
    # A row that is there n times adds its digest n times (modulo 2 ** 64): compared crosswise, without a division.
    tokens, labels = first_a * count_b != first_b * count_a, second_a * count_b != second_b * count_a
    rules = ((tokens, TOKENS), (labels, LABELS), (count_a != count_b, REPEATED), (split_a != split_b, MOVED))
    for differ, kind in reversed(rules):
        kinds |= dict.fromkeys(both[differ].tolist(), kind)
    return kinds
