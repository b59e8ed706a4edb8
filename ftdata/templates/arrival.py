"""Account: which of the row's text is in the rendering, where attribution lost it, and what the template left out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
_KEYS = {Part.CONTENT: "content", Part.TOOL_CALL: "tool_calls"}
_MOST_LEAVES = 64


def recover(
    text: str, parts: Sequence[Piece], messages: Sequence[Mapping[str, Any]], rerender: Rerender
) -> tuple[Piece, ...]:
    """Return the pieces with those added whose memory the template wiped out, found by changing the data.

    A text that was turned into a Python literal, or formatted, is a plain string to us. What moves in the rendering
    when the first and the last letter of a field change is that field. An empty answer gets a piece of no length,
    where its text would stand.
    """
    found, arrived = list(parts), _texts(text, parts)
    for index, message in enumerate(messages):
        if _answers_nothing(message):
            at = _place(text, message, index, rerender)
            found = found if at is None else _insert(found, Piece(at, at, Part.CONTENT, index, 0))
            continue
        for part, key in _KEYS.items():
            if isinstance(message.get("content"), list) or _all_printed(_given(message, part), arrived[index, part]):
                continue
            for start, end in _extents(text, message, index, key, rerender):
                found = [new for old in found for new in _claimed(old, start, end, part, index)]
    return tuple(found)


def check_arrival(
    messages: Sequence[Mapping[str, Any]], text: str, parts: Sequence[Piece], dropped: str = "refuse"
) -> frozenset[str]:
    """Check that every message's text arrived in the rendering; return flags for what arrived in part.

    Args:
        messages: the conversation.
        text: the rendering.
        parts: whose text it is.
        dropped: `"refuse"`, or `"flag"` rows of which a message that is not the assistant's is missing.

    Raises:
        BadRow: `payload_dropped`: a content or a tool call is nowhere in the text; `content_stringified`: a list of
            parts is printed as a literal.
    """
    flags: set[str] = set()
    arrived = _texts(text, parts)
    for index, message in enumerate(messages):
        content, calls = arrived[index, Part.CONTENT], arrived[index, Part.TOOL_CALL]
        given = _given(message, Part.CONTENT)
        lost_call = message.get("tool_calls") and not _arguments_printed(message["tool_calls"], calls, text)
        if (any(given) and not content) or lost_call:
            if dropped == "flag" and message["role"] != "assistant":
                flags.add("payload_dropped")
                continue
            raise BadRow(
                "payload_dropped",
                f"the template does not print this {message['role']} message's text as given",
                field=f"messages[{index}].{'tool_calls' if lost_call else 'content'}",
                hint="use a template that has room for it, or take it out of the data",
            )
        if isinstance(message.get("content"), list) and len(content) > sum(map(len, given)):
            raise BadRow(
                "content_stringified",
                "the template prints the list of parts itself, not the text in it",
                field=f"messages[{index}].content",
                hint="give the content as text",
            )
        if not _all_printed(given, content) or not _all_printed(_given(message, Part.TOOL_CALL), calls):
            flags.add("content_cut")
        flags |= _other_flags(message, arrived[index, Part.REASONING], arrived[index, Part.OTHER])
    return frozenset(flags)


def _arguments_printed(calls: Sequence[Mapping[str, Any]], printed: str, text: str) -> bool:
    """Whether every argument is in the printed calls; where their memory is lost, keys are known by the text alone."""
    values = (value for call in calls for value in _values(_function(call).get("arguments")))
    keys = (key for call in calls for key in _keys(_function(call).get("arguments")))
    return bool(printed) and _all_printed(values, printed) and _all_printed(keys, text)


def _other_flags(message: Mapping[str, Any], reasoning: str, other: str) -> set[str]:
    flags: set[str] = set()
    thought = next((message[key] for key in _REASONING if message.get(key)), None)
    if isinstance(thought, str) and thought.strip() and not _printed(thought.strip(), reasoning):
        flags.add("content_cut" if reasoning else "reasoning_dropped")
    known = _KNOWN if message["role"] == "tool" else _KNOWN - {"name"}
    unknown = [value for key, value in message.items() if key not in known]
    if not all(isinstance(value, str) and _printed(value, other) for value in unknown):
        flags.add("fields_dropped")
    return flags


def _texts(text: str, parts: Sequence[Piece]) -> defaultdict[tuple[int, Part], str]:
    """Return the text of each part of each message in a rendering."""
    found: defaultdict[tuple[int, Part], str] = defaultdict(str)
    for piece in parts:
        if piece.part is not Part.SCAFFOLD:
            found[piece.message, piece.part] += text[piece.start : piece.end]
    return found


def _all_printed(given: Iterable[str], text: str) -> bool:
    return all(_printed(one, text) for one in given)


def _printed(given: str, text: str) -> bool:
    """Whether a text is there, as it is or as JSON has it; blanks around it may have been trimmed."""
    wanted = given.strip()
    escaped = (json.dumps(wanted, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    return wanted in text or any(one in text for one in escaped)


def _given(message: Mapping[str, Any], part: Part) -> list[str]:
    """Return the texts of a message that a rendering of it has to hold: its content, or its calls' names and values."""
    if part is Part.TOOL_CALL:
        functions = map(_function, message.get("tool_calls") or ())
        return [text for one in functions for text in _values([one.get("name"), one.get("arguments")])]
    content = message.get("content")
    if isinstance(content, list):
        return [part.get("text", "") for part in content]
    return [content.strip()] if content else []


def _answers_nothing(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    blank = not content if isinstance(content, list) else not (content or "").strip()
    return blank and message["role"] == "assistant" and not message.get("tool_calls")


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    found = call.get("function", call)
    return found if isinstance(found, Mapping) else {}


def _values(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value but keys."""
    if isinstance(value, str):
        yield str.__str__(value)
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _values(inner)


def _keys(value: Any) -> Iterator[str]:
    """Yield all keys in a JSON value."""
    yield from value if isinstance(value, Mapping) else ()
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _keys(inner)


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
