"""Check that a rendered text contains every message, and find messages whose position in the text is unknown."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ftdata.errors import BadRow
from ftdata.templates.attribution.agreement import common_prefix_length
from ftdata.templates.attribution.spans import TextPiece, find_thinking_tags, override_part
from ftdata.types import Part

Rerender = Callable[[int, dict[str, Any]], str | None]
"""(index of a message, changed message) -> the rendered conversation, or `None` if the template rejects it."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_STANDARD_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "id", "type", *_REASONING}
_KEYS = {Part.CONTENT: ("content",), Part.TOOL_CALL: ("tool_calls",), Part.REASONING: _REASONING}
_MAX_LEAVES = 64


def recover_attribution(
    text: str, parts: Sequence[TextPiece], messages: Sequence[Mapping[str, Any]], rerender: Rerender
) -> tuple[TextPiece, ...]:
    """Find message fields in the rendered text if operations of the template lost their positions.

    A text loses its owners if the template formats the text or converts it to a Python literal. To find the range of
    such a field, change its first and its last character and render again: the text that moves is the field.
    An empty answer gets a piece of length 0 at its position.

    Args:
        text: the rendered text.
        parts: the pieces of the rendered text.
        messages: the conversation.
        rerender: renders the conversation with a message changed.

    Returns:
        The pieces with the recovered attribution.
    """
    pieces, printed = list(parts), _join_pieces(text, parts)
    for index, message in enumerate(messages):
        if _is_fully_printed(message, printed[index, Part.CONTENT]):
            continue
        if _is_empty_answer(message):
            position = _find_empty_answer(text, message, index, rerender)
            if position is not None:
                pieces = _insert(pieces, TextPiece(position, position, Part.CONTENT, index, 0))
            continue
        for part, keys in _KEYS.items():
            texts = _expected_texts(message, part)
            if isinstance(message.get("content"), list | Mapping) or _all_printed(texts, printed[index, part]):
                continue
            # Many templates omit reasoning on purpose, so it is recovered only if the rendered text contains it.
            if part is Part.REASONING and not _all_printed(texts, text):
                continue
            for key in filter(message.get, keys):
                for start, end in _find_ranges(text, message, index, key, rerender):
                    pieces = [
                        new
                        for old in pieces
                        for new in override_part(old, start, end, Part.SCAFFOLD, part=part, message=index)
                    ]
    return tuple(pieces)


def check_coverage(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    text: str,
    parts: Sequence[TextPiece],
    rerender: Rerender,
    on_dropped_message: str = "reject",
) -> frozenset[str]:
    """Check that the rendered text contains every message. Return flags for partly printed messages.

    Args:
        messages: the conversation.
        tools: the tool definitions.
        text: the rendered text.
        parts: the pieces of the text.
        rerender: renders the conversation with a message changed.
        on_dropped_message: what to do if the template omits a message that is not an assistant message: `"reject"`
            or `"flag"`.

    Raises:
        BadRow: `message_dropped`, if the content or a tool call of a message is missing from the text;
            `content_stringified`, if the template prints a list of parts or an object as a Python literal.
    """
    flags: set[str] = set()
    printed, segments = _join_pieces(text, parts), _message_segments(text, parts)
    for index, message in enumerate(messages):
        content, calls = printed[index, Part.CONTENT], printed[index, Part.TOOL_CALL]
        if _is_fully_printed(message, content):
            continue
        segment = segments.get(index, "")
        texts = _expected_texts(message, Part.CONTENT)
        if _is_object(message.get("content")):
            _check_object(message["content"], text, content, segment, f"messages[{index}].content")
            continue
        literal = _any_printed(filter(None, texts), text) if not content else len(content) > sum(map(len, texts))
        if isinstance(message.get("content"), list) and any(map(str.strip, texts)) and literal:
            problem = "the template prints the content as a Python list instead of printing the text of its parts"
            hint = "convert the content to a string"
            raise BadRow("content_stringified", problem, field=f"messages[{index}].content", hint=hint)
        lost_call = bool(message.get("tool_calls")) and not (
            _calls_printed(message, calls, segment) and _each_call_printed(message, segment, partial(rerender, index))
        )
        if (any(map(str.strip, texts)) and not content) or lost_call:
            if on_dropped_message == "flag" and message["role"] != "assistant":
                flags.add("message_dropped")
                continue
            raise BadRow(
                "message_dropped",
                f"the template changes or omits the text of this {message['role']} message",
                field=f"messages[{index}].{'tool_calls' if lost_call else 'content'}",
                hint="use a template that prints the message, or remove the message from the data",
            )
        fully_printed = _all_printed(texts, content) or _has_reformatted_thinking(texts, segment)
        if not fully_printed or not _all_printed(_expected_texts(message, Part.TOOL_CALL), calls):
            flags.add("message_truncated")
        flags |= _flag_reasoning(message, printed[index, Part.REASONING])
        if not _fields_printed(message, printed[index, Part.OTHER] + printed[index, Part.TOOL_CALL], segment):
            flags.add("fields_dropped")
    if not _tools_printed(tools, printed[-1, Part.TOOLS]):
        flags.add("tools_dropped")
    return frozenset(flags)


