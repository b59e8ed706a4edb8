"""The truth about a mask, found without ftdata: by rendering a conversation again with small changes.

A turn begins where the generation prompt of the messages before it ends. Its text ends where a letter put after the
answer appears. Its stop is the EOS token, or else the only control token, of what the template prints after the
answer where the conversation ends there. Where these do not give one certain answer there is no truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from corpus import SPECIAL

Render = Callable[[Sequence[dict[str, Any]], bool], str]


def spans_of(messages: list[dict[str, Any]], eos: str, render: Render) -> list[tuple[int, int]] | None:
    """Return the trained regions of a conversation in characters of its text, `None` where they are not certain."""
    text = render(messages, False)
    found: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, alone = render(messages[:turn], True), render(messages[: turn + 1], False)
        end = _answer_end(messages, turn, text, render)
        if end is None or not text.startswith(prompt) or not text.startswith(alone) or len(prompt) > end:
            return None
        stop = _stop_end(alone[end:], eos)
        if stop is None:
            return None
        found.append((len(prompt), end + stop))
    return found


def _answer_end(messages: list[dict[str, Any]], turn: int, text: str, render: Render) -> int | None:
    content = messages[turn].get("content")
    if not isinstance(content, str) or not content.strip():
        return None
    # Whether the last blanks of an answer are cut off is seen by what stands before the letter.
    ends = set()
    for letter in "qz":
        changed = dict(messages[turn], content=content + letter)
        longer = render([*messages[:turn], changed, *messages[turn + 1 :]], False)
        at = next(
            (n for n, (a, b) in enumerate(zip(text, longer, strict=False)) if a != b), min(len(text), len(longer))
        )
        if longer[at : at + 1] != letter or longer[:at] + longer[at + 1 :] != text:
            return None
        ends.add(at)
    return ends.pop() if len(ends) == 1 else None


def _stop_end(tail: str, eos: str) -> int | None:
    if eos in tail:
        return tail.index(eos) + len(eos)
    tokens = list(SPECIAL.finditer(tail))
    # Of two, the second may be what asks for the next answer.
    return tokens[0].end() if len(tokens) == 1 and not tail[tokens[0].end() :].strip() else None
