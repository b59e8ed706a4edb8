"""Preview: some rows as they will be trained, chosen by number, id, pattern, or because they are odd."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ftdata.errors import InputRefused, UsageError
from ftdata.inspection import stored_builds, terminal
from ftdata.inspection.html_page import HtmlPage, render_fragment, write_page
from ftdata.inspection.overview import FIRST, make_overview
from ftdata.inspection.row_views import RowView, added_texts, make_row_view, make_text_view, to_single_line
from ftdata.inspection.survey import Outliers, Progress, survey_rows
from ftdata.inspection.target import Target, make_target
from ftdata.pipeline.examples import build_rows
from ftdata.pipeline.mask import Policy
from ftdata.pipeline.recipe import Options, load_bare_template
from ftdata.readers import FileSource, MemorySource, resolve_sources
from ftdata.readers.row_filter import RowFilter
from ftdata.types import Reject, Row

_IDS = ("id", "_id", "ID", "uuid", "uid", "guid", "key", "conversation_id", "prompt_id", "question_id", "task_id")
"""Columns by which people name rows."""


@dataclass(frozen=True, slots=True)
class Preview:
    """Some rows of a source, as they would be trained; in a notebook it shows itself.

    Attributes:
        title: what was looked at: data, template, tokenizer.
        rows: each row that is shown, with its examples as they are seen.
        notes: what is to be known of all of them, in sentences.
    """

    title: str
    rows: tuple[RowView, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        console = Console(color_system=None, width=200, soft_wrap=True)
        with console.capture() as capture:
            self.print(console)
        return capture.get()

    def print(self, console: Console) -> None:
        """Print to a rich console, in colour where it has colour."""
        console.print(Text(to_single_line(self.title), "bold"), soft_wrap=True)
        for note in self.notes:
            console.print(Text(f"note: {to_single_line(note)}", "yellow"), soft_wrap=True)
        terminal.print_rows(console, self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return the preview as JSON."""
        return {"title": self.title, "notes": list(self.notes), "rows": [shown.as_dict() for shown in self.rows]}

    def _repr_html_(self) -> str:
        return render_fragment(self.title, self.rows, self.notes)


