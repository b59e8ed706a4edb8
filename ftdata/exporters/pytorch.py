"""A training loop of your own: tensors with position ids that restart at each document."""

from __future__ import annotations

from collections.abc import Mapping

from ftdata.exporters.columns import convert_positions
from ftdata.exporters.files import ArrowFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat

_SCRIPT = '''\
import pathlib

import torch
from datasets import load_from_disk


def collate(rows):
    """Return one row as tensors of shape [1, tokens]. Position ids restart at each document of a packed sequence."""
    (row,) = rows
    return {name: torch.tensor([row[name]]) for name in ("input_ids", "labels", "position_ids")}


def load(split="train"):
    """Return a data loader with one row per batch. Pass the batches to a model of transformers with use_cache=False."""
    data = load_from_disk(pathlib.Path(__file__).parent)[split]
    return torch.utils.data.DataLoader(data, batch_size=1, shuffle=split == "train", collate_fn=collate)
'''


def _configure(_: BuildFacts) -> Mapping[str, str]:
    return {"data.py": _SCRIPT}


FORMAT = ExportFormat(
    trainer="PyTorch",
    rows="packs",
    labels="not shifted",
    boundaries="column `position_ids`, which restarts at 0",
    padding="none: one row per batch",
    source="the loss of a transformers model shifts the labels",
    files=ArrowFiles(),
    convert=convert_positions,
    configure=_configure,
)
