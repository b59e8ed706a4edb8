"""Check that settings for `SFTConfig`, `LoraConfig` and `BitsAndBytesConfig` have the declared types.

The libraries check few of these settings. Without this check, they would accept any string as true, and they would
treat a string as a list of characters.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from types import NoneType
from typing import Any, Literal

from ftdata.config import LORA_NAMES
from ftdata.errors import UsageError, suggest_names
from ftdata.redaction import redact

_DTYPES = Literal["float32", "float16", "bfloat16"]
_UNDECLARED = {
    "bnb_4bit_quant_type": Literal["nf4", "fp4"],
    "bnb_4bit_compute_dtype": _DTYPES,
    "bnb_4bit_quant_storage": Literal["float16", "float32", "int8", "uint8", "float64", "bfloat16"],
    "llm_int8_skip_modules": list[str],
}
"""Types of `BitsAndBytesConfig` parameters for which the default value has a different type."""

_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a mapping",
    list: "a list",
}


@dataclasses.dataclass(frozen=True, slots=True)
class ConfigField:
    """The declared type of a field in a configuration class, and whether the field accepts null."""

    hint: Any
    optional: bool

    def accepts(self, value: Any) -> bool:
        """Return whether a value has the type of the field."""
        return (value is None and self.optional) or _accepts(value, self.hint)

    @property
    def is_number(self) -> bool:
        """Whether the field accepts only numbers."""
        members = set(_members(self.hint)) - {type(None)}
        return bool(members) and members <= {int, float}

    @property
    def takes_fractions(self) -> bool:
        """Whether the field accepts numbers with a fractional part."""
        return float in _members(self.hint)

    @property
    def expected(self) -> str:
        """Description of the expected type for error messages, such as "a whole number"."""
        return _describe_type(self.hint)


def fields_of(kind: Callable[..., Any]) -> dict[str, ConfigField]:
    """Return the fields of a dataclass, or the constructor parameters of another configuration class, by name.

    >>> fields_of(_Example)["quick"].accepts("maybe"), fields_of(_Example)["quick"].expected
    (False, 'true or false')
    """
    # `BitsAndBytesConfig` is a dataclass whose parameters are not its fields.
    declared = [field for field in dataclasses.fields(kind) if field.init] if dataclasses.is_dataclass(kind) else []
    if not declared or not {field.name for field in declared} <= inspect.signature(kind).parameters.keys():
        return dict(_parameters(kind))
    hints = typing.get_type_hints(kind)
    return {
        field.name: ConfigField(hints[field.name], field.default is None or type(None) in _members(hints[field.name]))
        for field in declared
    }


@dataclasses.dataclass
class _Example:
    quick: bool = False


def check_fields(section: str, values: Mapping[str, Any], kind: Callable[..., Any], fixed: Mapping[str, str]) -> None:
    """Check that each setting is a field of a configuration class and has a value of the right type.

    Args:
        section: section of the ftdata configuration that contains the fields, such as `lora`.
        values: name -> value.
        kind: the configuration class.
        fixed: field that a user may not set -> reason.

    Raises:
        UsageError: a field is unknown, fixed or invalid; the message contains the expected type or similar names.
    """
    fields, kind_name = fields_of(kind), getattr(kind, "__name__", str(kind))
    for name, value in values.items():
        if name in fixed:
            raise UsageError("fixed_setting", f"{section}.{name} cannot be set: {fixed[name]}")
        if name not in fields:
            usable = {*fields, *(LORA_NAMES.values() if section == "lora" else ())} - fixed.keys()
            message = f"{kind_name} has no field {name!r}"
            raise UsageError("train_setting", message, hint=suggest_names(str(name), usable))
        check_type(section, name, value, fields[name])


def check_type(section: str, name: str, value: Any, field: ConfigField) -> None:
    """Check that a value has the type that the field declares.

    Raises:
        UsageError: the type is wrong; the message contains the field, the value and the expected type.
    """
    if not field.accepts(value):
        redacted = redact({name: value})[name]
        hint = f"set {section}.{name} to true or false" if field.expected == _TYPE_NAMES[bool] else ""
        message = f"{section}.{name} is {redacted!r}, expected {field.expected}"
        raise UsageError("train_setting", message, hint=hint)


def convert_fields(values: Mapping[str, Any], kind: Callable[..., Any]) -> dict[str, Any]:
    """Convert setting values to the declared types: mappings to dataclasses, and whole numbers to floats."""
    fields = fields_of(kind)
    converted: dict[str, Any] = {}
    for name, value in values.items():
        members = _members(fields[name].hint)
        inner: Any = next((member for member in members if dataclasses.is_dataclass(member)), None)
        if isinstance(value, Mapping) and inner is not None and dict not in members:
            converted[name] = inner(**convert_fields(value, inner))
        else:
            is_whole = type(value) is int and float in members and int not in members
            converted[name] = float(value) if is_whole else value
    return converted


def _parameters(kind: Callable[..., Any]) -> Iterator[tuple[str, ConfigField]]:
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        inferred = Any if parameter.default in (None, parameter.empty) else type(parameter.default)
        hint = _UNDECLARED.get(parameter.name, inferred)
        yield parameter.name, ConfigField(hint, parameter.default is None)


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the member types of a union. For any other type, return a tuple that contains only this type.

    Type parameters are removed, so `list[str]` becomes `list`. A `Literal` keeps its values.
    """
    inner = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return tuple(
        member if typing.get_origin(member) in (None, Literal) else typing.get_origin(member) for member in inner
    )