def preview(
    data: Any,
    tokenizer: Any = None,
    template: str | Path | None = None,
    schema: str = "auto",
    columns: Mapping[str, str] | None = None,
    train_on: str | Policy = "assistant",
    train_parts: Sequence[str] | None = None,
    turns: str = "auto",
    control_tokens: str = "escape",
    on_dropped_message: str = "reject",
    on_missing_stop: str = "flag",
    reject_flags: Sequence[str] = (),
    max_length: int | None = None,
    overlong: str = "reject",
    n: int | None = None,
    row: int | Iterable[int] | None = None,
    id: str | int | None = None,  # noqa: A002  (the name of the column)
    grep: str | None = None,
    odd: bool = False,
    where: str | None = None,
    limit: int | None = None,
    packing: str | None = None,
    html: str | Path | None = None,
    date: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Preview:
    """Show what rows of `data` become, without building.

    Only as much of the source is read as is shown, but for `odd`, which reads all of it.

    Args:
        data: as for `build_sft_dataset`, and so are all options that are not listed here; or the folder of a build,
            of which the very tokens and labels are shown, and which takes none of them.
        tokenizer: `None` shows the text and what of it is trained, without tokens.
        template: without a tokenizer, `None` means `chatml`.
        n: how many rows to show, from the first (3); with `odd`: of each kind (1).
        row: show the rows of these numbers (from 0) instead.
        id: show the rows whose `id` is this (or whose `uuid`, `conversation_id`, ...).
        grep: show the rows with a text in which this regular expression is found.
        odd: show the rows that stand out: the longest, the shortest, those least trained, without a stop token, with
            control tokens in their texts, rewritten or not all printed by the template, duplicates, rejected ones.
        packing: for `html`: show the packs that a build would have.
        html: write all that is to be seen to this file, one page that needs nothing else. Where no rows are chosen
            all of the data is read: with the first `n` rows (100) there are those that stand out, how long examples
            are and what `max_length` cuts, packs, and rejected rows.
        progress: for `odd` and `html`, is told the rows and tokens done so far, and which share of the data that is.

    Returns:
        The rows: printed with colours by `.print(console)`, as text by `str`, as JSON by `.as_dict()`.

    Raises:
        UsageError: an unknown option value, or no such row.
        InputRefused: the source cannot be read.
        TemplateRefused: the template, or the tokenizer, cannot be used for any row.
        StorageError: a build is damaged, or the page cannot be written.
        HubError: the network or the hub fails.

    >>> print(preview([{"question": "2+2?", "answer": "4"}], template="question_answer", n=1))
    <memory> · template question_answer · no tokenizer
    ── row 0 · <memory>[0] · question_answer ──
    ### Question:↵
    2+2?↵
    ↵
    ### Answer:↵
    ⟦4⟨<eos>⟩■⟧
    6 of 38 characters trained
    <BLANKLINE>
    """
    wanted = RowSelection(n, _numbers(row), None if id is None else str(id), grep, odd, many=html is not None)
    choices: dict[str, Any] = {
        "schema": schema,
        "columns": columns,
        "train_on": train_on,
        "train_parts": train_parts,
        "turns": turns,
        "control_tokens": control_tokens,
        "on_dropped_message": on_dropped_message,
        "on_missing_stop": on_missing_stop,
        "reject_flags": reject_flags,
        "max_length": max_length,
        "overlong": overlong,
    }
    if tokenizer is None and stored_builds.find_build_folder(data) is None:
        page = _as_text(
            data, template, Options(**choices), wanted, RowFilter(where, limit), date, template_kwargs, packing
        )
        return _finished(page, wanted, html)
    # Which of these says nothing is no business of a build's.
    more = {"date": date, "template_kwargs": template_kwargs}
    given = {**choices, **{name: value for name, value in more.items() if value is not None}}
    side = make_target(data, tokenizer, template, where=where, limit=limit, **given)
    if packing is not None and (html is None or wanted.chosen):
        raise UsageError("packing", "packs are shown on a page of the whole: html, without a choice of rows")
    if html is not None and not wanted.chosen:
        page = make_overview(side, n, packing, progress)
    else:
        if odd:
            rows = _odd(side, wanted.most, progress)
        elif side.folder is not None:
            rows = _of_build(side, wanted)
        else:
            rows = _of_data(side, wanted, RowFilter(where, limit))
        page = HtmlPage(side.title, tuple(rows), side.recipe.tokenizer, warnings=tuple(added_texts(side.recipe)))
    return _finished(page, wanted, html)


@dataclass(frozen=True)
class RowSelection:
    """Which rows are to be shown.

    Raises:
        UsageError: nobody can want that.
    """

    n: int | None = None
    numbers: frozenset[int] | None = None
    id: str | None = None
    grep: str | None = None
    odd: bool = False
    many: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("numbers", "id", "grep", "odd") if getattr(self, name) not in (None, False)]
        given += ["n"] if self.numbers is not None and self.n is not None else []
        if len(given) > 1:
            names = " and ".join("row" if name == "numbers" else name for name in given)
            raise UsageError("rows_wanted", f"{names} both say which rows to show: which of them?")
        if self.n is not None and (type(self.n) is not int or not 1 <= self.n <= sys.maxsize):
            raise UsageError("n", f"n is {self.n!r}, expected a number of rows from 1")
        if self.grep is not None:
            try:
                re.compile(self.grep)
            except (re.error, TypeError) as error:
                raise UsageError("grep", f"grep={self.grep!r} is no regular expression: {error}") from None

    @property
    def chosen(self) -> bool:
        """Whether certain rows are wanted, not the first ones."""
        return self.numbers is not None or self.id is not None or self.grep is not None or self.odd

    @property
    def most(self) -> int:
        """How many rows to show, of each kind where they are odd ones."""
        return self.n if self.n is not None else 1 if self.odd else FIRST if self.many else 3

    def of(self, rows: Iterable[Row | Reject]) -> Iterator[Row | Reject]:
        """Yield the rows that are wanted, and read no further than they are."""
        if self.numbers is not None:
            yield from (row for row in rows if row.source.row in self.numbers)
        elif self.id is not None:
            yield from islice((row for row in rows if self.id in _ids_of(row)), self.n)
        elif self.grep is not None:
            found = re.compile(self.grep)
            yield from islice((row for row in rows if any(map(found.search, iterate_strings(row)))), self.most)
        else:
            yield from islice(rows, self.most)


def iterate_strings(row: Row | Reject) -> Iterator[str]:
    """Yield the texts of a row as they were written, but for the names of its columns."""
    left: list[Any] = [row.raw if isinstance(row, Reject) else row.data]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += reversed([*value.values()])
        elif isinstance(value, list | tuple):
            left += reversed(value)


