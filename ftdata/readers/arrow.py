"""Arrow: Parquet, Arrow files and streams, and data sets of `datasets`, in batches.

Every cell of a table has some value, so a null in one says no more than an absent key: both are left out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ftdata.errors import InputRefused
from ftdata.readers.arrow_headers import MAX_BATCH, TableLimits, check_ahead, check_blocks, check_stream
from ftdata.readers.in_memory import ValueFault, drop_nulls
from ftdata.readers.parquet_pages import read_pages
from ftdata.readers.streams import (
    CHUNK,
    FREE_REPEATED,
    MAX_LINE,
    MAX_RATIO,
    MAX_REPEATED,
    Input,
    expansion_error,
    file_from_chunks,
    is_url,
)
from ftdata.readers.table_checks import check_names, check_seekable, damaged_file_error
from ftdata.types import Reject, Row, Source

_BATCH = 1024

Read = Callable[[Any], Any]


def read_parquet(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of a Parquet file, a batch in memory at a time."""
    import pyarrow as pa

    with file.open() as stream:
        check_seekable(stream, file)
        try:
            table, limits = _parquet(stream, file)
            groups = range(*file.span) if file.span else range(table.num_row_groups)
            _check_values(table, groups, limits)
            batches = _of_groups(table, groups, stream, file)
            yield from _batches(batches, table.schema_arrow, file, limits.packed)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise damaged_file_error(error, file, "Parquet") from None


def _check_values(table: Any, groups: Iterable[int], limits: TableLimits) -> None:
    """Refuse a Parquet file with far more values than its size explains."""
    for number in groups:
        group = table.metadata.row_group(number)
        limits.rows(group.num_rows, sum(group.column(index).num_values for index in range(group.num_columns)))


