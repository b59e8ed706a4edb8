"""Formats: which reader reads which suffix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ftdata.readers.arrow import read_arrow, read_parquet
from ftdata.readers.excel import read_excel
from ftdata.readers.lines import read_json, read_jsonl
from ftdata.readers.separated import read_csv, read_tsv
from ftdata.readers.streams import Input
from ftdata.registry import Registry
from ftdata.types import Reject, Row

Reader = Callable[[Input], Iterator[Row | Reject]]

readers: Registry[Reader] = Registry("ftdata.readers", "reader")
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
