"""The JSON schema of configuration files, with which editors complete and check them."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import msgspec

from ftdata.config import LORA_NAMES, SECTIONS, Config, Lora
from ftdata.options import OPTIONS, SOURCE_KEYS


def make_config_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a configuration file.

    >>> schema = make_config_schema()
    >>> schema["properties"]["overlong"]["enum"]
    ['reject', 'drop_turns', 'truncate']
    >>> schema["additionalProperties"]
    False
    """
    (schema,), definitions = msgspec.json.schema_components([Config])
    schema = definitions["Config"]
    fields = schema["properties"]
    descriptions = _field_docstrings(Config) | {name: option.help for name, option in OPTIONS.items()}
    for name, field in fields.items():
        field["description"] = descriptions[name]
        if name in OPTIONS and (choices := OPTIONS[name].choices):
            fields[name] = _list_choices(field, choices)
    for section, names in SECTIONS.items():
        inner = {"type": "object", "properties": {name: fields[name] for name in names}, "additionalProperties": False}
        # A scalar in place of a section sets its first field.
        fields[section] = {"anyOf": [inner, fields[names[0]]], "description": f"Options: {', '.join(names)}"}
    fields["data"] = {"description": descriptions["data"], **_make_data_schema()}
    fields["lora"] = {"description": descriptions["lora"], **_make_lora_schema(definitions["Lora"])}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ftdata configuration",
        "type": "object",
        "properties": fields,
        "required": ["data"],
        "additionalProperties": False,
    }


def _list_choices(field: dict[str, Any], choices: tuple[str, ...]) -> dict[str, Any]:
    """Replace the type of a field by the list of its allowed values."""
    is_optional = field.get("default", "") is None
    annotations = {name: value for name, value in field.items() if name in ("default", "description")}
    return {"enum": [*choices, None] if is_optional else [*choices], **annotations}


_SOURCE_TYPES: dict[str, dict[str, Any]] = {
    "weight": {"type": "number", "exclusiveMinimum": 0},
    "rows": {"type": "integer", "minimum": 1},
    "tokens": {"type": "integer", "minimum": 1},
    "streaming": {"type": "boolean"},
    "data_files": {},
}
"""The types of the values in a source mapping that are not strings."""


def _make_data_schema() -> dict[str, Any]:
    source = {
        "anyOf": [
            {"type": "string"},
            {
                "type": "object",
                "properties": {key: _SOURCE_TYPES.get(key, {"type": "string"}) for key in SOURCE_KEYS},
                "required": ["path"],
                "additionalProperties": False,
            },
        ]
    }
    return {"anyOf": [*source["anyOf"], {"type": "array", "items": source}]}


def _make_lora_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of `lora` in a file, where the fields of `peft.LoraConfig` are on the same level."""
    descriptions = _field_docstrings(Lora)
    fields = {name: {**field, "description": descriptions[name]} for name, field in schema["properties"].items()}
    del fields["extra_fields"]
    aliases = {name: fields[short] for name, short in LORA_NAMES.items()}
    return {"anyOf": [{"type": "object", "properties": {**fields, **aliases}}, {"type": "null"}]}


def _field_docstrings(kind: type) -> dict[str, str]:
    """Return the docstring of each field of a class, on one line."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    docstrings = dict.fromkeys(kind.__annotations__, "")
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docstrings[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return docstrings
