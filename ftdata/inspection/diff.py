"""Compare the tokens and labels of the same rows in two builds, or with two sets of options.

The first pass compares fingerprints of all rows. The second pass reads only the first rows that differ.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from html import escape
from itertools import islice, pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from ftdata.config import is_config_file, load_data_config
from ftdata.errors import InputRefused, UsageError, check_choice, count_noun
from ftdata.inspection import stored_builds
from ftdata.inspection.fingerprints import (
    KINDS,
    LABELS,
    MOST_ROWS,
    MOVED,
    NEITHER,
    REPEATED,
    SAME,
    TOKENS,
    classify_differences,
    fingerprint_examples,
    match_sources,
)
from ftdata.inspection.html_page import HtmlPage, flatten_options, write_page
from ftdata.inspection.row_headings import describe_example
from ftdata.inspection.row_views import ExampleView, Heading, RowView, make_row_view, to_single_line
from ftdata.inspection.target import Target, make_target
from ftdata.inspection.terminal import has_no_colors, render_plain_text, style_segments
from ftdata.options import option_names, parse_list
from ftdata.progress import Progress
from ftdata.readers.streams import STDIN
from ftdata.tokenizing.tokenizer import Tokenizer
from ftdata.types import Reject
from ftdata.yaml12 import parse_yaml

_RECIPE_OPTIONS = option_names("task", "rendering", "rows", "selection")
"""Options that select rows, or determine how rows are rendered and tokenized."""

_CONTEXT, _MAX_COMPARED_TOKENS, _CAPTION_OPTIONS = 8, 4000, 3
_SIDE_STYLES = (("- ", "red"), ("+ ", "green"))


class Edit(NamedTuple):
    """A difference between two versions A and B of an example: a range of tokens in A, and the matching range in B.

    Attributes:
        in_a: The range `[start, end)` of tokens in A.
        in_b: The range `[start, end)` of tokens in B.
    """

    in_a: tuple[int, int]
    in_b: tuple[int, int]


@dataclass(frozen=True)
class ChangedRow:
    """A row whose tokens or labels differ between the two compared builds or sets of options, A and B.

    Attributes:
        kind: The kind of difference, one of `KINDS`.
        a: The row in A.
        b: The row in B.
        edits: For each example, the ranges of tokens that differ.
    """

    kind: str
    a: RowView
    b: RowView
    edits: tuple[tuple[Edit, ...], ...]

    def pairs(self) -> Iterator[list[tuple[int, ExampleView, list[tuple[int, int]]]]]:
        """Yield for each pair the existing examples: 0 for A or 1 for B, the view, and the ranges that differ."""
        for view_a, view_b, edits in zip_longest(self.a.examples, self.b.examples, self.edits):
            sides = ((0, view_a, [edit.in_a for edit in edits]), (1, view_b, [edit.in_b for edit in edits]))
            yield [(side, view, ranges) for side, view, ranges in sides if view is not None]

    def example_name(self, number: int) -> str:
        """Return the name of the examples with this number; an empty string if the row has only one example."""
        return describe_example(max(self.a, self.b, key=lambda row: len(row.examples)), number)


@dataclass(frozen=True)
class Diff:
    """The differences between two builds or sets of options, A and B. The object is falsy if no row differs.

    Attributes:
        titles: The titles of A and B.
        options: The options that differ, with their values in A and B.
        rows: The kind of difference, one of `KINDS` -> the number of rows.
        tokens: The number of tokens and of trained tokens, for A and B.
        changed: The first rows that differ.
        tokenizer: The tokenizer of both sides; `None` if the sides have different tokenizers.
    """

    titles: tuple[str, str]
    options: Mapping[str, tuple[Any, Any]]
    rows: Mapping[str, int]
    tokens: tuple[tuple[int, int], tuple[int, int]]
    changed: tuple[ChangedRow, ...] = field(repr=False)
    tokenizer: Tokenizer | None = field(default=None, repr=False)

    def __bool__(self) -> bool:
        return any(count for kind, count in self.rows.items() if kind not in (SAME, NEITHER))

    def as_dict(self) -> dict[str, Any]:
        """Convert the differences to a JSON-serializable dictionary."""
        return {
            "titles": list(self.titles),
            "options": {name: list(pair) for name, pair in self.options.items()},
            "rows": dict(self.rows),
            "tokens": [{"tokens": tokens, "trained": trained} for tokens, trained in self.tokens],
            "changed": [{"kind": row.kind, "a": row.a.as_dict(), "b": row.b.as_dict()} for row in self.changed],
        }

    def __str__(self) -> str:
        return render_plain_text(self.print)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def print(self, console: Console) -> None:
        """Print the number of changed rows, and the tokens that differ in the first changed rows."""
        for letter, title, (tokens, trained) in zip("AB", self.titles, self.tokens, strict=True):
            heading = f"{letter} {to_single_line(title)}: {count_noun(tokens, 'token')}, {trained:,} trained"
            console.print(Text(heading, "bold"), soft_wrap=True)
        for name, (a, b) in self.options.items():
            console.print(Text(f"  {name}: {_shorten(a)} → {_shorten(b)}"), soft_wrap=True)
        for changed in self.changed:
            source = changed.a.source
            heading = f"── row {source.row} · {to_single_line(source)} · {changed.kind} ──"
            console.print(Text(heading, "bold blue"), soft_wrap=True)
            for row, (sign, style) in zip((changed.a, changed.b), _SIDE_STYLES, strict=True):
                if row.rejected:
                    console.print(Text(f"{sign}{to_single_line(row.rejected)}", style), soft_wrap=True)
            pairs = [*changed.pairs()]
            for number, pair in enumerate(pairs):
                if (name := changed.example_name(number)) and any(ranges for _, _, ranges in pair):
                    console.print(Text(f"── {name} ──", "blue"), soft_wrap=True)
                for side, view, ranges in pair:
                    if ranges:
                        text = _style_ranges(view, ranges, plain=has_no_colors(console))
                        console.print(Text.assemble(_SIDE_STYLES[side], text), soft_wrap=True)
        counts = ", ".join(f"{kind}: {count:,}" for kind, count in self.rows.items() if count or kind == SAME)
        console.print(f"{count_noun(sum(self.rows.values()), 'row')} ({counts})", highlight=False, soft_wrap=True)

    def page(self) -> HtmlPage:
        """Create an HTML page that shows the changed rows side by side."""
        rows, marks, captions = list[RowView](), list[list[NDArray[np.bool_]]](), list[list[str]]()
        for changed in self.changed:
            reasons = "; ".join(filter(None, (changed.a.rejected, changed.b.rejected)))
            row = replace(changed.a, rejected=reasons, why=(changed.kind,), lost=())
            pairs = [*changed.pairs()]
            for number, pair in enumerate(pairs):
                place = f" · {name}" if (name := changed.example_name(number)) else ""
                rows.append(replace(row, examples=tuple(view for _, view, _ in pair)))
                marks.append([_mark_ranges(view, ranges) for _, view, ranges in pair])
                captions.append([f"{self.captions[side]}{place}" for side, _, _ in pair])
        totals = {kind: f"{count:,}" for kind, count in self.rows.items() if count or kind == SAME}
        options = {name: f"{_shorten(a)} → {_shorten(b)}" for name, (a, b) in self.options.items()}
        return HtmlPage(
            Heading("Differences between A and B", dict(zip("AB", self.titles, strict=True))),
            rows,
            totals=totals,
            captions=captions,
            changed=marks,
            options=options,
            tokenizer=self.tokenizer,
            status=f"the first {count_noun(len(self.changed), 'differing row')}; differences are outlined",
        )

    @property
    def captions(self) -> tuple[str, str]:
        """The captions of A and B. The captions list the differing options, or else the data."""
        return f"A: {self._describe_side(0)}", f"B: {self._describe_side(1)}"

    def _describe_side(self, side: int) -> str:
        options = {name.removesuffix(".name"): pair[side] for name, pair in self.options.items()}
        if "template" in options:
            options.pop("template.source", None)
        texts = [f"{name} {_shorten(value)}" for name, value in options.items()]
        omitted = len(texts) - _CAPTION_OPTIONS
        more = f" and {count_noun(omitted, 'more option')}" if omitted > 0 else ""
        return f"{', '.join(texts[:_CAPTION_OPTIONS])}{more}" if texts else self.titles[side]


def diff(a: Any, b: Any, *, n: int = 10, html: str | Path | None = None, progress: Progress | None = None) -> Diff:
    """Compare the tokens and labels of the same rows in two builds, or with two sets of options.

    The two sides, A and B, can differ in template, tokenizer, options or version of ftdata.

    Args:
        a: The folder of a build, or a mapping of options of `build_sft_dataset`: `data`, `tokenizer`, and any option
            that is part of the recipe.
        b: The other side, like `a`.
        n: The number of differing rows to show.
        html: Write these rows side by side to this HTML file.
        progress: Called with a `ProgressUpdate` after each batch of rows.

    Returns:
        The number of rows that are equal or differ, by kind, and the first rows that differ. Falsy if no row differs.

    Raises:
        UsageError: An option is invalid.
        InputRefused: A source cannot be read, or no row can be built on either side.
        TemplateRefused: A template or a tokenizer cannot be used for any row.
        StorageError: The page cannot be written.
        HubError: The network or the hub fails.

    >>> from ftdata.testing import byte_tokenizer
    >>> side = {"data": [{"question": "2+2?", "answer": "4"}], "tokenizer": byte_tokenizer(), "template": "chatml"}
    >>> result = diff(side, {**side, "train_on": "all"})
    >>> bool(result), {kind: count for kind, count in result.rows.items() if count}
    (True, {'labels differ': 1})
    """
    if type(n) is not int or not 0 <= n <= sys.maxsize:
        raise UsageError("n", f"n is {n!r}, expected a number of rows (0 or more)")
    if isinstance(a, Mapping) and isinstance(b, Mapping) and isinstance(a.get("data"), Iterator):
        rows_in_memory = list(a["data"])
        b = {**b, "data": rows_in_memory} if b.get("data") is a["data"] else b
        a = {**a, "data": rows_in_memory}
    targets = _make_target(a), _make_target(b)
    by_text = targets[0].recipe.tokenizer.fingerprint != targets[1].recipe.tokenizer.fingerprint
    fingerprints = [fingerprint_examples(target, progress, by_text=by_text) for target in targets]
    if not any(side.tokens[0] for side in fingerprints):
        raise InputRefused("no_rows_built", "no row can be built on either side, so there is nothing to compare")
    keys = match_sources([side.paths for side in fingerprints])
    rows = [side.by_row(side_keys) for side, side_keys in zip(fingerprints, keys, strict=True)]
    kinds = classify_differences(*rows)
    both = set(rows[0][0].tolist()) & set(rows[1][0].tolist())
    counts = Counter(kinds.values())
    counts[SAME] = len(both) - sum(counts[kind] for kind in (LABELS, TOKENS, MOVED, REPEATED))
    counts[NEITHER] = len(fingerprints[0].rejected_keys(keys[0]) & fingerprints[1].rejected_keys(keys[1]))
    # Both sides show the same rows: the first in the order of A, then the first in the order of B.
    order = (key for columns in rows for key in columns[0][np.argsort(columns[-1])].tolist() if key in kinds)
    selected = [*islice(dict.fromkeys(order), n)]
    views: list[dict[int, RowView]] = [{}, {}]
    if selected:
        views = [_view_rows(target, side_keys, {*selected}) for target, side_keys in zip(targets, keys, strict=True)]
    result = Diff(
        (str(targets[0].heading), str(targets[1].heading)),
        _changed_options(*targets),
        {kind: counts[kind] for kind in KINDS},
        (fingerprints[0].tokens, fingerprints[1].tokens),
        tuple(_make_changed_row(kinds[key], *(side.get(key) for side in views), by_text=by_text) for key in selected),
        None if by_text else targets[0].recipe.tokenizer,
    )
    if html is not None:
        write_page(html, result.page())
    return result


def side_options(
    path: str,
    *,
    tokenizer: str | None = None,
    task: str | None = None,
    template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Convert the command-line arguments for one side of a comparison to options of `diff`.

    Args:
        path: The folder of a build, a `.yaml`, `.yml` or `.toml` configuration, or data.
        tokenizer: The tokenizer.
        task: The task of data; overrides the task of a configuration, and does not apply to a build.
        template: The template of data; overrides the template of a configuration, and does not apply to a build.
        template_kwargs: The template variables of data; override those of a configuration, and do not apply to a build.
        changes: Further options as `name=value`, with YAML values.

    Raises:
        UsageError: An option is unknown.
    """
    options: dict[str, Any] = {"data": path}
    if is_config_file(path):
        config = load_data_config(Path(path))
        recipe_options = {name: value for name, value in config.build_options().items() if name in _RECIPE_OPTIONS}
        options = {"data": config.data, "tokenizer": config.tokenizer or config.model or None, **recipe_options}
    arguments: dict[str, Any] = {"tokenizer": tokenizer}
    if stored_builds.find_build_folder(path) is None:
        arguments |= {"task": task, "template": template, "template_kwargs": template_kwargs}
    options |= {name: value for name, value in arguments.items() if value is not None}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise UsageError("set", f"--set is {change!r}, expected name=value, e.g. --set turns=split")
        name = name.strip().replace("-", "_")
        if name.startswith("template_kwargs."):
            variables = options.get("template_kwargs") or {}
            options["template_kwargs"] = {**variables, name.partition(".")[2]: _parse_value(value)}
            continue
        check_choice("set", name, ("tokenizer", *_RECIPE_OPTIONS))
        options[name] = parse_list(name, _parse_value(value))
    return options


