"""Check that a rendered text contains every message, and find messages whose position in the text is unknown."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

from ftdata.errors import BadRow
from ftdata.templates.attribution.agreement import common_prefix_length
from ftdata.templates.attribution.markers import untrack
from ftdata.templates.attribution.spans import TextPiece, find_thinking_tags, override_part
from ftdata.types import IMAGE_PART, Part

Rerender = Callable[[int, dict[str, Any]], str | None]
"""(index of a message, changed message) -> the rendered conversation, or `None` if the template rejects it."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_STANDARD_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "id", "type", *_REASONING}
_KEYS = {Part.CONTENT: ("content",), Part.TOOL_CALL: ("tool_calls",), Part.REASONING: _REASONING}
_MAX_LEAVES = 64


def recover_attribution(
    text: str,
    parts: Sequence[TextPiece],
    messages: Sequence[Mapping[str, Any]],
    rerender: Rerender,
    control: re.Pattern[str] | None = None,
) -> tuple[TextPiece, ...]:
    """Search the rendered text for the message fields whose positions were lost in operations of the template.

    A text loses its owners if the template formats the text or converts it to a Python literal. To find the range of
    such a field, change its first and its last character and render again: the text that moves is the field.
    An empty answer gets a piece of length 0 at its position.

    Args:
        text: the rendered text.
        parts: the pieces of the rendered text.
        messages: the conversation.
        rerender: renders the conversation with a message changed.
        control: pattern of control tokens. If a range contains other control tokens than its field, the template
            prints the field in several places, so the range is not used.

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
            if not _is_lost(message, part, printed[index, part], text):
                continue
            for key in filter(message.get, keys):
                for start, end in _find_ranges(text, message, index, key, rerender):
                    if control and Counter(control.findall(text, start, end)) - _count_matches(control, message[key]):
                        continue
                    changed = (
                        override_part(old, start, end, Part.SCAFFOLD, part=part, message=index) for old in pieces
                    )
                    pieces = list(chain.from_iterable(changed))
    return tuple(pieces)


_SHORTENING_FLAGS = {"message_truncated", "reasoning_dropped"}


def check_coverage(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    text: str,
    parts: Sequence[TextPiece],
    rerender: Rerender,
    on_dropped_message: str = "reject",
    context: Container[int] = (),
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
        context: indices of the assistant messages that are not trained in this example. The template may shorten
            them, for example omit the reasoning of earlier turns, because it does the same at inference.

    Raises:
        BadRow: `message_dropped`, if the content or a tool call of a message is missing from the text;
            `content_stringified`, if the template prints a list of parts or an object as a Python literal.
    """
    flags: set[str] = set()
    printed, segments = _join_pieces(text, parts), _message_segments(text, parts)
    for index, message in enumerate(messages):
        if _is_fully_printed(message, printed[index, Part.CONTENT]):
            continue
        by_part = {part: printed[index, part] for part in Part}
        rendered = _RenderedMessage(message, f"messages[{index}]", text, segments.get(index, ""), by_part)
        message_flags = _check_message(rendered, partial(rerender, index), on_dropped_message)
        flags |= message_flags - _SHORTENING_FLAGS if index in context else message_flags
    if not _tools_printed(tools, printed[-1, Part.TOOLS]):
        flags.add("tools_dropped")
    return frozenset(flags)


class _RenderedMessage(NamedTuple):
    """A message, and the parts of the rendered text that belong to it.

    Attributes:
        message: the message.
        field: path of the message in the row.
        text: the rendered text of the whole conversation.
        segment: the rendered text from the end of the previous message to the start of the next message.
        printed: the rendered text of each kind of field.
    """

    message: Mapping[str, Any]
    field: str
    text: str
    segment: str
    printed: Mapping[Part, str]


def _check_message(
    rendered: _RenderedMessage, rerender: Callable[[dict[str, Any]], str | None], on_dropped_message: str
) -> set[str]:
    """Check that the rendered text contains a message. Return flags for a partly printed message."""
    message = rendered.message
    if _is_object(message.get("content")):
        _check_object(rendered)
        return set()
    _check_stringified(rendered)
    if dropped_key := _find_dropped_key(rendered, rerender):
        if on_dropped_message == "flag" and message["role"] != "assistant":
            return {"message_dropped"}
        problem = f"the template changes or omits the text of this {message['role']} message"
        field = f"{rendered.field}.{dropped_key}"
        if dropped_key == "tool_calls":
            hint = "use a template that prints tool calls, or remove them from the data"
            raise BadRow("message_dropped", problem, field=field, hint=hint)
        hint = "use a template that prints the message, change its role, or remove the message from the data"
        if message.get("tool_calls"):
            hint = "the template may print either content or tool calls: empty the content, or use another template"
        raise BadRow("message_dropped", problem, field=field, hint=hint)
    flags = _flag_reasoning(message, rendered.printed[Part.REASONING])
    if not _content_printed(rendered) or not _all_printed(
        _expected_texts(message, Part.TOOL_CALL), rendered.printed[Part.TOOL_CALL]
    ):
        flags.add("message_truncated")
    other_text = rendered.printed[Part.OTHER] + rendered.printed[Part.TOOL_CALL]
    if not _fields_printed(message, other_text, rendered.segment):
        flags.add("fields_dropped")
    return flags


