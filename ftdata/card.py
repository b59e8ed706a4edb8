"""Card: what a build was made of and how, for people and for the hub."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import xxhash

from ftdata._version import __version__
from ftdata.layout import Layout
from ftdata.ledger import Report
from ftdata.readers.select import Selection
from ftdata.recipe import Options, Recipe
from ftdata.tolerance import Tolerance


def card(report: Report, recipe: Recipe) -> str:
    """Return `README.md`: the files of each split for the hub and `datasets.load_dataset`, and the report.

    It states sources, tokenizer, template, what is trained, counts, and the command that builds the same.
    """
    files = "".join(f"  - split: {split}\n    path: {split}/data-*.arrow\n" for split in report.splits)
    listed = "".join(f"| {name} | `{_cell(value)}` |\n" for name, value in _facts(report, recipe))
    title = ", ".join(Path(ledger.source).name for ledger in report.sources)
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n\n# {title}\n\n"
        f"Built by ftdata: tokens, labels (-100 where nothing is learnt) and document lengths.\n\n"
        f"| | |\n|---|---|\n{listed}\n```\n{report}\n```\n"
    )


def _facts(report: Report, recipe: Recipe) -> Iterator[tuple[str, object]]:
    options, template = report.options, recipe.template
    for number, (ledger, place) in enumerate(zip(report.sources, options["sources"], strict=True), start=1):
        split = f", split {place['split']}" if place["split"] else ""
        share = "" if (place["amount"], place["unit"]) == (1, "times") else f", {place['amount']:g} {place['unit']}"
        yield f"source {number}", f"{ledger.source}: {ledger.built:,} rows{split}{share}"
    yield "tokenizer", f"{recipe.tokenizer.name} ({recipe.tokenizer.fingerprint})"
    yield "template", f"{template.name} ({xxhash.xxh3_128_hexdigest(template.source.encode())})"
    if template.kwargs:
        yield "template variables", dict(template.kwargs)
    yield "trained on", ", ".join([options["train_on"], *(options["train_parts"] or ())])
    yield "max_length", recipe.max_length
    yield "packing", options["packing"]
    yield "command", _command(report, recipe)
    yield "fingerprint", report.fingerprint
    yield "ftdata", __version__


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", r"\|")


def _command(report: Report, recipe: Recipe) -> str:
    """Return the command line that builds the same, but for what only a configuration can say of sources."""
    options = report.options
    paths = dict.fromkeys(each.source for each in report.sources)
    words = ["ftdata", "build", *paths, "--tokenizer", options["tokenizer"]["name"]]
    if options["template"]["name"] != "tokenizer":
        words += ["--template", options["template"]["name"]]
    if recipe.template.uses_date:
        words += ["--date", f"{recipe.template.date:%Y-%m-%d}"]
    for option in (*fields(Options), *fields(Layout), *fields(Selection), *fields(Tolerance)):
        name, value = option.name, options.get(option.name)
        if name != "columns" and value and value != option.default:
            listed = ",".join(value) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [listed])]
    words += [word for pair in options["columns"].items() for word in ("--column", "=".join(pair))]
    return shlex.join(words)
