"""The registry that maps each file suffix to its reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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

for _function, _suffixes in {
    "json_rows:read_json": ("json",),
    "json_rows:read_jsonl": ("jsonl", "ndjson"),
    "delimited:read_csv": ("csv",),
    "delimited:read_tsv": ("tsv",),
    "parquet:read_parquet": ("parquet",),
    "arrow:read_arrow": ("arrow", "feather", "ipc"),
    "excel:read_excel": ("xlsx",),
}.items():
    for _suffix in _suffixes:
        readers.register_import(_suffix, f"ftdata.readers.{_function}")