def _parse_value(text: str) -> Any:
    """Parse a text as YAML. If the text is not valid YAML, return it unchanged."""
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text


def _make_target(side: Any) -> Target:
    if not isinstance(side, Mapping):
        return make_target(side)
    for name in side:
        check_choice("option", str(name), ("data", "tokenizer", *_RECIPE_OPTIONS))
    if "data" not in side:
        problem = "one side of the comparison has no data"
        raise UsageError("diff", problem, hint="pass data and tokenizer, or the folder of a build")
    data = side["data"]
    if str(data) == STDIN or (isinstance(data, list) and STDIN in data):
        problem = "standard input can be read only once, and diff reads data twice"
        raise UsageError("diff", problem, hint="save the input to a file")
    # An iterator can be read only once, so its rows are stored.
    return make_target(**{**side, "data": list(data) if isinstance(data, Iterator) else data})


def _view_rows(target: Target, keys: Mapping[str, int], selected: set[int]) -> dict[int, RowView]:
    """Read one side of the comparison. Return the selected rows, including rejected rows, in a form for display."""
    views, are_paths_unique = dict[int, RowView](), len({path for path, _ in target.names}) == len(target.names)
    for step in target.steps():
        for number, conversation in enumerate(step.batch.conversations):
            source = conversation.source
            if (key := keys[source.path] * MOST_ROWS + source.row) in selected:
                row = make_row_view(step.batch.built(number), target.recipe)
                previous = views.get(key)
                views[key] = replace(previous, examples=(*previous.examples, *row.examples)) if previous else row
        _add_rejects(views, step.batch.rejects, target, keys, selected)
        if len(views) == len(selected) and target.folder is None and are_paths_unique:
            return views
    if target.folder is not None:
        _add_rejects(views, stored_builds.read_build_rejects(target.folder), target, keys, selected)
    return views


