"""Account: which of the row's text is in the rendering, where attribution lost it, and what the template left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ftdata.errors import BadRow
from ftdata.templates.compare import agreement
from ftdata.templates.spans import Piece
from ftdata.types import Part

Rerender = Callable[[int, dict[str, Any]], str | None]
"""(index of a message, that message changed) -> the whole conversation rendered, `None` where the template refuses."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_KNOWN = {"role", "content", "tool_calls", "tool_call_id", "name", "id", "type", *_REASONING}
_FIELDS = {Part.CONTENT: ("content",), Part.TOOL_CALL: ("tool_calls",)}
_MOST_LEAVES = 64


def recover(
    text: str, parts: Sequence[Piece], messages: Sequence[Mapping[str, Any]], rerender: Rerender
) -> tuple[Piece, ...]:
    """Return the pieces with those added whose memory the template wiped out, found by changing the data.

    A text that was turned into a Python literal, or formatted, is a plain string to us. What moves in the rendering
    when the first and the last letter of a field change is that field. An empty answer gets a piece of no length,
    where its text would stand.
    """
    found, arrived = list(parts), _arrivals(parts)
    for index, message in enumerate(messages):
        for part, (key,) in _FIELDS.items():
            value = message.get(key)
            if part is Part.CONTENT and message["role"] == "assistant" and not value and not message.get("tool_calls"):
                at = _place(text, message, index, rerender)
                found = found if at is None else _insert(found, Piece(at, at, Part.CONTENT, index, 0))
            elif (
                value and not isinstance(message.get("content"), list) and _given(message, part) > arrived[index, part]
            ):
                for start, end in _extents(text, message, index, key, rerender):
                    found = [new for old in found for new in _claimed(old, start, end, part, index)]
    return tuple(found)


def check_arrival(
    messages: Sequence[Mapping[str, Any]], parts: Sequence[Piece], dropped: str = "refuse"
) -> frozenset[str]:
    """Check that every message's text arrived in the rendering; return flags for what arrived in part.

    Args:
        messages: the conversation.
        parts: the rendering.
        dropped: `"refuse"`, or `"flag"` rows of which a message that is not the assistant's is missing.

    Raises:
        BadRow: `payload_dropped`: a content or a tool call is nowhere in the text; `content_stringified`: a list of
            parts is printed as a literal.
    """
    flags: set[str] = set()
    arrived = _arrivals(parts)
    for index, message in enumerate(messages):
        given, found = _given(message, Part.CONTENT), arrived[index, Part.CONTENT]
        calls, called = _given(message, Part.TOOL_CALL), arrived[index, Part.TOOL_CALL]
        needed = calls and sum(_letters(_arguments(call)) for call in message["tool_calls"])
        if (given and not found) or (calls and (not called or called < needed)):
            if dropped == "flag" and message["role"] != "assistant":
                flags.add("payload_dropped")
                continue
            raise BadRow(
                "payload_dropped",
                f"the template does not print this {message['role']} message's text as given",
                field=f"messages[{index}].{'content' if given and not found else 'tool_calls'}",
                hint="use a template that has room for it, or take it out of the data",
            )
        if isinstance(message.get("content"), list) and found > given:
            raise BadRow(
                "content_stringified",
                "the template prints the list of parts itself, not the text in it",
                field=f"messages[{index}].content",
                hint="give the content as text",
            )
        if found < given or called < calls:
            flags.add("content_cut")
        unknown = [value for key, value in message.items() if key not in _KNOWN]
        if unknown and arrived[index, Part.OTHER] < _letters(unknown):
            flags.add("fields_dropped")
        if any(message.get(key) for key in _REASONING) and not arrived[index, Part.REASONING]:
            flags.add("reasoning_dropped")
    return frozenset(flags)


def _given(message: Mapping[str, Any], part: Part) -> int:
    """Return how many characters of the message a rendering of it has to hold."""
    if part is Part.CONTENT:
        return len(_plain(message.get("content")).strip())
    return sum(map(_call_letters, message.get("tool_calls") or ()))


def _arrivals(parts: Sequence[Piece]) -> Counter[tuple[int, Part]]:
    """Count the characters of each part of each message in a rendering."""
    found: Counter[tuple[int, Part]] = Counter()
    for piece in parts:
        found[piece.message, piece.part] += piece.end - piece.start
    return found


def _extents(
    text: str, message: Mapping[str, Any], index: int, key: str, rerender: Rerender
) -> Iterator[tuple[int, int]]:
    for number, path in enumerate(_leaves(message[key], (key,))):
        if number == _MOST_LEAVES:
            return
        before, after = (rerender(index, _changed(message, path, change)) for change in (_prefixed, _suffixed))
        if before is None or after is None or text in (before, after):
            continue
        start = agreement(text, before)
        end = len(text) - agreement(text[::-1], after[::-1])
        if start < end:
            yield start, end


def _place(text: str, message: Mapping[str, Any], index: int, rerender: Rerender) -> int | None:
    """Return where in the rendering an empty answer stands."""
    filled = rerender(index, {**message, "content": "x"})
    at = agreement(text, filled) if filled is not None else -1
    return at if filled == f"{text[:at]}x{text[at:]}" else None


def _claimed(piece: Piece, start: int, end: int, part: Part, message: int) -> Iterator[Piece]:
    """Yield the piece, with what lies in `[start, end)` given to the message if it was the template's."""
    if piece.part is not Part.SCAFFOLD or piece.end <= start or end <= piece.start:
        yield piece
        return
    inner, last = max(piece.start, start), min(piece.end, end)
    if piece.start < inner:
        yield replace(piece, end=inner)
    yield replace(piece, start=inner, end=last, part=part, message=message)
    if last < piece.end:
        yield replace(piece, start=last)


def _insert(parts: Sequence[Piece], empty: Piece) -> list[Piece]:
    found: list[Piece] = []
    for piece in parts:
        inside = piece.start < empty.start < piece.end
        found += [replace(piece, end=empty.start), replace(piece, start=empty.start)] if inside else [piece]
    position = next((n for n, piece in enumerate(found) if piece.start >= empty.start), len(found))
    return [*found[:position], empty, *found[position:]]


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of the texts that templates print: contents, names and the values of arguments."""
    if isinstance(value, str):
        if value and path[-1] not in ("id", "type"):
            yield path
        return
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in pairs:
        yield from _leaves(inner, (*path, key))


def _changed(value: Any, path: tuple[Any, ...], change: Callable[[str], str]) -> Any:
    if not path:
        return change(value)
    if isinstance(value, Mapping):
        return {key: _changed(inner, path[1:], change) if key == path[0] else inner for key, inner in value.items()}
    return [_changed(inner, path[1:], change) if key == path[0] else inner for key, inner in enumerate(value)]


def _prefixed(text: str) -> str:
    return ("y" if text.startswith("x") else "x") + text


def _suffixed(text: str) -> str:
    return text + ("y" if text.endswith("x") else "x")


def _call_letters(call: Mapping[str, Any]) -> int:
    function = call.get("function", call)
    return _letters(function.get("name")) + _letters(_arguments(call)) if isinstance(function, Mapping) else 1


def _arguments(call: Mapping[str, Any]) -> Any:
    function = call.get("function", call)
    return function.get("arguments") if isinstance(function, Mapping) else None


def _letters(value: Any) -> int:
    """Return the number of characters of all strings in a JSON value, keys included."""
    if isinstance(value, Mapping):
        return sum(_letters(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return sum(map(_letters, value))
    return len(value) if isinstance(value, str) else 0


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""
