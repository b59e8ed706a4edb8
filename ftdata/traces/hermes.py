"""Convert sessions of Hermes Agent: exports of the sessions, session files, gateway logs and trajectories.

Exports and session files contain messages in the format of chat completions. Trajectories contain tool calls and
results as tags in texts; they are converted back to calls and results.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftdata.errors import BadRow
from ftdata.traces.rows import Session
from ftdata.traces.steps import (
    BadRecord,
    Context,
    Step,
    make_call,
    make_content,
    make_result,
    reading_record,
    unknown_record,
)

_REASONING = re.compile(r"<think>\n?(.*?)\n?</think>\n?", re.DOTALL)
_CALL, _RESULT = "tool_call", "tool_response"
_TOOLS = "<tools>\n"


def is_hermes_record(record: Mapping[str, Any]) -> bool:
    """Return whether an object is the first record of a gateway log."""
    return record.get("role") == "session_meta"


def is_hermes_document(data: Mapping[str, Any]) -> bool:
    """Return whether an object is an export of a session, a session file or a trajectory."""
    if isinstance(data.get("messages"), list):
        is_file = "session_id" in data and "session_start" in data
        return is_file or ("started_at" in data and "source" in data)
    return isinstance(data.get("conversations"), list) and isinstance(data.get("completed"), bool)


def read_hermes_session(records: Sequence[Mapping[str, Any]], ignored: frozenset[str] = frozenset()) -> Session:
    """Convert the records of a gateway log: the first record describes the session, each other record is a message.

    Raises:
        BadRecord: `unknown_event` or `trace_step`.
    """
    reader, categories = _MessageReader(ignored), {0: "metadata"}
    steps = list[Step]()
    for number, record in enumerate(records[1:], 1):
        with reading_record(number):
            parts = reader.read(record, number)
        steps += parts
        if not parts:
            categories[number] = reader.category
    header = records[0]
    metadata = {"session": str(header.get("session_id", "")), "models": _models(header)}
    context = Context("main", steps, [tool for tool in header.get("tools") or () if isinstance(tool, dict)])
    return Session("hermes", len(records), [context], categories, metadata, reader.anomalies)


def read_hermes_document(data: Mapping[str, Any], ignored: frozenset[str] = frozenset()) -> Iterator[Session]:
    """Yield the session of an export, a session file or a trajectory. Messages of the roles in `ignored` are left out.

    Raises:
        BadRow: `unknown_event` or `trace_step`.
    """
    if "conversations" in data:
        yield _read_trajectory(data)
        return
    reader, categories, steps = _MessageReader(ignored), dict[int, str](), list[Step]()
    for number, message in enumerate(data["messages"]):
        parts = reader.read(message, number)
        steps += parts
        if not parts:
            categories[number] = reader.category
    system = data.get("system_prompt")
    has_system = any(step.kind == "message" and step.value["role"] == "system" for step in steps[:1])
    if isinstance(system, str) and system and not has_system:
        steps.insert(0, Step("message", {"role": "system", "content": system}, 0))
    metadata = {"session": str(data.get("id") or data.get("session_id") or ""), "models": _models(data)}
    tools = [tool for tool in data.get("tools") or () if isinstance(tool, dict)]
    yield Session(
        "hermes", len(data["messages"]), [Context("main", steps, tools)], categories, metadata, reader.anomalies
    )


def _models(data: Mapping[str, Any]) -> list[str]:
    return [data["model"]] if isinstance(data.get("model"), str) else []


class _MessageReader:
    """Converts messages. `category` is the category of the last message without steps."""

    def __init__(self, ignored: frozenset[str]) -> None:
        self.ignored, self.category = ignored, "metadata"
        self.anomalies = Counter[str]()

    def read(self, message: Mapping[str, Any], number: int) -> list[Step]:
        role = message.get("role")
        if message.get("active") == 0:
            # A compaction archived the message, or the user undid it.
            self.category = "retracted"
            return []
        if message.get("_compressed_summary"):
            self.anomalies["rebuilt_context"] += 1
        content = _content_of(message)
        if role == "assistant":
            return self._read_response(message, content, number)
        if role == "tool":
            name, call_id = message.get("tool_name") or message.get("name"), str(message.get("tool_call_id") or "")
            return [Step("result", make_result(call_id, content, name=name), number)]
        if role in ("user", "system", "developer"):
            return [Step("message", {"role": role, "content": content}, number)]
        if role == "session_meta" or f"message/{role}" in self.ignored:
            self.category = "metadata" if role == "session_meta" else "ignored"
            return []
        raise unknown_record(number, f"message/{role}", "Hermes")

    def _read_response(self, message: Mapping[str, Any], content: Any, number: int) -> list[Step]:
        parts = list[tuple[str, Any]]()
        if reasoning := message.get("reasoning_content") or message.get("reasoning"):
            parts.append(("reasoning", reasoning))
        parts += [("text", text) for text in ([content] if isinstance(content, str) else content) if text]
        calls = message.get("tool_calls") or ()
        for position, call in enumerate(json.loads(calls) if isinstance(calls, str) else calls):
            function = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                field = f"messages[{number}].tool_calls[{position}]"
                raise BadRecord(number, "trace_step", "the tool call has no function name", field=field)
            arguments = function.get("arguments") or "{}"
            parts.append(("call", make_call(function["name"], arguments, str(call.get("id") or ""))))
        self.category = "metadata"
        return [Step(kind, value, number, number) for kind, value in parts]


def _content_of(message: Mapping[str, Any]) -> Any:
    """Return the content that the model saw, which can differ from the content that the user saw."""
    content = message.get("content")
    api_content = message.get("api_content")
    if isinstance(api_content, str) and content:
        return api_content
    if not isinstance(content, list):
        return content or ""
    return make_content(
        [part["text"] if part.get("type") == "text" and "text" in part else dict(part) for part in content]
    )


def _read_trajectory(data: Mapping[str, Any]) -> Session:
    steps, tools, categories = list[Step](), list[dict[str, Any]](), dict[int, str]()
    anomalies = Counter[str]()
    calls = list[dict[str, Any]]()
    for number, turn in enumerate(data["conversations"]):
        value, speaker = turn.get("value"), turn.get("from")
        if not isinstance(value, str):
            field = f"conversations[{number}].value"
            raise BadRow("trace_step", "the value is not a text", field=field, hint="leave the row out")
        if speaker == "system":
            tools = _read_tools(value)
            steps.append(Step("message", {"role": "system", "content": value}, number))
        elif speaker == "human":
            anomalies["rebuilt_context"] += value.startswith("[CONTEXT SUMMARY]:")
            steps.append(Step("message", {"role": "user", "content": value}, number))
        elif speaker == "gpt":
            parts, calls = _read_answer(value, number)
            steps += parts
            if not parts:
                categories[number] = "metadata"
        elif speaker == "tool":
            steps += _read_results(value, number, calls)
        else:
            raise unknown_record(number, f"conversations/{speaker}", "Hermes")
    metadata = {"session": str(data.get("prompt_index", "")), "models": _models(data)}
    context = Context("main", steps, tools)
    return Session("hermes", len(data["conversations"]), [context], categories, metadata, anomalies)


def _read_tools(value: str) -> list[dict[str, Any]]:
    """Read the tool definitions in the system prompt of a trajectory."""
    start = value.find(_TOOLS + "[")
    if start < 0:
        return []
    tools, _ = json.JSONDecoder().raw_decode(value, start + len(_TOOLS))
    keys = ("name", "description", "parameters")
    return [{"type": "function", "function": {key: tool[key] for key in keys if key in tool}} for tool in tools]


def _read_answer(value: str, number: int) -> tuple[list[Step], list[dict[str, Any]]]:
    steps = list[Step]()
    reasoning = _REASONING.match(value)
    if reasoning and reasoning[1]:
        steps.append(Step("reasoning", reasoning[1], number, number))
    text, calls = _split_tags(value[reasoning.end() if reasoning else 0 :], _CALL)
    if text:
        steps.append(Step("text", text, number, number))
    made = [
        make_call(call["name"], call.get("arguments") or {}, f"call_{number}_{index}")
        for index, call in enumerate(calls)
    ]
    return steps + [Step("call", call, number, number) for call in made], made


def _read_results(value: str, number: int, calls: Sequence[dict[str, Any]]) -> list[Step]:
    """Convert the results of the calls of a response, which belong to the calls in the same order."""
    text, results = _split_tags(value, _RESULT)
    if text.strip() or len(results) > len(calls):
        problem = f"the turn contains {len(results)} results for {len(calls)} tool calls"
        field = f"conversations[{number}].value"
        raise BadRow("trace_step", problem, field=field, hint="leave the row out")
    steps = list[Step]()
    for call, result in zip(calls, results, strict=False):
        content = result.get("content")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        steps.append(Step("result", make_result(call["id"], text, name=call["function"]["name"]), number))
    return steps


def _split_tags(value: str, tag: str) -> tuple[str, list[dict[str, Any]]]:
    """Separate the JSON objects in tags at the end of a text from the text before them."""
    opening, closing = f"<{tag}>\n", f"\n</{tag}>"
    start, objects = value.find(opening), list[dict[str, Any]]()
    position = start
    while position >= 0 and value.startswith(opening, position):
        try:
            parsed, end = json.JSONDecoder().raw_decode(value, position + len(opening))
        except ValueError:
            break
        if not isinstance(parsed, dict) or not value.startswith(closing, end):
            break
        objects.append(parsed)
        position = end + len(closing)
        position += value.startswith("\n", position)
    if not objects or value[position:].strip():
        return value, []
    return value[:start].removesuffix("\n"), objects