def _add_rejects(
    views: dict[int, RowView], rejects: Iterable[Reject], target: Target, keys: Mapping[str, int], selected: set[int]
) -> None:
    for reject in rejects:
        if (key := keys[reject.source.path] * MOST_ROWS + reject.source.row) in selected:
            views.setdefault(key, make_row_view(reject, target.recipe))


def _make_changed_row(kind: str, a: RowView | None, b: RowView | None, *, by_text: bool) -> ChangedRow:
    existing = a or b
    assert existing
    row_a, row_b = (row or RowView(existing.source, rejected="this side does not contain the row") for row in (a, b))
    examples_a, examples_b = [*row_a.examples], [*row_b.examples]
    if not existing.is_pair:
        examples_a, examples_b = _pair_examples(examples_a, examples_b)
    row_a, row_b = replace(row_a, examples=tuple(examples_a)), replace(row_b, examples=tuple(examples_b))
    pairs = zip_longest(examples_a, examples_b)
    return ChangedRow(kind, row_a, row_b, tuple(find_edits(*pair, by_text=by_text) for pair in pairs))


def _pair_examples(a: Sequence[ExampleView], b: Sequence[ExampleView]) -> tuple[list[ExampleView], list[ExampleView]]:
    """Reorder the examples of a row so that matching examples of both sides have the same index.

    Packing changes the order of examples. Examples with equal texts match. The remaining examples, which are split
    turns, are sorted by length.
    """
    left, right = list[ExampleView](), list[ExampleView]()
    unmatched_a, unmatched_b = list[ExampleView](), sorted(b, key=len)
    for view in sorted(a, key=len):
        match = next((index for index, candidate in enumerate(unmatched_b) if candidate.text == view.text), None)
        if match is None:
            unmatched_a.append(view)
        else:
            left.append(view)
            right.append(unmatched_b.pop(match))
    return left + unmatched_a, right + unmatched_b


