"""Detect: where, in a conversation rendered by any chat template, the model's own text begins and ends.

Nothing is searched for by its looks. A turn begins where the generation prompt of the messages before it
ends, if the text really begins with that prompt; it ends with the stop that the template prints when the
conversation ends there. Where the template answers differently for the prefix and for the whole, there is no
certain answer in this text, and the conversation is refused with the two renderings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftdata.errors import BadRow
from ftdata.templates.spans import Piece, Region
from ftdata.types import Part

RenderPrefix = Callable[[int, bool], str]
"""(number of messages, add the generation prompt) -> text"""

SPLITTABLE = frozenset({"history_drift", "stop_unknown"})
"""Refusals of a whole conversation that need not hold for its turns taken one by one."""


def from_blocks(parts: Sequence[Piece], assistants: Sequence[int]) -> list[Region]:
    """Return the regions that `{% generation %}` blocks mark.

    Raises:
        BadRow: it is not clear which message a block belongs to.
    """
    blocks = list(dict.fromkeys(piece.block for piece in parts if piece.block))
    regions: list[Region] = []
    for position, block in enumerate(blocks):
        inside = [piece for piece in parts if piece.block == block]
        owners = {piece.message for piece in inside if piece.part is not Part.SCAFFOLD}
        if not owners and len(blocks) == len(assistants):
            owners = {assistants[position]}
        if len(owners) != 1:
            raise BadRow(
                "generation_tags",
                f"generation block {position} of the template holds text of {len(owners)} messages, expected one",
            )
        regions.append(Region(owners.pop(), inside[0].start, inside[-1].end))
    return regions


def locate(text: str, parts: Sequence[Piece], turn: int, prefix: RenderPrefix, count: int, stops: Stops) -> Region:
    """Return the region of assistant message `turn` in the rendering `text` of `count` messages.

    Raises:
        BadRow: `history_drift`, `interleaved` or `stop_unknown`, with the evidence.
    """
    prompt = prefix(turn, True)
    if not text.startswith(prompt):
        raise BadRow(
            "history_drift",
            _disagreement(prompt, text),
            field=f"messages[{turn}]",
            hint="turns='split' trains each turn in a text of its own",
        )
    own = [piece for piece in parts if piece.message == turn and piece.part is not Part.SCAFFOLD]
    if own and own[0].start < len(prompt):
        raise BadRow(
            "history_drift", "the generation prompt already holds text of the answer", field=f"messages[{turn}]"
        )
    payload_end = own[-1].end if own else len(prompt)
    ended = text if turn == count - 1 else prefix(turn + 1, False)
    if not text.startswith(ended):
        raise BadRow(
            "history_drift",
            _disagreement(ended, text),
            field=f"messages[{turn}]",
            hint="turns='split' trains each turn in a text of its own",
        )
    end = payload_end + stops.end(ended[payload_end:], turn)
    if any(len(prompt) <= piece.start < end and piece.message not in (turn, -1) for piece in parts):
        raise BadRow(
            "interleaved", "the template prints text of another message inside this one", field=f"messages[{turn}]"
        )
    return Region(turn, len(prompt), end)


@dataclass(frozen=True, slots=True)
class Stops:
    """How a turn may end with this tokenizer: its EOS first, else the last control token."""

    eos: str | None
    control: re.Pattern[str] | None

    def end(self, tail: str, turn: int) -> int:
        """Return where, in the template's text after the answer, the stop ends.

        Raises:
            BadRow: `stop_unknown`: no control token ends the turn, or more than blanks follow it.
        """
        end = tail.find(self.eos) + len(self.eos) if self.eos and self.eos in tail else -1
        if end < 0 and self.control is not None:
            end = max((found.end() for found in self.control.finditer(tail)), default=-1)
        if end < 0 or tail[end:].strip():
            raise BadRow(
                "stop_unknown",
                f"no single stop token ends the turn; the template writes {tail[:80]!r} after the answer",
                field=f"messages[{turn}]",
                hint="mark what is trained with {% generation %} in a template file of your own",
            )
        return end


def check_arrival(messages: Sequence[Mapping[str, Any]], parts: Sequence[Piece]) -> frozenset[str]:
    """Check that every message's text arrived in the rendering; return flags for what arrived in part.

    Raises:
        BadRow: `payload_dropped`: a content or a tool call is nowhere in the text.
    """
    arrived: dict[tuple[int, Part], int] = {}
    for piece in parts:
        key = (piece.message, piece.part)
        arrived[key] = arrived.get(key, 0) + piece.end - piece.start
    flags: set[str] = set()
    for index, message in enumerate(messages):
        given = len(_plain(message.get("content")).strip())
        found = arrived.get((index, Part.CONTENT), 0)
        # Names, keys and values: fewer characters than these mean a call that is missing or printed as Python.
        calls = sum(map(_call_letters, message.get("tool_calls") or ())) > arrived.get((index, Part.TOOL_CALL), 0)
        if (given and not found) or calls:
            field = f"messages[{index}].{'tool_calls' if calls else 'content'}"
            raise BadRow(
                "payload_dropped",
                f"the template does not print this {message['role']} message's text as given",
                field=field,
                hint="use a template that has room for it, or take it out of the data",
            )
        if found < given:
            flags.add("content_cut")
        reasoning = any(message.get(key) for key in ("reasoning_content", "thinking", "reasoning"))
        if reasoning and not arrived.get((index, Part.REASONING)):
            flags.add("reasoning_dropped")
    return frozenset(flags)


def _call_letters(call: Mapping[str, Any]) -> int:
    function = call.get("function", call)
    return _letters(function.get("name")) + _letters(function.get("arguments")) if isinstance(function, Mapping) else 1


def _letters(value: Any) -> int:
    """Return the number of characters of all strings in a JSON value, keys included."""
    if isinstance(value, Mapping):
        return sum(_letters(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return sum(map(_letters, value))
    return len(value) if isinstance(value, str) else 0


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _disagreement(prefix: str, text: str) -> str:
    at = len(os.path.commonprefix([prefix, text]))  # noqa: RUF071  (by character is what is meant)
    shown = slice(max(0, at - 20), at + 40)
    return (
        f"the template renders the conversation up to here as ...{prefix[shown]!r}... but inside the whole as "
        f"...{text[shown]!r}..."
    )
