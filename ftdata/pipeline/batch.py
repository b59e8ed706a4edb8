"""The examples of a batch of rows, in columns. Batches are passed from the tokenizer to the files of a build."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import BadRow, first_difference
from ftdata.tokenizing.batches import Encodings, RenderedBatch
from ftdata.tokenizing.token_text import token_texts
from ftdata.tokenizing.tokenizer import Tokenizer
from ftdata.types import Conversation, Example, Part, Reject, RowTokens, Source, Span


class BuiltRow(NamedTuple):
    """The examples of one row, with the number of removed tokens (`cut`) and the lengths of removed examples."""

    conversation: Conversation
    examples: tuple[Example, ...]
    cut: int = 0
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of processed rows: the examples of all built rows in columns, and the rejected rows.

    Attributes:
        tokenizer: the tokenizer, which decodes the examples of pretokenized rows.
        outcomes: for each row, in the order of the input, its conversation or its `Reject`.
        counts: for each built row, the number of its examples.
        texts: the text and the spans of each example; empty for pretokenized rows.
        tokens: the token ids and offsets of the examples.
        trained: bool `[tokens]`, true where the token carries loss.
        flags: the flags of each example.
        cut: int64 `[examples]`, the number of tokens that truncation removed from the end of each example.
        dropped: number of a built row -> lengths of its examples that were too long.
        image_token_id: id of the token that stands for a feature of an image; `None` without an image processor.
    """

    tokenizer: Tokenizer = field(repr=False)
    outcomes: Sequence[Conversation | Reject] = field(repr=False)
    counts: Sequence[int]
    texts: RenderedBatch = field(repr=False)
    tokens: Encodings
    trained: NDArray[np.bool_] = field(repr=False)
    flags: Sequence[frozenset[str]]
    cut: NDArray[np.int64]
    dropped: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    image_token_id: int | None = None

    def __len__(self) -> int:
        return len(self.outcomes)

    def __iter__(self) -> Iterator[BuiltRow | Reject]:
        number = 0
        for outcome in self.outcomes:
            if isinstance(outcome, Reject):
                yield outcome
            else:
                yield self.built(number)
                number += 1

    def built(self, number: int) -> BuiltRow:
        """Return the built row with the given number. Rejected rows are not counted."""
        first, end = self.example_bounds[number : number + 2]
        dropped = self.dropped.get(number, ())
        cut = int(self.cut[first:end].sum()) + sum(dropped)
        return BuiltRow(self.conversations[number], tuple(map(self.example, range(first, end))), cut, dropped)

    def example(self, number: int) -> Example:
        """Return the example with the given number."""
        conversation, rendered = self.example_conversations[number], self.texts[number]
        ids, offsets, _ = self.tokens[number]
        trained = self.trained[slice(*self.tokens.token_bounds[number : number + 2].tolist())]
        text, spans = rendered.text, rendered.spans
        if conversation.tokens is not None:
            text, offsets, spans = _decode_tokens(self.tokenizer, ids, trained, self.image_token_id)
        return Example(
            ids,
            trained,
            offsets,
            text,
            spans,
            self.flags[number],
            conversation.source,
            int(self.cut[number]),
            rendered.images,
        )

    @cached_property
    def conversations(self) -> list[Conversation]:
        """The conversations of the built rows."""
        return [outcome for outcome in self.outcomes if not isinstance(outcome, Reject)]

    @property
    def is_rated(self) -> bool:
        """Whether the rows are rated answers: preference pairs, or answers for KTO."""
        return any(conversation.sides or conversation.feedback for conversation in self.conversations)

    @cached_property
    def rejects(self) -> list[Reject]:
        """The rejected rows."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, Reject)]

    @cached_property
    def example_bounds(self) -> list[int]:
        """The number of the first example of each built row, and the number of examples."""
        return [*accumulate(self.counts, initial=0)]

    @cached_property
    def example_conversations(self) -> list[Conversation]:
        """The conversation of each example."""
        if len(self.conversations) == len(self.texts):
            return self.conversations
        pairs = zip(self.conversations, self.counts, strict=True)
        return [conversation.part(number) for conversation, count in pairs for number in range(count)]

    @property
    def sources(self) -> list[Source]:
        """The source of the row of each example."""
        return [conversation.source for conversation in self.example_conversations]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each example (int64 `[examples]`)."""
        return np.diff(self.tokens.token_bounds)

    @cached_property
    def trained_counts(self) -> NDArray[np.int64]:
        """Number of trained tokens of each example (int64 `[examples]`)."""
        counts, has_tokens = np.zeros(len(self.texts), np.int64), self.lengths > 0
        counts[has_tokens] = np.add.reduceat(self.trained, self.tokens.token_bounds[:-1][has_tokens], dtype=np.int32)
        return counts

    @cached_property
    def image_tokens(self) -> NDArray[np.int64]:
        """Number of tokens of each example that stand for a feature of an image (int64 `[examples]`)."""
        positions = np.flatnonzero(self.tokens.ids == (-1 if self.image_token_id is None else self.image_token_id))
        examples = np.searchsorted(self.tokens.token_bounds, positions, side="right") - 1
        return np.bincount(examples, minlength=len(self.texts))

    @cached_property
    def image_hashes(self) -> list[str]:
        """The hashes of the images of each example, without separators; empty for an example without images."""
        return ["".join([image.hash for image in text.images]) for text in self.texts]

    @property
    def removed_tokens(self) -> int:
        """Number of tokens that truncation removed from the built rows."""
        return int(self.cut.sum()) + sum(chain.from_iterable(self.dropped.values()))

    @property
    def repeated_tokens(self) -> int:
        """Number of tokens in all examples of the rows, except the longest example of each row."""
        lengths, bounds = self.lengths, pairwise(self.example_bounds)
        groups = [lengths[first:end] for first, end in bounds if end - first > 1]
        return int(sum(group.sum() - group.max() for group in groups))

    @property
    def last_source(self) -> Source:
        """The file and row number of the last row of the batch."""
        return self.outcomes[-1].source

    @property
    def row_bounds(self) -> NDArray[np.int64]:
        """Index of the first token of each built row, and the number of tokens (int64 `[built rows + 1]`)."""
        return self.tokens.token_bounds[self.example_bounds]

    def hash_rows(self) -> list[tuple[bytes, bytes]]:
        """Return for each built row a hash of its token ids (16 bytes) and a hash of its labels (8 bytes).

        The first hash also covers the images of the row. The second hash also covers the ratings of the row that
        training uses: the label and the margin.
        """
        hashes = zip(self._hash_ranges(self.example_bounds), self.conversations, strict=True)
        return [_add_ratings(row_hashes, row.parts) for row_hashes, row in hashes]

    def hash_examples(self) -> list[tuple[bytes, bytes]]:
        """Return the same hashes as `hash_rows` for each example."""
        hashes = zip(self._hash_ranges(range(len(self.texts) + 1)), self.example_conversations, strict=True)
        return [_add_ratings(example_hashes, [conversation]) for example_hashes, conversation in hashes]

    def _hash_ranges(self, bounds: Sequence[int]) -> list[tuple[bytes, bytes]]:
        """Hash ranges of examples. `bounds` contains the numbers of the first examples, and the number of examples."""
        ids, trained = self.tokens.ids.data, self.trained.data
        hashes = [
            (sha256(ids[start:end]).digest()[:16], sha256(trained[start:end]).digest()[:8])
            for start, end in pairwise(self.tokens.token_bounds[bounds].tolist())
        ]
        if not any(self.image_hashes):
            return hashes
        images = ["".join(self.image_hashes[first:end]) for first, end in pairwise(bounds)]
        return [
            (sha256(tokens + names.encode()).digest()[:16] if names else tokens, mask)
            for (tokens, mask), names in zip(hashes, images, strict=True)
        ]

    def select(
        self,
        outcomes: Sequence[Conversation | Reject],
        rows: Sequence[Sequence[int]],
        changed: Mapping[int, Example],
        dropped: Mapping[int, tuple[int, ...]],
    ) -> Batch:
        """Return a batch with some of the examples.

        Args:
            outcomes: the outcomes of the rows.
            rows: the numbers of the examples of each built row, in this batch.
            changed: number of an example -> the example with fewer tokens or other flags.
            dropped: as the attribute.
        """
        numbers = np.fromiter(chain.from_iterable(rows), np.int64)
        lengths, cut, flags, texts = self.lengths.copy(), self.cut.copy(), [*self.flags], [*self.texts]
        for number, example in changed.items():
            lengths[number], cut[number], flags[number] = len(example), example.cut, example.flags
            texts[number] = texts[number]._replace(images=example.images)
        positions = self.tokens.token_positions(numbers, lengths[numbers])
        return replace(
            self,
            outcomes=outcomes,
            counts=[*map(len, rows)],
            texts=RenderedBatch([texts[number] for number in numbers.tolist()]),
            tokens=self.tokens.select(numbers, positions, lengths[numbers]),
            trained=self.trained[positions],
            flags=[flags[number] for number in numbers.tolist()],
            cut=cut[numbers],
            dropped=dropped,
        )


