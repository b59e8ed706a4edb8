"""Convert sessions of pi and OpenClaw, and the output of `pi --mode json`.

Records form a tree by `parentId`, and the session continues from the last record of the file. After a compaction, the
model sees a summary and the last messages. The texts that pi adds to summaries and commands are those of version 0.58.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftdata.traces.content_blocks import BlockReader
from ftdata.traces.rows import Session
from ftdata.traces.steps import (
    Context,
    Step,
    check_unknown,
    convert_structure_errors,
    get_mapping,
    make_result,
)
from ftdata.traces.tools import read_tool
from ftdata.traces.tree import Node, connect_nodes, find_abandoned, leaf_paths, missing_parent

_METADATA = {"custom", "label", "model_change", "session", "session_info", "thinking_level_change", "usage"}
_BOUNDARIES = {"compaction", "context_edit"}
"""Types of records that change the context of the model."""

_STREAM_COPIES = {"agent_end", "entry_appended", "message_start", "message_update", "turn_end"}
_STREAM = {
    "agent_start", "auto_retry_end", "auto_retry_start", "compaction_end", "compaction_start", "message_end",
    "queue_update", "tool_execution_end", "tool_execution_start", "tool_execution_update", "turn_start",
}  # fmt: skip
"""Types of records in the output of `pi --mode json`. The messages are in `message_end`."""

_SUMMARY = (
    "The conversation history before this point was compacted into the following summary:\n\n<summary>\n",
    "\n</summary>",
)
_BRANCH_SUMMARY = (
    "The following is a summary of a branch that this conversation came back from:\n\n<summary>\n",
    "</summary>",
)


def is_pi_record(record: Mapping[str, Any]) -> bool:
    """Return whether an object is the first record of a pi session."""
    return record.get("type") == "session" and isinstance(record.get("id"), str) and "cwd" in record


@dataclass(frozen=True, slots=True)
class _Entry:
    """A record with its steps.

    Attributes:
        number: index of the record.
        record: the record.
        steps: the steps of the record itself.
    """

    number: int
    record: Mapping[str, Any]
    steps: Sequence[Step]


class _Reader:
    """Reads the records of a session in order.

    Attributes:
        categories: category of each record that is in no node, by index.
        entries: the entry of each record that is in a node, by index.
        nodes: the nodes, in the order of their first records.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], ignored: frozenset[str]) -> None:
        self.records, self.ignored = records, ignored
        self.categories = dict[int, str]()
        self.anomalies = Counter[str]()
        self.entries = dict[int, _Entry]()
        self.nodes = list[Node]()
        self.models = list[str]()

    def read(self) -> None:
        owners, previous = dict[str, Node](), None
        for number, record in enumerate(self.records):
            kind = str(record.get("type"))
            if number == 0 or kind in _STREAM_COPIES or (kind in _STREAM and kind != "message_end"):
                self.categories[number] = "duplicates" if kind in _STREAM_COPIES else "metadata"
                continue
            if (entry_id := record.get("id")) in owners:
                self.categories[number] = "duplicates"
                continue
            with convert_structure_errors(number):
                steps, category = self._read_entry(number, record, kind)
            if category is not None:
                self.categories[number] = category
            parent = previous if "parentId" not in record else self._find_parent(number, record, owners)
            node = Node(parent, is_response=False, steps=list(steps), records=[number])
            self.nodes.append(node)
            self.entries[number] = _Entry(number, record, steps)
            previous = node
            if isinstance(entry_id, str):
                owners[entry_id] = node

    def _find_parent(self, number: int, record: Mapping[str, Any], owners: Mapping[str, Node]) -> Node | None:
        parent = record["parentId"]
        if parent is None:
            return None
        if parent not in owners:
            raise missing_parent(number, parent, "parentId")
        return owners[parent]

    def _read_entry(self, number: int, record: Mapping[str, Any], kind: str) -> tuple[Sequence[Step], str | None]:
        """Return the steps of a record, and its category if it has no steps."""
        if kind in ("message", "message_end") and isinstance(record.get("message"), Mapping):
            return self._read_message(number, record["message"])
        if kind == "custom_message":
            content = BlockReader(number, self.anomalies, self._unknown_at(number)).read_parts(record.get("content"))
            return _user_step(number, content), None
        if kind == "compaction":
            return _user_step(number, str(record.get("summary", "")).join(_SUMMARY)), None
        if kind == "branch_summary":
            summary = str(record.get("summary") or "")
            return (_user_step(number, summary.join(_BRANCH_SUMMARY)), None) if summary else ((), "metadata")
        if kind not in _METADATA | _BOUNDARIES:
            return (), self._check_unknown(number, kind)
        return (), "metadata"

    def _read_message(self, number: int, message: Mapping[str, Any]) -> tuple[Sequence[Step], str | None]:
        role, blocks = message.get("role"), BlockReader(number, self.anomalies, self._unknown_at(number))
        if role == "assistant":
            return self._read_response(number, message, blocks)
        if role == "toolResult":
            name, call_id = str(message.get("toolName", "")), str(message.get("toolCallId", ""))
            content = blocks.read_parts(message.get("content"))
            is_error = bool(message.get("isError"))
            return [Step("result", make_result(call_id, content, name=name, is_error=is_error), number)], None
        if role == "bashExecution":
            is_hidden = bool(message.get("excludeFromContext"))
            return ((), "metadata") if is_hidden else (_user_step(number, _describe_command(message)), None)
        if role == "system":
            # The text depends on the system messages before it (`_SystemState`).
            return [Step("message", {"role": "system", "content": ""}, number)], None
        if role not in ("user", "custom", "hookMessage"):
            return (), self._check_unknown(number, f"{role}", "role")
        return _user_step(number, blocks.read_parts(message.get("content"))), None

    def _read_response(
        self, number: int, message: Mapping[str, Any], blocks: BlockReader
    ) -> tuple[Sequence[Step], str | None]:
        if message.get("stopReason") in ("error", "aborted"):
            return (), "errors"
        if message.get("model") == "delivery-mirror":
            return (), "duplicates"
        self.models += [message["model"]] if isinstance(message.get("model"), str) else []
        steps, has_hidden = blocks.read_response(message.get("content"))
        category = None if steps else "missing_content" if has_hidden else "metadata"
        is_truncated = message.get("stopReason") == "length"
        self.anomalies["truncated_responses"] += is_truncated
        return [step._replace(response=number, trained=not is_truncated) for step in steps], category

    def _unknown_at(self, number: int) -> Any:
        return lambda name: self._check_unknown(number, name, "content type")

    def _check_unknown(self, number: int, name: str, kind: str = "record type") -> str:
        program = f"pi (session version {self.records[0].get('version', 1)})"
        return check_unknown(number, kind, name, program, self.ignored)

    def contexts(self) -> Iterator[Context]:
        """Yield a context for each leaf, and for each change of the context on the path to it."""
        connect_nodes(self.nodes)
        number, abandoned = 0, find_abandoned(self.nodes)
        for path in leaf_paths(self.nodes):
            entries = [self.entries[node.records[0]] for node in path]
            ends = [index for index, entry in enumerate(entries) if self._changes_context(entry, index, entries)]
            for end in (*ends, len(entries)):
                number += 1
                steps, tools = self._visible_steps(entries[:end])
                is_abandoned = path[-1] in abandoned and end == len(entries)
                yield Context(f"main/{number}", steps, tools, {}, abandoned=is_abandoned)

    def _changes_context(self, entry: _Entry, index: int, entries: Sequence[_Entry]) -> bool:
        is_first = not any(before.steps for before in entries[:index])
        return entry.record.get("type") in _BOUNDARIES or (_is_system(entry) and not is_first)

    def _visible_steps(self, entries: Sequence[_Entry]) -> tuple[list[Step], list[dict[str, Any]]]:
        """Return the steps and the tools that the model sees after the entries of a path."""
        last = max((i for i, entry in enumerate(entries) if entry.record.get("type") == "compaction"), default=None)
        selected, system = list(entries), _SystemState()
        for index, entry in enumerate(entries):
            if _is_system(entry):
                system.apply(entry.record["message"], entry.number)
            elif index == last and isinstance(entry.record.get("systemMessage"), Mapping):
                system = _SystemState()
                system.apply(entry.record["systemMessage"], entry.number)
        if last is not None:
            first = self._first_kept(entries, last)
            selected = [entries[last], *entries[first:last], *entries[last + 1 :]]
        edits = {
            entry.record.get("targetId"): entry for entry in selected if entry.record.get("type") == "context_edit"
        }
        visible = [
            entry
            for index, entry in enumerate(selected)
            if not _is_system(entry) and (entry.record.get("type") != "compaction" or (last is not None and index == 0))
        ]
        steps = [step for entry in visible for step in self._edited_steps(entry, edits)]
        return [*system.steps(), *steps], [*system.tools.values()]

    def _first_kept(self, entries: Sequence[_Entry], last: int) -> int:
        """Return the index of the first entry before a compaction that the model sees after it."""
        record = entries[last].record
        index = record.get("firstKeptEntryIndex")
        if "firstKeptEntryId" not in record and isinstance(index, int):
            return next((i for i, entry in enumerate(entries[:last]) if entry.number >= index), last)
        first_id = record.get("firstKeptEntryId")
        return next((i for i, entry in enumerate(entries[:last]) if entry.record.get("id") == first_id), last)

    def _edited_steps(self, entry: _Entry, edits: Mapping[Any, _Entry]) -> Sequence[Step]:
        edit = edits.get(entry.record.get("id"))
        if edit is None or not entry.steps:
            return entry.steps
        replacement = edit.record.get("replacement")
        if replacement is None:
            return ()
        content = BlockReader(entry.number, Counter(), self._unknown_at(edit.number)).read_parts(
            replacement.get("content")
        )
        step = entry.steps[0]
        if step.kind in ("message", "result"):
            return [step._replace(value={**step.value, "content": content})]
        calls = [step for step in entry.steps if step.kind == "call"]
        return [Step("text", content, entry.number, entry.number, trained=False), *calls]


