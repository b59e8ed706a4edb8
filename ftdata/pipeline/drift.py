"""Compare the tokens of served turns with the tokens that the chat template renders for the same messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from ftdata.errors import BadRow, first_difference
from ftdata.pipeline.batch import BuiltRow
from ftdata.pipeline.examples import build_rows
from ftdata.pipeline.recipe import Recipe
from ftdata.types import Conversation, Example, Reject, Row

_DEFAULTS: dict[str, Any] = {
    "task": "sft",
    "schema": "messages",
    "columns": None,
    "train_on": "assistant",
    "train_parts": None,
    "reject_flags": (),
    "max_length": None,
    "overlong": "reject",
}
"""Options with which the trained tokens of a conversation are all tokens that the model generates."""

_DESCRIBED_TOKENS = 6
"""Number of tokens that a difference shows."""


_Turn = tuple[list[int], list[int]]
"""The token ids of a prompt and of its answer."""


class Drift(NamedTuple):
    """The first difference between the tokens of a served turn and the tokens that the template renders.

    Attributes:
        turn: the number of the turn, counted from 0.
        place: `"prompt"` or `"completion"`.
        position: index of the first different token in the served prompt or completion.
        served, rendered: descriptions of the served and of the rendered tokens from this position.
    """

    turn: int
    place: str
    position: int
    served: str
    rendered: str

    def __str__(self) -> str:
        place = f"turn {self.turn}, token {self.position} of the {self.place}"
        return f"{place}: the server used {self.served}, and the template renders {self.rendered}"


def find_drift(conversation: Conversation, recipe: Recipe) -> list[Drift]:
    """Return the turns of a row with served tokens whose tokens differ from those that the template renders.

    Args:
        conversation: the row. The result is empty if it has no served tokens or no messages.
        recipe: the recipe.

    Raises:
        BadRow: the messages cannot be rendered, or an answer is not one range of rendered tokens.
    """
    tokens = conversation.tokens
    if tokens is None or tokens.origin is None:
        return []
    origin = tokens.origin
    messages = [{name: value for name, value in message.items() if name != "train"} for message in origin.messages]
    data = {"messages": messages, "tools": list(origin.tools), "chat_template_kwargs": dict(conversation.kwargs)}
    (outcome,) = build_rows(replace(recipe, **_DEFAULTS), [Row(data, conversation.source)])
    if isinstance(outcome, Reject):
        raise BadRow(outcome.code, outcome.reason, hint=outcome.fix)
    rendered = list(_rendered_turns(outcome))
    answers = sum(message["role"] == "assistant" for message in messages)
    if len(rendered) != answers:
        problem = f"the template renders {len(rendered)} ranges of trained tokens for {answers} answers"
        raise BadRow("served_turns", problem, hint="compare single turns")
    ids = tokens.input_ids.tolist()
    pairs = zip(tokens.turns, rendered[-len(tokens.turns) :], strict=True)
    drifts = [
        _compare_turn(number, (ids[:start], ids[start:end]), turn, recipe)
        for number, ((start, end), turn) in enumerate(pairs)
    ]
    return [drift for drift in drifts if drift is not None]


def describe_drift(conversation: Conversation, recipe: Recipe) -> Iterator[str]:
    """Yield one line for each turn of a row with served tokens that the template renders differently."""
    try:
        yield from map(str, find_drift(conversation, recipe))
    except BadRow as error:
        yield f"the messages cannot be compared with the served tokens: {error.message}"


def _rendered_turns(row: BuiltRow) -> Iterator[_Turn]:
    """Yield the token ids of each prompt and answer in the examples of a row."""
    for example in row.examples:
        ids = example.input_ids.tolist()
        for start, end in _find_trained_runs(example):
            yield ids[:start], ids[start:end]


def _find_trained_runs(example: Example) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(example.trained.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _compare_turn(turn: int, served: _Turn, rendered: _Turn, recipe: Recipe) -> Drift | None:
    for place, first, second in zip(("prompt", "completion"), served, rendered, strict=True):
        if first != second:
            position = first_difference(first, second)
            texts = (describe_tokens(ids[position:], recipe) for ids in (first, second))
            return Drift(turn, place, position, *texts)
    return None


def describe_tokens(ids: Sequence[int], recipe: Recipe) -> str:
    """Return the text of the first tokens in quotes. Control tokens are enclosed in brackets.

    Without the brackets, a control token looks like ordinary tokens with the same text.
    """
    ids = list(ids[:_DESCRIBED_TOKENS])
    if not ids:
        return "nothing"
    is_control = recipe.control.is_control(np.asarray(ids, np.int32)).tolist()
    runs = groupby(zip(is_control, ids, strict=True), key=itemgetter(0))
    texts = ((control, recipe.tokenizer.decode([id_ for _, id_ in run])) for control, run in runs)
    text = "".join(f"⟨{text}⟩" if control else text for control, text in texts)
    return repr(text) if text else f"token {ids[0]}"
