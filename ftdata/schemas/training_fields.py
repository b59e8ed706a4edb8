"""Check fields other than text that can affect training: masks, weights, labels and media.

A row with an unsupported field of this kind is rejected: ignoring the field silently could train the wrong tokens.
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
"""Fields of messages and rows that decide whether they are trained: 0 or 1, false or true."""

_MEDIA = ("image", "img", "picture", "video", "audio")
_MEDIA_SUFFIXES = ("", "s", "_url", "_urls", "_path", "_paths", "_file", "_files", "_base64", "_bytes")
MEDIA_FIELDS = {f"{medium}{suffix}" for medium in _MEDIA for suffix in _MEDIA_SUFFIXES} | {
    "pixel_values",
    "mm_data",
    "multi_modal_data",
}
"""Fields of messages and rows that contain media. Case and underscores are ignored: `imageUrl`, `Images`."""

_MEDIA_NAMES = {name.replace("_", "") for name in MEDIA_FIELDS}
_TOKEN_FIELDS = ("labels", "input_ids")
_PREFERENCE_FIELDS = ("label", "kto_tag")
_METADATA_FIELDS = ("metadata", "meta", "extra", "extra_info")
_MASK_NAME = re.compile("mask|train|loss|weight")
_HARMLESS = re.compile("constrain|restrain|strain|terrain|gloss|floss|blossom")
"""Words that contain a match of `_MASK_NAME` but do not name masks."""

_TEXT_FLAGS = dict.fromkeys(("0", "false", "no", "off", "n", "none"), False) | dict.fromkeys(
    ("1", "true", "yes", "on", "y"), True
)
_NUMBER_LIST = re.compile(r"\s*\[[\s\d,.+eE-]*\]\s*")
"""Matches the text of a list of numbers."""

_SCHEMA_HINT = (
    "rename or remove the field if it is not a mask, or convert rows with a function: schema='./mine.py:convert'"
)


def is_guarded(name: str) -> bool:
    """Return whether a field of this name must pass `check_training_fields` if no schema reads the field."""
    return (
        is_media_name(name)
        or name in (*_TOKEN_FIELDS, *_PREFERENCE_FIELDS, *_METADATA_FIELDS)
        or is_rejected_side(name)
        or is_mask_name(name)
    )


def is_media_name(name: str) -> bool:
    """Return whether the name of a field indicates images, audio or video.

    >>> is_media_name("imageUrl"), is_media_name("Images"), is_media_name("imagery")
    (True, True, False)
    """
    return name.lower().replace("_", "") in _MEDIA_NAMES


def is_rejected_side(name: str) -> bool:
    """Return whether the name of a field indicates the rejected answer of a preference pair.

    >>> is_rejected_side("rejected"), is_rejected_side("rejected_response"), is_rejected_side("rejection")
    (True, True, False)
    """
    return name == "rejected" or name.startswith("rejected_")


def is_mask_name(name: str) -> bool:
    """Return whether the name of a field indicates a mask or weight.

    >>> is_mask_name("lossMask"), is_mask_name("constraints"), is_mask_name("train_on_turn")
    (True, False, True)
    """
    return name in TRAIN_FIELDS or _MASK_NAME.search(_HARMLESS.sub("", name.lower())) is not None


def check_training_fields(fields: Mapping[str, Any], names: Iterable[str], path: str = "") -> None:
    """Reject a row if a field that no schema reads could change the mask or the model's input.

    Args:
        fields: a row, a message, or a part of a message.
        names: names of the guarded fields (`is_guarded`) that no schema reads.
        path: path of `fields` in the row; empty for the row itself.

    Raises:
        BadRow: `media`, `labels_beside_text`, `unknown_mask_field`, `row_not_trained` or `weight_value`.
    """
    for name in names:
        value = fields[name]
        where = f"{path}.{name}" if path else name
        if value is None or value in ("", [], {}) or is_rejected_side(name):
            continue
        if is_media_name(name):
            raise BadRow(
                "media",
                f"the field contains media ({_describe(value)}), which the model would not receive",
                field=where,
                hint="remove these rows (images, audio and video are not supported), or rename the field if it is text",
            )
        if name in _TOKEN_FIELDS:
            _check_tokens(value, where)
        elif name in _PREFERENCE_FIELDS:
            _check_preference(name, value, where)
        elif name in _METADATA_FIELDS:
            _check_metadata(value, where)
        elif name in TRAIN_FIELDS and not path and not _is_number_list(value):
            _check_row_flag(name, value, where)
        elif not isinstance(value, str) or read_text_flag(value) is not None or _is_number_list(value):
            raise BadRow(
                "unknown_mask_field",
                f"is {_describe(value)}; a field of this name could be a mask, but its format is unknown",
                field=where,
                hint=f"set one of {', '.join(TRAIN_FIELDS)} to true or false in each message; {_SCHEMA_HINT}",
            )


def _check_tokens(value: Any, where: str) -> None:
    if isinstance(value, list) or _is_number_list(value):
        raise BadRow(
            "labels_beside_text",
            "the row has both tokens and text, and the text would be tokenized and masked again",
            field=where,
            hint="remove the field, or remove the text and use schema='tokens'",
        )


def _check_preference(name: str, value: Any, where: str) -> None:
    """Reject a row whose label marks the answer as undesirable. Other labels, such as class names, are ignored."""
    if value is False or (isinstance(value, str) and value.strip().lower() == "false"):
        raise BadRow(
            "row_not_trained",
            f"is {_describe(value)}, which marks the answer as undesirable (KTO data)",
            field=where,
            hint=f"filter these rows with where='{name}' (keeps rows with a true value), or remove the field",
        )


def _check_row_flag(name: str, value: Any, where: str) -> None:
    if read_flag(value, where) is False:
        raise BadRow(
            "row_not_trained",
            f"is {_describe(value)}, which excludes the row from training",
            field=where,
            hint=f"filter these rows with where='{name}' (keeps rows with a true or non-zero value)",
        )


def _check_metadata(value: Any, where: str) -> None:
    """Reject metadata that excludes a row or message from training.

    Numbers, such as the loss of another model, are not masks.
    """
    for name, flag in value.items() if isinstance(value, Mapping) else ():
        if isinstance(name, str) and is_mask_name(name) and _is_false(flag):
            raise BadRow(
                "unknown_mask_field",
                f"is {_describe(flag)}; a field of this name could be a mask, and masks in metadata are not supported",
                field=f"{where}.{name}",
                hint=f"set train: false in the message; {_SCHEMA_HINT}",
            )


def _is_false(value: Any) -> bool:
    if isinstance(value, bool | int):
        return value in (False, 0)
    return isinstance(value, list) or (
        isinstance(value, str) and (read_text_flag(value) is False or _is_number_list(value))
    )


def _is_number_list(value: Any) -> bool:
    """Return whether a value is a string that contains a list of numbers, such as `"[0, 1]"`."""
    return isinstance(value, str) and _NUMBER_LIST.fullmatch(value) is not None


def read_flag(value: Any, field: str) -> bool | None:
    """Convert a training flag such as 1 or `"yes"` to a boolean. Return `None` for any other word.

    Raises:
        BadRow: `weight_value`: the value is a number other than 0 and 1, or has another type.
    """
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and ((flag := read_text_flag(value)) is not None or not _is_number(value)):
        return flag
    raise BadRow(
        "weight_value",
        f"is {_describe(value)}, expected 0 or 1, because fractional weights are not supported",
        field=field,
        hint=f"round the weight. {_SCHEMA_HINT[0].upper()}{_SCHEMA_HINT[1:]}",
    )


def read_text_flag(text: str) -> bool | None:
    """Parse a text flag such as `"yes"` or `"0"`, as in CSV files. Return `None` for any other text."""
    return _TEXT_FLAGS.get(text.strip().lower())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
