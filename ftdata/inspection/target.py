"""The input of an inspection command: data with a recipe, or a finished build."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftdata._version import __version__
from ftdata.build.request import check_source_builds
from ftdata.build.store import check_intact, read_manifest
from ftdata.errors import FtdataError, InputRefused, UsageError, check_choice
from ftdata.inspection import stored_builds
from ftdata.inspection.row_views import Heading
from ftdata.inspection.survey import Survey, SurveyStep, survey_steps
from ftdata.options import option_names
from ftdata.pipeline.batch import BuiltRow
from ftdata.pipeline.recipe import Recipe, make_recipe, resolve_task
from ftdata.readers import FileSource, MemorySource, reread_rows, resolve_sources
from ftdata.readers.row_filter import RowFilter, find_missing_column
from ftdata.types import IGNORE_INDEX

HELD_OUT = "held out"
_HELD_OUT_NAMES = ("test", "valid", "val", "eval", "dev")


@dataclass(frozen=True)
class Target:
    """The input of an inspection command: data with a recipe, or a build with its stored recipe.

    Attributes:
        paths: The paths of the sources, or of the build.
        recipe: The options, tokenizer and template.
        names: The name and the split of each source.
        steps: A function that starts a pass over all rows.
        options: The options as they are recorded in reports.
        sources: The sources of the data; empty for a build.
        folder: The folder of the build, or `None`.
    """

    paths: Sequence[str]
    recipe: Recipe
    names: Sequence[tuple[str, str]]
    steps: Callable[[], Iterator[SurveyStep]]
    options: Mapping[str, Any]
    sources: Sequence[FileSource | MemorySource] = ()
    folder: Path | None = None

    def describe_missing_column(self) -> str:
        """Describe a column that the filter expression uses, but that no row has. Return `""` if there is none."""
        return find_missing_column(self.options.get("where"), reread_rows(self.sources))

    @property
    def heading(self) -> Heading:
        """The heading of reports about this target."""
        return Heading.from_paths(self.paths, self.recipe.template.name, self.recipe.tokenizer.name)

    def complete_survey(self, survey: Survey) -> Survey:
        """Add the rejected rows in the report of a build to a survey. For data, return the survey unchanged."""
        return survey if self.folder is None else stored_builds.add_reported_rejects(self.folder, survey)

    @property
    def held_out(self) -> list[bool]:
        """For each source, whether its rows are held out, which means that their split is not used for training."""
        data_splits = {split for _, split in self.names if split != HELD_OUT}
        if len(data_splits) < 2:
            return [split == HELD_OUT for _, split in self.names]
        if "train" in data_splits:
            return [split != "train" for _, split in self.names]
        return [split == HELD_OUT or any(word in split.lower() for word in _HELD_OUT_NAMES) for _, split in self.names]


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
    """Create the target of an inspection command from data and options, or from a build.

    Args:
        data: As for `build_sft_dataset`, or the folder of a build.
        tokenizer: As for `build_sft_dataset`. For a build: the current location of its tokenizer, if it was moved.
        template: As for `build_sft_dataset`.
        against: Held-out data, which gets the split "held out".
        where: A filter expression, as for `build_sft_dataset`.
        limit: Maximum number of rows per source.
        options: Further options of `build_sft_dataset` that are part of the recipe.

    Raises:
        UsageError: An option is unknown, invalid, or does not apply to a build; `tokenizer` is missing; or a build
            among the data was made with another tokenizer.
        InputRefused: A source cannot be read. A damaged build is detected when its rows are read.
    """
    for name in options:
        check_choice("option", name, option_names("task", "rendering", "rows"))
    folder = stored_builds.find_build_folder(data)
    if folder is not None:
        stored_builds.refuse_build_options(
            {"template": template, "against": against, "where": where, "limit": limit, **options}
        )
        return _make_build_target(folder, tokenizer)
    sources = resolve_sources(data)
    if tokenizer is None:
        hint = "pass the tokenizer of the model: --tokenizer"
        raise UsageError("no_tokenizer", "a tokenizer is required, but no tokenizer was passed", hint=hint)
    recipe = make_recipe(tokenizer, template, **options)
    recipe = resolve_task(recipe, options.get("task", "auto"), sources)
    check_source_builds([source.path for source in sources], recipe.tokenizer.fingerprint)
    labeled_sources = [(source, source.split or "train") for source in sources]
    if against is not None:
        held_out_build = stored_builds.find_build_folder(against)
        held_out = resolve_sources(against) if held_out_build is None else [stored_builds.make_source(held_out_build)]
        labeled_sources += ((_mark_held_out(source), HELD_OUT) for source in held_out)
    RowFilter(where, limit)

    def steps() -> Iterator[SurveyStep]:
        filters = {source.item_index: RowFilter(where, limit) for source in sources}
        pairs = [
            (source, RowFilter() if label == HELD_OUT else filters[source.item_index])
            for source, label in labeled_sources
        ]
        return survey_steps(recipe, pairs)

    return Target(
        [source.path for source in sources],
        recipe,
        [(source.path, label) for source, label in labeled_sources],
        steps,
        {"ftdata": __version__, **recipe.describe(), "where": where, "limit": limit},
        sources,
    )


def make_source_target(folder: Path, tokenizer: Any = None) -> Target:
    """Create a target from the data that a build was made from, with the recipe of the build.

    The data is read again. After the last row, the steps check that every example of the build was among the examples.

    Args:
        folder: The folder of the build.
        tokenizer: The current location of the tokenizer, if it was moved.

    Raises:
        UsageError: `data_not_recorded`, if the build was made from objects in memory; as in `load_build_recipe`.
        InputRefused: A source cannot be read; `data_changed` (by the steps), if an example of the build is not among
            those of the data.
    """
    recipe, options = stored_builds.load_build_recipe(folder, tokenizer), stored_builds.read_report(folder).options
    hint = "audit the data of the build: ftdata audit DATA"
    try:
        sources = resolve_sources(options.get("data"))
    except FtdataError as error:
        problem = f"the data of {folder} cannot be read again: {error.message}"
        raise UsageError("data_not_recorded", problem, hint=hint) from None

    def steps() -> Iterator[SurveyStep]:
        documents = stored_builds.read_build_documents(folder, stored_builds.split_names(folder))
        missing = {_hash_tokens(document.ids, document.labels != IGNORE_INDEX) for document in documents}
        filters = [(source, RowFilter(options.get("where"), options.get("limit"))) for source in sources]
        for step in survey_steps(recipe, filters):
            rows = (row for row in step.batch if isinstance(row, BuiltRow))
            missing -= {_hash_tokens(example.input_ids, example.trained) for row in rows for example in row.examples}
            yield step
        if missing:
            problem = f"{len(missing):,} examples of {folder} are not in its data, which has changed since the build"
            raise InputRefused("data_changed", problem, hint="build the data again")

    paths = [source.path for source in sources]
    names = [(source.path, source.split or "train") for source in sources]
    return Target(paths, recipe, names, steps, options, sources)


def _hash_tokens(ids: NDArray[np.int32], trained: NDArray[np.bool_]) -> bytes:
    return hashlib.sha256(ids.tobytes() + trained.tobytes()).digest()


def _mark_held_out(source: FileSource | MemorySource) -> FileSource | MemorySource:
    """Give held-out data in memory a different path, because all data in memory has the same path by default."""
    return replace(source, path=f"<against {source.path.strip('<>')}>") if source.path.startswith("<") else source


def _make_build_target(folder: Path, tokenizer: Any) -> Target:
    manifest = read_manifest(folder)
    recipe, splits = stored_builds.load_build_recipe(folder, tokenizer), stored_builds.split_names(folder)
    names = stored_builds.build_sources(folder, splits)
    numbers = {name: number for number, name in enumerate(names)}
    total = sum(split["examples"] for split in stored_builds.read_report(folder).splits.values())

    def steps() -> Iterator[SurveyStep]:
        check_intact(folder)
        done = 0
        for batch in stored_builds.batch_documents(recipe, stored_builds.read_build_documents(folder, splits)):
            done += len(batch.conversations)
            sources = [numbers[row.source.path, row.schema] for row in batch.conversations]
            yield SurveyStep(sources, batch, done / max(total, 1))

    return Target(
        [str(folder)],
        recipe,
        names,
        steps,
        {"ftdata": manifest["ftdata"], **manifest["options"]},
        folder=folder,
    )
