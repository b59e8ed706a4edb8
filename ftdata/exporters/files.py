"""The types of files that several export formats use: Arrow data sets, Parquet and JSON Lines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

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
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": "",
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        disk.write_json(target / split / "state.json", state)
        disk.write_json(target / split / "dataset_info.json", {})
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
    """A file `SPLIT.jsonl` with one JSON object per row."""

    def write(self, folder: Path, batches: Iterator[pa.RecordBatch]) -> None:
        """Write `data.jsonl`."""
        with disk.create(folder / "data.jsonl") as sink:
            for batch in batches:
                sink.write(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in batch.to_pylist()))

    def collect(self, target: Path, split: str, parts: Sequence[Path]) -> None:
        """Join the files of all parts."""
        with disk.create(target / f"{split}.jsonl") as sink:
            for part in parts:
                with (part / "data.jsonl").open("rb") as file:
                    shutil.copyfileobj(file, sink, 1 << 20)
