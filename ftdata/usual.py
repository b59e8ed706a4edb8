"""The usual row: messages of a role and a text each, which a plan says all of. It is read and rendered in one step.

Its schema, who answers in it, and what its template makes of it hang on its columns and roles, so that little is to be
found out of each row. What is unusual in any way goes through the stages one by one, which make the same of a usual
row, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from ftdata.errors import BadRow
from ftdata.recipe import Recipe
from ftdata.schemas import kind_of
from ftdata.schemas.messages import plain_message
from ftdata.templates.plans import contents_of
from ftdata.types import Conversation, Message, Rendered, Row


def usual(recipe: Recipe) -> Callable[[Row], tuple[Conversation, Rendered] | None]:
    """Return what gives the conversation of a usual row, and its one text; `None` for every other row."""
    schema, template, auto = recipe.schema, recipe.template, recipe.turns == "auto"
    if recipe.columns or recipe.turns == "split" or recipe.unclosed == "append_eos" or not template.chat:
        return lambda _: None
    plans = template.plans

    def show(row: Row) -> tuple[Conversation, Rendered] | None:
        column, roles, messages, contents = _talk(row)
        turns = _turns(roles)
        for plan in plans.of(roles, turns) if turns else ():
            rendered = plan.fill(messages, contents)
            if rendered is not None and not (auto and "rewritten" in rendered.flags):
                said = _said(row, schema, column, messages, turns)
                return None if said is None else (said, rendered)
        return None

    return show


def _talk(row: Row) -> tuple[str, tuple[str, ...], Sequence[Message], Sequence[str]]:
    """Return where the messages of a row stand, the roles as they are spelled, the messages, and their contents.

    There are none, if it is not usual.
    """
    data = row.data
    column = "messages" if "messages" in data else "conversations"
    said = data.get(column) if type(data) is dict and not row.flat else None
    if type(said) is not list:
        return column, (), (), ()
    messages = [message for message in map(plain_message, said) if message is not None]
    contents = contents_of(messages) if len(messages) == len(said) else None
    if not contents or not all(map(str.strip, contents)):
        return column, (), (), ()
    return column, tuple([item["role"] for item in said]), messages, contents


def _said(row: Row, schema: str, column: str, messages: Sequence[Message], turns: Sequence[int]) -> Conversation | None:
    try:
        kind = kind_of(schema, row.data)
    except BadRow:
        return None
    if kind.chat != column:
        return None
    return Conversation(
        tuple(messages), completion_from=turns[-1], noted=kind.unread, schema=kind.name, source=row.source
    )


@lru_cache(maxsize=1024)
def _turns(roles: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(at for at, role in enumerate(roles) if role == "assistant")
