"""MosaicML Streaming: MDS shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa

from ftdata.exporters.columns import convert_positions
from ftdata.exporters.formats import BuildFacts, ExportFormat
from ftdata.storage import disk

_LINES = """\
Read a row with `streaming.StreamingDataset(local="{folder}/train", batch_size=1)`.

Rows have different lengths, so use a batch size of 1, or a collator of your own. Convert the columns to int64 tensors.
Pass `input_ids`, `labels` and `position_ids` to a model of transformers with `use_cache=False`: otherwise, the
documents of a packed sequence attend to each other.
"""

_COLUMNS = ("input_ids", "labels", "position_ids")


@dataclass(frozen=True)
class StreamingShards:
    """A folder for `StreamingDataset`, written by `MDSWriter`."""

    def write(self, folder: Path, batches: Iterator[pa.RecordBatch]) -> None:
        """Write the shards, and `index.json`."""
        from streaming import MDSWriter

        encodings = dict.fromkeys(_COLUMNS, "ndarray:int32")
        with MDSWriter(columns=encodings, out=str(folder), hashes=["xxh64"]) as writer:
            for batch in batches:
                values = [batch[name].values.to_numpy() for name in _COLUMNS]
                for start, end in pairwise(batch["input_ids"].offsets.to_pylist()):
                    row = {name: column[start:end] for name, column in zip(_COLUMNS, values, strict=True)}
                    writer.write(row)

    def collect(self, target: Path, split: str, parts: Sequence[Path]) -> None:
        """Move the shards of all parts to the folder of the split, and write one index for them."""
        disk.mkdir(target / split)
        shards = []
        for number, part in enumerate(parts):
            for shard in json.loads((part / "index.json").read_bytes())["shards"]:
                name = f"part{number:05d}.{shard['raw_data']['basename']}"
                disk.link(part / shard["raw_data"]["basename"], target / split / name)
                shards.append({**shard, "raw_data": {**shard["raw_data"], "basename": name}})
        disk.write_json(target / split / "index.json", {"version": 2, "shards": shards})


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    return {"README.txt": _LINES.format(folder=facts.folder)}


FORMAT = ExportFormat(
    trainer="mosaicml-streaming 0.13.0",
    rows="packs",
    labels="not shifted",
    boundaries="column `position_ids`, which restarts at 0",
    padding="none",
    source="`streaming/base/dataset.py`; the trainer must read `labels`",
    files=StreamingShards(),
    convert=convert_positions,
    package="mosaicml-streaming",
    configure=_configure,
)
