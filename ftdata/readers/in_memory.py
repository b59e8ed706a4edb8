"""Rows in memory: of pandas, of numpy, of plain Python; as JSON has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ftdata.errors import InputRefused

_BATCH = 1024


class ValueFault(NamedTuple):
    """A row that Python cannot have, and why."""

    code: str
    field: str
    reason: str


def from_dataframe(frame: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a pandas `DataFrame`."""
    if len({str(name) for name in frame.columns}) < len(frame.columns):
        raise InputRefused("repeated_column", "names a column twice", where="<DataFrame>")
    step = range(0, len(frame), _BATCH)
    for part in (frame.iloc[start : start + _BATCH] for start in step):
        known = part.notna().to_numpy()
        columns = [part[name].tolist() for name in part]
        for at, cells in enumerate(zip(*columns, strict=True)):
            yield {
                str(name): drop_nulls(arrays_to_lists(cell))
                for name, cell, there in zip(part, cells, known[at], strict=True)
                if there
            }


def drop_nulls(value: Any) -> Any:
    """Return a JSON value without the nulls in its objects."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


def arrays_to_lists(value: Any) -> Any:
    """Return a cell with lists for the arrays in it, as which pandas reads the lists of Parquet."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [arrays_to_lists(item) for item in value]
    return {key: arrays_to_lists(item) for key, item in value.items()} if isinstance(value, dict) else value
