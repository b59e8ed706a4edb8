"""Read: any source -> rows exactly as written, each with its place. Nothing is coerced, trimmed or guessed.

A reader is `(path) -> Iterator[Row | Reject]`, registered under the file suffixes it reads. A row that cannot
be parsed comes out as a `Reject` in its place, so that one run shows all of them.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftdata.errors import BadRow, InputRefused, UsageError, nearest
from ftdata.registry import Registry
from ftdata.types import Reject, Row, Source

Reader = Callable[[Path], Iterator[Row | Reject]]

readers: Registry[Reader] = Registry("ftdata.readers", "reader")

from ftdata.readers import lines as _lines  # noqa: E402  (registers itself in the registry above)

readers.register("json")(_lines.read_json)
readers.register("jsonl")(_lines.read_jsonl)
readers.register("ndjson")(_lines.read_jsonl)


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file and the name of the reader for it: all that a worker process needs to read it."""

    path: str
    reader: str

    def rows(self) -> Iterator[Row | Reject]:
        """Yield the file's rows and rejects, in file order."""
        return readers.get(self.reader)(Path(self.path))


@dataclass(frozen=True, slots=True)
class MemorySource:
    """Rows that are already Python objects."""

    items: Iterable[Any]
    path: str = "<memory>"

    def rows(self) -> Iterator[Row | Reject]:
        """Yield the items, numbered."""
        for index, item in enumerate(self.items):
            yield Row(item, Source(self.path, index))


def sources(data: Any) -> tuple[FileSource | MemorySource, ...]:
    """Resolve what a user may pass as data into sources, in the order given.

    Args:
        data: a path, a glob, a list of these, a pandas `DataFrame`, a `datasets.Dataset`, or any iterable of
            rows (dicts, or lists of messages).

    Raises:
        UsageError: a file is not there, a glob matches nothing, or no reader knows the suffix.
    """
    if isinstance(data, str | Path):
        return tuple(_file(path) for path in _expand(str(data)))
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        return (MemorySource(_dataframe_rows(data), "<DataFrame>"),)
    if isinstance(data, Mapping):
        raise UsageError("data_type", "data is one mapping, expected rows", hint="pass one split or a list of rows")
    if isinstance(data, list | tuple) and data and all(isinstance(item, str | Path) for item in data):
        return tuple(source for item in data for source in sources(item))
    if isinstance(data, Iterable):
        return (MemorySource(data),)
    raise UsageError("data_type", f"data is a {type(data).__name__}, expected a path, paths, or an iterable of rows")


def read(data: Any) -> Iterator[Row]:
    """Yield every row of `data` exactly as written, with its source.

    Args:
        data: anything that `build_sft_dataset` accepts as data.

    Raises:
        UsageError: the source cannot be found or has no reader.
        BadRow: a row cannot be parsed; names file, physical line and column.

    >>> [row.data for row in read([{"question": "007", "answer": "2024-01-01"}])]
    [{'question': '007', 'answer': '2024-01-01'}]
    """
    for source in sources(data):
        for row in source.rows():
            if isinstance(row, Reject):
                raise BadRow(row.code, row.reason, where=str(row.source), hint=row.fix, field=row.field)
            yield row


def _expand(pattern: str) -> list[str]:
    if Path(pattern).is_file():
        return [pattern]
    if Path(pattern).is_dir():
        raise UsageError("is_folder", f"{pattern} is a folder", hint=f"name the files in it: '{pattern}/*.jsonl'")
    found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else []  # noqa: PTH207  (absolute too)
    if not found:
        beside = [p.name for p in Path(pattern).parent.glob("*.json*")]
        hint = nearest(Path(pattern).name, beside) if beside else f"looked in {Path(pattern).parent.resolve()}"
        raise UsageError("file_not_found", f"no file matches {pattern!r}", hint=hint)
    return found


def _file(path: str) -> FileSource:
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in readers.names():
        known = ", ".join(f".{name}" for name in readers.names())
        raise InputRefused("no_reader", f"no reader for '.{suffix}' files", where=path, hint=f"readable: {known}")
    return FileSource(path, suffix)


def _dataframe_rows(frame: Any) -> Iterator[dict[str, Any]]:
    # A missing cell is an absent key; None and NaN in a table say nothing else.
    present = frame.notna()
    for position in range(len(frame)):
        cells, mask = frame.iloc[position], present.iloc[position]
        yield {name: _plain(cells[name]) for name in frame.columns if np.all(mask[name])}


def _plain(cell: Any) -> Any:
    # Cells read from Parquet hold lists as numpy arrays.
    if isinstance(cell, np.ndarray):
        return [_plain(item) for item in cell]
    if isinstance(cell, dict):
        return {key: _plain(item) for key, item in cell.items() if item is not None}
    return cell
