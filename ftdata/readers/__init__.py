"""Read rows from files, URLs and Python objects. Values stay exactly as written, and each row records its source.

    data ──sources──> files, local or remote ──streams──> bytes ──readers──> Row | Reject

A reader is a function `(Input) -> Iterator[Row | Reject]`, registered under the file suffixes that it reads. For a row
that cannot be parsed, a reader yields a `Reject` in the row's position, so that a single run reports all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftdata.errors import BadRow
from ftdata.readers.formats import Reader, readers
from ftdata.readers.sources import FileSource, MemorySource, reread_rows, resolve_sources
from ftdata.readers.streams import Input
from ftdata.types import Reject, Row

__all__ = ["FileSource", "Input", "MemorySource", "Reader", "read", "readers", "reread_rows", "resolve_sources"]


def read(data: Any) -> Iterator[Row]:
    """Yield every row of `data`, with all values exactly as written.

    Args:
        data: anything that `build_sft_dataset` accepts as data.

    Yields:
        Rows: `.data` is an object (a dict) or a bare list of messages; `.source` contains the file, the row number
        and the physical line.

    Raises:
        UsageError: A source cannot be found.
        InputRefused: A source has no reader, or cannot be read.
        BadRow: A row cannot be parsed. The error names the file, the physical line and the column.
        MissingDependency: An optional package for Excel files or for an object store is not installed.
        StorageError: A file cannot be opened.
        HubError: The network or the Hub fails repeatedly.

    >>> [row.data for row in read([{"question": "007", "answer": "2024-01-01"}])]
    [{'question': '007', 'answer': '2024-01-01'}]
    """
    for source in resolve_sources(data):
        for row in source.rows():
            if isinstance(row, Reject):
                raise BadRow(row.code, row.reason, where=str(row.source), hint=row.fix, field=row.field)
            yield row
