"""Collect counts and hashes of all rows in one pass, and keep only the outliers in memory."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from ftdata.pipeline.batch import Batch, BuiltRow
from ftdata.pipeline.examples import build_batches
from ftdata.pipeline.flags import FLAGS
from ftdata.pipeline.recipe import Recipe
from ftdata.progress import Progress, ProgressUpdate
from ftdata.readers import FileSource, MemorySource
from ftdata.readers.row_filter import RowFilter
from ftdata.types import Conversation, Reject, Source

Ints = NDArray[np.int64]
_MIN_PROMPT_TOKENS = 4
MOST_REJECTS = 1000
"""The number of rejects that are kept; further rejects are only counted."""


@dataclass(frozen=True, eq=False)
class RowNumbers:
    """The positions, counts and hashes of the built rows, as columns.

    All arrays are int64 `[rows]` unless noted otherwise.

    Attributes:
        source: The number of the source.
        row: The number of the row in its source.
        line: The line number in the source; 0 if the format has no lines.
        schema: The number of the schema.
        turns: The number of assistant messages; -1 if unknown.
        examples: The number of examples.
        content_hash: uint64, a hash of the tokens and labels.
        prompt_hash: uint64, a hash of the untrained tokens; 0 if there are fewer than 4.
        tokens: int64 `[examples]`, the number of tokens.
        trained: int64 `[examples]`, the number of trained tokens.
        cut: int64 `[examples]`, the number of truncated tokens.
        images: int64 `[examples]`, the number of images.
        image_tokens: int64 `[examples]`, the number of tokens that stand for features of images.
    """

    source: Ints
    row: Ints
    line: Ints
    schema: Ints
    turns: Ints
    examples: Ints
    content_hash: NDArray[np.uint64]
    prompt_hash: NDArray[np.uint64]
    tokens: Ints
    trained: Ints
    cut: Ints
    images: Ints
    image_tokens: Ints

    def __len__(self) -> int:
        return len(self.row)

    @property
    def first(self) -> Ints:
        """For each row, the index of its first example (int64 `[rows]`)."""
        return np.cumsum(self.examples) - self.examples

    def per_row(self, name: str) -> Ints:
        """For each row, return the sum of a column, such as `tokens`, over the examples of the row (int64 `[rows]`)."""
        return _reduce(np.add, getattr(self, name), self.first)

    @property
    def longest(self) -> Ints:
        """For each row, the length of its longest example in tokens (int64 `[rows]`)."""
        return _reduce(np.maximum, self.tokens, self.first)


def _reduce(function: np.ufunc, values: Ints, starts: Ints) -> Ints:
    return function.reduceat(values, starts) if len(starts) else values[:0]


def number_source_rows(numbers: RowNumbers) -> Ints:
    """Return a number for each entry. Entries of the same row of a source have the same number.

    The rows are numbered in the order of their sources. The result is int64 `[entries]`.
    """
    pairs = np.stack((numbers.source, numbers.row), axis=1)
    return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1) if len(pairs) else pairs[:, 0]


_EXAMPLE_COLUMNS = ("tokens", "trained", "cut", "images", "image_tokens")
"""The columns of `RowNumbers` with one value per example."""


@dataclass(frozen=True, eq=False)
class Survey:
    """Counts, flags and rejected rows, collected in one pass over all rows.

    Attributes:
        sources: The names of the sources.
        splits: The split of each source.
        schemas: The names of the schemas.
        numbers: The numbers of the built rows.
        flags: The number of examples with each flag.
        rejected: The number of rejected rows by code.
        rejects: The first rejects.
        overlong: int64, the number of tokens of each example that is left out because it exceeds `max_length`.
        lost: The number of answers that truncation removes completely.
        read: The number of rows that were read; `None` if it is the number of built and rejected rows.
        numbered: The numbers of the sources whose rows can share a line, so that a location also needs the row number.
    """

    sources: tuple[str, ...]
    splits: tuple[str, ...]
    schemas: tuple[str, ...]
    numbers: RowNumbers
    flags: Mapping[str, int]
    rejected: Mapping[str, int] = field(default_factory=dict)
    rejects: tuple[Reject, ...] = ()
    overlong: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    lost: int = 0
    read: int | None = None
    numbered: frozenset[int] = frozenset()

    @property
    def rows(self) -> int:
        """The number of rows that were read, whether built or rejected."""
        return len(self.numbers) + sum(self.rejected.values()) if self.read is None else self.read

    def source(self, row: int) -> Source:
        """Return the file and row number that a built row was read from."""
        numbers = self.numbers
        number, line = int(numbers.source[row]), int(numbers.line[row]) or None
        return Source(self.sources[number], int(numbers.row[row]), line, 0 if number in self.numbered else None)

    def by_row(self) -> Survey:
        """Return a copy of the survey with one entry per row of the sources.

        The survey of a build has one entry per example or preference pair, because packing can separate the examples
        of a row.
        """
        numbers = self.numbers
        groups = number_source_rows(numbers)
        order = np.argsort(groups, kind="stable")
        starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
        first = order[starts]
        example_order = np.argsort(np.repeat(groups, numbers.examples), kind="stable")
        columns: dict[str, Any] = {
            name: getattr(numbers, name)[first] for name in ("source", "row", "line", "schema", "turns")
        }
        columns |= {name: getattr(numbers, name)[example_order] for name in _EXAMPLE_COLUMNS}
        columns |= {
            name: _reduce(np.add, getattr(numbers, name)[order], starts)
            for name in ("examples", "content_hash", "prompt_hash")
        }
        return replace(self, numbers=RowNumbers(**columns))

    @property
    def lengths(self) -> Ints:
        """The number of tokens of each example before truncation (int64).

        Rejected overlong examples are included.
        """
        return np.concatenate((self.numbers.tokens + self.numbers.cut, self.overlong))


class SurveyStep(NamedTuple):
    """A batch of processed rows, with its source and the processed share of the data.

    Attributes:
        source: The number of the source, or the number for each row.
        batch: The rows.
        share: The share of the data that is done, if known.
    """

    source: int | Sequence[int]
    batch: Batch
    share: float | None = None


def survey_steps(
    recipe: Recipe, sources: Sequence[tuple[FileSource | MemorySource, RowFilter]]
) -> Iterator[SurveyStep]:
    """Process the rows of all sources that the `where` options select, and yield the results in batches."""
    sizes = [source.size for source, _ in sources]
    offsets = [*accumulate(sizes, initial=0)]
    for number, (source, row_filter) in enumerate(sources):
        for batch in build_batches(recipe, row_filter.filter_rows(source.rows())):
            share = source.share_before(batch.last_source)
            if share is not None and offsets[-1]:
                share = (offsets[number] + share * sizes[number]) / offsets[-1]
            yield SurveyStep(number, batch, share)


def survey_rows(
    steps: Iterable[SurveyStep],
    sources: Sequence[tuple[str, str]],
    on_batch: Callable[[Batch, RowNumbers], None] | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Collect the counts, flags and rejected rows of all processed rows in one pass.

    Args:
        steps: The batches.
        sources: The name and the split of each source.
        on_batch: Called with each batch and the numbers of its built rows.
        progress: Called with a `ProgressUpdate` after each batch of rows.
    """
    schemas: dict[str, int] = {}
    parts, flags, rejected = list[RowNumbers](), Counter[str](), Counter[str]()
    rejects, overlong = list[Reject](), list[int]()
    rows = tokens = lost = 0
    numbered = set[int]()
    for source, batch, share in steps:
        parts.append(numbers := _row_numbers(batch, source, schemas))
        if isinstance(source, int) and batch.conversations and batch.conversations[0].source.offset is not None:
            numbered.add(source)
        flags.update(flag for example_flags in batch.flags if example_flags for flag in example_flags)
        rejected.update(reject.code for reject in batch.rejects)
        rejects += batch.rejects[: MOST_REJECTS - len(rejects)]
        overlong += (length for reject in batch.rejects if reject.code == "overlong" for length in reject.lengths)
        overlong += chain.from_iterable(batch.dropped.values())
        lost += _count_lost_answers(batch)
        if on_batch:
            on_batch(batch, numbers)
        rows, tokens = rows + len(batch), tokens + int(numbers.tokens.sum())
        if progress:
            progress(ProgressUpdate("read", rows, tokens, share))
    return Survey(
        tuple(name for name, _ in sources),
        tuple(split for _, split in sources),
        tuple(schemas),
        _concatenate(parts),
        dict(sorted(flags.items())),
        dict(rejected.most_common()),
        tuple(rejects),
        np.asarray(overlong, np.int64),
        lost,
        numbered=frozenset(numbered),
    )


