"""Convert sessions of Claude Code: files in `~/.claude/projects`, and the output with `--output-format stream-json`.

The format has no official description. The types of records and fields are those of versions 1.0 to 2.1. Records form
a tree by `parentUuid`. A response of the API is written as one record per content block, all with the same message id,
and the results of parallel tool calls lie between these records.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftdata.traces.content_blocks import BlockReader
from ftdata.traces.rows import Session
from ftdata.traces.steps import (
    BadRecord,
    Context,
    Step,
    check_unknown,
    convert_structure_errors,
    get_mapping,
    number_names,
)
from ftdata.traces.tree import (
    Node,
    connect_nodes,
    find_abandoned,
    leaf_paths,
    missing_parent,
    move_injected_into_path,
    remove_if_leaf,
    remove_retried_responses,
)

_METADATA = {
    "agent-color", "agent-name", "agent-setting", "ai-title", "atis-latch", "attribution-snapshot", "bridge-session",
    "cost-state", "custom-title", "file-history-delta", "file-history-snapshot", "frame-link", "isolation-latch",
    "last-prompt", "mode", "permission-mode", "pr-link", "progress", "queue-operation", "rate_limit_event", "relocated",
    "result", "speculation-accept", "summary", "tag", "task-summary", "worktree-state",
}  # fmt: skip
"""Types of records without content of the conversation."""

_EDITS = {"content-replacement", "marble-origami-commit", "marble-origami-reset", "marble-origami-snapshot"}
"""Types of records after which earlier content was shortened. The log does not contain the short form."""

_SYSTEM_METADATA = {
    None, "agents_killed", "api_metrics", "away_summary", "bridge_status", "compact_boundary", "file_snapshot", "hook",
    "informational", "init", "local_command", "memory_saved", "model_refusal_no_fallback", "permission_retry",
    "scheduled_task_fire", "status", "stop_hook_summary", "thinking", "turn_duration",
}  # fmt: skip
"""Subtypes of system records without content of the conversation. The system prompt is not logged."""

_CONVERSATION = {"user", "assistant", "attachment", "system"}
_TYPES = {*_METADATA, *_EDITS, *_CONVERSATION, "fork-context-ref", "stream_event"}
"""All known types of records."""

_QUEUED_PROMPT = "queued_command"
_SYNTHETIC_MODEL = "<synthetic>"


def is_claude_code_record(record: Mapping[str, Any]) -> bool:
    """Return whether an object is a record of a Claude Code session."""
    kind, ids = str(record.get("type")), ("sessionId", "session_id", "leafUuid", "messageId", "uuid")
    has_id = any(isinstance(record.get(key), str) for key in ids)
    return has_id and kind in _TYPES and ("message" in record or kind not in ("user", "assistant"))


@dataclass
class _Scope:
    """The main conversation, or the conversation of a sub-agent.

    Attributes:
        nodes: the nodes, in the order of their first records.
        response: the response that more records may belong to.
        calls: the node of each tool call.
        contents: the contents of the responses so far, by message id.
        summary: the summary of the last compaction.
    """

    nodes: list[Node] = field(default_factory=list)
    response: tuple[str, Node] | None = None
    calls: dict[str, Node] = field(default_factory=dict)
    contents: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    summary: Node | None = None


class _Reader:
    """Reads the records of a session in order, and builds the nodes of each scope.

    Attributes:
        records: the records.
        ignored: names of unknown types of records to ignore.
        categories: category of each record that is in no node, by index.
        anomalies: counts of irregularities.
        scopes: the main conversation and those of the sub-agents, by name.
        node_by_uuid: the scope and the node of each record of a message.
        parent_by_uuid: the uuid before each record that is in no node.
        record_by_uuid: the records.
        kept_uuids: uuid of a compaction -> the messages that it kept, and whether they are before its summary.
        summary_by_kept: a kept message -> the summary of its compaction.
        kept_before, kept_after: a summary -> the kept messages before and after it.
        failed: responses whose request failed before they were complete.
        truncated: responses that reached the token limit.
        scope_names: the scope of each record of a sub-agent, by uuid.
        retracted: uuids of the messages that the program removed.
        texts: the prompts of the user.
        is_linear: whether the records have no parents.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], ignored: frozenset[str]) -> None:
        self.records, self.ignored = records, ignored
        self.categories = dict[int, str]()
        self.anomalies = Counter[str]()
        self.scopes = defaultdict[str, _Scope](_Scope)
        self.node_by_uuid = dict[str, tuple[str, Node]]()
        self.parent_by_uuid = dict[str, str | None]()
        self.record_by_uuid = dict[str, Mapping[str, Any]]()
        self.kept_uuids = dict[str, tuple[list[str], bool]]()
        self.summary_by_kept = dict[Node, Node]()
        self.kept_after = defaultdict[Node, list[Node]](list)
        self.kept_before = defaultdict[Node, list[Node]](list)
        self.failed = set[Node]()
        self.truncated = set[Node]()
        self.scope_names = dict[str, str]()
        self.retracted = {uuid for record in records for uuid in record.get("retractedMessageUuids") or ()}
        self.texts = {_prompt_text(record) for record in records} - {None}
        self.is_linear = not any(isinstance(record.get("parentUuid"), str) for record in records)

    def read(self) -> None:
        for number, record in enumerate(self.records):
            with convert_structure_errors(number):
                category = self._read_record(number, record)
            if category is not None:
                self.categories[number] = category
                if isinstance(uuid := record.get("uuid"), str) and uuid not in self.node_by_uuid:
                    self.parent_by_uuid.setdefault(uuid, _parent_of(record))

    def _read_record(self, number: int, record: Mapping[str, Any]) -> str | None:
        """Read a record. Return its category, or `None` if it became part of a node."""
        kind, uuid = record.get("type"), record.get("uuid")
        if isinstance(uuid, str) and uuid in self.record_by_uuid and kind in _CONVERSATION:
            if get_mapping(record, "message").get("content") != get_mapping(self.record_by_uuid[uuid], "message").get(
                "content"
            ):
                problem = f"the record has the same uuid as an earlier record, but another message: {uuid}"
                raise BadRecord(number, "conflicting_records", problem, hint="remove one of the records")
            self._keep_repeated(uuid)
            return "duplicates"
        if isinstance(uuid, str):
            self.record_by_uuid[uuid] = record
        if kind == "attachment":
            return self._read_attachment(number, record)
        if kind == "system":
            return self._read_system(number, record)
        if kind in ("user", "assistant"):
            if not isinstance(record.get("message"), Mapping):
                raise BadRecord(number, "record_type", "the record has no message", field="message")
            category = self._hidden_category(record)
            return category or (self._read_user if kind == "user" else self._read_assistant)(number, record)
        return self._read_other(number, record)

    def _keep_repeated(self, uuid: str) -> None:
        """Add a message to the context after a compaction, if the program wrote it again behind the summary."""
        name, node = self.node_by_uuid.get(uuid, ("", None))
        summary = self.scopes[name].summary if node is not None else None
        if node is not None and summary is not None and node.root is not summary.root:
            self.summary_by_kept[node] = summary
            if node not in self.kept_after[summary]:
                self.kept_after[summary].append(node)

    def _read_other(self, number: int, record: Mapping[str, Any]) -> str:
        kind = record.get("type")
        if kind == "fork-context-ref":
            problem = f"the session continues session {record.get('parentSessionId')}, which is in another file"
            raise BadRecord(number, "missing_context", problem)
        if kind in _EDITS:
            self.anomalies["shortened_context"] += 1
        if kind == "queue-operation" and record.get("operation") in ("enqueue", "remove"):
            text = record.get("content")
            return "metadata" if not text or not isinstance(text, str) or text in self.texts else "missing_content"
        if kind == "stream_event":
            return "duplicates"
        return "metadata" if kind in _METADATA or kind in _EDITS else self._check_unknown(number, str(kind))

    def _check_unknown(self, number: int, name: str, kind: str = "record type") -> str:
        versions = (record["version"] for record in (self.records[number], *self.records) if record.get("version"))
        return check_unknown(number, kind, name, f"Claude Code {next(versions, '')}".rstrip(), self.ignored)

    def _hidden_category(self, record: Mapping[str, Any]) -> str | None:
        """Return the category of a message that the model neither saw nor wrote; `None` for other messages."""
        if record.get("uuid") in self.retracted:
            return "retracted"
        if record.get("isApiErrorMessage") or record["message"].get("model") == _SYNTHETIC_MODEL:
            return "errors"
        return "metadata" if record.get("isVisibleInTranscriptOnly") and not record.get("isCompactSummary") else None

    def _read_system(self, number: int, record: Mapping[str, Any]) -> str:
        subtype = record.get("subtype")
        if subtype == "compact_boundary":
            self._read_boundary(record)
        elif subtype == "microcompact_boundary":
            self.anomalies["shortened_context"] += 1
        elif subtype == "api_error":
            self._retract_partial(record)
            return "errors"
        elif subtype not in _SYSTEM_METADATA and subtype != "model_refusal_fallback":
            prefix = str(subtype).partition("_")[0]
            return "metadata" if prefix in ("task", "hook") else self._check_unknown(number, f"system/{subtype}")
        return "metadata"

    def _retract_partial(self, record: Mapping[str, Any]) -> None:
        """Retract the part of a response that was received before its request failed."""
        _, node = self.node_by_uuid.get(str(record.get("parentUuid")), ("", None))
        if node is not None and node.is_response and not node.later_steps:
            self.failed.add(node)

    def _read_boundary(self, record: Mapping[str, Any]) -> None:
        """Record which messages a compaction kept, and whether the summary follows them."""
        if not isinstance(uuid := record.get("uuid"), str):
            return
        details = get_mapping(record, "compactMetadata")
        messages, segment = get_mapping(details, "preservedMessages"), get_mapping(details, "preservedSegment")
        uuids = [str(item) for item in messages.get("uuids") or ()]
        uuids = uuids or self._uuids_between(segment.get("headUuid"), segment.get("tailUuid"))
        self.kept_uuids[uuid] = uuids, uuid in (messages.get("anchorUuid"), segment.get("anchorUuid"))

    def _uuids_between(self, head: Any, tail: Any) -> list[str]:
        """Return the records from one record to another; an empty list if they are not in one conversation."""
        chain, uuid = dict[str, None](), tail
        while isinstance(uuid, str) and uuid in self.record_by_uuid and uuid not in chain:
            chain[uuid] = None
            if uuid == head:
                return [*chain][::-1]
            uuid = _parent_of(self.record_by_uuid[uuid])
        return []

    def _read_attachment(self, number: int, record: Mapping[str, Any]) -> str | None:
        attachment = record.get("attachment")
        if not isinstance(attachment, Mapping) or attachment.get("type") != _QUEUED_PROMPT:
            return "missing_content"
        content = self._block_reader(number).read_parts(attachment.get("prompt"))
        message = {"role": "user", "content": content}
        self._add_message(number, record, [Step("message", message, number)], is_injected=True)
        return None

    def _read_user(self, number: int, record: Mapping[str, Any]) -> str | None:
        scope_name = self._scope_of(record)
        scope = self.scopes[scope_name]
        steps = self._block_reader(number).read_user(record["message"].get("content"))
        node = next((scope.calls[step.value["tool_call_id"]] for step in steps if step.kind == "result"
                     and step.value["tool_call_id"] in scope.calls), None)  # fmt: skip
        if node is not None and scope.summary is not None:
            parent = self._parent_node(number, record, scope_name)
            # After a compaction between a call and its result, the model does not see the call.
            node = None if parent is not None and parent.root is not node.root else node
        if node is None:
            self._add_message(number, record, steps, is_injected=bool(record.get("isMeta")))
            return None
        node.later_steps += steps
        self._assign_record(number, record, scope_name, node)
        if any(step.kind == "message" for step in steps):
            scope.response = None
        return None

    def _block_reader(self, number: int) -> BlockReader:
        return BlockReader(number, self.anomalies, lambda name: self._check_unknown(number, name, "content type"))

    def _add_message(
        self, number: int, record: Mapping[str, Any], steps: list[Step], *, is_injected: bool = False
    ) -> None:
        name = self._scope_of(record)
        scope = self.scopes[name]
        node = Node(self._parent_node(number, record, name), is_response=False, is_injected=is_injected, steps=steps)
        scope.nodes.append(node)
        if not is_injected:
            scope.response = None
        self._assign_record(number, record, name, node)
        if record.get("isCompactSummary"):
            scope.summary = node
            uuids, is_before = self.kept_uuids.get(str(record.get("parentUuid")), ([], False))
            nodes = dict.fromkeys(self.node_by_uuid[uuid][1] for uuid in uuids if uuid in self.node_by_uuid)
            self.summary_by_kept.update(dict.fromkeys(nodes, node))
            (self.kept_before if is_before else self.kept_after)[node] += nodes

    def _read_assistant(self, number: int, record: Mapping[str, Any]) -> str | None:
        name = self._scope_of(record)
        scope = self.scopes[name]
        message_id = record["message"].get("id")
        is_same = scope.response is not None and message_id and scope.response[0] == message_id
        node = scope.response[1] if is_same and scope.response else None
        steps, has_hidden = self._block_reader(number).read_response(record["message"].get("content"))
        call_ids = {step.value["id"] for step in steps if step.kind == "call"}
        if node is not None and call_ids and call_ids <= scope.calls.keys():
            return "duplicates"
        if node is None:
            if not steps:
                return "missing_content" if has_hidden else "metadata"
            node = Node(self._parent_node(number, record, name), is_response=True)
            scope.nodes.append(node)
            scope.response = (str(message_id or f"record {number}"), node)
        elif node.later_steps and steps:
            self.anomalies["interleaved_results"] += 1
        content = json.dumps(record["message"].get("content"), sort_keys=True)
        contents = scope.contents[str(message_id)] if message_id else set[str]()
        # A compaction can write kept messages again with new uuids.
        is_replay = not is_same and content in contents and scope.summary is not None
        self.anomalies["replayed_messages"] += is_replay
        contents.add(content)
        if record["message"].get("stop_reason") == "max_tokens":
            self.truncated.add(node)
            self.anomalies["truncated_responses"] += 1
        node.steps += [step._replace(response=node, trained=not is_replay) for step in steps]
        scope.calls.update(dict.fromkeys(call_ids, node))
        self._assign_record(number, record, name, node)
        if steps:
            return None
        node.records.pop()
        return "missing_content" if has_hidden else "metadata"

    def _scope_of(self, record: Mapping[str, Any]) -> str:
        """Return the name of the conversation that a record belongs to."""
        if record.get("parent_tool_use_id"):
            return f"agent {record['parent_tool_use_id']}"
        if not record.get("isSidechain"):
            return "main"
        if record.get("agentId"):
            return f"agent {record['agentId']}"
        path = list[str]()
        name = f"agent {record.get('uuid')}"
        item: Mapping[str, Any] | None = record
        while item is not None and item.get("isSidechain"):
            if (uuid := str(item.get("uuid"))) in self.scope_names:
                name = self.scope_names[uuid]
                break
            if uuid in path:
                break
            path.append(uuid)
            name = f"agent {uuid}"
            item = self.record_by_uuid.get(str(_parent_of(item)))
        self.scope_names.update(dict.fromkeys(path, name))
        return name

    def _parent_node(self, number: int, record: Mapping[str, Any], name: str) -> Node | None:
        """Return the node before a record.

        Raises:
            BadRecord: `missing_parent` or `parent_cycle`.
        """
        nodes = self.scopes[name].nodes
        if self.is_linear or "parentUuid" not in record:
            return nodes[-1] if nodes else None
        uuid, passed = record["parentUuid"], set[str]()
        while isinstance(uuid, str):
            if uuid in passed:
                raise BadRecord(number, "parent_cycle", f"the parents of the record form a cycle: {uuid}")
            passed.add(uuid)
            if uuid in self.node_by_uuid:
                scope_name, owner = self.node_by_uuid[uuid]
                node: Node | None = self.summary_by_kept.get(owner, owner)
                while node is not None and node in self.failed:
                    node = node.parent
                return node if scope_name == name else None
            if uuid not in self.parent_by_uuid:
                if record.get("isSidechain") and not nodes:
                    return None
                raise missing_parent(number, uuid, "parentUuid")
            uuid = self.parent_by_uuid[uuid]
        return None

    def _assign_record(self, number: int, record: Mapping[str, Any], name: str, node: Node) -> None:
        node.records.append(number)
        if isinstance(record.get("uuid"), str):
            self.node_by_uuid[record["uuid"]] = name, node

    def contexts(self) -> Iterator[tuple[int, Context]]:
        """Yield the last record and the context of each path."""
        for name, scope in self.scopes.items():
            nodes = scope.nodes
            connect_nodes(nodes)
            move_injected_into_path(nodes)
            removed = remove_retried_responses(nodes) | remove_if_leaf(node for node in nodes if node in self.failed)
            for node in removed:
                self.categories.update(dict.fromkeys(node.records, "retracted"))
            nodes = [node for node in nodes if node not in removed]
            abandoned = find_abandoned(nodes)
            paths = leaf_paths(nodes)
            for index, path in enumerate(paths):
                label = number_names(name, len(paths))[index]
                records = [self.records[number] for node in path for number in node.records]
                is_abandoned = path[-1] in abandoned
                context = Context(label, self._path_steps(path), (), _metadata(records), abandoned=is_abandoned)
                yield path[-1].records[-1], context

    def _path_steps(self, path: Sequence[Node]) -> list[Step]:
        """Return the steps of a path, with the messages that compactions kept."""
        steps = list[Step]()
        for node in path:
            for item in (*self.kept_before[node], node, *self.kept_after[node]):
                steps += [*item.steps, *item.later_steps]
        return [step._replace(trained=step.trained and not self._is_excluded(step)) for step in steps]

    def _is_excluded(self, step: Step) -> bool:
        """Return whether a step must not be trained: it is a copy from another session, or is truncated."""
        return bool(self.records[step.record].get("forkedFrom")) or step.response in self.truncated


