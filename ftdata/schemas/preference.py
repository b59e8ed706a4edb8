"""Read preference pairs: two answers to the same prompt, of which the first is chosen and the second is rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

from ftdata.errors import BadRow
from ftdata.schemas.messages import ROLES, is_single_message, read_role_name
from ftdata.schemas.rankings import check_ranking, is_finite_number
from ftdata.schemas.shapes import has_columns, join_instruction, read_sides
from ftdata.schemas.training_fields import describe_value
from ftdata.types import SIDES, Conversation, Message

PAIR_SCHEMA = "preference_pair"
"""The schema of conversations with two sides. The schema `preference` ignores the rejected answer."""


_PROMPTS = ("messages", "conversations", "conversation", "question", "instruction")
"""Columns of other tools that contain the prompt of a pair. They are read if the row has no column `prompt`."""

_OPENAI_SIDES = ("preferred_output", "non_preferred_output")
"""Columns with the chosen and the rejected side in OpenAI's format of preferences."""

_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
"""Columns with the scores of both sides."""

RATING_COLUMNS = ("margin", *chain.from_iterable(_SCORES))
"""Columns with ratings of a pair."""

is_pair = has_columns(*SIDES)
"""A predicate: whether a row has the columns of a preference pair."""


def rename_pair_columns(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row of another tool with the columns `prompt`, `chosen` and `rejected`.

    A prompt in the columns `instruction` and `input` is joined as in the schema `alpaca`. A side that is a single
    message becomes a list of messages.

    >>> rename_pair_columns({"question": "2+2?", "chosen": {"role": "assistant", "content": "4"}, "rejected": "5"})
    {'chosen': [{'role': 'assistant', 'content': '4'}], 'rejected': '5', 'prompt': '2+2?'}
    """
    if all(data.get(name) is not None for name in _OPENAI_SIDES):
        data = _rename_openai_columns(data)
    if not is_pair(data):
        return data
    renamed = {name: [value] if name in SIDES and _is_message(value) else value for name, value in data.items()}
    names = [name for name in _PROMPTS if data.get(name)]
    is_complete = data.get("prompt") is not None or any(_starts_with_prompt(renamed[name]) for name in SIDES)
    if is_complete or len(names) != 1:
        return renamed
    prompt = renamed.pop(names[0])
    text = renamed.get("input")
    if names[0] == "instruction" and isinstance(prompt, str) and isinstance(text, str):
        del renamed["input"]
        prompt = join_instruction(prompt, text)
    return {**renamed, "prompt": prompt}


def _rename_openai_columns(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row of OpenAI's format of preferences, whose column `input` contains the messages and the tools."""
    context = data.get("input")
    context = context if isinstance(context, Mapping) else {"messages": context}
    rest = {name: value for name, value in data.items() if name not in (*_OPENAI_SIDES, "input")}
    tools = {"tools": context["tools"]} if context.get("tools") else {}
    sides = {side: data[name] for side, name in zip(SIDES, _OPENAI_SIDES, strict=True)}
    return {**rest, **tools, "prompt": context.get("messages"), **sides}


def _is_message(side: Any) -> bool:
    return isinstance(side, Mapping) and is_single_message(side)


def _starts_with_prompt(side: Any) -> bool:
    """Return whether the messages of a side begin with the prompt."""
    first = side[0] if isinstance(side, list) and side else None
    return isinstance(first, Mapping) and ROLES.get(str(read_role_name(first))) not in ("assistant", None)


def _read_feedback(data: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the ratings of both sides: `score` and `margin`, if the row contains them.

    Scores that are not numbers are not read, because no trainer uses them.

    Raises:
        BadRow: `score_order`, if the chosen answer has the lower score; `margin_value`, if the margin is not a number.
    """
    feedback: tuple[dict[str, float], dict[str, float]] = ({}, {})
    if data.keys().isdisjoint(RATING_COLUMNS):
        return feedback
    for names in _SCORES:
        scores = [read_rating(data.get(name)) for name in names]
        for side, score in zip(feedback, scores, strict=True):
            if score is not None:
                side.setdefault("score", score)
        if scores[0] is not None and scores[1] is not None and scores[0] < scores[1]:
            problem = f"is {scores[1]:g}, which is higher than the score {scores[0]:g} of the chosen answer"
            raise BadRow("score_order", problem, field=names[1], hint="exchange the sides, or remove the row")
    if data.get("margin") not in (None, ""):
        margin = read_rating(data["margin"])
        if margin is None:
            problem = f"is {describe_value(data['margin'])}, expected a number"
            raise BadRow("margin_value", problem, field="margin", hint="correct the margin, or remove the column")
        for side in feedback:
            side["margin"] = margin
    return feedback


def read_rating(value: Any) -> float | None:
    """Convert a score or a margin, a number or a text such as "0.5", to a float. Return `None` for any other value."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    return float(value) if is_finite_number(value) else None


def read_pair(data: Mapping[str, Any]) -> Conversation:
    """Convert a row with the columns `chosen` and `rejected` (and optionally `prompt`) to a conversation with sides.

    In each side, the messages before the first difference of the sides are not trained.

    Raises:
        BadRow: `not_a_pair`, `ranking`, `score_order`, `margin_value`, `identical_sides`, `prompt_differs`,
            `answer_in_prompt` or `no_answer`; or the messages are invalid.

    >>> pair = read_pair({"prompt": "2+2?", "chosen": "4", "rejected": "5"})
    >>> [side.messages[-1]["content"] for side in pair.sides]
    ['4', '5']
    """
    if not is_pair(data):
        check_ranking(data)
        problem = f"the row has no columns {' and '.join(SIDES)}, which preference data must have"
        hint = "build pairs and other rows separately: task='sft' for conversations, task='kto' for labeled answers"
        raise BadRow("not_a_pair", problem, hint=hint)
    feedback = _read_feedback(data)
    chosen, rejected = read_sides(data, SIDES)
    first = _find_first_difference(chosen.messages, rejected.messages)
    _check_prompt(chosen.messages, rejected.messages, first)
    shared = exclude_messages(chosen.messages[:first], first)
    sides = tuple(
        Conversation(shared + side.messages[first:], tools=side.tools, completion_from=first, feedback=numbers)
        for side, numbers in zip((chosen, rejected), feedback, strict=True)
    )
    return Conversation(chosen.messages, tools=chosen.tools, completion_from=first, sides=sides)


def _find_first_difference(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Return the index of the first message in which the sides of a pair differ, apart from their `train` fields.

    Raises:
        BadRow: `identical_sides`; `no_answer`, if a side ends before the first difference; `prompt_differs`, if the
            first difference is not an assistant message in both sides.
    """
    pairs = zip(chosen, rejected, strict=False)
    shorter = min(len(chosen), len(rejected))
    first = next((index for index, (left, right) in enumerate(pairs) if not _are_same(left, right)), shorter)
    if first == len(chosen) == len(rejected):
        but_masks = "" if chosen == rejected else ", apart from their train fields"
        problem = f"the chosen and the rejected answer are identical{but_masks}, so there is no preference to learn"
        raise BadRow("identical_sides", problem, field=SIDES[1], hint="remove the row")
    sides = {"chosen": chosen, "rejected": rejected}
    for name, messages in sides.items():
        if first == len(messages):
            problem = f"the {name} side has no message after the shared prompt, expected an assistant message"
            raise BadRow("no_answer", problem, field=name, hint="add the missing answer, or remove the row")
    for name, messages in sides.items():
        if (role := messages[first]["role"]) != "assistant":
            problem = (
                f"the sides first differ in message {first}, which is a message with the role {role} in the {name} "
                "side; expected two answers to the same prompt"
            )
            raise BadRow("prompt_differs", problem, field=name, hint="use the same messages before both answers")
    return first


def _are_same(left: Message, right: Message) -> bool:
    """Return whether two messages are the same, apart from their `train` fields.

    Templates print 1, 1.0 and true differently, and the keys of an object in their order, but `==` ignores this.
    """
    if left is right:
        return True
    names = left.keys() - {"train"}
    values: Sequence[Mapping[str, Any]] = (left, right)
    return names == right.keys() - {"train"} and all(_are_same_values(*(one[name] for one in values)) for name in names)


def _are_same_values(left: Any, right: Any) -> bool:
    return bool(left == right) and (isinstance(left, str) or repr(left) == repr(right))


def _check_prompt(chosen: Sequence[Message], rejected: Sequence[Message], first: int) -> None:
    """Check that the prompt, which ends before the message `first`, does not end with one of the two answers.

    Raises:
        BadRow: `answer_in_prompt`.
    """
    last = chosen[first - 1] if first else None
    if last is None or last["role"] != "assistant":
        return
    for name, side in zip(SIDES, (chosen, rejected), strict=True):
        if side[first].get("content") == last.get("content"):
            problem = f"the prompt ends with the {name} answer, so the model would see this answer before it answers"
            hint = "remove the answer from the prompt, or name the column of the prompt: columns={'prompt': ...}"
            raise BadRow("answer_in_prompt", problem, field="prompt", hint=hint)


def exclude_messages(messages: tuple[Message, ...], count: int) -> tuple[Message, ...]:
    """Exclude the assistant messages among the first `count` messages from training."""
    excluded: list[Message] = [
        {**message, "train": False} if message["role"] == "assistant" else message for message in messages[:count]
    ]
    return (*excluded, *messages[count:])