def _is_system(entry: _Entry) -> bool:
    return get_mapping(entry.record, "message").get("role") == "system"


class _SystemState:
    """The system prompt and the tools, which system messages declare and change.

    Attributes:
        tools: the tool definitions by name.
    """

    def __init__(self) -> None:
        self.tools = dict[str, dict[str, Any]]()
        self._sections = dict[str, str]()
        self._records = list[int]()

    def apply(self, message: Mapping[str, Any], record: int) -> None:
        """Apply a system message: it replaces the text, changes sections, and adds and removes tools."""
        self._records.append(record)
        content = message.get("content")
        if isinstance(content, str) and content:
            self._sections = {"": content}
        for name, text in get_mapping(message, "sections").items():
            if text is None:
                self._sections.pop(name, None)
            else:
                self._sections[name] = str(text)
        for tool in message.get("toolsRemoved") or ():
            self.tools.pop(str(tool.get("name")), None)
        self.tools |= {str(tool.get("name")): read_tool(tool) for tool in message.get("toolsAdded") or ()}

    def steps(self) -> list[Step]:
        """Return the system message, which has the record of the last change."""
        content = "\n\n".join(self._sections.values())
        if not self._records or not content:
            return []
        return [Step("message", {"role": "system", "content": content}, self._records[-1])]


