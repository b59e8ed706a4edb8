"""Account: which of the row's text is in the rendering, where attribution lost it, and what the template left out."""

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
"""(index of a message, that message changed) -> the whole conversation rendered, `None` where the template refuses."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_KNOWN = {"role", "content", "tool_calls", "tool_call_id", "name", "id", "type", *_REASONING}
_KEYS = {Part.CONTENT: ("content",), Part.TOOL_CALL: ("tool_calls",), Part.REASONING: _REASONING}
_MOST_LEAVES = 64


def recover_attribution(
    text: str, parts: Sequence[TextPiece], messages: Sequence[Mapping[str, Any]], rerender: Rerender
) -> tuple[TextPiece, ...]:
    """Return the pieces with those added whose memory the template wiped out, found by changing the data.

    A text that was turned into a Python literal, or formatted, is a plain string to us. What moves in the rendering
    when the first and the last letter of a field change is that field. An empty answer gets a piece of no length,
    where its text would stand.
    """
    found, arrived = list(parts), _texts(text, parts)
    for index, message in enumerate(messages):
        if _stands(message, arrived[index, Part.CONTENT]):
            continue
        if _answers_nothing(message):
            at = _place(text, message, index, rerender)
            found = found if at is None else _insert(found, TextPiece(at, at, Part.CONTENT, index, 0))
            continue
        for part, keys in _KEYS.items():
            given = _given(message, part)
            if isinstance(message.get("content"), list | Mapping) or _all_printed(given, arrived[index, part]):
                continue
            # Reasoning is left out by design of many templates: only what is there is looked for.
            if part is Part.REASONING and not _all_printed(given, text):
                continue
            for key in filter(message.get, keys):
                for start, end in _extents(text, message, index, key, rerender):
                    found = [
                        new
                        for old in found
                        for new in override_part(old, start, end, Part.SCAFFOLD, part=part, message=index)
                    ]
    return tuple(found)


def check_coverage(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    text: str,
    parts: Sequence[TextPiece],
    rerender: Rerender,
    on_dropped_message: str = "reject",
) -> frozenset[str]:
    """Check that every message's text arrived in the rendering; return flags for what arrived in part.

    Args:
        messages: the conversation.
        tools: the tools it may use.
        text: the rendering.
        parts: whose text it is.
        rerender: renders it with a message changed.
        on_dropped_message: `"reject"`, or `"flag"` rows of which a message that is not the assistant's is missing.

    Raises:
        BadRow: `message_dropped`: a content or a tool call is nowhere in the text; `content_stringified`: a list of
            parts is printed as a literal.
    """
    flags: set[str] = set()
    arrived, stretches = _texts(text, parts), _stretches(text, parts)
    for index, message in enumerate(messages):
        content, calls = arrived[index, Part.CONTENT], arrived[index, Part.TOOL_CALL]
        if _stands(message, content):
            continue
        stretch = stretches.get(index, "")
        given = _given(message, Part.CONTENT)
        if _is_object(message.get("content")):
            _check_object(message["content"], text, content, stretch, f"messages[{index}].content")
            continue
        printed = _any_printed(filter(None, given), text) if not content else len(content) > sum(map(len, given))
        if isinstance(message.get("content"), list) and any(map(str.strip, given)) and printed:
            raise BadRow(
                "content_stringified",
                "the template prints the list of parts itself, not the text in it",
                field=f"messages[{index}].content",
                hint="give the content as text",
            )
        lost_call = bool(message.get("tool_calls")) and not (
            _calls_printed(message, calls, stretch) and _each_printed(message, stretch, partial(rerender, index))
        )
        if (any(map(str.strip, given)) and not content) or lost_call:
            if on_dropped_message == "flag" and message["role"] != "assistant":
                flags.add("message_dropped")
                continue
            raise BadRow(
                "message_dropped",
                f"the template does not print this {message['role']} message's text as given",
                field=f"messages[{index}].{'tool_calls' if lost_call else 'content'}",
                hint="use a template that has room for it, or take it out of the data",
            )
        whole = _all_printed(given, content) or _thinking_moved(given, stretch)
        if not whole or not _all_printed(_given(message, Part.TOOL_CALL), calls):
            flags.add("message_truncated")
        flags |= _reasoning_flags(message, arrived[index, Part.REASONING])
        if not _fields_printed(message, arrived[index, Part.OTHER] + arrived[index, Part.TOOL_CALL], stretch):
            flags.add("fields_dropped")
    if not _tools_printed(tools, arrived[-1, Part.TOOLS]):
        flags.add("tools_dropped")
    return frozenset(flags)


def _is_object(content: Any) -> bool:
    """Return whether a content is JSON values, as tools return them, and no list of text parts."""
    parts = content if isinstance(content, list) else ()
    return isinstance(content, Mapping) or any(not isinstance(part.get("text"), str) for part in parts)


def _check_object(content: Any, text: str, printed: str, stretch: str, field: str) -> None:
    """Reject the result of a tool that the template does not print as JSON, or in words of its own.

    Args:
        content: the result.
        text: the rendering.
        printed: what of it is known to come from this result.
        stretch: all that is printed for its message: keys and numbers are looked for here.
        field: where it stands.

    Raises:
        BadRow: `content_stringified`: it is printed as Python prints it; `message_dropped`: not all of it is printed.
    """
    plain = _untracked(content)
    hint = "give the result as JSON text, which every template prints"
    literal = str(plain)
    if literal in text and literal not in {json.dumps(plain, ensure_ascii=only) for only in (False, True)}:
        raise BadRow(
            "content_stringified", "the template prints the object as Python would, not as JSON", field=field, hint=hint
        )
    if not _all_printed(_values(plain), printed) or not _any_printed((*_keys(plain), *_numbers(plain)), stretch):
        raise BadRow("message_dropped", "the template does not print all of this object", field=field, hint=hint)


def _untracked(value: Any) -> Any:
    """Return JSON values with plain strings."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_untracked(key): _untracked(item) for key, item in value.items()}
    return [_untracked(item) for item in value] if isinstance(value, list | tuple) else value


