"""The output of the scripts in this folder: what a trainer reads from an export.

    python SCRIPT.py EXPORT MODEL OUTPUT

Each script reads the folder EXPORT with the trainer's own loader and collator, and writes the documents that the
trainer trains on to OUTPUT. MODEL is the folder of a tiny model with its tokenizer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

IGNORE_INDEX = -100


def arguments() -> tuple[Path, Path, Path]:
    """Return the folder of the export, the folder of the model, and the output file."""
    export, model, output = map(Path, sys.argv[1:4])
    return export, model, output


def save(
    output: Path,
    documents: Iterable[tuple[Sequence[int], Sequence[int]]],
    version: str,
    losses: Iterable[tuple[Sequence[Sequence[int]], float]] = (),
) -> None:
    """Write the documents and losses that a trainer computes.

    Args:
        output: the file.
        documents: the token ids of each document, and the targets of the loss: target `i` is the token that follows
            token `i` if it is trained, otherwise -100. The last token has no target, so there is one target less.
        version: the name and version of the trainer.
        losses: for some batches, the token ids of the documents in the batch, and the mean loss of their trained tokens
            that the trainer's own code computes for MODEL.
    """
    ids, targets = list[Any](), list[Any]()
    for document, document_targets in documents:
        assert len(document_targets) == len(document) - 1
        ids.append(np.asarray(document, np.int64))
        targets.append(np.asarray(document_targets, np.int64))
    batches = [{"documents": [list(map(int, ids)) for ids in batch], "loss": float(loss)} for batch, loss in losses]
    np.savez(
        output,
        ids=np.concatenate(ids),
        targets=np.concatenate(targets),
        lengths=np.array([len(document) for document in ids]),
        about=np.array(json.dumps({"version": version, "losses": batches})),
    )


def split_by_positions(ids: Sequence[int], targets: Sequence[int], positions: Sequence[int]) -> list[Any]:
    """Split a packed sequence where the position ids restart at 0.

    Args:
        ids: the token ids of the sequence.
        targets: for each token, the trained next token or -100, as the loss uses it. The target of the last token of a
            document must be -100.
        positions: the position ids.

    Returns:
        Pairs of token ids and targets for `save`.
    """
    starts = [index for index, position in enumerate(positions) if position == 0]
    documents = list[Any]()
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        assert targets[end - 1] == IGNORE_INDEX, "the first token of the next document is a target"
        documents.append((ids[start:end], targets[start : end - 1]))
    return documents


def shift(labels: Sequence[int]) -> list[int]:
    """Return the label of the next token for each token, and -100 for the last token."""
    return [*labels[1:], IGNORE_INDEX]
