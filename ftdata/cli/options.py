"""Command-line options that several commands share, and the parsers of their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
import yaml

from ftdata.errors import UsageError, describe_exception


def parse_number(text: str) -> float:
    """Return a number of rows as an int, or a share of the rows as a float: `1` is one row, `0.1` a tenth of them."""
    return int(text) if text.isdecimal() else float(text)


_MAX_ROW_RANGE = 10_000
FORMATS = ("json", "jsonl", "csv", "tsv", "parquet", "arrow", "xlsx")
SOURCE_HELP = f"a file ({', '.join(FORMATS)}; may be compressed), glob, folder, URL, or - for standard input"
Data = Annotated[str, typer.Argument(help=f"Data to read: a build, or {SOURCE_HELP}", show_default=False)]
Encoding = Annotated[str | None, typer.Option(help="Text encoding if not UTF-8/16/32, e.g. cp1252")]
Quoting = Annotated[str | None, typer.Option(help="Quotes in CSV and TSV: csv, or none (quotes are text)")]
Split = Annotated[str | None, typer.Option(help="Split to read, if the data has several")]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", "-t", help="Folder with tokenizer.json, or Hub id")]
Template = Annotated[
    str | None, typer.Option(help="Built-in name, .jinja file or Jinja source (default: the tokenizer's template)")
]
Schema = Annotated[str, typer.Option(help="Schema of all rows, or ./file.py:function; auto detects it per row")]
Columns = Annotated[list[str] | None, typer.Option("--column", help="Map a column, e.g. output=answer (repeatable)")]
TrainOn = Annotated[
    str, typer.Option(help="Trained messages: assistant, last_assistant, completion, all, or ./file.py:function")
]
Turns = Annotated[str, typer.Option(help="Examples per conversation: joint (1), split (1 per turn), or auto")]
TrainParts = Annotated[str | None, typer.Option(help="Train only these parts, e.g. reasoning,answer,tool_call")]
OnDroppedMessage = Annotated[str, typer.Option(help="If the template drops a message: reject or flag the row")]
OnMissingStop = Annotated[str, typer.Option(help="If the last turn has no stop token: flag or append_eos")]
RejectFlags = Annotated[
    str | None, typer.Option(help="Reject rows with these flags, e.g. no_trained_stop,message_truncated")
]
ControlTokens = Annotated[str, typer.Option(help="Control-token text in the data: escape, refuse or allow")]
MaxLength = Annotated[int | None, typer.Option(help="Maximum tokens per example and per packed sequence")]
Overlong = Annotated[str, typer.Option(help="Examples over --max-length: reject, drop_turns or truncate")]
Date = Annotated[str | None, typer.Option(help="Date for templates that print the current date, e.g. 2026-01-31")]
TemplateKwarg = Annotated[
    list[str] | None, typer.Option(help="Set a template variable, e.g. enable_thinking=false (repeatable)")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON")]
Packing = Annotated[str | None, typer.Option(help="Pack whole examples into sequences: bfd (best fit decreasing)")]
Where = Annotated[str | None, typer.Option(help="Read only matching rows (Jinja), e.g. lang == 'en'")]
Limit = Annotated[int | None, typer.Option(help="Maximum number of rows to read from each source", min=1)]
Dedup = Annotated[bool, typer.Option("--dedup", help="Remove duplicates; the first row is kept")]
NearDuplicateThreshold = Annotated[
    float | None, typer.Option(help="Similarity threshold for near-duplicates (0.5-1.0)")
]
Sample = Annotated[
    float | None, typer.Option(parser=parse_number, help="Random sample: share (below 1) or number of rows")
]
Shuffle = Annotated[bool, typer.Option("--shuffle", help="Shuffle the rows")]
TestSize = Annotated[
    float | None, typer.Option(parser=parse_number, help="Size of the test split: share (below 1) or number of rows")
]
Seed = Annotated[int, typer.Option(help="Random seed for splitting, sampling, shuffling and mixing")]
OnBadRows = Annotated[str, typer.Option(help="Bad rows: error (stop) or quarantine (continue without them)")]
MaxRejects = Annotated[str | None, typer.Option(help="Maximum number of quarantined rows, e.g. 100 or 1%")]


def parse_columns(pairs: list[str] | None) -> dict[str, str] | None:
    """Return the column mapping of pairs such as `output=answer`."""
    for pair in pairs or []:
        if "=" not in pair:
            raise UsageError("column", f"--column is {pair!r}, expected name=column, e.g. output=answer")
    return {pair.split("=", 1)[0]: pair.split("=", 1)[1] for pair in pairs} if pairs else None


def parse_template_kwargs(pairs: list[str] | None) -> dict[str, Any] | None:
    """Return the template variables of pairs such as `enable_thinking=false`; values are parsed as YAML.

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
            raise UsageError(
                "template_kwargs", f"--template-kwarg {name} cannot be parsed: {describe_exception(error)}"
            ) from None
    return variables or None


def split_names(names: str | None) -> list[str] | None:
    """Return the names in a comma-separated list."""
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def parse_row_numbers(text: str | None) -> list[int] | None:
    """Return the row numbers in a list of numbers and ranges such as `3,8-11`."""
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


def make_sources(data: list[str], encoding: str | None, split: str | None, quoting: str | None = None) -> Any:
    """Return the sources, each with the options that apply to all of them."""
    options = {"encoding": encoding, "split": split, "quoting": quoting}
    set_options = {name: value for name, value in options.items() if value is not None}
    return [{"path": path, **set_options} for path in data] if set_options else data


def collect_recipe_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe options among the arguments of a command, in the form that the public functions take."""
    names = (
        "schema",
        "train_on",
        "turns",
        "control_tokens",
        "on_dropped_message",
        "on_missing_stop",
        "max_length",
        "overlong",
        "date",
    )
    options = {name: arguments[name] for name in names if name in arguments}
    if "reject_flags" in arguments:
        options["reject_flags"] = split_names(arguments["reject_flags"]) or ()
    if "template_kwarg" in arguments:
        options["template_kwargs"] = parse_template_kwargs(arguments["template_kwarg"])
    options["columns"] = parse_columns(arguments["column"])
    options["train_parts"] = split_names(arguments["train_parts"])
    return options