def _true_ranges(values: NDArray[np.bool_]) -> list[list[int]]:
    """Return the ranges `[start, end)` of consecutive true values."""
    ranges: list[list[int]] = np.flatnonzero(np.diff(values, prepend=False, append=False)).reshape(-1, 2).tolist()
    return ranges


def find_edits(a: ExampleView | None, b: ExampleView | None, *, by_text: bool = False) -> tuple[Edit, ...]:
    """Find the ranges of tokens whose ids, texts or labels differ between two examples.

    If one example is missing, the range contains all tokens of the other example. If too many tokens remain between the
    common prefix and the common suffix, they form a single range.
    """
    if a is None or b is None:
        return (Edit((0, len(a) if a else 0), (0, len(b) if b else 0)),)
    if by_text and a.text == b.text:
        trained_a, trained_b = (np.repeat(view.trained, np.diff(view.ends, prepend=0)) for view in (a, b))
        ranges = _true_ranges(trained_a != trained_b)
        return tuple(Edit(_to_tokens(a, start, end), _to_tokens(b, start, end)) for start, end in ranges)
    left, right = (view.pieces if by_text or view.ids is None else view.ids.tolist() for view in (a, b))
    if left == right:
        return tuple(Edit((start, end), (start, end)) for start, end in _true_ranges(a.trained != b.trained))
    left, right = ([*zip(tokens, view.trained.tolist(), strict=True)] for tokens, view in ((left, a), (right, b)))
    shorter = min(len(left), len(right))
    start = next((index for index in range(shorter) if left[index] != right[index]), shorter)
    suffix = next((n for n in range(shorter - start) if left[-1 - n] != right[-1 - n]), shorter - start)
    middles = left[start : len(left) - suffix], right[start : len(right) - suffix]
    if max(map(len, middles)) > _MAX_COMPARED_TOKENS:
        return (Edit((start, len(left) - suffix), (start, len(right) - suffix)),)
    edits = SequenceMatcher(None, *middles, autojunk=False).get_opcodes()
    return tuple(
        Edit((start + a1, start + a2), (start + b1, start + b2)) for kind, a1, a2, b1, b2 in edits if kind != "equal"
    )