def _is_object(content: Any) -> bool:
    """Return whether `content` is a JSON object or list, such as a tool result, but not a list of text parts."""
    parts = content if isinstance(content, list) else ()
    return isinstance(content, Mapping) or any(not isinstance(part.get("text"), str) for part in parts)


def _check_object(content: Any, text: str, printed: str, segment: str, field: str) -> None:
    """Reject a tool result if the template prints it as a Python literal, or omits a part of it.

    Args:
        content: the tool result.
        text: the rendered text.
        printed: the part of the rendered text that is attributed to the tool result.
        segment: the rendered text of the message, which also contains its keys and numbers.
        field: path of the result in the row.

    Raises:
        BadRow: `content_stringified` or `message_dropped`.
    """
    plain = _untrack(content)
    hint = "convert the result to JSON text, which every template prints"
    literal = str(plain)
    if literal in text and literal not in {json.dumps(plain, ensure_ascii=ascii_only) for ascii_only in (False, True)}:
        message = "the template prints the tool result as a Python literal instead of JSON"
        raise BadRow("content_stringified", message, field=field, hint=hint)
    if not _all_printed(_strings(plain), printed) or not _any_printed((*_keys(plain), *_numbers(plain)), segment):
        raise BadRow("message_dropped", "the template omits a part of the tool result", field=field, hint=hint)


