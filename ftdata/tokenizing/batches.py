"""Batches: many texts laid end to end, their spans and their tokens by columns, so that one search serves all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftdata.types import Rendered, Source, Spans


class EncodedText(NamedTuple):
    """The tokens of one text: `ids` int32 `[n]`, `offsets` int32 `[n, 2]` in characters of the text.

    `escaped`: control tokens that the row spells were kept from becoming real.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int32]
    escaped: bool = False


@dataclass(frozen=True, eq=False)
class Encodings:
    """The tokens of many texts.

    Attributes:
        ids: int32 `[tokens]`.
        starts, ends: int32 or int64 `[tokens]`, the characters behind each token, counted through all texts.
        bounds: int64 `[texts + 1]`, where the tokens of each text begin.
        places: int64 `[texts + 1]`, where its characters do.
        escaped: the texts in which control tokens that the row spells were kept from becoming real.
    """

    ids: NDArray[np.int32] = field(repr=False)
    starts: NDArray[np.integer] = field(repr=False)
    ends: NDArray[np.integer] = field(repr=False)
    bounds: NDArray[np.int64]
    places: NDArray[np.int64]
    escaped: frozenset[int] = frozenset()

    @classmethod
    def of(cls, encoded: Sequence[EncodedText], sizes: Iterable[int]) -> Encodings:
        """Lay the tokens of texts end to end; `sizes` are the characters of each.

        >>> one = EncodedText(np.array([7, 8], np.int32), np.array([[0, 2], [2, 3]], np.int32))
        >>> both = Encodings.of([one, one], [3, 3])
        >>> both.starts.tolist(), both.bounds.tolist(), both[1].offsets.tolist()
        ([0, 2, 3, 5], [0, 2, 4], [[0, 2], [2, 3]])
        """
        bounds, places = end_offsets(len(one.ids) for one in encoded), end_offsets(sizes)
        ids = np.concatenate([one.ids for one in encoded]) if encoded else np.empty(0, np.int32)
        offsets = np.concatenate([one.offsets for one in encoded]) if encoded else np.empty((0, 2), np.int32)
        shift = np.repeat(places[:-1].astype(offset_dtype(int(places[-1]))), np.diff(bounds))
        escaped = frozenset(number for number, one in enumerate(encoded) if one.escaped)
        return cls(ids, offsets[:, 0] + shift, offsets[:, 1] + shift, bounds, places, escaped)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> EncodedText:
        own = slice(*self.bounds[number : number + 2].tolist())
        offsets = np.stack((self.starts[own], self.ends[own]), axis=1) - self.places[number]
        return EncodedText(self.ids[own], offsets.astype(np.int32), number in self.escaped)

    def __iter__(self) -> Iterator[EncodedText]:
        return map(self.__getitem__, range(len(self)))

    def with_(self, others: Mapping[int, EncodedText]) -> Encodings:
        """Return the same with other tokens for some of the texts."""
        if not others:
            return self
        return Encodings.of([others.get(number, one) for number, one in enumerate(self)], np.diff(self.places).tolist())

    def begun(self, texts: Sequence[int], ids: NDArray[np.int32]) -> Encodings:
        """Return the same with these ids, of no characters, before each of some texts."""
        if not len(texts) or not len(ids):
            return self
        at, places = (np.repeat(column[np.asarray(texts)], len(ids)) for column in (self.bounds, self.places))
        more = np.zeros(len(self.bounds), np.int64)
        more[np.asarray(texts) + 1] = len(ids)
        return Encodings(
            np.insert(self.ids, at, np.tile(ids, len(texts))),
            np.insert(self.starts, at, places),
            np.insert(self.ends, at, places),
            self.bounds + np.cumsum(more),
            self.places,
            self.escaped,
        )


@dataclass(frozen=True, eq=False)
class RenderedBatch:
    """Many rendered texts, and their spans.

    Attributes:
        texts: the texts.
        starts, ends: int64 `[spans]`, the characters of each span, counted through all texts, which they tile.
        data: bool `[spans]`, which spans are not the template's own text.
    """

    texts: Sequence[Rendered] = field(repr=False)

    def __getitem__(self, number: int) -> Rendered:
        return self.texts[number]

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[Rendered]:
        return iter(self.texts)

    @cached_property
    def spans(self) -> tuple[Spans, ...]:
        """The spans of each text."""
        return tuple(Spans.of(one.spans) for one in self.texts)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each span begins, in characters of all texts (int64 `[spans]`)."""
        return self._edges[:-1]

    @property
    def ends(self) -> NDArray[np.int64]:
        """Where each span ends, in characters of all texts (int64 `[spans]`)."""
        return self._edges[1:]

    @cached_property
    def data(self) -> NDArray[np.bool_]:
        """Which spans are not the template's own text (bool `[spans]`)."""
        return np.concatenate([np.empty(0, np.bool_), *[one.kinds.is_data for one in self.spans]])

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        return end_offsets(chain.from_iterable([one.sizes for one in self.spans]))


class ExampleColumns(NamedTuple):
    """Examples by columns, one after the other, as they are counted and written.

    Attributes:
        ids: int32 `[tokens]`.
        trained: bool `[tokens]`.
        lengths: int64 `[examples]`, tokens of each.
        trained_counts: int64 `[examples]`, trained tokens of each.
        cut: tokens that truncation took from each.
        flags: what a careful reader should know of each.
        sources: where the row of each came from.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    trained_counts: NDArray[np.int64]
    cut: Sequence[int]
    flags: Sequence[frozenset[str]]
    sources: Sequence[Source]


def end_offsets(sizes: Iterable[int]) -> NDArray[np.int64]:
    """Return where each of several things ends, after a 0: int64 `[things + 1]`."""
    found = np.array([0, *sizes], np.int64)
    return np.cumsum(found, out=found)


def offset_dtype(most: int) -> type[np.signedinteger]:
    """Return the kind of number for places in a text of so many characters."""
    return np.int32 if most < 1 << 31 else np.int64
