"""Overview: the page of a whole data set or build: its first rows, those that stand out, lengths, packs, rejects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ftdata.build.pack import plan_packs
from ftdata.build.splits import Layout
from ftdata.build.store import read_manifest
from ftdata.inspection import charts, stored_builds
from ftdata.inspection.html_page import MOST_PACKS, HtmlPage, PackLayout, flatten_options
from ftdata.inspection.row_views import RowView, added_texts, make_row_view
from ftdata.inspection.survey import Ints, Outliers, Progress, RowNumbers, Survey, row_key, survey_rows
from ftdata.inspection.target import Target
from ftdata.pipeline.examples import Batch, BuiltRow
from ftdata.pipeline.recipe import FLAGS, Recipe
from ftdata.storage import disk
from ftdata.types import Reject

FIRST, LETTERS = 100, 2_000_000
"""How many rows a page begins with where nobody said so, and how many characters these may have."""


@dataclass
class FirstRows:
    """The first rows, `most` of them or, where that is `None`, as many as a page holds well; shown batches."""

    most: int | None
    found: list[BuiltRow | Reject] = field(default_factory=list)
    letters: int = 0

    def __call__(self, batch: Batch) -> None:
        """Look at a batch."""
        if self._is_full():
            return
        for outcome in batch:
            self.found.append(outcome)
            if isinstance(outcome, BuiltRow):
                self.letters += sum(len(one.text) for one in outcome.examples)
            if self._is_full():
                return

    def _is_full(self) -> bool:
        if self.most is not None:
            return len(self.found) >= self.most
        return len(self.found) >= FIRST or self.letters >= LETTERS


def make_overview(side: Target, most: int | None, packing: str | None, progress: Progress | None) -> HtmlPage:
    """Return the page of data, or of a build with the very tokens and labels that it holds, after reading all of it.

    Args:
        side: the data, or the build.
        most: how many of the first rows to show.
        packing: show the packs that a build would have; those that a build has are shown.
        progress: is told the rows and tokens done so far, and which share of the data that is.

    Raises:
        UsageError: packs are asked for, and not how long they are; or of a build.
    """
    recipe = side.recipe
    if side.folder is not None:
        stored_builds.refuse_build_options({"packing": packing})
    Layout(packing=packing, max_length=recipe.max_length)
    first, odd = FirstRows(most), Outliers()

    def watch(batch: Batch, numbers: RowNumbers) -> None:
        first(batch)
        odd(batch, numbers)

    seen = side.finished(survey_rows(side.steps(), side.names, watch, progress))
    if side.folder is None:
        options = {**side.options, "packing": packing}
        digest = disk.hash_bytes(json.dumps(options, sort_keys=True).encode())
        packs = _planned(seen, recipe.max_length) if packing and recipe.max_length and len(seen.numbers) else None
        said = {"fingerprint of the options": digest, **flatten_options(options)}
    else:
        names = stored_builds.split_names(side.folder)
        packed = side.options["packing"] and recipe.max_length
        packs = _stored(side.folder, names, recipe.max_length or 0) if packed else None
        said = {"fingerprint": read_manifest(side.folder)["fingerprint"], **flatten_options(side.options)}
    return _page(side.title, _rows(first, odd, side.recipe), recipe, seen, packs, said)


def _rows(first: FirstRows, odd: Outliers, recipe: Recipe) -> list[RowView]:
    """Return the first rows, and after them those that stand out and are not among them."""
    stand_out = {row_key(outcome): (outcome, reasons) for outcome, reasons in odd.rows()}
    rows = []
    for outcome in first.found:
        _, reasons = stand_out.pop(row_key(outcome), (outcome, []))
        rows.append(make_row_view(outcome, recipe, reasons))
    return rows + [make_row_view(outcome, recipe, reasons) for outcome, reasons in stand_out.values()]


def _page(
    title: str, rows: list[RowView], recipe: Recipe, seen: Survey, packs: PackLayout | None, options: Mapping[str, Any]
) -> HtmlPage:
    numbers = seen.numbers
    tokens, trained = int(numbers.tokens.sum()), int(numbers.trained.sum())
    totals = {
        "rows read": f"{seen.rows:,}",
        "rejected": f"{sum(seen.rejected.values()):,}",
        "examples": f"{len(numbers.tokens):,}",
        "tokens": f"{tokens:,}",
        "trained": f"{trained / max(tokens, 1):.1%}",
    }
    if packs:
        totals["packs"] = f"{packs.count:,}"
        totals["full"] = f"{packs.fill:.2%}"
    lengths = seen.lengths
    picture = (
        (charts.draw_length_histogram(lengths, line=recipe.max_length), describe_lengths(seen, recipe))
        if len(lengths)
        else None
    )
    return HtmlPage(
        title,
        rows,
        recipe.tokenizer,
        said=_said(rows, seen),
        totals=totals,
        warnings=tuple(collect_warnings(seen, recipe)),
        picture=picture,
        packs=packs,
        rejects=(seen.rejected, seen.rejects[:500]),
        options=options,
    )


def _said(rows: Sequence[RowView], seen: Survey) -> str:
    what, there = ("rows", seen.rows) if seen.read is None else ("examples", len(seen.numbers.tokens))
    shown = len(rows) if seen.read is None else sum(row.number is not None for row in rows)
    return f"{shown:,} of {there:,} {what} are in this page" if shown < there else ""


def collect_warnings(seen: Survey, recipe: Recipe) -> Iterator[str]:
    """Yield what a careful reader should know of a template, and of what it made of the rows."""
    yield from added_texts(recipe)
    for flag, count in seen.flags.items():
        if flag in FLAGS and flag != "pretokenized":
            yield FLAGS[flag].format(n=f"{count:,}", repeated="some")


def describe_lengths(seen: Survey, recipe: Recipe) -> str:
    """Say how long examples are, and what `max_length` does to them."""
    lengths = seen.lengths
    said = f"{len(lengths):,} examples of {int(lengths.min()):,} to {int(lengths.max()):,} tokens"
    said += f", half of them up to {int(np.median(lengths)):,}. "
    if recipe.max_length is None:
        return f"{said}There is no max_length."
    longer = int((lengths > recipe.max_length).sum())
    if not longer:
        return f"{said}All fit into max_length {recipe.max_length:,}."
    cut, out = int((seen.numbers.cut > 0).sum()), len(seen.overlong)
    # A build has neither what was cut nor what `drop_turns` left out.
    lost = f", {seen.lost:,} are lost whole." if seen.read is None else ", as far as a build tells."
    return (
        f"{said}{longer:,} are longer than max_length {recipe.max_length:,} (overlong={recipe.overlong}): "
        f"{cut:,} are cut, {out:,} are left out ({seen.rejected.get('overlong', 0):,} rows are rejected for it); "
        f"{seen.flags.get('answer_truncated', 0):,} answers lose their end{lost}"
    )


def _planned(seen: Survey, size: int) -> PackLayout:
    """Return the packs that a build of these rows would have."""
    numbers = seen.numbers
    plan = plan_packs(numbers.tokens, size)
    row = np.repeat(np.arange(len(numbers)), numbers.examples)

    def document(example: int) -> tuple[int, str, str]:
        source = seen.source(int(row[example]))
        return int(numbers.tokens[example]), str(source), f"{source.path}\0{source.row}\0"

    some = [plan.order[plan.bounds[at] : plan.bounds[at + 1]].tolist() for at in range(min(len(plan), MOST_PACKS))]
    fill = int(numbers.tokens.sum()) / (len(plan) * size)
    return PackLayout(size, len(plan), fill, [[document(one) for one in pack] for pack in some])


def _stored(folder: Path, splits: Sequence[str], size: int) -> PackLayout:
    shown: list[list[tuple[int, str, str]]] = []
    for one in stored_builds.read_build_documents(folder, splits[:1]):
        if one.pack >= MOST_PACKS:
            break
        shown += [[] for _ in range(one.pack + 1 - len(shown))]
        key = f"{one.source.path}\0{one.source.row}\0{one.number}"
        shown[one.pack].append((len(one.ids), str(one.source), key))
    columns = [stored_builds.read_provenance(folder, split) for split in splits]
    count = sum(int(each["pack"].max(initial=-1)) + 1 for each in columns)
    tokens: Ints = np.concatenate([each["tokens"] for each in columns])
    return PackLayout(size, count, int(tokens.sum()) / max(count * size, 1), shown)
