"""Card: what a build was made of and how, for people and for the hub."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from ftdata._version import __version__
from ftdata.build.ledger import Report
from ftdata.build.reject_limit import RejectLimit
from ftdata.build.splits import Layout
from ftdata.pipeline.recipe import Options, Recipe
from ftdata.readers.row_filter import RowFilter
from ftdata.storage import disk


def render_dataset_card(report: Report, recipe: Recipe, files: Mapping[str, Sequence[str]]) -> str:
    """Return `README.md`: the files of each split for the hub and `datasets.load_dataset`, and the report.

    It states sources, tokenizer, template, what is trained, counts, and the command that builds the same. `files` are
    those of each split.
    """
    listed = {split: "".join(f"\n    - {name}" for name in names) for split, names in files.items()}
    paths = "".join(f"  - split: {split}\n    path:{names}\n" for split, names in listed.items())
    facts = "".join(f"| {name} | {_cell(value)} |\n" for name, value in _facts(report, recipe))
    title = _plain(", ".join(Path(ledger.source).name for ledger in report.sources))
    fence = _fence(str(report), 3)
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{paths}---\n\n# {title}\n\n"
        f"Built by ftdata: tokens, labels (-100 where nothing is learnt) and document lengths.\n\n"
        f"| | |\n|---|---|\n{facts}\n{fence}\n{report}\n{fence}\n"
    )


def _facts(report: Report, recipe: Recipe) -> Iterator[tuple[str, object]]:
    options, template = report.options, recipe.template
    for number, (ledger, place) in enumerate(zip(report.sources, options["sources"], strict=True), start=1):
        split = f", split {place['split']}" if place["split"] else ""
        share = "" if (place["amount"], place["unit"]) == (1, "times") else f", {place['amount']:g} {place['unit']}"
        yield f"source {number}", f"{ledger.source}: {ledger.built:,} rows{split}{share}"
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
    """Return a value as code: names of files and columns are of strangers, and say nothing in Markdown."""
    text = re.sub(r"\s+", " ", str(value)).replace("|", r"\|")
    fence = _fence(text, 1)
    return f"{fence}{text}{fence}" if fence == "`" else f"{fence} {text} {fence}"


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]()<>#!|~])", r"\\\1", re.sub(r"\s+", " ", text))


def _fence(text: str, least: int) -> str:
    """Return more backticks than there are together in a text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _command(report: Report, recipe: Recipe) -> str:
    """Return the command line that builds the same; what it cannot say is said to be in Python or a configuration."""
    options, template = report.options, recipe.template
    shared = {"encoding", "quoting", "split", "path"}
    places = [{"path": one} if isinstance(one, str) else one for one in options["data"] or ()]
    more = [{name: value for name, value in one.items() if name != "path"} for one in places]
    alike = all(one == more[0] and set(one) <= shared for one in more)
    inline = template.name == "<string>" or callable(recipe.train_on) or "<object>" in recipe.tokenizer.name
    if not places or not alike or inline or template.kwargs:
        return "none: what was asked for takes Python, or a configuration"
    words = ["ftdata", "build", *(str(one["path"]) for one in places), "--tokenizer", recipe.tokenizer.name]
    words += [word for name, value in more[0].items() for word in (f"--{name}", str(value))]
    if template.name != "tokenizer":
        words += ["--template", template.name]
    if template.uses_date:
        words += ["--date", f"{template.date:%Y-%m-%d}"]
    known = (*fields(Options), *fields(Layout), *fields(RowFilter), *fields(RejectLimit))
    defaults = {each.name: each.default for each in known}
    for name, default in defaults.items():
        value = options.get(name)
        if name != "columns" and value and value != default:
            listed = ",".join(value) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [listed])]
    words += [word for pair in options["columns"].items() for word in ("--column", "=".join(pair))]
    return shlex.join([*words, "--output-dir", "OUT"])
