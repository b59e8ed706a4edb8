"""Megatron-LM: `.bin` and `.idx` files, with the loss mask in a second pair of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from ftdata.build.read_packs import Packs
from ftdata.exporters.columns import list_column, make_batch
from ftdata.exporters.formats import BuildFacts, ExportFormat
from ftdata.storage import disk

_COLUMNS = {"tokens": np.int32, "loss_mask": np.uint8}

_LINES = """\
Data prefixes: {folder}/train-00000-tokens, and for the loss mask {folder}/train-00000-loss_mask.

Document i has the same length in both data sets. Element i of the loss mask is 1 if token i is trained; it is not
shifted. `GPTDataset` of Megatron-LM reads the tokens, but ignores loss masks, joins documents, and cuts them at the
sequence length. Read the documents with `megatron.core.datasets.indexed_dataset.IndexedDataset` instead.
"""


@dataclass(frozen=True)
class IndexedFiles:
    """Files that `IndexedDataset` of megatron-core reads, written by the builder of megatron-core."""

    def write(self, folder: Path, batches: Iterator[pa.RecordBatch]) -> None:
        """Write the pairs `tokens.bin`, `tokens.idx` and `loss_mask.bin`, `loss_mask.idx`."""
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        builders = {name: IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype) for name, dtype in _COLUMNS.items()}
        for batch in batches:
            for name, builder in builders.items():
                column = batch[name]
                values = column.values.to_numpy()
                for start, end in pairwise(column.offsets.to_pylist()):
                    builder.add_document(values[start:end], [end - start])
        for name, builder in builders.items():
            builder.finalize(str(folder / f"{name}.idx"))

    def collect(self, target: Path, split: str, parts: Sequence[Path]) -> None:
        """Move the files of each part to the folder of the export."""
        for number, part in enumerate(parts):
            for name in _COLUMNS:
                for suffix in (".bin", ".idx"):
                    disk.link(part / f"{name}{suffix}", target / f"{split}-{number:05d}-{name}{suffix}")


def _convert(packs: Packs, _: BuildFacts) -> pa.RecordBatch:
    bounds = packs.pack_bounds
    return make_batch(
        {"tokens": list_column(packs.ids, bounds), "loss_mask": list_column(packs.trained.astype(np.int8), bounds)}
    )


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    return {"README.txt": _LINES.format(folder=facts.folder)}


FORMAT = ExportFormat(
    trainer="megatron-core 0.16.1",
    rows="documents",
    labels="loss mask of the tokens in a second data set, not shifted",
    boundaries="one document per entry of the index; `GPTDataset` joins documents",
    padding="none",
    source="`megatron/core/datasets/indexed_dataset.py:992`",
    files=IndexedFiles(),
    convert=_convert,
    package="megatron-core",
    configure=_configure,
)
