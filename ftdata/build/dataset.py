"""Build: read everything, keep the ledger, split, pack, write.

Each source, or each part of a long one, is a shard task of its own: it writes its examples beside the target and
reports its ledger. The pack plan is made from the lengths of all of them; tokens are gathered when the packs are
written, each file of them a task again.
"""

from __future__ import annotations

import datetime
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ftdata._version import __version__
from ftdata.build import cache, near_duplicates, remote, store
from ftdata.build.dataset_card import render_dataset_card
from ftdata.build.executors import check_engine
from ftdata.build.ledger import Report, report_notes
from ftdata.build.merge_shards import MergedShards
from ftdata.build.pack import plan_packs, plan_unpacked
from ftdata.build.reject_limit import RejectLimit
from ftdata.build.run_tasks import TaskRunner, check_all_rereadable, is_rereadable
from ftdata.build.shard_files import read_minhashes
from ftdata.build.shards import Progress, Task, shard_key
from ftdata.build.splits import ExampleFacts, Layout, SplitPlan, assign_splits
from ftdata.errors import InputRefused, UsageError
from ftdata.pipeline.mask import Policy
from ftdata.pipeline.recipe import Recipe, make_recipe
from ftdata.readers import FileSource, MemorySource, resolve_sources
from ftdata.readers.file_names import split_from_name
from ftdata.readers.file_parts import split_into_parts
from ftdata.readers.row_filter import RowFilter
from ftdata.readers.streams import is_url
from ftdata.redaction import redact, redact_for_storage, redact_text
from ftdata.storage import atomic, disk
from ftdata.tokenizing.encoders import EncodersDiffer

if TYPE_CHECKING:
    import datasets


