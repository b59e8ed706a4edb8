"""Side: data under a recipe, or a build, gone through from the first row to the last, as often as it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftdata._version import __version__
from ftdata.errors import UsageError
from ftdata.look import built
from ftdata.look.survey import Step, steps
from ftdata.readers import sources
from ftdata.readers.select import Selection
from ftdata.recipe import Recipe, make_recipe
from ftdata.store import read_manifest


@dataclass(frozen=True)
class Side:
    """Data under a recipe, or a build.

    Attributes:
        title: how to speak of it.
        recipe: what decides what a row becomes.
        names: name and split of each source; of a build: its splits.
        steps: goes through it.
        options: what it was made with.
        folder: that of the build, if it is one.
    """

    title: str
    recipe: Recipe
    names: Sequence[tuple[str, str]]
    steps: Callable[[], Iterator[Step]]
    options: Mapping[str, Any]
    folder: Path | None = None


def side_of(
    data: Any,
    tokenizer: Any = None,
    template: str | Path | None = None,
    *,
    against: Any = None,
    where: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> Side:
    """Return data under a recipe, or a build, which says itself how it was made.

    Args:
        data: as for `build_sft_dataset`; or the folder of a build.
        tokenizer: as for `build_sft_dataset`; of a build: where its tokenizer is now.
        template: as for `build_sft_dataset`.
        against: more data, of the split "held out".
        where: rows to read, as for `build_sft_dataset`.
        limit: how many rows to read.
        options: further options of `build_sft_dataset` that decide what a row becomes.

    Raises:
        UsageError: an option cannot be meant, or is said of a build; there is no tokenizer.
        InputRefused: a source cannot be read.
    """
    folder = built.build_at(data)
    if folder is not None:
        built.refuse({"template": template, "against": against, "where": where, "limit": limit, **options})
        recipe, manifest = built.recipe_of(folder, tokenizer), read_manifest(folder)
        names = [(name, name) for name in built.splits_of(folder)]
        said = {"ftdata": manifest["ftdata"], **manifest["options"]}
        return Side(titled([str(folder)], recipe), recipe, names, _built(folder, recipe), said, folder)
    if tokenizer is None:
        hint = "pass the model's: --tokenizer"
        raise UsageError("no_tokenizer", "what is trained hangs on the tokenizer, and none is given", hint=hint)
    recipe = make_recipe(tokenizer, template, **options)
    given, tests = sources(data), sources(against) if against is not None else ()
    names = [(one.path, one.split or "train") for one in given] + [(one.path, "held out") for one in tests]
    Selection(where, limit)
    return Side(
        titled([one.path for one in given], recipe),
        recipe,
        names,
        lambda: steps(recipe, (*given, *tests), Selection(where, limit)),
        {"ftdata": __version__, **recipe.describe(), "where": where, "limit": limit},
    )


def _built(folder: Path, recipe: Recipe) -> Callable[[], Iterator[Step]]:
    def through() -> Iterator[Step]:
        for number, split in enumerate(built.splits_of(folder)):
            for batch in built.batches(recipe, built.documents(folder, split)):
                yield Step(number, batch)

    return through


def titled(places: Sequence[str], recipe: Recipe) -> str:
    """Say what is looked at, and as what."""
    named = list(dict.fromkeys(places))
    more = f" and {len(named) - 3:,} more" if len(named) > 3 else ""
    return f"{', '.join(named[:3])}{more} · template {recipe.template.name} · tokenizer {recipe.tokenizer.name}"
