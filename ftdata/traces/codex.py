"""Convert sessions of Codex: the files `~/.codex/sessions/**/rollout-*.jsonl`.

Since September 2025, each line has a type and a payload; before, each line was an item of the Responses API. The items
are the conversation, and nearly all events repeat them. A rollback removes turns, and a compaction replaces all items,
so both end a context. The system prompt is logged, the list of tools is not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ftdata.traces.response_items import ITEM_TYPES, ItemReader
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

_TYPES = {
    "compacted", "event_msg", "inter_agent_communication", "inter_agent_communication_metadata", "realtime_item",
    "response_item", "retained_context", "rollout_reference", "security_risk_score", "session_meta",
    "token_usage_record", "turn_context", "world_state",
}  # fmt: skip

_EVENTS = {
    "agent_message", "agent_reasoning", "agent_reasoning_raw_content", "agent_reasoning_section_break",
    "background_event", "context_compacted", "deprecation_notice", "entered_review_mode", "exited_review_mode",
    "guardian_assessment", "injected_message", "item_completed", "item_started", "patch_apply_updated", "plan_update",
    "session_configured", "sub_agent_activity", "task_complete", "task_started", "thread_goal_updated",
    "thread_name_updated", "thread_rolled_back", "thread_settings_applied", "token_count", "turn_aborted",
    "turn_complete", "turn_diff", "turn_started", "undo_completed", "user_message", "view_image_tool_call", "warning",
}  # fmt: skip
"""Known types of events. Types that end with one of `_EVENT_ENDINGS` are known, too."""

_EVENT_ENDINGS = ("_begin", "_end", "_delta", "_request", "_response")
_ERRORS = ("error", "stream_error")

_CONTEXT_TEXT = re.compile(
    r"\s*(?:<(environment_context|user_instructions|skill|user_shell_command|turn_aborted|subagent_notification|"
    r"user_action|recommended_plugins|goal_context|hook_prompt)\b|# AGENTS\.md instructions for |"
    r"Another language model started to solve this problem and produced a summary)",
    re.IGNORECASE,
)
"""The beginning of user messages that Codex wrote. A rollback does not count them as turns."""


_OLD_META = {"instructions", "git", "originator", "cli_version"}
"""Keys of the first record of a session from before September 2025."""


def is_codex_record(record: Mapping[str, Any]) -> bool:
    """Return whether an object is the first record of a Codex session."""
    kind = record.get("type")
    if isinstance(kind, str) and kind in _TYPES:
        return isinstance(record.get("payload"), Mapping)
    is_old = "type" not in record and {"id", "timestamp"} <= record.keys() and not _OLD_META.isdisjoint(record)
    return is_old and record.keys() <= {"id", "timestamp", "cwd", "source", "model_provider", *_OLD_META}


class _Item(NamedTuple):
    """The steps of an item, and its role in a rollback.

    Attributes:
        steps: the steps.
        begins_turn: whether the item is a message of the user.
        is_inserted: whether Codex inserted the item before the message of the user.
    """

    steps: tuple[Step, ...]
    begins_turn: bool
    is_inserted: bool


class _Reader:
    """Reads the records of a session in order.

    Attributes:
        item_reader: converts the items of responses.
        categories: category of each record that is in no context, by index.
        contexts: for each context, its steps, its tools, and whether it is abandoned.
        system: the instructions of the session.
        history: the items that the model sees next.
        replacement_length: number of items at the start of the history with which a compaction replaced earlier items.
        first_new_ordinal: number of items that a session of a sub-agent copies from the session that started it.
        used_events: indices of the events whose reasoning text is in the history.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], ignored: frozenset[str]) -> None:
        self.records, self.ignored = records, ignored
        self.item_reader = ItemReader()
        self.categories = dict[int, str]()
        self.contexts = list[tuple[list[Step], list[dict[str, Any]], bool]]()
        self.system = list[Step]()
        self.history = list[_Item]()
        self.replacement_length = 0
        self.anomalies = Counter[str]()
        self.metadata = dict[str, Any]()
        self.models = list[str]()
        self.first_new_ordinal = 0
        self.used_events = set[int]()

    def read(self) -> None:
        for number, record in enumerate(self.records):
            with convert_structure_errors(number):
                category = self._read_record(number, record)
            if category is not None:
                self.categories[number] = category
        self._end_context(abandoned=False)

    def _read_record(self, number: int, record: Mapping[str, Any]) -> str | None:  # noqa: PLR0911  (one per type)
        payload, kind = record.get("payload"), str(record.get("type"))
        if not isinstance(payload, Mapping):
            return self._read_old_record(number, record)
        if kind == "rollout_reference":
            raise self._missing_context(number, "a part of the session is in another file")
        match kind:
            case "response_item":
                return self._read_item(number, payload, record)
            case "inter_agent_communication":
                return self._read_item(number, {**payload, "type": "agent_message"}, record)
            case "compacted":
                return self._read_compaction(number, payload)
            case "event_msg":
                return self._read_event(number, payload)
            case "session_meta":
                return self._read_session_meta(number, payload)
            case _:
                return self._read_other(number, kind, payload)

    def _read_old_record(self, number: int, record: Mapping[str, Any]) -> str | None:
        """Read a record of a session from before September 2025, which is an item."""
        if record.get("type") in ITEM_TYPES:
            return self._read_item(number, record, {})
        if "type" not in record and ("record_type" in record or "timestamp" in record):
            self.metadata.setdefault("session", record.get("id", ""))
            return "metadata"
        return self._check_unknown(number, str(record.get("type")))

    def _read_other(self, number: int, kind: str, payload: Mapping[str, Any]) -> str:
        if kind == "turn_context" and isinstance(payload.get("model"), str):
            self.models.append(payload["model"])
        return "metadata" if kind in _TYPES else self._check_unknown(number, kind)

    def _check_unknown(self, number: int, name: str, kind: str = "record type") -> str:
        program = f"Codex {self.metadata.get('version', '')}".rstrip()
        return check_unknown(number, kind, name, program, self.ignored)

    def _read_session_meta(self, number: int, payload: Mapping[str, Any]) -> str | None:
        if "session" in self.metadata:
            return "metadata"  # a fork contains the records of its source
        names = {"session": "id", "version": "cli_version", "cwd": "cwd", "parent_session": "parent_thread_id"}
        self.metadata |= {name: payload[key] for name, key in names.items() if payload.get(key)}
        if payload.get("history_base"):
            raise self._missing_context(number, "the session continues another session, which is in another file")
        if payload.get("forked_from_id"):
            self.anomalies["forked_session"] += 1
        self.first_new_ordinal = payload.get("subagent_history_start_ordinal") or 0
        self.item_reader.add_tools(payload.get("dynamic_tools"))
        instructions = payload.get("base_instructions")
        text = instructions.get("text") if isinstance(instructions, Mapping) else instructions
        if not text or not isinstance(text, str):
            return "metadata"
        self.system = [Step("message", {"role": "system", "content": text}, number)]
        return None

    def _missing_context(self, number: int, problem: str) -> BadRecord:
        return BadRecord(number, "missing_context", problem)

    def _read_item(self, number: int, item: Mapping[str, Any], record: Mapping[str, Any]) -> str | None:
        details = record.get("metadata")
        if isinstance(details, Mapping) and details.get("delivered_assistant_message"):
            return "duplicates"
        steps = self._convert(number, item)
        if isinstance(steps, str):
            return steps
        ordinal = record.get("ordinal")
        is_inherited = isinstance(ordinal, int) and ordinal < self.first_new_ordinal
        if is_inherited or get_mapping(record, "metadata").get("compaction_output"):
            steps = [step._replace(trained=False) for step in steps]
        self.history.append(_make_item(item, steps))
        return None

    def _convert(self, number: int, item: Mapping[str, Any]) -> list[Step] | str:
        raw = self._raw_reasoning(number) if item.get("type") == "reasoning" and not item.get("content") else ()
        steps = self.item_reader.read(item, number, raw)
        return self._check_unknown(number, f"response_item/{item.get('type')}") if steps is None else steps

    def _raw_reasoning(self, number: int) -> list[str]:
        """Return the reasoning in the events next to an item, which can be its only copy."""
        for direction in (-1, 1):
            texts, position = list[str](), number + direction
            while 0 <= position < len(self.records) and self.records[position].get("type") == "event_msg":
                payload = get_mapping(self.records[position], "payload")
                if payload.get("type") == "agent_reasoning_raw_content" and position not in self.used_events:
                    texts.append(str(payload.get("text", "")))
                    self.used_events.add(position)
                position += direction
            if texts:
                return texts[::direction]
        return []

    def _read_event(self, number: int, payload: Mapping[str, Any]) -> str:
        kind = str(payload.get("type"))
        if kind == "thread_rolled_back":
            self._roll_back(number, int(payload.get("num_turns") or 0))
        if kind in _ERRORS:
            return "errors"
        is_known = kind in _EVENTS or kind.endswith(_EVENT_ENDINGS)
        return "metadata" if is_known else self._check_unknown(number, f"event_msg/{kind}")

    def _roll_back(self, number: int, turns: int) -> None:
        """Remove the last turns from the history. Their context becomes a separate row."""
        turn_starts = [index for index, item in enumerate(self.history) if item.begins_turn]
        if not turns or not turn_starts:
            return
        new_turns = sum(index >= self.replacement_length for index in turn_starts)
        if self.replacement_length and turns > new_turns:
            problem = "a rollback removes turns from before a compaction, so the conversation after it is unknown"
            raise BadRecord(number, "unknown_history", problem)
        self._end_context(abandoned=True)
        cut = turn_starts[0] if turns >= len(turn_starts) else turn_starts[-turns]
        while cut > turn_starts[0] and self.history[cut - 1].is_inserted:
            cut -= 1
        del self.history[cut:]
        self.item_reader.end_response()

    def _read_compaction(self, number: int, payload: Mapping[str, Any]) -> str | None:
        """Replace the history with the items that the model saw after a compaction."""
        replacement, message = payload.get("replacement_history"), payload.get("message")
        self._exclude_summary(message)
        self._end_context(abandoned=False)
        if isinstance(replacement, list):
            self.history = [self._copy_item(number, item) for item in replacement if isinstance(item, Mapping)]
        else:
            # Versions before replacement_history kept the messages of the user, and added the summary.
            self.anomalies["approximate_context"] += 1
            summary = {"type": "message", "role": "user", "content": message or "(no summary available)"}
            copy = self._copy_item(number, summary)._replace(begins_turn=False)
            self.history = [item for item in self.history if item.begins_turn] + [copy]
        self.replacement_length = len(self.history)
        self.item_reader.end_response()
        return None if any(item.steps for item in self.history) else "metadata"

    def _exclude_summary(self, message: Any) -> None:
        """Exclude the summary from training: the log does not contain the request for it."""
        steps = self.history[-1].steps if self.history else ()
        is_summary = (
            isinstance(message, str)
            and steps
            and all(
                step.kind == "text" and isinstance(step.value, str) and message.endswith(step.value) for step in steps
            )
        )
        if is_summary:
            untrained = tuple(step._replace(trained=False) for step in steps)
            self.history[-1] = self.history[-1]._replace(steps=untrained)

    def _copy_item(self, number: int, item: Mapping[str, Any]) -> _Item:
        steps = self._convert(number, item)
        copies = () if isinstance(steps, str) else [step._replace(trained=False) for step in steps]
        return _make_item(item, copies)

    def _end_context(self, *, abandoned: bool) -> None:
        steps = [*self.system, *(step for item in self.history for step in item.steps)]
        if self.history:
            self.contexts.append((steps, [*self.item_reader.tools], abandoned))