def _accepts(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(value, member) for member in inner)
    if origin is Literal:
        return any(_is_literal(value, literal) for literal in inner)
    if origin is None:
        return _is_instance(value, hint)
    return _is_collection(value, origin, inner)


def _is_collection(value: Any, kind: Any, inner: tuple[Any, ...]) -> bool:
    if kind is list:
        return isinstance(value, list) and all(_accepts(item, inner[0]) for item in value)
    if kind is tuple:
        fits = isinstance(value, list | tuple) and (len(value) == len(inner) or Ellipsis in inner)
        return fits and all(_accepts(*pair) for pair in zip(value, inner, strict=False))
    if kind is dict:
        return isinstance(value, dict) and all(_accepts(item, inner[1]) for item in value.values())
    return True


def _is_instance(value: Any, hint: Any) -> bool:
    if hint in (int, float):
        is_number = isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        fields = fields_of(typing.cast(Any, hint))
        return all(name in fields and fields[name].accepts(item) for name, item in value.items())
    return isinstance(value, hint) if isinstance(hint, type) else True


def _is_literal(value: Any, allowed: Any) -> bool:
    # PEFT declares the pattern `pissa_niter_[number of iters]` as a literal.
    if isinstance(allowed, str) and "[number of" in allowed:
        pattern = re.escape(allowed.partition("[")[0]) + r"\d+"
        return isinstance(value, str) and re.fullmatch(pattern, value) is not None
    return type(value) is type(allowed) and value == allowed


def _describe_type(hint: Any) -> str:
    """Describe a type in words for an error message."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [member for member in inner if not (isinstance(member, type) and issubclass(member, Enum | NoneType))]
        return " or ".join(dict.fromkeys(map(_describe_type, kinds)))
    if origin is Literal:
        return f"one of {', '.join(str(literal) for literal in inner)}" if len(inner) > 1 else str(inner[0])
    if origin is list:
        return {str: "a list of strings", int: "a list of whole numbers"}.get(inner[0], "a list")
    if origin is tuple:
        return f"{len(inner)} values"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with fields of {getattr(hint, '__name__', hint)}"
    return _TYPE_NAMES.get(origin or hint, getattr(hint, "__name__", str(hint)))
