"""Convert the columns of packs to Arrow columns with one list per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ftdata.build.read_packs import Packs
from ftdata.exporters.formats import BuildFacts
from ftdata.storage.arrow_arrays import int32_array

_ARROW_TYPES = {np.dtype(np.int32): pa.int32(), np.dtype(np.int8): pa.int8(), np.dtype(np.float32): pa.float32()}


def list_column(values: NDArray[Any], bounds: NDArray[np.int64]) -> pa.ListArray:
    """Return a list column. The list of row `i` is `values[bounds[i]:bounds[i + 1]]`.

    >>> list_column(np.arange(3, dtype=np.int32), np.array([0, 1, 3])).to_pylist()
    [[0], [1, 2]]
    """
    data = np.ascontiguousarray(values)
    items = pa.Array.from_buffers(_ARROW_TYPES[data.dtype], len(data), [None, pa.py_buffer(data)])
    return pa.ListArray.from_arrays(int32_array(bounds), items)


def token_columns(packs: Packs, **columns: NDArray[Any]) -> pa.RecordBatch:
    """Return a record batch with one list column per argument. Each argument has one value per token."""
    bounds = packs.pack_bounds
    return make_batch({name: list_column(values, bounds) for name, values in columns.items()})


def make_batch(columns: Mapping[str, pa.Array]) -> pa.RecordBatch:
    """Return a record batch with the given columns."""
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def pad_packs(packs: Packs, multiple: int, values: NDArray[Any], fill: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Append `fill` to the values of each pack until its length is a multiple of `multiple`.

    Returns:
        The padded values, and the bounds: the values of pack `i` are `values[bounds[i]:bounds[i + 1]]`.
    """
    sizes = np.diff(packs.pack_bounds)
    padded_sizes = -(-sizes // multiple) * multiple
    bounds = np.append(0, np.cumsum(padded_sizes))
    padded = np.full(bounds[-1], fill, values.dtype)
    offsets = np.repeat(bounds[:-1] - packs.pack_bounds[:-1], sizes)
    padded[np.arange(len(values)) + offsets] = values
    return padded, bounds


def ones(packs: Packs) -> NDArray[np.int32]:
    """Return an int32 array of ones, `[tokens]`."""
    return np.ones(len(packs.ids), np.int32)


def convert_labels(packs: Packs, _: BuildFacts) -> pa.RecordBatch:
    """Return the columns `input_ids` and `labels` (not shifted)."""
    return token_columns(packs, input_ids=packs.ids, labels=packs.labels)


def convert_documents(packs: Packs, _: BuildFacts) -> pa.RecordBatch:
    """Return the columns `input_ids`, `attention_mask` (all ones) and `labels` (not shifted)."""
    return token_columns(packs, input_ids=packs.ids, attention_mask=ones(packs), labels=packs.labels)


def convert_positions(packs: Packs, _: BuildFacts) -> pa.RecordBatch:
    """Return the columns `input_ids`, `labels` (not shifted) and `position_ids`, which restart at each document."""
    return token_columns(packs, input_ids=packs.ids, labels=packs.labels, position_ids=packs.positions)
