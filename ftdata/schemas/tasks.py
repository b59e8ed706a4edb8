"""Detect from the data whether it contains conversations, preference pairs or labeled answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from ftdata.errors import BadRow
from ftdata.schemas.column_mapping import map_columns
from ftdata.schemas.labels import LABEL_COLUMNS
from ftdata.schemas.preference import is_pair
from ftdata.schemas.rankings import RANKING_COLUMNS
from ftdata.types import Reject, Row

_MAX_ROWS = 100
"""The kind of data is detected from the first valid row among this many rows."""


def detect_task(rows: Iterable[Row | Reject], columns: Mapping[str, str] | None = None) -> str:
    """Return the kind of data: `sft`, `preference` or `kto`.

    The first row with columns decides. A pair has the columns `chosen` and `rejected`, or `completions` (a ranked
    list). A labeled answer has the columns `prompt`, `completion` and `label` (true or false), or `kto_tag`.

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
    if is_pair(data) or isinstance(data.get(RANKING_COLUMNS[0]), list):
        return "preference"
    label, other_label = LABEL_COLUMNS
    has_answer = data.get("prompt") is not None and data.get("completion") is not None
    return "kto" if (has_answer and isinstance(data.get(label), bool)) or other_label in data else "sft"
