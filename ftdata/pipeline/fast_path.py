"""A fast path that reads and renders a row in one step if its messages have only roles and texts.

An ordinary row contains messages with only a role and a text, and its template has a plan for these roles. The schema,
turns, spans and mask of the row depend only on its columns and roles, so most of the work is cached. All other rows
goes through the separate stages, which produce the same result for ordinary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ftdata.errors import BadRow
from ftdata.pipeline.mask import is_built_in_policy
from ftdata.pipeline.recipe import Recipe
from ftdata.schemas import RowKind, classify_row
from ftdata.schemas.answer_text import has_answer
from ftdata.schemas.messages import plain_message
from ftdata.schemas.training_fields import check_training_fields
from ftdata.templates.cache.plans import message_contents
from ftdata.types import Conversation, Message, RenderedRow, Row


def make_fast_path(recipe: Recipe) -> Callable[[Row], RenderedRow | None]:
    """Create a function that renders a row of messages with only roles and texts, and returns `None` for other rows."""
    if (
        recipe.columns
        or recipe.turns == "split"
        or recipe.on_missing_stop == "append_eos"
        or not recipe.template.is_chat
    ):
        return lambda _: None
    # A custom policy may depend on any property of the row.
    if not is_built_in_policy(recipe.train_on):
        return lambda _: None
    plans, policy, is_auto = recipe.template.plan_cache, recipe.policy, recipe.turns == "auto"
    # Keyed by the `id()` of the plan, which is unique as long as the template exists.
    trained_spans: dict[int, Sequence[bool]] = {}

    def render(row: Row) -> RenderedRow | None:
        column, roles, messages, contents = _read_messages(row)
        turns = _assistant_indices(roles)
        for plan in plans.get_plans(roles, turns) if turns else ():
            rendered = plan.fill(messages, contents)
            if rendered is None:
                continue
            kind = _classify(recipe.schema, row.data)
            if kind is None or kind.chat != column or (is_auto and "history_rewritten" in plan.flags):
                return None
            conversation = Conversation(
                tuple(messages), completion_from=turns[-1], notes=kind.unread, schema=kind.name, source=row.source
            )
            if (trained := trained_spans.get(id(plan))) is None:
                trained = trained_spans[id(plan)] = policy(rendered, conversation)
            return RenderedRow(conversation, (rendered,), (trained,), roles[-1] == "assistant")
        return None

    return render


def _read_messages(row: Row) -> tuple[str, tuple[str, ...], Sequence[Message], Sequence[str]]:
    """Return the name of the messages column, the original roles, the normalized messages, and their contents.

    The roles, messages and contents are empty if the row is not ordinary.
    """
    data = row.data
    if type(data) is not dict or row.flat:
        return "", (), (), ()
    column = "messages" if "messages" in data else "conversations"
    if type(items := data.get(column)) is not list:
        return column, (), (), ()
    messages = [message for message in map(plain_message, items) if message is not None]
    contents = message_contents(messages) if len(messages) == len(items) else None
    if not contents or not all(map(has_answer, contents)):
        return column, (), (), ()
    return column, tuple([item["role"] for item in items]), messages, contents


def _classify(schema: str, data: Mapping[str, Any]) -> RowKind | None:
    try:
        kind = classify_row(schema, data)
        check_training_fields(data, kind.guarded)
    except (BadRow, RecursionError):
        return None
    return kind


@lru_cache(maxsize=1024)
def _assistant_indices(roles: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(index for index, role in enumerate(roles) if role == "assistant")
