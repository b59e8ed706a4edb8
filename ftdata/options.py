"""The options of a build: name, type, default, help text and allowed values.

Fields of configuration files, options of commands, checks of values and entries of the manifest derive from this table.
The signatures of public functions are written out; `tests/pipeline/test_options.py` compares them with the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftdata.errors import UsageError, check_choice, suggest_names


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a build.

    Attributes:
        group: `"task"` (the kind of data), `"rendering"` (the template), `"rows"` (the conversion of rows to examples),
            `"selection"` (the rows to read), `"layout"` (splits and packing) or `"rejects"` (the handling of bad rows).
        name: the name in signatures, configuration files and the manifest.
        type: the type in a configuration file.
        default: the default value.
        help: the help text of the command line.
        choices: the allowed values; empty if they are not a fixed list.
        section: the section of a configuration file that can contain the option; empty for none.
    """

    group: str
    name: str
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    section: str = ""


TASKS = {
    "auto": "sft",
    "sft": "sft",
    "preference": "preference",
    "dpo": "preference",
    "reward": "preference",
    "kto": "kto",
}
"""Task -> kind of data. Several trainers can use the same kind of data. `ftdata.pipeline.recipe.resolve_task`
replaces `auto` by the kind of the first row; rows that no task was resolved for are conversations."""

_OPTIONS = (
    Option("rendering", "template", str | None, None,
           "Template: name, .jinja file, file.py:function or Jinja source (default: the tokenizer's)"),
    Option("task", "task", str, "auto",
           "Data: auto (detect), sft, kto (labeled answers), or preference, dpo or reward (pairs)", tuple(TASKS)),
    Option("rows", "schema", str, "auto",
           "Schema of the rows: a name, ./file.py:function, or 'auto' to detect it"),
    Option("rows", "columns", dict[str, str] | None, None,
           "Read a schema column from a data column, e.g. output=answer (repeatable)"),
    Option("rows", "train_on", str, "assistant",
           "Messages to train on: assistant, last_assistant, completion, all, or ./file.py:function", section="mask"),
    Option("rows", "train_parts", list[str] | None, None,
           "Train only these parts of messages, e.g. reasoning,answer", section="mask"),
    Option("rows", "turns", str, "auto",
           "Examples per conversation: 'joint' (one), 'split' (one per turn) or 'auto'",
           ("auto", "joint", "split"), "mask"),
    Option("rows", "control_tokens", str, "escape",
           "Control tokens in the text of rows: escape (plain text), refuse (reject the row) or allow",
           ("escape", "refuse", "allow"), "mask"),
    Option("rows", "on_dropped_message", str, "reject",
           "What to do if the template omits a message: reject or flag the row", ("reject", "flag"), "mask"),
    Option("rows", "on_missing_stop", str, "flag",
           "What to do if the last turn has no stop token: flag or append_eos", ("flag", "append_eos"), "mask"),
    Option("rows", "reject_flags", list[str], (),
           "Reject rows with these flags, e.g. no_trained_stop,message_truncated", section="mask"),
    Option("rows", "image_folder", str | None, None,
           "Folder that relative paths of images are resolved against (default: the folder of the data file)"),
    Option("rows", "download_images", bool, False, "Download images at URLs, and store them in the build"),
    Option("rows", "max_length", int | None, None,
           "Maximum number of tokens per example and per pack", section="length"),
    Option("rows", "overlong", str, "reject",
           "What to do with examples over max_length: reject, drop_turns or truncate",
           ("reject", "drop_turns", "truncate"), "length"),
    Option("layout", "packing", str | None, None,
           "Algorithm to pack examples: 'bfd' (best-fit decreasing)", ("bfd",), "pack"),
    Option("selection", "where", str | None, None,
           "Read only rows that match this Jinja expression, e.g. lang == 'en'"),
    Option("selection", "limit", int | None, None, "Maximum number of rows to read from each source"),
    Option("layout", "dedup", bool, False, "Remove duplicate rows and keep the first"),
    Option("layout", "near_duplicate_threshold", float | None, None,
           "Similarity threshold for near-duplicates (0.5-1.0)"),
    Option("layout", "sample", int | float | None, None,
           "Size of a random sample: number of rows, or fraction, e.g. 0.1"),
    Option("layout", "shuffle", bool, False, "Shuffle the rows"),
    Option("layout", "test_size", int | float | None, None,
           "Size of the test split: rows, or a fraction, e.g. 0.1"),
    Option("layout", "seed", int, 0, "Random seed for splitting, sampling, shuffling and mixing"),
    Option("rejects", "on_bad_rows", str, "error",
           "What to do with invalid rows: 'error' (stop) or 'quarantine' (skip)", ("error", "quarantine")),
    Option("rejects", "max_rejects", int | float | str | None, None,
           "Maximum number or percentage of skipped invalid rows, e.g. 100 or 1%"),
    Option("rendering", "date", str | None, None,
           "Date that the template prints as the current date, e.g. 2026-01-31"),
    Option("rendering", "template_kwargs", dict[str, Any] | None, None,
           "Set a variable of the template, e.g. enable_thinking=false"),
)  # fmt: skip