def _untrack(value: Any) -> Any:
    """Return a copy of a JSON value in which every `TrackedString` is converted to a plain `str`."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_untrack(key): _untrack(item) for key, item in value.items()}
    return [_untrack(item) for item in value] if isinstance(value, list | tuple) else value


def _is_fully_printed(message: Mapping[str, Any], printed: str) -> bool:
    """Return whether a message has only a role and a text, and `printed` equals it except for outer whitespace."""
    content = message.get("content")
    if not printed or not isinstance(content, str) or len(message) != 2 or "role" not in message:
        return False
    return str.strip(content) == str.strip(printed)


def _tools_printed(tools: Sequence[Mapping[str, Any]], printed: str) -> bool:
    """Return whether the rendered text contains the names of all tools and the names of all tool parameters."""
    for tool in tools:
        function = _get_function(tool)
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        names = (*_strings(function.get("name")), *(properties if isinstance(properties, Mapping) else ()))
        if not printed or not _all_printed(dict.fromkeys(names), printed):
            return False
    return True


def _calls_printed(message: Mapping[str, Any], printed: str, segment: str) -> bool:
    """Return whether `printed` contains the strings of all tool calls, and `segment` their keys and numbers."""
    arguments = [_get_function(call).get("arguments") for call in message["tool_calls"]]
    keys_and_numbers = (text for value in arguments for text in (*_keys(value), *_numbers(value)))
    return bool(printed) and _all_printed(_strings(arguments), printed) and _any_printed(keys_and_numbers, segment)


def _each_call_printed(
    message: Mapping[str, Any], printed: str, rerender: Callable[[dict[str, Any]], str | None]
) -> bool:
    """Return whether the template prints every tool call of a message that has several tool calls.

    A call that contains no unique text is replaced by a unique call, and the message is rendered again.
    """
    calls = message["tool_calls"]
    for number, call in enumerate(calls if len(calls) > 1 else ()):
        other_calls = [*calls[:number], *calls[number + 1 :]]
        other_text = "\n".join(
            [
                *_expected_texts(message, Part.CONTENT),
                *(text for other_call in other_calls for text in _call_texts(other_call)),
            ]
        )
        if any(text not in other_text and _count_occurrences(text, printed) for text in _call_texts(call)):
            continue
        marked = _make_unique(call)
        rendered = rerender({**message, "tool_calls": [*calls[:number], marked, *calls[number + 1 :]]})
        if rendered is not None and not _calls_printed({"tool_calls": [marked]}, rendered, rendered):
            return False
    return True


def _call_texts(call: Mapping[str, Any]) -> list[str]:
    """Return the function name of a tool call, and all strings and numbers in the arguments."""
    values = [_get_function(call).get(key) for key in ("name", "arguments")]
    return [text.strip() for text in (*_strings(values), *_numbers(values)) if text.strip()]


def _make_unique(value: Any, seed: int = 7001) -> Any:
    """Return a copy of a tool call in which every string and every number is unique."""
    if isinstance(value, Mapping):
        return {
            key: inner if key in ("id", "type") and "function" in value else _make_unique(inner, 31 * seed + index)
            for index, (key, inner) in enumerate(value.items())
        }
    if isinstance(value, list | tuple):
        return [_make_unique(inner, 31 * seed + index) for index, inner in enumerate(value)]
    if isinstance(value, bool) or value is None:
        return value
    return f"q{seed}z{str.__str__(value)}" if isinstance(value, str) else seed


def _has_reformatted_thinking(texts: Sequence[str], segment: str) -> bool:
    """Return whether `texts` begin with a thinking block and are printed completely. Ignore whitespace."""
    content = "".join(texts)
    return bool(find_thinking_tags(content)) and "".join(content.split()) in "".join(segment.split())


def _flag_reasoning(message: Mapping[str, Any], printed: str) -> set[str]:
    texts = _expected_texts(message, Part.REASONING)
    if not any(texts) or _all_printed(texts, printed):
        return set()
    return {"message_truncated" if printed else "reasoning_dropped"}


def _fields_printed(message: Mapping[str, Any], printed: str, segment: str) -> bool:
    standard_keys = _STANDARD_KEYS if message["role"] == "tool" else _STANDARD_KEYS - {"name"}
    extra_values = [value for key, value in message.items() if key not in standard_keys]
    texts, numbers = ([text for value in extra_values for text in read(value)] for read in (_strings, _numbers))
    return _all_printed(dict.fromkeys(texts), printed) and _any_printed(numbers, segment)


def _join_pieces(text: str, pieces: Sequence[TextPiece]) -> defaultdict[tuple[int, Part], str]:
    """Return a dict that maps (message index, kind of field) to the rendered text of the field."""
    printed: defaultdict[tuple[int, Part], str] = defaultdict(str)
    for piece in pieces:
        if piece.part is not Part.SCAFFOLD:
            printed[piece.message, piece.part] += text[piece.start : piece.end]
    return printed


def _message_segments(text: str, pieces: Sequence[TextPiece]) -> dict[int, str]:
    """For each message, return the rendered text from the end of the previous message to the start of the next."""
    owned = [piece for piece in pieces if piece.part is not Part.SCAFFOLD]
    positions: dict[int, tuple[int, int]] = {}
    for position, piece in enumerate(owned):
        first, _ = positions.get(piece.message, (position, 0))
        positions[piece.message] = first, position
    edges = [0, *(piece.end for piece in owned)], [*(piece.start for piece in owned), len(text)]
    return {message: text[edges[0][first] : edges[1][last + 1]] for message, (first, last) in positions.items()}


def _all_printed(expected: Iterable[str], text: str) -> bool:
    """Return whether the text contains each string as often as `expected` does. Ignore whitespace at both ends."""
    counts = Counter(filter(None, (item.strip() for item in expected)))
    return sum(len(item) * count for item, count in counts.items()) <= len(text) and all(
        _count_occurrences(item, text) >= count for item, count in counts.items()
    )


def _any_printed(expected: Iterable[str], text: str) -> bool:
    """Return whether the text contains each expected string at least once."""
    return all(_count_occurrences(item, text) for item in expected)


def _count_occurrences(expected: str, text: str) -> int:
    """Count how often the text contains a string. If there is no exact match, count its JSON-escaped form."""
    return text.count(expected) or max(
        text.count(json.dumps(expected, ensure_ascii=ascii_only)[1:-1]) for ascii_only in (False, True)
    )


def _expected_texts(message: Mapping[str, Any], part: Part) -> list[str]:
    """Return the strings of a message that the rendered text must contain.

    Depending on `part`, the strings are the content, the reasoning, or the names and argument values of tool calls.
    """
    if part is Part.TOOL_CALL:
        functions = map(_get_function, message.get("tool_calls") or ())
        return [text for function in functions for text in _strings([function.get("name"), function.get("arguments")])]
    if part is Part.REASONING:
        return list(dict.fromkeys(text for key in _REASONING for text in _strings(message.get(key))))
    content = message.get("content")
    if _is_object(content):
        return list(_strings(content))
    if isinstance(content, list):
        return [part.get("text", "") for part in content]
    return [content] if content else []


def _is_empty_answer(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    is_empty = not content.strip() if isinstance(content, str) else not content
    return is_empty and message["role"] == "assistant" and not message.get("tool_calls")


def _get_function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    return function if isinstance(function, Mapping) else {}


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, except the keys of objects."""
    return (str.__str__(scalar) for scalar in _scalars(value) if isinstance(scalar, str))


