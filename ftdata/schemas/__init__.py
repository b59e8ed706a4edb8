"""Detect the schema (the format) of each row, and convert the row to a `Conversation`.

| schema              | columns                                               | result                                |
|---------------------|-------------------------------------------------------|---------------------------------------|
| `messages`          | `messages` (or the row is a list): role/content       | unchanged                             |
| `sharegpt`          | `conversations`: from/value                           | roles are mapped                      |
| `prompt_completion` | `prompt`, `completion`: text or lists of messages     | user, assistant                       |
| `preference`        | `chosen`, `rejected`, optional `prompt`               | the chosen answer, or both answers    |
| `alpaca`            | `instruction`, `output`, optional `input`, `history`  | user (instruction + input), assistant |
| `question_answer`   | `question`, `answer`                                  | user, assistant                       |
| `text`              | `text`                                                | formatted text, entirely trained      |
| `tokens`            | `input_ids` with `labels` or a mask                   | unchanged, after checks               |
| `served_tokens`     | `prompt_token_ids`, `completion_token_ids`            | the completions are trained           |
| `chat_log`          | a list of messages in a column of any other name      | same as `messages`                    |

A cell can be an object with a single value (`{"question": {"0": "How ..."}}`), which is then used. For the supported
message formats, see `ftdata.schemas.messages`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import Any

from ftdata.errors import BadRow
from ftdata.registry import is_built_in
from ftdata.schemas.column_mapping import (
    TEXT_OR_CHAT_COLUMNS,
    check_columns,
    check_mapped_columns,
    detectable_schemas,
    map_columns,
)
from ftdata.schemas.detect_task import detect_task
from ftdata.schemas.labels import add_label, split_label
from ftdata.schemas.messages import (
    ROLES,
    SPECIAL_ROLES,
    STANDS_FOR,
    is_canonical,
    is_messages,
    is_single_message,
    message_notes,
    parse_json,
    read_messages,
    read_tools,
)
from ftdata.schemas.preference import PAIR_SCHEMA, RATING_COLUMNS, is_pair, read_pair, read_rating, rename_pair_columns
from ftdata.schemas.rankings import check_ranking, expand_rankings
from ftdata.schemas.row_images import NO_IMAGES, extract_images, place_images
from ftdata.schemas.shapes import (
    SERVED_SCHEMA,
    Convert,
    Schema,
    find_column,
    last_answer_index,
    log_columns,
    parse_json_list,
    schemas,
)
from ftdata.schemas.training_fields import check_training_fields, describe_value, is_guarded
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
    "detect_task",
    "expand_rankings",
    "last_answer_index",
    "normalize",
    "schemas",
]

_MESSAGE_COLUMNS = ("messages", "conversations")
"""Columns that must contain messages in a row without a schema."""

_RESERVED_VARIABLES = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "cycler", "dict", "documents",
    "joiner", "loop", "max_length", "messages", "namespace", "padding", "raise_exception", "range",
    "return_assistant_tokens_mask", "return_dict", "return_tensors", "self", "strftime_now", "tokenize",
    "tokenizer_kwargs", "tools", "truncation",
}  # fmt: skip
"""Template variables that a row must not set: ftdata sets them, or they would replace the template."""


def normalize(
    row: Row,
    schema: str = "auto",
    columns: Mapping[str, str] | None = None,
    task: str = "sft",
    *,
    images: bool = False,
) -> Conversation:
    """Convert a row to a `Conversation`, according to its schema.

    Args:
        row: the row.
        schema: `"auto"`, the name of a schema, or `./file.py:function` for a function that converts a row to a
            `Conversation`.
        columns: canonical column name -> name in the data, e.g. `{"instruction": "q", "output": "a"}`.
        task: `"preference"` reads both sides of a preference pair; `"kto"` reads an answer with a label.
        images: whether to read the images of the row. Otherwise, a row with images is rejected.

    Raises:
        BadRow: the schema is unknown or ambiguous, or a value is invalid; `field` is the path of the value.
        UsageError: the schema is not registered.

    >>> from ftdata.types import Source
    >>> row = Row({"question": "2+2?", "answer": "4"}, Source("data.jsonl", 0, 1))
    >>> normalize(row).messages
    ({'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'})
    """
    try:
        data, missing = map_columns(row, columns)
        data, unplaced_images = extract_images(data, task) if images else (data, NO_IMAGES)
        if task == "preference":
            data = rename_pair_columns(data)
            # The row can also contain the messages of the chosen side, or answers without a preference.
            schema = "preference" if is_pair(data) and schema == "auto" else schema
        label = False
        if task == "kto":
            data, label = split_label(data)
        kwargs = _read_template_kwargs(data) if "chat_template_kwargs" in data else {}
        try:
            kind = classify_row(schema, data)
            check_mapped_columns(kind.name, missing)
            if kind.guarded:
                check_training_fields(data, kind.guarded)
            conversation = read_pair(data) if task == "preference" else kind.convert(data)
            if unplaced_images is not NO_IMAGES:
                conversation.messages, conversation.images = place_images(conversation.messages, unplaced_images)
        except BadRow as error:
            raise _choose_error(error, missing, data, task) from None
    except BadRow as error:
        where = f"{row.source} {error.field}".rstrip()
        raise error.with_location(where) from None
    if task == "kto":
        conversation = add_label(conversation, label)
    conversation.kwargs = kwargs
    notes = _collect_notes(kind, data, conversation.messages) | conversation.notes
    if conversation.sides:
        ratings = [name for name in RATING_COLUMNS if name in data]
        read = [name for name in ratings if data[name] == "" or read_rating(data[name]) is not None]
        notes = notes.difference(f"column {name}" for name in read)
    conversation.notes = notes | row.notes if row.notes else notes
    conversation.schema, conversation.source = PAIR_SCHEMA if conversation.sides else kind.name, row.source
    for side in conversation.sides:
        side.kwargs, side.notes = conversation.kwargs, conversation.notes
        side.schema, side.source = conversation.schema, conversation.source
    return conversation


def _choose_error(error: BadRow, missing: Mapping[str, BadRow], data: Mapping[str, Any], task: str) -> BadRow:
    """Return the error that best explains why a row cannot be converted."""
    if error.code == "unknown_schema" and {"prompt_ids", "chosen_ids"} <= data.keys():
        problem = "the row belongs to a build of preference pairs, which cannot be combined with other data"
        return BadRow("pair_build", problem, hint="build the original data of all builds together")
    if task == "preference" and error.code == "row_not_trained" and not is_pair(data):
        # The row has a label, but this task reads pairs.
        try:
            read_pair(data)
        except BadRow as pair_error:
            return pair_error
    if not missing and task == "preference" and error.code == "unknown_schema":
        check_ranking(data)
        hint = "name the columns of a pair, e.g. columns={'prompt': ..., 'chosen': ..., 'rejected': ...}"
        return BadRow("unknown_schema", error.message, hint=hint)
    return next(iter(missing.values()), error)


@dataclass(frozen=True, slots=True)
class RowKind:
    """The schema of a row, and the columns that the schema reads. Rows with the same columns and types use one object.

    Attributes:
        name: name of the schema.
        convert: converts a row to a conversation.
        unread: notes for the report on the columns that the schema does not read.
        chats: columns that the schema reads and that can contain messages.
        guarded: columns that the schema does not read, but whose values could affect the mask
            (`check_training_fields`).
    """

    name: str
    convert: Convert
    unread: frozenset[str]
    chats: tuple[str, ...]
    guarded: tuple[str, ...] = ()


_LIST_START = re.compile(r"\s*\[")
_MAX_KINDS = 1000

_kinds: dict[Any, RowKind | BadRow] = {}


def classify_row(schema: str, data: Mapping[str, Any]) -> RowKind:
    """Detect the schema of a row. Return a `RowKind`, which contains the schema and the columns that the schema reads.

    The result is cached by column names, cell types and whether cells are empty. The predicates of schemas depend on
    these properties only.
    """
    cells = data.values()
    types = (*map(type, cells),)
    signature: tuple[Any, ...] = (schemas.version, schema, (*data,), types, (*map(bool, cells),))
    if str in types:
        signature += (*[type(cell) is str and _LIST_START.match(cell) is not None for cell in cells],)
    if (cached := _kinds.get(signature)) is not None:
        if isinstance(cached, BadRow):
            raise cached.with_traceback(None)
        return cached
    try:
        kind = _make_kind(_detect_schema(data) if schema == "auto" else schema, data)
    except BadRow as error:
        # Without this, a file with millions of rows of an unknown schema would take longer than a valid file.
        if error.code == "unknown_schema" and not any(map(_may_be_messages, data.values())):
            _cache_kind(signature, error)
        raise
    # Whether a list in a column of any name contains messages depends on its content, not on the signature.
    if kind.name != "chat_log":
        _cache_kind(signature, kind)
    return kind


def _may_be_messages(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and _LIST_START.match(value) is not None)


def _cache_kind(signature: Any, kind: RowKind | BadRow) -> None:
    if len(_kinds) == _MAX_KINDS:
        _kinds.clear()
    _kinds[signature] = kind


def _make_kind(name: str, data: Mapping[str, Any]) -> RowKind:
    schema = schemas.get(name)
    if not isinstance(schema, Schema):
        return RowKind(name, partial(_convert_by_user_schema, name, schema), frozenset(), ())
    logs = log_columns(data) if name == "chat_log" else ()
    read = {find_column(data, column) for column in schema.columns} | {"chat_template_kwargs", *logs}
    read -= {"functions"} if data.get("functions") and data.get("tools") else set()
    chats = {*TEXT_OR_CHAT_COLUMNS, "messages", "conversations", "conversation", *logs}
    guarded = tuple(column for column in data if column not in read and is_guarded(str(column), data[column]))
    return RowKind(
        name,
        schema.convert if is_built_in(schema) else partial(_convert_by_user_schema, name, schema),
        frozenset(f"column {column}" for column in data if column not in read),
        tuple(column for column in data if column in read & chats),
        guarded,
    )


def _convert_by_user_schema(name: str, schema: Schema | Convert, data: Mapping[str, Any]) -> Conversation:
    """Convert a row with a user-defined schema, and check the result."""
    try:
        # The function can return the same object for every row, with other texts in it, so it is copied.
        conversation: Any = deepcopy(schema.convert(data) if isinstance(schema, Schema) else schema(data))
    except BadRow:
        raise
    except Exception as error:
        problem = f"the function of schema {name} raised {type(error).__name__}: {error}"
        raise BadRow("schema_failed", problem, hint="fix the function or the row") from error
    if not isinstance(conversation, Conversation):
        kind = type(conversation).__name__
        problem = f"the function of schema {name} returned a {kind}, expected a ftdata.types.Conversation"
        raise BadRow("schema_failed", problem, hint="return Conversation(messages=...), from ftdata.types")
    return conversation if isinstance(schema, Schema) else _normalize_user_conversation(conversation, name)


def _normalize_user_conversation(conversation: Conversation, name: str) -> Conversation:
    """Check the field types of a conversation from a user's function. Convert its messages to the standard format."""
    has_valid_types = (
        isinstance(conversation.messages, tuple | list)
        and isinstance(conversation.text, str | None)
        and isinstance(conversation.tokens, RowTokens | None)
        and isinstance(conversation.tools, tuple | list)
        and isinstance(conversation.fields, Mapping)
    )
    if not has_valid_types:
        message = f"the function of schema {name} returned a Conversation with fields of wrong types"
        raise BadRow("schema_failed", message)
    if conversation.tokens is not None:
        import numpy as np

        ids = {"input_ids": np.asarray(conversation.tokens.input_ids).tolist()}
        mask = np.asarray(conversation.tokens.trained).astype(int).tolist()
        tokens = {**ids, "completion_mask": mask}
        return _make_kind("tokens", tokens).convert(tokens)
    messages = read_messages(list(conversation.messages), "messages") if conversation.messages else ()
    tools = read_tools({"tools": list(conversation.tools)})
    # 0, the default of the field, means that the function did not set it: a completion never begins at message 0.
    completion_from = conversation.completion_from or last_answer_index(messages)
    return replace(conversation, messages=messages, tools=tools, completion_from=completion_from)


