"""The parts of a conversation in a trace, and their conversion to messages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from ftdata.errors import BadRow
from ftdata.types import Message

SKIP_SESSION = "remove the session, or skip it with on_bad_rows='quarantine'"
"""The fix for a session that cannot be converted."""


class BadRecord(BadRow):
    """A record of a session that cannot be converted.

    Attributes:
        record: index of the record in the session.
    """

    def __init__(self, record: int, code: str, message: str, *, field: str = "", hint: str = SKIP_SESSION) -> None:
        super().__init__(code, message, field=field, hint=hint)
        self.record = record


_STRUCTURE_ERRORS = (AttributeError, LookupError, TypeError, ValueError, RecursionError)
"""Exceptions that a value of an unexpected type causes. Other programs write the logs, so any value can occur."""


@contextmanager
def convert_structure_errors(number: int) -> Iterator[None]:
    """Convert the errors that a record with an unexpected structure causes to `BadRecord`."""
    try:
        yield
    except BadRow:
        raise
    except _STRUCTURE_ERRORS as error:
        problem = f"the record has an unexpected structure: {type(error).__name__}: {error}"
        raise BadRecord(number, "trace_structure", problem) from error


def get_mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object under a key; an empty object if there is none, or another value."""
    value = data.get(key)
    return value if isinstance(value, Mapping) else {}


def check_unknown(number: int, kind: str, name: str, program: str, ignored: Container[str]) -> str:
    """Return the category `ignored` if the user ignores an unknown type, role or key.

    Args:
        number: index of the record.
        kind: `"record type"`, `"content type"`, `"role"` or `"key"`.
        name: the name of the type, role or key.
        program: the program or format that wrote the log, with its version.
        ignored: the names that the user ignores.

    Raises:
        BadRecord: `unknown_record_type`, if the user does not ignore the name.
    """
    if name in ignored:
        return "ignored"
    problem = f"the {kind} {name!r} of {program} is unknown, so its content could be lost"
    hint = f"if it contains no messages, pass ignore_records={name!r} with the data; otherwise update ftdata"
    field = name if kind == "key" else kind.rpartition(" ")[2]
    raise BadRecord(number, "unknown_record_type", problem, field=field, hint=hint)


def to_text(value: Any) -> str:
    """Return a text unchanged, and any other value as JSON text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def number_names(name: str, count: int) -> list[str]:
    """Return a name for each of several contexts.

    >>> number_names("main", 1), number_names("main", 2)
    (['main'], ['main/1', 'main/2'])
    """
    return [name] if count == 1 else [f"{name}/{index + 1}" for index in range(count)]


class Step(NamedTuple):
    """A part of a conversation.

    Attributes:
        kind: `"message"` (of another role than the model's), `"result"` (of a tool call), or a part of a response of
            the model: `"reasoning"`, `"text"` or `"call"`.
        value: a message, a text, a content part, or a tool call.
        record: index of the record in the session.
        response: identifies the response. Only parts of equal responses are joined to one message.
        trained: whether a part of a response may be trained: the model generated it in this session, and it is not
            truncated, retracted or a summary for a compaction. Has no effect on messages and results.
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
    messages, names = list[Message](), dict[str, str]()
    for item in _group_responses(steps):
        if isinstance(item, _Response):
            names |= {call.get("id", ""): call["function"]["name"] for call in item.parts["call"]}
            messages.append(item.make_message())
            continue
        message = item.value
        if item.kind == "result" and "name" not in message and message["tool_call_id"] in names:
            message = {**message, "name": names[message["tool_call_id"]]}
        messages.append(message)
    return messages


def _group_responses(steps: Iterable[Step]) -> Iterator[_Response | Step]:
    """Yield the messages and results of a conversation, and the parts of responses that form a message."""
    response: _Response | None = None
    for step in steps:
        if response is not None and (step.kind not in _ORDER or not response.accepts(step)):
            yield response
            response = None
        if step.kind not in _ORDER:
            yield step
            continue
        response = response or _Response(step)
        response.parts[step.kind].append(step.value)
    if response is not None:
        yield response


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


def read_call(call: Any, default_id: str) -> dict[str, Any]:
    """Convert a tool call, or its JSON text, to the format of messages: with or without the object `function`.

    Raises:
        BadRow: `trace_structure`, if the call has no name.
    """
    call = json.loads(call) if isinstance(call, str) else call
    function = call.get("function") or call
    if not isinstance(function.get("name"), str):
        raise BadRow("trace_structure", f"a tool call has the name {function.get('name')!r}", hint=SKIP_SESSION)
    arguments = function.get("arguments")
    return make_call(function["name"], {} if arguments is None else arguments, str(call.get("id") or default_id))


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
                counts["results_after_other_message"] += call_id in interrupted
            else:
                counts["results_without_call"] += 1
        elif step.kind == "message":
            interrupted.update(call_id for call_id, number in open_calls.items() if number)
    counts["calls_without_result"] = sum(open_calls.values())
    return +counts


def count_split_responses(steps: Iterable[Step]) -> int:
    """Count how often a response continues in another message, because its parts are not in the order of templates."""
    keys = [item.key for item in _group_responses(steps) if isinstance(item, _Response)]
    return sum(first is not None and first == second for first, second in pairwise(keys))
