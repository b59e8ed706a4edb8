"""What commands take, spelled once: the options that several share, and what their values mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
import yaml

from ftdata.errors import UsageError, describe_exception


def parse_number(text: str) -> float:
    """Return a number of rows, or a share of them: 1 is one row, and 1.0 neither."""
    return int(text) if text.isdecimal() else float(text)


_MOST_ROWS = 10_000
FORMATS = ("json", "jsonl", "csv", "tsv", "parquet", "arrow", "xlsx")
PLACES = f"a file ({', '.join(FORMATS)}; packed or not), glob, folder, URL, or - for standard input"
Data = Annotated[str, typer.Argument(help=f"What to read: {PLACES}.", show_default=False)]
Encoding = Annotated[str | None, typer.Option(help="What text is written in that is not Unicode, e.g. cp1252.")]
Quoting = Annotated[str | None, typer.Option(help="Quotes in CSV and TSV files: csv, or none (they are text).")]
Split = Annotated[str | None, typer.Option(help="The split to read, of data that has several.")]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", "-t", help="A folder with tokenizer.json, or a hub id.")]
Template = Annotated[
    str | None, typer.Option(help="A built-in name, a .jinja file, or Jinja text. Default: the tokenizer's.")
]
Schema = Annotated[str, typer.Option(help="The shape of every row, or ./file.py:function; auto finds it per row.")]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="Map a column, e.g. --column output=answer. Repeatable.")
]
TrainOn = Annotated[str, typer.Option(help="assistant, last_assistant, completion, all, or ./file.py:function.")]
Turns = Annotated[
    str, typer.Option(help="auto, joint or split: one example for a conversation, or for each message of the user.")
]
TrainParts = Annotated[
    str | None, typer.Option(help="Of what is trained, these parts only: reasoning,answer,tool_call.")
]
OnDroppedMessage = Annotated[
    str, typer.Option(help="Messages that the template leaves out (system): reject or flag the row.")
]
OnMissingStop = Annotated[
    str, typer.Option(help="Last turns that the template leaves without a stop: flag or append_eos.")
]
RejectFlags = Annotated[
    str | None, typer.Option(help="Flags of the report that make a row a bad one: no_trained_stop,message_truncated.")
]
ControlTokens = Annotated[str, typer.Option(help="Control-token text inside data: escape, refuse or allow.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens that an example, and a pack, may have.")]
Overlong = Annotated[str, typer.Option(help="What becomes of longer examples: reject, drop_turns or truncate.")]
Date = Annotated[str | None, typer.Option(help="What templates that print a date are shown, e.g. 2026-01-31.")]
TemplateKwarg = Annotated[
    list[str] | None,
    typer.Option(help="Set a template variable, e.g. enable_thinking=false. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Packing = Annotated[str | None, typer.Option(help="bfd: put whole examples together, best fit first.")]
Where = Annotated[str | None, typer.Option(help="Rows to read: lang == 'en' and messages | length > 2 (Jinja).")]
Limit = Annotated[int | None, typer.Option(help="How many rows to read of each place named.", min=1)]
Dedup = Annotated[bool, typer.Option("--dedup", help="Leave out rows that are equal to an earlier one.")]
NearDuplicateThreshold = Annotated[
    float | None, typer.Option(help="How similar rows count as equal for --dedup and --test-size: 0.8.")
]
Sample = Annotated[
    float | None, typer.Option(parser=parse_number, help="Share (below 1) or number of rows to take, by chance.")
]
Shuffle = Annotated[bool, typer.Option("--shuffle", help="Put the rows into another order.")]
TestSize = Annotated[
    float | None, typer.Option(parser=parse_number, help="Share (below 1) or number of rows for a test split.")
]
Seed = Annotated[int, typer.Option(help="Decides all that is left to chance: test split, sample, order, weights.")]
OnBadRows = Annotated[str, typer.Option(help="error: show all and stop; quarantine: go on without them.")]
MaxRejects = Annotated[str | None, typer.Option(help="With quarantine: how many rows may be rejected, e.g. 100 or 1%.")]


def parse_columns(pairs: list[str] | None) -> dict[str, str] | None:
    """Return the columns that `output=answer`, ... map."""
    for pair in pairs or []:
        if "=" not in pair:
            raise UsageError("column", f"--column is {pair!r}, expected name=column, e.g. output=answer")
    return {pair.split("=", 1)[0]: pair.split("=", 1)[1] for pair in pairs} if pairs else None


def parse_template_kwargs(pairs: list[str] | None) -> dict[str, Any] | None:
    """Return the template variables that `enable_thinking=false`, ... set; values are read as YAML.

    >>> parse_template_kwargs(["enable_thinking=false", "date_string=26 Jul 2026"])
    {'enable_thinking': False, 'date_string': '26 Jul 2026'}
    """
    found = dict[str, Any]()
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip().isidentifier():
            told = f"--template-kwarg is {pair!r}, expected name=value, e.g. enable_thinking=false"
            raise UsageError("template_kwargs", told)
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[name.strip()] = value
        except (RecursionError, ValueError) as error:
            raise UsageError(
                "template_kwargs", f"--template-kwarg {name} cannot be read: {describe_exception(error)}"
            ) from None
    return found or None


def split_names(names: str | None) -> list[str] | None:
    """Return the names that stand between commas."""
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def parse_row_numbers(text: str | None) -> list[int] | None:
    """Return the numbers that `3,8-11` stands for."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or not 0 <= int(last) - int(first) <= _MOST_ROWS:
            raise UsageError("row", f"--row is {text!r}, expected numbers from 0, such as 7 or 3,8-11")
        found += range(int(first), int(last) + 1)
    return found


def make_sources(data: list[str], encoding: str | None, split: str | None, quoting: str | None = None) -> Any:
    """Return places, and what is said of all of them."""
    given = {"encoding": encoding, "split": split, "quoting": quoting}
    more = {name: value for name, value in given.items() if value is not None}
    return [{"path": place, **more} for place in data] if more else data


def collect_recipe_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return, of what a command was given, the options that decide what a row becomes, as functions take them."""
    plain = (
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
    found = {name: given[name] for name in plain if name in given}
    flags = {"reject_flags": split_names(given["reject_flags"]) or ()} if "reject_flags" in given else {}
    kwargs = {"template_kwargs": parse_template_kwargs(given["template_kwarg"])} if "template_kwarg" in given else {}
    return {
        **found,
        **flags,
        **kwargs,
        "columns": parse_columns(given["column"]),
        "train_parts": split_names(given["train_parts"]),
    }
