"""Read Parquet files in batches that fit in memory, even if the sizes in the metadata are wrong."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ftdata.errors import InputRefused
from ftdata.readers.arrow import BATCH_ROWS, yield_rows
from ftdata.readers.arrow_headers import MAX_BATCH, TableLimits
from ftdata.readers.parquet_pages import read_pages
from ftdata.readers.streams import CHUNK, MAX_LINE, MAX_RATIO, Input, expansion_error, is_url
from ftdata.readers.table_checks import check_seekable, damaged_file_error
from ftdata.types import Reject, Row

_OPTIONS: dict[str, Any] = {"pre_buffer": False, "buffer_size": CHUNK}
"""Options to open a file. With `pre_buffer`, all data would stay in memory until the file is closed."""


def read_parquet(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of a Parquet file. Only one batch of rows is in memory at a time."""
    import pyarrow as pa

    with file.open() as stream:
        check_seekable(stream, file)
        try:
            table, limits = _open_parquet(stream, file)
            groups = range(*file.span) if file.span else range(table.num_row_groups)
            _check_value_counts(table, groups, limits)
            batches = _read_groups(table, groups, stream, file, limits.packed)
            yield from yield_rows(batches, table.schema_arrow, file, limits.packed)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise damaged_file_error(error, file, "Parquet") from None


def _check_value_counts(table: Any, groups: Iterable[int], limits: TableLimits) -> None:
    """Check that a Parquet file has no more rows and values than the limits for its size allow."""
    for number in groups:
        group = table.metadata.row_group(number)
        limits.rows(group.num_rows, sum(group.column(index).num_values for index in range(group.num_columns)))


