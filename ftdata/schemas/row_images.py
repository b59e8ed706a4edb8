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
_VALUE_KEYS = ("image", "image_url", "url", "path", "bytes", "base64", "source")
"""Keys of an image part that can contain the image."""

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


def take_images(data: Mapping[str, Any], task: str = "sft") -> tuple[Mapping[str, Any], UnplacedImages]:
    """Separate the images of a row from the other values.

    Returns:
        A copy of the row without the columns of images, in which each image part is `IMAGE_PART`; and the images. A row
        without images is returned unchanged.

    Raises:
        BadRow: `images_in_pair`, if the row is a preference pair with images.
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
    if not parts and not columns:
        return data, NO_IMAGES
    if task == "preference":
        problem = "the row is a preference pair with images, and pairs can contain only text"
        hint = "remove the row, or train only on the chosen answers: task='sft', schema='preference'"
        raise BadRow("images_in_pair", problem, hint=hint)
    others = {name: value for name, value in data.items() if name not in IMAGE_COLUMNS}
    return {**others, **chats}, UnplacedImages(tuple(parts), tuple(columns))


def _take_message_images(message: Any, field: str, parts: list[RowImage]) -> Any:
    """Replace the image parts of a message by `IMAGE_PART`, and add the images to `parts`."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list) or not any(map(_is_image_part, content)):
        return message
    new = list[Any]()
    for number, part in enumerate(content):
        if _is_image_part(part):
            key = next((key for key in _VALUE_KEYS if part.get(key) is not None), None)
            part_field = f"{field}.content[{number}]"
            parts.append(RowImage(f"{part_field}.{key}" if key else part_field, _read_value(part, key)))
            new.append(IMAGE_PART)
        else:
            # Tables have all keys in every part, and templates may print an image for any part with the key `image`.
            is_part = isinstance(part, Mapping)
            new.append({name: value for name, value in part.items() if value is not None} if is_part else part)
    return {**message, "content": new}


def _is_image_part(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    keys = {key for key, value in part.items() if value is not None}
    return part.get("type") in _PART_TYPES or keys in ({"image"}, {"image_url"})


def _read_value(part: Mapping[str, Any], key: str | None) -> Any:
    """Return the image of a part in a form that `read_image` accepts."""
    value = part[key] if key else None
    if key == "source" and isinstance(value, Mapping) and value.get("type") == "base64":
        return f"data:{value.get('media_type', 'image/png')};base64,{value.get('data', '')}"
    if key == "base64" and isinstance(value, str) and not value.startswith("data:"):
        return f"data:image/png;base64,{value}"
    return value


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
        BadRow: `image_count`, if the number of images differs from the number of image parts or markers.
    """
    if images.parts:
        empty = sum(image.value is None for image in images.parts)
        _check_count(len(images.columns), empty, "empty image part")
        columns = iter(images.columns)
        return tuple(messages), tuple(next(columns) if image.value is None else image for image in images.parts)
    markers = sum(text.count(_MARKER) for message in messages for text in _user_texts(message))
    if markers:
        _check_count(len(images.columns), markers, f"{_MARKER} marker")
        return tuple(map(_split_markers, messages)), images.columns
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        problem = f"the row has {count_noun(len(images.columns), 'image')}, but no user message that can contain images"
        raise BadRow(
            "image_count", problem, field=images.columns[0].field, hint="add a user message, or remove the row"
        )
    content = messages[first]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    message = cast("Message", {**messages[first], "content": [IMAGE_PART] * len(images.columns) + parts})
    return (*messages[:first], message, *messages[first + 1 :]), images.columns


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
    """Replace the markers in the text of a user message by image parts."""
    if not any(_MARKER in text for text in _user_texts(message)):
        return message
    parts = list[dict[str, Any]]()
    for text in _user_texts(message):
        first, *others = text.split(_MARKER)
        pieces = [first, *(piece for other in others for piece in (IMAGE_PART, other))]
        parts += [piece if piece is IMAGE_PART else {"type": "text", "text": piece} for piece in pieces if piece]
    return cast("Message", {**message, "content": parts})
