"""Convert pretokenized rows: rows that contain token ids, and labels or a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ftdata.errors import BadRow
from ftdata.schemas.shapes import LENGTH_COLUMNS, MASK_COLUMNS, parse_json_list
from ftdata.schemas.training_fields import describe_value
from ftdata.types import IGNORE_INDEX, Conversation, RowTokens


def read_token_row(data: Mapping[str, Any]) -> Conversation:
    """Convert a pretokenized row to a conversation. Each label must be -100 or the token id at its position.

    Raises:
        BadRow: the row has no labels, the row is padded or packed, or a value is invalid.
    """
    ids = _read_integers(data, "input_ids")
    if not len(ids):
        raise BadRow("no_tokens", "the list is empty, expected token ids", field="input_ids")
    lengths = {name: [len(ids)] for name in LENGTH_COLUMNS}
    single = {"attention_mask": [1] * len(ids), "position_ids": [*range(len(ids))], "cu_seqlens": [0, len(ids)]}
    for name, expected in {**single, **lengths}.items():
        if data.get(name) is not None and _read_integers(data, name).tolist() != expected:
            problem = "the row is padded or packed, expected one unpadded example per row"
            hint = (
                "write one row per example, without padding; if the data are a packed build, build it without packing, "
                "and set packing in the build that combines the data"
            )
            raise BadRow("tokens_shape", problem, field=name, hint=hint)
    masks = {name: _read_mask(data, name, len(ids)) for name in MASK_COLUMNS if data.get(name) is not None}
    if data.get("labels") is not None:
        labels = _read_integers(data, "labels")
        if len(labels) != len(ids):
            raise BadRow("tokens_shape", f"the row has {len(labels)} labels for {len(ids)} token ids", field="labels")
        trained = labels != IGNORE_INDEX
        if (wrong := np.flatnonzero(trained & (labels != ids))).size:
            index = int(wrong[0])
            label, id_ = labels[index], ids[index]
            problem = f"the label is {label}, expected the token id at its position ({id_}) or {IGNORE_INDEX}"
            raise BadRow("label_value", problem, field=f"labels[{index}]")
    elif masks:
        trained = next(iter(masks.values()))
    else:
        hint = f"add labels, or one of {', '.join(MASK_COLUMNS)}"
        message = "the row has no labels, so the trained tokens are unknown"
        raise BadRow("no_labels", message, field="input_ids", hint=hint)
    for name, mask in masks.items():
        if not np.array_equal(mask, trained):
            index = int(np.flatnonzero(mask != trained)[0])
            other = "labels" if data.get("labels") is not None else next(iter(masks))
            states = ("trained", "not trained")[:: 1 if mask[index] else -1]
            problem = (
                f"the mask differs from {other}: token {index} is {states[0]} in {name}, but {states[1]} in {other}"
            )
            raise BadRow("two_masks", problem, field=f"{name}[{index}]", hint=f"keep only {name} or {other}")
    trained[0] = False  # There is no context from which the model could predict the first token.
    return Conversation(messages=(), tokens=RowTokens(ids.astype(np.int32), trained))


def _read_mask(data: Mapping[str, Any], name: str, length: int) -> Any:
    """Read a mask column of zeros and ones. Return a boolean array of shape `[length]`."""
    values = _read_integers(data, name)
    if len(values) != length or not np.isin(values, (0, 1)).all():
        message = f"the mask must be a list of {length} zeros and ones, one per token id"
        raise BadRow("tokens_shape", message, field=name)
    return values == 1


def _read_integers(data: Mapping[str, Any], column: str) -> Any:
    """Read a column of integers. Return an int64 array of shape `[n]`."""
    if column not in data:
        raise BadRow("missing_column", "the column is missing, but the schema requires it", field=column)
    value = parse_json_list(data[column])
    if not isinstance(value, list) or not all(type(item) is int or type(item) is bool for item in value):
        raise BadRow("tokens_type", f"is {describe_value(value)}, expected a list of integers", field=column)
    if any(abs(item) >= 1 << 31 for item in value):
        raise BadRow("tokens_type", "the list contains numbers outside the int32 range", field=column)
    return np.asarray(value, dtype=np.int64)
