"""Survey: one pass over all rows, of which numbers are kept, and the rows that stand out; no more is held in memory."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from ftdata.pipeline.examples import Batch, BuiltRow, build_batches
from ftdata.pipeline.recipe import Recipe
from ftdata.readers import FileSource, MemorySource
from ftdata.readers.row_filter import RowFilter
from ftdata.types import Conversation, Reject, Source

Ints = NDArray[np.int64]
Progress = Callable[[int, int, float | None], None]

_ASKED = 4
MOST_REJECTS = 1000
"""Rejected rows that are kept in words; the others are counted."""


@dataclass(frozen=True, eq=False)
class RowNumbers:
    """Rows by columns; all arrays are int64 `[rows]`, but for those of the examples.

    Attributes:
        source: the number of the source.
        row: the row's number in its source.
        line: its line there; 0: there are none.
        schema: the number of the schema.
        turns: messages of the assistant; -1 where nobody knows.
        examples: how many there are of it.
        content: equal where tokens and labels are (uint64).
        asked: equal where the tokens that are not trained are (uint64); 0 where there are too few to tell.
        tokens, trained, cut: int64 `[examples]`.
    """

    source: Ints
    row: Ints
    line: Ints
    schema: Ints
    turns: Ints
    examples: Ints
    content: NDArray[np.uint64]
    asked: NDArray[np.uint64]
    tokens: Ints
    trained: Ints
    cut: Ints

    def __len__(self) -> int:
        return len(self.row)

    @property
    def first(self) -> Ints:
        """The first example of each row (int64 `[rows]`)."""
        return np.cumsum(self.examples) - self.examples

    def per_row(self, name: str) -> Ints:
        """Return the sum of a column of the examples over each row (int64 `[rows]`)."""
        return _over(np.add, getattr(self, name), self.first)

    @property
    def longest(self) -> Ints:
        """The tokens of the longest example of each row (int64 `[rows]`)."""
        return _over(np.maximum, self.tokens, self.first)


def _over(how: np.ufunc, values: Ints, first: Ints) -> Ints:
    return how.reduceat(values, first) if len(first) else values[:0]


def rows_of_examples(numbers: RowNumbers) -> Ints:
    """Return the number of the row of each example of a build, in the order of their sources (int64 `[examples]`)."""
    pairs = np.stack((numbers.source, numbers.row), axis=1)
    return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1) if len(pairs) else pairs[:, 0]


@dataclass(frozen=True, eq=False)
class Survey:
    """What all rows became.

    Attributes:
        sources: the names of the sources.
        splits: the split of each source.
        schemas: the names of the schemas.
        numbers: the rows that were built.
        flags: how many examples have each flag.
        rejected: how many rows were rejected, by code.
        rejects: the first of them.
        overlong: int64, the tokens of each example that did not fit at all: of rows that were rejected for it, and of
            others.
        lost: answers that stand wholly behind a cut.
        read: rows that were read; `None`: those that were built or rejected.
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

    @property
    def rows(self) -> int:
        """Rows that were read."""
        return len(self.numbers) + sum(self.rejected.values()) if self.read is None else self.read

    def source(self, row: int) -> Source:
        """Return where a row that was built came from."""
        numbers = self.numbers
        return Source(self.sources[numbers.source[row]], int(numbers.row[row]), int(numbers.line[row]) or None)

    def by_row(self) -> Survey:
        """Return the survey of a build by rows: examples of one row, which packs hold apart, together."""
        numbers = self.numbers
        groups = rows_of_examples(numbers)
        order = np.argsort(groups, kind="stable")
        first = np.flatnonzero(np.diff(groups[order], prepend=-1))
        own = order[first]
        assert (numbers.examples == 1).all()
        columns: dict[str, Any] = {
            name: getattr(numbers, name)[own] for name in ("source", "row", "line", "schema", "turns")
        }
        columns |= {name: getattr(numbers, name)[order] for name in ("tokens", "trained", "cut")}
        columns |= {
            name: _over(np.add, getattr(numbers, name)[order], first) for name in ("examples", "content", "asked")
        }
        return replace(self, numbers=RowNumbers(**columns))

    @property
    def lengths(self) -> Ints:
        """Tokens of each example as they were before truncation, those that were rejected included (int64)."""
        return np.concatenate((self.numbers.tokens + self.numbers.cut, self.overlong))


class SurveyStep(NamedTuple):
    """A batch of what rows became, the number of their source (or of each its own), and which share of all that is."""

    source: int | Sequence[int]
    batch: Batch
    share: float | None = None


