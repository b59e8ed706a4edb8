"""Write synthetic agent sessions (`trace_sessions`) in the log formats of several programs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import count
from typing import Any

from trace_sessions import Operation, Response, Session


class Writer:
    """Writes the operations of a session as records.

    Attributes:
        records: the records.
        last: id of the last record of the conversation.
        starts: id of the record before each turn, to which a rewind goes back.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.records: list[dict[str, Any]] = []
        self.last: Any = None
        self.starts: list[Any] = []

    def write(self, session: Session) -> list[dict[str, Any]]:
        for operation in session.operations:
            getattr(self, operation.kind)(operation)
        return self.records

    def prompt(self, operation: Operation) -> None:
        self.starts.append(self.last)
        self.message(operation.marker)

    def message(self, marker: str) -> None:
        raise NotImplementedError

    def response(self, operation: Operation) -> None:
        assert operation.response is not None
        self.answer(operation.response)

    def answer(self, response: Response) -> None:
        raise NotImplementedError

    def rewind(self, operation: Operation) -> None:
        self.last = self.starts[operation.depth]
        del self.starts[operation.depth :]

    def compact(self, operation: Operation) -> None:
        self.last, self.starts = None, []
        self.message(operation.marker)

    def failure(self, operation: Operation) -> None:
        """Most formats do not log failed requests."""

    def noise(self, operation: Operation) -> None:
        """Formats without this method have only records with content."""

    def repeat(self, operation: Operation) -> None:
        """Most formats write no record twice."""


class ClaudeCode(Writer):
    """A record per block, with the results of parallel calls between them."""

    def __init__(self, seed: int = 0, common: dict[str, Any] | None = None, prefix: str = "u") -> None:
        super().__init__(seed)
        self.common = common or {"isSidechain": False}
        self.prefix, self.ids, self.message_ids = prefix, count(), count()

    def add(self, kind: str, parent: str | None, **values: Any) -> str:
        uuid = f"{self.prefix}{next(self.ids)}"
        envelope = {"type": kind, "uuid": uuid, "parentUuid": parent, "sessionId": "s1", "version": "2.1.0"}
        self.records.append({**envelope, **self.common, **values})
        return uuid

    def user(self, parent: str | None, content: Any, **values: Any) -> str:
        return self.add("user", parent, message={"role": "user", "content": content}, **values)

    def message(self, marker: str) -> None:
        self.last = self.user(self.last, marker)

    def answer(self, response: Response) -> None:
        message_id, parent = f"{self.prefix}msg{next(self.message_ids)}", self.last
        blocks: list[dict[str, Any]] = []
        if response.reasoning:
            blocks.append({"type": "thinking", "thinking": response.reasoning, "signature": "x"})
        blocks += [{"type": "text", "text": response.text}] if response.text else []
        blocks += [{"type": "tool_use", "id": c, "name": "Bash", "input": {"a": c}} for c, _ in response.calls]
        owners = {}
        for block in blocks:
            message = {"id": message_id, "role": "assistant", "model": "m", "content": [block]}
            parent = self.add("assistant", parent, message=message)
            owners[block.get("id")] = parent
        for number in response.result_order:
            call, result = response.calls[number]
            content = [{"type": "tool_result", "tool_use_id": call, "content": result}]
            parent = self.user(owners[call], content, sourceToolAssistantUUID=owners[call])
        if len(response.calls) > 1 and self.rng.random() < 0.5:
            self.interleave(len(response.calls))
        self.last = parent

    def interleave(self, calls: int) -> None:
        """Move the first results before the last call of their response, as if their tools had ended earlier."""
        *before, last_call = self.records[-2 * calls : -calls]
        results = self.records[-calls:]
        early = [item for item in results if item["parentUuid"] != last_call["uuid"]]
        if results[: len(early)] == early:
            self.records[-2 * calls :] = [*before, *early, last_call, *results[len(early) :]]

    def failure(self, operation: Operation) -> None:
        content = [{"type": "text", "text": operation.marker}]
        message = {"id": "0f", "model": "<synthetic>", "role": "assistant", "content": content}
        self.last = self.add("assistant", self.last, message=message, isApiErrorMessage=True)

    def noise(self, operation: Operation) -> None:
        snapshot = {"note": operation.marker}
        self.records.append({"type": "file-history-snapshot", "messageId": "x", "snapshot": snapshot})
        self.last = self.add("progress", self.last, data={"type": "hook_progress", "note": operation.marker})

    def repeat(self, operation: Operation) -> None:
        self.records.append(dict(next(record for record in reversed(self.records) if "message" in record)))

    def compact(self, operation: Operation) -> None:
        boundary = self.add("system", None, subtype="compact_boundary", logicalParentUuid=self.last)
        self.last = self.user(boundary, operation.marker, isCompactSummary=True, isVisibleInTranscriptOnly=True)
        self.starts = []

    def agent(self, operation: Operation) -> None:
        assert operation.session is not None
        name = operation.marker.strip("<>")
        writer = ClaudeCode(self.rng.randrange(100), {"isSidechain": True, "agentId": name}, f"{name}-")
        self.records += writer.write(operation.session)


