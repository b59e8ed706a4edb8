"""Normalise: a row of any known shape -> `Conversation`. The shape is found per row, never assumed from the first.

| schema              | a row has                                             | becomes                               |
|---------------------|-------------------------------------------------------|---------------------------------------|
| `messages`          | `messages` (or the row is a list): role/content       | itself                                |
| `sharegpt`          | `conversations`: from/value                           | roles mapped                          |
| `prompt_completion` | `prompt`, `completion`: strings or message lists      | user, assistant                       |
| `preference`        | `chosen`, `rejected`, maybe `prompt`                  | the chosen side                       |
| `alpaca`            | `instruction`, `output`, maybe `input`, `history`     | user (instruction + input), assistant |
| `question_answer`   | `question`, `answer`                                  | user, assistant                       |
| `text`              | `text`                                                | already formatted, all trained        |
| `tokens`            | `input_ids` with `labels` or a mask                   | itself, checked                       |
| `chat_log`          | one list of messages under any other name             | as `messages`                         |

A cell may itself be an object with one value (`{"question": {"0": "How ..."}}`): the value is taken. How messages
may be spelled: `ftdata.schemas.messages`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ftdata.errors import BadRow, UsageError, suggest_names
from ftdata.registry import is_built_in
from ftdata.schemas.messages import (
    ROLES,
    SPECIAL_ROLES,
    STANDS_FOR,
    is_canonical,
    is_messages,
    is_single_message,
    message_notes,
    parse_json_field,
    read_messages,
    read_tools,
)
from ftdata.schemas.shapes import (
    ALIASES,
    Convert,
    Schema,
    find_column,
    last_answer_index,
    log_columns,
    parse_json_list,
    schemas,
)
from ftdata.schemas.training_fields import check_training_fields, is_guarded
from ftdata.types import Conversation, Message, Row, RowTokens

__all__ = [
    "ROLES",
    "SPECIAL_ROLES",
    "STANDS_FOR",
    "Convert",
    "RowKind",
    "Schema",
    "check_columns",
    "classify_row",
    "last_answer_index",
    "normalize",
    "schemas",
]

_CHATS = {"prompt", "completion", "response", "chosen", "rejected"}
"""Columns that may hold a text or messages."""

_OF_MESSAGES = ((schemas.get("messages"), "messages"), (schemas.get("sharegpt"), "conversations"))
"""Schemas whose rows are messages in one column; the very objects, since users may make others of their parts."""

_RESERVED = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "cycler",
    "dict",
    "documents",
    "joiner",
    "loop",
    "max_length",
    "messages",
    "namespace",
    "padding",
    "raise_exception",
    "range",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "self",
    "strftime_now",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}
"""What a row may not set: whose it is, or what would replace the template."""


def normalize(row: Row, schema: str = "auto", columns: Mapping[str, str] | None = None) -> Conversation:
    """Turn one row into a conversation.

    Args:
        row: the row as read.
        schema: `"auto"`, or the name of the schema that every row must have: a known one, or `./file.py:function`
            of one that turns a row into a `Conversation`.
        columns: canonical column name -> the name in the data, e.g. `{"instruction": "q", "output": "a"}`.

    Raises:
        BadRow: the shape is unknown or ambiguous, or a value is not what its column needs; names the field.
        UsageError: no schema has this name.

    >>> from ftdata.types import Source
    >>> row = Row({"question": "2+2?", "answer": "4"}, Source("data.jsonl", 0, 1))
    >>> normalize(row).messages
    ({'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'})
    """
    try:
        data, missing = _mapped(row, columns)
        kwargs = _kwargs(data) if "chat_template_kwargs" in data else {}
        try:
            kind = classify_row(schema, data)
            if kind.guarded:
                check_training_fields(data, kind.guarded)
            conversation = kind.convert(data)
        except BadRow as error:
            raise missing or error from None
    except BadRow as error:
        where = f"{row.source} {error.field}".rstrip()
        raise error.with_location(where) from None
    conversation.kwargs, conversation.notes = kwargs, _notes(kind, data, conversation.messages) | row.notes
    conversation.schema, conversation.source = kind.name, row.source
    return conversation


@dataclass(frozen=True, slots=True)
class RowKind:
    """What rows that look alike have in common.

    Attributes:
        name: their schema.
        convert: what makes conversations of them.
        unread: what is to be notes of the columns that the schema does not read.
        chats: the columns that it reads in which there may be messages.
        chat: the column that is all messages, where nothing else in the row adds to them.
        guarded: the columns that it does not read, whose values may decide what is trained (`check_training_fields`).
    """

    name: str
    convert: Convert
    unread: frozenset[str]
    chats: tuple[str, ...]
    chat: str | None = None
    guarded: tuple[str, ...] = ()


_LISTED = re.compile(r"\s*\[")
_MOST_KINDS = 1000

_kinds: dict[Any, RowKind | BadRow] = {}


def classify_row(schema: str, data: Mapping[str, Any]) -> RowKind:
    """Return of what kind a row is; of rows that look alike it is found once.

    That is all that schemas look at to know their rows: names of columns, and of each cell what kind it is.
    """
    look = (
        schemas.version,
        schema,
        *[
            (name, type(value), not value, type(value) is str and _LISTED.match(value) is not None)
            for name, value in data.items()
        ],
    )
    if (known := _kinds.get(look)) is not None:
        if isinstance(known, BadRow):
            raise known.with_traceback(None)
        return known
    try:
        kind = _kind_named(_detect(data) if schema == "auto" else schema, data)
    except BadRow as error:
        # Millions of rows without a known shape must not take longer than others.
        if error.code == "unknown_schema" and not any(map(_may_be_messages, data.values())):
            _remember(look, error)
        raise
    # Whether a list under any name is one of messages, only what is in it tells.
    if kind.name != "chat_log":
        _remember(look, kind)
    return kind


def _may_be_messages(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and _LISTED.match(value) is not None)


def _remember(look: Any, kind: RowKind | BadRow) -> None:
    if len(_kinds) == _MOST_KINDS:
        _kinds.clear()
    _kinds[look] = kind


def _kind_named(name: str, data: Mapping[str, Any]) -> RowKind:
    chosen = schemas.get(name)
    if not isinstance(chosen, Schema):
        return RowKind(name, partial(_converted, name, chosen), frozenset(), ())
    logs = log_columns(data) if name == "chat_log" else ()
    read = {find_column(data, column) for column in chosen.columns} | {"chat_template_kwargs", *logs}
    read -= {"functions"} if data.get("functions") and data.get("tools") else set()
    chats = {*_CHATS, "messages", "conversations", "conversation", *logs}
    column = next((column for schema, column in _OF_MESSAGES if schema is chosen), None)
    guarded = tuple(column for column in data if column not in read and is_guarded(str(column)))
    return RowKind(
        name,
        chosen.convert if is_built_in(chosen) else partial(_converted, name, chosen),
        frozenset(f"column {column}" for column in data if column not in read),
        tuple(column for column in data if column in read & chats),
        column if read.intersection(data) == {column} and not guarded else None,
        guarded,
    )


def _converted(name: str, chosen: Schema | Convert, data: Mapping[str, Any]) -> Conversation:
    """Return what a schema of the user's own makes of a row."""
    try:
        # A copy: it may be the same for each row, with other texts put into it.
        conversation: Any = deepcopy(chosen.convert(data) if isinstance(chosen, Schema) else chosen(data))
    except BadRow:
        raise
    except Exception as error:
        found = f"schema {name} fails on it: {type(error).__name__}: {error}"
        raise BadRow("schema_failed", found, hint="mend the function, or the row") from error
    if not isinstance(conversation, Conversation):
        found = f"schema {name} makes a {type(conversation).__name__} of it, expected a ftdata.types.Conversation"
        raise BadRow("schema_failed", found)
    return conversation if isinstance(chosen, Schema) else _checked(conversation, name)