def _concatenate(parts: Sequence[RowNumbers]) -> RowNumbers:
    columns = {}
    for name in (column.name for column in fields(RowNumbers)):
        empty = np.empty(0, np.uint64 if name.endswith("_hash") else np.int64)
        columns[name] = np.concatenate([empty, *(getattr(part, name) for part in parts)])
    return RowNumbers(**columns)


def _row_numbers(batch: Batch, source: int | Sequence[int], schemas: dict[str, int]) -> RowNumbers:
    conversations = batch.conversations
    content, prompts = _hash_rows(batch)
    return RowNumbers(
        np.broadcast_to(np.asarray(source, np.int64), len(conversations)).copy(),
        np.asarray([conversation.source.row for conversation in conversations], np.int64),
        np.asarray([conversation.source.line or 0 for conversation in conversations], np.int64),
        np.asarray([schemas.setdefault(conversation.schema, len(schemas)) for conversation in conversations], np.int64),
        np.asarray([_count_turns(conversation) for conversation in conversations], np.int64),
        np.asarray(batch.counts, np.int64),
        content,
        prompts,
        batch.lengths,
        batch.trained_counts,
        batch.cut,
        np.asarray([len(text.images) for text in batch.texts], np.int64),
        batch.image_tokens,
    )


def _count_lost_answers(batch: Batch) -> int:
    """Count the answers that truncation removes completely."""
    lost, bounds = 0, np.cumsum(batch.counts)
    truncated = [index for index, tokens in enumerate(batch.cut) if tokens]
    for number in dict.fromkeys(np.searchsorted(bounds, truncated, side="right").tolist()):
        for example in batch.built(number).examples:
            answers = [span for span in example.spans if span.generated] if example.cut else []
            partial = {span.message for span in answers if span.start < int(example.offsets[-1, 1])}
            lost += len({span.message for span in answers} - partial)
    return lost


