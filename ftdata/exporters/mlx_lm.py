"""mlx-lm: JSON Lines with tokens and labels, and a script that trains on exactly these labels."""

from __future__ import annotations

from collections.abc import Mapping

from ftdata.exporters.files import JsonLines
from ftdata.exporters.formats import BuildFacts, ExportFormat
from ftdata.exporters.litgpt import convert_labels

_SCRIPT = '''\
"""Functions for `mlx_lm.tuner.trainer.train`. The functions of mlx-lm cannot express several trained turns.

from mlx_lm.tuner.trainer import TrainingArgs, train
train(model, optimizer, load("train"), load("{validation}"), args=TrainingArgs(max_seq_length={longest}), loss=loss,
      iterate_batches=iterate_batches)
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
    order = np.random.default_rng(seed)
    while True:
        for start in range(0, len(dataset) - batch_size + 1, batch_size) if not loop else ():
            yield _pad(dataset[start : start + batch_size])
        if not loop:
            break
        numbers = order.permutation(len(dataset))
        for start in range(0, len(dataset) - batch_size + 1, batch_size):
            yield _pad([dataset[number] for number in numbers[start : start + batch_size]])


def _pad(rows):
    width = max(len(ids) for ids, _ in rows)
    ids = [list(row[0]) + [0] * (width - len(row[0])) for row in rows]
    labels = [list(row[1]) + [-100] * (width - len(row[1])) for row in rows]
    return mx.array(ids), mx.array(labels)


def loss(model, ids, labels):
    """Return the mean loss of the trained tokens, and their number."""
    logits, targets = model(ids[:, :-1]), labels[:, 1:]
    mask = targets != -100
    losses = nn.losses.cross_entropy(logits, mx.where(mask, targets, 0)) * mask
    count = mask.sum()
    return losses.astype(mx.float32).sum() / count, count
'''


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    validation = facts.test_split or "train"
    return {"ftdata_tokens.py": _SCRIPT.format(validation=validation, longest=facts.longest[1])}


FORMAT = ExportFormat(
    trainer="mlx-lm 0.32.0",
    rows="documents",
    labels="not shifted; the script shifts them",
    boundaries="one document per row",
    files=JsonLines(),
    convert=convert_labels,
    configure=_configure,
)