OPTIONS = {option.name: option for option in _OPTIONS}
"""All options by name, in the order in which signatures, help texts and configuration files list them."""

SHARE_KEYS = {"weight": "times", "rows": "rows", "tokens": "tokens"}
"""Keys of a source mapping that set how much of the source is trained on -> unit."""

HUB_KEYS = ("name", "revision", "data_files")
"""Keys of a source mapping for data sets on the Hub."""

FILE_KEYS = (*HUB_KEYS, "format", "encoding", "quoting", "streaming", "ignore_records")
"""Keys of a source mapping for files."""

SOURCE_KEYS = ("path", "split", *SHARE_KEYS, *FILE_KEYS)
"""All keys of a mapping that describes a source, e.g. `{path: chats.jsonl, weight: 2}`."""


def check_source_keys(source: Mapping[str, Any], where: str = "") -> None:
    """Check the keys of a mapping that describes a source.

    Raises:
        UsageError: `unknown_data_key`: a key is unknown. The hint suggests the closest known key.

    >>> check_source_keys({"path": "chats.jsonl", "wieght": 2})
    Traceback (most recent call last):
    ftdata.errors.UsageError: [unknown_data_key] data has the unknown key 'wieght'. Fix: did you mean 'weight'? ...
    """
    for key in source:
        if key not in SOURCE_KEYS:
            hint = suggest_names(str(key), SOURCE_KEYS)
            if key in OPTIONS:
                hint = f"set {key} outside data for all sources, or convert this source with `ftdata convert`"
            raise UsageError("unknown_data_key", f"data has the unknown key {key!r}", where=where, hint=hint)


def option_names(*selected: str) -> tuple[str, ...]:
    """Return the names of the options that are selected by group or by name, in the order of the table.

    >>> option_names("rejects", "where")
    ('where', 'on_bad_rows', 'max_rejects')
    """
    return tuple(name for name, option in OPTIONS.items() if name in selected or option.group in selected)


def parse_list(name: str, value: Any) -> Any:
    """Split the value of an option that is a list, such as `train_parts`, if it is a text with commas.

    >>> parse_list("train_parts", "reasoning, answer"), parse_list("template", "a,b")
    (['reasoning', 'answer'], 'a,b')
    """
    is_list = name in OPTIONS and "list[" in str(OPTIONS[name].type)
    return [part.strip() for part in value.split(",")] if is_list and isinstance(value, str) else value


def select_options(values: Mapping[str, Any], *groups: str) -> dict[str, Any]:
    """Return the values of the options in the groups. Options without a value are left out."""
    return {name: values[name] for name in option_names(*groups) if name in values}


def check_choices(values: Mapping[str, Any]) -> None:
    """Check that each option with a fixed list of allowed values has one of these values, or its default.

    Raises:
        UsageError: an option has another value.
    """
    for name, value in values.items():
        if value != OPTIONS[name].default and (choices := OPTIONS[name].choices):
            check_choice(name, value, choices)
