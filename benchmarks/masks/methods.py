"""Call ftdata with the interface of the benchmark: (tokenizer, messages, tools) -> (ids, trained, flags)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftdata import encode

Method = Callable[
    [Any, list[dict[str, Any]], list[dict[str, Any]] | None], tuple[list[int], list[bool], frozenset[str]]
]


def ours(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> tuple[list[int], list[bool], frozenset[str]]:
    """Encode a conversation. Control tokens in the data stay control tokens, so that the ids can be compared."""
    (example,) = encode(
        messages, tokenizer, tools=tools, turns="joint", control_tokens="allow", date="2026-01-15T10:30:00"
    )
    return example.input_ids.tolist(), example.trained.tolist(), example.flags
