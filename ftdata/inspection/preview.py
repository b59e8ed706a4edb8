"""Show selected rows with the tokens and labels that training would use."""

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
from ftdata.inspection.overview import DEFAULT_ROWS, make_overview
from ftdata.inspection.row_views import Heading, RowView, added_texts, make_row_view, make_text_view, to_single_line
from ftdata.inspection.survey import Outliers, survey_rows
from ftdata.inspection.target import Target, make_target
from ftdata.options import select_options
from ftdata.pipeline.examples import build_rows
from ftdata.pipeline.mask import Policy
from ftdata.pipeline.recipe import Options, load_bare_template, resolve_task
from ftdata.progress import Progress
from ftdata.readers import FileSource, MemorySource, reread_rows, resolve_sources
from ftdata.readers.row_filter import RowFilter, find_missing_column
from ftdata.schemas import expand_rankings
from ftdata.spelling import spell_options
from ftdata.types import SIDES, Reject, Row

_ID_COLUMNS = (
    *("id", "_id", "ID", "uuid", "uid", "guid", "key"),
    *("conversation_id", "prompt_id", "question_id", "task_id"),
)
"""Columns that commonly identify rows."""


@dataclass(frozen=True, slots=True)
class Preview:
    """Rows with the tokens and labels that training would use. Notebooks display a preview as HTML.

    Attributes:
        title: The data, the template and the tokenizer.
        rows: The views of the rows.
        notes: Notes that apply to all rows.
    """

    title: str
    rows: tuple[RowView, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return terminal.render_plain_text(self.print)

    def print(self, console: Console) -> None:
        """Print the rows to a rich console, in color if the console supports colors."""
        console.print(Text(to_single_line(self.title), "bold"), soft_wrap=True)
        for note in self.notes:
            console.print(Text(f"note: {spell_options(to_single_line(note))}", "yellow"), soft_wrap=True)
        terminal.print_rows(console, self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Convert the preview to a JSON-serializable dictionary."""
        return {"title": self.title, "notes": list(self.notes), "rows": [row.as_dict() for row in self.rows]}

    def _repr_html_(self) -> str:
        return render_fragment(self.title, self.rows, self.notes)


def preview(
    data: Any,
    tokenizer: Any = None,
    template: str | Path | None = None,
    task: str = "auto",
    schema: str = "auto",
    columns: Mapping[str, str] | None = None,
    train_on: str | Policy = "assistant",
    train_parts: Sequence[str] | None = None,
    turns: str = "auto",
    control_tokens: str = "escape",
    on_dropped_message: str = "reject",
    on_missing_stop: str = "flag",
    reject_flags: Sequence[str] = (),
    image_folder: str | None = None,
    download_images: bool = False,
    max_length: int | None = None,
    overlong: str = "reject",
    n: int | None = None,
    row: int | Iterable[int] | None = None,
    id: str | int | None = None,  # noqa: A002  (the name of the column)
    grep: str | None = None,
    outliers: bool = False,
    packing: str | None = None,
    where: str | None = None,
    limit: int | None = None,
    html: str | Path | None = None,
    date: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Preview:
    """Show rows with the tokens and labels that training would use. No build is created.

    Only the rows that are shown are read; `outliers` and an HTML overview read all rows.

    Args:
        data: As for `build_sft_dataset`, as are all options that are not listed here. Or the folder of a build: then
            the stored tokens and labels are shown, and recipe options are invalid.
        tokenizer: `None` shows the text and its trained spans, without tokens.
        template: The default without a tokenizer is `chatml`.
        n: Number of rows to show (3). With `outliers`: the number of each kind (1).
        row: Show the rows with these numbers, from 0.
        id: Show the rows with this `id` (or `uuid`, `conversation_id`, ...).
        grep: Show the rows with text that matches this regular expression.
        outliers: Show the longest, shortest and least trained rows, and rows without a stop token, with control
            tokens in the text, truncated, rewritten or not fully printed by the template, duplicates, rejected rows.
        packing: With `html`: show the packed sequences that a build would have.
        html: Write a self-contained HTML page to this file. Unless you select rows, the page is an overview of all
            data: the first `n` rows (100), the outliers, a histogram of lengths, the effect of `max_length`, packed
            sequences, and rejected rows.
        progress: With `outliers` or `html`: called with a `ProgressUpdate` after each batch of rows.

    Returns:
        The rows. Use `.print(console)` for styled output, `str` for plain text, and `.as_dict()` for JSON.

    Raises:
        UsageError: An option is invalid.
        InputRefused: The source cannot be read, a build is damaged, or a selected row does not exist.
        TemplateRefused: The template or the tokenizer cannot be used for any row.
        StorageError: The page cannot be written.
        HubError: The network or the hub fails.

    >>> print(preview([{"question": "2+2?", "answer": "4"}], template="question_answer", n=1))
    <memory> · template question_answer · tokenizer none
    ── row 0 · <memory>[0] · question_answer ──
    ### Question:↵
    2+2?↵
    ↵
    ### Answer:↵
    ⟦4⟨<eos>⟩■⟧
    6 of 38 characters trained
    <BLANKLINE>
    """
    options = select_options(locals(), "task", "rows")
    selection = RowSelection(
        n, _row_numbers(row), None if id is None else str(id), grep, outliers, is_page=html is not None
    )
    if tokenizer is None and stored_builds.find_build_folder(data) is None:
        shown = resolve_task(Options(**options), task, resolve_sources(data))
        page = _make_text_page(
            data, template, shown, selection, RowFilter(where, limit), date, template_kwargs, packing
        )
        return _finish(page, selection, html, data, where)
    options |= {"date": date, "template_kwargs": template_kwargs}
    target = make_target(data, tokenizer, template, where=where, limit=limit, **options)
    if packing is not None and (html is None or selection.is_explicit):
        raise UsageError("packing", "packing applies only to an HTML overview, not to selected rows")
    if html is not None and not selection.is_explicit:
        page = make_overview(target, n, packing, progress)
    else:
        if outliers:
            rows = _view_outliers(target, selection.limit, progress)
        elif target.folder is not None:
            rows = _view_documents(target, selection)
        else:
            rows = _view_rows(target, selection, RowFilter(where, limit))
        notes = tuple(added_texts(target.recipe))
        page = HtmlPage(target.heading, tuple(rows), target.recipe.tokenizer, notes=notes)
    return _finish(page, selection, html, data, where)


@dataclass(frozen=True)
class RowSelection:
    """The options that select the rows to show, such as row numbers or a regular expression.

    Attributes:
        n: The number of rows.
        numbers: Row numbers.
        id: The id of a row.
        grep: A regular expression.
        outliers: Whether outliers are selected.
        is_page: Whether the rows are shown on an HTML page, which has room for more rows.

    Raises:
        UsageError: The options contradict each other, or are invalid.
    """

    n: int | None = None
    numbers: frozenset[int] | None = None
    id: str | None = None
    grep: str | None = None
    outliers: bool = False
    is_page: bool = False

    def __post_init__(self) -> None:
        options = [name for name in ("numbers", "id", "grep", "outliers") if getattr(self, name) not in (None, False)]
        options += ["n"] if self.numbers is not None and self.n is not None else []
        if len(options) > 1:
            names = " and ".join("row" if name == "numbers" else name for name in options)
            problem = f"{names} cannot be combined, because each of these options selects rows"
            raise UsageError("rows_wanted", problem, hint="use only one of them")
        if self.n is not None and (type(self.n) is not int or not 1 <= self.n <= sys.maxsize):
            raise UsageError("n", f"n is {self.n!r}, expected a number of rows (1 or more)")
        if self.grep is not None:
            try:
                re.compile(self.grep)
            except (re.error, TypeError) as error:
                raise UsageError("grep", f"grep={self.grep!r} is not a valid regular expression: {error}") from None

    @property
    def is_explicit(self) -> bool:
        """Whether the options select specific rows instead of the first rows."""
        return self.numbers is not None or self.id is not None or self.grep is not None or self.outliers

    @property
    def limit(self) -> int:
        """The maximum number of rows to show. If outliers are selected, it is the maximum for each kind of outlier."""
        return self.n if self.n is not None else 1 if self.outliers else DEFAULT_ROWS if self.is_page else 3

    def select(self, rows: Iterable[Row | Reject]) -> Iterator[Row | Reject]:
        """Yield the selected rows, and stop reading after the last selected row."""
        if self.numbers is not None:
            yield from (row for row in rows if row.source.row in self.numbers)
        elif self.id is not None:
            yield from islice((row for row in rows if self.id in _row_ids(row)), self.n)
        elif self.grep is not None:
            pattern = re.compile(self.grep)
            yield from islice((row for row in rows if any(map(pattern.search, iterate_strings(row)))), self.limit)
        else:
            yield from islice(rows, self.limit)


def iterate_strings(row: Row | Reject) -> Iterator[str]:
    """Yield all string values in a row, including nested values, in order."""
    stack: list[Any] = [row.raw if isinstance(row, Reject) else row.data]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            stack += reversed([*value.values()])
        elif isinstance(value, list | tuple):
            stack += reversed(value)


def _row_ids(row: Row | Reject) -> set[str]:
    """Return the values of all id columns of a row, as strings.

    An integer that a table stores as a float is also returned as an integer.
    """
    if isinstance(row, Reject) or not isinstance(row.data, Mapping):
        return set()
    ids = [row.data[name] for name in _ID_COLUMNS if row.data.get(name) is not None]
    integers = [str(int(value)) for value in ids if isinstance(value, float) and value.is_integer()]
    return {*integers, *(value if isinstance(value, str) else json.dumps(value) for value in ids)}


def _row_numbers(row: int | Iterable[int] | None) -> frozenset[int] | None:
    if row is None:
        return None
    numbers = [row] if isinstance(row, int) else list(row) if isinstance(row, Iterable) else [row]
    if not numbers or not all(type(number) is int and 0 <= number < sys.maxsize for number in numbers):
        raise UsageError("row", f"row is {row!r}, expected row numbers, which start at 0")
    return frozenset(numbers)


def _stream_rows(
    sources: Iterable[FileSource | MemorySource], numbers: frozenset[int] | None
) -> Iterator[Row | Reject]:
    """Stream the rows of each source, and stop after the last selected row.

    Remote sources are not downloaded completely.
    """
    limit = None if numbers is None else max(numbers) + 1
    for source in sources:
        stream = replace(source, streaming=True) if isinstance(source, FileSource) else source
        yield from islice(stream.rows(), limit)


def _make_text_page(
    data: Any,
    template: str | Path | None,
    options: Options,
    selection: RowSelection,
    row_filter: RowFilter,
    date: str | None,
    template_kwargs: Mapping[str, Any] | None,
    packing: str | None,
) -> HtmlPage:
    """Create a page that shows rows as text instead of tokens, because no tokenizer was passed."""
    token_options = {
        "outliers": selection.outliers,
        "max_length": options.max_length,
        "reject_flags": options.reject_flags,
        "packing": packing,
    }
    if names := [name for name, value in token_options.items() if value]:
        problem = f"{names[0]} needs a tokenizer, but no tokenizer was passed"
        raise UsageError("no_tokenizer", problem, hint="pass the tokenizer of the model: --tokenizer")
    bare = load_bare_template(template if template is not None else "chatml", date, template_kwargs)
    selected = selection.select(row_filter.filter_rows(_stream_rows(resolve_sources(data), selection.numbers)))
    if options.task == "preference":
        selected = expand_rankings(selected, options.columns)
    rows = tuple(make_text_view(row, bare, options) for row in selected)
    paths = [str(data)] if isinstance(data, str | Path) else list(dict.fromkeys(row.source.path for row in rows))
    return HtmlPage(Heading.from_paths(paths, bare.name, "none"), rows)


def _view_rows(target: Target, selection: RowSelection, row_filter: RowFilter) -> Iterator[RowView]:
    rows = selection.select(row_filter.filter_rows(_stream_rows(target.sources, selection.numbers)))
    return (make_row_view(outcome, target.recipe) for outcome in build_rows(target.recipe, rows))


def _view_documents(target: Target, selection: RowSelection) -> Iterator[RowView]:
    """Yield the selected examples of a build in a form for display.

    Examples are numbered in the order of splits and packed sequences.
    """
    if selection.id is not None:
        raise UsageError("rows_wanted", "a build does not store the ids of rows", hint="select rows with row or grep")
    folder = target.folder or Path()
    documents = stored_builds.read_build_documents(folder, stored_builds.split_names(folder), check_files=True)
    if (numbers := selection.numbers) is not None:
        size = len(SIDES) if target.recipe.task == "preference" else 1
        last = (max(numbers) + 1) * size
        documents = (document for document in islice(documents, last) if document.number // size in numbers)
    batches = stored_builds.batch_documents(target.recipe, documents)
    views = (make_row_view(row, target.recipe) for batch in batches for row in batch)
    if selection.grep is not None:
        pattern = re.compile(selection.grep)
        views = (view for view in views if any(pattern.search(example.text) for example in view.examples))
    yield from views if selection.numbers is not None else islice(views, selection.limit)


def _view_outliers(target: Target, limit: int, progress: Progress | None) -> Iterator[RowView]:
    outliers = Outliers(limit)
    survey_rows(target.steps(), target.names, outliers, progress)
    return (make_row_view(outcome, target.recipe, kinds) for outcome, kinds in outliers.rows())


def _finish(page: HtmlPage, selection: RowSelection, html: str | Path | None, data: Any, where: str | None) -> Preview:
    """Write the page to a file if requested, and return the preview.

    Raises:
        InputRefused: A selected row does not exist, or no row matches.
    """
    numbers = {row.source.row if row.number is None else row.number for row in page.rows}
    if missing := sorted((selection.numbers or frozenset()) - numbers):
        raise InputRefused("no_such_row", f"row {', '.join(map(str, missing))} does not exist")
    if not page.rows:
        problem = "the data contains no rows"
        if selection.id is not None:
            problem = f"no row has the id {selection.id!r}"
        elif selection.grep is not None:
            problem = f"no row matches {selection.grep!r}"
        elif where is not None:
            missing_column = find_missing_column(where, reread_rows(resolve_sources(data)))
            problem = f"no row matches where={where!r}" + (f": {missing_column}" if missing_column else "")
        raise InputRefused("no_such_row", problem)
    if html is not None:
        write_page(html, page)
    return Preview(str(page.heading), tuple(page.rows), tuple(page.notes))
