"""Convert sessions of Factory's droid: the files in `~/.factory/sessions`.

The format has no official description. Messages have Anthropic's content blocks and form a tree by `parentId`. After a
compaction, the model sees a summary and the messages after its anchor. The system prompt and the tools are not logged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftdata.traces.content_blocks import BlockReader
from ftdata.traces.rows import Session
from ftdata.traces.steps import BadRecord, Context, Step, check_unknown, convert_structure_errors, get_mapping
from ftdata.traces.tree import Node, connect_nodes, find_abandoned, leaf_paths, missing_parent, path_steps

_METADATA = {"agent_turn_outcome", "session_end", "session_settings", "session_start", "todo_state"}


def is_droid_record(record: Mapping[str, Any]) -> bool:
    """Return whether an object is the first record of a droid session."""
    return record.get("type") == "session_start" and ("id" in record or "session" in record)


class _Reader:
    """Reads the records of a session in order.

    Attributes:
        categories: category of each record that is in no node, by index.
        nodes: the nodes, in the order of their first records.
        owners: the node of each message, by its id.
        compactions: index of the record of each compaction, by its id.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], ignored: frozenset[str]) -> None:
        self.records, self.ignored = records, ignored
        self.categories = dict[int, str]()
        self.anomalies = Counter[str]()
        self.nodes = list[Node]()
        self.owners = dict[str, Node | None]()
        self.compactions = dict[str, int]()
        self.models = list[str]()

    def read(self) -> None:
        previous: Node | None = None
        for number, record in enumerate(self.records):
            kind = str(record.get("type"))
            if kind == "compaction_state":
                self.compactions[str(record.get("id"))] = number
                self.anomalies["approximate_context"] += 1
            elif kind != "message":
                self.categories[number] = "metadata" if kind in _METADATA else self._check_unknown(number, kind)
            elif record.get("id") in self.owners:
                self.categories[number] = "duplicates"
            else:
                parent = self._find_parent(number, record) if record.get("parentId") else previous
                with convert_structure_errors(number):
                    steps, category = self._read_message(number, record)
                if category is not None:
                    self.categories[number] = category
                    self.owners[str(record.get("id"))] = parent
                    continue
                previous = Node(parent, is_response=False, steps=steps, records=[number])
                self.nodes.append(previous)
                self.owners[str(record.get("id"))] = previous

    def _find_parent(self, number: int, record: Mapping[str, Any]) -> Node | None:
        parent = record["parentId"]
        if parent not in self.owners:
            raise missing_parent(number, parent, "parentId")
        return self.owners[parent]

    def _read_message(self, number: int, record: Mapping[str, Any]) -> tuple[list[Step], str | None]:
        message = record.get("message")
        if not isinstance(message, Mapping):
            raise BadRecord(number, "record_type", "the record has no message", field="message")
        if message.get("visibility") == "user_only":
            return [], "metadata"
        blocks = BlockReader(number, self.anomalies, lambda name: self._check_unknown(number, name, "content type"))
        if message.get("role") == "user":
            return blocks.read_user(message.get("content")), None
        if message.get("role") != "assistant":
            return [], self._check_unknown(number, f"{message.get('role')}", "role")
        self.models += [message["modelId"]] if isinstance(message.get("modelId"), str) else []
        steps, has_hidden = blocks.read_response(message.get("content"))
        summary = message.get("openaiReasoningSummary")
        if isinstance(summary, str) and summary and not any(step.kind == "reasoning" for step in steps):
            self.anomalies["summarized_reasoning"] += 1
            steps.insert(0, Step("reasoning", summary, number))
        if not steps:
            return [], "missing_content" if has_hidden else "metadata"
        return [step._replace(response=number) for step in steps], None

    def _check_unknown(self, number: int, name: str, kind: str = "record type") -> str:
        program = f"droid (session version {self.records[0].get('version', 'unknown')})"
        return check_unknown(number, kind, name, program, self.ignored)

    def contexts(self) -> Iterator[Context]:
        """Yield a context for each leaf, and for each compaction on the path to it."""
        connect_nodes(self.nodes)
        paths, abandoned_nodes = leaf_paths(self.nodes), find_abandoned(self.nodes)
        for number, path in enumerate(paths):
            windows = [*self._split_windows(path)]
            for index, steps in enumerate(windows):
                numbers = [str(number + 1)] * (len(paths) > 1) + [str(index + 1)] * (len(windows) > 1)
                abandoned = path[-1] in abandoned_nodes and index == len(windows) - 1
                yield Context("/".join(["main", *numbers]), steps, (), {}, abandoned=abandoned)

    def _split_windows(self, path: Sequence[Node]) -> Iterator[list[Step]]:
        """Yield the steps of each context window: from the beginning, or from a summary, to the next compaction."""
        window, summary = list[Node](), list[Step]()
        current = None
        for node in path:
            compaction = self.records[node.records[0]].get("compactionSummaryId")
            if compaction is not None and compaction != current:
                if window:
                    yield [*summary, *path_steps(window)]
                number = self.compactions.get(str(compaction))
                if number is None:
                    problem = f"the session does not contain the compaction {compaction} that the message refers to"
                    raise BadRecord(node.records[0], "missing_parent", problem, field="compactionSummaryId")
                current, summary = compaction, [self._summary(number)]
                window = self._after_anchor(window, number)
            window.append(node)
        yield [*summary, *path_steps(window)]

    def _summary(self, number: int) -> Step:
        record = self.records[number]
        text = str(record.get("summaryText") or get_mapping(record, "summary").get("body") or "")
        return Step("message", {"role": "user", "content": text}, number)

    def _after_anchor(self, window: Sequence[Node], number: int) -> list[Node]:
        """Return the nodes after the last message that a compaction replaced."""
        anchor = (self.records[number].get("anchorMessage") or {}).get("id")
        node = self.owners.get(str(anchor))
        positions = [index for index, item in enumerate(window) if item is node]
        return [*window[positions[0] + 1 :]] if positions else []


def read_droid_session(records: Sequence[Mapping[str, Any]], ignored: frozenset[str] = frozenset()) -> Session:
    """Convert the records of a session file.

    Args:
        records: the records, in the order of the file.
        ignored: names of unknown types of records to ignore.

    Raises:
        BadRecord: `unknown_record_type`, `record_type` or `missing_parent`.
    """
    reader = _Reader(records, ignored)
    reader.read()
    contexts = [*reader.contexts()]
    # A compaction that no message refers to has no effect on the conversation.
    used = {step.record for context in contexts for step in context.steps}
    unused = {number: "metadata" for number in reader.compactions.values() if number not in used}
    header = records[0]
    names = {"session": "id", "cwd": "cwd", "version": "version", "parent_session": "callingSessionId"}
    metadata = {name: header[key] for name, key in names.items() if header.get(key)}
    metadata["models"] = list(dict.fromkeys(reader.models))
    return Session("droid", len(records), contexts, reader.categories | unused, metadata, reader.anomalies)