def _checked(made: Conversation, name: str) -> Conversation:
    """Return what a schema of the user's own made, with its messages read as those of every row are."""
    whole = (
        isinstance(made.messages, tuple | list)
        and isinstance(made.text, str | None)
        and isinstance(made.tokens, RowTokens | None)
        and isinstance(made.tools, tuple | list)
        and isinstance(made.fields, Mapping)
    )
    if not whole:
        raise BadRow("schema_failed", f"schema {name} makes a Conversation of it whose fields have other types")
    if made.tokens is not None:
        listed_ids = {"input_ids": np.asarray(made.tokens.input_ids).tolist()}
        mask = np.asarray(made.tokens.trained).astype(int).tolist()
        tokens = {**listed_ids, "completion_mask": mask}
        return _kind_named("tokens", tokens).convert(tokens)
    messages = read_messages(list(made.messages), "messages") if made.messages else ()
    tools = read_tools({"tools": list(made.tools)})
    # Nothing comes before the first message: this says that nobody said.
    begins = made.completion_from or last_answer_index(messages)
    return replace(made, messages=messages, tools=tools, completion_from=begins)


def _notes(kind: RowKind, data: Mapping[str, Any], messages: tuple[Message, ...]) -> frozenset[str]:
    notes = kind.unread
    for column in kind.chats:
        spelled = parse_json_list(data[column])
        if is_canonical(spelled, messages):
            continue
        if column in _CHATS and isinstance(data[column], str) and is_messages(spelled):
            notes |= {f"text {column}"}
        else:
            notes = notes.union(message_notes(spelled))
    return notes


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Refuse a `columns=` mapping whose keys are no canonical column of any schema.

    Raises:
        UsageError: with the nearest canonical name.
    """
    if columns is not None and not isinstance(columns, Mapping):
        raise UsageError("columns", f"columns is {columns!r}, expected a mapping, e.g. output to answer")
    known = {name for schema in _known().values() for name in schema.columns}
    for name, actual in (columns or {}).items():
        if not isinstance(actual, str) or not actual:
            raise UsageError("columns", f"columns= maps {name!r} to {actual!r}, expected the name of a column")
        if name not in known:
            raise UsageError(
                "unknown_column", f"columns= maps {name!r}, which no schema has", hint=suggest_names(name, known)
            )


def _known() -> dict[str, Schema]:
    return {name: schema for name, schema in schemas.registered().items() if isinstance(schema, Schema)}


def _mapped(row: Row, columns: Mapping[str, str] | None) -> tuple[Mapping[str, Any], BadRow | None]:
    """Return the row under canonical names; and what is to be said of a column that is missing, if it matters."""
    data = row.data
    if isinstance(data, list):
        return {"messages": data}, None
    if type(data) is not dict and not isinstance(data, Mapping):
        raise BadRow("not_a_row", f"is a {type(data).__name__}, expected an object or a list of messages")
    if not columns and not row.flat:
        return data, None
    missing: BadRow | None = None
    mapped = dict(data)
    if columns:
        # What is mapped is not looked for under its other names.
        taken = {name for canonical in columns for name in (canonical, *ALIASES.get(canonical, ()))}
        roots = {
            re.split(r"[.\[]", actual, maxsplit=1)[0] if actual not in data else actual for actual in columns.values()
        }
        mapped = {key: value for key, value in data.items() if key not in taken | roots}
    for canonical, actual in (columns or {}).items():
        try:
            mapped[canonical] = data[actual] if actual in data else _at(data, actual, canonical)
        except BadRow as error:
            missing = missing or error
    if row.flat:
        mapped |= {name: chat for name in _CHATS & set(mapped) if is_messages(chat := parse_json_list(mapped[name]))}
    return mapped, missing


def _at(data: Mapping[str, Any], path: str, canonical: str) -> Any:
    """Return the value at a path such as `conversation.turns[0].text`."""
    value: Any = data
    for name, number in re.findall(r"([^.\[\]]+)|\[(-?\d+)\]", path):
        try:
            if not isinstance(value, list if number else Mapping):
                raise TypeError
            value = value[int(number)] if number else value[name]
        except (LookupError, TypeError):
            raise BadRow(
                "missing_column",
                f"has no column {path!r}, which columns= names for {canonical!r}",
                field=path,
                hint=suggest_names(path, map(str, data)),
            ) from None
    return value


def _kwargs(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row's own variables for the template (`chat_template_kwargs`)."""
    given = data.get("chat_template_kwargs")
    if isinstance(given, str):
        given = parse_json_field(given, "chat_template_kwargs") if given.strip() else None
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise BadRow("row_options", "is no object", field="chat_template_kwargs")
    # Tables have every column in every row: what says nothing sets nothing.
    own = {name: value for name, value in given.items() if not (name in _RESERVED and value in (None, "", [], {}))}
    for name in own:
        if not isinstance(name, str) or name in _RESERVED or name.endswith("_token"):
            raise BadRow(
                "row_options",
                "is not the row's to set: the template and how it is run are the build's",
                field=f"chat_template_kwargs.{str(name)[:100]}",
                hint="take it out; a row may set what the template reads, such as enable_thinking",
            )
    return own