def _stands(message: Mapping[str, Any], printed: str) -> bool:
    """Whether all that a message says is one text, and that is printed, but for blanks around it."""
    content = message.get("content")
    if not printed or not isinstance(content, str) or len(message) != 2 or "role" not in message:
        return False
    return str.strip(content) == str.strip(printed)


def _tools_printed(tools: Sequence[Mapping[str, Any]], printed: str) -> bool:
    """Whether every tool's name, and the names of its parameters, are there."""
    for tool in tools:
        function = _function(tool)
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        names = (*_values(function.get("name")), *(properties if isinstance(properties, Mapping) else ()))
        if not printed or not _all_printed(dict.fromkeys(names), printed):
            return False
    return True


def _calls_printed(message: Mapping[str, Any], printed: str, stretch: str) -> bool:
    """Whether every call is there; numbers and keys are looked for in all that is printed for this message."""
    arguments = [_function(call).get("arguments") for call in message["tool_calls"]]
    others = (one for value in arguments for one in (*_keys(value), *_numbers(value)))
    return bool(printed) and _all_printed(_values(arguments), printed) and _any_printed(others, stretch)


def _each_printed(message: Mapping[str, Any], printed: str, rerender: Callable[[dict[str, Any]], str | None]) -> bool:
    """Whether each of several calls is there. Where one says nothing that others do not, it is changed to tell."""
    calls = message["tool_calls"]
    for number, call in enumerate(calls if len(calls) > 1 else ()):
        others = [*calls[:number], *calls[number + 1 :]]
        said = "\n".join([*_given(message, Part.CONTENT), *(text for other in others for text in _said(other))])
        if any(text not in said and _times(text, printed) for text in _said(call)):
            continue
        marked = _marked(call)
        found = rerender({**message, "tool_calls": [*calls[:number], marked, *calls[number + 1 :]]})
        if found is not None and not _calls_printed({"tool_calls": [marked]}, found, found):
            return False
    return True


def _said(call: Mapping[str, Any]) -> list[str]:
    """Return the name, the texts and the numbers of a call."""
    given = [_function(call).get(key) for key in ("name", "arguments")]
    return [text.strip() for text in (*_values(given), *_numbers(given)) if text.strip()]


def _marked(value: Any, place: int = 7001) -> Any:
    """Return a call with all texts and numbers in it changed into such as stand nowhere else."""
    if isinstance(value, Mapping):
        return {
            key: inner if key in ("id", "type") and "function" in value else _marked(inner, 31 * place + at)
            for at, (key, inner) in enumerate(value.items())
        }
    if isinstance(value, list | tuple):
        return [_marked(inner, 31 * place + at) for at, inner in enumerate(value)]
    if isinstance(value, bool) or value is None:
        return value
    return f"q{place}z{str.__str__(value)}" if isinstance(value, str) else place


def _thinking_moved(given: Sequence[str], stretch: str) -> bool:
    """Whether a content that holds thinking is all there, with other blanks around the thinking."""
    whole = "".join(given)
    return bool(find_thinking_tags(whole)) and "".join(whole.split()) in "".join(stretch.split())


