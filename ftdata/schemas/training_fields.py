"""Check fields other than text that can affect training: masks, weights, labels and media.

A row with an unsupported field of this kind is rejected: ignoring the field silently could train the wrong tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
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

_MEDIA_WORDS = {
    word + plural
    for word in ("image", "img", "picture", "photo", "pixel", "screenshot", "video", "audio")
    for plural in ("", "s")
}
_MEDIA_FORMATS = {
    "base64", "b64", "bytes", "data", "decoded", "embed", "embeds", "embedding", "embeddings", "file", "files", "frame",
    "frames", "input", "list", "path", "paths", "raw", "uri", "uris", "url", "urls", "values",
}  # fmt: skip
_MULTIMODAL_FIELDS = {"mm_data", "multi_modal_data"}
_WORDS = re.compile(r"b(?:ase)?64|[A-Z]?[a-z]+|[A-Z]+(?![a-z])")

_TOKEN_FIELDS = {"labels", "label_ids", "target_ids", "input_ids"}
_PREFERENCE_FIELDS = {"label", "kto_tag"}
_METADATA_FIELDS = {"metadata", "meta", "extra", "extra_info", "info", "additional_kwargs"}
_MASK_NAME = re.compile("mask|train|loss|weight")
_HARMLESS = re.compile("constrain|restrain|strain|terrain|pretrained|trainer|gloss|floss|blossom")
"""Words that contain a match of `_MASK_NAME` but do not name masks."""

_FALSE, _TRUE = ("0", "false", "no", "off", "n", "none"), ("1", "true", "yes", "on", "y")
_TEXT_FLAGS = {**dict.fromkeys(_FALSE, False), **dict.fromkeys(_TRUE, True)}
_IDS = re.compile(r"\s*(?:\[.*\]|-?\d+(?:[\s,;]+-?\d+)+)\s*", re.DOTALL)
"""Matches the text of several integers, and any text in brackets."""

_SCHEMA_HINT = (
    "rename or remove the field if it is not a mask, or convert rows with a function: schema='./mine.py:convert'"
)


def is_guarded(name: str, value: Any = None) -> bool:
    """Return whether `check_training_fields` must check a field that no schema reads.

    The result depends only on the name of the field and the type of its value.
    """
    return not isinstance(value, str | int | float | None) or _is_guarded_name(name)


@lru_cache(maxsize=4096)
def _is_guarded_name(name: str) -> bool:
    name = _last_name(name)
    is_known = name.lower() in _TOKEN_FIELDS | _PREFERENCE_FIELDS | _METADATA_FIELDS
    return is_known or is_media_name(name) or is_mask_name(name)


def _last_name(name: str) -> str:
    """Return the last key of a path, e.g. `train` for `data.train`.

    If `columns=` maps a nested value, the other fields of the same object have paths as names.
    """
    return name.rpartition(".")[2]


def is_media_name(name: str) -> bool:
    """Return whether the name of a field indicates images, audio or video.

    >>> [is_media_name(name) for name in ("imageUrl", "Images", "image_0", "image_description", "imagery")]
    [True, True, True, False, False]
    """
    words = {word.lower() for word in _WORDS.findall(name)}
    return name in _MULTIMODAL_FIELDS or (not words.isdisjoint(_MEDIA_WORDS) and words <= _MEDIA_WORDS | _MEDIA_FORMATS)


def is_rejected_side(name: str) -> bool:
    """Return whether the name of a field indicates the rejected answer of a preference pair.

    >>> [is_rejected_side(name) for name in ("rejected", "rejectedResponse", "answer_rejected", "rejection")]
    [True, True, True, False]
    """
    words = {word.lower() for word in _WORDS.findall(name)}
    return not words.isdisjoint({"rejected", "dispreferred"}) or words == {"reject"} or words >= {"non", "preferred"}


def is_mask_name(name: str) -> bool:
    """Return whether the name of a field indicates a loss mask or a training weight.

    >>> is_mask_name("lossMask"), is_mask_name("constraints"), is_mask_name("train_on_turn")
    (True, False, True)
    """
    return name in TRAIN_FIELDS or _MASK_NAME.search(_HARMLESS.sub("", name.lower())) is not None


def check_training_fields(fields: Mapping[str, Any], names: Iterable[str], path: str = "") -> None:
    """Reject a row if a field that no schema reads could affect the loss mask or the model's input.

    Args:
        fields: a row, a message, or a part of a message.
        names: names of the guarded fields (`is_guarded`) that no schema reads.
        path: path of `fields` in the row; empty for the row itself.

    Raises:
        BadRow: `media`, `labels_beside_text`, `unknown_mask_field`, `row_not_trained` or `weight_value`.
    """
    for name in names:
        value, last_name = fields[name], _last_name(str(name))
        where = f"{path}.{name}" if path else name
        if value is None or (isinstance(value, str | list | tuple | Mapping) and not value):
            continue
        if is_media_name(last_name) or _is_media(value):
            message = f"the field contains media ({describe_value(value)}), which the model would not receive"
            hint = (
                "for images, use a vision-language model and the column images, or columns={'images': ...}; "
                "remove rows with audio or video; rename the field if it is text"
            )
            raise BadRow("media", message, field=where, hint=hint)
        if last_name.lower() in _TOKEN_FIELDS:
            _check_tokens(value, where)
        elif last_name.lower() in _PREFERENCE_FIELDS:
            _check_preference(last_name.lower(), value, where)
        elif last_name.lower() in _METADATA_FIELDS:
            _check_metadata(value, where)
        elif is_mask_name(last_name) and (path or last_name not in TRAIN_FIELDS or not _read_row_flag(value, where)):
            message = f"is {describe_value(value)}; a field of this name could be a mask, but its format is unknown"
            hint = f"set one of {', '.join(TRAIN_FIELDS)} to true or false in each message; {_SCHEMA_HINT}"
            raise BadRow("unknown_mask_field", message, field=where, hint=hint)


def _is_media(value: Any) -> bool:
    """Return whether a value is binary data, an image, audio data as in `datasets`, or a list of such values."""
    if isinstance(value, list | tuple):
        return any(map(_is_media, value))
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or {"array", "sampling_rate"} <= value.keys()
    return isinstance(value, bytes | bytearray | memoryview) or type(value).__module__.partition(".")[0] == "PIL"


def _check_tokens(value: Any, where: str) -> None:
    if isinstance(value, list | tuple) or (isinstance(value, str) and _IDS.fullmatch(value)):
        message = "the row has both tokens and text, and the text would be tokenized and masked again"
        hint = "remove the field, or remove the text and use schema='tokens'"
        raise BadRow("labels_beside_text", message, field=where, hint=hint)


def _check_preference(name: str, value: Any, where: str) -> None:
    """Reject a row whose label marks the answer as undesirable. Names and numbers in `label` can be classes instead."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_false = value == 0 if is_number else _is_false(value)
    is_class = name == "label" and (is_number or (isinstance(value, str) and value.strip().lower() != "false"))
    if is_false and not is_class:
        message = f"is {describe_value(value)}, which marks the answer as undesirable (KTO data)"
        hint = (
            "build with task='kto' to train on answers with labels; or leave out these rows: "
            f'where="{name} | default(1) != {value!r}"'
        )
        raise BadRow("row_not_trained", message, field=where, hint=hint)