def _collect_notes(kind: RowKind, data: Mapping[str, Any], messages: tuple[Message, ...]) -> frozenset[str]:
    notes = kind.unread
    for column in kind.chats:
        value = parse_json_list(data[column])
        if is_canonical(value, messages):
            continue
        if column in TEXT_OR_CHAT_COLUMNS and isinstance(data[column], str) and is_messages(value):
            notes |= {f"text {column}"}
        else:
            notes = notes.union(message_notes(value))
    return notes


def _read_template_kwargs(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template variables of a row (`chat_template_kwargs`)."""
    variables = data.get("chat_template_kwargs")
    if isinstance(variables, str):
        variables = parse_json(variables, "chat_template_kwargs") if variables.strip() else None
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        message = f"the value is a {type(variables).__name__}, expected an object"
        raise BadRow("row_options", message, field="chat_template_kwargs")
    # Tables have every key in every row, so an empty reserved variable means that the row does not set it.
    variables = {
        name: value
        for name, value in variables.items()
        if not (name in _RESERVED_VARIABLES and value in (None, "", [], {}))
    }
    for name in variables:
        if not isinstance(name, str) or name in _RESERVED_VARIABLES or name.endswith("_token"):
            message = "the variable is reserved: only ftdata or the tokenizer can set it"
            hint = "remove it; a row can set variables of the template, such as enable_thinking"
            raise BadRow("row_options", message, field=f"chat_template_kwargs.{str(name)[:100]}", hint=hint)
    return variables


def _matches_schema(name: str, schema: Schema, data: Mapping[str, Any]) -> bool:
    try:
        return bool(schema.matches(data))
    except Exception as error:
        problem = f"the matches function of schema {name} raised {type(error).__name__}: {error}"
        raise BadRow("schema_failed", problem, hint="fix the function; it is called for every row") from error


@lru_cache(maxsize=64)
def _match_names(names: tuple[str, ...], version: int) -> dict[str, str]:  # noqa: ARG001  (the version of the schemas)
    """Return canonical column -> the name that differs from it only by case or spelling."""
    folded = {str(name).casefold(): name for name in names}
    canonical = dict.fromkeys(column for schema in detectable_schemas().values() for column in schema.columns)
    matches = {column: get_close_matches(column, folded, n=1, cutoff=0.75) for column in canonical}
    return {column: folded[closest[0]] for column, closest in matches.items() if closest}


_MAX_COMPARED_COLUMNS = 100
"""Rows with more columns are not searched for misspelled names, because comparing names is slow."""


def _find_similar_columns(data: Mapping[str, Any]) -> dict[str, str]:
    """Find columns whose names differ from those of one schema only by case or spelling.

    Return a mapping for `columns=`, which is empty if no schema or several schemas match.

    >>> _find_similar_columns({"Question": "2+2?", "anwser": "4"})
    {'question': 'Question', 'answer': 'anwser'}
    """
    if len(data) > _MAX_COMPARED_COLUMNS:
        return {}
    similar = _match_names(tuple(data), schemas.version)
    mappings = list[dict[str, str]]()
    for schema_name, schema in detectable_schemas().items():
        mapping = {column: similar[column] for column in schema.columns if column in similar}
        renamed = {**data, **{column: data[name] for column, name in mapping.items()}}
        if len(set(mapping.values())) == len(mapping) and _matches_schema(schema_name, schema, renamed):
            mappings.append({column: name for column, name in mapping.items() if column != name})
    return mappings[0] if len(mappings) == 1 else {}


def _check_message_columns(data: Mapping[str, Any]) -> None:
    """Raise an error if a row of no known schema has a column for messages that contains another value."""
    for name in _MESSAGE_COLUMNS:
        if data.get(name) is not None and not isinstance(data[name], list):
            problem = f"is {describe_value(data[name])}, expected a list of messages"
            hint = "write a list of messages; or rename the column if it contains other text"
            raise BadRow("messages_type", problem, field=name, hint=hint)


def _detect_schema(data: Mapping[str, Any]) -> str:
    names = [name for name, schema in detectable_schemas().items() if _matches_schema(name, schema, data)]
    if len(names) > 1:
        # A table with the columns of several schemas has empty cells in the columns that a row does not use.
        filled = {name: value for name, value in data.items() if value != ""}
        names = [name for name in names if _matches_schema(name, detectable_schemas()[name], filled)] or names
    if len(names) == 1 or SERVED_SCHEMA in names:
        return SERVED_SCHEMA if SERVED_SCHEMA in names else names[0]
    logs = log_columns(data) if not names and not is_single_message(data) else []
    if len(logs) == 1:
        return "chat_log"
    columns = ", ".join(map(repr, data)) or "none"
    if names:
        message = f"the row matches several schemas ({', '.join(names)}); its columns: {columns}"
        raise BadRow("ambiguous_schema", message, hint=f"choose a schema, e.g. schema={names[0]!r}")
    if logs:
        message = f"the row has several columns with messages ({', '.join(logs)})"
        raise BadRow("ambiguous_schema", message, hint=f"choose a column, e.g. columns={{'messages': {logs[0]!r}}}")
    if is_single_message(data):
        message = "the row is a single message, expected a whole conversation"
        raise BadRow("one_message", message, hint="put the messages of each conversation in one list")
    _check_message_columns(data)
    canonical = {column for schema in detectable_schemas().values() for column in schema.columns}
    nulls = [name for name, value in data.items() if value is None and name in canonical]
    null_columns = f"{', '.join(nulls)} {'is' if len(nulls) == 1 else 'are'} null"
    empty_cells = {**data, **dict.fromkeys(nulls, "")}
    if nulls and any(_matches_schema(name, schema, empty_cells) for name, schema in detectable_schemas().items()):
        raise BadRow("missing_column", f"{null_columns}, expected text", hint="remove the row, or add the text")
    candidates = "; ".join(
        f"{name}: {', '.join(s.columns[:3])}" for name, s in detectable_schemas().items() if s.columns
    )
    if similar := _find_similar_columns(data):
        renamed = ", ".join(f"{name!r} to {column!r}" for column, name in similar.items())
        hint = f"rename {renamed} in this row; if all rows have these names, set columns={similar!r}"
    else:
        example = "columns={'prompt': ..., 'completion': ...}"
        hint = f"correct the row; or if all rows are like it, set columns=, e.g. {example}. Known schemas: {candidates}"
    columns += f" ({null_columns})" if nulls else ""
    raise BadRow("unknown_schema", f"the row matches no schema; its columns: {columns}", hint=hint)
