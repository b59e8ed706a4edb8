"""The types of files that several export formats use: Arrow data sets, Parquet and JSON Lines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ftdata.build.store import write_dataset_files
from ftdata.storage import disk


@dataclass(frozen=True)
class ArrowFiles:
    """A folder in the layout of `datasets.save_to_disk`, which `datasets.load_from_disk` reads.

    Attributes:
        test_prefix: a prefix for the names of all splits except `train`.
    """

    test_prefix: str = ""

    def write(self, folder: Path, batches: Iterator[pa.RecordBatch]) -> None:
        """Write `data.arrow`."""
        first = next(batches)
        with disk.create(folder / "data.arrow") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
            for batch in chain([first], batches):
                writer.write_batch(batch)

    def collect(self, target: Path, split: str, parts: Sequence[Path]) -> None:
        """Write the folder of a split, and add the split to `dataset_dict.json`."""
        index = target / "dataset_dict.json"
        splits = orjson.loads(index.read_bytes())["splits"] if index.exists() else []
        split = split if split == "train" else f"{self.test_prefix}{split}"
        names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
        disk.mkdir(target / split)
        for part, name in zip(parts, names, strict=True):
            disk.link(part / "data.arrow", target / split / name)
        write_dataset_files(target / split, names)
        disk.write_json(index, {"splits": [*splits, split]})


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files `SPLIT-00000-of-00001.parquet`, which `datasets.load_dataset` reads.

    Attributes:
        suffix: the end of the file names.
    """

    suffix: str = ".parquet"

    def write(self, folder: Path, batches: Iterator[pa.RecordBatch]) -> None:
        """Write `data.parquet`."""
        first = next(batches)
        with disk.create(folder / "data.parquet") as sink, pq.ParquetWriter(sink, first.schema) as writer:
            for batch in chain([first], batches):
                writer.write_batch(batch)

    def collect(self, target: Path, split: str, parts: Sequence[Path]) -> None:
        """Move the files to the folder of the export."""
        for number, part in enumerate(parts):
            disk.link(part / "data.parquet", target / f"{split}-{number:05d}-of-{len(parts):05d}{self.suffix}")


@dataclass(frozen=True)
class JsonLines:
    """A file `SPLIT.jsonl` with one JSON object per row, whose values are lists of numbers."""

    def write(self, folder: Path, batches: Iterator[pa.RecordBatch]) -> None:
        """Write `data.jsonl`."""
        options = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
        with disk.create(folder / "data.jsonl") as sink:
            for batch in batches:
                lists = zip(*(_split_lists(column) for column in batch.columns), strict=True)
                names = batch.schema.names
                sink.write(b"".join(orjson.dumps(dict(zip(names, row, strict=True)), option=options) for row in lists))

    def collect(self, target: Path, split: str, parts: Sequence[Path]) -> None:
        """Join the files of all parts."""
        with disk.create(target / f"{split}.jsonl") as sink:
            for part in parts:
                with (part / "data.jsonl").open("rb") as file:
                    shutil.copyfileobj(file, sink, 1 << 20)


def _split_lists(column: pa.ListArray) -> list[NDArray[Any]]:
    """Return the lists of a column as arrays."""
    return np.split(column.values.to_numpy(), column.offsets.to_numpy()[1:-1])