def _ids_of(row: Row | Reject) -> set[str]:
    """Return all by which a row may be named; numbers that tables made fractions as whole ones, too."""
    if isinstance(row, Reject) or not isinstance(row.data, Mapping):
        return set()
    found = [row.data[name] for name in _IDS if row.data.get(name) is not None]
    whole = [str(int(one)) for one in found if isinstance(one, float) and one.is_integer()]
    return {*whole, *(one if isinstance(one, str) else json.dumps(one) for one in found)}


def _numbers(row: int | Iterable[int] | None) -> frozenset[int] | None:
    if row is None:
        return None
    numbers = [row] if isinstance(row, int) else list(row) if isinstance(row, Iterable) else [row]
    if not numbers or not all(type(number) is int and 0 <= number < sys.maxsize for number in numbers):
        raise UsageError("row", f"row is {row!r}, expected numbers from 0")
    return frozenset(numbers)


def _near(given: Iterable[FileSource | MemorySource], numbers: frozenset[int] | None) -> Iterator[Row | Reject]:
    """Yield rows without a download, which a first look does not need; of each source up to the last by number."""
    last = None if numbers is None else max(numbers) + 1
    for one in given:
        near = replace(one, streaming=True) if isinstance(one, FileSource) else one
        yield from islice(near.rows(), last)


def _as_text(
    data: Any,
    template: str | Path | None,
    options: Options,
    wanted: RowSelection,
    selection: RowFilter,
    date: str | None,
    kwargs: Mapping[str, Any] | None,
    packing: str | None,
) -> HtmlPage:
    counting = {
        "odd": wanted.odd,
        "max_length": options.max_length,
        "reject_flags": options.reject_flags,
        "packing": packing,
    }
    if given := [name for name, value in counting.items() if value]:
        found = f"{given[0]} is about tokens, and there is no tokenizer"
        raise UsageError("no_tokenizer", found, hint="pass the model's: --tokenizer")
    bare = load_bare_template(template if template is not None else "chatml", date, kwargs)
    rows = tuple(
        make_text_view(entry, bare, options)
        for entry in wanted.of(selection.of(_near(resolve_sources(data), wanted.numbers)))
    )
    places = [str(data)] if isinstance(data, str | Path) else list(dict.fromkeys(one.source.path for one in rows))
    return HtmlPage(f"{', '.join(places)} · template {bare.name} · no tokenizer", rows)


def _of_data(side: Target, wanted: RowSelection, selection: RowFilter) -> Iterator[RowView]:
    rows = wanted.of(selection.of(_near(side.sources, wanted.numbers)))
    return (make_row_view(outcome, side.recipe) for outcome in build_rows(side.recipe, rows))


def _of_build(side: Target, wanted: RowSelection) -> Iterator[RowView]:
    """Yield the examples that are wanted of a build, which are numbered in the order of its splits and packs."""
    if wanted.id is not None:
        raise UsageError("rows_wanted", "a build holds tokens, not the ids of rows", hint="choose by row, or by grep")
    folder = side.folder or Path()
    held = stored_builds.read_build_documents(folder, stored_builds.split_names(folder))
    if wanted.numbers is not None:
        held = (one for one in islice(held, max(wanted.numbers) + 1) if one.number in wanted.numbers)
    views = (make_row_view(stored_builds.document_to_row(side.recipe, one), side.recipe) for one in held)
    if wanted.grep is not None:
        found = re.compile(wanted.grep)
        views = (one for one in views if any(found.search(example.text) for example in one.examples))
    yield from views if wanted.numbers is not None else islice(views, wanted.most)


def _odd(side: Target, most: int, progress: Progress | None) -> Iterator[RowView]:
    odd = Outliers(most)
    survey_rows(side.steps(), side.names, odd, progress)
    return (make_row_view(outcome, side.recipe, why) for outcome, why in odd.rows())


def _finished(page: HtmlPage, wanted: RowSelection, html: str | Path | None) -> Preview:
    """Return what is shown, after writing the page if there is to be one.

    Raises:
        InputRefused: a row that was asked for is not there, or there are none.
    """
    there = {row.source.row if row.number is None else row.number for row in page.rows}
    if missing := sorted((wanted.numbers or frozenset()) - there):
        raise InputRefused("no_such_row", f"there is no row {', '.join(map(str, missing))}")
    if not page.rows:
        what = "are no rows"
        if wanted.id is not None or wanted.grep is not None:
            whose = f"whose id is {wanted.id!r}" if wanted.id is not None else f"that matches {wanted.grep!r}"
            what = f"is no row {whose}"
        raise InputRefused("no_such_row", f"there {what}")
    if html is not None:
        write_page(html, page)
    return Preview(page.title, tuple(page.rows), tuple(page.warnings))
