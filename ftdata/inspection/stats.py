"""Count the rows, turns and tokens in data or a build, and present them as tables and histograms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ftdata.errors import InputRefused, count_noun
from ftdata.inspection import charts
from ftdata.inspection.row_views import to_single_line
from ftdata.inspection.survey import Ints, RowNumbers, Survey, survey_rows
from ftdata.inspection.target import Target, make_target
from ftdata.progress import Progress
from ftdata.storage import disk
from ftdata.storage.atomic import replace_file

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_LIMITS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class StatsGroup:
    """The counts and length percentiles of a group of rows, such as all rows of one source.

    Attributes:
        of: The grouping: `"all"`, `"source"`, `"split"` or `"schema"`.
        name: The name of the group, such as a path; empty for all rows.
        rows: The number of built rows.
        examples: The number of examples.
        turns: The number of assistant messages; `None` if unknown, for pretokenized rows and builds.
        tokens: The number of tokens.
        trained: The number of trained tokens.
        lengths: Percentile -> tokens per example.
        answers: Percentile -> trained tokens per example.
        images: The number of images.
        image_tokens: The number of tokens that stand for features of images.
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
    images: int
    image_tokens: int


@dataclass(frozen=True)
class LengthLimit:
    """The number of examples and tokens that would exceed a given value of `max_length`.

    Attributes:
        max_length: The limit in tokens.
        longer: The number of examples that exceed the limit.
        tokens: The number of tokens beyond the limit, over all examples.
    """

    max_length: int
    longer: int
    tokens: int


@dataclass(frozen=True)
class Stats:
    """The statistics of data or of a build: counts, flags and lengths.

    Attributes:
        title: The sources, the template and the tokenizer.
        rows: The number of rows that were read and match `where`.
        rejected: Code -> number of rejected rows.
        flags: Flag -> number of examples.
        groups: The statistics of all rows, then by source, split and schema if there are several.
        limits: The effect of common values of `max_length`.
        lengths_title: The title of the table of limits: which examples are counted.
        survey: The underlying numbers of each row.
    """

    title: str
    rows: int
    rejected: Mapping[str, int]
    flags: Mapping[str, int]
    groups: tuple[StatsGroup, ...]
    limits: tuple[LengthLimit, ...]
    lengths_title: str
    survey: Survey = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Convert the statistics to a JSON-serializable dictionary."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "survey"}
        return {**values, "groups": [*map(asdict, self.groups)], "limits": [*map(asdict, self.limits)]}

    def __str__(self) -> str:
        console = Console(color_system=None, width=160, force_jupyter=False)
        with console.capture() as capture:
            self.print(console)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def print(self, console: Console) -> None:
        """Print the statistics as tables to a rich console."""
        console.print(Text(to_single_line(self.title), "bold"), soft_wrap=True)
        all_rows = self.groups[0]
        reasons = ", ".join(f"{count:,} {code}" for code, count in self.rejected.items())
        rejected = f" ({reasons})" if reasons else ""
        total = sum(self.rejected.values())
        console.print(Text(f"{count_noun(self.rows, 'row')} read, {total:,} rejected{rejected}"), soft_wrap=True)
        counts = _make_table("", "rows", "examples", "turns", "tokens", "trained", "share")
        lengths = _make_table("tokens per example", *map(_percentile_name, PERCENTILES))
        for group in self.groups:
            turns = "-" if group.turns is None else f"{group.turns:,}"
            share = f"{group.trained / max(group.tokens, 1):.1%}"
            numbers = (f"{number:,}" for number in (group.rows, group.examples))
            counts.add_row(Text(_group_name(group)), *numbers, turns, f"{group.tokens:,}", f"{group.trained:,}", share)
        lengths.add_row("all tokens", *(f"{all_rows.lengths[percentile]:,}" for percentile in PERCENTILES))
        lengths.add_row("trained tokens", *(f"{all_rows.answers[percentile]:,}" for percentile in PERCENTILES))
        console.print(counts)
        console.print()
        console.print(lengths)
        if self.limits:
            limits = _make_table("max_length", "longer examples", "share", "tokens beyond")
            limits.title = self.lengths_title
            limits.title_justify, limits.title_style = "left", ""
            limits.columns[0].justify = "right"
            for limit in self.limits:
                share = f"{limit.longer / max(len(self.survey.lengths), 1):.2%}"
                limits.add_row(f"{limit.max_length:,}", f"{limit.longer:,}", share, f"{limit.tokens:,}")
            console.print()
            console.print(limits)
        if all_rows.images:
            share = f"{all_rows.image_tokens / max(all_rows.tokens, 1):.1%}"
            text = (
                f"{count_noun(all_rows.images, 'image')} with {all_rows.image_tokens:,} tokens, {share} of all tokens"
            )
            console.print(text, highlight=False)
        for flag, count in self.flags.items():
            console.print(f"flag {flag}: {count_noun(count, 'example')}", highlight=False)

    def pictures(self) -> dict[str, str]:
        """Draw two SVG histograms: the lengths of examples, and their shares of trained tokens.

        The keys of the result are `lengths` and `trained`.
        """
        numbers = self.survey.numbers
        share = numbers.trained / np.maximum(numbers.tokens, 1)
        return {
            "lengths": charts.draw_length_histogram(self.survey.lengths, standalone=True),
            "trained": charts.draw_share_histogram(share, standalone=True),
        }

    def _repr_html_(self) -> str:
        return "".join([f"<pre>{escape(str(self))}</pre>", *self.pictures().values()])


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
    """Count rows, turns, tokens and trained tokens, in total and by source, split and schema.

    Args:
        data: As for `build_sft_dataset`, or the folder of a build.
        tokenizer: As for `build_sft_dataset`. The default for a build is the tokenizer that it was built with.
        template: As for `build_sft_dataset`.
        where: As for `build_sft_dataset`: a filter expression for the rows to count.
        limit: Maximum number of rows per source.
        svg: Folder for the histograms `lengths.svg` and `trained.svg`.
        progress: Called with a `ProgressUpdate` after each batch of rows.
        options: Further options of `build_sft_dataset` that are part of the recipe.

    Raises:
        UsageError: An option is invalid.
        InputRefused: A source cannot be read, or no row can be built.
        StorageError: The histograms cannot be written.
    """
    target = make_target(data, tokenizer, template, where=where, limit=limit, **options)
    survey = target.complete_survey(survey_rows(target.steps(), target.names, progress=progress))
    if not len(survey.numbers):
        reasons = "; ".join(map(str, survey.rejects[:3])) or target.describe_missing_column()
        reasons = reasons or ("the data is empty" if where is None else "where= excludes all rows")
        raise InputRefused("no_rows_built", f"0 of {survey.rows:,} rows can be built: {reasons}")
    groups = tuple(_make_groups(survey, target))
    limits = tuple(_length_limits(survey.lengths))
    result = Stats(
        str(target.heading), survey.rows, survey.rejected, survey.flags, groups, limits,
        _make_lengths_title(survey, target), survey,
    )  # fmt: skip
    if svg is not None:
        for name, picture in result.pictures().items():
            with replace_file(Path(svg).resolve() / f"{name}.svg") as file:
                disk.write(file, picture.encode("utf-8", "backslashreplace"))
    return result


