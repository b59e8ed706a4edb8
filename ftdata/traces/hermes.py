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
    Context,
    Step,
    check_unknown,
    convert_structure_errors,
    make_call,
    make_content,
    make_result,
    number_names,
    read_call,
    to_text,
)
from ftdata.traces.tools import read_tool

_REASONING = re.compile(r"<think>\n?(.*?)\n?</think>\n?", re.DOTALL)
_CALL, _RESULT = "tool_call", "tool_response"
_TOOLS_TAG = "<tools>\n"


def is_hermes_record(record: Mapping[str, Any]) -> bool:
    """Return whether an object is the first record of a gateway log."""
    return record.get("role") == "session_meta"


_EXPORT, _FILE = {"id", "source", "started_at"}, {"session_id", "session_start"}
_TYPICAL_COLUMNS = {"message_count", "model_config", "system_prompt", "tool_call_count"}
"""Columns that every export or session file has, and columns of which it has at least one."""

_IDENTITY = ("role", "content", "timestamp", "tool_call_id", "tool_calls")
"""Keys of messages by which a copy is recognized."""


def is_hermes_document(data: Mapping[str, Any]) -> bool:
    """Return whether an object is an export of a session, a session file or a trajectory."""
    if isinstance(data.get("messages"), list):
        return (data.keys() >= _EXPORT or data.keys() >= _FILE) and not _TYPICAL_COLUMNS.isdisjoint(data)
    turns = data.get("conversations")
    is_trajectory = isinstance(data.get("completed"), bool) and ("prompt_index" in data or "timestamp" in data)
    if not is_trajectory or not isinstance(turns, list) or not turns:
        return False
    return all(isinstance(turn, Mapping) and turn.keys() == {"from", "value"} for turn in turns)


def read_hermes_session(records: Sequence[Mapping[str, Any]], ignored: frozenset[str] = frozenset()) -> Session:
    """Convert the records of a gateway log: the first record describes the session, each other record is a message.

    Raises:
        BadRecord: `unknown_record_type` or `trace_structure`.
    """
    reader, categories = _MessageReader(ignored), {0: "metadata"}
    steps = list[Step]()
    for number, record in enumerate(records[1:], 1):
        with convert_structure_errors(number):
            parts = reader.read(record, number)
        steps += parts
        if not parts:
            categories[number] = reader.category
    header = records[0]
    metadata = {"session": str(header.get("session_id", "")), "models": _models(header)}
    context = Context("main", steps, _tools_of(header))
    return Session("hermes", len(records), [context], categories, metadata, reader.anomalies)


def read_hermes_document(data: Mapping[str, Any], ignored: frozenset[str] = frozenset()) -> Iterator[Session]:
    """Yield the session of an export, a session file or a trajectory. Messages of the roles in `ignored` are left out.

    Raises:
        BadRow: `unknown_record_type` or `trace_structure`.
    """
    if "conversations" in data:
        yield _read_trajectory(data)
        return
    reader, categories = _MessageReader(ignored), dict[int, str]()
    contexts, size, seen = list[Context](), 0, set[str]()
    tools = _tools_of(data)
    # An export of a lineage repeats the messages of its segments, which begin with messages of the segment before.
    segments = data.get("segments") if isinstance(data.get("segments"), list) else None
    for index, segment in enumerate(segments or [data]):
        steps, copied = list[Step](), frozenset(seen)
        for message in segment["messages"]:
            parts = reader.read(message, size)
            key = json.dumps([message.get(name) for name in _IDENTITY], sort_keys=True, default=str)
            if key in copied:
                parts = [step._replace(trained=False) for step in parts]
            seen.add(key)
            steps += parts
            if not parts:
                categories[size] = reader.category
            size += 1
        system = segment.get("system_prompt") or data.get("system_prompt")
        has_system = any(step.kind == "message" and step.value["role"] == "system" for step in steps[:1])
        if isinstance(system, str) and system and steps and not has_system:
            steps.insert(0, Step("message", {"role": "system", "content": system}, steps[0].record))
        contexts.append(Context(number_names("main", len(segments or [data]))[index], steps, tools))
    metadata = {"session": str(data.get("id") or data.get("session_id") or ""), "models": _models(data)}
    yield Session("hermes", size, contexts, categories, metadata, reader.anomalies)