def _to_tokens(view: ExampleView, start: int, end: int) -> tuple[int, int]:
    """Convert a range of characters `[start, end)` to the range of tokens that covers it."""
    first, last = np.searchsorted(view.ends, [start, end - 1], side="right").tolist()
    return first, last + 1


def _mark_ranges(view: ExampleView, ranges: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return a mask that is true for the tokens in the ranges (bool `[n]`)."""
    marks = np.zeros(len(view), np.bool_)
    for start, end in ranges:
        marks[start:end] = True
    return marks


def _style_ranges(view: ExampleView, ranges: Sequence[tuple[int, int]], *, plain: bool) -> Text:
    """Render ranges of tokens as styled text, with some context around each range.

    The ranges are highlighted unless `plain` is true.
    """
    is_near, is_marked = np.zeros(len(view), np.bool_), _mark_ranges(view, ranges)
    for start, end in ranges:
        is_near[max(start - _CONTEXT, 0) : end + _CONTEXT] = True
    styled, position = Text(), 0
    for first, last in _true_ranges(is_near):
        styled.append(" … " if first > position else "")
        for start, end in [(first, last)] if plain else _split_at_marks(is_marked, first, last):
            text = style_segments(view.part(start, end).segments(), plain=plain)
            if is_marked[start] and not plain:
                text.stylize("reverse")
            styled.append_text(text)
        position = last
    return styled.append(" …") if position < len(view) else styled


def _split_at_marks(is_marked: NDArray[np.bool_], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Divide the tokens `[first, last)` into ranges in which all tokens are marked or all tokens are unmarked."""
    changes = (np.flatnonzero(np.diff(is_marked[first:last])) + first + 1).tolist()
    yield from pairwise([first, *changes, last])


def _changed_options(a: Target, b: Target) -> dict[str, tuple[Any, Any]]:
    """Return the options whose values differ between sides A and B of the comparison, with both values.

    An option that only one side has is left out.
    """
    left, right = ({**target.options, **flatten_options({"template": target.options["template"]})} for target in (a, b))
    common = [name for name in left if name in right and name not in ("template", "sources", "data")]
    tokenizer = {"tokenizer": tuple(target.options["tokenizer"]["name"] for target in (a, b))}
    if left["tokenizer"]["fingerprint"] == right["tokenizer"]["fingerprint"]:
        tokenizer = {}
    return {
        **tokenizer,
        **{name: (left[name], right[name]) for name in common if left[name] != right[name] and name != "tokenizer"},
    }


def _shorten(value: Any) -> str:
    text = to_single_line(" ".join(str(value).split()))
    return text if len(text) <= 60 else f"{text[:57]}…"