def _fits(name: str, schema: Schema, data: Mapping[str, Any]) -> bool:
    try:
        return bool(schema.matches(data))
    except Exception as error:
        found = f"schema {name} fails to say whether it fits: {type(error).__name__}: {error}"
        raise BadRow("schema_failed", found, hint="mend its matches, which is asked about every row") from error


def _detect(data: Mapping[str, Any]) -> str:
    found = [name for name, schema in _known().items() if _fits(name, schema, data)]
    if len(found) > 1:
        # Tables with the columns of several shapes leave blank those of the others.
        filled = {name: value for name, value in data.items() if value != ""}
        found = [name for name in found if _fits(name, _known()[name], filled)] or found
    if len(found) == 1:
        return found[0]
    logs = log_columns(data) if not found and not is_single_message(data) else []
    if len(logs) == 1:
        return "chat_log"
    present = ", ".join(map(repr, data)) or "none"
    if found:
        raise BadRow(
            "ambiguous_schema",
            f"fits several schemas ({', '.join(found)}); its columns: {present}",
            hint=f"say which with schema={found[0]!r}",
        )
    if logs:
        raise BadRow(
            "ambiguous_schema",
            f"holds messages in several columns ({', '.join(logs)})",
            hint=f"say which with columns={{'messages': {logs[0]!r}}}",
        )
    if is_single_message(data):
        raise BadRow(
            "one_message",
            "is a single message; a row is a whole conversation",
            hint="put each conversation's messages in a list of their own",
        )
    candidates = "; ".join(f"{name}: {', '.join(s.columns[:3])}" for name, s in _known().items() if s.columns)
    known = {column for schema in _known().values() for column in schema.columns}
    nulls = [name for name, value in data.items() if value is None and name in known]
    said = f" ({', '.join(nulls)} {'is' if len(nulls) == 1 else 'are'} null)" if nulls else ""
    raise BadRow(
        "unknown_schema",
        f"has no known shape; its columns: {present}{said}",
        hint=f"map its columns with columns=, e.g. columns={{'prompt': ..., 'completion': ...}}. "
        f"Known shapes: {candidates}",
    )
