"""The parts of a conversation in a trace, and their conversion to messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ftdata.errors import BadRow
from ftdata.types import Message


class BadRecord(BadRow):
    """A record of a session that cannot be converted.

    Attributes:
        record: index of the record in the session.
    """

    def __init__(self, record: int, code: str, message: str, *, field: str = "", hint: str = "") -> None:
        super().__init__(code, message, field=field, hint=hint)
        self.record = record


_STRUCTURE_ERRORS = (AttributeError, LookupError, TypeError, ValueError, RecursionError)
"""Exceptions that a value of an unexpected type causes. Other programs write the logs, so any value can occur."""


@contextmanager
def reading_record(number: int) -> Iterator[None]:
    """Convert the errors that a record with an unexpected structure causes to `BadRecord`."""
    try:
        yield
    except BadRow:
        raise
    except _STRUCTURE_ERRORS as error:
        problem = f"the record has an unexpected structure: {type(error).__name__}: {error}"
        hint = "leave the session out, or correct the record"
        raise BadRecord(number, "trace_structure", problem, hint=hint) from error


def mapping_at(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object under a key; an empty object if there is none, or another value."""
    value = data.get(key)
    return value if isinstance(value, Mapping) else {}


def unknown_record(number: int, name: str, program: str) -> BadRecord:
    """Return the error for a record whose type is unknown."""
    problem = f"the type {name!r} of {program} is unknown, so the record could contain messages"
    hint = f"if it does not, pass ignore_events={name!r} with the data; otherwise update ftdata"
    return BadRecord(number, "unknown_event", problem, field="type", hint=hint)


class Step(NamedTuple):
    """A part of a conversation.

    Attributes:
        kind: `"message"` (of another role than the model's), `"result"` (of a tool call), or a part of a response of
            the model: `"reasoning"`, `"text"` or `"call"`.
        value: a message, a text, a content part, or a tool call.
        record: index of the record in the session.
        response: identifies the response. Only parts of equal responses are joined to one message.
        trained: whether the model generated the part in this session, and it was not retracted.
    """

    kind: str
    value: Any
    record: int
    response: Hashable = None
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Context:
    """The steps that the model saw in one context window, with its own responses.

    Attributes:
        name: name of the context in the session, such as `"main"` or the id of a sub-agent.
        steps: the steps, in the order in which the model saw them.
        tools: tool definitions.
        metadata: values of the session that users can filter by, such as the name of the model.
        abandoned: whether the user went back to an earlier message and continued from there.
    """

    name: str
    steps: Sequence[Step]
    tools: Sequence[dict[str, Any]] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    abandoned: bool = False


_ORDER = {"reasoning": 0, "text": 1, "call": 2}
"""The order in which chat templates print the parts of a response."""


class _Response:
    """The parts of one response that form a message."""

    def __init__(self, step: Step) -> None:
        self.key, self.trained = step.response, step.trained
        self.parts: dict[str, list[Any]] = {kind: [] for kind in _ORDER}

    def accepts(self, step: Step) -> bool:
        """Return whether a template can print the step after the parts of this message."""
        is_later = any(self.parts[kind] for kind, order in _ORDER.items() if order > _ORDER[step.kind])
        return (self.key, self.trained) == (step.response, step.trained) and not is_later

    def make_message(self) -> Message:
        reasoning, texts, calls = self.parts.values()
        message: Message = {"role": "assistant", "content": make_content(texts)}
        if reasoning:
            message["reasoning_content"] = "\n".join(reasoning)
        if calls:
            message["tool_calls"] = calls
        # A response that ends with its reasoning was interrupted.
        if not self.trained or not (texts or calls):
            message["train"] = False
        return message


def assemble_messages(steps: Iterable[Step]) -> list[Message]:
    """Convert steps to messages.

    Reasoning, texts and tool calls of the same response form one message if they are in this order. A part in another
    order begins a new message, so the order of all parts stays as recorded.

    >>> call = {"type": "function", "id": "c", "function": {"name": "ls", "arguments": {}}}
    >>> steps = [Step("text", "I look.", 0, "r"), Step("call", call, 1, "r"), Step("text", "Wait.", 2, "r")]
    >>> [(message["content"], len(message.get("tool_calls", ()))) for message in assemble_messages(steps)]
    [('I look.', 1), ('Wait.', 0)]
    """
    messages, response = list[Message](), None
    names = dict[str, str]()
    for step in steps:
        if step.kind in _ORDER:
            if response is None or not response.accepts(step):
                messages += [response.make_message()] if response else []
                response = _Response(step)
            response.parts[step.kind].append(step.value)
            if step.kind == "call":
                names[step.value.get("id", "")] = step.value["function"]["name"]
            continue
        messages += [response.make_message()] if response else []
        response = None
        message = step.value
        if step.kind == "result" and "name" not in message and message["tool_call_id"] in names:
            message = {**message, "name": names[message["tool_call_id"]]}
        messages.append(message)
    return messages + ([response.make_message()] if response else [])


def make_content(parts: Sequence[Any]) -> str | list[dict[str, Any]]:
    """Return the content of a message: a text, or a list of parts if there are several parts or images."""
    if not parts:
        return ""
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def make_call(name: str, arguments: Any, call_id: str) -> dict[str, Any]:
    """Return a tool call in the format of messages. The arguments are an object or its JSON text."""
    return {"type": "function", "id": call_id, "function": {"name": name, "arguments": arguments}}


def make_result(call_id: str, content: Any, *, name: str | None = None, is_error: bool = False) -> dict[str, Any]:
    """Return the message with the result of a tool call."""
    names = {"name": name} if name else {}
    errors = {"is_error": True} if is_error else {}
    return {"role": "tool", "tool_call_id": call_id, **names, "content": content, **errors}


def count_unpaired(steps: Iterable[Step]) -> Counter[str]:
    """Count the tool calls without a result, and the results that follow another message or no call.

    >>> count_unpaired([Step("result", {"role": "tool", "tool_call_id": "x", "content": ""}, 0)])
    Counter({'results_without_call': 1})
    """
    open_calls, counts, interrupted = Counter[str](), Counter[str](), set[str]()
    for step in steps:
        if step.kind == "call":
            open_calls[step.value.get("id", "")] += 1
        elif step.kind == "result":
            call_id = step.value["tool_call_id"]
            if open_calls[call_id]:
                open_calls[call_id] -= 1
                counts["late_results"] += call_id in interrupted
            else:
                counts["results_without_call"] += 1
        elif step.kind == "message":
            interrupted.update(call_id for call_id, number in open_calls.items() if number)
    counts["calls_without_result"] = sum(open_calls.values())
    return +counts


def count_split_responses(steps: Iterable[Step]) -> int:
    """Count how often a response continues in another message, because its parts are not in the order of templates."""
    count, response = 0, None
    for step in steps:
        if step.kind not in _ORDER:
            continue
        is_continued = response is not None and step.response is not None and response.key == step.response
        if response is None or not response.accepts(step):
            count += is_continued
            response = _Response(step)
        response.parts[step.kind].append(step.value)
    return count
