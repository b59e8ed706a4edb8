"""Subject: what is looked at, data under a recipe or a build, from the first row to the last, as often as it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ftdata._version import __version__
from ftdata.build.store import read_manifest
from ftdata.errors import UsageError, check_choice
from ftdata.inspection import stored_builds
from ftdata.inspection.survey import Survey, SurveyStep, survey_steps
from ftdata.pipeline.recipe import Options, Recipe, make_recipe
from ftdata.readers import FileSource, MemorySource, resolve_sources
from ftdata.readers.row_filter import RowFilter

HELD_OUT = "held out"
_HELD = ("test", "valid", "val", "eval", "dev")


@dataclass(frozen=True)
class Target:
    """Data under a recipe, or a build.

    Attributes:
        title: how to speak of it.
        recipe: what decides what a row becomes.
        names: name and split of each source.
        steps: goes through it.
        options: what it was made with.
        sources: what it is read from; a build: nothing.
        finished: adds to a survey of it what is known besides.
        folder: that of the build, if it is one.
    """

    title: str
    recipe: Recipe
    names: Sequence[tuple[str, str]]
    steps: Callable[[], Iterator[SurveyStep]]
    options: Mapping[str, Any]
    sources: Sequence[FileSource | MemorySource] = ()
    finished: Callable[[Survey], Survey] = lambda seen: seen
    folder: Path | None = None

    @property
    def held_out(self) -> list[bool]:
        """Of each source, whether its rows must not be trained on: those of splits that are not for training."""
        own = {split for _, split in self.names if split != HELD_OUT}
        if len(own) < 2:
            return [split == HELD_OUT for _, split in self.names]
        if "train" in own:
            return [split != "train" for _, split in self.names]
        return [split == HELD_OUT or any(word in split.lower() for word in _HELD) for _, split in self.names]


def make_target(
    data: Any,
    tokenizer: Any = None,
    template: str | Path | None = None,
    *,
    against: Any = None,
    where: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> Target:
    """Return data under a recipe, or a build, which says itself how it was made.

    Args:
        data: as for `build_sft_dataset`; or the folder of a build.
        tokenizer: as for `build_sft_dataset`; of a build: where its tokenizer is now.
        template: as for `build_sft_dataset`.
        against: more data, all of it, of the split "held out".
        where: rows to read, as for `build_sft_dataset`.
        limit: how many rows to read of each place.
        options: further options of `build_sft_dataset` that decide what a row becomes.

    Raises:
        UsageError: an option is not known, cannot be meant, or is said of a build; there is no tokenizer.
        InputRefused: a source cannot be read.
    """
    for name in options:
        check_choice("option", name, ("date", "template_kwargs", *(each.name for each in fields(Options))))
    folder = stored_builds.find_build_folder(data)
    if folder is not None:
        stored_builds.refuse_build_options(
            {"template": template, "against": against, "where": where, "limit": limit, **options}
        )
        return _of_build(folder, tokenizer)
    given = resolve_sources(data)
    if tokenizer is None:
        hint = "pass the model's: --tokenizer"
        raise UsageError("no_tokenizer", "what is trained depends on the tokenizer, and none is given", hint=hint)
    recipe = make_recipe(tokenizer, template, **options)
    tests = [_apart(one) for one in resolve_sources(against)] if against is not None else []
    RowFilter(where, limit)

    def through() -> Iterator[SurveyStep]:
        chosen = {one.place: RowFilter(where, limit) for one in given}
        return survey_steps(
            recipe, [*((one, chosen[one.place]) for one in given), *((one, RowFilter()) for one in tests)]
        )

    return Target(
        target_title([one.path for one in given], recipe),
        recipe,
        [*((one.path, one.split or "train") for one in given), *((one.path, HELD_OUT) for one in tests)],
        through,
        {"ftdata": __version__, **recipe.describe(), "where": where, "limit": limit},
        given,
    )


def _apart(source: FileSource | MemorySource) -> FileSource | MemorySource:
    """Return a source that can be told from the data: what is in memory has no name of its own."""
    return replace(source, path=f"<against {source.path.strip('<>')}>") if source.path.startswith("<") else source


def _of_build(folder: Path, tokenizer: Any) -> Target:
    manifest = read_manifest(folder)
    recipe, splits = stored_builds.load_build_recipe(folder, tokenizer), stored_builds.split_names(folder)
    names = stored_builds.build_sources(folder, splits)
    numbers = {name: number for number, name in enumerate(names)}

    def through() -> Iterator[SurveyStep]:
        for batch in stored_builds.batch_documents(recipe, stored_builds.read_build_documents(folder, splits)):
            yield SurveyStep([numbers[one.source.path, one.split] for one in batch.documents], batch)

    said = {"ftdata": manifest["ftdata"], **manifest["options"]}
    return Target(
        target_title([str(folder)], recipe),
        recipe,
        names,
        through,
        said,
        finished=lambda seen: stored_builds.add_reported_rejects(folder, seen),
        folder=folder,
    )


def target_title(places: Sequence[str], recipe: Recipe) -> str:
    """Say what is looked at, and as what."""
    named = list(dict.fromkeys(places))
    more = f" and {len(named) - 3:,} more" if len(named) > 3 else ""
    return f"{', '.join(named[:3])}{more} · template {recipe.template.name} · tokenizer {recipe.tokenizer.name}"
