"""Read Arrow files, Arrow streams and `datasets` objects, one batch at a time.

A table stores a null for each absent key, so null cells are omitted from rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import InputRefused
from ftdata.readers.arrow_headers import check_ahead, check_blocks, check_stream
from ftdata.readers.in_memory import ValueFault, drop_nulls
from ftdata.readers.streams import (
    FREE_REPEATED,
    MAX_LINE,
    MAX_REPEATED,
    Input,
    expansion_error,
    file_from_chunks,
    is_url,
)
from ftdata.readers.table_checks import check_names, check_seekable, damaged_file_error
from ftdata.types import Reject, Row, Source

BATCH_ROWS = 1024
_CONTAINER_BYTES = 64

Convert = Callable[[Any], Any]


def read_arrow(file: Input) -> Iterator[Row | Reject]:
    """Yield the rows of an Arrow file or stream.

    Feather files, and the files that `datasets.save_to_disk` writes, have the same format.
    """
    import pyarrow as pa

    with file.open() as stream:
        try:
            size = _file_size(stream)
            if stream.peek(6)[:6] == b"ARROW1":
                check_seekable(stream, file)
                check_blocks(stream, file, size or 0)
                reader = pa.ipc.open_file(stream)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                _check_end(stream, file)
                batches = reader = pa.ipc.open_stream(_check_batches(stream, file, size))
            yield from yield_rows(batches, reader.schema, file, size)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise damaged_file_error(error, file, "Arrow") from None


def _file_size(stream: io.BufferedReader) -> int | None:
    if not stream.seekable():
        return None
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    return size


def _check_batches(stream: io.BufferedReader, file: Input, size: int | None) -> io.BufferedReader:
    """Check the size of each batch in a stream, and return a stream with the same content.

    A local file is checked before this function returns. Any other stream is checked while it is read.
    """
    if size is None or is_url(file.path):
        return file_from_chunks(check_stream(stream, file, size))
    check_ahead(stream, file, size)
    return stream


def _check_end(stream: io.BufferedReader, file: Input) -> None:
    """Check that a stream has an end mark. A stream that was truncated between two batches lacks this mark."""
    if stream.seekable():
        stream.seek(-min(8, stream.seek(0, io.SEEK_END)), io.SEEK_END)
        ends = stream.read(8) == b"\xff\xff\xff\xff\0\0\0\0"
        stream.seek(0)
        if not ends:
            hint = "write the stream again, and close the writer at the end"
            message = "the stream is truncated: it has no end mark"
            raise InputRefused("partial_file", message, where=file.path, hint=hint)


def from_dataset(dataset: Any) -> Iterator[Any]:
    """Yield the rows of a `datasets.Dataset`. If the data set has a custom transform, apply the transform."""
    if dataset.format["type"] == "custom":
        return map(drop_nulls, dataset)
    plain = dataset.with_format("arrow")
    batches = (batch for table in plain.iter(BATCH_ROWS) for batch in table.to_batches())
    return from_batches(batches, plain.data.schema)


def make_null_reader(features: Any) -> Callable[[Any], Any]:
    """Return a function that removes null values from a row of a data set. It keeps nulls inside JSON columns."""
    if features is None:
        return drop_nulls
    # Where JSON text was parsed, its nulls are part of the value.
    converters = {
        name: _feature_converter(feature, lambda value: value) for name, feature in features.to_dict().items()
    }
    keep_nulls = {name: convert for name, convert in converters.items() if convert}
    return lambda row: {
        name: keep_nulls.get(name, drop_nulls)(value) for name, value in row.items() if value is not None
    }


def from_batches(
    batches: Iterable[Any], schema: Any, count: Callable[[int], None] = lambda _: None
) -> Iterator[dict[str, Any] | ValueFault]:
    """Convert Arrow batches to rows. If Python cannot represent a row, yield a `ValueFault` with the reason.

    Args:
        batches: record batches.
        schema: schema of the batches.
        count: function that is called before each slice of rows with its approximate size in bytes.
    """
    try:
        _check_types(schema)
        converters = _json_converters(schema)
    except RecursionError:
        raise InputRefused("too_deep", "the columns are nested too deeply to be read") from None
    for batch in batches:
        for column in batch.columns if len(batch) else ():
            _check_column(column)
        for start in range(0, len(batch), BATCH_ROWS):
            rows = batch.slice(start, BATCH_ROWS)
            count(_values_size(rows))
            yield from _convert_in_slices(rows, converters)


def _convert_in_slices(batch: Any, converters: Mapping[str, Convert]) -> Iterator[dict[str, Any] | ValueFault]:
    """Convert a batch to rows, in slices of at most `MAX_LINE` bytes."""
    if _values_size(batch) <= MAX_LINE:
        yield from _convert_rows(batch, converters)
    elif len(batch) == 1:
        yield ValueFault("row_too_long", "", f"has {_values_size(batch):,} bytes, expected at most {MAX_LINE:,}")
    else:
        half = len(batch) // 2
        yield from _convert_in_slices(batch.slice(0, half), converters)
        yield from _convert_in_slices(batch.slice(half), converters)


def _values_size(batch: Any) -> int:
    """Return the approximate size of a batch in bytes. If several rows refer to one value, count it for each row."""
    return sum(map(_column_size, batch.columns))


def _column_size(column: Any) -> int:
    import pyarrow as pa

    # A Python list or dictionary takes at least 64 bytes.
    kind = column.type
    size = (_CONTAINER_BYTES if pa.types.is_nested(kind) else 8) * len(column)
    if isinstance(column, pa.ExtensionArray):
        size = _column_size(column.storage)
    elif pa.types.is_dictionary(kind):
        values, indices = column.dictionary, column.indices.drop_null()
        if (lengths := _byte_lengths(values)) is not None:
            size += int(lengths[indices.cast(pa.int64()).to_numpy()].sum())
        elif pa.types.is_nested(values.type) or isinstance(values, pa.ExtensionArray):
            size += len(indices) * _column_size(values)
    elif _is_view(kind):
        size += int(_view_lengths(column).sum())
    elif pa.types.is_struct(kind):
        size += sum(map(_column_size, column.flatten()))
    elif pa.types.is_map(kind):
        # The keys and the items of a slice are those of the whole column.
        first, end = (column.offsets[index].as_py() for index in (0, -1))
        size += sum(_column_size(entries.slice(first, end - first)) for entries in (column.keys, column.items))
    elif pa.types.is_nested(kind):
        # A list. `_check_types` refuses all other nested types.
        size += _column_size(column.flatten())
    else:
        size = max(size, int(column.nbytes))
    return size


def _byte_lengths(values: Any) -> NDArray[np.int64] | None:
    """Return the length in bytes of each string or binary value (0 for null). Return `None` for other types."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if _is_view(values.type):
        return _view_lengths(values)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not any(test(values.type) for test in tests):
        return None
    lengths: NDArray[np.int64] = pc.binary_length(values).cast(pa.int64()).fill_null(0).to_numpy()
    return lengths