def read_claude_code_session(records: Sequence[Mapping[str, Any]], ignored: frozenset[str] = frozenset()) -> Session:
    """Convert the records of a session file.

    Args:
        records: the records, in the order of the file.
        ignored: names of unknown types of records to ignore.

    Raises:
        BadRecord: `unknown_record_type`, `record_type`, `conflicting_records`, `missing_parent`, `missing_context` or
            `parent_cycle`.
    """
    reader = _Reader(records, ignored)
    reader.read()
    contexts = [context for _, context in sorted(reader.contexts(), key=lambda item: item[0])]
    session_ids = (record.get("sessionId") or record.get("session_id") for record in records)
    metadata = {"session": next(filter(None, session_ids), "")}
    return Session("claude_code", len(records), contexts, reader.categories, metadata, reader.anomalies)


def _metadata(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    models = dict.fromkeys((record.get("message") or {}).get("model") for record in records)
    values: dict[str, Any] = {"models": [model for model in models if model]}
    for name, key in (("version", "version"), ("cwd", "cwd"), ("git_branch", "gitBranch")):
        if value := next((record[key] for record in records if record.get(key)), None):
            values[name] = value
    return values


def _parent_of(record: Mapping[str, Any]) -> str | None:
    """Return the uuid of the record before a record. A conversation begins anew after a compaction."""
    if record.get("type") == "system" and record.get("subtype") == "compact_boundary":
        return None
    parent = record.get("parentUuid")
    return parent if isinstance(parent, str) else None


def _prompt_text(record: Mapping[str, Any]) -> str | None:
    """Return the text of a prompt of the user, with which queued prompts are compared."""
    message, attachment = record.get("message"), record.get("attachment")
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(attachment, Mapping):
        content = attachment.get("prompt")
    if isinstance(content, list):
        texts = [block.get("text") for block in content if isinstance(block, Mapping) and block.get("type") == "text"]
        content = texts[-1] if texts else None
    return content if isinstance(content, str) else None
