"""Convert the pandas, numpy and Python values in rows to JSON values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ftdata.errors import InputRefused

_BATCH = 1024


class ValueFault(NamedTuple):
    """Describes a row that is rejected because Python cannot represent one of its values.

    Attributes:
        code: error code.
        field: name of the column with the value; may be empty.
        reason: explanation for the user.
    """

    code: str
    field: str
    reason: str


def from_dataframe(frame: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a pandas `DataFrame`."""
    if len({str(name) for name in frame.columns}) < len(frame.columns):
        problem, hint = "several columns have the same name", "rename or remove one of the columns"
        raise InputRefused("repeated_column", problem, where="<DataFrame>", hint=hint)
    step = range(0, len(frame), _BATCH)
    for batch in (frame.iloc[start : start + _BATCH] for start in step):
        not_null = batch.notna().to_numpy()
        columns = [batch[name].tolist() for name in batch]
        for row, cells in enumerate(zip(*columns, strict=True)):
            yield {
                str(name): drop_nulls(arrays_to_lists(cell))
                for name, cell, has_value in zip(batch, cells, not_null[row], strict=True)
                if has_value
            }


def drop_nulls(value: Any) -> Any:
    """Remove null values from all objects in a JSON value."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


def arrays_to_lists(value: Any) -> Any:
    """Convert all arrays in a value to lists. pandas reads the lists in a Parquet file as arrays."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [arrays_to_lists(item) for item in value]
    return {key: arrays_to_lists(item) for key, item in value.items()} if isinstance(value, dict) else value
