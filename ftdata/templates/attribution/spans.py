"""Attribute: which characters of the rendered text came from which field of which message.

An owner is a small number: `8 * (message + 1) + code of the part`. `Tracked` strings carry it through the
template, and the runs of the output are read back as spans.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ftdata.schemas.messages import THINKING_NAMES
from ftdata.templates.attribution.tracked_strings import BLOCK, TrackedString
from ftdata.types import Part, Span

_PARTS = (Part.SCAFFOLD, Part.CONTENT, Part.REASONING, Part.TOOL_CALL, Part.TOOLS, Part.OTHER)
_CODES = {part: code for code, part in enumerate(_PARTS)}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CALLS = ("tool_calls", "function_call", "function_calls")
_KEYS = {
    "content": Part.CONTENT,
    **dict.fromkeys(_CALLS, Part.TOOL_CALL),
    **dict.fromkeys(_REASONING, Part.REASONING),
}

_OPENS, _OPENED = re.compile(rf"\s*<({THINKING_NAMES})>"), re.compile(rf"<({THINKING_NAMES})>\s*$")


class TextPiece(NamedTuple):
    """A stretch of the rendered text with one owner; `block` numbers its generation block (0: none)."""

    start: int
    end: int
    part: Part
    message: int
    block: int


class TurnRegion(NamedTuple):
    """What the model must produce for one message: `[start, end)` in characters."""

    message: int
    start: int
    end: int


def track_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages as a chat template is given them, with every data string tracked.

    As transformers does: null values are dropped, and the spellings of reasoning stand for each other.
    """
    return [_tracked_message(message, index) for index, message in enumerate(messages)]


def track_value(value: Any, part: Part, message: int) -> Any:
    """Return a copy of a JSON value in which every string, keys included, is owned by `(message, part)`."""
    owner = 8 * (message + 1) + _CODES[part]
    if isinstance(value, str):
        return TrackedString(value, ((len(value), owner),) if value else ())
    if isinstance(value, Mapping):
        return {track_value(key, part, message): track_value(item, part, message) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [track_value(item, part, message) for item in value]
    return value


def pieces_of(text: TrackedString) -> tuple[TextPiece, ...]:
    """Return the stretches of a rendered text, in order, tiling it."""
    found: list[TextPiece] = []
    at = 0
    for length, owner in text.runs:
        message, code = divmod(owner & ((1 << BLOCK) - 1), 8)
        found.append(TextPiece(at, at + length, _PARTS[code], message - 1, owner >> BLOCK))
        at += length
    return tuple(found)


def split_thinking(
    text: str, parts: Iterable[TextPiece], regions: Sequence[TurnRegion], assistants: Iterable[int]
) -> tuple[TextPiece, ...]:
    """Return the pieces with thinking that is written into the assistant's contents made reasoning.

    Its tags are the scaffold around it, as where the template prints them.
    """
    parts = list(parts)
    thinking = _thinking(text, parts, regions, set(assistants))
    found: list[TextPiece] = []
    for piece in parts:
        cut = [piece]
        for start, end, part in thinking.get(piece.message, ()):
            cut = [new for old in cut for new in override_part(old, start, end, Part.CONTENT, part=part)]
        found += cut
    return tuple(found)


def override_part(piece: TextPiece, start: int, end: int, over: Part, **changes: Any) -> Iterator[TextPiece]:
    """Yield the piece, cut and changed where it lies in `[start, end)`, if it is of the part `over`."""
    if piece.part is not over or piece.end <= start or end <= piece.start:
        yield piece
        return
    inner, last = max(piece.start, start), min(piece.end, end)
    if piece.start < inner:
        yield piece._replace(end=inner)
    yield piece._replace(start=inner, end=last, **changes)
    if last < piece.end:
        yield piece._replace(start=last)


def _thinking(
    text: str, parts: Iterable[TextPiece], regions: Sequence[TurnRegion], assistants: set[int]
) -> dict[int, list[tuple[int, int, Part]]]:
    """Return, for each message whose content begins with thinking, where tags and thoughts stand."""
    ends = {region.message: region.end for region in regions}
    contents: dict[int, tuple[int, int]] = {}
    for piece in parts:
        if piece.part is Part.CONTENT and piece.message in assistants:
            contents.setdefault(piece.message, (piece.start, ends.get(piece.message, piece.end)))
    found: dict[int, list[tuple[int, int, Part]]] = {}
    for message, (start, end) in contents.items():
        opened = _OPENED.search(text[max(0, start - 64) : start])
        tags = find_thinking_tags(text[start:end], opened.group(1) if opened else None)
        if not tags:
            continue
        found[message] = [(start + a, start + b, Part.SCAFFOLD) for a, b in tags]
        closed, after = tags[-1]
        begun = tags[0][1] if len(tags) > 1 else 0
        if text[start + begun : start + closed].strip():
            answer = text[start + after : end].lstrip()
            found[message].append((start, end - len(answer), Part.REASONING))
    return found


def find_thinking_tags(content: str, opened: str | None = None) -> list[tuple[int, int]]:
    """Return where the tags of the thinking stand that a content begins with: none, both, or the closing one.

    `opened` is the name of a tag that stands open before it.

    >>> find_thinking_tags("<think>hm</think>yes"), find_thinking_tags("hm</think>yes", "think"), find_thinking_tags("</think>")
    ([(0, 7), (9, 17)], [(2, 10)], [])
    """
    opening = _OPENS.match(content)
    name = opening.group(1) if opening else opened
    closing = content.find(f"</{name}>") if name else -1
    if closing < 0:
        return []
    tags = [(opening.end() - len(f"<{name}>"), opening.end())] if opening else []
    return [*tags, (closing, closing + len(f"</{name}>"))]


def make_spans(parts: Iterable[TextPiece], regions: Sequence[TurnRegion]) -> tuple[Span, ...]:
    """Lay the regions over the pieces: spans that tile the text, each generated or not.

    Template text inside a region belongs to the region's message, outside to none. Regions are disjoint and
    in order.
    """
    return tuple(span for piece in parts for span in _spans(piece, regions))


def _spans(piece: TextPiece, regions: Sequence[TurnRegion]) -> Iterator[Span]:
    at = piece.start
    outside = -1 if piece.part is Part.SCAFFOLD else piece.message
    for region in regions:
        start, end = max(region.start, at), min(region.end, piece.end)
        if start >= end:
            continue
        if at < start:
            yield Span(at, start, piece.part, outside, False)
        yield Span(start, end, piece.part, region.message, True)
        at = end
    if at < piece.end:
        yield Span(at, piece.end, piece.part, outside, False)


def _tracked_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    known = {key: value for key, value in message.items() if value is not None and key != "train"}
    reasoning = next((known[key] for key in _REASONING if key in known), None)
    if reasoning is not None:
        known = {"thinking": reasoning, **known, "reasoning_content": reasoning}
    # The role is one of a few known words, and what templates decide by.
    return {
        key: value if key == "role" else track_value(value, _KEYS.get(key, Part.OTHER), index)
        for key, value in known.items()
    }
