"""Store the tokens and spans (ranges with the same source) of many texts in NumPy arrays, for fast processing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftdata.types import Rendered, Spans


class EncodedText(NamedTuple):
    """The token ids and character offsets of one text.

    Attributes:
        ids: int32 `[n]`.
        offsets: int32 `[n, 2]`, in characters of the text.
        escaped: whether control tokens in the text of the row were encoded as plain text.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int32]
    escaped: bool = False


@dataclass(frozen=True, eq=False)
class Encodings:
    """The token ids and character offsets of a batch of texts, in concatenated arrays.

    Attributes:
        ids: int32 `[tokens]`.
        starts, ends: int32 or int64 `[tokens]`, the range of characters of each token in the concatenated texts.
        token_bounds: int64 `[texts + 1]`, index of the first token of each text, and the number of tokens.
        text_bounds: int64 `[texts + 1]`, index of the first character of each text, and the number of characters.
        escaped: indices of the texts in which control tokens were encoded as plain text.
    """

    ids: NDArray[np.int32] = field(repr=False)
    starts: NDArray[np.integer] = field(repr=False)
    ends: NDArray[np.integer] = field(repr=False)
    token_bounds: NDArray[np.int64]
    text_bounds: NDArray[np.int64]
    escaped: frozenset[int] = frozenset()

    @classmethod
    def from_texts(cls, encoded: Sequence[EncodedText], sizes: Iterable[int]) -> Encodings:
        """Concatenate the tokens of several texts. `sizes` contains the number of characters of each text.

        >>> text = EncodedText(np.array([7, 8], np.int32), np.array([[0, 2], [2, 3]], np.int32))
        >>> batch = Encodings.from_texts([text, text], [3, 3])
        >>> batch.starts.tolist(), batch.token_bounds.tolist(), batch[1].offsets.tolist()
        ([0, 2, 3, 5], [0, 2, 4], [[0, 2], [2, 3]])
        """
        token_bounds, text_bounds = end_offsets(len(text.ids) for text in encoded), end_offsets(sizes)
        ids = np.concatenate([text.ids for text in encoded]) if encoded else np.empty(0, np.int32)
        offsets = np.concatenate([text.offsets for text in encoded]) if encoded else np.empty((0, 2), np.int32)
        shift = np.repeat(text_bounds[:-1].astype(offset_dtype(int(text_bounds[-1]))), np.diff(token_bounds))
        escaped = frozenset(number for number, text in enumerate(encoded) if text.escaped)
        return cls(ids, offsets[:, 0] + shift, offsets[:, 1] + shift, token_bounds, text_bounds, escaped)

    def __len__(self) -> int:
        return len(self.token_bounds) - 1

    def __getitem__(self, number: int) -> EncodedText:
        tokens = slice(*self.token_bounds[number : number + 2].tolist())
        offsets = np.stack((self.starts[tokens], self.ends[tokens]), axis=1) - self.text_bounds[number]
        return EncodedText(self.ids[tokens], offsets.astype(np.int32), number in self.escaped)

    def __iter__(self) -> Iterator[EncodedText]:
        return map(self.__getitem__, range(len(self)))

    def with_replacements(self, replacements: Mapping[int, EncodedText]) -> Encodings:
        """Return a copy in which some texts have new tokens. `replacements` maps text indices to the new tokens."""
        if not replacements:
            return self
        numbers = sorted(replacements)
        ids, starts, ends, end = list[NDArray[np.int32]](), list[NDArray[np.integer]](), list[NDArray[np.integer]](), 0
        for number in numbers:
            first, text, shift = int(self.token_bounds[number]), replacements[number], self.text_bounds[number]
            offsets = (text.offsets + shift).astype(self.starts.dtype)
            ids += self.ids[end:first], text.ids
            starts += self.starts[end:first], offsets[:, 0]
            ends += self.ends[end:first], offsets[:, 1]
            end = int(self.token_bounds[number + 1])
        lengths = np.diff(self.token_bounds)
        lengths[numbers] = [len(replacements[number].ids) for number in numbers]
        escaped = {number for number in numbers if replacements[number].escaped}
        return replace(
            self,
            ids=np.concatenate([*ids, self.ids[end:]]),
            starts=np.concatenate([*starts, self.starts[end:]]),
            ends=np.concatenate([*ends, self.ends[end:]]),
            token_bounds=end_offsets(lengths.tolist()),
            escaped=self.escaped.difference(numbers) | escaped,
        )

    def token_positions(self, numbers: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the indices of the first `lengths` tokens of the texts with the given numbers (int64 `[tokens]`)."""
        ends = np.cumsum(lengths)
        shifts = self.token_bounds[numbers] - (ends - lengths)
        positions: NDArray[np.int64] = np.arange(lengths.sum(), dtype=np.int64) + np.repeat(shifts, lengths)
        return positions

    def select(self, numbers: NDArray[np.int64], positions: NDArray[np.int64], lengths: NDArray[np.int64]) -> Encodings:
        """Return the tokens of some of the texts.

        Args:
            numbers: int64 `[selected texts]`, the indices of the texts in this batch.
            positions: int64 `[selected tokens]`, as `token_positions` returns them.
            lengths: int64 `[selected texts]`, the number of tokens of each text.
        """
        text_bounds = end_offsets(np.diff(self.text_bounds)[numbers].tolist())
        shifts = np.repeat(text_bounds[:-1] - self.text_bounds[numbers], lengths).astype(self.starts.dtype)
        escaped = frozenset(new for new, number in enumerate(numbers.tolist()) if number in self.escaped)
        return Encodings(
            self.ids[positions],
            self.starts[positions] + shifts,
            self.ends[positions] + shifts,
            end_offsets(lengths.tolist()),
            text_bounds,
            escaped,
        )

    def with_repeats(self, positions: NDArray[np.int64], counts: NDArray[np.int64]) -> Encodings:
        """Return a copy in which the tokens at `positions` are repeated: int64 `[tokens to repeat]`, ascending."""
        repeats = np.ones(len(self.ids), np.int64)
        repeats[positions] = counts
        return replace(
            self,
            ids=np.repeat(self.ids, repeats),
            starts=np.repeat(self.starts, repeats),
            ends=np.repeat(self.ends, repeats),
            token_bounds=end_offsets(repeats)[self.token_bounds],
        )

    def with_prefix(self, texts: Sequence[int], ids: NDArray[np.int32]) -> Encodings:
        """Return a copy with `ids` prepended to some texts.

        `texts` contains the indices of these texts. The new tokens cover no characters.
        """
        if not len(texts) or not len(ids):
            return self
        positions, offsets = (
            np.repeat(column[np.asarray(texts)], len(ids)) for column in (self.token_bounds, self.text_bounds)
        )
        added = np.zeros(len(self.token_bounds), np.int64)
        added[np.asarray(texts) + 1] = len(ids)
        return Encodings(
            np.insert(self.ids, positions, np.tile(ids, len(texts))),
            np.insert(self.starts, positions, offsets),
            np.insert(self.ends, positions, offsets),
            self.token_bounds + np.cumsum(added),
            self.text_bounds,
            self.escaped,
        )


@dataclass(frozen=True, eq=False)
class RenderedBatch:
    """A batch of rendered texts, with the start and end of each span. A span is a range of text with the same source.

    Attributes:
        texts: the rendered texts.
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
        """The spans of each text: ranges of characters that come from the same field or from the template."""
        return tuple([spans if type(spans := text.spans) is Spans else Spans.from_spans(spans) for text in self.texts])

    @property
    def starts(self) -> NDArray[np.int64]:
        """Start of each span, as a character index in the concatenated texts (int64 `[spans]`)."""
        return self._edges[:-1]

    @property
    def ends(self) -> NDArray[np.int64]:
        """End of each span, as a character index in the concatenated texts (int64 `[spans]`)."""
        return self._edges[1:]

    @cached_property
    def data(self) -> NDArray[np.bool_]:
        """For each span, whether its text comes from the row instead of the template (bool `[spans]`)."""
        return np.concatenate([np.empty(0, np.bool_), *[spans.kinds.is_data for spans in self.spans]])

    @cached_property
    def media(self) -> NDArray[np.bool_]:
        """For each span, whether it contains the tokens of an image (bool `[spans]`)."""
        return np.concatenate([np.empty(0, np.bool_), *[spans.kinds.is_media for spans in self.spans]])

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        return end_offsets(chain.from_iterable([spans.sizes for spans in self.spans]))


def end_offsets(sizes: Iterable[int]) -> NDArray[np.int64]:
    """Return the cumulative sums of `sizes`, preceded by 0 (int64 `[len(sizes) + 1]`)."""
    ends = np.array([0, *sizes], np.int64)
    return np.cumsum(ends, out=ends)


def offset_dtype(size: int) -> type[np.signedinteger]:
    """Return the smallest dtype for offsets in a text of `size` characters: int32 or int64."""
    return np.int32 if size < 1 << 31 else np.int64