def read_codex_session(records: Sequence[Mapping[str, Any]], ignored: frozenset[str] = frozenset()) -> Session:
    """Convert the records of a session file.

    Args:
        records: the records, in the order of the file.
        ignored: names of unknown types of records to ignore.

    Raises:
        BadRecord: `unknown_record_type`, `missing_context` or `unknown_history`.
    """
    reader = _Reader(records, ignored)
    reader.read()
    metadata = reader.metadata | {"models": list(dict.fromkeys(reader.models))}
    names = number_names("main", len(reader.contexts))
    contexts = [
        Context(name, steps, tools, {}, abandoned=abandoned)
        for name, (steps, tools, abandoned) in zip(names, reader.contexts, strict=True)
    ]
    anomalies = reader.anomalies + reader.item_reader.anomalies
    return Session("codex", len(records), contexts, reader.categories, metadata, anomalies)


def _make_item(item: Mapping[str, Any], steps: Sequence[Step]) -> _Item:
    role = item.get("role", "user") if item.get("type", "message") in ("message", "agent_message") else ""
    content = item.get("content")
    texts = [part.get("text") for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    texts = [content] if isinstance(content, str) else texts
    is_context = any(isinstance(text, str) and _CONTEXT_TEXT.match(text) for text in texts)
    begins_turn = role == "user" and not is_context
    return _Item(tuple(steps), begins_turn, role == "developer" or (role == "user" and is_context))
