"""Read: any source -> rows exactly as written, each with its place. Nothing is coerced, trimmed or guessed.

    data ──sources──> a file, wherever it lies ──streams──> bytes ──lines, tables──> Row | Reject

A reader is `(Input) -> Iterator[Row | Reject]`, registered under the file suffixes it reads. A row that cannot
be parsed comes out as a `Reject` in its place, so that one run shows all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftdata.errors import BadRow
from ftdata.readers.formats import Reader, readers
from ftdata.readers.sources import FileSource, MemorySource, resolve_sources
from ftdata.readers.streams import Input
from ftdata.types import Reject, Row

__all__ = ["FileSource", "Input", "MemorySource", "Reader", "read", "readers", "resolve_sources"]


def read(data: Any) -> Iterator[Row]:
    """Yield every row of `data` exactly as written, with its source.

    Args:
        data: anything that `build_sft_dataset` accepts as data.

    Yields:
        Rows: `.data` is an object (a dict) or a bare list of messages, `.source` its file, row and physical line.

    Raises:
        UsageError: the source cannot be found.
        InputRefused: it has no reader, or cannot be read.
        BadRow: a row cannot be parsed; names file, physical line and column.
        MissingDependency: Excel or an object store need an extra that is not installed.
        StorageError: the disk refuses.
        HubError: the network or the hub fails again and again.

    >>> [row.data for row in read([{"question": "007", "answer": "2024-01-01"}])]
    [{'question': '007', 'answer': '2024-01-01'}]
    """
    for source in resolve_sources(data):
        for row in source.rows():
            if isinstance(row, Reject):
                raise BadRow(row.code, row.reason, where=str(row.source), hint=row.fix, field=row.field)
            yield row
