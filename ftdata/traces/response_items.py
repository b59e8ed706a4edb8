"""Convert the items of OpenAI's Responses API to steps. Codex logs the same items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ftdata.traces.steps import Step, make_call, make_content, make_result, to_text
from ftdata.traces.tools import join_names, read_tool

_CALLS = {
    "apply_patch_call": ("apply_patch", "operation"),
    "computer_call": ("computer", "action"),
    "local_shell_call": ("local_shell", "action"),
    "program": ("program", "code"),
    "shell_call": ("shell", "action"),
    "tool_search_call": ("tool_search", "arguments"),
}
"""Calls of built-in tools whose result is a separate item -> name of the tool, and key of the arguments."""

_SERVER_CALLS = {
    "code_interpreter_call": ("code_interpreter", ("code",), "outputs"),
    "file_search_call": ("file_search", ("queries",), "results"),
    "image_generation_call": ("image_generation", ("revised_prompt",), "result"),
    "web_search_call": ("web_search", ("action",), None),
}
"""Calls that the server runs -> name of the tool, keys of the arguments, and key of the result in the item."""

_RESULTS = {
    "apply_patch_call_output", "computer_call_output", "custom_tool_call_output", "function_call_output",
    "local_shell_call_output", "program_output", "shell_call_output", "tool_search_output",
}  # fmt: skip
_METADATA = {"compaction_trigger", "configuration_update", "ghost_snapshot", "mcp_approval_request",
             "mcp_approval_response"}  # fmt: skip
_ENCRYPTED = {"compaction", "compaction_summary", "context_compaction"}

ITEM_TYPES = {
    "message", "reasoning", "function_call", "custom_tool_call", "agent_message", "mcp_call", "mcp_list_tools",
    "additional_tools", "item_reference", *_CALLS, *_SERVER_CALLS, *_RESULTS, *_METADATA, *_ENCRYPTED,
}  # fmt: skip
"""All known types of items."""

_ROLES = ("user", "system", "developer")


class ItemReader:
    """Converts items in order. Consecutive items of the model belong to one response.

    Attributes:
        tools: the tool definitions in the items so far.
        anomalies: counts of irregularities.
    """

    def __init__(self) -> None:
        self.tools = list[dict[str, Any]]()
        self.anomalies = Counter[str]()
        self._response, self._has_text = 0, False

    def read(  # noqa: PLR0911  (one per type)
        self, item: Mapping[str, Any], record: int, raw_reasoning: Sequence[str] = ()
    ) -> list[Step] | str | None:
        """Convert an item to steps.

        Args:
            item: the item.
            record: index of its record in the session.
            raw_reasoning: the text of a reasoning item, if another record contains it.

        Returns:
            The steps; the category of an item without steps; or `None` if the type of the item is unknown.
        """
        kind = item.get("type") or ("message" if "role" in item else "item_reference" if "id" in item else None)
        if kind == "message" and item.get("role") == "assistant":
            return self._read_answer(item, record)
        if kind == "reasoning":
            return self._read_reasoning(item, record, raw_reasoning)
        if kind in ("message", "agent_message"):
            return self._read_input(item, record)
        if kind in _RESULTS:
            return self._read_result(item, record)
        if call := _read_call(str(kind), item, record):
            return [Step("call", call, record, self._response)]
        if kind in _SERVER_CALLS or kind == "mcp_call":
            return self._read_server_call(str(kind), item, record)
        if kind in ("additional_tools", "mcp_list_tools"):
            self.add_tools(item.get("tools"), item.get("server_label"))
            return "metadata"
        if kind in _ENCRYPTED:
            self.anomalies["encrypted_summaries"] += 1
            return "missing_content"
        return "metadata" if kind in _METADATA else None

    def end_response(self) -> None:
        """Begin a new response with the next item of the model."""
        self._response += 1
        self._has_text = False

    def add_tools(self, tools: Any, namespace: Any = None) -> None:
        """Add tool definitions, in the format of the Responses API, to the tools of the conversation."""
        for tool in tools if isinstance(tools, list) else []:
            if isinstance(tool, Mapping) and tool.get("type") == "namespace":
                self.add_tools(tool.get("tools"), tool.get("name"))
            elif isinstance(tool, Mapping) and (definition := read_tool(tool, namespace)) not in self.tools:
                self.tools.append(definition)

    def _read_answer(self, item: Mapping[str, Any], record: int) -> list[Step] | str:
        texts = [text for text in _read_content(item.get("content")) if text != ""]
        if not texts:
            return "metadata"
        if self._has_text:
            self.end_response()
        self._has_text = True
        return [Step("text", text, record, self._response) for text in texts]

    def _read_reasoning(self, item: Mapping[str, Any], record: int, raw_reasoning: Sequence[str]) -> list[Step] | str:
        raw = [str(part.get("text", "")) for part in item.get("content") or () if isinstance(part, Mapping)]
        texts = [text for text in raw or raw_reasoning if text]
        if not texts:
            texts = [str(part.get("text", "")) for part in item.get("summary") or () if isinstance(part, Mapping)]
            if not any(texts):
                self.anomalies["hidden_reasoning"] += 1
                return "missing_content"
            self.anomalies["summarized_reasoning"] += 1
        return [Step("reasoning", text, record, self._response) for text in texts if text]

    def _read_input(self, item: Mapping[str, Any], record: int) -> list[Step] | None:
        self.end_response()
        role = item.get("role", "user") if item.get("type", "message") == "message" else "user"
        if role not in _ROLES:
            return None
        name = {"name": str(item["author"])} if item.get("author") else {}
        content = make_content(_read_content(item.get("content")))
        return [Step("message", {"role": role, **name, "content": content}, record)]

    def _read_result(self, item: Mapping[str, Any], record: int) -> list[Step]:
        self.end_response()
        self.add_tools(item.get("tools"))
        value = next((item[key] for key in ("output", "result", "tools") if item.get(key) is not None), "")
        call_id = str(item.get("call_id") or item.get("id") or "")
        name = item.get("name")
        result = make_result(call_id, _read_output(value), name=name if isinstance(name, str) else None)
        return [Step("result", result, record)]

    def _read_server_call(self, kind: str, item: Mapping[str, Any], record: int) -> list[Step] | str:
        """Convert a call that the server ran, and its result in the same item.

        A call whose result was not logged is left out: the model must not learn to continue without a result.
        """
        call_id = str(item.get("id") or f"call_{record}")
        if kind == "mcp_call":
            name, result = f"{item.get('server_label')}__{item.get('name')}", item.get("output") or item.get("error")
            arguments: Any = item.get("arguments") or "{}"
        else:
            name, keys, result_key = _SERVER_CALLS[kind]
            arguments = {key: item[key] for key in keys if item.get(key) is not None}
            result = item.get(result_key) if result_key else None
        if not result:
            self.anomalies["server_calls_without_result"] += 1
            return "missing_content"
        call = Step("call", make_call(name, arguments, call_id), record, self._response)
        self.end_response()
        return [call, Step("result", make_result(call_id, _read_output(result)), record)]


def _read_call(kind: str, item: Mapping[str, Any], record: int) -> dict[str, Any] | None:
    """Return the tool call of an item whose result is another item; `None` for other items."""
    call_id = str(item.get("call_id") or item.get("id") or f"call_{record}")
    name = join_names(item.get("namespace"), item.get("name"))
    if kind == "function_call":
        return make_call(name, item.get("arguments") or "{}", call_id)
    if kind == "custom_tool_call":
        return make_call(name, {"input": item.get("input", "")}, call_id)
    if kind not in _CALLS:
        return None
    tool, key = _CALLS[kind]
    value = item.get(key) if item.get(key) is not None else item.get("actions", {})
    return make_call(tool, value if isinstance(value, Mapping | str) and key != "code" else {key: value}, call_id)


def _read_content(content: Any) -> list[Any]:
    """Return the parts of a message: texts and images, and other parts unchanged."""
    parts = list[Any]()
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str) or part is None:
            parts.append(part or "")
        elif kind in ("input_text", "output_text", "text", "summary_text", "reasoning_text"):
            parts.append(part.get("text", ""))
        elif kind == "refusal":
            parts.append(part.get("refusal", ""))
        elif kind == "input_image" and isinstance(part.get("image_url"), str):
            parts.append({"type": "image_url", "image_url": {"url": part["image_url"]}})
        else:
            parts.append(dict(part) if isinstance(part, Mapping) else part)
    return parts


def _read_output(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        parts = _read_content(value)
        types = {"input_text", "output_text", "text", "input_image"}
        if value and all(part.get("type") in types for part in value):
            return make_content(parts)
    return to_text(value)