def build_sft_dataset(
    data: Any,
    tokenizer: Any,
    template: str | Path | None = None,
    schema: str = "auto",
    columns: Mapping[str, str] | None = None,
    train_on: str | Policy = "assistant",
    train_parts: Sequence[str] | None = None,
    turns: str = "auto",
    control_tokens: str = "escape",
    on_dropped_message: str = "reject",
    on_missing_stop: str = "flag",
    reject_flags: Sequence[str] = (),
    max_length: int | None = None,
    overlong: str = "reject",
    packing: str | None = None,
    where: str | None = None,
    limit: int | None = None,
    dedup: bool = False,
    near_duplicate_threshold: float | None = None,
    sample: float | None = None,
    shuffle: bool = False,
    test_size: float | None = None,
    seed: int = 0,
    on_bad_rows: str = "error",
    max_rejects: float | str | None = None,
    output_dir: str | Path | None = None,
    workers: int | None = None,
    engine: str = "local",
    date: str | datetime.date | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> datasets.DatasetDict:
    """Turn data of any known shape into the tokens and labels to train on.

    Args:
        data: a path, a glob, a list of these, a `DataFrame`, a `datasets.Dataset`, or an iterable of rows.
        tokenizer: a folder, a hub id, or a `transformers` or `tokenizers` object.
        template: `None` for the tokenizer's chat template, a built-in name, a `.jinja` file, or a Jinja string.
        schema: `"auto"` (found per row) or the name of one.
        columns: canonical column -> the name in the data, e.g. `{"instruction": "q", "output": "a"}`.
        train_on: `"assistant"`, `"last_assistant"`, `"completion"`, `"all"`, or a callable
            `(rendered, conversation) -> [bool per span]`.
        train_parts: of what `train_on` chooses, these parts only: `"reasoning"`, `"answer"`, `"tool_call"`.
        turns: `"joint"` or `"split"`: one example per conversation, or per group of assistant turns that answer one
            user message; `"auto"` splits where the template does not show earlier turns as the model wrote them.
        control_tokens: `"escape"`, `"refuse"` or `"allow"` control-token text inside the data.
        on_dropped_message: `"reject"` or `"flag"` rows of which the template leaves out a message that is not the assistant's.
        on_missing_stop: `"flag"` a last turn that the template leaves without a stop, or `"append_eos"` and train it.
        reject_flags: flags of the report, such as `"no_trained_stop"`, that make a row a bad one; see
            `ftdata.pipeline.recipe.FLAGS`.
        max_length: tokens that an example, and a pack, may have.
        overlong: `"reject"`, `"drop_turns"` or `"truncate"`.
        packing: `None` or `"bfd"` (best-fit decreasing, whole examples only; needs `max_length`), as Ding et al. 2024
            (arXiv:2404.10830) pack, but nothing is cut.
        where: a Jinja expression over the columns of a row, such as `lang == "en" and messages | length > 2`: the other
            rows are passed over, and counted.
        limit: rows to read of each thing that `data` names, and of each split of it.
        dedup: leave out rows whose tokens and labels are those of an earlier one.
        near_duplicate_threshold: how similar rows must be, such as 0.8, to count as equal for `dedup` and `test_size` (Jaccard similarity
            of words, five at a time, estimated; needs `ftdata[dedup]`).
        sample: share (below 1) or number of rows to take, by chance.
        shuffle: put the rows of the train split into another order.
        test_size: share (below 1) or number of rows for a `"test"` split; equal rows go together.
        seed: decides all that is left to chance, the same way on every machine: the rows with the smallest
            `ftdata.build.splits.seeded_hash(number, seed)` are taken.
        on_bad_rows: `"error"` (all bad rows are collected, then one error) or `"quarantine"` (go on without them).
        max_rejects: with `"quarantine"`: how many rows (or `"1%"`) may be rejected.
        output_dir: where to write the build, a folder or the URL of one in an object store (`s3://bucket/name`), where
            no other build is replaced; `None` keeps it in memory.
        workers: processes at most (`None`: this one); the result does not depend on it. There is no more than one for
            each 32 MB of data. As with every process pool, a script that asks for more than one needs
            `if __name__ == "__main__":`.
        engine: `"local"`; or `"ray"` (the cluster of `RAY_ADDRESS`, else one on this machine) or `"ray:ADDRESS"`, whose
            nodes must see the same files; `workers` are then tasks at once (`None`: as many as there is room for).
        date: what templates that print a date are shown.
        template_kwargs: further variables for the template.
        progress: called with the rows and tokens done so far, and which share of the data that is (0 to 1, `None`
            where nobody knows).

    Returns:
        A `datasets.DatasetDict` with `"train"` (and `"test"`), columns `input_ids`, `labels` and `seq_lengths`
        (int32 lists; one row per pack, or per example), and the `Report` as `.report`. `labels` has the id of the very
        token (models shift them), or -100; `seq_lengths` adds up to the length of the row.

    Raises:
        UsageError: an option is invalid, or a source is not there.
        BadRows: rows are refused (`on_bad_rows="error"`); all of them are counted, the first 20 named.
        TooManyRejects: more than `max_rejects`.
        InputRefused: a source cannot be read, or nothing was left to build.
        TemplateRefused: the template, or the tokenizer, cannot be used for any row.
        MissingDependency: `near_duplicate_threshold`, `engine="ray"`, Excel or an object store need an extra that is not installed.
        StorageError: the disk refuses, or is full; what was done stays for the next try.
        HubError: the hub, or another place on the network, fails again and again.

    >>> from ftdata.testing import byte_tokenizer
    >>> rows = [{"question": "2+2?", "answer": "4"}, {"question": "3+3?", "answer": "6"}]
    >>> ds = build_sft_dataset(rows, byte_tokenizer(), "chatml", max_length=128, packing="bfd")
    >>> print(ds.report)
    rows     2 read = 2 built + 0 rejected
    tokens   52 in = 52 kept + 0 cut + 0 in rejected rows
    train    2 examples, 1 packs, 40.6% full, 52 tokens, 7.7% trained
    >>> pack = ds["train"][0]
    >>> pack["seq_lengths"], [label for label in pack["labels"] if label != -100]
    ([26, 26], [52, 257, 54, 257])
    """
    options = {name: value for name, value in locals().items() if name not in ("data", "tokenizer", "output_dir")}
    if output_dir is not None and redact_for_storage(str(output_dir)) != redact(str(output_dir)):
        found = f"output_dir is {str(output_dir)!r}, whose name is not UTF-8: datasets cannot load from it"
        raise UsageError("output_name", found, hint="choose another folder; `ftdata build` can write to this one")
    with tempfile.TemporaryDirectory() as scratch:
        target = output_dir if output_dir is not None else Path(scratch) / "build"
        report = write_build(data, tokenizer, target, **options)
        return load_build(remote.local_build(target).resolve(), report, in_memory=output_dir is None)


def write_build(
    data: Any,
    tokenizer: Any,
    output_dir: str | Path,
    *,
    packing: str | None = None,
    where: str | None = None,
    limit: int | None = None,
    dedup: bool = False,
    near_duplicate_threshold: float | None = None,
    sample: float | None = None,
    shuffle: bool = False,
    test_size: float | None = None,
    seed: int = 0,
    on_bad_rows: str = "error",
    max_rejects: float | str | None = None,
    workers: int | None = None,
    engine: str = "local",
    progress: Progress | None = None,
    **recipe: Any,
) -> Report:
    """Build as `build_sft_dataset` does, without loading the result (or `datasets`); return the report.

    Args:
        data: as there, and so all others.
        tokenizer: as there.
        output_dir: where to write the build.
        recipe: options of `make_recipe`: what decides what a row becomes.

    Raises:
        FtdataError: as `build_sft_dataset`.
    """
    made = make_recipe(tokenizer, **recipe)
    layout = Layout(packing, made.max_length, test_size, seed, dedup, near_duplicate_threshold, sample, shuffle)
    if near_duplicate_threshold is not None:
        near_duplicates.require_rensa()
    selection = RowFilter(where, limit)
    tolerance = RejectLimit(on_bad_rows, max_rejects)
    if workers is not None and workers < 1:
        raise UsageError("workers", f"workers is {workers}, expected at least 1")
    check_engine(engine)
    if (
        callable(made.train_on)
        and workers not in (None, 1)
        and "<lambda>" in getattr(made.train_on, "__qualname__", "")
    ):
        raise UsageError("train_on", "a lambda cannot go to other processes", hint="use a named function, or workers=1")
    found = resolve_sources(data)
    _check_splits(found)
    _check_output(output_dir, found)
    wanted = _Wanted(made, layout, selection, tolerance, _named(data), found if limit else split_into_parts(found))
    runner = TaskRunner(workers, engine)
    if isinstance(output_dir, str) and is_url(output_dir):
        return _build_elsewhere(wanted, remote.check_output_url(output_dir), runner, progress)
    with atomic.open_workspace(Path(output_dir).resolve(), store.check_target) as place:
        return _built_at(wanted, place, runner, progress)


def _built_at(wanted: _Wanted, place: atomic.Workspace, runner: TaskRunner, progress: Progress | None) -> Report:
    report = _built_before(wanted, place.target, runner)
    if report is None:
        report = _build(wanted, place, runner, progress)
        store.record_build(store.read_manifest(place.new))
        place.publish()
    return report


def _build_elsewhere(wanted: _Wanted, url: str, runner: TaskRunner, progress: Progress | None) -> Report:
    """Make a build here and send it to a URL, if it is not there already."""
    with atomic.open_workspace(remote.staging_folder(url), store.check_target) as place:
        there = None
        with suppress(InputRefused):
            there = remote.read_remote_manifest(url)
        same = bool(there) and wanted.made(there or {}, runner) and not remote.verify(url)
        if there and same and store.is_recorded(there):
            disk.remove(place.target)
            return Report.of(json.loads(remote.read_remote_file(url, "report.json")))
        if not same:
            remote.check_free(url)
        report = _built_at(wanted, place, runner, progress)
        if same and there == store.read_manifest(place.target):
            # Somebody else made it; what comes out here is the same to the last bit.
            disk.remove(place.target)
            return report
        try:
            remote.upload_build(place.target, url)
        except UsageError:
            disk.remove(place.target)
            raise
        disk.remove(place.target)
    return report


def _check_output(output_dir: str | Path, found: Sequence[FileSource | MemorySource]) -> None:
    """Refuse an output folder without a name, or one that holds a source: the build would replace its own data."""
    if not str(output_dir).strip():
        raise UsageError("output_name", "output_dir is empty, expected a folder", hint="is a variable not set?")
    if isinstance(output_dir, str) and is_url(output_dir):
        return
    folder = Path(output_dir).resolve()
    inside = next(
        (one.path for one in found if isinstance(one, FileSource) and folder in Path(one.path).resolve().parents), None
    )
    if inside is not None:
        raise UsageError(
            "output_in_data",
            f"the source {inside} lies in the output folder {output_dir}",
            hint="choose an output folder outside the data",
        )


def _check_splits(found: Sequence[FileSource | MemorySource]) -> None:
    """Refuse names of splits that are no names of folders: those of cards and of data sets are of strangers."""
    for one in found:
        if one.split is not None and not re.fullmatch(r"\w[\w.-]{0,99}", one.split):
            told = f"is of the split {one.split[:60]!r}, which is no name for a folder"
            hint = "letters, digits, _, - and . make a name; data_files or split says another"
            raise InputRefused("split_name", told, where=one.path, hint=hint)


def load_build(folder: Path, report: Report | None = None, *, in_memory: bool = False) -> datasets.DatasetDict:
    """Load a finished build as a `datasets.DatasetDict`, with its report where there is one."""
    import datasets

    loaded = datasets.load_from_disk(str(folder), keep_in_memory=in_memory)
    loaded.report = report
    return loaded


@dataclass(frozen=True)
class _Wanted:
    """A build that is asked for: all that decides what it becomes. `named` is the data as a configuration names it."""

    recipe: Recipe
    layout: Layout
    selection: RowFilter
    tolerance: RejectLimit
    named: list[Any] | None
    sources: Sequence[FileSource | MemorySource]

    def tasks(self, home: Path) -> list[Task]:
        """Return the tasks by which the data is read, with their folders in `home`."""
        chosen, near = (self.selection.where, self.selection.limit), self.layout.near_duplicate_threshold is not None
        return [Task(source, home, number, *chosen, near) for number, source in enumerate(self.sources)]

    @property
    def options(self) -> dict[str, Any]:
        """What the manifest says of it, but for the sources."""
        chosen = {"where": self.selection.where, "limit": self.selection.limit}
        return {**self.recipe.describe(), **asdict(self.layout), **chosen}

    def request(self, keys: Sequence[str | None]) -> str | None:
        """Return the hash of all that decides every byte of it, where the keys of its shards do."""
        if not all(keys) or self.selection.limit:
            return None
        shares = [(one.split, one.share, one.place) for one in self.sources]
        return cache.hash_key([self.options, shares, asdict(self.tolerance), self.named, cache.package_hash(), keys])

    def made(self, manifest: Mapping[str, Any], runner: TaskRunner) -> bool:
        """Whether a build with this manifest is this one."""
        options = {name: value for name, value in manifest["options"].items() if name != "sources"}
        tasks = self.tasks(Path())
        # To look at all the data takes its time: only where nothing else says that something has changed.
        if (
            manifest["request"] is None
            or options != json.loads(json.dumps(self.options))
            or not all(map(is_rereadable, tasks))
        ):
            return False
        local = runner.engine == "local"
        keys = [shard_key(self.recipe, task) for task in tasks] if local else runner.do(shard_key, self.recipe, tasks)
        return bool(self.request(keys) == manifest["request"])


def _built_before(wanted: _Wanted, target: Path, runner: TaskRunner) -> Report | None:
    """Return the report of the build that is there already, if it is this one, to the last bit."""
    try:
        manifest = store.read_manifest(target)
    except InputRefused:
        return None
    # A folder that came from elsewhere may hold a build that looks like this one, with other tokens.
    if not store.is_recorded(manifest) or not wanted.made(manifest, runner) or store.verify_files(target):
        return None
    return Report.of(json.loads((target / "report.json").read_bytes()))


def _build(wanted: _Wanted, place: atomic.Workspace, runner: TaskRunner, progress: Progress | None) -> Report:
    began, folder = time.monotonic(), place.new
    recipe, layout = wanted.recipe, wanted.layout
    tasks = wanted.tasks(place.shards)
    try:
        results = runner.build(recipe, tasks, progress)
    except EncodersDiffer as differs:
        # What one text shows may be so for others: all is done again.
        check_all_rereadable(tasks, str(differs))
        cache.clear_cache()
        results = runner.build(recipe, [replace(task, trusted=False) for task in tasks], progress)
    joined = MergedShards(results)
    wanted.tolerance.judge(joined.ledgers, joined.rejects)
    laid = assign_splits(_facts(joined, layout), layout)
    if not len(laid.splits["train"]):
        why = ", ".join(_left_out(laid, layout)) or "the sources have none, or none that their shares have room for"
        raise InputRefused("no_rows_built", f"no row was left to train on: {why}")
    disk.mkdir(folder)
    written, splits = list[store.WrittenFile](), dict[str, dict[str, Any]]()
    for name, members in laid.splits.items():
        splits[name], files = _write_split(folder, name, joined, members, layout, runner)
        written += files
    options = {**wanted.options, "sources": [{"split": one.split, **one.share._asdict()} for one in joined.sources]}
    fingerprint = _fingerprint(options, joined)
    report = Report(
        joined.ledgers,
        splits,
        (*report_notes(joined.ledgers, recipe), *_left_out(laid, layout), *_named_otherwise(joined.sources)),
        tuple(redact_for_storage(redact_text(str(one))) for one in islice(joined.rejects(), 20)),
        fingerprint,
        redact_for_storage({**options, **asdict(wanted.tolerance), "data": wanted.named}),
        round(time.monotonic() - began, 3),
        ", ".join(dict.fromkeys(result.encoder for result in results)),
    )
    store.write_rejects(folder / "rejects.jsonl", joined.rejects())
    disk.write_json(folder / "dataset_dict.json", {"splits": list(splits)})
    # How long it took, and who did it, is no part of what was built: equal builds are equal files.
    disk.write_json(folder / "report.json", {**report.as_dict(), "seconds": None, "encoder": None})
    names = {name: [f"{name}/{one.path.name}" for one in written if one.path.parent.name == name] for name in splits}
    disk.write(folder / "README.md", render_dataset_card(report, recipe, names).encode("utf-8", "backslashreplace"))
    about = {"ftdata": __version__, "fingerprint": fingerprint, "options": options}
    store.write_manifest(folder, {**about, "request": wanted.request([one.key for one in results])}, written)
    cache.evict_entries()
    return report


def _named(data: Any) -> list[Any] | None:
    """Return the places that the user named, as a configuration would; `None` where there is one in memory."""
    places = data if isinstance(data, list | tuple) else [data]
    named = [
        {name: str(value) if name == "path" else value for name, value in one.items()}
        if isinstance(one, Mapping)
        else str(one)
        for one in places
        if isinstance(one, str | Path) or (isinstance(one, Mapping) and isinstance(one.get("path"), str | Path))
    ]
    return named if len(named) == len(places) else None


def _facts(joined: MergedShards, layout: Layout) -> ExampleFacts:
    near, examples = layout.near_duplicate_threshold, joined.examples
    tasks = [result.task for result in joined.results]
    splits = [task.source.split for task in tasks]
    content: NDArray[np.generic] = np.broadcast_to(np.int8(0), len(examples.lengths))
    asked = content
    # Of millions of rows, hashes that nobody compares take room.
    if layout.dedup or layout.test_size is not None or len(set(splits)) > 1:
        content = contents = examples.contents
        asked = np.ascontiguousarray(contents.view("S8").reshape(-1, 3)[:, :2]).view("S16").ravel()
    if near is not None:
        said = np.concatenate([read_minhashes(folder, near_duplicates.SIZE) for folder in examples.folders])
        content = near_duplicates.merge_labels(near_duplicates.first_similar(said, near), contents)
        asked = near_duplicates.merge_labels(near_duplicates.similarity_groups(said, near), asked)
    return ExampleFacts(
        source=examples.shard,
        row=examples.column("row"),
        content=content,
        asked=asked,
        tokens=examples.lengths,
        splits=splits,
        shares=[task.source.share for task in tasks],
        places=[task.source.place for task in tasks],
    )


def _write_split(
    folder: Path, name: str, joined: MergedShards, members: NDArray[np.int64], layout: Layout, runner: TaskRunner
) -> tuple[dict[str, Any], list[store.WrittenFile]]:
    examples = joined.examples
    lengths = examples.lengths[members]
    if layout.packing and layout.max_length:
        plan = plan_packs(lengths, layout.max_length)
        fill = float(lengths.sum() / (len(plan) * layout.max_length)) if len(plan) else 0.0
    else:
        plan, fill = plan_unpacked(len(members)), None
    disk.mkdir(folder / name)
    written = runner.do(store.write_packs, None, list(store.plan_pack_files(folder, name, examples, members, plan)))
    store.write_split(folder, name, examples, members, plan, [one.path for one in written])
    trained = examples.column("trained")[members]
    source = np.asarray(joined.of)[examples.shard[members]]
    each, count = {"examples": None, "tokens": lengths, "trained": trained}, len(joined.sources)
    of_source = {name: np.bincount(source, counts, count).astype(int).tolist() for name, counts in each.items()}
    about = {
        "examples": len(members),
        "rows": len(plan),
        "tokens": int(lengths.sum()),
        "trained": int(trained.sum()),
        "fill": fill,
        "sources": [
            {"source": redact_for_storage(one.path), **dict(zip(each, counts, strict=True))}
            for one, *counts in zip(joined.sources, *of_source.values(), strict=True)
            if counts[0] or (one.split or "train") == name
        ],
    }
    return about, written


def _left_out(laid: SplitPlan, layout: Layout) -> Iterator[str]:
    for reason, count in laid.left_out.items():
        if count:
            yield f"{count:,} rows are left out: {reason}"
    for name, count in laid.shared.items():
        yield f"{count:,} rows of {name} are in train, too"
    if layout.test_size and layout.test_size >= 1 and len(laid.splits["test"]) < layout.test_size:
        yield f"test holds fewer rows than {layout.test_size}: equal ones stay together"


def _named_otherwise(found: Sequence[FileSource | MemorySource]) -> Iterator[str]:
    plain = [redact_for_storage(one.path) for one in found if isinstance(one, FileSource) and one.split is None]
    if others := [path for path in plain if split_from_name(Path(path).name) not in (None, "train")]:
        yield f"trained on, though named as of another split: {', '.join(others[:5])}"


def _fingerprint(options: Mapping[str, Any], joined: MergedShards) -> str:
    # Names of files and folders decide nothing.
    nameless = {
        **options,
        "tokenizer": options["tokenizer"]["fingerprint"],
        "template": {**options["template"], "name": None},
    }
    content = [joined.examples.content, [ledger.examples for ledger in joined.ledgers]]
    parts = {"ftdata": __version__, "options": nameless, "content": content}
    return disk.hash_bytes(json.dumps(parts, sort_keys=True).encode())
