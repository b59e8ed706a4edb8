"""Fast path: a usual row, messages of a role and a text each for which there is a plan, is read and shown in one step.

Schema, turns, text and mask of such a row depend on its columns and roles, so that little is to be found out for each.
What is unusual in any way goes through the stages one by one, which make the same of a usual row, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ftdata.errors import BadRow
from ftdata.pipeline.mask import is_custom
from ftdata.pipeline.recipe import Recipe
from ftdata.schemas import RowKind, classify_row
from ftdata.schemas.messages import has_answer, plain_message
from ftdata.templates.cache.plans import message_contents
from ftdata.types import Conversation, Message, RenderedRow, Row


def make_fast_path(recipe: Recipe) -> Callable[[Row], RenderedRow | None]:
    """Return what shows a usual row, and gives `None` for every other."""
    if recipe.columns or recipe.turns == "split" or recipe.on_missing_stop == "append_eos" or not recipe.template.chat:
        return lambda _: None
    # What a policy of the user's own looks at, nobody knows.
    if not is_custom(recipe.train_on):
        return lambda _: None
    plans, policy, auto = recipe.template.plans, recipe.policy, recipe.turns == "auto"
    # By the id of the plan, which is its own as long as the template is there.
    chosen: dict[int, Sequence[bool]] = {}

    def show(row: Row) -> RenderedRow | None:
        column, roles, messages, contents = _talk(row)
        turns = _turns(roles)
        for plan in plans.of(roles, turns) if turns else ():
            rendered = plan.fill(messages, contents)
            if rendered is None:
                continue
            kind = _kind(recipe.schema, row.data)
            if kind is None or kind.chat != column or (auto and "history_rewritten" in plan.flags):
                return None
            conversation = Conversation(
                tuple(messages), completion_from=turns[-1], notes=kind.unread, schema=kind.name, source=row.source
            )
            if (trained := chosen.get(id(plan))) is None:
                trained = chosen[id(plan)] = policy(rendered, conversation)
            return RenderedRow(conversation, (rendered,), (trained,), roles[-1] == "assistant")
        return None

    return show


def _talk(row: Row) -> tuple[str, tuple[str, ...], Sequence[Message], Sequence[str]]:
    """Return where the messages of a row stand, the roles as they are spelled, the messages, and their contents.

    There are none, if it is not usual.
    """
    data = row.data
    if type(data) is not dict or row.flat:
        return "", (), (), ()
    column = "messages" if "messages" in data else "conversations"
    if type(said := data.get(column)) is not list:
        return column, (), (), ()
    messages = [message for message in map(plain_message, said) if message is not None]
    contents = message_contents(messages) if len(messages) == len(said) else None
    if not contents or not all(map(has_answer, contents)):
        return column, (), (), ()
    return column, tuple([item["role"] for item in said]), messages, contents


def _kind(schema: str, data: Mapping[str, Any]) -> RowKind | None:
    try:
        return classify_row(schema, data)
    except (BadRow, RecursionError):
        return None


@lru_cache(maxsize=1024)
def _turns(roles: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(at for at, role in enumerate(roles) if role == "assistant")
