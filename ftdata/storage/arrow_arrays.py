"""Convert between numpy and Arrow arrays without importing pandas. Importing pandas takes longer than most builds.

`pa.array` and `to_numpy` import pandas, so this module uses the buffers of the arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def int32_array(values: NDArray[np.integer]) -> pa.Array:
    """Convert a numpy array of integers to an Arrow int32 array."""
    data = np.ascontiguousarray(values, dtype=np.int32)
    return pa.Array.from_buffers(pa.int32(), len(data), [None, pa.py_buffer(data)])


def int64_array(values: NDArray[np.int64] | Sequence[int | None]) -> pa.Array:
    """Convert integers to an Arrow int64 array. `None` becomes null."""
    validity = None
    if not isinstance(values, np.ndarray) and None in values:
        validity = pa.py_buffer(np.packbits([value is not None for value in values], bitorder="little"))
        values = [value or 0 for value in values]
    data = np.ascontiguousarray(values, dtype=np.int64)
    return pa.Array.from_buffers(pa.int64(), len(data), [validity, pa.py_buffer(data)])


def float32_array(values: Sequence[float | None]) -> pa.Array:
    """Convert numbers to an Arrow float32 array. `None` becomes null."""
    numbers = np.asarray([0 if value is None else value for value in values], np.float32)
    validity = _pack_bits(np.asarray([value is not None for value in values], np.bool_))
    return pa.Array.from_buffers(pa.float32(), len(numbers), [validity, pa.py_buffer(numbers)])


def bool_array(values: NDArray[np.bool_]) -> pa.Array:
    """Convert a numpy array to an Arrow bool array."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, _pack_bits(values)])


def _pack_bits(values: NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))


def string_array(values: Sequence[str]) -> pa.Array:
    """Convert strings to an Arrow string array. Lone surrogates are escaped."""
    # Most values repeat, such as file names, so each distinct value is encoded once.
    encoded = {value: value.encode("utf-8", "backslashreplace") for value in set(values)}
    data = [encoded[value] for value in values]
    buffers = [None, list_offsets(map(len, data)).buffers()[1], pa.py_buffer(b"".join(data))]
    return pa.Array.from_buffers(pa.string(), len(data), buffers)


def list_offsets(sizes: Iterable[int]) -> pa.Array:
    """Convert list sizes to Arrow list offsets. Return an int32 array of shape `[lists + 1]` that begins with 0."""
    return int32_array(np.cumsum([0, *sizes]))


def int64_column(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Convert an Arrow int64 column without nulls to a numpy array of shape `[rows]`."""
    return _join_chunks(column, np.int64)


def float32_column(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """Convert an Arrow float32 column to a numpy array of shape `[rows]`. A null becomes 0."""
    values = _join_chunks(column, np.float32).copy()
    # `to_numpy` would import pandas.
    values[[value is None for value in column.to_pylist()]] = 0
    return values


def _join_chunks(column: pa.ChunkedArray, dtype: Any) -> NDArray[Any]:
    chunks = [
        np.frombuffer(chunk.buffers()[1], dtype)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(chunks) if chunks else np.empty(0, dtype)