def _check_stringified(rendered: _RenderedMessage) -> None:
    """Reject a message if the template prints its list of text parts as a Python literal."""
    content, printed = rendered.message.get("content"), rendered.printed[Part.CONTENT]
    if not isinstance(content, list):
        return
    texts = _expected_texts(rendered.message, Part.CONTENT)
    # A literal either lost its owners, or it contains brackets and quotes in addition to the texts.
    is_literal = len(printed) > sum(map(len, texts)) if printed else _any_printed(filter(None, texts), rendered.text)
    if is_literal and any(map(str.strip, texts)):
        problem = "the template prints the content as a Python list instead of printing the text of its parts"
        field = f"{rendered.field}.content"
        raise BadRow("content_stringified", problem, field=field, hint="convert the content to a string")


def _find_dropped_key(rendered: _RenderedMessage, rerender: Callable[[dict[str, Any]], str | None]) -> str | None:
    """Return the key of a message that the rendered text does not contain: `tool_calls`, `content` or `None`."""
    message, printed = rendered.message, rendered.printed
    if message.get("tool_calls") and not (
        _calls_printed(message, printed[Part.TOOL_CALL], rendered.segment)
        and _each_call_printed(message, rendered.segment, rerender)
    ):
        return "tool_calls"
    has_text = any(map(str.strip, _expected_texts(message, Part.CONTENT)))
    return "content" if has_text and not printed[Part.CONTENT] else None


def _content_printed(rendered: _RenderedMessage) -> bool:
    texts = _expected_texts(rendered.message, Part.CONTENT)
    is_printed = _all_printed(texts, rendered.printed[Part.CONTENT])
    return is_printed or _has_reformatted_thinking(texts, rendered.segment)


def _is_lost(message: Mapping[str, Any], part: Part, printed: str, text: str) -> bool:
    """Return whether the rendered text may contain a kind of field of a message whose position is not recorded."""
    texts = _expected_texts(message, part)
    if isinstance(message.get("content"), list | Mapping) or _all_printed(texts, printed):
        return False
    # Many templates omit reasoning on purpose, so it is recovered only if the rendered text contains it.
    return part is not Part.REASONING or _all_printed(texts, text)


def _is_object(content: Any) -> bool:
    """Return whether `content` is a JSON object or list, such as a tool result, but not a list of parts."""
    parts = content if isinstance(content, list) else ()
    return isinstance(content, Mapping) or not all(
        isinstance(part.get("text"), str) or part == IMAGE_PART for part in parts
    )


def _check_object(rendered: _RenderedMessage) -> None:
    """Reject a tool result if the template prints it as a Python literal, or omits a part of it.

    Raises:
        BadRow: `content_stringified` or `message_dropped`.
    """
    plain, field = untrack(rendered.message["content"]), f"{rendered.field}.content"
    hint = "convert the result to JSON text, which every template prints"
    literal, json_texts = str(plain), {json.dumps(plain, ensure_ascii=ascii_only) for ascii_only in (False, True)}
    if literal in rendered.text and literal not in json_texts:
        problem = "the template prints the tool result as a Python literal instead of JSON"
        raise BadRow("content_stringified", problem, field=field, hint=hint)
    # Keys and numbers have no owner, so the text around the message is searched for them.
    has_keys_and_numbers = _any_printed((*_keys(plain), *_numbers(plain)), rendered.segment)
    if not _all_printed(_strings(plain), rendered.printed[Part.CONTENT]) or not has_keys_and_numbers:
        raise BadRow("message_dropped", "the template omits a part of the tool result", field=field, hint=hint)


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
        call_texts = (text for other_call in other_calls for text in _call_texts(other_call))
        other_text = "\n".join([*_expected_texts(message, Part.CONTENT), *call_texts])
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
    escaped = (json.dumps(expected, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    return text.count(expected) or max(map(text.count, escaped))


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
    return (leaf for _, leaf in _leaves(value))


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path and the value of each string, number, boolean and null in a JSON value."""
    pairs = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else None
    )
    if pairs is None:
        yield path, value
    for key, inner in pairs or ():
        yield from _leaves(inner, (*path, key))


def _keys(value: Any) -> Iterator[str]:
    """Yield the keys of all objects in a JSON value."""
    yield from value if isinstance(value, Mapping) else ()
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _keys(inner)


def _find_ranges(
    text: str, message: Mapping[str, Any], index: int, key: str, rerender: Rerender
) -> Iterator[tuple[int, int]]:
    leaves = ((path, leaf) for path, leaf in _leaves(message[key], (key,)) if isinstance(leaf, str) and leaf)
    # The ids and types of tool calls are not attributed.
    paths = (path for path, _ in leaves if path[-1] not in ("id", "type"))
    for path in islice(paths, _MAX_LEAVES):
        before, after = (rerender(index, _change_leaf(message, path, change)) for change in (_add_prefix, _add_suffix))
        if before is None or after is None or text in (before, after):
            continue
        start = common_prefix_length(text, before)
        end = len(text) - common_prefix_length(text[::-1], after[::-1])
        if start < end:
            yield start, end


def _count_matches(pattern: re.Pattern[str], value: Any) -> Counter[Any]:
    return Counter(match for text in _strings(value) for match in pattern.findall(text))


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
