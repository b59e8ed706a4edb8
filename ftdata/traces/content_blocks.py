"""Convert the content blocks of Anthropic's Messages API to steps. Several agents log the same blocks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ftdata.traces.steps import BadRecord, Step, make_call, make_content, make_result, to_text

_CALLS = ("tool_use", "server_tool_use", "mcp_tool_use", "toolCall")
_REASONING = ("thinking", "reasoning", "thought")


class BlockReader:
    """Converts the blocks of a record.

    Attributes:
        record: index of the record.
        anomalies: counts of irregularities, to which hidden reasoning is added.
        check_unknown: called with the name of an unknown type of block; raises an error unless the user ignores it.
    """

    def __init__(self, record: int, anomalies: Counter[str], check_unknown: Callable[[str], Any]) -> None:
        self.record, self.anomalies, self.check_unknown = record, anomalies, check_unknown

    def read_response(self, content: Any) -> tuple[list[Step], bool]:
        """Convert the content of a response. Return its steps, and whether it has reasoning without a text."""
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        steps, has_hidden = list[Step](), False
        for block in blocks:
            kind = self._kind_of(block)
            reasoning = "" if block.get("redacted") else block.get("thinking") or block.get("text")
            if kind in (*_REASONING, "redacted_thinking") and not reasoning:
                has_hidden = True
                self.anomalies["hidden_reasoning"] += 1
            elif kind in _REASONING:
                steps.append(Step("reasoning", reasoning, self.record))
            elif kind == "text":
                steps += [Step("text", block["text"], self.record)] if block.get("text") else []
            elif kind in _CALLS:
                arguments = block.get("input", block.get("arguments"))
                call = make_call(str(block.get("name")), arguments or {}, str(block.get("id", "")))
                steps.append(Step("call", call, self.record))
            elif kind.endswith("_tool_result"):
                text = to_text(block.get("content"))
                steps.append(Step("result", make_result(str(block.get("tool_use_id", "")), text), self.record))
            elif kind != "fallback":
                self.check_unknown(kind)
        return steps, has_hidden

    def read_user(self, content: Any) -> list[Step]:
        """Convert the content of a user message. The results of tool calls come before the other blocks."""
        blocks = content if isinstance(content, list) else [content]
        results = [block for block in blocks if isinstance(block, Mapping) and block.get("type") == "tool_result"]
        steps = [self._read_result(block) for block in results]
        texts = [block for block in blocks if not any(block is result for result in results)]
        if texts:
            steps.append(Step("message", {"role": "user", "content": self.read_parts(texts)}, self.record))
        return steps

    def _read_result(self, block: Mapping[str, Any]) -> Step:
        content, call_id = self.read_parts(block.get("content")), str(block.get("tool_use_id", ""))
        return Step("result", make_result(call_id, content, is_error=bool(block.get("is_error"))), self.record)

    def _kind_of(self, block: Any) -> str:
        if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
            problem = f"the content has the part {block!r:.60}, expected an object with a type"
            raise BadRecord(self.record, "trace_structure", problem)
        return str(block["type"])

    def read_parts(self, content: Any) -> Any:
        """Convert the content of a message or of a result: a text, or a list of texts and images."""
        parts = list[Any]()
        for block in content if isinstance(content, list) else [content]:
            kind = "" if isinstance(block, str) or block is None else self._kind_of(block)
            if not kind:
                parts.append(block or "")
            elif kind == "text":
                parts.append(block.get("text", ""))
            elif kind == "tool_reference":
                parts.append(json.dumps(block, ensure_ascii=False))
            elif kind == "image" and "mimeType" in block:
                source = {"type": "base64", "media_type": block["mimeType"], "data": block.get("data", "")}
                parts.append({"type": "image", "source": source})
            elif kind in ("image", "document", "search_result"):
                parts.append(dict(block))
            else:
                self.check_unknown(kind)
        return make_content(parts)