def _count_turns(conversation: Conversation) -> int:
    if conversation.tokens is not None:
        return -1
    return sum([message["role"] == "assistant" for message in conversation.messages])


def _hash_rows(batch: Batch) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Compute two hashes of each row: one of its tokens and labels, and one of its untrained tokens.

    The second hash is 0 if the row has fewer than 4 untrained tokens.
    """
    untrained = ~batch.trained
    prompt_ids, prompt_bounds = batch.tokens.ids[untrained], np.append(0, np.cumsum(untrained))[batch.row_bounds]
    content = [_to_integer(tokens) ^ _to_integer(labels) for tokens, labels in batch.hash_rows()]
    prompts = [
        xxhash.xxh3_64_intdigest(prompt_ids[start:end].tobytes()) if end - start >= _MIN_PROMPT_TOKENS else 0
        for start, end in pairwise(prompt_bounds.tolist())
    ]
    if any(batch.image_hashes):
        # Rows with the same question about different images have different prompts.
        images = ["".join(batch.image_hashes[start:end]) for start, end in pairwise(batch.example_bounds)]
        prompts = [
            hash_ ^ xxhash.xxh3_64_intdigest(names.encode()) if names else hash_
            for hash_, names in zip(prompts, images, strict=True)
        ]
    return np.asarray(content, np.uint64), np.asarray(prompts, np.uint64)


def _to_integer(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")


def row_key(outcome: BuiltRow | Reject) -> tuple[str, int, str]:
    """Return a key that identifies a row. In a build, the key identifies one example of a row.

    A build can contain several examples of the same row.
    """
    if isinstance(outcome, Reject):
        return outcome.source.path, outcome.source.row, ""
    conversation = outcome.conversation
    example = conversation.fields.get("example", "") if conversation.tokens is not None else ""
    return conversation.source.path, conversation.source.row, example


_FLAG_KINDS = {code: flag.outlier for code, flag in FLAGS.items() if flag.outlier} | {"truncated": "truncated"}
"""The kind of outlier for each flag."""

KINDS = {
    "longest": "one of the rows with the longest examples",
    "shortest": "one of the rows with the shortest examples",
    "least trained": "one of the rows with the smallest share of trained tokens",
    "duplicate": "the same tokens and labels as an earlier row",
    "truncated": "tokens beyond max_length are cut off",
    "rejected": "the row is not used for training",
    "no stop token": "the model does not learn to stop after an answer of this row",
    "rewritten by the template": "the template changes an earlier turn, for example removes its reasoning",
    "not fully printed by the template": "the template leaves out text of the row",
    "answer truncated": "an answer is cut off, so the model learns to stop in mid-sentence",
    "control tokens in the text": "the row contains the text of control tokens, which are tokenized as plain text",
}
"""A description of each kind of outlier."""

ScoredRow = tuple[float, int, BuiltRow | Reject]
"""The score of an outlier, a counter that decreases with each row, and the row."""


@dataclass
class Outliers:
    """Collect the most extreme rows of each kind of outlier, such as the longest rows.

    Attributes:
        limit: The maximum number of rows of each kind.
        heaps: The rows of each kind, as heaps with the lowest score first.
        counts: The number of rows with each flag, and of each kind except the longest, shortest and least trained rows.
        content_hashes: The content hashes of all rows so far.
        counter: The number of rows that were added.
    """

    limit: int = 1
    heaps: dict[str, list[ScoredRow]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    content_hashes: set[int] = field(default_factory=set)
    counter: int = 0

    def __call__(self, batch: Batch, numbers: RowNumbers) -> None:
        """Add the outliers of a batch to the collection."""
        longest, tokens, trained = numbers.longest, numbers.per_row("tokens"), numbers.per_row("trained")
        share = trained / np.maximum(tokens, 1)
        for kind, scores in (("longest", longest), ("shortest", -longest), ("least trained", -share)):
            for number in np.argsort(-scores, kind="stable")[: self.limit].tolist():
                self._add_built_row(kind, float(scores[number]), batch, number)
        bounds = list(accumulate(batch.counts, initial=0))
        flagged = [index for index, flags in enumerate(batch.flags) if flags]
        for number in dict.fromkeys((np.searchsorted(bounds, flagged, side="right") - 1).tolist()):
            flags = frozenset[str]().union(*batch.flags[bounds[number] : bounds[number + 1]])
            kinds = dict.fromkeys(_FLAG_KINDS[flag] for flag in sorted(flags) if flag in _FLAG_KINDS)
            self.counts.update([*flags, *kinds])
            for kind in kinds:
                self._add_built_row(kind, 0.0, batch, number)
        for number, content_hash in enumerate(numbers.content_hash.tolist()):
            if content_hash in self.content_hashes:
                self.counts["duplicate"] += 1
                self._add_built_row("duplicate", 0.0, batch, number)
            self.content_hashes.add(content_hash)
        for reject in batch.rejects:
            self.counts.update(["rejected", f"rejected: {reject.code}"])
            self._add(f"rejected: {reject.code}", 0.0, reject)

    def _add_built_row(self, kind: str, score: float, batch: Batch, number: int) -> None:
        heap = self.heaps.get(kind, [])
        if len(heap) < self.limit or score > heap[0][0]:
            self._add(kind, score, batch.built(number))

    def _add(self, kind: str, score: float, outcome: BuiltRow | Reject) -> None:
        self.counter += 1
        heap = self.heaps.setdefault(kind, [])
        # The counter is negated so that of several rows with equal scores, the earliest is kept.
        scored_row = (score, -self.counter, outcome)
        if len(heap) < self.limit:
            heapq.heappush(heap, scored_row)
        elif scored_row > heap[0]:
            heapq.heapreplace(heap, scored_row)

    def rows(self) -> Iterator[tuple[BuiltRow | Reject, list[str]]]:
        """Yield each outlier once, with all kinds of outlier that apply to the row."""
        outliers: dict[tuple[str, int, str], tuple[BuiltRow | Reject, list[str]]] = {}
        kinds = ("longest", "shortest", "least trained", *_FLAG_KINDS.values(), "duplicate", *self.heaps)
        for kind in dict.fromkeys(kinds):
            for _, _, outcome in sorted(self.heaps.get(kind, ()), key=lambda scored: scored[:2], reverse=True):
                outliers.setdefault(row_key(outcome), (outcome, []))[1].append(kind)
        yield from outliers.values()
