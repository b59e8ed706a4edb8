"""Determine the correct mask of a conversation without ftdata, by rendering the conversation again with small changes.

A turn begins at the end of the rendered prompt: the messages before the turn, with the generation prompt. To find the
end of the answer, a character is appended to the answer, and its position in the rendered text is searched. The stop
token is the EOS token, or otherwise the only control token, in the text that the template prints after the last answer.
If these steps do not give exactly one result, the correct mask is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from corpus import SPECIAL

Render = Callable[[Sequence[dict[str, Any]], bool], str]


def spans_of(messages: list[dict[str, Any]], eos: str, render: Render, first: int = 0) -> list[tuple[int, int]] | None:
    """Return the trained character ranges of the turns from message `first` on, or `None` if they are not certain."""
    text = render(messages, False)
    found: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or turn < first:
            continue
        prompt, alone = render(messages[:turn], True), render(messages[: turn + 1], False)
        end = _answer_end(messages, turn, text, render)
        if end is None or not text.startswith(prompt) or not text.startswith(alone) or len(prompt) > end:
            return None
        end = max(end, _calls_end(message, alone))
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


def _calls_end(message: dict[str, Any], text: str) -> int:
    """Return the end of the last argument of the tool calls in a text that ends with this message."""
    arguments = [value for call in message.get("tool_calls", ()) for value in call["function"]["arguments"].values()]
    return max((text.rindex(value) + len(value) for value in arguments), default=0)


def _stop_end(tail: str, eos: str) -> int | None:
    if eos in tail:
        return tail.index(eos) + len(eos)
    tokens = list(SPECIAL.finditer(tail))
    # Of two, the second may be what asks for the next answer.
    return tokens[0].end() if len(tokens) == 1 and not tail[tokens[0].end() :].strip() else None