def _add_ratings(hashes: tuple[bytes, bytes], parts: Sequence[Conversation]) -> tuple[bytes, bytes]:
    """Return hashes whose second hash also covers the ratings that training uses: the label and the margin."""
    ratings = [
        # Builds store margins as float32.
        (name, float(np.float32(part.feedback[name])))
        for part in parts
        if part.feedback
        for name in ("label", "margin")
        if name in part.feedback
    ]
    return (hashes[0], sha256(hashes[1] + repr(ratings).encode()).digest()[:8]) if ratings else hashes


def check_row_tokens(tokenizer: Tokenizer, tokens: RowTokens) -> None:
    """Check the tokens of a pretokenized row.

    Raises:
        BadRow: the tokenizer does not contain a token, or no token is trained.
    """
    ids = tokens.input_ids
    if (unknown := np.flatnonzero((ids < 0) | (ids >= tokenizer.size))).size:
        first = int(unknown[0])
        problem = f"the token id {ids[first]} is not in the vocabulary of tokenizer {tokenizer.name}"
        field = _name_token(tokens, first)
        raise BadRow("token_id", problem, field=field, hint="pass the tokenizer that made these tokens")
    if not tokens.trained.any():
        raise BadRow("nothing_trained", "the row has no trained token", field="labels")


