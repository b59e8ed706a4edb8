"""Diff: the same rows, built in two ways: which tokens or labels are others.

Two passes: the first keeps a few bytes of each row and tells which rows differ, the second looks at the first of these.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import SequenceMatcher
from itertools import islice, pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from ftdata.config import load_config, parse_yaml
from ftdata.errors import InputRefused, UsageError, check_choice
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
from ftdata.inspection.row_views import ExampleView, RowView, make_row_view, to_single_line
from ftdata.inspection.survey import Progress
from ftdata.inspection.target import Target, make_target
from ftdata.inspection.terminal import has_no_colors, style_segments
from ftdata.pipeline.recipe import Options
from ftdata.readers.streams import STDIN
from ftdata.tokenizing.tokenizer import Tokenizer
from ftdata.types import Reject

_DECIDES = ("template", "date", "template_kwargs", "where", "limit", *(each.name for each in fields(Options)))
"""Options that decide what a row becomes, or whether it is read."""

_CONTEXT, _MOST_COMPARED = 8, 4000


class Edit(NamedTuple):
    """Tokens of A, from the first number on and before the second, and those of B that stand for them."""

    in_a: tuple[int, int]
    in_b: tuple[int, int]


@dataclass(frozen=True)
class ChangedRow:
    """One row that differs.

    Attributes:
        kind: of `KINDS`: labels, tokens, split, number of times, on which side.
        a: as it is in A.
        b: as it is in B.
        edits: for each example, the stretches of tokens that differ, `[start, end)` in A and in B.
    """

    kind: str
    a: RowView
    b: RowView
    edits: tuple[tuple[Edit, ...], ...]


@dataclass(frozen=True)
class Diff:
    """How two ways of building the same rows differ; falsy where they do not.

    Attributes:
        titles: what A and B are.
        options: the options that differ, each as it is in A and in B.
        rows: kind, of `KINDS` -> how many rows.
        tokens: tokens, and trained ones, of A and of B.
        changed: the first rows that differ.
        tokenizer: that of both sides, if there is one.
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
        """Return the differences as JSON."""
        return {
            "titles": list(self.titles),
            "options": {name: list(pair) for name, pair in self.options.items()},
            "rows": dict(self.rows),
            "tokens": [dict(zip(("tokens", "trained"), one, strict=True)) for one in self.tokens],
            "changed": [{"kind": one.kind, "a": one.a.as_dict(), "b": one.b.as_dict()} for one in self.changed],
        }

    def __str__(self) -> str:
        console = Console(color_system=None, width=200, soft_wrap=True)
        with console.capture() as capture:
            self.print(console)
        return capture.get()

    def print(self, console: Console) -> None:
        """Print to a rich console: counts, and of each row that is shown what differs, with a little around it."""
        for letter, title, (tokens, trained) in zip("AB", self.titles, self.tokens, strict=True):
            said = f"{letter} {to_single_line(title)}: {tokens:,} tokens, {trained:,} trained"
            console.print(Text(said, "bold"), soft_wrap=True)
        for name, (a, b) in self.options.items():
            console.print(Text(f"  {name}: {_brief(a)} → {_brief(b)}"), soft_wrap=True)
        for one in self.changed:
            said = f"── row {one.a.source.row} · {to_single_line(one.a.source)} · {one.kind} ──"
            console.print(Text(said, "bold blue"), soft_wrap=True)
            for row, sign, style in ((one.a, "-", "red"), (one.b, "+", "green")):
                if row.rejected:
                    console.print(Text(f"{sign} {to_single_line(row.rejected)}", style), soft_wrap=True)
            for a, b, edits in zip_longest(one.a.examples, one.b.examples, one.edits):
                for shown, sign, style, places in (
                    (a, "-", "red", [edit.in_a for edit in edits]),
                    (b, "+", "green", [edit.in_b for edit in edits]),
                ):
                    if shown is not None and edits:
                        text = _around(shown, places, plain=has_no_colors(console))
                        console.print(Text.assemble((f"{sign} ", style), text), soft_wrap=True)
        counted = ", ".join(f"{count:,} {kind}" for kind, count in self.rows.items() if count or kind == SAME)
        console.print(f"{sum(self.rows.values()):,} rows: {counted}", highlight=False, soft_wrap=True)

    def page(self) -> HtmlPage:
        """Return the page that shows the changed rows side by side."""
        rows, marks, titles = list[RowView](), list[list[NDArray[np.bool_]]](), list[list[str]]()
        letters = [f"{letter}: {title}" for letter, title in zip("AB", self.titles, strict=True)]
        for one in self.changed:
            says = "; ".join(filter(None, (one.a.rejected, one.b.rejected)))
            bare = replace(one.a, rejected=says, why=(one.kind,), lost=())
            for a, b, edits in zip_longest(one.a.examples, one.b.examples, one.edits):
                sides = [(a, [edit.in_a for edit in edits]), (b, [edit.in_b for edit in edits])]
                there = [(letter, *side) for letter, side in zip(letters, sides, strict=True) if side[0] is not None]
                rows.append(replace(bare, examples=tuple(shown for _, shown, _ in there)))
                marks.append([_marked(shown, places) for _, shown, places in there])
                titles.append([letter for letter, _, _ in there])
        totals = {kind: f"{count:,}" for kind, count in self.rows.items() if count or kind == SAME}
        options = {name: f"{_brief(a)} → {_brief(b)}" for name, (a, b) in self.options.items()}
        return HtmlPage(
            " against ".join(self.titles),
            rows,
            totals=totals,
            titles=titles,
            changed=marks,
            options=options,
            tokenizer=self.tokenizer,
            said=f"the first {len(self.changed):,} rows that differ are in this page; what differs is outlined",
        )


