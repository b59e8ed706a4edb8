"""Diff: the same rows, built in two ways: which tokens or labels are others.

Two passes: the first keeps a few bytes of each row and tells which rows differ, the second looks at the first of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import SequenceMatcher
from itertools import islice, pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from ftdata.config import load_config, parse_yaml
from ftdata.errors import InputRefused, UsageError, one_of
from ftdata.examples import Batch
from ftdata.look import built
from ftdata.look.page import Page, flat, write_page
from ftdata.look.side import Side, side_of
from ftdata.look.survey import Progress
from ftdata.look.terminal import as_text, is_plain
from ftdata.look.views import RowView, View, view
from ftdata.readers.streams import STDIN
from ftdata.recipe import Options
from ftdata.tokenize import Tokenizer
from ftdata.types import Example, Reject

SAME, LABELS, TOKENS = "same", "labels differ", "tokens differ"
MOVED, REPEATED = "in another split", "another number of times"
ONLY_A, ONLY_B, NEITHER = "only in A", "only in B", "rejected by both"
KINDS = (SAME, LABELS, TOKENS, MOVED, REPEATED, ONLY_A, ONLY_B, NEITHER)
_DECIDES = ("template", "date", "template_kwargs", "where", "limit", *(each.name for each in fields(Options)))
"""Options that decide what a row becomes, or whether it is read."""

_CONTEXT, _MOST_COMPARED, _MOST_ROWS = 8, 4000, 1 << 40


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
        rows: kind, of `KINDS` -> how many rows.
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
        counted = ", ".join(f"{count:,} {kind}" for kind, count in self.rows.items() if count or kind == SAME)
        console.print(f"{sum(self.rows.values()):,} rows: {counted}", highlight=False, soft_wrap=True)

    def page(self) -> Page:
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
        return Page(
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

    Raises:
        UsageError: an option cannot be meant.
        InputRefused: a source cannot be read.
    """
    if type(n) is not int or n < 0:
        raise UsageError("n", f"n is {n!r}, expected a number of rows from 0")
    if isinstance(a, Mapping) and isinstance(b, Mapping) and isinstance(a.get("data"), Iterator):
        kept = list(a["data"])
        b = {**b, "data": kept} if b.get("data") is a["data"] else b
        a = {**a, "data": kept}
    sides = _side(a), _side(b)
    by_text = sides[0].recipe.tokenizer.fingerprint != sides[1].recipe.tokenizer.fingerprint
    prints = [_prints(side, progress, by_text=by_text) for side in sides]
    if not any(one.tokens[0] for one in prints):
        raise InputRefused("nothing_built", "neither side has a row that can be built, so there is nothing to compare")
    keys = _keys([one.paths for one in prints])
    rows = [one.by_row(own) for one, own in zip(prints, keys, strict=True)]
    kinds = _kinds(*rows)
    both = set(rows[0][0].tolist()) & set(rows[1][0].tolist())
    count = Counter(kinds.values())
    count[SAME] = len(both) - sum(count[kind] for kind in (LABELS, TOKENS, MOVED, REPEATED))
    count[NEITHER] = len(prints[0].rejected_as(keys[0]) & prints[1].rejected_as(keys[1]))
    # The first in the order of A, and then of B, whichever side they are looked at on.
    wanted = [*islice((key for one in rows for key in one[0][np.argsort(one[-1])].tolist() if key in kinds), 2 * n)]
    wanted = [*dict.fromkeys(wanted)][:n]
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
        more[name.strip().replace("-", "_")] = _value(value)
    return {**said, **more}


def _value(text: str) -> Any:
    """Return what a text says in YAML; a text that is no YAML says itself."""
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text


def _side(given: Any) -> Side:
    if not isinstance(given, Mapping):
        return side_of(given)
    for name in given:
        one_of("option", str(name), ("data", "tokenizer", *_DECIDES))
    if "data" not in given:
        raise UsageError("diff", "a side names no data", hint="give data and tokenizer, or the folder of a build")
    data = given["data"]
    if str(data) == STDIN or (isinstance(data, list) and STDIN in data):
        raise UsageError("diff", "standard input is read once, and a comparison reads twice", hint="save it to a file")
    # What can be gone through but once is kept.
    return side_of(**{**given, "data": list(data) if isinstance(data, Iterator) else data})