def _read_row_flag(value: Any, where: str) -> bool:
    """Return whether the value of a field in `TRAIN_FIELDS`, e.g. `train`, is true. Return `False` if it is not a flag.

    Raises:
        BadRow: `row_not_trained`, if the value is a false flag; `weight_value`, as in `read_flag`.
    """
    flag = read_flag(value, where) if isinstance(value, str | int | float) else None
    if flag is False:
        message = f"is {describe_value(value)}, which excludes the row from training"
        hint = f'to leave out these rows, pass where="{where} | default(1) != {value!r}"; or remove the field'
        raise BadRow("row_not_trained", message, field=where, hint=hint)
    return flag is True


def _check_metadata(value: Any, where: str) -> None:
    """Reject a row if its metadata excludes the row or a message from training.

    Numbers other than 0, such as the loss of another model, are not masks.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "[") and is_mask_name(value):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return
    for name, item in value.items() if isinstance(value, Mapping) else ():
        if isinstance(name, str) and is_mask_name(name) and _is_false(item):
            message = (
                f"is {describe_value(item)}; "
                "a field of this name could be a mask, and masks in metadata are not supported"
            )
            hint = f"set train: false in the message; {_SCHEMA_HINT}"
            raise BadRow("unknown_mask_field", message, field=f"{where}.{name}", hint=hint)
        _check_metadata(item, f"{where}.{name}")
    for number, item in enumerate(value) if isinstance(value, list) else ():
        _check_metadata(item, f"{where}[{number}]")


def _is_false(value: Any) -> bool:
    """Return whether a value could exclude tokens from training: false, 0, a list, or the text of such a value."""
    if isinstance(value, str):
        return read_text_flag(value) is False or _IDS.fullmatch(value) is not None or _is_zero(value)
    return isinstance(value, list) or (isinstance(value, int | float) and value == 0)


def _is_zero(text: str) -> bool:
    return _is_number(text) and float(text) == 0


def read_flag(value: Any, field: str) -> bool | None:
    """Convert a training flag such as 1 or `"yes"` to a boolean. Return `None` for any other word.

    Raises:
        BadRow: `weight_value`: the value is a number other than 0 and 1, or has another type.
    """
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and ((flag := read_text_flag(value)) is not None or not _is_number(value)):
        return flag
    message = f"is {describe_value(value)}, expected 0 or 1, because fractional weights are not supported"
    hint = f"round the weight. {_SCHEMA_HINT[0].upper()}{_SCHEMA_HINT[1:]}"
    raise BadRow("weight_value", message, field=field, hint=hint)


def describe_value(value: Any) -> str:
    """Describe a value for error messages by its type and its first 60 characters."""
    return "null or absent" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


def read_text_flag(text: str) -> bool | None:
    """Parse a flag that is stored as text, e.g. `"yes"` or `"0"` in a CSV file. Return `None` for any other text."""
    return _TEXT_FLAGS.get(text.strip().lower())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
