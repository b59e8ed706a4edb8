"""What a model is asked: token ids of prompts, exactly as they stand before what was trained.

A prompt is everything before the last trained stretch of a document. So nothing has to be known of a template but what
the build knows: a prompt without an answer is given one by way of trial, and cut before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ftdata.errors import InputRefused
from ftdata.pipeline.examples import build_rows
from ftdata.pipeline.recipe import Recipe, make_recipe, recipe_arguments
from ftdata.readers import resolve_sources
from ftdata.types import IGNORE_INDEX, Message, Reject, Row, Source

_TRIAL = "x"


def split_last_turn(ids: Sequence[int], labels: Sequence[int], stops: set[int]) -> tuple[list[int], list[int]] | None:
    """Return a document's prompt and expected answer: its last trained stretch without the stop, and all before it.

    So what is asked is what was trained, token by token. `None` where nothing stands before the answer.

    >>> split_last_turn([1, 7, 8, 5, 2], [-100, -100, -100, 5, 2], {2})
    ([1, 7, 8], [5])
    """
    end = max((position for position, label in enumerate(labels) if label != IGNORE_INDEX), default=-1) + 1
    start = end
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    # A document may begin with what is trained, as all of a text may be.
    return (list(ids[:start]), cut_at_stop(list(ids[start:end]), stops)) if start > 1 else None


def cut_at_stop(ids: list[int], stops: set[int]) -> list[int]:
    """Return the ids before the first stop."""
    return ids[: next((at for at, id_ in enumerate(ids) if id_ in stops), len(ids))]


def read_documents(split: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Yield ids and labels of the documents of a split of a build."""
    for row in split:
        at = 0
        for length in row["seq_lengths"]:
            yield row["input_ids"][at : at + length], row["labels"][at : at + length]
            at += length


def rebuild_recipe(tokenizer: str, options: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a build again.

    Args:
        tokenizer: the tokenizer that it was built with.
        options: those of its manifest.
    """
    # What of a row is trained is asked, whatever was chosen.
    names = ("schema", "columns", "turns", "control_tokens", "on_dropped_message", "on_missing_stop")
    return make_recipe(**recipe_arguments(options, tokenizer, names=names))


def encode_rows(data: Any, recipe: Recipe) -> Iterator[tuple[list[int], list[int]]]:
    """Yield ids and labels of rows of data.

    Raises:
        InputRefused: a row cannot be built.
    """
    for outcome in build_rows(recipe, (row for source in resolve_sources(data) for row in source.rows())):
        if isinstance(outcome, Reject):
            raise InputRefused(outcome.code, outcome.reason, where=str(outcome.source), hint=outcome.fix)
        yield outcome.examples[-1].input_ids.tolist(), outcome.examples[-1].labels.tolist()


def encode_messages(messages: Sequence[Message], recipe: Recipe) -> list[int]:
    """Return the ids of a conversation that the model is to go on with.

    Args:
        messages: it ends with what the user says.
        recipe: that of the build.

    Raises:
        InputRefused: the template cannot show it so.
    """
    refused, recipe = None, replace(recipe, schema="auto", columns=None)
    for row in _shapes(messages):
        (outcome,) = build_rows(recipe, [Row(row, Source("<prompt>", 0))])
        if isinstance(outcome, Reject):
            refused = refused or outcome
        elif turn := split_last_turn(
            outcome.examples[-1].input_ids.tolist(), outcome.examples[-1].labels.tolist(), set()
        ):
            return turn[0]
    if refused is None:
        raise InputRefused("no_questions", "nothing stands before the answer", where="<prompt>")
    raise InputRefused(refused.code, refused.reason, where="<prompt>", hint=refused.fix)


def _shapes(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """Yield a conversation in each shape that a template may take it in."""
    yield {"messages": [*messages, {"role": "assistant", "content": _TRIAL}]}
    if len(messages) == 1:
        said = messages[0]["content"]
        yield {"question": said, "answer": _TRIAL}
        yield {"instruction": said, "input": "", "output": _TRIAL}
        yield {"prompt": said, "completion": _TRIAL}
