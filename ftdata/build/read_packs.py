"""Read the packed sequences of a finished build in batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ftdata.types import IGNORE_INDEX, SIDES

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class Packs:
    """A batch of packed sequences in columns. A row that is not packed is a pack with one document.

    Attributes:
        ids: int32 `[tokens]`, the token ids.
        labels: int32 `[tokens]`, the id of each trained token, and -100 for all other tokens; not shifted.
        token_bounds: int64 `[documents + 1]`, the index of the first token of each document, and the number of tokens.
        document_bounds: int64 `[packs + 1]`, the index of the first document of each pack, and the number of documents.

    >>> ids = np.arange(5, dtype=np.int32)
    >>> packs = Packs(ids, ids, np.array([0, 2, 5]), np.array([0, 2]))
    >>> packs.positions.tolist(), packs.document_numbers.tolist(), len(packs), len(packs.split_documents())
    ([0, 1, 0, 1, 2], [1, 1, 2, 2, 2], 1, 2)
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    token_bounds: NDArray[np.int64]
    document_bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document_bounds) - 1

    @cached_property
    def trained(self) -> NDArray[np.bool_]:
        """Whether each token is trained: bool `[tokens]`."""
        return np.not_equal(self.labels, IGNORE_INDEX)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 `[documents]`, the number of tokens of each document."""
        return np.diff(self.token_bounds)

    @property
    def pack_bounds(self) -> NDArray[np.int64]:
        """int64 `[packs + 1]`, the index of the first token of each pack, and the number of tokens."""
        return self.token_bounds[self.document_bounds]

    @property
    def positions(self) -> NDArray[np.int32]:
        """int32 `[tokens]`, the index of each token in its document."""
        starts = np.repeat(self.token_bounds[:-1], self.lengths)
        return (np.arange(len(self.ids)) - starts).astype(np.int32)

    @property
    def document_numbers(self) -> NDArray[np.int32]:
        """int32 `[tokens]`, the number of each token's document in its pack, counted from 1."""
        documents = np.diff(self.document_bounds)
        numbers = np.arange(len(self.lengths)) - np.repeat(self.document_bounds[:-1], documents) + 1
        return np.repeat(numbers, self.lengths).astype(np.int32)

    def shift(self, values: NDArray[Number], fill: Any) -> NDArray[Number]:
        """Return the value of the next token of the same document for each token. The last token gets `fill`."""
        shifted = np.append(values[1:], values[:1])
        shifted[self.token_bounds[1:] - 1] = fill
        return shifted

    def without_first_labels(self) -> Packs:
        """Return the same packs with the label -100 for the first token of each document.

        No token of the document comes before this token, so in a pack, its label would train the last token of the
        document before.
        """
        labels = self.labels.copy()
        labels[self.token_bounds[:-1][self.lengths > 0]] = IGNORE_INDEX
        return replace(self, labels=labels)

    def add_padding_documents(self, length: int) -> Packs:
        """Return the same packs with exactly `length` tokens each.

        A shorter pack gets one more document, which consists of untrained tokens 0.
        """
        padding = length - np.diff(self.pack_bounds)
        is_short = padding > 0
        lengths = np.insert(self.lengths, self.document_bounds[1:][is_short], padding[is_short])
        places = np.arange(len(self.ids)) + np.repeat(np.cumsum(padding) - padding, np.diff(self.pack_bounds))
        ids = np.zeros(length * len(self), np.int32)
        labels = np.full(length * len(self), IGNORE_INDEX, np.int32)
        ids[places], labels[places] = self.ids, self.labels
        document_bounds = self.document_bounds + np.append(0, np.cumsum(is_short))
        return Packs(ids, labels, np.append(0, np.cumsum(lengths)), document_bounds)

    def split_documents(self) -> Packs:
        """Return the same documents in packs of one document each."""
        return replace(self, document_bounds=np.arange(len(self.token_bounds)))


def list_pack_files(folder: Path, split: str) -> list[Path]:
    """Return the files with the packed sequences of a split, in the order of the packs."""
    return sorted((folder / split).glob("data-*.arrow"))


def read_pack_file(path: Path) -> Iterator[Packs]:
    """Read a file with packed sequences, in batches of about a million tokens.

    Raises:
        ValueError: the columns do not match.
        OSError, pyarrow.ArrowException: the file cannot be read.
    """
    # A memory map would keep the pages of the whole file in the memory of this process.
    with pa.OSFile(os.fsencode(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            # Reading inconsistent buffers could crash the process.
            batch.validate(full=True)
            if "prompt_ids" in batch.schema.names:
                yield _read_pairs(batch)
                continue
            ids, labels, lengths = (_values(batch[name]) for name in ("input_ids", "labels", "seq_lengths"))
            token_bounds = np.append(0, np.cumsum(lengths, dtype=np.int64))
            document_bounds = np.append(0, np.cumsum(_sizes(batch["seq_lengths"]), dtype=np.int64))
            pack_sizes = np.diff(token_bounds[document_bounds])
            if (lengths < 0).any() or not np.array_equal(pack_sizes, _sizes(batch["input_ids"])):
                raise ValueError("seq_lengths do not match the number of tokens")
            if len(ids) != len(labels):
                raise ValueError("the number of labels does not match the number of tokens")
            yield Packs(ids, labels, token_bounds, document_bounds)


def _read_pairs(batch: pa.RecordBatch) -> Packs:
    """Return packs of two documents from the rows of a build of preference pairs: the chosen and the rejected side."""
    prompts = _lists(batch["prompt_ids"])
    ids, labels = list[NDArray[np.int32]](), list[NDArray[np.int32]]()
    sides = [(_lists(batch[f"{side}_ids"]), _lists(batch[f"{side}_labels"])) for side in SIDES]
    for number, prompt in enumerate(prompts):
        for side_ids, side_labels in sides:
            if len(side_ids[number]) != len(side_labels[number]):
                raise ValueError("the number of labels does not match the number of tokens")
            ids.append(np.concatenate((prompt, side_ids[number])))
            labels.append(np.concatenate((np.full(len(prompt), IGNORE_INDEX, np.int32), side_labels[number])))
    token_bounds = np.append(0, np.cumsum([len(document) for document in ids]))
    return Packs(np.concatenate(ids), np.concatenate(labels), token_bounds, np.arange(0, len(ids) + 1, len(SIDES)))


def _lists(column: pa.ListArray) -> list[NDArray[np.int32]]:
    return np.split(_values(column), np.cumsum(_sizes(column))[:-1])


def _sizes(column: pa.ListArray) -> NDArray[np.int32]:
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    return np.diff(offsets)


def _values(column: pa.ListArray) -> NDArray[np.int32]:
    flat = column.flatten()
    return np.frombuffer(flat.buffers()[1], np.int32)[flat.offset : flat.offset + len(flat)]