def read_pi_session(records: Sequence[Mapping[str, Any]], ignored: frozenset[str] = frozenset()) -> Session:
    """Convert the records of a session file.

    Args:
        records: the records, in the order of the file.
        ignored: names of unknown types of records to ignore.

    Raises:
        BadRecord: `unknown_record_type` or `missing_parent`.
    """
    reader = _Reader(records, ignored)
    reader.read()
    contexts = _name_contexts([*reader.contexts()])
    header = records[0]
    reader.anomalies["forked_session"] += bool(header.get("parentSession"))
    metadata = {"session": header.get("id", ""), "cwd": header.get("cwd", ""), "version": header.get("version", 1)}
    metadata["models"] = list(dict.fromkeys(reader.models))
    used = {step.record for context in contexts for step in context.steps}
    systems = [number for number, entry in reader.entries.items() if _is_system(entry)]
    unused = {number: "metadata" for number in systems if number not in used}
    return Session("pi", len(records), contexts, reader.categories | unused, metadata, reader.anomalies)


def _name_contexts(contexts: list[Context]) -> list[Context]:
    return [replace(contexts[0], name="main")] if len(contexts) == 1 else contexts


def _user_step(number: int, content: Any) -> list[Step]:
    return [Step("message", {"role": "user", "content": content}, number)]


def _describe_command(message: Mapping[str, Any]) -> str:
    """Return the text that pi sends to the model for a command that the user ran."""
    output = message.get("output")
    text = f"Ran `{message.get('command')}`\n" + (f"```\n{output}\n```" if output else "(no output)")
    if message.get("cancelled"):
        text += "\n\n(command cancelled)"
    elif message.get("exitCode"):
        text += f"\n\nCommand exited with code {message['exitCode']}"
    if message.get("truncated") and message.get("fullOutputPath"):
        text += f"\n\n[Output truncated. Full output: {message['fullOutputPath']}]"
    return text
