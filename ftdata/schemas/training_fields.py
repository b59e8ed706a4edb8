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

_MEDIA = ("image", "img", "picture", "video", "audio")
_ENDS = ("", "s", "_url", "_urls", "_path", "_paths", "_file", "_files", "_base64", "_bytes")
MEDIA_FIELDS = {f"{medium}{end}" for medium in _MEDIA for end in _ENDS} | {
    "pixel_values",
    "mm_data",
    "multi_modal_data",
}
"""Fields, of messages and of rows, that hold something else than text; `imageUrl` and `Images` are of them, too."""

_MEDIA_NAMES = {name.replace("_", "") for name in MEDIA_FIELDS}
_TOKEN_FIELDS = ("labels", "input_ids")
_PREFERENCE_FIELDS = ("label", "kto_tag")
_METADATA_FIELDS = ("metadata", "meta", "extra", "extra_info")
_MASK_NAME = re.compile("mask|train|loss|weight")
_HARMLESS = re.compile("constrain|restrain|strain|terrain|gloss|floss|blossom")
"""Words that contain one of these by chance."""

_FLAGS = dict.fromkeys(("0", "false", "no", "off", "n", "none"), False) | dict.fromkeys(
    ("1", "true", "yes", "on", "y"), True
)
_LISTED = re.compile(r"\s*\[[\s\d,.+eE-]*\]\s*")
"""A list of numbers as text."""

_SCHEMA_HINT = "rename or remove it if it is no mask, or read rows by a function: schema='./mine.py:read'"


def is_guarded(name: str) -> bool:
    """Return whether the value of a field that no schema reads must be looked at (`check_training_fields`)."""
    return (
        is_media_name(name)
        or name in (*_TOKEN_FIELDS, *_PREFERENCE_FIELDS, *_METADATA_FIELDS)
        or is_rejected_side(name)
        or is_mask_name(name)
    )


def is_media_name(name: str) -> bool:
    """Return whether a field, by its name, holds images, audio or video.

    >>> is_media_name("imageUrl"), is_media_name("Images"), is_media_name("imagery")
    (True, True, False)
    """
    return name.lower().replace("_", "") in _MEDIA_NAMES


def is_rejected_side(name: str) -> bool:
    """Return whether a field, by its name, is the rejected answer of a pair.

    >>> is_rejected_side("rejected"), is_rejected_side("rejected_response"), is_rejected_side("rejection")
    (True, True, False)
    """
    return name == "rejected" or name.startswith("rejected_")


def is_mask_name(name: str) -> bool:
    """Return whether a field, by its name, may decide what is trained.

    >>> is_mask_name("lossMask"), is_mask_name("constraints"), is_mask_name("train_on_turn")
    (True, False, True)
    """
    return name in TRAIN_FIELDS or _MASK_NAME.search(_HARMLESS.sub("", name.lower())) is not None


def check_training_fields(fields: Mapping[str, Any], names: Iterable[str], place: str = "") -> None:
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
        if value is None or value in ("", [], {}) or is_rejected_side(name):
            continue
        if is_media_name(name):
            raise BadRow(
                "media",
                f"holds media ({_shown(value)}), of which nothing would be trained or shown to the model",
                field=where,
                hint="images, audio and video are not supported yet: remove these rows, or the field if it is text",
            )
        if name in _TOKEN_FIELDS:
            _check_tokens(value, where)
        elif name in _PREFERENCE_FIELDS:
            _check_preference(name, value, where)
        elif name in _METADATA_FIELDS:
            _check_metadata(value, where)
        elif name in TRAIN_FIELDS and not place and not _is_listed(value):
            _check_row_flag(name, value, where)
        elif not isinstance(value, str) or read_text_flag(value) is not None or _is_listed(value):
            raise BadRow(
                "unknown_mask_field",
                f"is {_shown(value)}; a field of this name may decide what is trained, and is not known",
                field=where,
                hint=f"use train: true or false in messages, as one of {', '.join(TRAIN_FIELDS)}; {_SCHEMA_HINT}",
            )


def _check_tokens(value: Any, where: str) -> None:
    if isinstance(value, list) or _is_listed(value):
        raise BadRow(
            "labels_beside_text",
            "stands beside text that would be tokenized and masked anew: which of the two is meant?",
            field=where,
            hint="remove it, or keep only input_ids and labels (schema='tokens')",
        )


def _check_preference(name: str, value: Any, where: str) -> None:
    """Reject answers that are marked as undesirable; labels of other kinds, such as classes, are no marks."""
    if value is False or (isinstance(value, str) and value.strip().lower() == "false"):
        raise BadRow(
            "row_not_trained",
            f"is {_shown(value)}: the answer is marked as undesirable, as data for KTO has it",
            field=where,
            hint=f"leave such rows out: where='{name}' (a true value), or remove the field",
        )


def _check_row_flag(name: str, value: Any, where: str) -> None:
    if read_flag(value, where) is False:
        raise BadRow(
            "row_not_trained",
            f"is {_shown(value)}: the row is not to be trained",
            field=where,
            hint=f"leave such rows out: where='{name}' (a true or non-zero value)",
        )


def _check_metadata(value: Any, where: str) -> None:
    """Reject notes about a row or message that say that it is not trained.

    Figures, such as the loss that another model had, are no masks.
    """
    for name, flag in value.items() if isinstance(value, Mapping) else ():
        if isinstance(name, str) and is_mask_name(name) and _is_false(flag):
            raise BadRow(
                "unknown_mask_field",
                f"is {_shown(flag)}; a field of this name may decide what is trained, and is not read here",
                field=f"{where}.{name}",
                hint=f"use train: false in the message itself; {_SCHEMA_HINT}",
            )


def _is_false(value: Any) -> bool:
    if isinstance(value, bool | int):
        return value in (False, 0)
    return isinstance(value, list) or (isinstance(value, str) and (read_text_flag(value) is False or _is_listed(value)))


def _is_listed(value: Any) -> bool:
    """Return whether this is a list of numbers as text."""
    return isinstance(value, str) and _LISTED.fullmatch(value) is not None


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
