"""mlx-lm: JSON Lines with tokens and labels, and a script that trains on exactly these labels."""

from __future__ import annotations

from collections.abc import Mapping

from ftdata.exporters.columns import convert_labels
from ftdata.exporters.files import JsonLines
from ftdata.exporters.formats import BuildFacts, ExportFormat

_SCRIPT = '''\
"""Batching and loss functions for the mlx-lm trainer. The built-in functions cannot train several turns of a document.

Run this example with this folder on PYTHONPATH:

import mlx_lm
from ftdata_tokens import iterate_batches, load, loss
from mlx.optimizers import Adam
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

model, _ = mlx_lm.load("MODEL")
model.freeze()
linear_to_lora_layers(model, len(model.layers), {{"rank": 8, "scale": 20.0, "dropout": 0.0}})
args = TrainingArgs(batch_size=4, iters=1000, max_seq_length={max_length})
train(model, Adam(1e-5), load("train"), {validation}, args=args, loss=loss, iterate_batches=iterate_batches)
"""

import json
import pathlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np

FOLDER = pathlib.Path(__file__).parent


def load(split):
    """Return the documents of a split as pairs (token ids, labels)."""
    with open(FOLDER / f"{{split}}.jsonl", encoding="utf-8") as file:
        return [(row["input_ids"], row["labels"]) for row in map(json.loads, file)]


def iterate_batches(dataset, batch_size, max_seq_length, loop=False, seed=None, comm_group=None):
    """Yield the padded token ids and labels of each batch, as arrays of shape [batch, tokens]."""
    longest = max(len(ids) for ids, _ in dataset)
    if longest > max_seq_length:
        raise ValueError(f"max_seq_length is {{max_seq_length}}, expected at least {{longest}}")
    rank, ranks = (comm_group.rank(), comm_group.size()) if comm_group else (0, 1)
    if batch_size > len(dataset) or batch_size % ranks:
        limits = f"at most {{len(dataset)}} (documents), and a multiple of {{ranks}} (processes)"
        raise ValueError(f"batch_size is {{batch_size}}, expected {{limits}}")
    # All processes use the same order. Each process reads a slice of every batch.
    random = np.random.default_rng(seed or 0)
    while True:
        order = random.permutation(len(dataset)) if loop else range(len(dataset))
        for start in range(0, len(dataset) - batch_size + 1, batch_size):
            yield _pad([dataset[number] for number in order[start + rank : start + batch_size : ranks]])
        if not loop:
            break


def _pad(rows):
    # mlx-lm compiles the training step for each width. Rounding to multiples of 32 limits the number of widths.
    width = 1 + -(-max(len(ids) for ids, _ in rows) // 32) * 32
    ids = [list(ids) + [0] * (width - len(ids)) for ids, _ in rows]
    labels = [list(labels) + [-100] * (width - len(labels)) for _, labels in rows]
    return mx.array(ids), mx.array(labels)


def loss(model, ids, labels):
    """Return the mean loss of the trained tokens, and their number."""
    logits, targets = model(ids[:, :-1]), labels[:, 1:]
    mask = targets != -100
    losses = nn.losses.cross_entropy(logits, mx.where(mask, targets, 0)) * mask
    count = mask.sum()
    return losses.astype(mx.float32).sum() / mx.maximum(count, 1), count
'''


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    validation = f'load("{facts.test_split}")' if facts.test_split else "None"
    return {"ftdata_tokens.py": _SCRIPT.format(validation=validation, max_length=facts.max_length)}


FORMAT = ExportFormat(
    trainer="mlx-lm 0.32.0",
    rows="documents",
    labels="not shifted; the script shifts them",
    boundaries="one document per row",
    padding="by the script: label -100",
    source="`mlx_lm/tuner/trainer.py:249`",
    files=JsonLines(),
    convert=convert_labels,
    configure=_configure,
)
