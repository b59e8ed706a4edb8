"""Check the fields of `SFTConfig`, `LoraConfig` and `BitsAndBytesConfig` against the types that they declare.

These libraries check few of their fields: a word for a switch, or a text for a list, is taken for true, or for its
letters, without an error.
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
"""Parameters of `BitsAndBytesConfig` whose type is not that of their default."""

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


@dataclasses.dataclass(frozen=True, slots=True)
class ConfigField:
    """A field of a configuration class: its type, and whether null stands for its default."""

    hint: Any
    optional: bool

    def accepts(self, value: Any) -> bool:
        """Return whether a value has the type of the field."""
        return (value is None and self.optional) or _accepts(value, self.hint)

    @property
    def is_number(self) -> bool:
        """Whether the field holds numbers, and no text."""
        members = set(_members(self.hint)) - {type(None)}
        return bool(members) and members <= {int, float}

    @property
    def takes_fractions(self) -> bool:
        """Whether numbers that are not whole are among its values."""
        return float in _members(self.hint)

    @property
    def expected(self) -> str:
        """What the field takes, in words."""
        return _words(self.hint)


def fields_of(kind: Callable[..., Any]) -> dict[str, ConfigField]:
    """Return the fields of a dataclass, or the parameters of another class.

    >>> fields_of(_Example)["quick"].accepts("maybe"), fields_of(_Example)["quick"].expected
    (False, 'true or false')
    """
    # `BitsAndBytesConfig` is a dataclass whose parameters are not its fields.
    declared = [one for one in dataclasses.fields(kind) if one.init] if dataclasses.is_dataclass(kind) else []
    if not declared or not {one.name for one in declared} <= inspect.signature(kind).parameters.keys():
        return dict(_parameters(kind))
    hints = typing.get_type_hints(kind)
    return {
        one.name: ConfigField(hints[one.name], one.default is None or type(None) in _members(hints[one.name]))
        for one in declared
    }


@dataclasses.dataclass
class _Example:
    quick: bool = False


def check_fields(section: str, values: Mapping[str, Any], kind: Callable[..., Any], fixed: Mapping[str, str]) -> None:
    """Refuse values that a configuration class does not take.

    Args:
        section: where they stand in our configuration, such as `lora`.
        values: name -> value.
        kind: the class.
        fixed: fields that a user may not set -> why.

    Raises:
        UsageError: naming the field, and what it takes, or the nearest name.
    """
    known, kind_name = fields_of(kind), getattr(kind, "__name__", str(kind))
    for name, value in values.items():
        if name in fixed:
            raise UsageError("fixed_setting", f"{section}.{name} cannot be set: {fixed[name]}")
        if name not in known:
            usable = {*known, *(LORA_NAMES.values() if section == "lora" else ())} - fixed.keys()
            raise UsageError(
                "train_setting", f"{kind_name} has no field {name!r}", hint=suggest_names(str(name), usable)
            )
        check_type(section, name, value, known[name])


def check_type(section: str, name: str, value: Any, field: ConfigField) -> None:
    """Refuse a value of another type than that of its field.

    Raises:
        UsageError: naming the field, the value, and what it takes.
    """
    if not field.accepts(value):
        shown = redact({name: value})[name]
        hint = f"write {section}.{name}: true, or false" if field.expected == _WORDS[bool] else ""
        message = f"{section}.{name} is {shown!r}, expected {field.expected}"
        raise UsageError("train_setting", message, hint=hint)


def convert_fields(values: Mapping[str, Any], kind: Callable[..., Any]) -> dict[str, Any]:
    """Return values as a class takes them: mappings as the classes that its fields declare, whole numbers as floats."""
    known = fields_of(kind)
    found: dict[str, Any] = {}
    for name, value in values.items():
        members = _members(known[name].hint)
        inner: Any = next((one for one in members if dataclasses.is_dataclass(one)), None)
        if isinstance(value, Mapping) and inner is not None and dict not in members:
            found[name] = inner(**convert_fields(value, inner))
        else:
            is_whole = type(value) is int and float in members and int not in members
            found[name] = float(value) if is_whole else value
    return found


def _parameters(kind: Callable[..., Any]) -> Iterator[tuple[str, ConfigField]]:
    for one in inspect.signature(kind).parameters.values():
        if one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
            continue
        hint = _UNDECLARED.get(one.name, Any if one.default in (None, one.empty) else type(one.default))
        yield one.name, ConfigField(hint, one.default is None)


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, without their parameters; of another type, itself."""
    inner = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return tuple(one if typing.get_origin(one) in (None, Literal) else typing.get_origin(one) for one in inner)


def _accepts(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(value, one) for one in inner)
    if origin is Literal:
        return any(_is_literal(value, one) for one in inner)
    if origin is None:
        return _is_instance(value, hint)
    return _is_collection(value, origin, inner)


def _is_collection(value: Any, kind: Any, inner: tuple[Any, ...]) -> bool:
    if kind is list:
        return isinstance(value, list) and all(_accepts(one, inner[0]) for one in value)
    if kind is tuple:
        fits = isinstance(value, list | tuple) and (len(value) == len(inner) or Ellipsis in inner)
        return fits and all(_accepts(*pair) for pair in zip(value, inner, strict=False))
    if kind is dict:
        return isinstance(value, dict) and all(_accepts(one, inner[1]) for one in value.values())
    return True


def _is_instance(value: Any, hint: Any) -> bool:
    if hint in (int, float):
        is_number = isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        known = fields_of(typing.cast(Any, hint))
        return all(name in known and known[name].accepts(one) for name, one in value.items())
    return isinstance(value, hint) if isinstance(hint, type) else True


def _is_literal(value: Any, allowed: Any) -> bool:
    # PEFT declares `pissa_niter_[number of iters]`.
    if isinstance(allowed, str) and "[number of" in allowed:
        pattern = re.escape(allowed.partition("[")[0]) + r"\d+"
        return isinstance(value, str) and re.fullmatch(pattern, value) is not None
    return type(value) is type(allowed) and value == allowed


def _words(hint: Any) -> str:
    """Return a type in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        named = [
            one for one in inner if one is not type(None) and not (isinstance(one, type) and issubclass(one, Enum))
        ]
        return " or ".join(dict.fromkeys(map(_words, named)))
    if origin is Literal:
        return f"one of {', '.join(str(one) for one in inner)}" if len(inner) > 1 else str(inner[0])
    if origin is list:
        return {str: "a list of texts", int: "a list of whole numbers"}.get(inner[0], "a list")
    if origin is tuple:
        return f"{len(inner)} values"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with fields of {getattr(hint, '__name__', hint)}"
    return _WORDS.get(origin or hint, getattr(hint, "__name__", str(hint)))
