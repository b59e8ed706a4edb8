"""The registry that maps each file suffix to its reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ftdata.readers.arrow import read_arrow
from ftdata.readers.delimited import read_csv, read_tsv
from ftdata.readers.excel import read_excel
from ftdata.readers.json_rows import read_json, read_jsonl
from ftdata.readers.parquet import read_parquet
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

for _read, _suffixes in {
    read_json: ("json",),
    read_jsonl: ("jsonl", "ndjson"),
    read_csv: ("csv",),
    read_tsv: ("tsv",),
    read_parquet: ("parquet",),
    read_arrow: ("arrow", "feather", "ipc"),
    read_excel: ("xlsx",),
}.items():
    for _suffix in _suffixes:
        readers.register(_suffix)(_read)
