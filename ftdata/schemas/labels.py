"""Read rows for KTO: an answer with a label that says whether the answer is desirable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ftdata.errors import BadRow
from ftdata.schemas.preference import exclude_messages
from ftdata.schemas.training_fields import describe_value, read_text_flag
from ftdata.types import Conversation

LABEL_COLUMNS = ("label", "kto_tag")
"""Columns with the label: the names of TRL and of LLaMA-Factory."""


def split_label(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Separate the label of a row from its other columns.

    The label is true or false, 1 or 0, or one of these values as text, as in a CSV file.

    Raises:
        BadRow: `no_label` or `kto_label`.

    >>> split_label({"prompt": "2+2?", "completion": "5", "label": False})
    ({'prompt': '2+2?', 'completion': '5'}, False)
    """
    names = [name for name in LABEL_COLUMNS if data.get(name) is not None]
    if not names:
        hint = "add the column label, which is true if the answer is desirable; or use task='dpo' for pairs of answers"
        raise BadRow("no_label", "the row has no label, which task='kto' needs", hint=hint)
    if len(names) > 1:
        raise BadRow("no_label", f"the row has the labels {' and '.join(names)}", hint="remove one of them")
    (name,) = names
    value = data[name]
    # Tables with empty cells store 1 as 1.0.
    label = read_text_flag(value.strip().removesuffix(".0")) if isinstance(value, str) else value
    if label not in (0, 1):
        problem = f"is {describe_value(value)}, expected true or false"
        hint = "set true for a desirable answer and false for an undesirable answer, or remove the row"
        raise BadRow("kto_label", problem, field=name, hint=hint)
    return {key: value for key, value in data.items() if key != name}, bool(label)


def add_label(conversation: Conversation, label: bool) -> Conversation:
    """Return a copy of a conversation with a label. Only its last answer, or its completion, is trained."""
    first = conversation.completion_from
    note = f"label {'desirable' if label else 'undesirable'}"
    return replace(
        conversation,
        messages=exclude_messages(conversation.messages, first),
        feedback={"label": float(label)},
        notes=conversation.notes | {note},
    )
