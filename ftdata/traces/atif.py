"""Convert trajectories in the Agent Trajectory Interchange Format (ATIF) of Harbor, versions 1.0 to 1.8.

A trajectory is an object with steps. A step of the agent contains a response of the model with its tool calls and their
results. Trajectories of sub-agents can be embedded. Steps that were copied from an earlier trajectory are not trained.
"""

from __future__ import annotations

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
    check_unknown,
    get_mapping,
    make_call,
    make_content,
    make_result,
    number_names,
)
from ftdata.traces.tools import read_tool

_VERSION = re.compile(r"ATIF-v1\.([0-8])")
_HANDOFF = "Performed context summarization and handoff"
"""The beginning of the step with which Terminus replaces the context, in files without `context_management`."""

_STEP_KEYS = {
    "step_id", "timestamp", "source", "message", "model_name", "reasoning_effort", "reasoning_content", "tool_calls",
    "metrics", "observation", "is_copied_context", "llm_call_count", "extra",
}  # fmt: skip
_TRAJECTORY_KEYS = {
    "schema_version", "session_id", "trajectory_id", "agent", "steps", "notes", "final_metrics",
    "continued_trajectory_ref", "extra", "subagent_trajectories",
}  # fmt: skip


def is_atif_document(data: Mapping[str, Any]) -> bool:
    """Return whether an object is a trajectory."""
    return str(data.get("schema_version")).startswith("ATIF-") and isinstance(data.get("steps"), list)


def read_atif_document(
    data: Mapping[str, Any], ignored: frozenset[str] = frozenset(), field: str = ""
) -> Iterator[Session]:
    """Yield the session of a trajectory, and the sessions of the sub-agents that it contains.

    Args:
        data: the trajectory.
        ignored: names of unknown keys to ignore.
        field: path of the trajectory in the row.

    Raises:
        BadRow: `unknown_record_type`, `trace_version` or `trace_structure`.
    """
    version = str(data.get("schema_version", "ATIF-v1.8"))
    if not _VERSION.fullmatch(version):
        problem = f"is {version!r}, expected one of ATIF-v1.0 to ATIF-v1.8"
        raise BadRow("trace_version", problem, field=f"{field}schema_version", hint="convert it to a supported version")
    for key in data.keys() - _TRAJECTORY_KEYS:
        check_unknown(0, "key", key, version, ignored)
    yield _Trajectory(data, version, ignored, field).read()
    for number, child in enumerate(data.get("subagent_trajectories") or ()):
        yield from read_atif_document(
            {"schema_version": version, **child}, ignored, f"{field}subagent_trajectories[{number}]."
        )