@dataclass(frozen=True)
class Prints:
    """What tells examples of one side from those of the other; uint64 `[examples]` each where nothing else is said.

    Attributes:
        paths: the names of the sources, by number.
        source: int64 `[examples]`, the number of the source of each.
        row: int64 `[examples]`, the number of the row there.
        split: hashes of the split.
        first: hashes of the tokens; across tokenizers, of the text.
        second: hashes of the labels; across tokenizers, of what is trained of the text.
        rejected: source and row of each that was rejected.
        tokens: how many there are on this side, and how many are trained.
    """

    paths: Sequence[str]
    source: NDArray[np.int64]
    row: NDArray[np.int64]
    split: NDArray[np.uint64]
    first: NDArray[np.uint64]
    second: NDArray[np.uint64]
    rejected: Sequence[tuple[int, int]]
    tokens: tuple[int, int]

    def by_row(self, keys: Mapping[str, int]) -> Rows:
        """Return the rows: their keys, what tells each from that of the other side, and where it comes first.

        Of several examples of a row the sums are told: in which order packs hold them is no difference.
        """
        own = np.asarray([keys[path] for path in self.paths], np.int64)
        rows, first, which, counts = np.unique(
            own[self.source] * _MOST_ROWS + self.row, return_index=True, return_inverse=True, return_counts=True
        )
        sums = []
        for values in (self.first, self.second, self.split):
            sums.append(total := np.zeros(len(rows), np.uint64))
            np.add.at(total, which.reshape(-1), values)
        return rows, sums[0], sums[1], sums[2], counts.astype(np.uint64), first

    def rejected_as(self, keys: Mapping[str, int]) -> set[int]:
        """Return the keys of the rows that were rejected."""
        return {keys[self.paths[source]] * _MOST_ROWS + row for source, row in self.rejected}


Rows = tuple[NDArray[Any], ...]


def _keys(paths: Sequence[Sequence[str]]) -> list[dict[str, int]]:
    """Return, for each side, the number of each source: the same where it is the same data.

    It is where the path is; else where one file alone on each side has the name; or where just one source is left.
    """
    left, right = ([*dict.fromkeys(own)] for own in paths)
    keys = [
        {path: number for number, path in enumerate(left)},
        {path: left.index(path) for path in right if path in left},
    ]
    ways: tuple[Callable[[str], str], ...] = (lambda path: Path(path).name, lambda _: "")
    for name in ways:
        open_a = [path for path in left if path not in right and keys[0][path] not in keys[1].values()]
        open_b = [path for path in right if path not in keys[1]]
        for path in open_b:
            own = [other for other in open_a if name(other) == name(path)]
            if len(own) == 1 and sum(name(other) == name(path) for other in open_b) == 1:
                keys[1][path] = keys[0][own[0]]
    for path in right:
        keys[1].setdefault(path, len(left) + len(keys[1]))
    return keys


def _prints(side: Side, progress: Progress | None, *, by_text: bool) -> Prints:
    columns: tuple[list[int], ...] = ([], [], [], [], [])
    paths, splits, rejected = dict[str, int](), [split for _, split in side.names], list[tuple[int, int]]()
    digests = [xxhash.xxh3_64_intdigest(split.encode()) for split in splits]
    rows = tokens = trained = 0
    for step in side.steps():
        batch = step.batch
        rows, tokens = rows + len(batch), tokens + int(batch.columns.lengths.sum())
        trained += int(batch.columns.learnt.sum())
        numbers = np.repeat(np.broadcast_to(step.source, len(batch.counts)), batch.counts).tolist()
        for one, number in zip(batch.columns.sources, numbers, strict=True):
            columns[0].append(paths.setdefault(one.path, len(paths)))
            columns[1].append(one.row)
            columns[2].append(digests[number])
        for pair in _texts(batch) if by_text else _tokens(batch):
            columns[3].append(pair[0])
            columns[4].append(pair[1])
        rejected += ((paths.setdefault(reject.source.path, len(paths)), reject.source.row) for reject in batch.rejects)
        if progress:
            progress(rows, tokens, step.share)
    for reject in built.rejects_of(side.folder) if side.folder else ():
        rejected.append((paths.setdefault(reject.source.path, len(paths)), reject.source.row))
    source, row = (np.asarray(one, np.int64) for one in columns[:2])
    split, first, second = (np.asarray(one, np.uint64) for one in columns[2:])
    return Prints([*paths], source, row, split, first, second, rejected, (tokens, trained))


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