class Codex(Writer):
    """Items of the Responses API, with events that repeat them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.add("session_meta", id="c1", cli_version="0.50.0", base_instructions={"text": "You are Codex."})
        self.turns = 0

    def add(self, kind: str, **payload: Any) -> None:
        self.records.append({"timestamp": "t", "type": kind, "payload": payload})

    def item(self, role: str, text: str) -> dict[str, Any]:
        kind = "output_text" if role == "assistant" else "input_text"
        return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}

    def message(self, marker: str) -> None:
        self.turns += 1
        self.add("turn_context", model="m", cwd="/w")
        self.add("response_item", **self.item("user", marker))
        self.add("event_msg", type="user_message", message=marker)

    def answer(self, response: Response) -> None:
        if response.reasoning:
            self.add("event_msg", type="agent_reasoning", text=response.reasoning)
            content = [{"type": "reasoning_text", "text": response.reasoning}]
            self.add("response_item", type="reasoning", summary=[], content=content)
        if response.text:
            self.add("response_item", **self.item("assistant", response.text))
            self.add("event_msg", type="agent_message", message=response.text)
        for call, _ in response.calls:
            arguments = json.dumps({"command": [call]})
            self.add("response_item", type="function_call", name="shell", arguments=arguments, call_id=call)
        for number in response.result_order:
            call, result = response.calls[number]
            self.add("response_item", type="function_call_output", call_id=call, output=result)
        self.add("event_msg", type="token_count", info=None)

    def failure(self, operation: Operation) -> None:
        self.add("event_msg", type="error", message=operation.marker)

    def noise(self, operation: Operation) -> None:
        self.add("event_msg", type="exec_command_end", note=operation.marker)
        self.add("response_item", type="ghost_snapshot", ghost_commit={"id": operation.marker})
        self.add("world_state", full=True, state={"note": operation.marker})

    def rewind(self, operation: Operation) -> None:
        self.add("event_msg", type="thread_rolled_back", num_turns=self.turns - operation.depth)
        self.turns = operation.depth

    def compact(self, operation: Operation) -> None:
        self.add("compacted", message="", replacement_history=[self.item("user", operation.marker)])
        self.add("event_msg", type="context_compacted")
        self.turns = 0


class Pi(Writer):
    """A tree of entries with messages."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.records.append({"type": "session", "version": 3, "id": "p1", "cwd": "/w"})

    def add(self, kind: str, **values: Any) -> None:
        entry_id = f"e{len(self.records)}"
        self.records.append({"type": kind, "id": entry_id, "parentId": self.last, **values})
        self.last = entry_id

    def message(self, marker: str) -> None:
        self.add("message", message={"role": "user", "content": [{"type": "text", "text": marker}]})

    def answer(self, response: Response) -> None:
        blocks: list[dict[str, Any]] = []
        blocks += [{"type": "thinking", "thinking": response.reasoning}] if response.reasoning else []
        blocks += [{"type": "text", "text": response.text}] if response.text else []
        blocks += [{"type": "toolCall", "id": c, "name": "bash", "arguments": {"a": c}} for c, _ in response.calls]
        self.add("message", message={"role": "assistant", "content": blocks, "model": "m", "stopReason": "stop"})
        for number in response.result_order:
            call, result = response.calls[number]
            message = {"role": "toolResult", "toolCallId": call, "toolName": "bash", "isError": False}
            self.add("message", message={**message, "content": [{"type": "text", "text": result}]})

    def failure(self, operation: Operation) -> None:
        content = [{"type": "text", "text": operation.marker}]
        self.add("message", message={"role": "assistant", "content": content, "stopReason": "error"})

    def noise(self, operation: Operation) -> None:
        self.add("custom", customType="x", data={"note": operation.marker})

    def repeat(self, operation: Operation) -> None:
        self.records.append(dict(self.records[-1]))

    def compact(self, operation: Operation) -> None:
        self.add("compaction", summary=operation.marker, firstKeptEntryId=None)
        self.starts = []


