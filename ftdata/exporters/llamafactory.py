"""LLaMA-Factory: a folder for `tokenized_path`."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pyarrow as pa

from ftdata.build.read_packs import Packs
from ftdata.exporters.columns import list_column, make_batch, ones, pad_packs, token_columns
from ftdata.exporters.files import ArrowFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat
from ftdata.types import IGNORE_INDEX

_MULTIPLE = 8
"""The collator pads all columns except `position_ids` to a multiple of 8, so rows must have such a length."""

_LINES = """\
# Copy these lines to your configuration. LLaMA-Factory reads only `tokenized_path`, but it requires that data sets are
# named.
stage: sft
do_train: true
tokenized_path: {folder}
dataset: tokenized
{evaluation}cutoff_len: {longest}
"""
_PACKING = """\
# In a packed row, the attention mask contains the number of each document.
packing: true
neat_packing: true
# The collator does not pad `position_ids`, so rows of different lengths cannot be in the same batch.
per_device_train_batch_size: 1
per_device_eval_batch_size: 1
"""


def _convert(packs: Packs, facts: BuildFacts) -> pa.RecordBatch:
    if not facts.is_packed:
        return token_columns(packs, input_ids=packs.ids, attention_mask=ones(packs), labels=packs.labels)
    columns = {
        "input_ids": (packs.ids, 0),
        "attention_mask": (packs.document_numbers, 0),
        "labels": (packs.labels, IGNORE_INDEX),
        "position_ids": (packs.positions, 0),
    }
    return make_batch(
        {name: list_column(*pad_packs(packs, _MULTIPLE, values, fill)) for name, (values, fill) in columns.items()}
    )


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    longest = -(-facts.longest_pack // _MULTIPLE) * _MULTIPLE
    evaluation = "eval_dataset: tokenized\n" if facts.test_split else ""
    text = _LINES.format(folder=json.dumps(str(facts.folder)), evaluation=evaluation, longest=longest)
    return {"llamafactory.yaml": text + (_PACKING if facts.is_packed else "")}


FORMAT = ExportFormat(
    trainer="LLaMA-Factory 0.9.5",
    rows="packs",
    labels="not shifted",
    boundaries="document numbers in `attention_mask`, with `neat_packing`; rows padded to a multiple of 8",
    padding="in the export: label -100, document number 0",
    source="`llamafactory/data/loader.py:290`, `data/collator.py:525`",
    files=ArrowFiles(test_prefix="validation_"),
    convert=_convert,
    configure=_configure,
)