def _of_groups(table: Any, groups: Iterable[int], stream: io.BufferedReader, file: Input) -> Iterator[Any]:
    """Yield the batches of row groups, none larger than memory is.

    Raises:
        InputRefused: the groups become more than a file may, or all rows of a group are too long.
    """
    small = large = 0
    for number in groups:
        group = table.metadata.row_group(number)
        columns = [group.column(index) for index in range(group.num_columns)]
        sizes = [_size_of(stream, column, file) for column in columns]
        size = sum(max(one.bytes, column.num_values // 8) for one, column in zip(sizes, columns, strict=True))
        small, large = small + sum(one.total_compressed_size for one in columns), large + size
        if large > max(MAX_BATCH, MAX_RATIO * small):
            raise expansion_error(large, small, file.path)
        if size > MAX_LINE * max(group.num_rows, 1):
            found = f"has rows of {size // max(group.num_rows, 1):,} bytes and more, at most {MAX_LINE:,} are read"
            raise InputRefused("row_too_long", found, where=file.path)
        yield from table.iter_batches(_rows_at_once(stream, table, number, columns, sizes), row_groups=[number])


class _Size(NamedTuple):
    """Bytes of a column chunk after decompression, and of its widest value at most, where that is known."""

    bytes: int
    widest: float


def _size_of(stream: io.BufferedReader, column: Any, file: Input) -> _Size:
    """Return how large a column chunk becomes."""
    bytes_, widest = column.total_uncompressed_size, 0.0
    if is_url(file.path):
        # To look at each page would take a request for each.
        return _Size(bytes_, bytes_ / max(column.num_values, 1))
    seen = 0
    try:
        for page in read_pages(stream, column):
            seen += page.size
            if not page.is_dictionary:
                widest = max(widest, page.size if page.has_prefixes else page.size / max(page.values, 1))
    except ValueError as error:
        raise damaged_file_error(error, file, "Parquet") from None
    return _Size(max(bytes_, seen), widest)


def _rows_at_once(
    stream: io.BufferedReader, table: Any, number: int, columns: Sequence[Any], sizes: Sequence[_Size]
) -> int:
    """Return how many rows of a group are read together: few where values are long, or stand once and are repeated."""
    import pyarrow.parquet as pq

    rows = max(table.metadata.row_group(number).num_rows, 1)
    if all(size.bytes * one.num_values <= MAX_LINE for one, size in zip(columns, sizes, strict=True)):
        return _BATCH
    coded = [index for index, one in enumerate(columns) if one.has_dictionary_page]
    most = [columns[index].num_values * (table.schema.column(index).length or 0) for index in coded]
    if names := [columns[index].path_in_schema for index in coded if columns[index].physical_type == "BYTE_ARRAY"]:
        reader = pq.ParquetFile(
            stream, metadata=table.metadata, pre_buffer=False, buffer_size=CHUNK, read_dictionary=names
        )
        first = next(reader.iter_batches(1, row_groups=[number], columns=names), None)
        longest = max(map(_longest, first.columns), default=0) if first is not None else 0
        most.append(longest * max(columns[index].num_values for index in coded))
    most.append(int(sum(size.widest * one.num_values for one, size in zip(columns, sizes, strict=True))))
    return int(max(1, min(_BATCH, MAX_LINE * rows / max([*most, 1]))))


def _longest(column: Any) -> int:
    """Return the bytes of the longest value in the dictionaries of a column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_dictionary(kind):
        return pc.max(pc.binary_length(column.dictionary)).as_py() or 0
    if pa.types.is_struct(kind):
        return max(map(_longest, column.flatten()), default=0)
    if pa.types.is_map(kind):
        return max(_longest(column.keys), _longest(column.items))
    return _longest(column.values) if pa.types.is_nested(kind) else 0


def _parquet(stream: io.BufferedReader, file: Input) -> tuple[Any, TableLimits]:
    """Open a Parquet file; refuse one whose metadata is most of it."""
    import pyarrow.parquet as pq

    limits = TableLimits(file, stream.seek(0, io.SEEK_END))
    stream.seek(max(limits.packed - 8, 0))
    if (size := int.from_bytes(stream.read(4), "little")) < limits.packed:
        # More than the file holds is damage, which pyarrow reports.
        limits.metadata(size)
    stream.seek(0)
    # Else what was read stays in memory to the end.
    return pq.ParquetFile(stream, pre_buffer=False, buffer_size=CHUNK), limits


def count_parquet_rows(file: Input) -> int | None:
    """Return how many rows a Parquet file says that it has, or `None` where it cannot be asked."""
    import pyarrow as pa

    with file.open() as stream:
        try:
            return int(_parquet(stream, file)[0].metadata.num_rows) if stream.seekable() else None
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            return None


def parquet_group_sizes(file: Input) -> list[int] | None:
    """Return the bytes that each row group of a Parquet file becomes, or `None` where it cannot be asked."""
    import pyarrow as pa

    with file.open() as stream:
        try:
            told = _parquet(stream, file)[0].metadata if stream.seekable() else None
            return told and [told.row_group(number).total_byte_size for number in range(told.num_row_groups)]
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            return None


def read_arrow(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of an Arrow file or stream (also Feather, and the files of `datasets.save_to_disk`)."""
    import pyarrow as pa

    with file.open() as stream:
        try:
            size = _length(stream)
            if stream.peek(6)[:6] == b"ARROW1":
                check_seekable(stream, file)
                check_blocks(stream, file, size or 0)
                found = pa.ipc.open_file(stream)
                batches = (found.get_batch(number) for number in range(found.num_record_batches))
                yield from _batches(batches, found.schema, file, size)
            else:
                _check_end(stream, file)
                found = pa.ipc.open_stream(_counted(stream, file, size))
                yield from _batches(iter(found), found.schema, file, size)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise damaged_file_error(error, file, "Arrow") from None


def _length(stream: io.BufferedReader) -> int | None:
    if not stream.seekable():
        return None
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    return size


def _counted(stream: io.BufferedReader, file: Input, size: int | None) -> io.BufferedReader:
    """Return a stream of which no batch becomes more than it may: looked through before, if it is on this machine."""
    if size is None or is_url(file.path):
        return file_from_chunks(check_stream(stream, file, size))
    check_ahead(stream, file, size)
    return stream


def _check_end(stream: io.BufferedReader, file: Input) -> None:
    """Refuse a stream that was cut off between two batches, which nothing else tells."""
    if stream.seekable():
        stream.seek(-min(8, stream.seek(0, io.SEEK_END)), io.SEEK_END)
        ends = stream.read(8) == b"\xff\xff\xff\xff\0\0\0\0"
        stream.seek(0)
        if not ends:
            fix = "write it again, and close its writer"
            raise InputRefused("partial_file", "the stream has no end mark: it is cut off", where=file.path, hint=fix)


def from_dataset(dataset: Any) -> Iterator[Any]:
    """Yield the rows of a `datasets.Dataset` as they are stored, or as its own transform gives them."""
    if dataset.format["type"] == "custom":
        return map(drop_nulls, dataset)
    plain = dataset.with_format("arrow")
    batches = (batch for table in plain.iter(_BATCH) for batch in table.to_batches())
    return from_batches(batches, plain.data.schema)


def make_null_reader(features: Any) -> Callable[[Any], Any]:
    """Return how to read rows that `datasets` decoded itself: nulls of tables are absent, those of JSON its own."""
    if features is None:
        return drop_nulls
    columns = {name: _own_nulls(feature) for name, feature in features.to_dict().items()}
    return lambda row: {name: columns.get(name, drop_nulls)(value) for name, value in row.items() if value is not None}


def _own_nulls(feature: Any) -> Read:
    kind = feature.get("_type") if isinstance(feature, dict) else None
    if kind == "Json":
        return lambda value: value
    if kind in ("List", "LargeList", "Sequence"):
        inner = _own_nulls(feature.get("feature"))
        return lambda value: [inner(one) for one in value] if isinstance(value, list) else drop_nulls(value)
    if isinstance(feature, dict) and not isinstance(kind, str):
        fields = {name: _own_nulls(one) for name, one in feature.items()}
        return lambda value: (
            {name: fields.get(name, drop_nulls)(one) for name, one in value.items() if one is not None}
            if isinstance(value, dict)
            else value
        )
    return drop_nulls


def from_batches(
    batches: Iterable[Any], schema: Any, count: Callable[[int], None] = lambda _: None
) -> Iterator[dict[str, Any] | ValueFault]:
    """Yield the rows of Arrow's batches, with a fault for each that Python cannot have.

    `count` is called with about how many bytes of values come next.
    """
    try:
        _refuse_overlapping(schema)
        columns = _in_json(schema)
    except RecursionError:
        raise InputRefused("too_deep", "has columns that are nested too deep to be read") from None
    for batch in batches:
        for column in batch.columns if len(batch) else ():
            _check(column)
        for start in range(0, len(batch), _BATCH):
            piece = batch.slice(start, _BATCH)
            count(_size(piece))
            yield from _in_pieces(piece, columns)


def _in_pieces(batch: Any, columns: Mapping[str, Read]) -> Iterator[dict[str, Any] | ValueFault]:
    """Yield the rows of a batch: as Python values they are no more together than a row may be."""
    if _size(batch) <= MAX_LINE:
        yield from _values(batch, columns)
    elif len(batch) == 1:
        yield ValueFault("row_too_long", "", f"is {_size(batch):,} bytes long, at most {MAX_LINE:,} are read")
    else:
        half = len(batch) // 2
        yield from _in_pieces(batch.slice(0, half), columns)
        yield from _in_pieces(batch.slice(half), columns)


def _size(batch: Any) -> int:
    """Return about how many bytes rows are as values: one that is meant several times counts as often."""
    return sum(map(_bytes, batch.columns))


def _bytes(column: Any) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, size = column.type, 8 * len(column)
    if isinstance(column, pa.ExtensionArray):
        size = _bytes(column.storage)
    elif pa.types.is_dictionary(kind):
        values, meant = column.dictionary, column.indices.drop_null()
        if pa.types.is_nested(values.type):
            size += len(meant) * _bytes(values)
        elif _has_length(values.type):
            size += pc.sum(pc.binary_length(values).cast(pa.int64()).take(meant)).as_py() or 0
    elif pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        views = np.frombuffer(column.buffers()[1], np.int32).reshape(-1, 4)
        size += int(views[column.offset : column.offset + len(column), 0].sum(dtype=np.int64))
    elif pa.types.is_struct(kind):
        size += sum(map(_bytes, column.flatten()))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        size += _bytes(column.flatten())
    else:
        size = max(size, int(column.nbytes))
    return size


def _has_length(kind: Any) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in tests)


def _refuse_overlapping(schema: Any) -> None:
    """Refuse columns of which a value may be meant any number of times: nobody writes data so.

    Raises:
        InputRefused: there is one.
    """
    import pyarrow as pa

    def odd(kind: Any) -> bool:
        if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind) or pa.types.is_run_end_encoded(kind):
            return True
        inner = range(kind.num_fields) if pa.types.is_nested(kind) and not pa.types.is_dictionary(kind) else ()
        return any(odd(kind.field(number).type) for number in inner)

    for each in schema:
        if odd(each.type):
            found = f"column {each.name!r} is a {each.type}, which is not read"
            raise InputRefused("column_type", found, hint="cast it to what it stands for")