def _name_token(tokens: RowTokens, position: int) -> str:
    """Return the path of a token in its row."""
    for number, (start, end) in enumerate(tokens.turns):
        if position < end:
            turn = f"[{number}]" if len(tokens.turns) > 1 else ""
            is_prompt = position < start
            return (
                f"prompt_token_ids{turn}[{position}]"
                if is_prompt
                else f"completion_token_ids{turn}[{position - start}]"
            )
    return f"input_ids[{position}]"


def _decode_tokens(
    tokenizer: Tokenizer, ids: NDArray[np.int32], trained: NDArray[np.bool_], image_token: int | None
) -> tuple[str, NDArray[np.int32], tuple[Span, ...]]:
    """Decode the tokens of a pretokenized row for display. Return the text, the offsets and the spans."""
    check_row_tokens(tokenizer, RowTokens(ids, trained))
    texts = token_texts(tokenizer, ids.tolist())
    ends = np.cumsum([len(text) for text in texts])
    offsets = np.stack((ends - [len(text) for text in texts], ends), axis=1).astype(np.int32)
    is_media = ids == (-1 if image_token is None else image_token)
    kinds = trained + 2 * is_media
    runs = np.flatnonzero(np.diff(kinds, prepend=-1, append=-1))
    spans = tuple(
        Span(
            int(offsets[start, 0]),
            int(offsets[end - 1, 1]),
            Part.MEDIA if is_media[start] else Part.CONTENT,
            number,
            bool(trained[start]),
        )
        for number, (start, end) in enumerate(pairwise(runs.tolist()))
    )
    return "".join(texts), offsets, spans


def compare_template_ids(batch: RenderedBatch, tokens: Encodings) -> Iterator[tuple[int, BadRow]]:
    """Yield the number and an error of each text whose tokens differ from the token ids that its template rendered."""
    for number, text in enumerate(batch):
        if not text.ids:
            continue
        ids = tokens.ids[tokens.token_bounds[number] : tokens.token_bounds[number + 1]].tolist()
        if ids != [*text.ids]:
            position = first_difference(ids, text.ids)
            values = [sequence[position] if position < len(sequence) else "nothing" for sequence in (text.ids, ids)]
            problem = f"token {position} of the function of the template is {values[0]}, but the tokenizer encodes "
            problem += f"its text as {values[1]}"
            hint = "use the tokenizer of the function, or remove control tokens from the text of the row"
            yield number, BadRow("template_ids", problem, hint=hint)