def _numbers(value: Any) -> Iterator[str]:
    """Yield all numbers in a JSON value as text. Omit booleans: some templates print `True`, others `true`."""
    return (
        json.dumps(scalar)
        for scalar in _scalars(value)
        if isinstance(scalar, int | float) and not isinstance(scalar, bool)
    )


def _scalars(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    if inner is None:
        yield value
    for item in inner or ():
        yield from _scalars(item)


def _keys(value: Any) -> Iterator[str]:
    """Yield the keys of all objects in a JSON value."""
    yield from value if isinstance(value, Mapping) else ()
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _keys(inner)


def _find_ranges(
    text: str, message: Mapping[str, Any], index: int, key: str, rerender: Rerender
) -> Iterator[tuple[int, int]]:
    for number, path in enumerate(_leaf_paths(message[key], (key,))):
        if number == _MAX_LEAVES:
            return
        before, after = (rerender(index, _change_leaf(message, path, change)) for change in (_add_prefix, _add_suffix))
        if before is None or after is None or text in (before, after):
            continue
        start = common_prefix_length(text, before)
        end = len(text) - common_prefix_length(text[::-1], after[::-1])
        if start < end:
            yield start, end


def _find_empty_answer(text: str, message: Mapping[str, Any], index: int, rerender: Rerender) -> int | None:
    """Return the position of an empty answer in the rendered text, or `None` if the position is uncertain."""
    filled = rerender(index, {**message, "content": "x"})
    if filled is None:
        return None
    position = common_prefix_length(text, filled)
    # The text after the position may differ: some templates print no stop token after an empty answer.
    return position if filled.startswith(f"{text[:position]}x") else None


def _insert(pieces: Sequence[TextPiece], empty: TextPiece) -> list[TextPiece]:
    split: list[TextPiece] = []
    for piece in pieces:
        inside = piece.start < empty.start < piece.end
        split += [piece._replace(end=empty.start), piece._replace(start=empty.start)] if inside else [piece]
    position = next((n for n, piece in enumerate(split) if piece.start >= empty.start), len(split))
    return [*split[:position], empty, *split[position:]]


def _leaf_paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each non-empty string in a JSON value, except the values of the keys `id` and `type`."""
    if isinstance(value, str):
        if value and path[-1] not in ("id", "type"):
            yield path
        return
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in pairs:
        yield from _leaf_paths(inner, (*path, key))


def _change_leaf(value: Any, path: tuple[Any, ...], change: Callable[[str], str]) -> Any:
    if not path:
        return change(value)
    if isinstance(value, Mapping):
        return {key: _change_leaf(inner, path[1:], change) if key == path[0] else inner for key, inner in value.items()}
    return [_change_leaf(inner, path[1:], change) if key == path[0] else inner for key, inner in enumerate(value)]


def _add_prefix(text: str) -> str:
    return ("y" if text.startswith("x") else "x") + text


def _add_suffix(text: str) -> str:
    return text + ("y" if text.endswith("x") else "x")