def _reasoning_flags(message: Mapping[str, Any], printed: str) -> set[str]:
    thoughts = _given(message, Part.REASONING)
    if not any(thoughts) or _all_printed(thoughts, printed):
        return set()
    return {"message_truncated" if printed else "reasoning_dropped"}


def _fields_printed(message: Mapping[str, Any], printed: str, stretch: str) -> bool:
    known = _KNOWN if message["role"] == "tool" else _KNOWN - {"name"}
    unknown = [value for key, value in message.items() if key not in known]
    texts, numbers = ([one for value in unknown for one in read(value)] for read in (_values, _numbers))
    return _all_printed(dict.fromkeys(texts), printed) and _any_printed(numbers, stretch)


def _texts(text: str, parts: Sequence[TextPiece]) -> defaultdict[tuple[int, Part], str]:
    """Return the text of each part of each message in a rendering."""
    found: defaultdict[tuple[int, Part], str] = defaultdict(str)
    for piece in parts:
        if piece.part is not Part.SCAFFOLD:
            found[piece.message, piece.part] += text[piece.start : piece.end]
    return found


def _stretches(text: str, parts: Sequence[TextPiece]) -> dict[int, str]:
    """Return all that is printed for each message: from what is printed for another before it to the next after it."""
    owned = [piece for piece in parts if piece.part is not Part.SCAFFOLD]
    found: dict[int, tuple[int, int]] = {}
    for position, piece in enumerate(owned):
        first, _ = found.get(piece.message, (position, 0))
        found[piece.message] = first, position
    edges = [0, *(piece.end for piece in owned)], [*(piece.start for piece in owned), len(text)]
    return {message: text[edges[0][first] : edges[1][last + 1]] for message, (first, last) in found.items()}


def _all_printed(given: Iterable[str], text: str) -> bool:
    """Whether all texts are there, as many times as they are given; blanks around them may have been trimmed."""
    wanted = Counter(filter(None, (one.strip() for one in given)))
    return sum(len(one) * times for one, times in wanted.items()) <= len(text) and all(
        _times(one, text) >= times for one, times in wanted.items()
    )


def _any_printed(given: Iterable[str], text: str) -> bool:
    """Whether each of these texts is somewhere."""
    return all(_times(one, text) for one in given)


def _times(wanted: str, text: str) -> int:
    """Return how often a text is there, as it is or as JSON has it."""
    return text.count(wanted) or max(text.count(json.dumps(wanted, ensure_ascii=only)[1:-1]) for only in (False, True))


def _given(message: Mapping[str, Any], part: Part) -> list[str]:
    """Return the texts of a message that a rendering of it has to hold.

    They are its content, its reasoning, or the names and values of its calls.
    """
    if part is Part.TOOL_CALL:
        functions = map(_function, message.get("tool_calls") or ())
        return [text for one in functions for text in _values([one.get("name"), one.get("arguments")])]
    if part is Part.REASONING:
        return list(dict.fromkeys(text for key in _REASONING for text in _values(message.get(key))))
    content = message.get("content")
    if _is_object(content):
        return list(_values(content))
    if isinstance(content, list):
        return [part.get("text", "") for part in content]
    return [content] if content else []


def _answers_nothing(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    blank = not content.strip() if isinstance(content, str) else not content
    return blank and message["role"] == "assistant" and not message.get("tool_calls")


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    found = call.get("function", call)
    return found if isinstance(found, Mapping) else {}


def _values(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value but keys."""
    return (str.__str__(one) for one in _scalars(value) if isinstance(one, str))


def _numbers(value: Any) -> Iterator[str]:
    """Yield all numbers in a JSON value as they are written; how truth is written is up to the template."""
    return (json.dumps(one) for one in _scalars(value) if isinstance(one, int | float) and not isinstance(one, bool))


def _scalars(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    if inner is None:
        yield value
    for one in inner or ():
        yield from _scalars(one)


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
        start = common_prefix_length(text, before)
        end = len(text) - common_prefix_length(text[::-1], after[::-1])
        if start < end:
            yield start, end


def _place(text: str, message: Mapping[str, Any], index: int, rerender: Rerender) -> int | None:
    """Return where in the rendering an empty answer stands."""
    filled = rerender(index, {**message, "content": "x"})
    if filled is None:
        return None
    at = common_prefix_length(text, filled)
    # What follows may be another text: some templates print no stop after an answer that is empty.
    return at if filled.startswith(f"{text[:at]}x") else None


def _insert(parts: Sequence[TextPiece], empty: TextPiece) -> list[TextPiece]:
    found: list[TextPiece] = []
    for piece in parts:
        inside = piece.start < empty.start < piece.end
        found += [piece._replace(end=empty.start), piece._replace(start=empty.start)] if inside else [piece]
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
