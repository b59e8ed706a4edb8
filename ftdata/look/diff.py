"""Diff: the same rows, built in two ways: which tokens or labels are others.

Two passes: the first keeps a few bytes of each row and tells which rows differ, the second looks at the first of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import SequenceMatcher
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from ftdata.config import load_config, parse_yaml
from ftdata.errors import UsageError, one_of
from ftdata.examples import Batch
from ftdata.look.page import Page, flat, write_page
from ftdata.look.side import Side, side_of
from ftdata.look.survey import Progress
from ftdata.look.terminal import as_text, is_plain
from ftdata.look.views import RowView, View, view
from ftdata.recipe import Options
from ftdata.tokenize import Tokenizer
from ftdata.types import Example, Source

SAME, LABELS, TOKENS, ONLY_A, ONLY_B = "same", "labels differ", "tokens differ", "only in A", "only in B"
_DECIDES = ("template", "date", "template_kwargs", "where", "limit", *(each.name for each in fields(Options)))
"""Options that decide what a row becomes, or whether it is read."""

_CONTEXT, _MOST_COMPARED = 8, 4000


class Edit(NamedTuple):
    """Tokens of A, from the first number on and before the second, and those of B that stand for them."""

    in_a: tuple[int, int]
    in_b: tuple[int, int]


@dataclass(frozen=True)
class Changed:
    """One row that differs: as it is in A and in B, and what differs of each example."""

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
        rows: kind -> how many rows: the same, other labels, other tokens, only in A, only in B.
        tokens: tokens, and trained ones, of A and of B.
        changed: the first rows that differ.
        tokenizer: that of both sides, if there is one.
    """

    titles: tuple[str, str]
    options: Mapping[str, tuple[Any, Any]]
    rows: Mapping[str, int]
    tokens: tuple[tuple[int, int], tuple[int, int]]
    changed: tuple[Changed, ...] = field(repr=False)
    tokenizer: Tokenizer | None = field(default=None, repr=False)

    def __bool__(self) -> bool:
        return any(count for kind, count in self.rows.items() if kind != SAME)

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
            console.print(Text(f"{letter} {title}: {tokens:,} tokens, {trained:,} trained", "bold"), soft_wrap=True)
        for name, (a, b) in self.options.items():
            console.print(Text(f"  {name}: {_brief(a)} → {_brief(b)}"), soft_wrap=True)
        for one in self.changed:
            console.print(
                Text(f"── row {one.a.source.row} · {one.a.source} · {one.kind} ──", "bold blue"), soft_wrap=True
            )
            for row, sign, style in ((one.a, "-", "red"), (one.b, "+", "green")):
                if row.rejected:
                    console.print(Text(f"{sign} {row.rejected}", style), soft_wrap=True)
            for a, b, edits in zip_longest(one.a.examples, one.b.examples, one.edits):
                for shown, sign, style, places in (
                    (a, "-", "red", [edit.in_a for edit in edits]),
                    (b, "+", "green", [edit.in_b for edit in edits]),
                ):
                    if shown is not None and edits:
                        text = _around(shown, places, plain=is_plain(console))
                        console.print(Text.assemble((f"{sign} ", style), text), soft_wrap=True)
        counted = ", ".join(f"{count:,} {kind}" for kind, count in self.rows.items())
        console.print(f"{sum(self.rows.values()):,} rows: {counted}", highlight=False, soft_wrap=True)

    def page(self) -> Page:
        """Return the page that shows the changed rows side by side."""
        rows, marks = list[RowView](), list[list[NDArray[np.bool_]]]()
        for one in self.changed:
            says = "; ".join(filter(None, (one.a.rejected, one.b.rejected)))
            bare = replace(one.a, rejected=says, why=(one.kind,), lost=())
            for a, b, edits in zip_longest(one.a.examples, one.b.examples, one.edits):
                sides = [(a, [edit.in_a for edit in edits]), (b, [edit.in_b for edit in edits])]
                there = [(shown, places) for shown, places in sides if shown is not None]
                rows.append(replace(bare, examples=tuple(shown for shown, _ in there)))
                marks.append([_marked(*side) for side in there])
        totals = {kind: f"{count:,}" for kind, count in self.rows.items()}
        titles = tuple(f"{letter}: {title}" for letter, title in zip("AB", self.titles, strict=True))
        options = {name: f"{_brief(a)} → {_brief(b)}" for name, (a, b) in self.options.items()}
        return Page(
            " against ".join(self.titles),
            rows,
            totals=totals,
            titles=(titles[0], titles[1]),
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

    Raises:
        UsageError: an option cannot be meant.
        InputRefused: a source cannot be read.
    """
    sides = _side(a), _side(b)
    by_text = sides[0].recipe.tokenizer.fingerprint != sides[1].recipe.tokenizer.fingerprint
    prints = [_prints(side, progress, by_text=by_text) for side in sides]
    # Data that was moved has other paths, and the same names.
    by_name = not np.isin(prints[0].paths, prints[1].paths).any()
    kinds = _kinds(*(one.by_row(by_name=by_name) for one in prints))
    count = Counter(kinds.values())
    count[SAME] = prints[0].count(by_name=by_name) - sum(count[kind] for kind in (LABELS, TOKENS, ONLY_A))
    shown = [_shown(side, kinds, n, by_name=by_name) for side in sides]
    wanted = sorted(shown[0] | shown[1], key=lambda key: _place(shown, key))[:n]
    found = Diff(
        (sides[0].title, sides[1].title),
        _options(*sides),
        {kind: count[kind] for kind in (SAME, LABELS, TOKENS, ONLY_A, ONLY_B)},
        (prints[0].tokens, prints[1].tokens),
        tuple(_changed(kinds[key], *(one.get(key) for one in shown)) for key in wanted),
        None if by_text else sides[0].recipe.tokenizer,
    )
    if html is not None:
        write_page(html, found.page())
    return found


def side_options(
    given: str, *, tokenizer: str | None = None, template: str | None = None, changes: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the side that a word of a command line names: a build, a configuration, or data.

    Args:
        given: the folder of a build, a `.yaml`, `.yml` or `.toml` file, or data.
        tokenizer: of all of these.
        template: of data, or instead of the configuration's.
        changes: further options as `name=value`, the value in YAML.

    Raises:
        UsageError: an option is not known.
    """
    said: dict[str, Any] = {"data": given}
    if Path(given).suffix in (".yaml", ".yml", ".toml"):
        config = load_config(Path(given))
        options = {name: value for name, value in config.build_options().items() if name in _DECIDES}
        said = {"data": config.data, "tokenizer": config.tokenizer or config.model, **options}
    more = {name: value for name, value in (("tokenizer", tokenizer), ("template", template)) if value is not None}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise UsageError("set", f"--set is {change!r}, expected name=value, e.g. turns=split")
        one_of("set", name.strip().replace("-", "_"), ("tokenizer", *_DECIDES))
        more[name.strip().replace("-", "_")] = parse_yaml(value)
    return {**said, **more}


def _side(given: Any) -> Side:
    if isinstance(given, Mapping):
        for name in given:
            one_of("option", str(name), ("data", "tokenizer", *_DECIDES))
        if "data" not in given:
            raise UsageError("diff", "a side names no data", hint="give data and tokenizer, or the folder of a build")
        return side_of(**given)
    return side_of(given)


@dataclass(frozen=True)
class Prints:
    """What tells examples of one side from those of the other: uint64 `[examples]` each.

    Attributes:
        paths: hashes of the path and the number of the row.
        names: the same, of the name of the file.
        first: hashes of the tokens; across tokenizers, of the text.
        second: hashes of the labels; across tokenizers, of what is trained of the text.
        tokens: how many there are on this side, and how many are trained.
    """

    paths: NDArray[np.uint64]
    names: NDArray[np.uint64]
    first: NDArray[np.uint64]
    second: NDArray[np.uint64]
    tokens: tuple[int, int]

    def by_row(self, *, by_name: bool) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
        """Return the rows, ascending, and what tells each from that of the other side.

        Of several examples of a row the sum is told: in which order packs hold them is no difference.
        """
        keys, which = np.unique(self.names if by_name else self.paths, return_inverse=True)
        sums = []
        for values in (self.first, self.second):
            sums.append(total := np.zeros(len(keys), np.uint64))
            np.add.at(total, which, values)
        return keys, sums[0], sums[1]

    def count(self, *, by_name: bool) -> int:
        """Return how many rows there are."""
        return len(np.unique(self.names if by_name else self.paths))


def _prints(side: Side, progress: Progress | None, *, by_text: bool) -> Prints:
    columns: tuple[list[int], ...] = ([], [], [], [])
    rows = tokens = trained = 0
    for step in side.steps():
        batch = step.batch
        rows, tokens = rows + len(batch), tokens + int(batch.columns.lengths.sum())
        trained += int(batch.columns.learnt.sum())
        for source in batch.columns.sources:
            columns[0].append(_key(source))
            columns[1].append(_key(source, by_name=True))
        for pair in _texts(batch) if by_text else _tokens(batch):
            columns[2].append(pair[0])
            columns[3].append(pair[1])
        if progress:
            progress(rows, tokens, step.share)
    paths, names, first, second = (np.asarray(one, np.uint64) for one in columns)
    return Prints(paths, names, first, second, (tokens, trained))


def _key(source: Source, *, by_name: bool = False) -> int:
    path = Path(source.path).name if by_name else source.path
    return xxhash.xxh3_64_intdigest(f"{path}\0{source.row}".encode("utf-8", "replace"))


def _tokens(batch: Batch) -> Iterator[tuple[int, int]]:
    columns, digest = batch.columns, xxhash.xxh3_64_intdigest
    for start, end in pairwise(np.append(0, np.cumsum(columns.lengths)).tolist()):
        yield digest(columns.ids[start:end].tobytes()), digest(columns.trained[start:end].tobytes())


def _texts(batch: Batch) -> Iterator[tuple[int, int]]:
    digest = xxhash.xxh3_64_intdigest
    for number in range(len(batch.conversations)):
        for one in batch.built(number).examples:
            learnt = "".join(one.text[start:end] for start, end in _runs(one))
            yield digest(one.text.encode("utf-8", "replace")), digest(learnt.encode("utf-8", "replace"))


def _runs(example: Example) -> Iterator[tuple[int, int]]:
    """Yield where the stretches of text stand that are trained."""
    edges = np.flatnonzero(np.diff(example.trained, prepend=False, append=False))
    for first, last in edges.reshape(-1, 2).tolist():
        yield int(example.offsets[first, 0]), int(example.offsets[last - 1, 1])


def _kinds(
    a: tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]],
    b: tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]],
) -> dict[int, str]:
    """Return how each row differs that does."""
    kinds = dict.fromkeys(np.setdiff1d(a[0], b[0]).tolist(), ONLY_A)
    kinds |= dict.fromkeys(np.setdiff1d(b[0], a[0]).tolist(), ONLY_B)
    both, at_a, at_b = np.intersect1d(a[0], b[0], return_indices=True)
    others = a[1][at_a] != b[1][at_b]
    kinds |= dict.fromkeys(both[others].tolist(), TOKENS)
    return kinds | dict.fromkeys(both[~others & (a[2][at_a] != b[2][at_b])].tolist(), LABELS)