def _is_view(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))


def _view_lengths(column: Any) -> NDArray[np.int64]:
    """Return the length in bytes of each value in a column of type string view or binary view."""
    buffer = column.buffers()[1]
    views = np.frombuffer(buffer, np.int32).reshape(-1, 4) if buffer is not None else np.empty((0, 4), np.int32)
    return views[column.offset : column.offset + len(column), 0].astype(np.int64)


def _check_types(schema: Any) -> None:
    """Check that no column is a list view, union or run-end encoded, because many rows could refer to one large value.

    Real data sets do not use these types.

    Raises:
        InputRefused: A column has a list view, union or run-end encoded type.
    """
    import pyarrow as pa

    def is_unsupported(kind: Any) -> bool:
        if isinstance(kind, pa.BaseExtensionType):
            return is_unsupported(kind.storage_type)
        if pa.types.is_dictionary(kind):
            return is_unsupported(kind.value_type)
        types = (pa.types.is_list_view, pa.types.is_large_list_view, pa.types.is_run_end_encoded, pa.types.is_union)
        if any(is_type(kind) for is_type in types):
            return True
        inner = range(kind.num_fields) if pa.types.is_nested(kind) else ()
        return any(is_unsupported(kind.field(number).type) for number in inner)

    for field in schema:
        if is_unsupported(field.type):
            message = f"column {field.name!r} has the unsupported type {field.type}"
            raise InputRefused("column_type", message, hint="cast it to an ordinary type, e.g. a list or a string")


def _check_column(column: Any) -> None:
    """Check that the lengths and offsets in the buffers of a column are valid. Invalid offsets could crash the process.

    Invalid text is accepted here, because it is rejected row by row.
    """
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if not any(kind in str(error) for kind in ("UTF8", "date64")):
            raise
        # Validation stops at the first fault. Without the types that have invalid values, it continues after the text.
        column.view(_storage_type(column.type)).validate(full=True)


def _storage_type(kind: Any) -> Any:
    """Return an Arrow type with the memory layout of `kind` in which all values are valid, e.g. binary for string."""
    import pyarrow as pa

    storage_types = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.date64(): pa.int64()}
    if pa.types.is_list(kind):
        return pa.list_(_storage_type(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_storage_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_storage_type(field.type)) for field in kind])
    return storage_types.get(kind, kind)


