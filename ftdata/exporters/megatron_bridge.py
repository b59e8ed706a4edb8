"""Megatron-Bridge: packed sequences in `*.idx.parquet` files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ftdata.build.read_packs import Packs
from ftdata.exporters.columns import list_column, make_batch
from ftdata.exporters.files import ParquetFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat, load_eos_id
from ftdata.storage.arrow_arrays import int32_array

_LOSS = "untrained-after-eos"

_LINES = """\
# Options of the fine-tuning data set (FinetuningDatasetConfig with packed_sequence_specs):
#   packed_train_data_path: {folder}/train-*.idx.parquet
{validation}#   packed_sequence_size: {longest}
# The loss mask belongs to the target of each token, so Megatron-Bridge must not shift it.
"""


def _convert(packs: Packs, _: BuildFacts) -> pa.RecordBatch:
    bounds = packs.pack_bounds
    starts = packs.token_bounds[:-1] - np.repeat(bounds[:-1], np.diff(packs.document_bounds))
    return make_batch(
        {
            "input_ids": list_column(packs.ids, bounds),
            "loss_mask": list_column(packs.shift(packs.trained, False).astype(np.int8), bounds),
            "seq_start_id": pa.ListArray.from_arrays(int32_array(packs.document_bounds), int32_array(starts)),
        }
    )


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    split = facts.test_split
    validation = f"#   packed_val_data_path: {facts.folder}/{split}-*.idx.parquet\n" if split else ""
    return {"README.txt": _LINES.format(folder=facts.folder, validation=validation, longest=facts.longest[0])}


def _find_losses(packs: Packs, facts: BuildFacts) -> Mapping[str, int]:
    """Count the documents in which a token after the EOS token is trained. Megatron-Bridge does not train it."""
    lost = (packs.ids == load_eos_id(facts.tokenizer)) & packs.shift(packs.trained, False)
    documents = np.searchsorted(packs.token_bounds, np.flatnonzero(lost), side="right")
    return {_LOSS: len(np.unique(documents))}


FORMAT = ExportFormat(
    trainer="Megatron-Bridge 0.4.1",
    rows="packs",
    labels="`loss_mask` of the next token",
    boundaries="column `seq_start_id`",
    files=ParquetFiles(".idx.parquet"),
    convert=_convert,
    configure=_configure,
    losses={_LOSS: "a token that follows the EOS token inside a document is not trained"},
    find_losses=_find_losses,
)
