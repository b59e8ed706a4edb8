"""Fields beside the texts that decide what is trained, or what a model is shown: masks, weights, labels and media.

What is not understood is rejected: a field that is ignored silently would train the wrong tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ftdata.errors import BadRow

TRAIN_FIELDS = (
    "train",
    "training",
    "trainable",  # Tinker
    "weight",  # OpenAI
    "loss",  # ms-swift
    "loss_mask",  # verl, UI-TARS
    "step_loss_mask",  # slime
    "loss_scale",  # ms-swift
    "loss_weight",  # LLaMA-Factory
)
"""Fields, of messages and of rows, that say whether they are trained: 0 or 1, false or true."""

MEDIA_FIELDS = {
    f"{medium}{end}" for medium in ("image", "img", "video", "audio") for end in ("", "s", "_url", "_urls", "_path")
} | {"pixel_values"}
"""Fields, of messages and of rows, that hold something else than text."""

_TOKEN_FIELDS = ("labels", "input_ids")
_MASK_NAME = re.compile("mask|train|loss|weight")
_HARMLESS = re.compile("constrain|restrain|strain|terrain|gloss|floss|blossom")
"""Words that contain one of these by chance."""

_FLAGS = {"0": False, "1": True, "false": False, "true": True}
_SCHEMA_HINT = "rename or remove it if it is no mask, or read rows by a function: schema='./mine.py:read'"


def is_guarded(name: str) -> bool:
    """Return whether the value of a field that no schema reads must be looked at (`check_fields`)."""
    return name in MEDIA_FIELDS or name in _TOKEN_FIELDS or is_mask_name(name)


def is_mask_name(name: str) -> bool:
    """Return whether a field, by its name, may decide what is trained.

    >>> is_mask_name("lossMask"), is_mask_name("constraints"), is_mask_name("train_on_turn")
    (True, False, True)
    """
    return name in TRAIN_FIELDS or _MASK_NAME.search(_HARMLESS.sub("", name.lower())) is not None


def check_fields(fields: Mapping[str, Any], names: Iterable[str], place: str = "") -> None:
    """Reject what these fields say, unless it changes nothing.

    Args:
        fields: a row, a message, or a part of one.
        names: those of its fields that are guarded and not read.
        place: where it stands in the row; empty for the row itself.

    Raises:
        BadRow: `media`, `labels_beside_text`, `unknown_mask_field`, `row_not_trained` or `weight_value`.
    """
    for name in names:
        value = fields[name]
        where = f"{place}.{name}" if place else name
        if value is None or value in ("", [], {}):
            continue
        if name in MEDIA_FIELDS:
            raise BadRow(
                "media",
                f"holds media ({_shown(value)}), of which nothing would be trained or shown to the model",
                field=where,
                hint="images, audio and video are not supported yet: remove these rows, or the field if it is text",
            )
        if name in _TOKEN_FIELDS:
            if isinstance(value, list):
                raise BadRow(
                    "labels_beside_text",
                    "stands beside text that would be tokenized and masked anew: which of the two is meant?",
                    field=where,
                    hint="remove it, or keep only input_ids and labels (schema='tokens')",
                )
        elif name in TRAIN_FIELDS and not place:
            if read_flag(value, where) is False:
                raise BadRow(
                    "row_not_trained",
                    f"is {_shown(value)}: the row is not to be trained",
                    field=where,
                    hint=f"leave such rows out: where='{name}' (a true or non-zero value)",
                )
        elif not isinstance(value, str) or read_text_flag(value) is not None:
            raise BadRow(
                "unknown_mask_field",
                f"is {_shown(value)}; a field of this name may decide what is trained, and is not known",
                field=where,
                hint=f"use train: true or false in messages, as one of {', '.join(TRAIN_FIELDS)}; {_SCHEMA_HINT}",
            )


def read_flag(value: Any, field: str) -> bool | None:
    """Return whether something is trained; `None` for words, which say something else.

    Raises:
        BadRow: `weight_value`: it is neither 0 nor 1.
    """
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and ((flag := read_text_flag(value)) is not None or not _is_number(value)):
        return flag
    raise BadRow(
        "weight_value",
        f"is {_shown(value)}, expected 0 or 1: fractional weights are not supported",
        field=field,
        hint=f"round it. {_SCHEMA_HINT[0].upper()}{_SCHEMA_HINT[1:]}",
    )


def read_text_flag(text: str) -> bool | None:
    """Return the flag that a text spells, as in CSV files; `None` where it spells none."""
    return _FLAGS.get(text.strip().lower())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
