"""Read the uncompressed page sizes from Parquet page headers, before pyarrow decompresses the pages.

The footer of a Parquet file states the uncompressed size of each column chunk, but a hostile file can state any number
there. pyarrow allocates memory from the page headers, so this module reads the same headers (Thrift's compact protocol,
`PageHeader` in parquet-format's `parquet.thrift`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

_MAX_HEADER = 1 << 20
"""Bytes that a page header may have. It contains sizes and statistics: the smallest and largest value of the page."""
_FREE_PAGES = 1000
"""Pages that a column chunk may have in addition to one per value."""
_MAX_DEPTH = 16

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_PREFIXES = 7
"""Parquet's encoding DELTA_BYTE_ARRAY, in which a value may repeat the beginning of the value before it."""


class ParquetPage(NamedTuple):
    """The header of one page in a Parquet column chunk.

    Attributes:
        size: size of the page in bytes after decompression.
        values: number of values in the page.
        is_dictionary: whether the values are a dictionary, to which the following pages refer.
        has_prefixes: whether a value may repeat the beginning of the value before it (DELTA_BYTE_ARRAY).
    """

    size: int
    values: int
    is_dictionary: bool
    has_prefixes: bool


def read_pages(stream: io.BufferedReader, column: Any) -> Iterator[ParquetPage]:
    """Yield the header of each page in a column chunk. This function changes the stream position.

    Args:
        stream: the Parquet file.
        column: its `pyarrow.parquet.ColumnChunkMetaData`.

    Raises:
        ValueError: a header is damaged, or lies outside the column chunk.
    """
    max_pages = column.num_values + _FREE_PAGES
    position = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        position = min(position, column.dictionary_page_offset)
    end = position + column.total_compressed_size
    while position < end:
        if (max_pages := max_pages - 1) < 0:
            raise ValueError(f"a column chunk with {column.num_values:,} values has too many pages")
        stream.seek(position)
        header, length = _read_header(stream)
        kind, size, packed = header.get(1, -1), header.get(2, -1), header.get(3, -1)
        if size < 0 or packed < 0 or position + length + packed > end:
            raise ValueError(f"the page header at byte {position:,} is damaged")
        details = header.get({_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind, 0), {})
        encoding = details.get(4 if kind == _DATA_V2 else 2)
        yield ParquetPage(size, details.get(1, 0), kind == _DICTIONARY, encoding == _PREFIXES)
        position += length + packed


def _read_header(stream: io.BufferedReader) -> tuple[dict[int, Any], int]:
    """Read the page header at the current stream position. Return the header's fields and its length in bytes."""
    data, size = b"", 256
    while True:
        chunk = stream.read(size)
        data += chunk
        reader = _CompactReader(data)
        try:
            return reader.struct(), reader.position
        except IndexError:
            if not chunk or len(data) > _MAX_HEADER:
                raise ValueError("a page header is truncated") from None
            size = len(data)


class _CompactReader:
    """Parses data in Thrift's compact protocol. Only integers and structs are returned; all other values are skipped.

    Raises:
        IndexError: the data ends inside a value.
        ValueError: the data is nested too deeply, or has an unknown type.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Parse a struct. Return a mapping from field id to value for 32-bit integers and nested structs only."""
        if depth > _MAX_DEPTH:
            raise ValueError("a page header is nested too deeply")
        fields, number = dict[int, Any](), 0
        while byte := self._read_byte():
            previous, number = number, number + (byte >> 4) if byte >> 4 else self._read_integer()
            if number <= previous:
                raise ValueError("a page header repeats a field")
            value = self._read_value(byte & 15, depth)
            if value is not None:
                fields[number] = value
        return fields

    def _read_value(self, kind: int, depth: int) -> Any:
        if kind == 5:
            return self._read_int32()
        if kind == 12:
            return self.struct(depth + 1)
        if kind in (3, 7):
            self._skip(1 if kind == 3 else 8)
        elif kind in (4, 6):
            self._read_integer()
        elif kind == 8:
            self._skip(self._read_unsigned())
        elif kind in (9, 10):
            self._skip_list(depth)
        elif kind not in (1, 2):  # the type contains the value of a boolean
            raise ValueError(f"a page header has a value of the unknown type {kind}")
        return None

    def _skip_list(self, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("a page header is nested too deeply")
        byte = self._read_byte()
        count = byte >> 4 if byte >> 4 < 15 else self._read_unsigned()
        for _ in range(count):
            # In a list, a boolean takes a byte.
            _ = self._read_byte() if byte & 15 in (1, 2) else self._read_value(byte & 15, depth + 1)

    def _read_byte(self) -> int:
        self.position += 1
        return self.data[self.position - 1]

    def _read_unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._read_byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a page header has an integer of more than 64 bits")

    def _read_int32(self) -> int:
        value = self._read_integer()
        if not -(1 << 31) <= value < 1 << 31:
            raise ValueError("a page header has an integer of more than 32 bits")
        return value

    def _read_integer(self) -> int:
        value = self._read_unsigned()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, size: int) -> None:
        self.position += size
        if self.position > len(self.data):
            raise IndexError