class Droid(Writer):
    """Messages with content blocks, and all results of a response in one message."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.records.append({"type": "session_start", "id": "d1", "version": 2, "cwd": "/w"})
        self.compaction: dict[str, str] = {}

    def add(self, role: str, content: Sequence[dict[str, Any]], **values: Any) -> None:
        message_id = f"m{len(self.records)}"
        parent = {"parentId": self.last} if self.last else {}
        message = {"role": role, "content": content, **values}
        self.records.append({"type": "message", "id": message_id, "message": message, **parent, **self.compaction})
        self.last = message_id

    def message(self, marker: str) -> None:
        self.add("user", [{"type": "text", "text": marker}])

    def answer(self, response: Response) -> None:
        blocks: list[dict[str, Any]] = []
        blocks += [{"type": "thinking", "thinking": response.reasoning}] if response.reasoning else []
        blocks += [{"type": "text", "text": response.text}] if response.text else []
        blocks += [{"type": "tool_use", "id": c, "name": "Execute", "input": {"a": c}} for c, _ in response.calls]
        self.add("assistant", blocks, modelId="m")
        self.records.append({"type": "todo_state", "id": "t", "todos": {}})
        pairs = [response.calls[number] for number in response.result_order]
        if pairs:
            self.add("user", [{"type": "tool_result", "tool_use_id": call, "content": text} for call, text in pairs])

    def failure(self, operation: Operation) -> None:
        self.add("user", [{"type": "text", "text": operation.marker}], visibility="user_only")

    noise = failure

    def compact(self, operation: Operation) -> None:
        state = {"type": "compaction_state", "id": operation.marker, "summaryText": operation.marker}
        self.records.append({**state, "anchorMessage": {"id": self.last, "index": 0}})
        self.compaction, self.starts = {"compactionSummaryId": operation.marker}, []


class Hermes(Writer):
    """A gateway log: messages in the format of chat completions."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.records.append({"role": "session_meta", "tools": [], "model": "m", "platform": "x"})

    def message(self, marker: str) -> None:
        self.records.append({"role": "user", "content": marker})

    def answer(self, response: Response) -> None:
        self.records.append(chat_message(response))
        self.records += [
            {"role": "tool", "tool_call_id": response.calls[n][0], "content": response.calls[n][1]}
            for n in response.result_order
        ]


class Responses(Writer):
    """A request with its response. The input contains the whole conversation before the last response."""

    def message(self, marker: str) -> None:
        self.records.append({"role": "user", "content": marker})

    def answer(self, response: Response) -> None:
        if response.reasoning:
            content = [{"type": "reasoning_text", "text": response.reasoning}]
            self.records.append({"type": "reasoning", "summary": [], "content": content})
        if response.text:
            content = [{"type": "output_text", "text": response.text}]
            self.records.append({"type": "message", "role": "assistant", "content": content})
        for call, _ in response.calls:
            item = {"type": "function_call", "name": "sh", "arguments": json.dumps({"a": call}), "call_id": call}
            self.records.append(item)
        for number in response.result_order:
            call, result = response.calls[number]
            self.records.append({"type": "function_call_output", "call_id": call, "output": result})

    def write(self, session: Session) -> list[dict[str, Any]]:
        items = super().write(session)
        last = max(number for number, item in enumerate(items) if item.get("role") == "user")
        output = items[last + 1 :]
        return [{"id": "r1", "object": "response", "input": items[: last + 1], "output": output, "tools": []}]