def survey_steps(recipe: Recipe, given: Sequence[tuple[FileSource | MemorySource, RowFilter]]) -> Iterator[SurveyStep]:
    """Take the rows of sources that are wanted of each through the stages."""
    sizes = [source.size for source, _ in given]
    before = [*accumulate(sizes, initial=0)]
    for number, (source, selection) in enumerate(given):
        for batch in build_batches(recipe, selection.of(source.rows())):
            share = source.share_before(batch.last)
            if share is not None and before[-1]:
                share = (before[number] + share * sizes[number]) / before[-1]
            yield SurveyStep(number, batch, share)


def survey_rows(
    through: Iterable[SurveyStep],
    sources: Sequence[tuple[str, str]],
    watch: Callable[[Batch, RowNumbers], None] | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Go through what rows became, once.

    Args:
        through: the batches.
        sources: name and split of each source.
        watch: is shown every batch, and the numbers of the rows that were built.
        progress: is told the rows and tokens done so far, and which share of the data that is.
    """
    schemas: dict[str, int] = {}
    parts, flags, rejected = [_numbers(None, 0, schemas)], Counter[str](), Counter[str]()
    rejects, overlong = list[Reject](), list[int]()
    rows = tokens = lost = 0
    for source, batch, share in through:
        parts.append(numbers := _numbers(batch, source, schemas))
        flags.update(flag for each in batch.columns.flags if each for flag in each)
        rejected.update(one.code for one in batch.rejects)
        rejects += batch.rejects[: MOST_REJECTS - len(rejects)]
        overlong += (length for one in batch.rejects if one.code == "overlong" for length in one.lengths)
        overlong += batch.dropped
        lost += _lost(batch)
        if watch:
            watch(batch, numbers)
        rows, tokens = rows + len(batch), tokens + int(numbers.tokens.sum())
        if progress:
            progress(rows, tokens, share)
    joined = {each.name: np.concatenate([getattr(one, each.name) for one in parts]) for each in fields(RowNumbers)}
    return Survey(
        tuple(name for name, _ in sources),
        tuple(split for _, split in sources),
        tuple(schemas),
        RowNumbers(**joined),
        dict(sorted(flags.items())),
        dict(rejected.most_common()),
        tuple(rejects),
        np.asarray(overlong, np.int64),
        lost,
    )


def _numbers(batch: Batch | None, source: int | Sequence[int], schemas: dict[str, int]) -> RowNumbers:
    said: Sequence[Conversation] = batch.conversations if batch else ()
    counts = np.asarray(batch.counts if batch else (), np.int64)
    first = np.cumsum(counts) - counts
    empty: Any = np.empty(0, np.int64)
    columns = batch.columns if batch else None
    content, asked = _digests(batch, first) if batch else (empty.astype(np.uint64),) * 2
    return RowNumbers(
        np.broadcast_to(np.asarray(source, np.int64), len(said)).copy(),
        np.asarray([one.source.row for one in said], np.int64),
        np.asarray([one.source.line or 0 for one in said], np.int64),
        np.asarray([schemas.setdefault(one.schema, len(schemas)) for one in said], np.int64),
        np.asarray([_turns(one) for one in said], np.int64),
        counts,
        content,
        asked,
        columns.lengths if columns else empty,
        columns.trained_counts if columns else empty,
        np.asarray(columns.cut, np.int64) if columns else empty,
    )


def _lost(batch: Batch) -> int:
    """Return how many answers stand wholly behind the end of examples that were cut."""
    found, bounds = 0, np.cumsum(batch.counts)
    cut = [at for at, tokens in enumerate(batch.columns.cut) if tokens]
    for number in dict.fromkeys(np.searchsorted(bounds, cut, side="right").tolist()):
        for one in batch.built(number).examples:
            answers = [span for span in one.spans if span.generated] if one.cut else []
            begun = {span.message for span in answers if span.start < int(one.offsets[-1, 1])}
            found += len({span.message for span in answers} - begun)
    return found


def _turns(said: Conversation) -> int:
    return sum([message["role"] == "assistant" for message in said.messages]) if said.tokens is None else -1


def _digests(batch: Batch, first: Ints) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return hashes of all tokens and labels of each row, and of its tokens that are not trained; 0: there are few."""
    columns = batch.columns
    ids, trained = columns.ids, columns.trained
    ends = np.append(0, np.cumsum(columns.lengths))
    begins = ends[:-1][first] if len(first) else first
    bounds = [*begins.tolist(), int(ends[-1])]
    given = np.append(0, np.cumsum(~trained))[bounds].tolist()
    untrained = ids[~trained]
    digest = xxhash.xxh3_64_intdigest
    content = [digest(ids[a:b].tobytes(), digest(trained[a:b].tobytes())) for a, b in pairwise(bounds)]
    asked = [digest(untrained[a:b].tobytes()) if b - a >= _ASKED else 0 for a, b in pairwise(given)]
    return np.asarray(content, np.uint64), np.asarray(asked, np.uint64)


def row_key(outcome: BuiltRow | Reject) -> tuple[str, int, str]:
    """Return what tells rows apart, and the examples of a build, of which several may be of one row."""
    if isinstance(outcome, Reject):
        return outcome.source.path, outcome.source.row, ""
    said = outcome.conversation
    return said.source.path, said.source.row, said.fields.get("example", "") if said.tokens is not None else ""


Entry = tuple[float, int, BuiltRow | Reject]
"""How much a row stands out, its number counted down, and the row."""


@dataclass
class Outliers:
    """The rows that stand out, of each kind the `most` foremost; shown batches one by one."""

    most: int = 1
    found: dict[str, list[Entry]] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    order: int = 0

    def __call__(self, batch: Batch, numbers: RowNumbers) -> None:
        """Look at a batch."""
        longest, tokens, trained = numbers.longest, numbers.per_row("tokens"), numbers.per_row("trained")
        share = trained / np.maximum(tokens, 1)
        for kind, score in (("longest", longest), ("shortest", -longest), ("least trained", -share)):
            for number in np.argsort(-score, kind="stable")[: self.most].tolist():
                self._add(kind, float(score[number]), batch, number)
        bounds = list(accumulate(batch.counts, initial=0))
        flagged = [at for at, flags in enumerate(batch.columns.flags) if not flags.isdisjoint(_KINDS)]
        for number in dict.fromkeys((np.searchsorted(bounds, flagged, side="right") - 1).tolist()):
            flags = frozenset[str]().union(*batch.columns.flags[bounds[number] : bounds[number + 1]])
            for kind in dict.fromkeys(_KINDS[flag] for flag in sorted(flags) if flag in _KINDS):
                self._add(kind, 0.0, batch, number)
        for number, content in enumerate(numbers.content.tolist()):
            if content in self.seen:
                self._add("duplicate", 0.0, batch, number)
            self.seen.add(content)
        for reject in batch.rejects:
            self._keep(f"rejected: {reject.code}", 0.0, reject)

    def _add(self, kind: str, score: float, batch: Batch, number: int) -> None:
        held = self.found.get(kind, [])
        if len(held) < self.most or score > held[0][0]:
            self._keep(kind, score, batch.built(number))

    def _keep(self, kind: str, score: float, outcome: BuiltRow | Reject) -> None:
        self.order += 1
        held = self.found.setdefault(kind, [])
        # The earlier of equals comes first.
        entry = (score, -self.order, outcome)
        if len(held) < self.most:
            heapq.heappush(held, entry)
        elif entry > held[0]:
            heapq.heapreplace(held, entry)

    def rows(self) -> Iterator[tuple[BuiltRow | Reject, list[str]]]:
        """Yield each row that stands out, once, and why."""
        chosen: dict[tuple[str, int, str], tuple[BuiltRow | Reject, list[str]]] = {}
        order = [*dict.fromkeys(("longest", "shortest", "least trained", *_KINDS.values(), "duplicate")), *self.found]
        for kind in dict.fromkeys(order):
            for _, _, outcome in sorted(self.found.get(kind, ()), key=lambda entry: entry[:2], reverse=True):
                chosen.setdefault(row_key(outcome), (outcome, []))[1].append(kind)
        yield from chosen.values()


_KINDS = {
    "no_trained_stop": "no stop token",
    "missing_final_stop": "no stop token",
    "control_tokens": "control tokens in its text",
    "answer_truncated": "answer cut",
    "truncated": "cut",
    "history_rewritten": "rewritten by the template",
    "conversation_split": "rewritten by the template",
    "message_truncated": "not all printed by the template",
    "message_dropped": "not all printed by the template",
    "reasoning_dropped": "not all printed by the template",
    "tools_dropped": "not all printed by the template",
}
"""Flag -> as which kind of oddity it counts."""