def diff(
    a: Any,
    b: Any,
    *,
    n: int = 10,
    html: str | Path | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Compare the same rows, built in two ways: under two templates, tokenizers, options, or versions of ftdata.

    Args:
        a: the folder of a build; or a mapping of options of `build_sft_dataset`: `data`, `tokenizer`, and any that
            decide what a row becomes.
        b: the same.
        n: how many rows that differ are shown.
        html: write these to this file, side by side.
        progress: called with the rows and tokens done so far, and which share of the data that is.

    Returns:
        How many rows are the same, or differ in which way, and the first that do; falsy where none does.

    Raises:
        UsageError: an option is invalid.
        InputRefused: a source cannot be read, or neither side has a row that can be built.
        TemplateRefused: a template, or a tokenizer, cannot be used for any row.
        StorageError: the page cannot be written.
        HubError: the network or the hub fails.

    >>> from ftdata.testing import byte_tokenizer
    >>> side = {"data": [{"question": "2+2?", "answer": "4"}], "tokenizer": byte_tokenizer(), "template": "chatml"}
    >>> found = diff(side, {**side, "train_on": "all"})
    >>> bool(found), {kind: count for kind, count in found.rows.items() if count}
    (True, {'labels differ': 1})
    """
    if type(n) is not int or not 0 <= n <= sys.maxsize:
        raise UsageError("n", f"n is {n!r}, expected a number of rows from 0")
    if isinstance(a, Mapping) and isinstance(b, Mapping) and isinstance(a.get("data"), Iterator):
        kept = list(a["data"])
        b = {**b, "data": kept} if b.get("data") is a["data"] else b
        a = {**a, "data": kept}
    sides = _side(a), _side(b)
    by_text = sides[0].recipe.tokenizer.fingerprint != sides[1].recipe.tokenizer.fingerprint
    prints = [fingerprint_examples(side, progress, by_text=by_text) for side in sides]
    if not any(one.tokens[0] for one in prints):
        raise InputRefused("no_rows_built", "neither side has a row that can be built, so there is nothing to compare")
    keys = match_sources([one.paths for one in prints])
    rows = [one.by_row(own) for one, own in zip(prints, keys, strict=True)]
    kinds = classify_differences(*rows)
    both = set(rows[0][0].tolist()) & set(rows[1][0].tolist())
    count = Counter(kinds.values())
    count[SAME] = len(both) - sum(count[kind] for kind in (LABELS, TOKENS, MOVED, REPEATED))
    count[NEITHER] = len(prints[0].rejected_as(keys[0]) & prints[1].rejected_as(keys[1]))
    # The first in the order of A, and then of B, whichever side they are looked at on.
    order = (key for one in rows for key in one[0][np.argsort(one[-1])].tolist() if key in kinds)
    wanted = [*islice(dict.fromkeys(order), n)]
    shown = [_shown(side, own, {*wanted}) for side, own in zip(sides, keys, strict=True)] if wanted else [{}, {}]
    found = Diff(
        (sides[0].title, sides[1].title),
        _options(*sides),
        {kind: count[kind] for kind in KINDS},
        (prints[0].tokens, prints[1].tokens),
        tuple(_changed(kinds[key], *(one.get(key) for one in shown), by_text=by_text) for key in wanted),
        None if by_text else sides[0].recipe.tokenizer,
    )
    if html is not None:
        write_page(html, found.page())
    return found


def side_options(
    given: str,
    *,
    tokenizer: str | None = None,
    template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the side that a word of a command line names: a build, a configuration, or data.

    Args:
        given: the folder of a build, a `.yaml`, `.yml` or `.toml` file, or data.
        tokenizer: of all of these.
        template: of data, or instead of the configuration's.
        template_kwargs: template variables of data, or instead of the configuration's.
        changes: further options as `name=value`, the value in YAML.

    Raises:
        UsageError: an option is not known.
    """
    said: dict[str, Any] = {"data": given}
    if Path(given).suffix in (".yaml", ".yml", ".toml"):
        config = load_config(Path(given))
        options = {name: value for name, value in config.build_options().items() if name in _DECIDES}
        said = {"data": config.data, "tokenizer": config.tokenizer or config.model, **options}
    given_here = {"tokenizer": tokenizer, "template": template, "template_kwargs": template_kwargs}
    more: dict[str, Any] = {name: value for name, value in given_here.items() if value is not None}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise UsageError("set", f"--set is {change!r}, expected name=value, e.g. turns=split")
        check_choice("set", name.strip().replace("-", "_"), ("tokenizer", *_DECIDES))
        more[name.strip().replace("-", "_")] = _value(value)
    return {**said, **more}


def _value(text: str) -> Any:
    """Return what a text says in YAML; a text that is no YAML says itself."""
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text


def _side(given: Any) -> Target:
    if not isinstance(given, Mapping):
        return make_target(given)
    for name in given:
        check_choice("option", str(name), ("data", "tokenizer", *_DECIDES))
    if "data" not in given:
        raise UsageError("diff", "a side names no data", hint="give data and tokenizer, or the folder of a build")
    data = given["data"]
    if str(data) == STDIN or (isinstance(data, list) and STDIN in data):
        raise UsageError("diff", "standard input is read once, and a comparison reads twice", hint="save it to a file")
    # What can be gone through but once is kept.
    return make_target(**{**given, "data": list(data) if isinstance(data, Iterator) else data})


def _shown(side: Target, keys: Mapping[str, int], wanted: set[int]) -> dict[int, RowView]:
    """Return the rows of a side that are wanted, those that it rejects among them."""
    found, once = dict[int, RowView](), len({path for path, _ in side.names}) == len(side.names)
    for step in side.steps():
        for number, said in enumerate(step.batch.conversations):
            if (key := keys[said.source.path] * MOST_ROWS + said.source.row) in wanted:
                row = make_row_view(step.batch.built(number), side.recipe)
                known = found.get(key)
                found[key] = replace(known, examples=(*known.examples, *row.examples)) if known else row
        _add_rejects(found, step.batch.rejects, side, keys, wanted)
        if len(found) == len(wanted) and side.folder is None and once:
            return found
    if side.folder is not None:
        _add_rejects(found, stored_builds.read_build_rejects(side.folder), side, keys, wanted)
    return found


def _add_rejects(
    found: dict[int, RowView], rejects: Iterable[Reject], side: Target, keys: Mapping[str, int], wanted: set[int]
) -> None:
    for reject in rejects:
        if (key := keys[reject.source.path] * MOST_ROWS + reject.source.row) in wanted:
            found.setdefault(key, make_row_view(reject, side.recipe))


def _changed(kind: str, a: RowView | None, b: RowView | None, *, by_text: bool) -> ChangedRow:
    known = a or b
    assert known
    a, b = (one or RowView(known.source, rejected="is not there") for one in (a, b))
    own = _paired(a.examples, b.examples)
    a, b = (replace(one, examples=tuple(each)) for one, each in zip((a, b), own, strict=True))
    pairs = zip_longest(a.examples, b.examples)
    return ChangedRow(kind, a, b, tuple(find_edits(*pair, by_text=by_text) for pair in pairs))


def _paired(a: Sequence[ExampleView], b: Sequence[ExampleView]) -> tuple[list[ExampleView], list[ExampleView]]:
    """Return the examples of a row so that those that belong together stand at the same place: packs mix them.

    Those of one text belong together; of the others, which are turns on their own, the shorter ones come first.
    """
    left, right = list[ExampleView](), list[ExampleView]()
    rest = sorted(b, key=len)
    alone = list[ExampleView]()
    for one in sorted(a, key=len):
        same = next((at for at, other in enumerate(rest) if other.text == one.text), None)
        if same is None:
            alone.append(one)
        else:
            left.append(one)
            right.append(rest.pop(same))
    return left + alone, right + rest


def find_edits(a: ExampleView | None, b: ExampleView | None, *, by_text: bool = False) -> tuple[Edit, ...]:
    """Return the stretches of tokens that are not as in the other, by id (or text) and label; all where there is none.

    Where too many are left between what begins and what ends alike, all of these are one stretch.
    """
    if a is None or b is None:
        return (Edit((0, len(a) if a else 0), (0, len(b) if b else 0)),)
    if by_text and a.text == b.text:
        learnt = [np.repeat(one.trained, np.diff(one.ends, prepend=0)) for one in (a, b)]
        edges = np.flatnonzero(np.diff(learnt[0] != learnt[1], prepend=False, append=False)).reshape(-1, 2).tolist()
        return tuple(Edit(_tokens_of(a, *place), _tokens_of(b, *place)) for place in edges)
    left, right = (one.pieces if by_text or one.ids is None else one.ids.tolist() for one in (a, b))
    if left == right:
        edges = np.flatnonzero(np.diff(a.trained != b.trained, prepend=False, append=False)).reshape(-1, 2).tolist()
        return tuple(Edit((start, end), (start, end)) for start, end in edges)
    left, right = ([*zip(own, one.trained.tolist(), strict=True)] for own, one in ((left, a), (right, b)))
    most = min(len(left), len(right))
    start = next((at for at in range(most) if left[at] != right[at]), most)
    end = next((at for at in range(most - start) if left[-1 - at] != right[-1 - at]), most - start)
    middles = left[start : len(left) - end], right[start : len(right) - end]
    if max(map(len, middles)) > _MOST_COMPARED:
        return (Edit((start, len(left) - end), (start, len(right) - end)),)
    edits = SequenceMatcher(None, *middles, autojunk=False).get_opcodes()
    return tuple(
        Edit((start + a1, start + a2), (start + b1, start + b2)) for kind, a1, a2, b1, b2 in edits if kind != "equal"
    )


def _tokens_of(view: ExampleView, start: int, end: int) -> tuple[int, int]:
    """Return the tokens of the characters from `start` on and before `end`."""
    first, last = np.searchsorted(view.ends, [start, end - 1], side="right").tolist()
    return first, last + 1


def _marked(view: ExampleView, stretches: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    marks = np.zeros(len(view), np.bool_)
    for start, end in stretches:
        marks[start:end] = True
    return marks


def _around(view: ExampleView, stretches: Sequence[tuple[int, int]], *, plain: bool) -> Text:
    """Return stretches of tokens with a few around each; in colours, they stand out."""
    near, marked = np.zeros(len(view), np.bool_), _marked(view, stretches)
    for start, end in stretches:
        near[max(start - _CONTEXT, 0) : end + _CONTEXT] = True
    shown, at = Text(), 0
    for first, last in np.flatnonzero(np.diff(near, prepend=False, append=False)).reshape(-1, 2).tolist():
        shown.append(" … " if first > at else "")
        for start, end in [(first, last)] if plain else _apart(marked, first, last):
            text = style_segments(view.part(start, end).segments(), plain=plain)
            if marked[start] and not plain:
                text.stylize("reverse")
            shown.append_text(text)
        at = last
    return shown.append(" …") if at < len(view) else shown


def _apart(marked: NDArray[np.bool_], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the stretches of tokens that are marked, and those that are not."""
    yield from pairwise([first, *(np.flatnonzero(np.diff(marked[first:last])) + first + 1).tolist(), last])


def _options(a: Target, b: Target) -> dict[str, tuple[Any, Any]]:
    """Return the options that differ, each as it is on both sides; what one side knows nothing of is left out."""
    left, right = ({**side.options, **flatten_options({"template": side.options["template"]})} for side in (a, b))
    both = [name for name in left if name in right and name not in ("template", "sources", "data")]
    tokenizer = {"tokenizer": tuple(side.options["tokenizer"]["name"] for side in (a, b))}
    if left["tokenizer"]["fingerprint"] == right["tokenizer"]["fingerprint"]:
        tokenizer = {}
    return {
        **tokenizer,
        **{name: (left[name], right[name]) for name in both if left[name] != right[name] and name != "tokenizer"},
    }


def _brief(value: Any) -> str:
    text = to_single_line(" ".join(str(value).split()))
    return text if len(text) <= 60 else f"{text[:57]}…"
