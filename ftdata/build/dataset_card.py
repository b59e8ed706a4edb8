"""Render the dataset card of a build, which lists the sources, options and counts."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from ftdata._version import __version__
from ftdata.build.ledger import Report
from ftdata.build.reject_limit import RejectLimit
from ftdata.build.splits import Layout
from ftdata.errors import count_noun
from ftdata.pipeline.recipe import Options, Recipe
from ftdata.readers.row_filter import RowFilter
from ftdata.storage import disk


def render_dataset_card(report: Report, recipe: Recipe, files: Mapping[str, Sequence[str]]) -> str:
    """Return the text of a build's dataset card, `README.md`.

    The card lists the files of each split for `datasets.load_dataset`, the sources, the tokenizer, the template, the
    mask policy, the counts, and the command that reproduces the build.

    Args:
        report: the report of the build.
        recipe: the recipe of the build.
        files: the files of each split.
    """
    listed = {split: "".join(f"\n    - {name}" for name in names) for split, names in files.items()}
    paths = "".join(f"  - split: {split}\n    path:{names}\n" for split, names in listed.items())
    facts = "".join(f"| {name} | {_cell(value)} |\n" for name, value in _facts(report, recipe))
    title = _escape_markdown(", ".join(Path(ledger.source).name for ledger in report.sources))
    fence = _fence(str(report), 3)
    columns = {
        "sft": "token ids, labels (-100 for tokens without loss) and document lengths",
        "preference": "preference pairs with the token ids and labels of both sides",
        "kto": "token ids and labels (-100 for tokens without loss) of answers, and whether each answer is desirable",
    }[recipe.task]
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{paths}---\n\n# {title}\n\n"
        f"Built by ftdata: {columns}.\n\n"
        f"| | |\n|---|---|\n{facts}\n{fence}\n{report}\n{fence}\n"
    )


def _facts(report: Report, recipe: Recipe) -> Iterator[tuple[str, object]]:
    options, template = report.options, recipe.template
    for number, (ledger, place) in enumerate(zip(report.sources, options["sources"], strict=True), start=1):
        split = f", split {place['split']}" if place["split"] else ""
        share = "" if (place["amount"], place["unit"]) == (1, "times") else f", {place['amount']:g} {place['unit']}"
        yield f"source {number}", f"{ledger.source}: {count_noun(ledger.built, 'row')}{split}{share}"
    yield "tokenizer", f"{recipe.tokenizer.name} ({recipe.tokenizer.fingerprint})"
    yield "template", f"{template.name} ({disk.hash_bytes(template.source.encode())})"
    if template.kwargs:
        yield "template variables", dict(template.kwargs)
    yield "trained on", ", ".join([options["train_on"], *(options["train_parts"] or ())])
    yield "max_length", recipe.max_length
    yield "packing", options["packing"]
    yield "command", _command(report, recipe)
    yield "fingerprint", report.fingerprint
    yield "ftdata", __version__


def _cell(value: object) -> str:
    """Format a value as inline code for a Markdown table, so that Markdown syntax in the value has no effect."""
    text = re.sub(r"\s+", " ", str(value)).replace("|", r"\|")
    fence = _fence(text, 1)
    return f"{fence}{text}{fence}" if fence == "`" else f"{fence} {text} {fence}"


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]()<>#!|~])", r"\\\1", re.sub(r"\s+", " ", text))


def _fence(text: str, min_length: int) -> str:
    """Return a Markdown code fence that is longer than any run of backticks in the text."""
    return "`" * max(min_length, 1 + max(map(len, re.findall("`+", text)), default=0))


def _command(report: Report, recipe: Recipe) -> str:
    """Return the `ftdata build` command that repeats the build, or a note if no command supports the options."""
    options, template = report.options, recipe.template
    cli_options = {"encoding", "ignore_records", "quoting", "split", "path"}
    items = [{"path": item} if isinstance(item, str) else item for item in options["data"] or ()]
    item_options = [{name: value for name, value in item.items() if name != "path"} for item in items]
    have_same_options = all(choices == item_options[0] and set(choices) <= cli_options for choices in item_options)
    uses_objects = template.name == "<string>" or callable(recipe.train_on) or "<object>" in recipe.tokenizer.name
    if not items or not have_same_options or uses_objects:
        return "none: this build needs Python or a configuration file"
    words = ["ftdata", "build", *(str(item["path"]) for item in items), "--tokenizer", recipe.tokenizer.name]
    words += [word for name, value in item_options[0].items() for word in (f"--{name.replace('_', '-')}", str(value))]
    if template.name != "tokenizer":
        words += ["--template", template.name]
    if template.uses_date:
        words += ["--date", f"{template.date:%Y-%m-%d}"]
    option_fields = (*fields(Options), *fields(Layout), *fields(RowFilter), *fields(RejectLimit))
    defaults = {field.name: field.default for field in option_fields}
    for name, default in defaults.items():
        value = options.get(name)
        if name != "columns" and value and value != default:
            listed = ",".join(value) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [listed])]
    words += [
        word
        for name, value in template.kwargs.items()
        for word in ("--template-kwarg", f"{name}={json.dumps(value, ensure_ascii=False)}")
    ]
    words += [word for pair in options["columns"].items() for word in ("--column", "=".join(pair))]
    return shlex.join([*words, "--output-dir", "OUT"])
