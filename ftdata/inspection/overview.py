"""Create the overview page of data or a build: first rows, outliers, lengths, packed sequences, rejected rows."""

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
from ftdata.errors import count_noun
from ftdata.inspection import charts, stored_builds
from ftdata.inspection.html_page import MOST_PACKS, HtmlPage, PackLayout, flatten_options
from ftdata.inspection.row_views import RowView, added_texts, make_row_view
from ftdata.inspection.summary import summarize_flags
from ftdata.inspection.survey import Outliers, RowNumbers, Survey, row_key, survey_rows
from ftdata.inspection.target import Target
from ftdata.pipeline.batch import Batch, BuiltRow
from ftdata.pipeline.flags import FLAGS, describe_flags
from ftdata.pipeline.recipe import Recipe
from ftdata.progress import Progress
from ftdata.storage import disk
from ftdata.types import Reject

DEFAULT_ROWS, MAX_CHARACTERS = 100, 2_000_000
"""The default number of first rows on a page, and the maximum number of characters of these rows."""


@dataclass
class FirstRows:
    """Collect the first rows of the data, up to a maximum number of rows or characters.

    Attributes:
        limit: The number of rows; `None` to use `DEFAULT_ROWS` and `MAX_CHARACTERS`.
        outcomes: The rows so far.
        characters: The number of characters so far.
    """

    limit: int | None
    outcomes: list[BuiltRow | Reject] = field(default_factory=list)
    characters: int = 0

    def __call__(self, batch: Batch) -> None:
        """Add the rows of a batch until the maximum is reached."""
        for outcome in () if self._is_full() else batch:
            self.outcomes.append(outcome)
            if isinstance(outcome, BuiltRow):
                self.characters += sum(len(example.text) for example in outcome.examples)
            if self._is_full():
                break

    def _is_full(self) -> bool:
        if self.limit is not None:
            return len(self.outcomes) >= self.limit
        return len(self.outcomes) >= DEFAULT_ROWS or self.characters >= MAX_CHARACTERS


def make_overview(target: Target, limit: int | None, packing: str | None, progress: Progress | None) -> HtmlPage:
    """Read all rows of data or of a build, and return an overview page.

    Args:
        target: The data or the build.
        limit: The number of first rows to show; `None` for the default.
        packing: Plan packed sequences as a build would; the stored packed sequences of a build are always shown.
        progress: Called with a `ProgressUpdate` after each batch of rows.

    Raises:
        UsageError: `packing` is set without `max_length`, or for a build.
    """
    recipe = target.recipe
    if target.folder is not None:
        stored_builds.refuse_build_options({"packing": packing})
    Layout(packing=packing, max_length=recipe.max_length)
    first_rows, outliers = FirstRows(limit), Outliers()

    def on_batch(batch: Batch, numbers: RowNumbers) -> None:
        first_rows(batch)
        outliers(batch, numbers)

    survey = target.complete_survey(survey_rows(target.steps(), target.names, on_batch, progress))
    if target.folder is None:
        options = {**target.options, "packing": packing}
        digest = disk.hash_bytes(json.dumps(options, sort_keys=True).encode())
        has_packs = packing and recipe.max_length and len(survey.numbers)
        packs = _plan_layout(survey, recipe.max_length or 0) if has_packs else None
        table = {"fingerprint of the options": digest, **flatten_options(options)}
    else:
        names = stored_builds.split_names(target.folder)
        is_packed = target.options["packing"] and recipe.max_length
        packs = _read_layout(target.folder, names, recipe.max_length or 0) if is_packed else None
        table = {"fingerprint": read_manifest(target.folder)["fingerprint"], **flatten_options(target.options)}
    return _make_page(target, _make_rows(first_rows, outliers, recipe), survey, outliers.counts, packs, table)


def _make_rows(first_rows: FirstRows, outliers: Outliers, recipe: Recipe) -> list[RowView]:
    """Return the first rows for display, followed by the outliers that are not among the first rows."""
    outliers_by_key = {row_key(outcome): (outcome, kinds) for outcome, kinds in outliers.rows()}
    rows = []
    for outcome in first_rows.outcomes:
        _, kinds = outliers_by_key.pop(row_key(outcome), (outcome, []))
        rows.append(make_row_view(outcome, recipe, kinds))
    return rows + [make_row_view(outcome, recipe, kinds) for outcome, kinds in outliers_by_key.values()]


