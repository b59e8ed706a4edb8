"""Rename the columns of a row according to the option `columns`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ftdata.errors import BadRow, UsageError, suggest_names
from ftdata.schemas.messages import is_messages
from ftdata.schemas.preference import RATING_COLUMNS
from ftdata.schemas.rankings import RANKING_COLUMNS
from ftdata.schemas.row_images import IMAGE_COLUMNS
from ftdata.schemas.shapes import ALIASES, Schema, parse_json_list, schemas
from ftdata.types import Row

TEXT_OR_CHAT_COLUMNS = {"prompt", "completion", "response", "chosen", "rejected"}
"""Columns that can contain a text or messages."""

_EXTRA_COLUMNS = {"label", *RATING_COLUMNS, *RANKING_COLUMNS, *IMAGE_COLUMNS}
"""Columns with ratings of answers, which belong to no schema."""


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Check that each key of a `columns=` mapping is a column name that a schema defines.

    Raises:
        UsageError: a key is not a canonical column of any schema; the hint suggests the closest match.
    """
    if columns is not None and not isinstance(columns, Mapping):
        raise UsageError("columns", f"columns={columns!r} is not a mapping, expected e.g. {{'output': 'answer'}}")
    canonical = _EXTRA_COLUMNS.union(*(schema.columns for schema in detectable_schemas().values()))
    for name, actual in (columns or {}).items():
        if not isinstance(actual, str) or not actual:
            raise UsageError("columns", f"columns= maps {name!r} to {actual!r}, expected the name of a column")
        if name not in canonical:
            if actual in canonical:
                problem = (
                    f"columns= maps {name!r} to {actual!r}, expected a schema's column first, then the data's column"
                )
                raise UsageError("columns", problem, hint=f"set columns={{{actual!r}: {name!r}}}")
            message = f"columns= maps {name!r}, but no schema has a column of this name"
            raise UsageError("unknown_column", message, hint=suggest_names(name, canonical))


def detectable_schemas() -> dict[str, Schema]:
    """Return the schemas that can be detected from the columns of a row."""
    return {name: schema for name, schema in schemas.registered().items() if isinstance(schema, Schema)}


def check_mapped_columns(name: str, missing: Mapping[str, BadRow]) -> None:
    """Raise an error if the schema of a row does not read a column that `columns=` maps and that the row lacks.

    Otherwise, a row without the column could be read from other columns. An optional column may be missing.
    """
    schema = schemas.get(name)
    for column, error in missing.items():
        if isinstance(schema, Schema) and column not in {*schema.columns, *_EXTRA_COLUMNS}:
            raise error


def map_columns(row: Row, columns: Mapping[str, str] | None) -> tuple[Mapping[str, Any], dict[str, BadRow]]:
    """Rename the columns of a row according to `columns=`. Return the row, and an error for each missing column.

    The caller raises an error only if the row cannot be converted without the column, or is read from other columns.
    """
    data = row.data
    if isinstance(data, list):
        return {"messages": data}, {}
    if type(data) is not dict and not isinstance(data, Mapping):
        problem = f"the row is a {type(data).__name__}, expected an object or a list of messages"
        raise BadRow("not_a_row", problem, hint="write each row as an object with named columns")
    if not columns and not row.flat:
        return data, {}
    mapped, missing = _rename_columns(data, columns) if columns else (dict(data), {})
    if row.flat:
        chats = {name: parse_json_list(mapped[name]) for name in TEXT_OR_CHAT_COLUMNS & set(mapped)}
        mapped |= {name: chat for name, chat in chats.items() if is_messages(chat)}
    return mapped, missing


def _rename_columns(data: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, BadRow]]:
    """Move the values at the names or paths in `columns` to their canonical columns.

    A mapped column replaces the columns of the same canonical name. If a path leads into an object, the other fields of
    this object stay in the row, under their paths.
    """
    replaced = {name for canonical in columns for name in (canonical, *ALIASES.get(canonical, ()))}
    nested = [actual for actual in columns.values() if actual not in data]
    roots = {re.split(r"[.\[]", actual, maxsplit=1)[0] if actual in nested else actual for actual in columns.values()}
    mapped = {key: value for key, value in data.items() if key not in replaced | roots}
    paths = [_split_path(actual) for actual in nested]
    for root in roots & {str(path[0]) for path in paths if path}:
        mapped |= _unmapped_fields(data.get(root), root, [path[1:] for path in paths if path[:1] == [root]])
    missing = dict[str, BadRow]()
    for canonical, actual in columns.items():
        try:
            mapped[canonical] = data[actual] if actual in data else _get_path(data, actual, canonical)
        except BadRow as error:
            missing[canonical] = error
    return mapped, missing


def _get_path(data: Mapping[str, Any], path: str, canonical: str) -> Any:
    """Return the value at a path in a row, such as `conversation.turns[0].text`."""
    value: Any = data
    for key in _split_path(path):
        try:
            if not isinstance(value, list if isinstance(key, int) else Mapping):
                raise TypeError
            value = cast("Any", value)[key]
        except (LookupError, TypeError):
            message = f"the row has no column {path!r}, which columns= maps to {canonical!r}"
            raise BadRow("missing_column", message, field=path, hint=suggest_names(path, map(str, data))) from None
    return value


def _split_path(path: str) -> list[str | int]:
    """Split a path such as `conversation.turns[0].text` into keys and indices."""
    return [int(number) if number else name for name, number in re.findall(r"([^.\[\]]+)|\[(-?\d+)\]", path)]


def _unmapped_fields(value: Any, name: str, paths: Sequence[Sequence[str | int]]) -> dict[str, Any]:
    """Return the fields of an object that are in none of `paths`, as a mapping from path to value.

    >>> _unmapped_fields({"text": "hi", "train": False, "by": {"id": 1}}, "data", [["text"]])
    {'data.train': False, 'data.by': {'id': 1}}
    """
    if [] in paths:
        return {}
    followed = {path[0]: [other[1:] for other in paths if other[0] == path[0]] for path in paths}
    fields = dict[str, Any]()
    if isinstance(value, Mapping):
        for key, item in value.items():
            path = f"{name}.{key}"
            fields |= _unmapped_fields(item, path, followed[key]) if key in followed else {path: item}
    elif isinstance(value, list):
        for key, inner_paths in followed.items():
            if isinstance(key, int) and -len(value) <= key < len(value):
                fields |= _unmapped_fields(value[key], f"{name}[{key}]", inner_paths)
    return fields
