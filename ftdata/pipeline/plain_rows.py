"""Render plain rows: rows of messages that have only a role and a text, and for which a layout is cached.

Most rows are plain. `render_plain_row` returns what the general path returns (normalize, check the answers, render,
check the text, apply the policy), but it takes less than half the time. All other rows take the general path.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, cast

from ftdata.errors import BadRow
from ftdata.pipeline.mask import Policy, is_built_in_policy
from ftdata.pipeline.read_rows import drops_rejected_side
from ftdata.pipeline.recipe import Recipe
from ftdata.schemas import classify_row, last_answer_index
from ftdata.schemas.answer_text import has_answer
from ftdata.schemas.messages import plain_message
from ftdata.templates.render_cache import describe_shape, render_cache
from ftdata.types import Conversation, Message, RenderedRow, Row


class _Roles(NamedTuple):
    """What the roles of plain messages determine: the indices of the answers, and whether the last message is one."""

    answers: tuple[int, ...]
    last_answer: int
    ends_with_answer: bool


@lru_cache(maxsize=1024)
def _describe_roles(roles: tuple[str, ...]) -> _Roles:
    answers = tuple(index for index, role in enumerate(roles) if role == "assistant")
    return _Roles(answers, last_answer_index([{"role": role} for role in roles]), roles[-1] == "assistant")


def supports_plain_rows(recipe: Recipe) -> bool:
    """Return whether `render_plain_row` supports the options of a recipe."""
    return (
        recipe.task == "sft"
        and not recipe.columns
        and recipe.turns != "split"
        and recipe.on_missing_stop != "append_eos"
        and bool(recipe.template.source)
        and recipe.template.is_chat
        and is_built_in_policy(recipe.train_on)
    )


def render_plain_row(recipe: Recipe, row: Row, policy: Policy) -> RenderedRow | None:
    """Render a plain row. Return `None` for any other row, and for a row that the general path may reject.

    Args:
        recipe: a recipe that `supports_plain_rows`.
        row: the row as it was read.
        policy: the mask policy of the recipe.
    """
    conversation = _read_plain_row(recipe, row)
    if conversation is None or drops_rejected_side(conversation):
        return None
    shape = describe_shape(conversation.messages)
    roles = _describe_roles(shape.messages)
    rendered = render_cache(recipe.template.key).fill_layout(shape, roles.answers)
    if rendered is None or (recipe.turns == "auto" and "history_rewritten" in rendered.flags):
        return None
    if not roles.answers or not all(map(has_answer, [shape.texts[answer] for answer in roles.answers])):
        return None
    conversation.completion_from = roles.last_answer
    return RenderedRow(conversation, (rendered,), (policy(rendered, conversation),), roles.ends_with_answer)


def _read_plain_row(recipe: Recipe, row: Row) -> Conversation | None:
    """Read a row of messages in the standard format that have only a role and a text. Return `None` for other rows."""
    data = row.data
    if type(data) is not dict or row.flat:
        return None
    try:
        kind = classify_row(recipe.schema, data)
    except BadRow:
        return None
    items = data[kind.chat] if kind.chat is not None and not kind.guarded else None
    if not items or type(items) is not list:
        return None
    messages = [*map(plain_message, items)]
    if messages != items or None in messages:
        return None
    plain = cast("tuple[Message, ...]", tuple(messages))
    return Conversation(plain, notes=kind.unread | row.notes, schema=kind.name, source=row.source)
