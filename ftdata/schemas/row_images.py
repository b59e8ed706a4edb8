"""Find the images of a row, and the places in its messages where they belong.

The images of a row are in parts of messages, or in the columns `image` and `images`. Each image is represented in the
messages by `IMAGE_PART`, which chat templates print as a placeholder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from ftdata.errors import BadRow, count_noun
from ftdata.types import IMAGE_PART, Message, RowImage

IMAGE_COLUMNS = ("images", "image")
"""Columns with the images of a row: one image, or a list of images."""

_CHAT_COLUMNS = ("messages", "conversations", "conversation", "prompt", "completion", "response")
_PART_TYPES = ("image", "image_url", "input_image")
_VALUE_KEYS = ("image", "image_url", "url", "bytes", "path", "base64", "source")
"""Keys of an image part that can contain the image."""

_OTHER_KEYS = ("type", "index", "detail", "cache_control")
"""Other keys of an image part: the index of the image in the column, and API settings that ftdata ignores."""

_MARKER = "<image>"
"""The text that stands for an image in data for LLaVA and LLaMA-Factory."""


class UnplacedImages(NamedTuple):
    """The images of a row before its messages are read.

    Attributes:
        parts: the images in parts of messages, in order. The value of a part without an image is `None`.
        columns: the images in the columns of the row, in order.
    """

    parts: tuple[RowImage, ...]
    columns: tuple[RowImage, ...]


NO_IMAGES = UnplacedImages((), ())
"""The images of a row without image parts and without columns of images."""


class _ColumnIndex(int):
    """The index of an image in the column of images, in place of the value of an image."""


def extract_images(data: Mapping[str, Any], task: str = "sft") -> tuple[Mapping[str, Any], UnplacedImages]:
    """Separate the images of a row from the other values.

    Returns:
        A copy of the row without the columns of images, in which each image part is `IMAGE_PART`; and the images. A row
        without images is returned unchanged.

    Raises:
        BadRow: `image_task`, if the task does not support images; `image_part`, if a part has an unknown key.
    """
    columns = [
        RowImage(f"{name}[{number}]" if isinstance(data[name], list | tuple) else name, value)
        for name in IMAGE_COLUMNS
        if data.get(name) is not None
        for number, value in enumerate(data[name] if isinstance(data[name], list | tuple) else [data[name]])
    ]
    parts = list[RowImage]()
    chats = {
        name: [_take_message_images(message, f"{name}[{number}]", parts) for number, message in enumerate(data[name])]
        for name in _CHAT_COLUMNS
        if isinstance(data.get(name), list)
    }
    if not parts and not columns and data.keys().isdisjoint(IMAGE_COLUMNS):
        return data, NO_IMAGES
    if (parts or columns) and task != "sft":
        problem = f"the row has images, which the task {task} does not support"
        hint = "remove the row, or set task='sft' (for pairs also schema='preference') to train on the answers"
        raise BadRow("image_task", problem, hint=hint)
    others = {name: value for name, value in data.items() if name not in IMAGE_COLUMNS}
    return {**others, **chats}, UnplacedImages(tuple(parts), tuple(columns))


def _take_message_images(message: Any, field: str, parts: list[RowImage]) -> Any:
    """Replace the image parts of a message with `IMAGE_PART`, and add the images to `parts`."""
    fields = message if isinstance(message, Mapping) else {}
    name = next((name for name in ("content", "value") if isinstance(fields.get(name), list)), None)
    if name is None or not any(map(_is_image_part, fields[name])):
        return message
    new = list[Any]()
    for number, part in enumerate(fields[name]):
        if _is_image_part(part):
            parts.append(_read_part(part, f"{field}.{name}[{number}]"))
            new.append(IMAGE_PART)
        else:
            new.append(_read_other_part(part))
    return {**fields, name: new}


def _is_image_part(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    keys = {key for key, value in part.items() if value is not None}
    return part.get("type") in _PART_TYPES or keys in ({"image"}, {"image_url"})


def _read_other_part(part: Any) -> Any:
    """Return a part beside image parts, in the format of chat templates."""
    if not isinstance(part, Mapping):
        return part
    # Tables have all keys in every part, and templates may print an image for any part with the key `image`.
    fields = {name: value for name, value in part.items() if value is not None}
    is_text = fields.keys() == {"text"} or fields.get("type") == "input_text"
    return {**fields, "type": "text"} if is_text else fields


def _read_part(part: Mapping[str, Any], field: str) -> RowImage:
    """Return the image of a part in a form that `read_image` accepts, or the index of an image of the column.

    Raises:
        BadRow: `image_part`.
    """
    fields = {key: value for key, value in part.items() if value is not None}
    keys = [key for key in _VALUE_KEYS if key in fields]
    if unknown := [str(key) for key in fields if key not in (*_VALUE_KEYS, *_OTHER_KEYS)]:
        supported = ", ".join((*_OTHER_KEYS, *_VALUE_KEYS))
        problem = f"the image part has the unsupported key {unknown[0]!r}, expected {supported}"
        hint = "move the text to a part of type text" if unknown[0] == "text" else "remove the key"
        raise BadRow("image_part", problem, field=field, hint=hint)
    # In columns of `datasets`, the path is the original name of the bytes.
    if len(keys) + ("index" in fields) > 1 and keys != ["bytes", "path"]:
        names = ", ".join([*keys, *(["index"] if "index" in fields else [])])
        problem = f"the image part has several images: {names}"
        raise BadRow("image_part", problem, field=field, hint="keep one of these keys")
    if not keys and "index" in fields:
        if type(fields["index"]) is not int:
            problem = f"the index is {fields['index']!r:.60}, expected the number of an image in the column images"
            raise BadRow("image_part", problem, field=field, hint="correct the index, or remove the row")
        return RowImage(field, _ColumnIndex(fields["index"]))
    if not keys:
        return RowImage(field, None)
    key, value = keys[0], fields[keys[0]]
    if key == "source" and isinstance(value, Mapping) and value.get("type") == "base64":
        value = f"data:{value.get('media_type', 'image/png')};base64,{value.get('data', '')}"
    # JSON cannot contain bytes, so they are base64 there.
    if key in ("base64", "bytes") and isinstance(value, str) and not value.startswith("data:"):
        value = f"data:image/png;base64,{value}"
    return RowImage(f"{field}.{key}", value)


def place_images(
    messages: Sequence[Message], images: UnplacedImages
) -> tuple[tuple[Message, ...], tuple[RowImage, ...]]:
    """Add the images in the columns of a row to its messages.

    The columns contain the images of the image parts that have no image. Without image parts, they contain the images
    of the `<image>` markers in user messages. Without markers, the images belong before the text of the first user
    message.

    Returns:
        The messages, and the images in the order of their `IMAGE_PART` objects.

    Raises:
        BadRow: `image_count`, if the number of images differs from the number of image parts or markers;
            `image_in_answer`, if a trained message contains an image.
    """
    placed, all_images = _place_columns(messages, images)
    for number, message in enumerate(placed):
        content = message.get("content")
        is_trained = message["role"] == "assistant" and message.get("train", True)
        if is_trained and isinstance(content, list) and IMAGE_PART in content:
            problem = "the answer contains an image, which a language model cannot generate"
            hint = "move the image to a user message, or set train: false in the message"
            raise BadRow("image_in_answer", problem, field=f"messages[{number}].content", hint=hint)
    return placed, all_images


def _place_columns(
    messages: Sequence[Message], images: UnplacedImages
) -> tuple[tuple[Message, ...], tuple[RowImage, ...]]:
    if images.parts:
        return tuple(messages), tuple(_fill_parts(images))
    markers = sum(text.count(_MARKER) for message in messages for text in _user_texts(message))
    if markers:
        _check_count(len(images.columns), markers, f"{_MARKER} marker")
        return tuple(map(_split_markers, messages)), images.columns
    if not images.columns:
        return tuple(messages), ()
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        reason = "but no user message that can contain images" if messages else "and only conversations can have images"
        problem = f"the row has {count_noun(len(images.columns), 'image')}, {reason}"
        hint = "add a user message, or remove the images or the row"
        raise BadRow("image_count", problem, field=images.columns[0].field, hint=hint)
    content = messages[first]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    message = cast("Message", {**messages[first], "content": [IMAGE_PART] * len(images.columns) + parts})
    return (*messages[:first], message, *messages[first + 1 :]), images.columns


def _fill_parts(images: UnplacedImages) -> list[RowImage]:
    """Return the images of all image parts. Parts without an image get the images of the column, in order or by index.

    Raises:
        BadRow: `image_count`.
    """
    indices = [image.value for image in images.parts if isinstance(image.value, _ColumnIndex)]
    empty = sum(image.value is None for image in images.parts)
    if indices and (empty or sorted(set(indices)) != [*range(len(images.columns))]):
        problem = f"the row has {count_noun(len(images.columns), 'image')} in its columns, and image parts with the "
        problem += f"indices {', '.join(map(str, indices))}{' and without an index' if empty else ''}"
        hint = "give each image a place in the messages, or remove the row"
        raise BadRow("image_count", problem, field=IMAGE_COLUMNS[0], hint=hint)
    if not indices:
        _check_count(len(images.columns), empty, "empty image part")
    columns = iter(images.columns)
    return [
        images.columns[image.value]
        if isinstance(image.value, _ColumnIndex)
        else next(columns)
        if image.value is None
        else image
        for image in images.parts
    ]


def _check_count(images: int, places: int, kind: str) -> None:
    if images != places:
        problem = f"the row has {count_noun(images, 'image')} in its columns, and {count_noun(places, kind)}"
        hint = "give each image one place in the messages, or remove the row"
        raise BadRow("image_count", problem, field=IMAGE_COLUMNS[0], hint=hint)


def _user_texts(message: Message) -> Iterator[str]:
    content = message.get("content") if message["role"] == "user" else None
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        yield from (part["text"] for part in content)


def _split_markers(message: Message) -> Message:
    """Replace the markers in the text of a user message with image parts."""
    if not any(_MARKER in text for text in _user_texts(message)):
        return message
    parts = list[dict[str, Any]]()
    for text in _user_texts(message):
        first, *others = text.split(_MARKER)
        pieces = [first, *(piece for other in others for piece in (IMAGE_PART, other))]
        parts += [piece if piece is IMAGE_PART else {"type": "text", "text": piece} for piece in pieces if piece]
    return cast("Message", {**message, "content": parts})
