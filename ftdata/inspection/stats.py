"""Stats: how much there is of data or of a build, how long it is, how much of it is trained: figures and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftdata.errors import InputRefused
from ftdata.inspection import charts
from ftdata.inspection.row_views import to_single_line
from ftdata.inspection.survey import Ints, Progress, RowNumbers, Survey, survey_rows
from ftdata.inspection.target import Target, make_target
from ftdata.storage import disk
from ftdata.storage.atomic import replace_file

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_LIMITS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class StatsGroup:
    """Figures of some rows.

    Attributes:
        of: `"all"`, `"source"`, `"split"` or `"schema"`.
        name: which of these.
        rows: how many there are.
        examples: what became of them.
        turns: messages of the assistant; `None` where nobody knows: of tokens that were made elsewhere, of builds.
        tokens: of all examples together.
        trained: those that carry loss.
        lengths: percentile -> tokens of an example.
        answers: percentile -> trained tokens of an example.
    """

    of: str
    name: str
    rows: int
    examples: int
    turns: int | None
    tokens: int
    trained: int
    lengths: Mapping[int, int]
    answers: Mapping[int, int]


@dataclass(frozen=True)
class LengthLimit:
    """What a `max_length` would do.

    Attributes:
        max_length: in tokens.
        longer: how many examples have more.
        tokens: how many tokens stand beyond it, of all examples together.
    """

    max_length: int
    longer: int
    tokens: int


@dataclass(frozen=True)
class Stats:
    """Figures of data or of a build.

    Attributes:
        title: what was looked at.
        rows: rows that were read, and wanted by `where`.
        rejected: code -> rejected rows.
        flags: flag -> examples.
        groups: figures of all rows first, then by source, split and schema where there are several.
        limits: what `max_length` of usual sizes would do.
        seen: the numbers behind it, row by row.
    """

    title: str
    rows: int
    rejected: Mapping[str, int]
    flags: Mapping[str, int]
    groups: tuple[StatsGroup, ...]
    limits: tuple[LengthLimit, ...]
    seen: Survey = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        own = {name: getattr(self, name) for name in ("title", "rows", "rejected", "flags")}
        own["groups"] = [asdict(group) for group in self.groups]
        return {**own, "limits": [asdict(limit) for limit in self.limits]}

    def __str__(self) -> str:
        console = Console(color_system=None, width=160)
        with console.capture() as capture:
            self.print(console)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def print(self, console: Console) -> None:
        """Print tables to a rich console."""
        console.print(Text(to_single_line(self.title), "bold"), soft_wrap=True)
        whole = self.groups[0]
        reasons = ", ".join(f"{count:,} {code}" for code, count in self.rejected.items())
        rejected = f" ({reasons})" if reasons else ""
        total = sum(self.rejected.values())
        console.print(Text(f"{self.rows:,} rows read, {total:,} rejected{rejected}"), soft_wrap=True)
        counts = Table("", "rows", "examples", "turns", "tokens", "trained", "share", box=None, pad_edge=False)
        lengths = Table("tokens of", *map(_percentile, PERCENTILES), box=None, pad_edge=False)
        for table in (counts, lengths):
            for column in table.columns[1:]:
                column.justify = "right"
        for group in self.groups:
            turns = "-" if group.turns is None else f"{group.turns:,}"
            share = f"{group.trained / max(group.tokens, 1):.1%}"
            figures = (f"{number:,}" for number in (group.rows, group.examples))
            counts.add_row(Text(_named(group)), *figures, turns, f"{group.tokens:,}", f"{group.trained:,}", share)
        lengths.add_row("an example", *(f"{whole.lengths[at]:,}" for at in PERCENTILES))
        lengths.add_row("what is trained of it", *(f"{whole.answers[at]:,}" for at in PERCENTILES))
        console.print(counts)
        console.print()
        console.print(lengths)
        if self.limits:
            limits = Table("max_length", "longer examples", "share", "tokens behind it", box=None, pad_edge=False)
            for column in limits.columns:
                column.justify = "right"
            for one in self.limits:
                share = f"{one.longer / max(len(self.seen.lengths), 1):.2%}"
                limits.add_row(f"{one.max_length:,}", f"{one.longer:,}", share, f"{one.tokens:,}")
            console.print()
            console.print(limits)
        for flag, count in self.flags.items():
            console.print(f"flag {flag}: {count:,} examples", highlight=False)

    def pictures(self) -> dict[str, str]:
        """Return SVG pictures by name: `lengths` of examples, and `trained`, the share of each that is."""
        numbers = self.seen.numbers
        share = numbers.trained / np.maximum(numbers.tokens, 1)
        return {
            "lengths": charts.draw_length_histogram(self.seen.lengths, alone=True),
            "trained": charts.draw_share_histogram(share, alone=True),
        }

    def _repr_html_(self) -> str:
        return "".join(self.pictures().values())


def stats(
    data: Any,
    tokenizer: Any = None,
    template: str | Path | None = None,
    *,
    where: str | None = None,
    limit: int | None = None,
    svg: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Stats:
    """Count rows, turns, tokens and trained tokens of `data`, as a whole and by source, split and schema.

    Args:
        data: as for `build_sft_dataset`; or the folder of a build.
        tokenizer: as for `build_sft_dataset`; a build knows its own.
        template: as for `build_sft_dataset`.
        where: rows to count, as for `build_sft_dataset`.
        limit: how many rows to count of each place.
        svg: a folder for pictures: `lengths.svg` and `trained.svg`.
        progress: called with the rows and tokens done so far, and which share of the data that is.
        options: further options of `build_sft_dataset` that decide what a row becomes.

    Raises:
        UsageError: an option is invalid.
        InputRefused: a source cannot be read, or nothing in it can be built.
        StorageError: the pictures cannot be written.
    """
    side = make_target(data, tokenizer, template, where=where, limit=limit, **options)
    seen = side.finished(survey_rows(side.steps(), side.names, progress=progress))
    if not len(seen.numbers):
        raise InputRefused("no_rows_built", f"none of {seen.rows:,} rows can be built, so there is nothing to count")
    groups = tuple(_groups(seen, side))
    found = Stats(side.title, seen.rows, seen.rejected, seen.flags, groups, tuple(_limits(seen.lengths)), seen)
    if svg is not None:
        for name, picture in found.pictures().items():
            with replace_file(Path(svg).resolve() / f"{name}.svg") as file:
                disk.write(file, picture.encode("utf-8", "backslashreplace"))
    return found


def _groups(seen: Survey, side: Target) -> Iterator[StatsGroup]:
    numbers = seen.numbers
    splits, paths = [*dict.fromkeys(seen.splits)], [*dict.fromkeys(seen.sources)]
    split = np.asarray([splits.index(name) for name in seen.splits])
    path = np.asarray([paths.index(name) for name in seen.sources])
    every = np.ones(len(numbers), np.bool_)
    yield _group("all", "", numbers, every)
    ways: list[tuple[str, Ints, list[str]]] = [
        ("source", path[numbers.source], paths),
        ("split", split[numbers.source], splits),
        ("schema", numbers.schema, list(seen.schemas)),
    ]
    if side.folder is not None:
        del ways[2]
    for of, values, names in ways:
        for number, name in enumerate(names):
            if (chosen := values == number).any() and len(names) > 1:
                yield _group(of, name, numbers, chosen)


def _group(of: str, name: str, numbers: RowNumbers, chosen: np.ndarray) -> StatsGroup:
    mine = np.repeat(chosen, numbers.examples)
    tokens, trained, turns = numbers.tokens[mine], numbers.trained[mine], numbers.turns[chosen]
    return StatsGroup(
        of,
        name,
        int(chosen.sum()),
        len(tokens),
        None if (turns < 0).any() else int(turns.sum()),
        int(tokens.sum()),
        int(trained.sum()),
        _percentiles(tokens),
        _percentiles(trained),
    )


def _percentiles(values: Ints) -> dict[int, int]:
    """Return values that are there, no means of them."""
    return dict(zip(PERCENTILES, np.percentile(values, PERCENTILES, method="lower").astype(int).tolist(), strict=True))


def _limits(lengths: Ints) -> Iterator[LengthLimit]:
    for limit in _LIMITS:
        longer = lengths > limit
        yield LengthLimit(limit, int(longer.sum()), int((lengths[longer] - limit).sum()))
        if not longer.any():
            return


def _named(group: StatsGroup) -> str:
    return to_single_line(f"{group.of} {group.name}".strip())


def _percentile(at: int) -> str:
    return {0: "least", 50: "half", 100: "most"}.get(at, f"{at} %")
