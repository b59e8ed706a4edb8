"""Command-line options that several commands share, and functions that parse their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
import yaml

from ftdata.errors import UsageError, describe_exception


def parse_number(text: str) -> float:
    """Parse a number of rows (such as `1`, an int) or a share of the rows (such as `0.1`, a float)."""
    return int(text) if text.isdecimal() else float(text)


_MAX_ROW_RANGE = 10_000
FORMATS = ("json", "jsonl", "csv", "tsv", "parquet", "arrow", "xlsx")
SOURCE_HELP = f"a file ({', '.join(FORMATS)}; may be compressed), glob, folder, URL, or - for standard input"
Data = Annotated[str, typer.Argument(help=f"Data to read: a build, or {SOURCE_HELP}", show_default=False)]
Encoding = Annotated[str | None, typer.Option(help="Text encoding if not UTF-8/16/32, e.g. cp1252")]
Quoting = Annotated[
    str | None, typer.Option(help="Quotes in CSV/TSV files: 'csv' (enclose cells) or 'none' (ordinary text)")
]
Split = Annotated[str | None, typer.Option(help="Name of the split to read, if the data has several splits")]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", "-t", help="Tokenizer: Hub ID, or folder that contains tokenizer.json")
]
Template = Annotated[
    str | None, typer.Option(help="Template: name, .jinja file or Jinja source (default: the tokenizer's)")
]
Schema = Annotated[str, typer.Option(help="Schema of the rows: a name, ./file.py:function, or 'auto' to detect it")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="Data column for a schema column, e.g. output=answer (repeatable)"),
]
TrainOn = Annotated[
    str, typer.Option(help="Messages to train on: assistant, last_assistant, completion, all, or ./file.py:function")
]
Turns = Annotated[str, typer.Option(help="Examples per conversation: 'joint' (one), 'split' (one per turn) or 'auto'")]
TrainParts = Annotated[str | None, typer.Option(help="Train only these parts of messages, e.g. reasoning,answer")]
OnDroppedMessage = Annotated[
    str, typer.Option(help="What to do if the template omits a message: reject or flag the row")
]
OnMissingStop = Annotated[str, typer.Option(help="What to do if the last turn has no stop token: flag or append_eos")]
RejectFlags = Annotated[
    str | None, typer.Option(help="Reject rows with these flags, e.g. no_trained_stop,message_truncated")
]
ControlTokens = Annotated[
    str, typer.Option(help="What to do with special tokens in the text of rows: escape, refuse or allow")
]
MaxLength = Annotated[int | None, typer.Option(help="Maximum number of tokens per example and per packed sequence")]
Overlong = Annotated[str, typer.Option(help="What to do with longer examples: reject, drop_turns or truncate")]
Date = Annotated[str | None, typer.Option(help="Date that the template prints as the current date, e.g. 2026-01-31")]
TemplateKwarg = Annotated[
    list[str] | None, typer.Option(help="Set a variable of the template, e.g. enable_thinking=false")
]
Json = Annotated[bool, typer.Option("--json", help="Print the output as JSON")]
Packing = Annotated[str | None, typer.Option(help="Algorithm to pack examples: 'bfd' (best-fit decreasing)")]
Where = Annotated[str | None, typer.Option(help="Read only rows that match this Jinja expression, e.g. lang == 'en'")]
Limit = Annotated[int | None, typer.Option(help="Maximum number of rows to read from each source", min=1)]
Dedup = Annotated[bool, typer.Option("--dedup", help="Remove duplicate rows and keep the first")]
NearDuplicateThreshold = Annotated[
    float | None, typer.Option(help="Similarity threshold for near-duplicates (0.5-1.0)")
]
Sample = Annotated[
    float | None,
    typer.Option(parser=parse_number, help="Size of a random sample: number of rows, or fraction, e.g. 0.1"),
]
Shuffle = Annotated[bool, typer.Option("--shuffle", help="Shuffle the rows")]
TestSize = Annotated[
    float | None,
    typer.Option(parser=parse_number, help="Size of the test split: number of rows, or fraction, e.g. 0.1"),
]
Seed = Annotated[int, typer.Option(help="Random seed for splitting, sampling, shuffling and mixing")]
OnBadRows = Annotated[str, typer.Option(help="What to do with invalid rows: 'error' (stop) or 'quarantine' (skip)")]
MaxRejects = Annotated[
    str | None, typer.Option(help="Maximum number or percentage of skipped invalid rows, e.g. 100 or 1%")
]


def parse_columns(pairs: list[str] | None) -> dict[str, str] | None:
    """Parse the `--column` options, such as `output=answer`, into a mapping."""
    for pair in pairs or []:
        if "=" not in pair:
            raise UsageError("column", f"--column is {pair!r}, expected name=column, e.g. output=answer")
    return {pair.split("=", 1)[0]: pair.split("=", 1)[1] for pair in pairs} if pairs else None


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
            raise UsageError(
                "template_kwargs", f"--template-kwarg {name} cannot be parsed: {describe_exception(error)}"
            ) from None
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


def make_sources(data: list[str], encoding: str | None, split: str | None, quoting: str | None = None) -> Any:
    """Return the data sources: each path, combined with the reader options of the command line."""
    options = {"encoding": encoding, "split": split, "quoting": quoting}
    set_options = {name: value for name, value in options.items() if value is not None}
    return [{"path": path, **set_options} for path in data] if set_options else data


def collect_recipe_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Select the recipe options from the arguments of a command, and parse their values."""
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
