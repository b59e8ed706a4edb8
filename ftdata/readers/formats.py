"""Formats: which reader reads which suffix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ftdata.readers.arrow import read_arrow, read_parquet
from ftdata.readers.delimited import read_csv, read_tsv
from ftdata.readers.excel import read_excel
from ftdata.readers.json_rows import read_json, read_jsonl
from ftdata.readers.streams import Input
from ftdata.registry import Registry
from ftdata.types import Reject, Row

Reader = Callable[[Input], Iterator[Row | Reject]]
"""A reader: of a file, its rows exactly as written, and a `Reject` in the place of each that cannot be parsed.

It is called in other processes, too, so it is a function at the top of a module; what it raises, but for `FtdataError`,
is `reader_failed`.
"""

readers: Registry[Reader] = Registry("ftdata.readers", "reader")
"""Suffix, or name for `format` -> reader."""

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