def yield_rows(batches: Iterable[Any], schema: Any, file: Input, size: int | None) -> Iterator[Row | Reject]:
    """Convert Arrow batches to rows. If Python cannot represent a row, yield a `Reject` with the reason.

    Args:
        batches: record batches.
        schema: Arrow schema of the batches.
        file: the file, for row sources and errors.
        size: size of the file in bytes; `None` if it is unknown.

    Raises:
        InputRefused: the file contains no rows, or its values are far larger than the file.
    """
    check_names(schema.names, file)
    total = 0

    def count(values_size: int) -> None:
        nonlocal total
        total += values_size
        if size is not None and total > max(FREE_REPEATED, MAX_REPEATED * size):
            hint = "if the size is correct, write the file again without compression and dictionary encoding"
            raise expansion_error(total, size, file.path, MAX_REPEATED, hint)

    index = -1
    for index, item in enumerate(from_batches(batches, schema, count)):
        source = Source(file.path, index)
        yield Reject(source, *item) if isinstance(item, ValueFault) else Row(item, source)
    if index < 0 and file.span is None:
        hint = "add rows to the file, or leave the file out"
        raise InputRefused("no_rows", "the file contains no rows", where=file.path, hint=hint)


def _json_converters(schema: Any) -> dict[str, Convert]:
    """Return a conversion function for each column that contains JSON text.

    The Arrow type of a column, or the `datasets` features in the metadata, identify JSON text.
    """
    try:
        features = dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
        by_feature = {name: _feature_converter(feature, _parse_json) for name, feature in features.items()}
    except (LookupError, TypeError, ValueError, RecursionError):
        by_feature = {}
    converters = {field.name: _type_converter(field.type) or by_feature.get(field.name) for field in schema}
    return {name: convert for name, convert in converters.items() if convert}


def _type_converter(kind: Any) -> Convert | None:
    import pyarrow as pa

    if getattr(kind, "extension_name", "") == "arrow.json":
        return _parse_json
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _list_converter(_type_converter(kind.value_type))
    if pa.types.is_struct(kind):
        return _struct_converter({field.name: _type_converter(field.type) for field in kind})
    return None


def _feature_converter(feature: Any, convert_json: Convert) -> Convert | None:
    """Return a function that applies `convert_json` to the JSON in a value, and removes nulls elsewhere in the value.

    Return `None` if a `datasets` feature contains no JSON.
    """
    kind = feature.get("_type") if isinstance(feature, dict) else None
    if kind == "Json":
        return convert_json
    if kind in ("List", "LargeList", "Sequence"):
        return _list_converter(_feature_converter(feature.get("feature"), convert_json))
    if isinstance(feature, dict) and not isinstance(kind, str):
        return _struct_converter({name: _feature_converter(inner, convert_json) for name, inner in feature.items()})
    return (
        _list_converter(_feature_converter(feature[0], convert_json)) if isinstance(feature, list) and feature else None
    )


def _parse_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _list_converter(convert: Convert | None) -> Convert | None:
    if convert is None:
        return None
    return lambda value: [convert(item) for item in value] if isinstance(value, list) else drop_nulls(value)


def _struct_converter(field_converters: Mapping[str, Convert | None]) -> Convert | None:
    converters = {name: convert for name, convert in field_converters.items() if convert}

    def convert_fields(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = {name: inner for name, inner in value.items() if inner is not None}
        return {name: converters.get(name, drop_nulls)(inner) for name, inner in fields.items()}

    return convert_fields if converters else None


def _convert_rows(batch: Any, converters: Mapping[str, Convert]) -> Iterator[dict[str, Any] | ValueFault]:
    try:
        rows = [_convert_cells(cells, converters) for cells in batch.to_pylist(maps_as_pydicts="strict")]
    except (OverflowError, ValueError, KeyError, RecursionError):
        for row in range(len(batch)):
            yield _convert_row(batch.slice(row, 1), converters)
        return
    yield from rows


def _convert_cells(cells: Mapping[str, Any], converters: Mapping[str, Convert]) -> dict[str, Any]:
    # Nulls inside JSON text are kept, because they are removed before the text is parsed.
    values = {name: drop_nulls(value) for name, value in cells.items() if value is not None}
    return {name: converters[name](value) if name in converters else value for name, value in values.items()}


def _convert_row(row: Any, converters: Mapping[str, Convert]) -> dict[str, Any] | ValueFault:
    """Convert a batch that contains a single row. If this fails, return a `ValueFault` with the name of the column."""
    cells: dict[str, Any] = {}
    for name in row.schema.names:
        try:
            cells |= _convert_cells(row.select([name]).to_pylist(maps_as_pydicts="strict")[0], converters)
        except UnicodeDecodeError as error:
            return ValueFault("encoding", name, f"contains text that is not UTF-8: {error}")
        except (OverflowError, ValueError, KeyError, RecursionError) as error:
            return ValueFault("value_range", name, f"contains a value that Python cannot represent: {error}")
    return cells
