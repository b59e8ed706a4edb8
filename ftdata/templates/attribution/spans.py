"""Divide a rendered text into spans that record which message and field each character comes from.

The owner of a character is the integer `8 * (message + 1) + code of the part`. A `TrackedString` keeps the owners of
its characters while the template runs, and the owners of the rendered text become pieces and then spans.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ftdata.schemas.answer_text import THINKING_NAMES
from ftdata.templates.attribution.tracked_strings import BLOCK, TrackedString
from ftdata.types import Part, Span

_PARTS = (Part.SCAFFOLD, Part.CONTENT, Part.REASONING, Part.TOOL_CALL, Part.TOOLS, Part.OTHER)
_CODES = {part: code for code, part in enumerate(_PARTS)}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CALLS = ("tool_calls", "function_call", "function_calls")
_KEYS = {"content": Part.CONTENT, **dict.fromkeys(_CALLS, Part.TOOL_CALL), **dict.fromkeys(_REASONING, Part.REASONING)}

_OPENING_TAG, _TRAILING_OPENING_TAG = re.compile(rf"\s*<({THINKING_NAMES})>"), re.compile(rf"<({THINKING_NAMES})>\s*$")


class TextPiece(NamedTuple):
    """A range of the rendered text that comes from one field of a message, or from the template.

    Attributes:
        start: first character.
        end: end of the range, exclusive.
        part: kind of the text.
        message: index of the message that the text comes from, or -1 for other text.
        block: number of the `{% generation %}` block that contains the text, or 0.
    """

    start: int
    end: int
    part: Part
    message: int
    block: int


class TurnRegion(NamedTuple):
    """The character range `[start, end)` of the text that the model generates for one message."""

    message: int
    start: int
    end: int


def track_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Convert messages to the template variable `messages`. Strings except roles become `TrackedString` objects.

    As in transformers, null values are dropped. Reasoning is available under all of its key names.
    """
    return [_track_message(message, index) for index, message in enumerate(messages)]