def _read_groups(
    table: Any, groups: Iterable[int], stream: io.BufferedReader, file: Input, packed: int
) -> Iterator[Any]:
    """Yield the row groups of a Parquet file in batches that fit in memory.

    Raises:
        InputRefused: The groups expand beyond the limit, the rows of a group are too long on average, or the metadata
            contradict each other.
    """
    compressed_size = plain_size = 0
    for number in groups:
        group = table.metadata.row_group(number)
        columns = [group.column(index) for index in range(group.num_columns)]
        compressed_size += sum(column.total_compressed_size for column in columns)
        if compressed_size > packed or any(column.num_values < group.num_rows for column in columns):
            error = ValueError(f"the metadata of row group {number} contradict the size of the file or its values")
            raise damaged_file_error(error, file, "Parquet")
        chunks = [_measure_chunk(stream, column, file) for column in columns]
        size = sum(max(chunk.bytes, column.num_values // 8) for chunk, column in zip(chunks, columns, strict=True))
        plain_size += size
        if plain_size > max(MAX_BATCH, MAX_RATIO * compressed_size):
            raise expansion_error(plain_size, compressed_size, file.path)
        if size > MAX_LINE * max(group.num_rows, 1):
            average = size // max(group.num_rows, 1)
            message = f"has rows of {average:,} bytes on average, expected at most {MAX_LINE:,}"
            raise InputRefused("row_too_long", message, where=file.path)
        yield from _read_group(stream, table, number, list(zip(columns, chunks, strict=True)), file)


class _Chunk(NamedTuple):
    """Sizes of a column chunk after decompression. A column chunk contains one column of a row group.

    Attributes:
        bytes: size of the chunk in bytes.
        widest: estimated size in bytes of the widest value outside dictionaries; 0 without such values.
        has_dictionary: whether values of the chunk can refer to a dictionary.
    """

    bytes: int
    widest: float
    has_dictionary: bool


def _measure_chunk(stream: io.BufferedReader, column: Any, file: Input) -> _Chunk:
    """Measure the sizes of a column chunk after decompression."""
    bytes_, widest, has_dictionary = column.total_uncompressed_size, 0.0, bool(column.has_dictionary_page)
    if is_url(file.path):
        # The header of each page would need a separate request.
        return _Chunk(bytes_, bytes_ / max(column.num_values, 1), has_dictionary)
    page_bytes = 0
    try:
        for page in read_pages(stream, column):
            page_bytes += page.size
            has_dictionary |= page.is_dictionary
            if not page.is_dictionary:
                widest = max(widest, page.size if page.has_prefixes else page.size / max(page.values, 1))
    except ValueError as error:
        raise damaged_file_error(error, file, "Parquet") from None
    return _Chunk(max(bytes_, page_bytes), widest, has_dictionary)


def _read_group(
    stream: io.BufferedReader, table: Any, number: int, columns: Sequence[tuple[Any, _Chunk]], file: Input
) -> Iterator[Any]:
    """Yield a row group in batches of rows. A batch has fewer rows if the row group contains long values."""
    import pyarrow.parquet as pq

    rows = max(table.metadata.row_group(number).num_rows, 1)
    if all(chunk.bytes * column.num_values <= MAX_LINE for column, chunk in columns):
        yield from table.iter_batches(BATCH_ROWS, row_groups=[number])
        return
    row_bytes = sum(chunk.widest * column.num_values for column, chunk in columns) / rows
    flat, nested, fixed_bytes = _find_dictionary_columns(table, columns, file)
    row_bytes += fixed_bytes

    def open_with(names: Sequence[str]) -> Any:
        return pq.ParquetFile(stream, metadata=table.metadata, read_dictionary=list(names), **_OPTIONS)

    if flat:
        probe = open_with(flat).iter_batches(BATCH_ROWS, row_groups=[number], columns=flat)
        longest = next((size for size in map(_longest_values, probe) if size), 0)
        if longest > MAX_LINE:
            message = f"has values of {longest:,} bytes, expected at most {MAX_LINE:,}"
            raise InputRefused("row_too_long", message, where=file.path)
        row_bytes += longest
    # A row can repeat a dictionary value in a list any number of times, so lists are read as references.
    reader = open_with(nested) if nested else table
    yield from reader.iter_batches(int(max(1, min(BATCH_ROWS, MAX_LINE / max(row_bytes, 1)))), row_groups=[number])


def _find_dictionary_columns(
    table: Any, columns: Sequence[tuple[Any, _Chunk]], file: Input
) -> tuple[list[str], list[str], int]:
    """Find the columns that may be dictionary-encoded. In such a column, a short index can stand for a long value.

    Returns:
        The names of the text columns outside lists, the names of the text columns in lists, and the number of bytes of
        a row in all columns whose values have a fixed size.
    """
    flat, nested, fixed_bytes = list[str](), list[str](), 0
    for index, (column, chunk) in enumerate(columns):
        if not chunk.has_dictionary:
            continue
        schema = table.schema.column(index)
        if column.physical_type == "BYTE_ARRAY":
            (nested if schema.max_repetition_level else flat).append(column.path_in_schema)
        elif schema.max_repetition_level and (size := column.num_values * (schema.length or 0)) > MAX_BATCH:
            raise expansion_error(size, column.total_compressed_size, file.path)
        else:
            fixed_bytes += schema.length or 0
    return flat, nested, fixed_bytes


def _longest_values(batch: Any) -> int:
    """Find the longest dictionary value of each column, and return the sum of their sizes in bytes."""
    return sum(map(_longest_value, batch.columns))


def _longest_value(column: Any) -> int:
    """Return the size in bytes of the longest dictionary value of a column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_dictionary(kind):
        return pc.max(pc.binary_length(column.dictionary)).as_py() or 0
    if pa.types.is_struct(kind):
        return max(map(_longest_value, column.flatten()), default=0)
    if pa.types.is_map(kind):
        return max(_longest_value(column.keys), _longest_value(column.items))
    return _longest_value(column.values) if pa.types.is_nested(kind) else 0


def _open_parquet(stream: io.BufferedReader, file: Input) -> tuple[Any, TableLimits]:
    """Check the size of a Parquet file's metadata, then open the file."""
    import pyarrow.parquet as pq

    limits = TableLimits(file, stream.seek(0, io.SEEK_END))
    stream.seek(max(limits.packed - 8, 0))
    if (size := int.from_bytes(stream.read(4), "little")) < limits.packed:
        # If the size is larger than the file, pyarrow reports the damage.
        limits.metadata(size)
    stream.seek(0)
    return pq.ParquetFile(stream, **_OPTIONS), limits


def count_parquet_rows(file: Input) -> int | None:
    """Read the number of rows from a Parquet file's metadata. Return `None` if the metadata cannot be read."""
    metadata = _read_metadata(file)
    return None if metadata is None else int(metadata.num_rows)


def parquet_group_sizes(file: Input) -> list[int] | None:
    """Return the uncompressed size in bytes of each row group in a Parquet file.

    Return `None` if the metadata of the file cannot be read.
    """
    metadata = _read_metadata(file)
    return metadata and [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]


def _read_metadata(file: Input) -> Any:
    import pyarrow as pa

    with file.open() as stream:
        try:
            return _open_parquet(stream, file)[0].metadata if stream.seekable() else None
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            return None
