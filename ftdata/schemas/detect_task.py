"""Detect from the data whether it contains conversations, preference pairs or labeled answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from ftdata.errors import BadRow
from ftdata.schemas.column_mapping import map_columns
from ftdata.schemas.labels import split_label
from ftdata.schemas.preference import rename_pair_columns
from ftdata.schemas.rankings import ANSWERS
from ftdata.types import SIDES, Reject, Row

_MAX_ROWS = 100
"""The maximum number of rows that are read to find a row with columns."""


def detect_task(rows: Iterable[Row | Reject], columns: Mapping[str, str] | None = None) -> str:
    """Return the kind of data: `sft`, `preference` or `kto`.

    The first row with columns decides:

    - A pair has the columns `chosen` and `rejected`, of which at most one is null, or `completions`, a ranked list.
    - A labeled answer has `prompt`, `completion` and a label that `split_label` accepts; or other columns and the label
      `true` or `false`, unless the row has the column `text`, where the label can be a class.

    Args:
        rows: the rows; at most 100 are read.
        columns: canonical column name -> name in the data.

    >>> from ftdata.types import UNKNOWN_SOURCE
    >>> [detect_task([Row(data, UNKNOWN_SOURCE)]) for data in (
    ...     {"prompt": "2+2?", "chosen": "4", "rejected": "22"},
    ...     {"prompt": "2+2?", "completion": "4", "label": True},
    ...     {"prompt": "2+2?", "completion": "4"},
    ... )]
    ['preference', 'kto', 'sft']
    """
    for row in islice(rows, _MAX_ROWS):
        if isinstance(row, Row) and isinstance(row.data, Mapping):
            try:
                return _detect_row_task(map_columns(row, columns)[0])
            except BadRow:
                continue
    return "sft"


def _detect_row_task(data: Mapping[str, Any]) -> str:
    data = rename_pair_columns(data)
    sides = [data[name] for name in SIDES if name in data]
    has_sides = len(sides) == len(SIDES) and sides != [None, None]
    if has_sides or isinstance(data.get(ANSWERS), list):
        return "preference"
    return "kto" if _has_label(data) else "sft"


def _has_label(data: Mapping[str, Any]) -> bool:
    try:
        answer, _ = split_label(data)
    except BadRow:
        return False
    (name,) = data.keys() - answer.keys()
    if name == "kto_tag" or (data.get("prompt") is not None and data.get("completion") is not None):
        return True
    return isinstance(data[name], bool) and "text" not in data
