"""NeMo Automodel: shifted labels, and packed sequences for its THD collator."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pyarrow as pa

from ftdata.build.read_packs import Packs
from ftdata.exporters.columns import list_column, make_batch, ones, token_columns
from ftdata.exporters.files import ArrowFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat
from ftdata.storage.arrow_arrays import int32_array
from ftdata.types import IGNORE_INDEX

_LINES = """\
# Copy these lines to your recipe.
dataset:
  _target_: datasets.load_from_disk
  dataset_path: {train}
dataloader:
  _target_: torchdata.stateful_dataloader.StatefulDataLoader
  collate_fn: nemo_automodel.components.datasets.utils.{collator}
{validation}"""
_VALIDATION = """\
validation_dataset:
  _target_: datasets.load_from_disk
  dataset_path: {test}
validation_dataloader:
  _target_: torchdata.stateful_dataloader.StatefulDataLoader
  collate_fn: nemo_automodel.components.datasets.utils.{collator}
"""
_PACKING = """\
# The model classes of NeMo Automodel, such as Qwen3 and Llama, require Transformer Engine for packed rows, with
# model.backend.attn: te. Other models require Flash Attention. distributed.cp_size must be 1.
packed_sequence:
  packed_sequence_size: {longest}
  prepacked: true
# Packed rows have different lengths. Larger batches fail.
step_scheduler:
  local_batch_size: 1
"""


def _convert(packs: Packs, facts: BuildFacts) -> pa.RecordBatch:
    labels = packs.shift(packs.labels, IGNORE_INDEX)
    if not facts.is_packed:
        return token_columns(packs, input_ids=packs.ids, labels=labels, attention_mask=ones(packs))
    bounds = packs.pack_bounds
    lengths = pa.ListArray.from_arrays(int32_array(packs.document_bounds), int32_array(packs.lengths))
    columns = {"input_ids": packs.ids, "labels": labels, "position_ids": packs.positions}
    lists = {name: list_column(values, bounds) for name, values in columns.items()}
    return make_batch({**lists, "seq_lens": lengths, "seq_lens_padded": lengths})


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    collator = "packed_sequence_thd_collater" if facts.is_packed else "default_collater"
    train, test = (json.dumps(f"{facts.folder}/{split}") for split in ("train", facts.test_split))
    validation = _VALIDATION.format(test=test, collator=collator)
    text = _LINES.format(train=train, collator=collator, validation=validation if facts.test_split else "")
    return {"automodel.yaml": text + (_PACKING.format(longest=facts.longest_pack) if facts.is_packed else "")}


FORMAT = ExportFormat(
    trainer="NeMo Automodel 0.7.0",
    rows="packs",
    labels="shifted in each document",
    boundaries="columns `seq_lens` and `position_ids`",
    padding="by the collator of NeMo Automodel: label -100",
    source="`nemo_automodel/components/datasets/utils.py:255`, `:326`, `components/loss/masked_ce.py:102`",
    files=ArrowFiles(),
    convert=_convert,
    configure=_configure,
)
