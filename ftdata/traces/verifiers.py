"""Convert rollouts that verifiers saved: rows of `results.jsonl`, and traces and episodes of `traces.jsonl`.

Rows contain a prompt and a completion. Traces contain the messages as nodes of a tree, and each path from the root to a
leaf is a conversation. Only messages that the model sampled are trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftdata.errors import BadRow
from ftdata.traces.calls import Call, join_calls, message_steps
from ftdata.traces.rows import Session
from ftdata.traces.steps import Context, Step, get_mapping, number_names, read_call
from ftdata.traces.tools import read_tool
from ftdata.traces.tree import Node, connect_nodes, leaf_paths, path_steps

_ROLES = ("system", "user", "assistant", "tool", "developer")


_COMPACTED = "--- context compacted ---"
"""The message between two context windows of a rollout."""

_TYPICAL_COLUMNS = {"generation_ms", "is_completed", "timing", "stop_condition", "token_usage", "tool_defs"}
"""Columns of a saved rollout, one of which each version writes."""


def is_verifiers_document(data: Mapping[str, Any]) -> bool:
    """Return whether an object is a rollout, a trace or an episode of verifiers."""
    if "messages" in data:
        return False
    if "task" in data and _has_objects(data.get("nodes"), "message"):
        return True
    if "env" in data and isinstance(data.get("traces"), list):
        return not data["traces"] or _has_objects(data["traces"], "nodes")
    if "task" in data and _has_objects(data.get("trajectory"), "prompt"):
        return True
    is_rollout = isinstance(data.get("prompt"), list) and isinstance(data.get("completion"), list)
    has_typical_column = not _TYPICAL_COLUMNS.isdisjoint(data) or {"example_id", "error"} <= data.keys()
    return is_rollout and "reward" in data and has_typical_column


def _has_objects(value: Any, key: str) -> bool:
    """Return whether a value is a list of objects with a key."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) and key in item for item in value)


def read_verifiers_document(
    data: Mapping[str, Any],
    ignored: frozenset[str] = frozenset(),  # noqa: ARG001  (the format has no unknown types)
) -> Iterator[Session]:
    """Yield the session of a rollout or a trace, or the sessions of the traces of an episode.

    Raises:
        BadRow: `trace_structure`, if a message is invalid.
    """
    if isinstance(data.get("traces"), list):
        if not data["traces"]:
            raise BadRow("no_answer", "the episode contains no trace", field="traces")
        for trace in data["traces"]:
            yield _read_trace({"task": data.get("task"), **trace})
    elif isinstance(data.get("nodes"), list):
        yield _read_trace(data)
    elif isinstance(data.get("trajectory"), list) and data["trajectory"]:
        yield _read_calls(data)
    else:
        yield _read_rollout(data)


def _metadata(data: Mapping[str, Any]) -> dict[str, Any]:
    rewards = get_mapping(data, "rewards")
    scores = [reward for reward in rewards.values() if reward is not None]
    total = sum(score["score"] * score.get("weight", 1) if isinstance(score, Mapping) else score for score in scores)
    error = data.get("error") or data.get("errors")
    values = {
        "session": str(data.get("id") or data.get("example_id") or ""),
        "reward": data.get("reward", total if scores else None),
        "failed": bool(error),
    }
    return {name: value for name, value in values.items() if value is not None}


def _read_message(message: Any, number: int, field: str) -> dict[str, Any]:
    """Convert a message, whose tool calls can be JSON texts."""
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        value = message.get("role") if isinstance(message, Mapping) else message
        raise BadRow("trace_structure", f"the role is {value!r:.60}, expected one of {', '.join(_ROLES)}", field=field)
    keys = ("role", "content", "reasoning_content", "tool_call_id", "name")
    standard = {key: message[key] for key in keys if message.get(key) is not None}
    standard.setdefault("content", "")
    if calls := message.get("tool_calls"):
        standard["tool_calls"] = [read_call(call, f"call_{number}_{position}") for position, call in enumerate(calls)]
    return standard


