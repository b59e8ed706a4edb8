"""The registry that maps each file suffix to its reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ftdata.readers.streams import Input
from ftdata.registry import Registry
from ftdata.types import Reject, Row

Reader = Callable[[Input], Iterator[Row | Reject]]
"""A function that yields the rows of a file exactly as written, and a `Reject` for each row that cannot be parsed.

It must be defined at the top level of a module, because worker processes call it, too. Any exception other than
`FtdataError` is reported with the code `reader_failed`.
"""

readers: Registry[Reader] = Registry("ftdata.readers", "reader")
"""Readers by file suffix, which is also the name to pass as `format`."""


def _import_reader(name: str) -> Reader:  # noqa: PLR0911  (one per reader)
    """Import a built-in reader. Most builds need only one of the readers."""
    match name:
        case "json":
            from ftdata.readers.json_rows import read_json

            return read_json
        case "jsonl":
            from ftdata.readers.json_rows import read_jsonl

            return read_jsonl
        case "csv":
            from ftdata.readers.delimited import read_csv

            return read_csv
        case "tsv":
            from ftdata.readers.delimited import read_tsv

            return read_tsv
        case "parquet":
            from ftdata.readers.parquet import read_parquet

            return read_parquet
        case "arrow":
            from ftdata.readers.arrow import read_arrow

            return read_arrow
        case _:
            from ftdata.readers.excel import read_excel

            return read_excel


_SUFFIXES = {"jsonl": ("jsonl", "ndjson"), "arrow": ("arrow", "feather", "ipc"), "excel": ("xlsx",)}

for _name in ("json", "jsonl", "csv", "tsv", "parquet", "arrow", "excel"):
    for _suffix in _SUFFIXES.get(_name, (_name,)):
        readers.register_lazily(_suffix, partial(_import_reader, _name))