def _shown(side: Side, kinds: Mapping[int, str], n: int, *, by_name: bool) -> dict[int, RowView]:
    """Return the first rows of a side that differ, and those of the same place that it rejects."""
    found = dict[int, RowView]()
    for step in side.steps():
        for number, said in enumerate(step.batch.conversations):
            if (key := _key(said.source, by_name=by_name)) in kinds and (key in found or len(found) < n):
                row = view(step.batch.built(number), side.recipe)
                known = found.get(key)
                found[key] = replace(known, examples=(*known.examples, *row.examples)) if known else row
        for reject in step.batch.rejects:
            if (key := _key(reject.source, by_name=by_name)) in kinds and len(found) < n:
                found[key] = view(reject, side.recipe)
        if len(found) >= n and side.folder is None:
            return found
    return found


def _place(shown: Sequence[Mapping[int, RowView]], key: int) -> tuple[str, int]:
    source = next(one[key].source for one in shown if key in one)
    return source.path, source.row


def _changed(kind: str, a: RowView | None, b: RowView | None) -> Changed:
    known = a or b
    assert known
    a, b = (one or RowView(known.source, rejected="is not there") for one in (a, b))
    pairs = zip_longest(a.examples, b.examples)
    return Changed(kind, a, b, tuple(compared(*pair) for pair in pairs))


