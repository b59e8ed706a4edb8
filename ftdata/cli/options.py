"""The options of commands, which derive from the table of options, and functions that parse their values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import wraps
from typing import Annotated, Any

import typer
import yaml

from ftdata.errors import UsageError, describe_exception
from ftdata.options import OPTIONS, Option, option_names

_MAX_ROW_RANGE = 10_000
FORMATS = ("json", "jsonl", "csv", "tsv", "parquet", "arrow", "xlsx")
SOURCE_HELP = f"a file ({', '.join(FORMATS)}; may be compressed), glob, folder, URL, or - for standard input"
Data = Annotated[str, typer.Argument(help=f"Data to read: a build, or {SOURCE_HELP}", show_default=False)]
TrainingData = Annotated[list[str], typer.Argument(help=f"Training data: {SOURCE_HELP}", show_default=False)]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", "-t", help="Tokenizer: Hub ID, or folder that contains tokenizer.json")
]
Json = Annotated[bool, typer.Option("--json", help="Print the output as JSON")]
Pager = Annotated[bool, typer.Option(help="Use a pager if the output is longer than the screen")]
_READER_OPTIONS = {
    "encoding": "Text encoding if not UTF-8/16/32, e.g. cp1252",
    "quoting": "Quotes in CSV/TSV files: 'csv' (enclose cells) or 'none' (ordinary text)",
    "split": "Name of the split to read, if the data has several splits",
}
"""Options that apply to each source of a command -> help text."""


def parse_number(text: str) -> float:
    """Parse a number of rows (such as `1`, an int) or a share of the rows (such as `0.1`, a float)."""
    return int(text) if text.isdecimal() else float(text)


def parse_columns(pairs: list[str] | None) -> dict[str, str] | None:
    """Parse the `--column` options, such as `output=answer`, into a mapping."""
    if invalid := [pair for pair in pairs or () if "=" not in pair]:
        raise UsageError("column", f"--column is {invalid[0]!r}, expected name=column, e.g. output=answer")
    return dict(pair.split("=", 1) for pair in pairs) if pairs else None


def parse_template_kwargs(pairs: list[str] | None) -> dict[str, Any] | None:
    """Parse the `--template-kwarg` options, such as `enable_thinking=false`. Values are YAML.

    >>> parse_template_kwargs(["enable_thinking=false", "date_string=26 Jul 2026"])
    {'enable_thinking': False, 'date_string': '26 Jul 2026'}
    """
    variables = dict[str, Any]()
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip().isidentifier():
            problem = f"--template-kwarg is {pair!r}, expected name=value, e.g. enable_thinking=false"
            raise UsageError("template_kwargs", problem)
        try:
            variables[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            variables[name.strip()] = value
        except (RecursionError, ValueError) as error:
            problem = f"--template-kwarg {name} cannot be parsed: {describe_exception(error)}"
            raise UsageError("template_kwargs", problem) from None
    return variables or None


def split_names(names: str | None) -> list[str] | None:
    """Split a comma-separated list into names."""
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def parse_row_numbers(text: str | None) -> list[int] | None:
    """Parse a list of row numbers and ranges, such as `3,8-11`."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or not 0 <= int(last) - int(first) <= _MAX_ROW_RANGE:
            raise UsageError("row", f"--row is {text!r}, expected row numbers from 0, such as 7 or 3,8-11")
        numbers += range(int(first), int(last) + 1)
    return numbers


@dataclass(frozen=True)
class _Spelling:
    """The form of an option on the command line, if it differs from the form in a configuration file.

    Attributes:
        type: the type of the value on the command line.
        name: the name of the option; empty for the name in the table.
        parse: a function that converts the value on the command line to the value of the option.
        settings: further arguments of `typer.Option`.
    """

    type: Any
    name: str = ""
    parse: Callable[[Any], Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


_SPELLINGS = {
    "columns": _Spelling(list[str] | None, "--column", parse_columns),
    "template_kwargs": _Spelling(list[str] | None, "--template-kwarg", parse_template_kwargs),
    "train_parts": _Spelling(str | None, parse=split_names),
    "reject_flags": _Spelling(str | None, parse=lambda names: split_names(names) or ()),
    "limit": _Spelling(int | None, settings={"min": 1}),
    "dedup": _Spelling(bool, "--dedup"),
    "shuffle": _Spelling(bool, "--shuffle"),
    "sample": _Spelling(float | None, settings={"parser": parse_number}),
    "test_size": _Spelling(float | None, settings={"parser": parse_number}),
    "max_rejects": _Spelling(str | None),
}


Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def add_options(*selected: str, are_unset: bool = False) -> Decorator:
    """Return a decorator that adds options of the table to a command, which receives their parsed values.

    Args:
        selected: names or groups of options; `"source"` for the options of sources.
        are_unset: whether the default of each option is `None`, because a configuration file contains the defaults.
    """
    options = [OPTIONS[name] for name in option_names(*selected)]
    if "source" in selected:
        options += (Option("source", name, str | None, None, text) for name, text in _READER_OPTIONS.items())
    return add_parameters((_make_parameter(option, is_unset=are_unset) for option in options), _parse_values)


def _parse_values(**values: Any) -> dict[str, Any]:
    parsers = {name: spelling.parse for name, spelling in _SPELLINGS.items() if spelling.parse}
    return {name: parsers[name](value) if name in parsers else value for name, value in values.items()}


def add_parameters(parameters: Iterable[inspect.Parameter], convert: Callable[..., dict[str, Any]]) -> Decorator:
    """Return a decorator that adds parameters to a command, after its positional parameters.

    Args:
        parameters: the parameters, with annotations for typer.
        convert: converts the values of the parameters to keyword arguments of the decorated function.
    """
    added = {parameter.name: parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def command(**arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in added}
            function(**arguments, **convert(**values))

        existing = inspect.signature(function, eval_str=True).parameters.values()
        first = [parameter for parameter in existing if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        last = [parameter for parameter in existing if parameter.kind is parameter.KEYWORD_ONLY]
        vars(command)["__signature__"] = inspect.Signature([*first, *added.values(), *last])
        return command

    return decorate


def _make_parameter(option: Option, *, is_unset: bool) -> inspect.Parameter:
    """Convert an option to a parameter from which typer creates an option of the command line."""
    spelling = _SPELLINGS.get(option.name, _Spelling(option.type))
    names = [spelling.name] if spelling.name else []
    info = typer.Option(*names, help=option.help, **spelling.settings)
    value_type = spelling.type | None if is_unset else spelling.type
    # The command line has no empty list: the option is left out.
    default = None if is_unset or option.default == () else option.default
    annotation = Annotated[value_type, info]  # type: ignore[valid-type]  # (typer reads the type at run time)
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def make_sources(data: list[str], options: dict[str, Any]) -> Any:
    """Remove the options of sources, such as `encoding`, from `options`, and combine them with each path."""
    values = {name: options.pop(name) for name in _READER_OPTIONS if name in options}
    set_values = {name: value for name, value in values.items() if value is not None}
    return [{"path": path, **set_values} for path in data] if set_values else data