def _tools_of(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [read_tool(tool) for tool in data.get("tools") or () if isinstance(tool, Mapping)]


def _models(data: Mapping[str, Any]) -> list[str]:
    return [data["model"]] if isinstance(data.get("model"), str) else []


class _MessageReader:
    """Converts messages. `category` is the category of the last message without steps."""

    def __init__(self, ignored: frozenset[str]) -> None:
        self.ignored, self.category = ignored, "metadata"
        self.call_ids = set[str]()
        self.anomalies = Counter[str]()

    def read(self, message: Mapping[str, Any], number: int) -> list[Step]:
        role = message.get("role")
        if message.get("active") == 0:
            # A compaction archived the message, or the user undid it.
            self.category = "retracted"
            return []
        if message.get("_compressed_summary"):
            self.anomalies["approximate_context"] += 1
        content = _content_of(message)
        if role == "assistant":
            steps = self._read_response(message, content, number)
            self.call_ids |= {str(step.value["id"]) for step in steps if step.kind == "call"}
            return steps
        if role == "tool":
            name, call_id = message.get("tool_name") or message.get("name"), str(message.get("tool_call_id") or "")
            if call_id not in self.call_ids:
                # Ids of OpenAI's Responses API have two parts, and newer versions log only the first one.
                first = call_id.partition("|")[0]
                call_id = next((id_ for id_ in self.call_ids if id_.partition("|")[0] == first), call_id)
            return [Step("result", make_result(call_id, content, name=name), number)]
        if role in ("user", "system", "developer"):
            return [Step("message", {"role": role, "content": content}, number)]
        is_header = role == "session_meta"
        self.category = "metadata" if is_header else check_unknown(number, "role", str(role), "Hermes", self.ignored)
        return []

    def _read_response(self, message: Mapping[str, Any], content: Any, number: int) -> list[Step]:
        parts = list[tuple[str, Any]]()
        details = _texts_of(message.get("reasoning_details"))
        if reasoning := message.get("reasoning_content") or message.get("reasoning") or "\n".join(details):
            parts.append(("reasoning", reasoning))
        texts = [content] if isinstance(content, str) else content
        parts += [("text", text) for text in texts if text]
        if not any(texts) and not message.get("tool_calls"):
            # The final answer can be only in the items of the Responses API.
            parts += [("text", text) for text in _texts_of(message.get("codex_message_items")) if text]
        calls = message.get("tool_calls") or ()
        for position, call in enumerate(json.loads(calls) if isinstance(calls, str) else calls):
            parts.append(("call", read_call(call, f"call_{number}_{position}")))
        self.category = "metadata"
        is_truncated = message.get("finish_reason") == "length"
        self.anomalies["truncated_responses"] += is_truncated
        trained = not is_truncated and not message.get("_compressed_summary")
        return [Step(kind, value, number, number, trained) for kind, value in parts]


def _texts_of(items: Any) -> list[str]:
    """Return the texts in a list of items, or in its JSON text."""
    items = json.loads(items) if isinstance(items, str) and items.strip() else items
    texts = list[str]()
    for item in items if isinstance(items, list) else ():
        content = item.get("content") if isinstance(item, Mapping) else None
        parts = content if isinstance(content, list) else [item]
        texts += [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return texts


def _content_of(message: Mapping[str, Any]) -> Any:
    """Return the content that the model saw, which can differ from the content that the user saw."""
    content = message.get("content")
    api_content = message.get("api_content")
    if isinstance(api_content, str) and content:
        return api_content
    if not isinstance(content, list):
        return "" if content is None else to_text(content)
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
            raise BadRow("trace_structure", "the value is not a text", field=field)
        if speaker == "system":
            tools = _read_tools(value)
            if tools:
                # The program writes this text when it saves the trajectory. The model saw another system prompt.
                categories[number] = "metadata"
                anomalies["approximate_context"] += 1
            else:
                steps.append(Step("message", {"role": "system", "content": value}, number))
        elif speaker == "human":
            anomalies["approximate_context"] += value.startswith("[CONTEXT SUMMARY]:")
            steps.append(Step("message", {"role": "user", "content": value}, number))
        elif speaker == "gpt":
            parts, calls = _read_answer(value, number)
            steps += parts
            if not parts:
                categories[number] = "metadata"
        elif speaker == "tool":
            steps += _read_results(value, number, calls)
        else:
            check_unknown(number, "role", str(speaker), "Hermes", ())
    metadata = {"session": str(data.get("prompt_index", "")), "models": _models(data)}
    context = Context("main", steps, tools)
    return Session("hermes", len(data["conversations"]), [context], categories, metadata, anomalies)


def _read_tools(value: str) -> list[dict[str, Any]]:
    """Read the tool definitions in the system prompt of a trajectory."""
    start = value.find(_TOOLS_TAG + "[")
    if start < 0:
        return []
    tools, _ = json.JSONDecoder().raw_decode(value, start + len(_TOOLS_TAG))
    return [read_tool({"type": "function", **tool}) for tool in tools if isinstance(tool, Mapping)]


def _read_answer(value: str, number: int) -> tuple[list[Step], list[dict[str, Any]]]:
    steps = list[Step]()
    reasoning = _REASONING.match(value)
    if reasoning and reasoning[1]:
        steps.append(Step("reasoning", reasoning[1], number, number))
    text, calls = _split_tags(value[reasoning.end() if reasoning else 0 :], _CALL)
    if text:
        steps.append(Step("text", text, number, number))
    standard_calls = [
        make_call(call["name"], call.get("arguments") or {}, f"call_{number}_{index}")
        for index, call in enumerate(calls)
    ]
    return steps + [Step("call", call, number, number) for call in standard_calls], standard_calls


def _read_results(value: str, number: int, calls: Sequence[dict[str, Any]]) -> list[Step]:
    """Convert the results of the calls of a response, which belong to the calls in the same order."""
    text, results = _split_tags(value, _RESULT)
    if text.strip() or len(results) > len(calls):
        problem = f"the turn contains {len(results)} results for {len(calls)} tool calls"
        field = f"conversations[{number}].value"
        raise BadRow("trace_structure", problem, field=field)
    steps, open_calls = list[Step](), list(calls)
    for result in results:
        name = result.get("name")
        matches = [call for call in open_calls if name in (None, "unknown", call["function"]["name"])]
        if not matches:
            problem = f"the turn contains a result of {name!r}, which the response before it does not call"
            field = f"conversations[{number}].value"
            raise BadRow("trace_structure", problem, field=field)
        open_calls.remove(matches[0])
        content = result.get("content")
        text = to_text(content)
        result_message = make_result(matches[0]["id"], text, name=matches[0]["function"]["name"])
        steps.append(Step("result", result_message, number))
    return steps


def _split_tags(value: str, tag: str) -> tuple[str, list[dict[str, Any]]]:
    """Separate the JSON objects in tags at the end of a text from the text before them."""
    opening = f"<{tag}>\n"
    start = value.find(opening)
    while start >= 0:
        # The text itself can contain the opening tag.
        if (objects := _parse_tags(value, tag, start)) is not None:
            return value[:start].removesuffix("\n"), objects
        start = value.find(opening, start + 1)
    return value, []


def _parse_tags(value: str, tag: str, start: int) -> list[dict[str, Any]] | None:
    """Return the objects from a position to the end; `None` if the text contains something else."""
    opening, closing = f"<{tag}>\n", f"\n</{tag}>"
    objects, position = list[dict[str, Any]](), start
    while value.startswith(opening, position):
        try:
            parsed, end = json.JSONDecoder().raw_decode(value, position + len(opening))
        except ValueError:
            return None
        if not isinstance(parsed, dict) or not value.startswith(closing, end):
            return None
        objects.append(parsed)
        position = end + len(closing)
        position += value.startswith("\n", position)
    return None if value[position:].strip() else objects
