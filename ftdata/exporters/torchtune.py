"""torchtune: rows for its packed collator, and a component that loads them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ftdata.build.read_packs import Packs
from ftdata.exporters.columns import list_column, make_batch, token_columns
from ftdata.exporters.files import ArrowFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat

_SCRIPT = '''\
"""The data set for a recipe of torchtune. Add these lines to the configuration, and put this folder on PYTHONPATH:

dataset:
  _component_: ftdata_tokens.packed_tokens
  packed: {is_packed}
collate_fn: torchtune.data.{collator}
"""

import pathlib

import torch
from datasets import load_from_disk


class PackedTokens(torch.utils.data.Dataset):
    """Rows with `tokens` and `labels`, and with `input_pos` and `seq_lens` if rows are packed.

    Labels are not shifted; the recipe shifts them.
    """

    packed = {is_packed}

    def __init__(self, split):
        self.rows = load_from_disk(pathlib.Path(__file__).parent)[split]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {{name: torch.tensor(values) for name, values in row.items()}} if self.packed else row


def packed_tokens(tokenizer=None, *, split="train", packed={is_packed}):
    """Return the data set of a split. The recipe passes its tokenizer, which is not needed."""
    return PackedTokens(split)
'''


def _convert(packs: Packs, facts: BuildFacts) -> pa.RecordBatch:
    if not facts.is_packed:
        return token_columns(packs, tokens=packs.ids, labels=packs.labels)
    # The collator stacks rows, so all rows must have the same length.
    padded = packs.add_padding_documents(facts.longest_pack)
    columns = {"tokens": padded.ids, "labels": padded.labels, "input_pos": padded.positions}
    lists = {name: list_column(values, padded.pack_bounds) for name, values in columns.items()}
    return make_batch({**lists, "seq_lens": list_column(padded.lengths.astype(np.int32), padded.document_bounds)})


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    collator = "padded_collate_packed" if facts.is_packed else "padded_collate_sft"
    text = _SCRIPT.format(is_packed=facts.is_packed, collator=collator)
    return {"ftdata_tokens.py": text}


FORMAT = ExportFormat(
    trainer="torchtune 0.6.1",
    rows="packs",
    labels="not shifted; the recipe shifts them",
    boundaries="columns `seq_lens` and `input_pos`; rows padded to the longest row",
    padding="in the export: label -100",
    source="`recipes/full_finetune_single_device.py:642`, `torchtune/data/_collate.py:450`",
    files=ArrowFiles(),
    convert=_convert,
    configure=_configure,
)