class Atif(Writer):
    """A trajectory, with the trajectories of sub-agents inside."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.children: list[dict[str, Any]] = []

    def add(self, source: str, message: str, **values: Any) -> None:
        self.records.append({"step_id": len(self.records) + 1, "source": source, "message": message, **values})

    def message(self, marker: str) -> None:
        self.add("user", marker)

    def answer(self, response: Response) -> None:
        values: dict[str, Any] = {"reasoning_content": response.reasoning} if response.reasoning else {}
        if response.calls:
            values["tool_calls"] = [
                {"tool_call_id": call, "function_name": "sh", "arguments": {"a": call}} for call, _ in response.calls
            ]
            pairs = [response.calls[number] for number in response.result_order]
            results = [{"source_call_id": call, "content": text} for call, text in pairs]
            values["observation"] = {"results": results}
        self.add("agent", response.text, **values)

    def noise(self, operation: Operation) -> None:
        self.add("agent", "", llm_call_count=0, extra={"note": operation.marker})

    def compact(self, operation: Operation) -> None:
        management = {"type": "compaction", "boundary": "replace"}
        self.add("system", "compacted", extra={"context_management": management})
        self.message(operation.marker)

    def agent(self, operation: Operation) -> None:
        assert operation.session is not None
        (child,) = Atif().write(operation.session)
        self.children.append({**child, "trajectory_id": operation.marker})

    def write(self, session: Session) -> list[dict[str, Any]]:
        steps = super().write(session)
        document = {"schema_version": "ATIF-v1.7", "session_id": "a1", "agent": {"name": "x", "version": "1"}}
        children = {"subagent_trajectories": self.children} if self.children else {}
        return [{**document, "steps": steps, **children}]


class Verifiers(Writer):
    """A trace with a tree of messages."""

    def add(self, message: dict[str, Any], *, sampled: bool = False) -> None:
        parent = {} if self.last is None else {"parent": self.last}
        self.records.append({"message": message, "sampled": sampled, **parent})
        self.last = len(self.records) - 1

    def message(self, marker: str) -> None:
        self.add({"role": "user", "content": marker})

    def answer(self, response: Response) -> None:
        message = chat_message(response)
        flat = [{"id": call["id"], "type": "function", **call["function"]} for call in message.pop("tool_calls", [])]
        self.add({**message, **({"tool_calls": flat} if flat else {})}, sampled=True)
        for number in response.result_order:
            call, result = response.calls[number]
            self.add({"role": "tool", "tool_call_id": call, "content": result})

    def write(self, session: Session) -> list[dict[str, Any]]:
        nodes = super().write(session)
        trace = {"version": 1, "id": "v1", "agent": {"name": "main"}, "nodes": nodes, "errors": []}
        return [{"id": "ep", "env": {"id": "e"}, "task": {"data": {}}, "traces": [trace]}]


class OpenTelemetry(Writer):
    """Spans of model calls, each of which repeats the messages before it, without their reasoning."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.last: list[dict[str, Any]] = []

    def add(self, attributes: dict[str, Any]) -> None:
        number = len(self.records)
        ids = {"trace_id": f"t{number % 3}", "span_id": f"x{number}", "start_time": number}
        self.records.append({**ids, "attributes": attributes})

    def call(self, output: dict[str, Any] | None, **values: Any) -> None:
        attributes = {"gen_ai.operation.name": "chat", "gen_ai.conversation.id": "k", **values}
        attributes["gen_ai.input.messages"] = json.dumps(self.last)
        self.add(attributes | ({"gen_ai.output.messages": json.dumps([output])} if output else {}))

    def message(self, marker: str) -> None:
        self.last = [*self.last, {"role": "user", "parts": [{"type": "text", "content": marker}]}]

    def answer(self, response: Response) -> None:
        parts: list[dict[str, Any]] = [{"type": "text", "content": response.text}] if response.text else []
        parts += [{"type": "tool_call", "id": c, "name": "sh", "arguments": {"a": c}} for c, _ in response.calls]
        thought = [{"type": "reasoning", "content": response.reasoning}] if response.reasoning else []
        self.call({"role": "assistant", "parts": thought + parts})
        self.last = [*self.last, {"role": "assistant", "parts": parts}]
        for number in response.result_order:
            call, result = response.calls[number]
            tool = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.call.id": call}
            self.add({**tool, "gen_ai.tool.call.result": result})
            part = {"type": "tool_call_response", "id": call, "response": result}
            self.last = [*self.last, {"role": "tool", "parts": [part]}]

    def failure(self, operation: Operation) -> None:
        self.call(None, **{"error.type": operation.marker})

    def noise(self, operation: Operation) -> None:
        self.add({"gen_ai.operation.name": "embeddings", "note": operation.marker})

    def repeat(self, operation: Operation) -> None:
        self.records += [dict(self.rng.choice(self.records))] if self.records else []

    def compact(self, operation: Operation) -> None:
        self.last, self.starts = [], []
        self.message(operation.marker)


def chat_message(response: Response) -> dict[str, Any]:
    """Return a response in the format of chat completions."""
    message: dict[str, Any] = {"role": "assistant", "content": response.text}
    message |= {"reasoning_content": response.reasoning} if response.reasoning else {}
    if response.calls:
        message["tool_calls"] = [
            {"id": call, "type": "function", "function": {"name": "sh", "arguments": json.dumps({"a": call})}}
            for call, _ in response.calls
        ]
    return message


WRITERS: dict[str, tuple[type[Writer], tuple[str, ...]]] = {
    "claude_code": (ClaudeCode, ("rewind", "compact", "agent", "failure", "noise", "repeat")),
    "codex": (Codex, ("rewind", "compact", "failure", "noise")),
    "pi": (Pi, ("rewind", "compact", "failure", "noise", "repeat")),
    "droid": (Droid, ("rewind", "compact", "failure", "noise")),
    "hermes": (Hermes, ()),
    "otel": (OpenTelemetry, ("rewind", "compact", "failure", "noise", "repeat")),
    "atif": (Atif, ("compact", "agent", "noise")),
    "responses": (Responses, ()),
    "verifiers": (Verifiers, ("rewind", "compact")),
}
"""Format -> its writer, and the features of sessions that its logs can represent."""
