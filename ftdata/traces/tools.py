"""Convert tool definitions to the format of chat completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def join_names(namespace: Any, name: Any) -> str:
    """Return the name of a tool with its namespace, in the form that Codex uses for the tools of MCP servers."""
    return f"{namespace}__{name}" if namespace else str(name)


def read_tool(tool: Mapping[str, Any], namespace: Any = None) -> dict[str, Any]:
    """Return a tool definition in the format of chat completions."""
    if isinstance(tool.get("function"), Mapping) or ("name" not in tool and "type" in tool):
        return dict(tool)
    parameters = next(
        (tool[key] for key in ("parameters", "input_schema", "inputSchema") if tool.get(key) is not None), None
    )
    if parameters is None and "format" in tool:
        # A custom tool takes a text. Its calls have the same single argument.
        parameters = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    name = join_names(namespace or tool.get("namespace"), tool.get("name"))
    fields = {"name": name, "description": tool.get("description"), "parameters": parameters}
    return {"type": "function", "function": {key: value for key, value in fields.items() if value is not None}}