def _make_groups(survey: Survey, target: Target) -> Iterator[StatsGroup]:
    numbers = survey.numbers
    splits, paths = [*dict.fromkeys(survey.splits)], [*dict.fromkeys(survey.sources)]
    split = np.asarray([splits.index(name) for name in survey.splits])
    path = np.asarray([paths.index(name) for name in survey.sources])
    yield _make_group("all", "", numbers, np.ones(len(numbers), np.bool_))
    groupings: list[tuple[str, Ints, list[str]]] = [
        ("source", path[numbers.source], paths),
        ("split", split[numbers.source], splits),
        ("schema", numbers.schema, list(survey.schemas)),
    ]
    if target.folder is not None:
        del groupings[2]
    for of, values, names in groupings:
        for number, name in enumerate(names):
            if (is_member := values == number).any() and len(names) > 1:
                yield _make_group(of, name, numbers, is_member)


def _make_group(of: str, name: str, numbers: RowNumbers, is_member: np.ndarray) -> StatsGroup:
    is_member_example = np.repeat(is_member, numbers.examples)
    tokens, trained = numbers.tokens[is_member_example], numbers.trained[is_member_example]
    turns = numbers.turns[is_member]
    return StatsGroup(
        of,
        name,
        int(is_member.sum()),
        len(tokens),
        None if (turns < 0).any() else int(turns.sum()),
        int(tokens.sum()),
        int(trained.sum()),
        _percentiles(tokens),
        _percentiles(trained),
        int(numbers.images[is_member_example].sum()),
        int(numbers.image_tokens[is_member_example].sum()),
    )


def _percentiles(values: Ints) -> dict[int, int]:
    """Compute percentiles without interpolation, so that every percentile is an actual value."""
    return dict(zip(PERCENTILES, np.percentile(values, PERCENTILES, method="lower").astype(int).tolist(), strict=True))


def _length_limits(lengths: Ints) -> Iterator[LengthLimit]:
    for max_length in _LIMITS:
        is_longer = lengths > max_length
        yield LengthLimit(max_length, int(is_longer.sum()), int((lengths[is_longer] - max_length).sum()))
        if not is_longer.any():
            return


def _make_table(first: str, *headers: str) -> Table:
    return Table(first, *(Column(header, justify="right") for header in headers), box=None, pad_edge=False)


def _make_lengths_title(survey: Survey, target: Target) -> str:
    count = count_noun(len(survey.lengths), "example")
    if target.folder is not None and target.recipe.max_length and target.recipe.overlong == "drop_turns":
        # A build does not contain the lengths of these examples.
        return f"lengths of {count}, before max_length; examples that drop_turns left out completely are not counted"
    return f"lengths of all {count}, before max_length"


def _group_name(group: StatsGroup) -> str:
    return to_single_line(f"{group.of} {group.name}".strip())


def _percentile_name(percentile: int) -> str:
    return {0: "min", 50: "median", 100: "max"}.get(percentile, f"p{percentile}")