def _check(column: Any) -> None:
    """Refuse buffers that contradict each other, which would end the process; what is no text is found row by row."""
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if not any(kind in str(error) for kind in ("UTF8", "date64")):
            raise
        # What is wrong first hides what is wrong besides.
        column.view(_in_bytes(column.type)).validate(full=True)


def _in_bytes(kind: Any) -> Any:
    """Return a type of the same buffers, of which nothing but these can be wrong."""
    import pyarrow as pa

    known = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.date64(): pa.int64()}
    if pa.types.is_list(kind):
        return pa.list_(_in_bytes(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_in_bytes(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([each.with_type(_in_bytes(each.type)) for each in kind])
    return known.get(kind, kind)


def _batches(batches: Iterable[Any], schema: Any, file: Input, size: int | None) -> Iterator[Row | Reject]:
    check_names(schema.names, file)
    total = 0

    def count(plain: int) -> None:
        nonlocal total
        total += plain
        if size is not None and total > max(FREE_REPEATED, MAX_REPEATED * size):
            hint = "if that is right, write it again without compression and dictionaries"
            raise expansion_error(total, size, file.path, MAX_REPEATED, hint)

    index = -1
    for index, item in enumerate(from_batches(batches, schema, count)):
        source = Source(file.path, index)
        yield Reject(source, *item) if isinstance(item, ValueFault) else Row(item, source)
    if index < 0 and file.span is None:
        raise InputRefused("no_rows", "the file holds no rows", where=file.path)


def _in_json(schema: Any) -> dict[str, Read]:
    """Return how to read the columns that hold JSON text: by Arrow's own type, or as `datasets` notes it."""
    try:
        features = dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
        noted = {name: _reader_of(feature) for name, feature in features.items()}
    except (LookupError, TypeError, ValueError, RecursionError):
        noted = {}
    found = {each.name: _reader(each.type) or noted.get(each.name) for each in schema}
    return {name: read for name, read in found.items() if read}


def _reader(kind: Any) -> Read | None:
    import pyarrow as pa

    if getattr(kind, "extension_name", "") == "arrow.json":
        return _text_read
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _each(_reader(kind.value_type))
    if pa.types.is_struct(kind):
        return _fields({kind.field(n).name: _reader(kind.field(n).type) for n in range(kind.num_fields)})
    return None


def _reader_of(feature: Any) -> Read | None:
    kind = feature.get("_type") if isinstance(feature, dict) else None
    if kind == "Json":
        return _text_read
    if kind in ("List", "LargeList", "Sequence"):
        return _each(_reader_of(feature.get("feature")))
    if isinstance(feature, dict) and not isinstance(kind, str):
        return _fields({name: _reader_of(inner) for name, inner in feature.items()})
    return _each(_reader_of(feature[0])) if isinstance(feature, list) and feature else None


def _text_read(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _each(read: Read | None) -> Read | None:
    return None if read is None else lambda value: [read(one) for one in value] if isinstance(value, list) else value


def _fields(reads: Mapping[str, Read | None]) -> Read | None:
    chosen = {name: read for name, read in reads.items() if read}

    def fields(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: chosen[name](inner) if name in chosen else inner for name, inner in value.items()}

    return fields if chosen else None


def _values(batch: Any, columns: Mapping[str, Read]) -> Iterator[dict[str, Any] | ValueFault]:
    try:
        found = [_item(item, columns) for item in batch.to_pylist(maps_as_pydicts="strict")]
    except (OverflowError, ValueError, KeyError, RecursionError):
        for row in range(len(batch)):
            yield _value(batch.slice(row, 1), columns)
        return
    yield from found


def _item(item: Mapping[str, Any], columns: Mapping[str, Read]) -> dict[str, Any]:
    # Nulls inside of JSON text are its own.
    found = {name: drop_nulls(value) for name, value in item.items() if value is not None}
    return {name: columns[name](value) if name in columns else value for name, value in found.items()}


def _value(row: Any, columns: Mapping[str, Read]) -> dict[str, Any] | ValueFault:
    found: dict[str, Any] = {}
    for name in row.schema.names:
        try:
            found |= _item(row.select([name]).to_pylist(maps_as_pydicts="strict")[0], columns)
        except UnicodeDecodeError as error:
            return ValueFault("encoding", name, f"holds text that is not UTF-8: {error}")
        except (OverflowError, ValueError, KeyError, RecursionError) as error:
            return ValueFault("value_range", name, f"holds a value that Python does not: {error}")
    return found