def _pair_results(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the ids of calls to results without an id, which old versions did not save. Results are in call order."""
    paired, pending = list[dict[str, Any]](), list[str]()
    for message in messages:
        if message["role"] == "assistant":
            pending = [call["id"] for call in message.get("tool_calls", ())]
        elif message["role"] == "tool":
            call_id = message.get("tool_call_id") or (pending[0] if pending else "")
            if call_id in pending:
                pending.remove(call_id)
            paired.append({**message, "tool_call_id": call_id})
            continue
        paired.append(message)
    return paired


def _read_tools(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    tools = data.get("tool_defs") or data.get("tools") or get_mapping(data, "info").get("oai_tools")
    return [read_tool(tool) for tool in tools or () if isinstance(tool, Mapping)]


def _read_rollout(data: Mapping[str, Any]) -> Session:
    fields = [("prompt", message) for message in data["prompt"]]
    fields += [("completion", message) for message in data["completion"]]
    messages = _pair_results(
        [_read_message(message, number, f"{name}[{number}]") for number, (name, message) in enumerate(fields)]
    )
    windows, categories = [list[Step]()], dict[int, str]()
    for number, message in enumerate(messages):
        if message["role"] == "system" and message["content"] == _COMPACTED:
            windows.append([])
            categories[number] = "metadata"
            continue
        is_truncated = bool(data.get("is_truncated")) and number == len(messages) - 1
        trained = number >= len(data["prompt"]) and not is_truncated
        parts = message_steps(message, number, number, trained=trained)
        windows[-1] += parts
        if not parts:
            categories[number] = "metadata"
    tools = _read_tools(data)
    names = number_names("main", len(windows))
    contexts = [Context(name, steps, tools) for name, steps in zip(names, windows, strict=True)]
    return Session("verifiers", len(messages), contexts, categories, _metadata(data), Counter())


def _read_calls(data: Mapping[str, Any]) -> Session:
    """Read a rollout that saved each call of the model."""
    calls = list[Call]()
    for number, turn in enumerate(data["trajectory"]):
        field = f"trajectory[{number}]"
        prompt = [_read_message(message, number, f"{field}.prompt") for message in turn["prompt"]]
        answers = turn.get("completion") or [turn["response"]["message"]]
        output = [_read_message(message, number, f"{field}.completion") for message in answers]
        calls.append(Call(number, "", _pair_results(prompt), [output]))
    conversations = [*join_calls(calls, Counter())]
    contexts = [
        Context(name, conversation.steps, _read_tools(data))
        for name, conversation in zip(number_names("main", len(conversations)), conversations, strict=True)
    ]
    return Session("verifiers", len(calls), contexts, {}, _metadata(data), Counter())


def _read_trace(data: Mapping[str, Any]) -> Session:
    nodes, untrained = list[Node](), _untrained_nodes(data)
    categories = dict[int, str]()
    for number, item in enumerate(data["nodes"]):
        message = _read_message(item.get("message"), number, f"nodes[{number}].message")
        parent = item.get("parent")
        if parent is not None and not 0 <= parent < number:
            raise BadRow("trace_structure", f"is {parent}, expected an earlier node", field=f"nodes[{number}].parent")
        node = Node(None if parent is None else nodes[parent], is_response=False, records=[number])
        trained = bool(item.get("sampled")) and number not in untrained
        node.steps = message_steps(message, number, number, trained=trained)
        if not node.steps:
            categories[number] = "metadata"
        nodes.append(node)
    connect_nodes(nodes)
    agent = get_mapping(data, "agent")
    label, paths = str(agent.get("name") or "main"), leaf_paths(nodes)
    contexts = []
    for name, path in zip(number_names(label, len(paths)), paths, strict=True):
        root = data["nodes"][path[0].records[0]]
        contexts.append(Context(name, path_steps(path), _read_tools(root if root.get("tools") else data)))
    return Session("verifiers", len(nodes), contexts, categories, _metadata(data), Counter())


def _untrained_nodes(data: Mapping[str, Any]) -> set[int]:
    """Return the nodes of agents that are not trained, and of attempts at a compaction that were not used."""
    if get_mapping(data, "agent").get("trainable") is False:
        return set(range(len(data["nodes"])))
    links = [
        (number, link.get("node"), link.get("type"))
        for number, item in enumerate(data["nodes"])
        for link in item.get("semantic_parents") or ()
    ]
    used = {source for _, source, kind in links if kind == "compaction"}
    return {number for number, _, kind in links if kind == "compaction_attempt" and number not in used}
