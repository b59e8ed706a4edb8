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

_LIMITATION = "untrained-after-eos"
# Megatron-Bridge pads batches to a multiple of this number, unless the result would exceed packed_sequence_size.
_MULTIPLE = 16

_SCRIPT = '''\
"""The data set of a fine-tuning run.

In `ConfigContainer`, set `dataset` to the variable `dataset` of this module, `model.seq_length` to {longest}, and
`train.micro_batch_size` to 1.
The documents are not padded for context parallelism.

Megatron-Bridge 0.4 and 0.5 use different names: `FinetuningDatasetConfig` of `megatron.bridge.training.config` with
`packed_sequence_specs` instead of `enable_offline_packing` and `offline_packing_specs`, and `PackedSequenceSpecs` of
`megatron.bridge.data.datasets.packed_sequence`.
"""

from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig
from megatron.bridge.data.packing import PackedSequenceSpecs

dataset = GPTSFTDatasetConfig(
    dataset_root={folder!r},
    seq_length={longest},
    enable_offline_packing=True,
    offline_packing_specs=PackedSequenceSpecs(
        packed_sequence_size={longest},
        packed_train_data_path={train!r},
        packed_val_data_path={validation!r},
        # This file is not read. Without a path, Megatron-Bridge creates a folder for it in `dataset_root`.
        packed_metadata_path={metadata!r},
    ),
    do_validation={do_validation},
    do_test=False,
)
'''


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
    text = _SCRIPT.format(
        folder=str(facts.folder),
        longest=-(-facts.longest_pack // _MULTIPLE) * _MULTIPLE,
        train=f"{facts.folder}/train-*.idx.parquet",
        validation=f"{facts.folder}/{split}-*.idx.parquet" if split else None,
        metadata=f"{facts.folder}/metadata.json",
        do_validation=split is not None,
    )
    return {"ftdata_dataset.py": text}


def _count_affected(packs: Packs, _: pa.RecordBatch, facts: BuildFacts) -> Mapping[str, int]:
    """Count the documents in which a token after the EOS token is trained. Megatron-Bridge 0.6 does not train it."""
    lost = (packs.ids == load_eos_id(facts.tokenizer)) & packs.shift(packs.trained, False)
    documents = np.searchsorted(packs.token_bounds, np.flatnonzero(lost), side="right")
    return {_LIMITATION: len(np.unique(documents))}


FORMAT = ExportFormat(
    trainer="Megatron-Bridge 0.6.0",
    rows="packs",
    labels="`loss_mask`, shifted: element i is for token i + 1",
    boundaries="column `seq_start_id`",
    padding="by the collator of Megatron-Bridge: loss mask 0",
    source="`megatron/bridge/data/packing/gpt_sft.py:177`, `data/packing/parquet.py:451`",
    files=ParquetFiles(".idx.parquet"),
    convert=_convert,
    configure=_configure,
    limitations={_LIMITATION: "a token that follows the EOS token inside a document is not trained"},
    count_affected=_count_affected,
)
