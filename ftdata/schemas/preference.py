"""Read preference pairs: two answers to the same prompt, of which the first is chosen and the second is rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ftdata.errors import BadRow
from ftdata.schemas.shapes import has_columns, read_preferred_side
from ftdata.types import SIDES, Conversation, Message

PAIR_SCHEMA = "preference_pair"
"""The schema of conversations with two sides. The schema `preference` ignores the rejected answer."""


def read_pair(data: Mapping[str, Any]) -> Conversation:
    """Convert a row with the columns `chosen` and `rejected` (and optionally `prompt`) to a conversation with sides.

    In each side, the messages before the first difference of the sides are not trained.

    Raises:
        BadRow: `not_a_pair`, `identical_sides`, `prompt_differs` or `no_answer`; or the messages are invalid.

    >>> pair = read_pair({"prompt": "2+2?", "chosen": "4", "rejected": "5"})
    >>> [side.messages[-1]["content"] for side in pair.sides]
    ['4', '5']
    """
    if not has_columns(*SIDES)(data):
        problem = f"the row has no columns {' and '.join(SIDES)}, which preference data must have"
        hint = "remove the row, or set task='sft' to train on rows without pairs"
        raise BadRow("not_a_pair", problem, hint=hint)
    chosen, rejected = (read_preferred_side(data, name) for name in SIDES)
    first = _find_first_difference(chosen.messages, rejected.messages)
    sides = tuple(replace(side, messages=_exclude_messages(side.messages, first)) for side in (chosen, rejected))
    return replace(chosen, sides=sides, completion_from=first)


def _find_first_difference(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Return the index of the first message in which the sides of a pair differ.

    Raises:
        BadRow: the sides are identical, or the first difference is not an assistant message in both sides.
    """
    if chosen == rejected:
        problem = "the chosen and the rejected answer are identical, so there is no preference to learn"
        raise BadRow("identical_sides", problem, field=SIDES[1], hint="remove the row")
    pairs = zip(chosen, rejected, strict=False)
    shorter = min(len(chosen), len(rejected))
    first = next((index for index, (left, right) in enumerate(pairs) if left != right), shorter)
    sides = {"chosen": chosen, "rejected": rejected}
    for name, messages in sides.items():
        if first == len(messages):
            problem = f"the {name} side ends where the sides first differ, so it has no answer to compare"
            raise BadRow("no_answer", problem, field=name)
    for name, messages in sides.items():
        if (role := messages[first]["role"]) != "assistant":
            problem = (
                f"the sides first differ in message {first}, which is a message with the role {role} in the {name} "
                "side; expected two answers to the same prompt"
            )
            raise BadRow("prompt_differs", problem, field=name, hint="use the same messages before both answers")
    return first


def _exclude_messages(messages: tuple[Message, ...], count: int) -> tuple[Message, ...]:
    """Exclude the assistant messages among the first `count` messages from training."""
    excluded: list[Message] = [
        {**message, "train": False} if message["role"] == "assistant" else message for message in messages[:count]
    ]
    return (*excluded, *messages[count:])