def track_value(value: Any, part: Part, message: int) -> Any:
    """Copy a JSON value. Convert all strings and keys to `TrackedString` objects that record `message` and `part`."""
    owner = 8 * (message + 1) + _CODES[part]
    if isinstance(value, str):
        return TrackedString(value, ((len(value), owner),) if value else ())
    if isinstance(value, Mapping):
        return {track_value(key, part, message): track_value(item, part, message) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [track_value(item, part, message) for item in value]
    return value


def pieces_of(text: TrackedString) -> tuple[TextPiece, ...]:
    """Divide a rendered text into ranges. All characters of a range come from the same field, or from the template."""
    pieces: list[TextPiece] = []
    start = 0
    for length, owner in text.runs:
        message, code = divmod(owner & ((1 << BLOCK) - 1), 8)
        pieces.append(TextPiece(start, start + length, _PARTS[code], message - 1, owner >> BLOCK))
        start += length
    return tuple(pieces)


def split_thinking(
    text: str, parts: Iterable[TextPiece], regions: Sequence[TurnRegion], assistants: Iterable[int]
) -> tuple[TextPiece, ...]:
    """Mark the text of a thinking block as reasoning if it is at the beginning of an assistant message.

    Split the pieces where the thinking begins and ends. The thinking tags become template text, as if the template
    had printed them.
    """
    parts = list(parts)
    thinking = _locate_thinking(text, parts, regions, set(assistants))
    pieces: list[TextPiece] = []
    for piece in parts:
        split = [piece]
        for start, end, part in thinking.get(piece.message, ()):
            split = [new for old in split for new in override_part(old, start, end, Part.CONTENT, part=part)]
        pieces += split
    return tuple(pieces)


def override_part(piece: TextPiece, start: int, end: int, over: Part, **changes: Any) -> Iterator[TextPiece]:
    """Divide a text piece at `start` and `end`. Yield all new pieces, with `changes` applied to the middle piece.

    Yield the piece unchanged if its part is not `over`, or if the piece is outside the range.
    """
    if piece.part is not over or piece.end <= start or end <= piece.start:
        yield piece
        return
    inner, last = max(piece.start, start), min(piece.end, end)
    if piece.start < inner:
        yield piece._replace(end=inner)
    yield piece._replace(start=inner, end=last, **changes)
    if last < piece.end:
        yield piece._replace(start=last)


def _locate_thinking(
    text: str, pieces: Iterable[TextPiece], regions: Sequence[TurnRegion], assistants: set[int]
) -> dict[int, list[tuple[int, int, Part]]]:
    """Locate the thinking text and the thinking tags at the beginning of assistant messages."""
    ends = {region.message: region.end for region in regions}
    contents: dict[int, tuple[int, int]] = {}
    for piece in pieces:
        if piece.part is Part.CONTENT and piece.message in assistants:
            contents.setdefault(piece.message, (piece.start, ends.get(piece.message, piece.end)))
    thinking: dict[int, list[tuple[int, int, Part]]] = {}
    for message, (start, end) in contents.items():
        opening = _TRAILING_OPENING_TAG.search(text[max(0, start - 64) : start])
        tags = find_thinking_tags(text[start:end], opening.group(1) if opening else None)
        if not tags:
            continue
        thinking[message] = [(start + a, start + b, Part.SCAFFOLD) for a, b in tags]
        answer = text[start + tags[-1][1] : end].lstrip()
        thinking[message].append((start, end - len(answer), Part.REASONING))
    return thinking


def find_thinking_tags(content: str, opened: str | None = None) -> list[tuple[int, int]]:
    """Locate the tags of a thinking block at the beginning of a message's content.

    Args:
        content: the content of the message.
        opened: name of the tag if the text before the content ends with an opening tag.

    Returns:
        The character ranges of both tags, of only the closing tag if the opening tag precedes the content, or an
        empty list if the content does not begin with a thinking block.
    >>> find_thinking_tags("<think>hm</think>yes"), find_thinking_tags("hm</think>yes", "think")
    ([(0, 7), (9, 17)], [(2, 10)])
    >>> find_thinking_tags("</think>")
    []
    """
    opening = _OPENING_TAG.match(content)
    name = opening.group(1) if opening else opened
    closing = content.find(f"</{name}>") if name else -1
    if closing < 0:
        return []
    tags = [(opening.end() - len(f"<{name}>"), opening.end())] if opening else []
    return [*tags, (closing, closing + len(f"</{name}>"))]


def make_spans(parts: Iterable[TextPiece], regions: Sequence[TurnRegion]) -> tuple[Span, ...]:
    """Convert text pieces to spans, and mark the spans inside `regions` as generated by the model.

    Template text inside a region belongs to the message of the region; other template text belongs to no message.
    The spans tile the text.

    Args:
        parts: pieces that tile the text.
        regions: disjoint regions in order.
    """
    return tuple(span for piece in parts for span in _split_piece(piece, regions))


def _split_piece(piece: TextPiece, regions: Sequence[TurnRegion]) -> Iterator[Span]:
    position = piece.start
    outside_message = -1 if piece.part is Part.SCAFFOLD else piece.message
    for region in regions:
        start, end = max(region.start, position), min(region.end, piece.end)
        if start >= end:
            continue
        if position < start:
            yield Span(position, start, piece.part, outside_message, False)
        yield Span(start, end, piece.part, region.message, True)
        position = end
    if position < piece.end:
        yield Span(position, piece.end, piece.part, outside_message, False)


def template_fields(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a message that the template receives. Reasoning has all of its key names."""
    fields = {key: value for key, value in message.items() if value is not None and key != "train"}
    reasoning = next((fields[key] for key in _REASONING if key in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _track_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    # The role stays a plain string: it has few values, and templates branch on it.
    return {
        key: value if key == "role" else _track_field(key, value, index)
        for key, value in template_fields(message).items()
    }


def _track_field(key: str, value: Any, index: int) -> Any:
    tracked = track_value(value, _KEYS.get(key, Part.OTHER), index)
    if key != "content" or not isinstance(value, list | tuple):
        return tracked
    # The type of a content part stays a plain string for the same reason.
    return [
        {**copy, "type": part["type"]} if is_content_part(part) else copy
        for part, copy in zip(value, tracked, strict=True)
    ]


def is_content_part(value: Any) -> bool:
    """Return whether an item of a content is a text or an image, whose type is not the text of a row.

    >>> is_content_part({"type": "text", "text": "Hi"}), is_content_part({"type": "text/html"}), is_content_part("text")
    (True, False, False)
    """
    return isinstance(value, Mapping) and value.get("type") in ("text", "image")
