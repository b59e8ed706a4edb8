"""Parquet page headers: the size of each page after decompression, read before pyarrow decompresses the page.

The footer of a Parquet file states the uncompressed size of each column chunk, but a hostile file can state any number
there. pyarrow allocates memory from the page headers, so this module reads the same headers (Thrift's compact protocol,
`PageHeader` in parquet-format's `parquet.thrift`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

_HEADER = 1 << 16
"""Bytes that a page header may have. It holds sizes, and statistics of the page: its smallest and largest value."""
_MAX_HEADER = 1 << 24
_MAX_DEPTH = 16

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_PREFIXES = 7
"""Parquet's encoding DELTA_BYTE_ARRAY, in which a value may repeat the beginning of the one before it."""


class ParquetPage(NamedTuple):
    """One page of a column chunk.

    Attributes:
        size: bytes of the page after decompression.
        values: number of values in the page.
        is_dictionary: whether the values are a dictionary, to which the following pages refer.
        has_prefixes: whether a value may repeat the beginning of the value before it (DELTA_BYTE_ARRAY).
    """

    size: int
    values: int
    is_dictionary: bool
    has_prefixes: bool


def read_pages(stream: io.BufferedReader, column: Any) -> Iterator[ParquetPage]:
    """Yield the pages of a column chunk; the position in the stream changes.

    Args:
        stream: the Parquet file.
        column: its `pyarrow.parquet.ColumnChunkMetaData`.

    Raises:
        ValueError: a header is damaged, or lies outside the column chunk.
    """
    position = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        position = min(position, column.dictionary_page_offset)
    end = position + column.total_compressed_size
    while position < end:
        stream.seek(position)
        header, length = _header(stream)
        kind, size, packed = header.get(1, -1), header.get(2, -1), header.get(3, -1)
        if size < 0 or packed < 0 or position + length + packed > end:
            raise ValueError(f"the page header at byte {position:,} is damaged")
        about = header.get({_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind, 0), {})
        encoding = about.get(4 if kind == _DATA_V2 else 2)
        yield ParquetPage(size, about.get(1, 0), kind == _DICTIONARY, encoding == _PREFIXES)
        position += length + packed


def _header(stream: io.BufferedReader) -> tuple[dict[int, Any], int]:
    """Return the fields of the header at the position of the stream, and its length in bytes."""
    data, size = b"", 256
    while True:
        more = stream.read(size)
        data += more
        reader = _Compact(data)
        try:
            return reader.struct(), reader.position
        except IndexError:
            if not more or len(data) > _MAX_HEADER:
                raise ValueError("a page header is cut off") from None
            size = _HEADER


class _Compact:
    """Reads Thrift's compact protocol: only integers and structs are kept, everything else is skipped.

    Raises:
        IndexError: the data ends inside a value.
        ValueError: the data is nested too deep, or has an unknown type.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Return the integers and structs among the fields of a struct, by their ids."""
        if depth > _MAX_DEPTH:
            raise ValueError("a page header is nested too deep")
        fields, number = dict[int, Any](), 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self._integer()
            value = self._value(byte & 15, depth)
            if value is not None:
                fields[number] = value
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # booleans are their own type
            return None
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind in (7, 8):
            self._skip(8 if kind == 7 else self._unsigned())
            return None
        if kind in (9, 10):
            return self._list(depth)
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"a page header has a value of the unknown type {kind}")

    def _list(self, depth: int) -> None:
        byte = self._byte()
        count = byte >> 4 if byte >> 4 < 15 else self._unsigned()
        for _ in range(count):
            # A boolean takes a byte in a list.
            _ = self._byte() if byte & 15 in (1, 2) else self._value(byte & 15, depth + 1)

    def _byte(self) -> int:
        self.position += 1
        return self.data[self.position - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a page header has an integer of more than 64 bits")

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, size: int) -> None:
        self.position += size
        if self.position > len(self.data):
            raise IndexError
