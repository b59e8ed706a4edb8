"""Compare the tokens of served turns with the tokens that the chat template renders for the same messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ftdata.errors import BadRow
from ftdata.pipeline.batch import BuiltRow
from ftdata.pipeline.examples import build_rows
from ftdata.pipeline.recipe import Recipe
from ftdata.tokenizing.tokenizer import Tokenizer
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

_SHOWN_TOKENS = 6
"""Number of tokens that a difference shows."""


class Drift(NamedTuple):
    """The first difference between the tokens of a served turn and the tokens that the template renders.

    Attributes:
        turn: the number of the turn, counted from 0.
        place: `"prompt"` or `"completion"`.
        position: index of the first different token in the served prompt or completion.
        served: text of the served tokens from this position; empty if there are none.
        rendered: text of the rendered tokens from this position; empty if there are none.
    """

    turn: int
    place: str
    position: int
    served: str
    rendered: str

    def __str__(self) -> str:
        served, rendered = (repr(text) if text else "nothing" for text in (self.served, self.rendered))
        place = f"turn {self.turn}, token {self.position} of the {self.place}"
        return f"{place}: the server used {served}, and the template renders {rendered}"


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
    rendered = [*_rendered_turns(outcome)]
    answers = sum(message["role"] == "assistant" for message in messages)
    if len(rendered) != answers:
        problem = f"the template renders {len(rendered)} ranges of trained tokens for {answers} answers"
        raise BadRow("served_turns", problem, hint="compare single turns")
    ids = tokens.input_ids.tolist()
    pairs = zip(tokens.turns, rendered[-len(tokens.turns) :], strict=True)
    drifts = [
        _compare_turn(number, ids[:start], ids[start:end], *turn, recipe.tokenizer)
        for number, ((start, end), turn) in enumerate(pairs)
    ]
    return [drift for drift in drifts if drift is not None]


def describe_drift(conversation: Conversation, recipe: Recipe) -> Iterator[str]:
    """Yield one line for each turn of a row with served tokens that the template renders differently."""
    try:
        yield from map(str, find_drift(conversation, recipe))
    except BadRow as error:
        yield f"the messages cannot be compared with the served tokens: {error.message}"


def _rendered_turns(row: BuiltRow) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the token ids of each prompt and answer in the examples of a row."""
    for example in row.examples:
        ids = example.input_ids.tolist()
        for start, end in _find_trained_runs(example):
            yield ids[:start], ids[start:end]


def _find_trained_runs(example: Example) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(example.trained.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _compare_turn(
    turn: int,
    prompt: Sequence[int],
    completion: Sequence[int],
    rendered_prompt: Sequence[int],
    rendered_completion: Sequence[int],
    tokenizer: Tokenizer,
) -> Drift | None:
    sides = (("prompt", prompt, rendered_prompt), ("completion", completion, rendered_completion))
    for place, served, rendered in sides:
        pairs = zip(served, rendered, strict=False)
        shorter = min(len(served), len(rendered))
        position = next((index for index, (first, second) in enumerate(pairs) if first != second), shorter)
        if position < max(len(served), len(rendered)):
            shown = slice(position, position + _SHOWN_TOKENS)
            return Drift(turn, place, position, tokenizer.decode(served[shown]), tokenizer.decode(rendered[shown]))
    return None