def _make_page(
    target: Target,
    rows: list[RowView],
    survey: Survey,
    kind_counts: Mapping[str, int],
    packs: PackLayout | None,
    options: Mapping[str, Any],
) -> HtmlPage:
    numbers, recipe = survey.numbers, target.recipe
    tokens, trained = int(numbers.tokens.sum()), int(numbers.trained.sum())
    totals = {
        "rows read": f"{survey.rows:,}",
        "rejected": f"{sum(survey.rejected.values()):,}",
        "examples": f"{len(numbers.tokens):,}",
        "tokens": f"{tokens:,}",
        "trained": f"{trained / max(tokens, 1):.1%}",
    }
    if packs:
        totals |= {"packs": f"{packs.count:,}", "full": f"{packs.fill:.2%}"}
    picture = None
    if len(survey.lengths):
        svg = charts.draw_length_histogram(survey.lengths, line=recipe.max_length)
        picture = svg, describe_lengths(survey, recipe)
    return HtmlPage(
        target.heading,
        rows,
        recipe.tokenizer,
        status=_describe_rows(rows, survey),
        summary=summarize_flags(survey.rows, len(numbers.tokens), survey.flags, survey.rejected),
        totals=totals,
        notes=tuple(collect_notes(survey, recipe)),
        kind_counts=kind_counts,
        picture=picture,
        packs=packs,
        rejects=(survey.rejected, survey.rejects[:500]),
        options=options,
    )


def _describe_rows(rows: Sequence[RowView], survey: Survey) -> str:
    """Describe how many rows the page contains. Return an empty string if it contains all rows."""
    unit, total = ("rows", survey.rows) if survey.read is None else ("examples", len(survey.numbers))
    count = len(rows) if survey.read is None else sum(row.number is not None for row in rows)
    return f"this page contains {count:,} of {total:,} {unit}" if count < total else ""


def collect_notes(survey: Survey, recipe: Recipe) -> Iterator[str]:
    """Yield notes about the template, and one note for each flag of the examples that is not a problem."""
    yield from added_texts(recipe)
    no_problems = [code for code, flag in FLAGS.items() if not flag.severity and code != "pretokenized"]
    yield from describe_flags({code: survey.flags[code] for code in no_problems if code in survey.flags})


def describe_lengths(survey: Survey, recipe: Recipe) -> str:
    """Summarize the lengths of the examples and the effect of `max_length`."""
    lengths = survey.lengths
    summary = (
        f"{count_noun(len(lengths), 'example')} of {int(lengths.min()):,} to {int(lengths.max()):,} tokens, "
        f"median {int(np.median(lengths)):,}. "
    )
    if recipe.max_length is None:
        return f"{summary}max_length is not set."
    longer = int((lengths > recipe.max_length).sum())
    if not longer:
        return f"{summary}No example exceeds max_length {recipe.max_length:,}."
    truncated, dropped = int((survey.numbers.cut > 0).sum()), len(survey.overlong)
    # A build does not contain the truncated text, nor the turns that `drop_turns` removed.
    lost = f", {survey.lost:,} removed completely." if survey.read is None else ", as far as the build records."
    rejected, answers = survey.rejected.get("overlong", 0), survey.flags.get("answer_truncated", 0)
    return (
        f"{summary}{count_noun(longer, 'example')} longer than max_length {recipe.max_length:,} "
        f"(overlong={recipe.overlong}): {truncated:,} truncated, {dropped:,} left out "
        f"({count_noun(rejected, 'row')} rejected). {count_noun(answers, 'answer')} truncated{lost}"
    )


def _plan_layout(survey: Survey, size: int) -> PackLayout:
    """Compute the packed sequences that a build of these rows would contain."""
    numbers = survey.numbers
    plan = plan_packs(numbers.tokens, size)
    row = np.repeat(np.arange(len(numbers)), numbers.examples)

    def document(example: int) -> tuple[int, str, str]:
        source = survey.source(int(row[example]))
        return int(numbers.tokens[example]), str(source), f"{source.path}\0{source.row}\0"

    packs = [
        plan.order[plan.bounds[number] : plan.bounds[number + 1]].tolist()
        for number in range(min(len(plan), MOST_PACKS))
    ]
    fill = int(numbers.tokens.sum()) / (len(plan) * size)
    return PackLayout(size, len(plan), fill, [[document(example) for example in pack] for pack in packs])


def _read_layout(folder: Path, splits: Sequence[str], size: int) -> PackLayout:
    """Read the packed sequences of a build.

    The counts cover all splits. Only documents of the first split are listed.
    """
    packs: list[list[tuple[int, str, str]]] = []
    for document in stored_builds.read_build_documents(folder, splits[:1]):
        if document.pack >= MOST_PACKS:
            break
        packs += [[] for _ in range(document.pack + 1 - len(packs))]
        key = f"{document.source.path}\0{document.source.row}\0{document.number}"
        packs[document.pack].append((len(document.ids), str(document.source), key))
    counts = stored_builds.read_report(folder).splits.values()
    count, tokens = (sum(split[name] for split in counts) for name in ("rows", "tokens"))
    return PackLayout(size, count, tokens / max(count * size, 1), packs)