def compared(a: View | None, b: View | None) -> tuple[Edit, ...]:
    """Return the stretches of tokens that are not as in the other, by text and label; all where there is no other.

    Where too many are left between what begins and what ends alike, all of these are one stretch.
    """
    if a is None or b is None:
        return (Edit((0, len(a) if a else 0), (0, len(b) if b else 0)),)
    left, right = ([*zip(one.pieces, one.trained.tolist(), strict=True)] for one in (a, b))
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


def _marked(view: View, stretches: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    marks = np.zeros(len(view), np.bool_)
    for start, end in stretches:
        marks[start:end] = True
    return marks


def _around(view: View, stretches: Sequence[tuple[int, int]], *, plain: bool) -> Text:
    """Return stretches of tokens with a few around each; in colours, they stand out."""
    near, marked = np.zeros(len(view), np.bool_), _marked(view, stretches)
    for start, end in stretches:
        near[max(start - _CONTEXT, 0) : end + _CONTEXT] = True
    shown, at = Text(), 0
    for first, last in np.flatnonzero(np.diff(near, prepend=False, append=False)).reshape(-1, 2).tolist():
        shown.append(" … " if first > at else "")
        for start, end in [(first, last)] if plain else _apart(marked, first, last):
            text = as_text(view.part(start, end).segments(), plain=plain)
            if marked[start] and not plain:
                text.stylize("reverse")
            shown.append_text(text)
        at = last
    return shown.append(" …") if at < len(view) else shown


def _apart(marked: NDArray[np.bool_], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the stretches of tokens that are marked, and those that are not."""
    yield from pairwise([first, *(np.flatnonzero(np.diff(marked[first:last])) + first + 1).tolist(), last])


def _options(a: Side, b: Side) -> dict[str, tuple[Any, Any]]:
    """Return the options that differ, each as it is on both sides; what one side knows nothing of is left out."""
    left, right = flat(a.options), flat(b.options)
    return {name: (left[name], right[name]) for name in left if name in right and left[name] != right[name]}


def _brief(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"
