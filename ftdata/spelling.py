"""Spell option names in messages as the user sets them.

Messages contain options as keyword arguments of Python, such as `max_rejects=100`. The command line shows them as
flags, or as keys if the options come from a configuration file.
"""

from __future__ import annotations

import ast
import re
from contextlib import suppress
from typing import Any, Literal

from ftdata.options import OPTIONS

Style = Literal["arguments", "flags", "keys"]

_FLAGS = {"columns": "column", "template_kwargs": "template-kwarg"}
"""Options whose flag has another name, because it sets one item of a mapping."""

_ONLY_FLAGS = ("allow", "engine", "overwrite", "to", "workers")
"""Options that a configuration file cannot contain."""

_OTHER_NAMES = (
    "allow",
    "encoding",
    "engine",
    "format",
    "output_dir",
    "overwrite",
    "ignore_records",
    "quoting",
    "serve",
    "split",
    "to",
    "tokenizer",
    "workers",
)
_NAMES = sorted({*OPTIONS, *_OTHER_NAMES})
_ANY_NAME = "|".join(_NAMES)
_LONG_NAMES = "|".join(name for name in _NAMES if "_" in name)
_VALUE = r"""'[^']*'|"[^"]*"|\{[^{}]*\}|\.\.\.|[\w.%:/-]*[\w%]"""
_OPTION = re.compile(
    # An option with its value, and the comma if another option follows. `--set turns=split` is not changed.
    rf"(?<![\w.'\"/-])(?<!--set )(?P<name>{_ANY_NAME})=(?P<value>{_VALUE})?(?:,(?=\ (?:{_ANY_NAME})=))?"
    # The name of an option. A quoted name, or a name before a colon, may be a column.
    rf"|(?<![\w.'\"`/\[-])(?P<bare>{_LONG_NAMES})(?![\w='\"`(:-]|\.\w)"
)
_KNOWN_VALUES = re.compile(r"(known: [^\n]*)")


def spell_options(text: str, style: Style | None = None) -> str:
    """Replace keyword arguments in a message by flags or configuration keys.

    Args:
        text: the message.
        style: how to spell options; `None` for the style that `set_style` chose.

    >>> spell_options("leave them out: on_bad_rows='quarantine', max_rejects=...", "flags")
    'leave them out: --on-bad-rows quarantine --max-rejects ...'
    >>> spell_options("choose a column, e.g. columns={'messages': 'chat'}", "flags")
    'choose a column, e.g. --column messages=chat'
    >>> spell_options("choose a column, e.g. columns={'messages': 'chat'}", "keys")
    'choose a column, e.g. columns: {messages: chat}'
    """
    style = style or _style[0]
    if style == "arguments":
        return text
    spell = _spell_flag if style == "flags" else _spell_key
    # A list of known values can contain the name of an option, such as the flag `control_tokens`.
    parts = _KNOWN_VALUES.split(text)
    return "".join(part if index % 2 else _OPTION.sub(spell, part) for index, part in enumerate(parts))


def set_style(style: Style) -> None:
    """Choose how `spell_options` spells options in this process."""
    _style[0] = style


_style: list[Style] = ["arguments"]


def _spell_flag(match: re.Match[str]) -> str:
    name = match["name"] or match["bare"]
    flag = f"--{_FLAGS.get(name, name).replace('_', '-')}"
    value = _parse_value(match["value"])
    if isinstance(value, dict):
        return " ".join(f"{flag} {key}={'...' if item is ... else item}" for key, item in value.items())
    return flag if value in (None, "True") else f"{flag} {_quote(str(value))}"


def _spell_key(match: re.Match[str]) -> str:
    name, value = match["name"] or match["bare"], _parse_value(match["value"])
    if name in _ONLY_FLAGS:
        return _spell_flag(match)
    separator = "," if match[0].endswith(",") else ""
    if isinstance(value, dict):
        pairs = ", ".join(f"{key}: {'...' if item is ... else item}" for key, item in value.items())
        return f"{name}: {{{pairs}}}{separator}"
    value = value.lower() if value in ("True", "False") else value
    return f"{name}{separator}" if value is None else f"{name}: {value}{separator}"


def _parse_value(text: str | None) -> Any:
    """Return the value of an option as a dictionary or as text, or `None` if there is no value."""
    if not text or text == "...":
        return text or None
    with suppress(ValueError, SyntaxError):
        value = ast.literal_eval(text)
        return value if isinstance(value, dict) else str(value)
    return text


def _quote(value: str) -> str:
    quote = '"' if "'" in value else "'"
    return value if re.fullmatch(r"[\w.%:/-]+", value) else f"{quote}{value}{quote}"
