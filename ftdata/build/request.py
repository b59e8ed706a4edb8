"""The inputs and options of a build, and their comparison with an existing build."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftdata.build import cache, store
from ftdata.build.ledger import Report
from ftdata.build.reject_limit import RejectLimit
from ftdata.build.run_tasks import TaskRunner, is_rereadable
from ftdata.build.shards import Task, shard_key
from ftdata.build.splits import Layout
from ftdata.errors import InputRefused, UsageError
from ftdata.options import option_names
from ftdata.pipeline.recipe import Recipe
from ftdata.readers import FileSource, MemorySource, reread_rows
from ftdata.readers.row_filter import RowFilter, find_missing_column
from ftdata.redaction import redact_for_storage


@dataclass(frozen=True)
class BuildRequest:
    """The inputs and options of a build, which determine its contents. `data` is the argument that the user passed."""

    recipe: Recipe
    layout: Layout
    row_filter: RowFilter
    reject_limit: RejectLimit
    data: list[Any] | None
    sources: Sequence[FileSource | MemorySource]
    overwrite: bool = False

    def make_tasks(self, home: Path) -> list[Task]:
        """Return one task for each source or part of a source. The tasks write shards to folders inside `home`."""
        uses_minhashes = self.layout.near_duplicate_threshold is not None
        selection = (self.row_filter.where, self.row_filter.limit)
        return [Task(source, home, number, *selection, uses_minhashes) for number, source in enumerate(self.sources)]

    def describe_missing_column(self) -> str:
        """Describe a column that the filter expression uses, but that no row has. Return `""` if there is none."""
        return find_missing_column(self.row_filter.where, reread_rows(self.sources))

    @property
    def options(self) -> dict[str, Any]:
        """The options that the manifest records, except the list of sources."""
        selection = {"where": self.row_filter.where, "limit": self.row_filter.limit}
        return {**self.recipe.describe(), **asdict(self.layout), **selection}

    @property
    def reported_options(self) -> dict[str, Any]:
        """The options and the data that the report contains, without secrets."""
        values: dict[str, Any] = redact_for_storage({**self.options, **asdict(self.reject_limit), "data": self.data})
        return values

    def hash_request(self, keys: Sequence[str | None]) -> str | None:
        """Return a hash of all inputs and options, or `None` if a row limit is set or a shard has no cache key."""
        if not all(keys) or self.row_filter.limit:
            return None
        shares = [(source.split, source.share, source.item_index) for source in self.sources]
        return cache.hash_key([self.options, shares, asdict(self.reject_limit), self.data, cache.package_hash(), keys])

    def matches(self, manifest: Mapping[str, Any], runner: TaskRunner) -> bool:
        """Return whether `manifest` describes a build with the requested inputs and options."""
        options = {name: value for name, value in manifest["options"].items() if name != "sources"}
        tasks = self.make_tasks(Path())
        # Hashing all the data takes long, so it is the last check.
        if (
            manifest["request"] is None
            or options != json.loads(json.dumps(self.options))
            or not all(map(is_rereadable, tasks))
        ):
            return False
        local = runner.engine == "local"
        keys = [shard_key(self.recipe, task) for task in tasks] if local else runner.run(shard_key, self.recipe, tasks)
        return bool(self.hash_request(keys) == manifest["request"])


def read_current_report(request: BuildRequest, target: Path, runner: TaskRunner) -> Report | None:
    """Return the report of the existing build in `target` if a new build would be identical, otherwise `None`."""
    try:
        manifest = store.read_manifest(target)
    except InputRefused:
        return None
    # A downloaded folder may contain a build with a matching manifest but other tokens, so only recorded builds count.
    if not store.is_recorded(manifest) or not request.matches(manifest, runner) or store.verify_files(target):
        return None
    return Report.from_dict(json.loads((target / "report.json").read_bytes()))


def check_same_options(request: BuildRequest, target: Path) -> None:
    """Check that an existing build in `target` was made from the same sources with the same options.

    Raises:
        UsageError: `build_exists`: the build has other options, which the message lists.
    """
    try:
        store.read_manifest(target)
        stored = json.loads((target / "report.json").read_bytes())["options"]
    except (InputRefused, OSError, ValueError, LookupError, TypeError):
        return
    if not isinstance(stored, dict):
        # The build is damaged, or another program wrote it.
        return
    requested = json.loads(json.dumps(request.reported_options, default=str))
    for name in option_names("rejects"):
        # These options determine whether a build succeeds, but not its contents.
        del requested[name]
    names = [name for name, value in requested.items() if _identify(name, stored.get(name)) != _identify(name, value)]
    if names:
        values = [_compare_values(name, stored.get(name), requested[name]) for name in names]
        problem = f"{target} contains a build with different options: {', '.join(values)}"
        raise UsageError("build_exists", problem, hint="set overwrite=True to replace it, or choose another folder")


def _compare_values(name: str, stored: Any, requested: Any) -> str:
    """Return the name of an option, and both values if they are short."""
    templates = [value for value in (stored, requested) if name == "template" and isinstance(value, dict)]
    if len(templates) == 2 and templates[0].get("source") == templates[1].get("source"):
        return _compare_values("template_kwargs", *(template.get("kwargs") for template in templates))
    texts = [json.dumps(value) for value in (stored, requested)]
    return f"{name} (build: {texts[0]}, requested: {texts[1]})" if max(map(len, texts)) <= 40 else name


def _identify(name: str, value: Any) -> Any:
    """Return the parts of an option that identify it: not the location of a tokenizer, and not the current date."""
    if name == "tokenizer" and isinstance(value, dict):
        return value.get("fingerprint"), value.get("image_processor")
    if name == "template" and isinstance(value, dict):
        return value.get("source"), value.get("kwargs")
    return value


def describe_data(data: Any) -> list[Any] | None:
    """Return `data` in the form used in configuration files. Return `None` if part of the data is in memory."""
    items = data if isinstance(data, list | tuple) else [data]
    described = [
        {name: str(value) if name == "path" else value for name, value in item.items()}
        if isinstance(item, Mapping)
        else str(item)
        for item in items
        if isinstance(item, str | Path) or (isinstance(item, Mapping) and isinstance(item.get("path"), str | Path))
    ]
    return described if len(described) == len(items) else None


def check_source_builds(paths: Iterable[str], fingerprint: str) -> None:
    """Check that builds that are read as data contain the ids of the same tokenizer.

    Args:
        paths: the paths of the sources; other paths than files of builds are ignored.
        fingerprint: the fingerprint of the tokenizer.

    Raises:
        UsageError: `tokenizer_differs`.
    """
    for folder in {Path(path).parent.parent for path in paths if path.endswith(".arrow")}:
        if not (folder / "manifest.json").is_file():
            continue
        tokenizer = store.read_manifest(folder)["options"]["tokenizer"]
        if tokenizer["fingerprint"] != fingerprint:
            problem = f"{folder} was built with another tokenizer ({tokenizer['name']}), so its token ids do not fit"
            hint = "build all data with the same tokenizer, or pass the tokenizer of the build: --tokenizer"
            raise UsageError("tokenizer_differs", problem, hint=hint)