class _Trajectory:
    def __init__(self, data: Mapping[str, Any], version: str, ignored: frozenset[str], field: str) -> None:
        self.data, self.version, self.ignored, self.field = data, version, ignored, field
        self.anomalies = Counter[str]()
        self.categories = dict[int, str]()

    def read(self) -> Session:
        data = self.data
        agent = get_mapping(data, "agent")
        windows, window = list[list[Step]](), list[Step]()
        for number, step in enumerate(data["steps"]):
            steps = self._read_step(number, step)
            if not steps:
                self.categories[number] = "metadata"
            self.anomalies["shortened_context"] += _boundary_of(step) in ("truncate", "prune")
            if _replaces_context(step):
                windows.append(window)
                window = []
                self.anomalies["approximate_context"] += not any(step.kind == "message" for step in steps)
            window = window + steps
        windows.append(window)
        tools = [read_tool(tool) for tool in agent.get("tool_definitions") or () if isinstance(tool, Mapping)]
        label = str(data.get("trajectory_id") or "sub-agent") if self.field else "main"
        names = number_names(label, len(windows))
        contexts = [Context(name, steps, tools) for name, steps in zip(names, windows, strict=True)]
        models = dict.fromkeys([agent.get("model_name"), *(step.get("model_name") for step in data["steps"])])
        metadata = {
            "version": self.version,
            "session": str(data.get("session_id") or data.get("trajectory_id") or ""),
            "agent": str(agent.get("name", "")),
            "models": [model for model in models if model],
        }
        return Session("atif", len(data["steps"]), contexts, self.categories, metadata, self.anomalies)

    def _read_step(self, number: int, step: Any) -> list[Step]:
        if not isinstance(step, Mapping) or step.get("source") not in ("system", "user", "agent"):
            value = step.get("source") if isinstance(step, Mapping) else step
            problem = f"is {value!r:.60}, expected system, user or agent"
            raise self._bad_step(number, problem, ".source")
        for key in sorted(key for key in step.keys() - _STEP_KEYS if step[key] is not None):
            check_unknown(number, "key", key, f"{self.version} in {self.field}steps[{number}]", self.ignored)
        if step["source"] == "agent":
            steps = self._read_response(number, step)
        else:
            content = self._read_content(step.get("message"), number)
            role = step["source"]
            steps = [Step("message", {"role": role, "content": content}, number)] if content else []
            if role == "system" and _replaces_context(step):
                steps = []  # The step reports the replacement, and the model sees only its results.
        observation = step.get("observation") or {}
        return steps + [self._read_result(number, result, step) for result in observation.get("results") or ()
                        if result.get("content") is not None]  # fmt: skip

    def _read_response(self, number: int, step: Mapping[str, Any]) -> list[Step]:
        # The program wrote a step without a call of the model. A copied step is trained in its own trajectory.
        trained = not step.get("is_copied_context") and step.get("llm_call_count") != 0
        parts = list[tuple[str, Any]]()
        if reasoning := step.get("reasoning_content"):
            parts.append(("reasoning", reasoning))
        content = self._read_content(step.get("message"), number)
        parts += [("text", text) for text in ([content] if isinstance(content, str) else content) if text]
        for position, call in enumerate(step.get("tool_calls") or ()):
            if not isinstance(call, Mapping) or not isinstance(call.get("function_name"), str):
                field = f".tool_calls[{position}].function_name"
                raise self._bad_step(number, "the tool call has no function name", field)
            arguments = call.get("arguments")
            parts.append(("call", make_call(call["function_name"], arguments or {}, str(call.get("tool_call_id", "")))))
        if step.get("llm_call_count") and step["llm_call_count"] > 1:
            self.anomalies["merged_responses"] += 1
        return [Step(kind, value, number, number, trained) for kind, value in parts]

    def _read_result(self, number: int, result: Mapping[str, Any], step: Mapping[str, Any]) -> Step:
        content = self._read_content(result["content"], number)
        calls: Sequence[Any] = step.get("tool_calls") or ()
        call_id = result.get("source_call_id")
        if call_id is None and len(calls) == 1:
            call_id = calls[0].get("tool_call_id")
        if call_id is None:
            # Several calls share the result.
            self.anomalies["results_without_call_id"] += 1
            return Step("message", {"role": "user", "content": content}, number)
        return Step("result", make_result(str(call_id), content), number)

    def _read_content(self, content: Any, number: int) -> Any:
        if content is None or isinstance(content, str):
            return content or ""
        parts = list[Any]()
        for part in content if isinstance(content, list) else [content]:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text":
                parts.append(part.get("text", ""))
            elif kind == "image" and isinstance(part.get("source"), Mapping):
                parts.append({"type": "image", "path": part["source"].get("path")})
            elif kind == "audio":
                parts.append(dict(part))
            else:
                raise self._bad_step(number, f"is {part!r:.60}, expected a text, image or audio", ".message")
        return make_content(parts)

    def _bad_step(self, number: int, problem: str, field: str) -> BadRecord:
        return BadRecord(number, "trace_structure", problem, field=f"{self.field}steps[{number}]{field}")


def _replaces_context(step: Mapping[str, Any]) -> bool:
    """Return whether the model no longer saw the steps before a step."""
    is_handoff = step.get("source") == "system" and str(step.get("message")).startswith(_HANDOFF)
    return _boundary_of(step) == "replace" or is_handoff


def _boundary_of(step: Mapping[str, Any]) -> Any:
    return get_mapping(get_mapping(step, "extra"), "context_management").get("boundary")
