"""Hash examples, so that `diff` can compare two builds without keeping their tokens in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ftdata.inspection import stored_builds
from ftdata.inspection.target import Target
from ftdata.pipeline.batch import Batch
from ftdata.progress import Progress, ProgressUpdate
from ftdata.types import Example

SAME, LABELS, TOKENS = "same", "labels differ", "tokens differ"
MOVED, REPEATED = "in another split", "another number of times"
ONLY_A, ONLY_B, NEITHER = "only in A", "only in B", "rejected by both"
KINDS = (SAME, LABELS, TOKENS, MOVED, REPEATED, ONLY_A, ONLY_B, NEITHER)

MOST_ROWS = 1 << 40
"""An upper bound of the rows of a source. The key of a row is `source * MOST_ROWS + row`."""


@dataclass(frozen=True)
class ExampleFingerprints:
    """Hashes of all examples on one side of a comparison. Each attribute with hashes is uint64 `[examples]`.

    Attributes:
        paths: The names of the sources.
        source: int64 `[examples]`, an index into `paths`.
        row: int64 `[examples]`, the number of the row in its source.
        split: Hashes of the name of the split.
        content: Hashes of the tokens, or of the text if the tokenizers differ.
        labels: Hashes of the labels, or of the trained text if the tokenizers differ.
        rejected: The source and row of each rejected row.
        tokens: The number of tokens and of trained tokens.
    """

    paths: Sequence[str]
    source: NDArray[np.int64]
    row: NDArray[np.int64]
    split: NDArray[np.uint64]
    content: NDArray[np.uint64]
    labels: NDArray[np.uint64]
    rejected: Sequence[tuple[int, int]]
    tokens: tuple[int, int]

    def by_row(self, keys: Mapping[str, int]) -> Rows:
        """Combine the hashes of the examples of each row. Return columns with one value per row.

        The columns are the key, the sums of the hashes, the number of examples, and the first example. The hashes of a
        row's examples are summed, so the order of the examples does not matter, except for the sides of a pair.
        """
        source_keys = np.asarray([keys[path] for path in self.paths], np.int64)
        rows, first, row_indices, counts = np.unique(
            source_keys[self.source] * MOST_ROWS + self.row, return_index=True, return_inverse=True, return_counts=True
        )
        sums = []
        for values in (self.content, self.labels, self.split):
            sums.append(total := np.zeros(len(rows), np.uint64))
            np.add.at(total, row_indices.reshape(-1), values)
        return rows, sums[0], sums[1], sums[2], counts.astype(np.uint64), first

    def rejected_keys(self, keys: Mapping[str, int]) -> set[int]:
        """Return the keys of the rejected rows."""
        return {keys[self.paths[source]] * MOST_ROWS + row for source, row in self.rejected}


Rows = tuple[NDArray[Any], ...]


def match_sources(paths: Sequence[Sequence[str]]) -> list[dict[str, int]]:
    """Assign numbers to the data sources on both sides of a comparison. Matching sources get the same number.

    The result has one mapping from path to number for each side.

    Sources match by path. Otherwise they match by file name, in order, if both sides have the same number of
    sources with this name. Finally, if one source of each side remains, these two sources match.
    """
    left, right = ([*dict.fromkeys(side_paths)] for side_paths in paths)
    keys = [{path: number for number, path in enumerate(left)}, dict[str, int]()]
    name_functions: tuple[Callable[[str], str], ...] = (str, os.path.abspath, os.path.basename, lambda _: "")
    for name_function in name_functions:
        open_a = [path for path in left if keys[0][path] not in keys[1].values()]
        open_b = [path for path in right if path not in keys[1]]
        for name in dict.fromkeys(map(name_function, open_b)):
            matches_a, matches_b = (
                [path for path in open_paths if name_function(path) == name] for open_paths in (open_a, open_b)
            )
            is_last = name_function is name_functions[-1]
            if len(matches_a) == len(matches_b) and (not is_last or len(matches_a) == 1):
                keys[1] |= {b: keys[0][a] for a, b in zip(matches_a, matches_b, strict=True)}
    for path in right:
        keys[1].setdefault(path, len(left) + len(keys[1]))
    return keys


def fingerprint_examples(target: Target, progress: Progress | None, *, by_text: bool) -> ExampleFingerprints:
    """Compute the hashes (fingerprints) of all examples on one side of a comparison.

    Args:
        target: The side.
        progress: Called with a `ProgressUpdate` after each batch of rows.
        by_text: Whether to hash texts instead of tokens, because the tokenizers of the sides differ.
    """
    columns: tuple[list[int], ...] = ([], [], [], [], [])
    paths, splits, rejected = dict[str, int](), [split for _, split in target.names], list[tuple[int, int]]()
    split_hashes = [xxhash.xxh3_64_intdigest(split.encode()) for split in splits]
    rows = tokens = trained = 0
    for step in target.steps():
        batch = step.batch
        rows, tokens = rows + len(batch), tokens + int(batch.lengths.sum())
        trained += int(batch.trained_counts.sum())
        numbers = np.repeat(np.broadcast_to(step.source, len(batch.counts)), batch.counts).tolist()
        for source, number in zip(batch.sources, numbers, strict=True):
            columns[0].append(paths.setdefault(source.path, len(paths)))
            columns[1].append(source.row)
            columns[2].append(split_hashes[number])
        hashes = _hash_texts(batch) if by_text else _hash_tokens(batch)
        for (content, labels), factor in zip(hashes, _example_factors(batch), strict=True):
            columns[3].append(content * factor % (1 << 64))
            columns[4].append(labels * factor % (1 << 64))
        rejected += ((paths.setdefault(reject.source.path, len(paths)), reject.source.row) for reject in batch.rejects)
        if progress:
            progress(ProgressUpdate("read", rows, tokens, step.share))
    for reject in stored_builds.read_build_rejects(target.folder) if target.folder else ():
        rejected.append((paths.setdefault(reject.source.path, len(paths)), reject.source.row))
    source_numbers, row_numbers = (np.asarray(column, np.int64) for column in columns[:2])
    split, contents, labels_column = (np.asarray(column, np.uint64) for column in columns[2:])
    return ExampleFingerprints(
        [*paths], source_numbers, row_numbers, split, contents, labels_column, rejected, (tokens, trained)
    )


def _example_factors(batch: Batch) -> Iterator[int]:
    """Yield the factor of the hashes of each example. A sum of the hashes of a pair depends on which side is chosen."""
    for conversation, count in zip(batch.conversations, batch.counts, strict=True):
        yield from (1, 3) if conversation.sides else (1,) * count


def _hash_tokens(batch: Batch) -> Iterator[tuple[int, int]]:
    for tokens, labels in batch.hash_examples():
        yield int.from_bytes(tokens[:8], "little"), int.from_bytes(labels, "little")


def _hash_texts(batch: Batch) -> Iterator[tuple[int, int]]:
    digest = xxhash.xxh3_64_intdigest
    for number in range(len(batch.conversations)):
        for example in batch.built(number).examples:
            trained_text = "".join(example.text[start:end] for start, end in _trained_ranges(example))
            yield digest(example.text.encode("utf-8", "replace")), digest(trained_text.encode("utf-8", "replace"))


def _trained_ranges(example: Example) -> Iterator[tuple[int, int]]:
    """Yield the character ranges of the trained tokens of an example."""
    edges = np.flatnonzero(np.diff(example.trained, prepend=False, append=False))
    for first, last in edges.reshape(-1, 2).tolist():
        yield int(example.offsets[first, 0]), int(example.offsets[last - 1, 1])


def classify_differences(a: Rows, b: Rows) -> dict[int, str]:
    """Compare the rows of sides A and B. Return a dictionary from the key of each changed row to its kind of change.

    The kinds are listed in `KINDS`.
    """
    kinds = dict.fromkeys(np.setdiff1d(a[0], b[0]).tolist(), ONLY_A)
    kinds |= dict.fromkeys(np.setdiff1d(b[0], a[0]).tolist(), ONLY_B)
    both, indices_a, indices_b = np.intersect1d(a[0], b[0], return_indices=True)
    _, content_a, labels_a, split_a, count_a, _ = (column[indices_a] for column in a)
    _, content_b, labels_b, split_b, count_b, _ = (column[indices_b] for column in b)
    # A row that occurs n times adds its hash n times (modulo 2 ** 64), so the sums are compared by cross-multiplying.
    tokens, labels = content_a * count_b != content_b * count_a, labels_a * count_b != labels_b * count_a
    rules = ((tokens, TOKENS), (labels, LABELS), (count_a != count_b, REPEATED), (split_a != split_b, MOVED))
    for is_different, kind in reversed(rules):
        kinds |= dict.fromkeys(both[is_different].tolist(), kind)
    return kinds