def _kinds(a: Rows, b: Rows) -> dict[int, str]:
    """Return how each row differs that does."""
    kinds = dict.fromkeys(np.setdiff1d(a[0], b[0]).tolist(), ONLY_A)
    kinds |= dict.fromkeys(np.setdiff1d(b[0], a[0]).tolist(), ONLY_B)
    both, at_a, at_b = np.intersect1d(a[0], b[0], return_indices=True)
    _, first_a, second_a, split_a, count_a, _ = (column[at_a] for column in a)
    _, first_b, second_b, split_b, count_b, _ = (column[at_b] for column in b)
    # Sums of the same, each taken so often, are to each other as these numbers; all of it is modulo 2 ** 64.
    tokens, labels = first_a * count_b != first_b * count_a, second_a * count_b != second_b * count_a
    rules = ((tokens, TOKENS), (labels, LABELS), (count_a != count_b, REPEATED), (split_a != split_b, MOVED))
    for differ, kind in reversed(rules):
        kinds |= dict.fromkeys(both[differ].tolist(), kind)
    return kinds


def _shown(side: Side, keys: Mapping[str, int], wanted: set[int]) -> dict[int, RowView]:
    """Return the rows of a side that are wanted, those that it rejects among them."""
    found = dict[int, RowView]()
    for step in side.steps():
        for number, said in enumerate(step.batch.conversations):
            if (key := keys[said.source.path] * _MOST_ROWS + said.source.row) in wanted:
                row = view(step.batch.built(number), side.recipe)
                known = found.get(key)
                found[key] = replace(known, examples=(*known.examples, *row.examples)) if known else row
        _add_rejects(found, step.batch.rejects, side, keys, wanted)
        if len(found) == len(wanted) and side.folder is None:
            return found
    if side.folder is not None:
        _add_rejects(found, built.rejects_of(side.folder), side, keys, wanted)
    return found


def _add_rejects(
    found: dict[int, RowView], rejects: Iterable[Reject], side: Side, keys: Mapping[str, int], wanted: set[int]
) -> None:
    for reject in rejects:
        if (key := keys[reject.source.path] * _MOST_ROWS + reject.source.row) in wanted:
            found.setdefault(key, view(reject, side.recipe))


def _changed(kind: str, a: RowView | None, b: RowView | None, *, by_text: bool) -> Changed:
    known = a or b
    assert known
    a, b = (one or RowView(known.source, rejected="is not there") for one in (a, b))
    pairs = zip_longest(a.examples, b.examples)
    return Changed(kind, a, b, tuple(compared(*pair, by_text=by_text) for pair in pairs))


def compared(a: View | None, b: View | None, *, by_text: bool = False) -> tuple[Edit, ...]:
    """Return the stretches of tokens that are not as in the other, by id (or text) and label; all where there is none.

    Where too many are left between what begins and what ends alike, all of these are one stretch.
    """
    if a is None or b is None:
        return (Edit((0, len(a) if a else 0), (0, len(b) if b else 0)),)
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
    left, right = ({**side.options, **flat({"template": side.options["template"]})} for side in (a, b))
    both = [name for name in left if name in right and name not in ("template", "sources", "data")]
    tokenizer = {"tokenizer": tuple(side.options["tokenizer"]["name"] for side in (a, b))}
    if left["tokenizer"]["fingerprint"] == right["tokenizer"]["fingerprint"]:
        tokenizer = {}
    return {
        **tokenizer,
        **{name: (left[name], right[name]) for name in both if left[name] != right[name] and name != "tokenizer"},
    }


def _brief(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"
