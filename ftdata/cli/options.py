"""The options of commands, which derive from the table of options, and functions that parse their values."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import typer
import yaml

from ftdata.cli.help import GROUP_TITLES, HelpAll
from ftdata.errors import UsageError, describe_exception
from ftdata.options import OPTIONS, SHARE_KEYS, Option, option_names
from ftdata.spelling import set_style

_MAX_ROW_RANGE = 10_000
FORMATS = ("json", "jsonl", "csv", "tsv", "parquet", "arrow", "xlsx")
SOURCE_HELP = f"a file ({', '.join(FORMATS)}; may be compressed), glob, folder, URL, or - for standard input"
Data = Annotated[
    str, typer.Argument(help=f"Data to read: a build, a configuration, or {SOURCE_HELP}", show_default=False)
]
DataList = Annotated[
    list[str], typer.Argument(help=f"Data to read: a build, a configuration, or {SOURCE_HELP}", show_default=False)
]
TrainingData = Annotated[
    list[str], typer.Argument(help=f"Training data: a configuration, or {SOURCE_HELP}", show_default=False)
]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", "-t", help="Tokenizer: a Hub ID or a folder")]
Json = Annotated[bool, typer.Option("--json", help="Print the output as JSON")]
Pager = Annotated[bool, typer.Option(help="Use a pager if the output is longer than the screen")]
_MAIN_OPTIONS = ("template", "train_on", "max_length", "packing", "test_size", "limit")
"""Options that the short help text of a command describes."""

_READER_OPTIONS = {
    "format": f"Format of the data if its name has another suffix: {', '.join(FORMATS)}",
    "encoding": "Text encoding of all files, if not UTF-8/16/32, e.g. cp1252",
    "quoting": "Quotes in CSV/TSV files: 'csv' (enclose cells) or 'none' (ordinary text)",
    "ignore_records": "Unknown types of records in agent sessions to ignore, e.g. new-type,other-type",
    "split": "Name of the split to read, if the data has several splits",
}
"""Options that apply to each source of a command -> help text."""


def parse_number(text: str) -> float:
    """Parse a number of rows (such as `1`, an int) or a share of the rows (such as `0.1` or `10%`, a float)."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return int(text) if text.isdecimal() else float(text)


def parse_columns(pairs: list[str] | None) -> dict[str, str] | None:
    """Parse the `--column` options, such as `output=answer`, into a mapping."""
    if invalid := [pair for pair in pairs or () if "=" not in pair]:
        raise UsageError("column", f"--column is {invalid[0]!r}, expected name=column, e.g. output=answer")
    if lists := [pair for pair in pairs or () if re.search(r"=.*,.*=", pair)]:
        hint = "repeat the option: --column " + " --column ".join(lists[0].split(","))
        raise UsageError("column", f"--column is {lists[0]!r}, expected a single column", hint=hint)
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
    "reject_flags": _Spelling(str | None, parse=split_names),
    "limit": _Spelling(int | None, settings={"min": 1}),
    "download_images": _Spelling(bool, "--download-images"),
    "dedup": _Spelling(bool, "--dedup"),
    "shuffle": _Spelling(bool, "--shuffle"),
    "sample": _Spelling(float | None, settings={"parser": parse_number}),
    "test_size": _Spelling(float | None, settings={"parser": parse_number}),
    "max_rejects": _Spelling(str | None),
}


Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def add_options(*selected: str) -> Decorator:
    """Return a decorator that adds options of the table to a command, which receives their parsed values.

    An option without a value is `None`, because a configuration file can contain its value (`read_request`).

    Args:
        selected: names or groups of options; `"source"` for the options of sources.
    """
    options = [OPTIONS[name] for name in option_names(*selected)]
    if "source" in selected:
        options += (Option("source", name, str | None, None, text) for name, text in _READER_OPTIONS.items())
    help_all = inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=HelpAll)
    return add_parameters([*map(_make_parameter, options), help_all], _parse_values)


def _parse_values(*, help_all: bool, **values: Any) -> dict[str, Any]:  # noqa: ARG001  (printed by its callback)
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


def _make_parameter(option: Option) -> inspect.Parameter:
    """Convert an option to a parameter from which typer creates an option of the command line."""
    spelling = _SPELLINGS.get(option.name, _Spelling(option.type))
    names = [spelling.name] if spelling.name else []
    default = "" if option.default in (None, False, ()) else str(option.default)
    panel = None if option.name in _MAIN_OPTIONS else GROUP_TITLES[option.group]
    settings = {"show_default": default or False, "rich_help_panel": panel, **spelling.settings}
    info = typer.Option(*names, help=option.help, **settings)
    annotation = Annotated[spelling.type | None, info]  # type: ignore[name-defined]  # (typer reads the type at run time)
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


class Request(NamedTuple):
    """The data of a command, with values that a configuration file can contain.

    Attributes:
        sources: the data, in a form that `resolve_sources` accepts.
        tokenizer: the tokenizer; `None` if it is missing.
        output_dir: the field `output_dir` of the configuration; empty if it is missing.
        settings: all build options of the configuration.
    """

    sources: Any
    tokenizer: str | None
    output_dir: str = ""
    settings: Mapping[str, Any] = MappingProxyType({})


def read_request(data: list[str], tokenizer: str | None, options: dict[str, Any]) -> Request:
    """Read the data of a command, which may be a configuration file.

    In `options`, options without a value get the value of the configuration, or else their default. The options of
    sources, such as `encoding`, are removed, and combined with each path.

    Raises:
        UsageError: a configuration file is combined with other data or with options of sources, or it is invalid.
    """
    from ftdata.config import is_config_file, load_data_config

    source_options = {name: options.pop(name) for name in _READER_OPTIONS if name in options}
    source_options = {name: value for name, value in source_options.items() if value is not None}
    config = None
    if any(map(is_config_file, data)):
        conflicts = [*data[1:], *(f"--{name.replace('_', '-')}" for name in source_options)]
        if conflicts:
            problem = f"{data[0]} cannot be combined with {conflicts[0]}: one of the arguments is a configuration file"
            raise UsageError("config_alone", problem, hint="set the field data of the configuration instead")
        set_style("keys")
        config = load_data_config(Path(data[0]))
    for name in options.keys() & OPTIONS.keys():
        if options[name] is None:
            options[name] = getattr(config, name) if config else OPTIONS[name].default
    if config:
        tokenizer = tokenizer or config.tokenizer or config.model or None
        return Request(config.data, tokenizer, config.output_dir, config.build_options())
    return Request([{"path": path, **source_options} for path in data] if source_options else data, tokenizer)


def note_unused_options(command: str, sources: Any, settings: Mapping[str, Any]) -> None:
    """Print a note if the sources or settings of a configuration contain options that the command does not apply."""
    _, unused = drop_shares(sources)
    unused += [name for name in ("dedup", "sample", "shuffle", "test_size") if settings.get(name)]
    if unused:
        print(f"{command} ignores these options of the configuration: {', '.join(unused)}", file=sys.stderr)


def drop_shares(sources: Any) -> tuple[Any, list[str]]:
    """Remove `weight`, `rows` and `tokens` from the sources of a configuration. Also return the removed keys."""
    items = sources if isinstance(sources, list) else [sources]
    removed = [key for key in SHARE_KEYS if any(isinstance(item, dict) and key in item for item in items)]
    plain_items = [
        {key: value for key, value in item.items() if key not in SHARE_KEYS} if isinstance(item, dict) else item
        for item in items
    ]
    return plain_items, removed
