"""Build a data set: read all sources, count rows and tokens, assign splits, pack the examples, and write the files.

Each source, or each part of a large source, is a shard task: it writes its examples to a folder beside the output, and
returns its ledger. The packs are planned from the lengths of all examples. The tokens are gathered when the packs are
written; each pack file is also a task.
"""

from __future__ import annotations

import datetime
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ftdata._version import __version__
from ftdata.build import cache, image_files, near_duplicates, pack_files, remote, store
from ftdata.build.dataset_card import render_dataset_card
from ftdata.build.executors import check_engine
from ftdata.build.ledger import Report, report_notes
from ftdata.build.merge_shards import MergedShards
from ftdata.build.pack import plan_packs, plan_pairs, plan_unpacked
from ftdata.build.reject_limit import RejectLimit
from ftdata.build.request import (
    BuildRequest,
    check_same_options,
    check_source_builds,
    describe_data,
    read_current_report,
)
from ftdata.build.run_tasks import TaskRunner, check_all_rereadable, log_reuse
from ftdata.build.shard_files import read_minhashes
from ftdata.build.splits import ExampleFacts, Layout, SplitPlan, assign_splits
from ftdata.errors import InputRefused, UsageError, check_choice, count_noun
from ftdata.options import OPTIONS, select_options
from ftdata.pipeline.mask import Policy
from ftdata.pipeline.recipe import make_recipe, resolve_task
from ftdata.progress import Progress, ProgressUpdate
from ftdata.readers import FileSource, MemorySource, resolve_sources
from ftdata.readers.file_names import split_from_name
from ftdata.readers.file_parts import split_into_parts
from ftdata.readers.row_filter import RowFilter
from ftdata.readers.streams import is_url
from ftdata.redaction import redact, redact_for_storage, redact_text
from ftdata.storage import atomic, disk
from ftdata.tokenizing.encoders import EncodersDiffer
from ftdata.types import SIDES

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
    image_folder: str | None = None,
    download_images: bool = False,
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
    overwrite: bool = False,
    workers: int | None = None,
    engine: str = "local",
    date: str | datetime.date | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> datasets.DatasetDict:
    """Build a data set of tokens and labels from data in any known schema.

    Args:
        data: a path, a glob, a list of paths, a `DataFrame`, a `datasets.Dataset`, or an iterable of rows.
        tokenizer: a folder, a Hub ID, or a `transformers` or `tokenizers` object.
        template: `None` for the tokenizer's chat template, a built-in name, a `.jinja` file, or a Jinja string.
        schema: the name of a schema, or `"auto"` to detect the schema of each row.
        columns: map of canonical columns to columns of the data, e.g. `{"instruction": "q", "output": "a"}`.
        train_on: `"assistant"`, `"last_assistant"`, `"completion"`, `"all"`, or a callable
            `(rendered, conversation) -> [bool per span]`.
        train_parts: the parts to train: `"reasoning"`, `"answer"`, `"tool_call"`; `None` for all parts.
        turns: `"joint"` for one example per conversation, `"split"` for one example per turn, or `"auto"` to split
            only if the template renders earlier turns differently than the model wrote them.
        control_tokens: `"escape"`, `"refuse"` or `"allow"` control-token text inside the data.
        on_dropped_message: `"reject"` or `"flag"` a row if the template omits a system, user or tool message.
        on_missing_stop: `"flag"` a last turn for which the template prints no stop token, or `"append_eos"` to it.
        reject_flags: flags, such as `"no_trained_stop"`, that reject a row; docs/reference/flags.md lists them.
        image_folder: the folder that relative paths of images are resolved against; `None`: that of the data file.
        download_images: whether to download images at URLs, and store them in the build. Otherwise, they are rejected.
        max_length: the maximum number of tokens of an example and of a pack.
        overlong: `"reject"`, `"drop_turns"` or `"truncate"`.
        packing: `None` or `"bfd"`: best-fit decreasing (Ding et al. 2024, arXiv:2404.10830), but examples are never
            cut; needs `max_length`.
        where: a Jinja expression over the columns of a row, e.g. `lang == "en" and messages | length > 2`. Rows that
            do not match are filtered out and counted.
        limit: the maximum number of rows to read from each item of `data`, per split.
        dedup: whether to remove rows with the same tokens and labels as an earlier row.
        near_duplicate_threshold: the similarity, such as 0.8, from which rows count as identical for `dedup` and
            `test_size`: the estimated Jaccard similarity of five-word sequences; needs `ftdata[dedup]`.
        sample: the share (below 1) or number of rows to sample at random.
        shuffle: whether to shuffle the train split.
        test_size: the share (below 1) or number of rows of a `"test"` split; identical rows are in the same split.
        seed: the random seed for splitting, sampling, shuffling and mixing. The result is the same on every machine:
            rows are selected in ascending order of `ftdata.build.splits.seeded_hash(number, seed)`.
        on_bad_rows: `"error"` raises one error for all rejected rows; `"quarantine"` leaves them out.
        max_rejects: the maximum number of rejected rows, or a share such as `"1%"`; needs `"quarantine"`.
        output_dir: a folder for the build, or a URL in an object store (`s3://bucket/name`), where builds are never
            replaced; `None` keeps the build in memory.
        overwrite: whether to replace a build in `output_dir` that was made from other sources or with other options.
            Rows in memory are not compared, so a build of such rows replaces a build of other rows.
        workers: the maximum number of worker processes, limited to one per 32 MB of data; does not affect the result.
            `None` for this process only. A script that uses several processes needs `if __name__ == "__main__":`.
        engine: `"local"`, `"ray"` (the cluster at `RAY_ADDRESS`, or a new local cluster) or `"ray:ADDRESS"`. Ray nodes
            must see the same files; `workers` is then the number of parallel tasks (`None`: as many as possible).
        date: the current date for templates that print it.
        template_kwargs: additional template variables.
        progress: a function that is called with a `ftdata.progress.ProgressUpdate`: the phase, the number of processed
            rows and tokens, and the processed share of the data.

    Returns:
        A `datasets.DatasetDict` with `"train"` (and `"test"`), and the `Report` as `.report`. Each pack (or example)
        is a row with the int32 lists `input_ids`, `labels` and `seq_lengths`. A label is the token's own id (models
        shift labels), or -100; `seq_lengths` contains the length of each document in the row.

    Raises:
        UsageError: an option is invalid, or a source does not exist.
        BadRows: rows are rejected (`on_bad_rows="error"`). The error counts all of them and lists the reasons.
        TooManyRejects: more than `max_rejects` rows are rejected.
        InputRefused: a source cannot be read, or no row is left to build.
        TemplateRefused: the template or the tokenizer cannot be used for any row.
        MissingDependency: an optional package is not installed.
        StorageError: writing failed, e.g. because the disk is full; the next build reuses the finished work.
        HubError: the Hub or another server fails repeatedly.

    >>> from ftdata.testing import byte_tokenizer
    >>> rows = [{"question": "2+2?", "answer": "4"}, {"question": "3+3?", "answer": "6"}]
    >>> ds = build_sft_dataset(rows, byte_tokenizer(), "chatml", max_length=128, packing="bfd")
    >>> print(ds.report)
    rows     2 read = 2 built + 0 rejected
    tokens   52 in = 52 kept + 0 cut + 0 in rejected rows
    train    2 examples, 1 pack, 40.6% full, 52 tokens, 7.7% trained
    >>> pack = ds["train"][0]
    >>> pack["seq_lengths"], [label for label in pack["labels"] if label != -100]
    ([26, 26], [52, 257, 54, 257])
    """
    options = {name: value for name, value in locals().items() if name not in ("data", "tokenizer", "output_dir")}
    if output_dir is not None and redact_for_storage(str(output_dir)) != redact(str(output_dir)):
        problem = f"the package datasets cannot load the output_dir {str(output_dir)!r}, because the name is not UTF-8"
        raise UsageError("output_name", problem, hint="use another folder, or run `ftdata build`")
    with tempfile.TemporaryDirectory() as scratch:
        target = output_dir if output_dir is not None else Path(scratch) / "build"
        report = write_build(data, tokenizer, target, task="sft", **options)
        return load_build(remote.local_build(target).resolve(), report, in_memory=output_dir is None)


def write_build(
    data: Any,
    tokenizer: Any,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    engine: str = "local",
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Build a data set in `output_dir` like `build_sft_dataset`. Do not load the result or import `datasets`.

    The parameters are those of `build_sft_dataset`; `options` are those in `ftdata.options`. Returns the report.

    Raises:
        FtdataError: as in `build_sft_dataset`.
    """
    for option in options:
        check_choice("option", option, OPTIONS)
    bound = make_recipe(tokenizer, **select_options(options, "task", "rendering", "rows"))
    sources = resolve_sources(data)
    _check_split_names(sources)
    bound = resolve_task(bound, options.get("task", "auto"), sources)
    if bound.task != "sft" and options.get("packing"):
        raise UsageError("packing", f"data for task={bound.task!r} cannot be packed", hint="remove packing")
    layout = Layout(max_length=bound.max_length, **select_options(options, "layout"))
    if layout.near_duplicate_threshold is not None:
        near_duplicates.require_rensa()
    row_filter = RowFilter(**select_options(options, "selection"))
    reject_limit = RejectLimit(**select_options(options, "rejects"))
    if workers is not None and workers < 1:
        raise UsageError("workers", f"workers is {workers}, expected at least 1")
    check_engine(engine)
    name = getattr(bound.train_on, "__qualname__", "")
    if callable(bound.train_on) and workers not in (None, 1) and "<lambda>" in name:
        problem = "train_on is a lambda, which worker processes cannot import"
        raise UsageError("train_on", problem, hint="use a named function, or workers=1")
    check_source_builds([source.path for source in sources], bound.tokenizer.fingerprint)
    _check_output(output_dir, sources)
    parts = sources if row_filter.limit else split_into_parts(sources)
    request = BuildRequest(bound, layout, row_filter, reject_limit, describe_data(data), parts, overwrite)
    runner = TaskRunner(workers, engine)
    if isinstance(output_dir, str) and is_url(output_dir):
        return _build_at_url(request, remote.check_output_url(output_dir), runner, progress)
    with atomic.open_workspace(Path(output_dir).resolve(), store.check_target) as workspace:
        return _build_unless_current(request, workspace, runner, progress)


def _build_unless_current(
    request: BuildRequest, workspace: atomic.Workspace, runner: TaskRunner, progress: Progress | None
) -> Report:
    if progress:
        progress(ProgressUpdate("plan"))
    cache.check_writable()
    report = read_current_report(request, workspace.target, runner)
    if report is None:
        if not request.overwrite:
            check_same_options(request, workspace.target)
        report = _build(request, workspace, runner, progress)
        store.record_build(store.read_manifest(workspace.new))
        workspace.publish()
    return report


def _build_at_url(request: BuildRequest, url: str, runner: TaskRunner, progress: Progress | None) -> Report:
    """Build a data set on this machine and upload it to a URL, unless the URL already contains the same build."""
    with atomic.open_workspace(remote.staging_folder(url), store.check_target) as workspace:
        manifest = None
        with suppress(InputRefused):
            manifest = remote.read_remote_manifest(url)
        is_current = bool(manifest) and request.matches(manifest or {}, runner) and not remote.verify(url)
        if manifest and is_current and store.is_recorded(manifest):
            disk.remove(workspace.target)
            return Report.from_dict(json.loads(remote.read_remote_file(url, "report.json")))
        if not is_current:
            remote.check_free(url)
        report = _build_unless_current(request, workspace, runner, progress)
        if is_current and manifest == store.read_manifest(workspace.target):
            # Another user made the remote build, and it equals this build byte for byte.
            disk.remove(workspace.target)
            return report
        try:
            remote.upload_build(workspace.target, url)
        except UsageError:
            disk.remove(workspace.target)
            raise
        disk.remove(workspace.target)
    return report


def _check_output(output_dir: str | Path, sources: Sequence[FileSource | MemorySource]) -> None:
    """Check that the output path is not empty, and that the build would not delete a source in the output folder."""
    if not str(output_dir).strip():
        raise UsageError("output_name", "output_dir is empty, expected a folder", hint="check for an unset variable")
    if isinstance(output_dir, str) and is_url(output_dir):
        return
    folder = Path(output_dir).resolve()
    files = (source.path for source in sources if isinstance(source, FileSource))
    inside = next((path for path in files if folder in Path(path).resolve().parents), None)
    if inside is not None:
        problem = f"the source {inside} is inside the output folder {output_dir}"
        raise UsageError("output_in_data", problem, hint="choose an output folder outside the data")


def _check_split_names(sources: Sequence[FileSource | MemorySource]) -> None:
    """Check that split names are safe as folder names, because names from downloaded data sets cannot be trusted."""
    for source in sources:
        if source.split is not None and not re.fullmatch(r"\w[\w.-]{0,99}", source.split):
            problem = f"the split name is {source.split[:60]!r}, expected only letters, digits, '_', '-' and '.'"
            hint = "set another name with data_files or split"
            raise InputRefused("split_name", problem, where=source.path, hint=hint)


def load_build(folder: Path, report: Report | None = None, *, in_memory: bool = False) -> datasets.DatasetDict:
    """Load a finished build as a `datasets.DatasetDict`, and attach `report` to it as an attribute."""
    import datasets

    if in_memory:
        image_files.check_images_in_memory(folder)
    dataset = datasets.load_from_disk(str(folder), keep_in_memory=in_memory)
    dataset.report = report
    return dataset


def _build(request: BuildRequest, workspace: atomic.Workspace, runner: TaskRunner, progress: Progress | None) -> Report:
    start, folder = time.monotonic(), workspace.new
    recipe, layout = request.recipe, request.layout
    tasks = request.make_tasks(workspace.shards)
    if progress:
        # Worker processes take seconds to load the tokenizer.
        progress(ProgressUpdate("start"))
    try:
        results = runner.build(recipe, tasks, progress)
    except EncodersDiffer as difference:
        # If the encoders differ for one text, they may differ for other texts, so all shards are built again.
        check_all_rereadable(tasks, str(difference))
        cache.clear_cache()
        results = runner.build(recipe, [replace(task, trusted=False) for task in tasks], progress)
    log_reuse(results)
    rows, tokens = (sum(getattr(result.ledger, name) for result in results) for name in ("read", "tokens_kept"))
    if progress:
        progress(ProgressUpdate("pack", rows, tokens))
    merged = MergedShards(results)
    request.reject_limit.check(merged.ledgers, merged.rejects, request.describe_missing_column)
    plan = assign_splits(_example_facts(merged, layout, has_pairs=recipe.task == "preference"), layout)
    if not len(plan.splits["train"]):
        reasons = ", ".join(_split_notes(plan, layout)) or "the sources have no rows, or their shares are too small"
        raise InputRefused("no_rows_built", f"no row is left to train on: {reasons}")
    if progress:
        progress(ProgressUpdate("write", rows, tokens))
    disk.mkdir(folder)
    written, splits = list[pack_files.WrittenFile](), dict[str, dict[str, Any]]()
    for name, members in plan.splits.items():
        splits[name], files = _write_split(folder, name, merged, members, layout, runner, recipe.task)
        written += files
    image_files.publish_image_files(folder, merged.examples.folders)
    sources = [{"split": source.split, **source.share._asdict()} for source in merged.sources]
    options = {**request.options, "sources": sources}
    fingerprint = _fingerprint(options, merged)
    report = Report(
        merged.ledgers,
        splits,
        (
            *report_notes(merged.ledgers, recipe),
            *_split_notes(plan, layout),
            *_empty_share_notes(merged.sources, splits),
            *_file_name_notes(merged.sources),
        ),
        tuple(redact_for_storage(redact_text(str(reject))) for reject in islice(merged.rejects(), 20)),
        fingerprint,
        {**request.reported_options, "sources": redact_for_storage(sources)},
        round(time.monotonic() - start, 3),
        ", ".join(dict.fromkeys(result.encoder for result in results)),
    )
    store.write_rejects(folder / "rejects.jsonl", merged.rejects())
    disk.write_json(folder / "dataset_dict.json", {"splits": list(splits)})
    # Time and encoder are not stored, so that equal builds have equal files.
    disk.write_json(folder / "report.json", {**report.as_dict(), "seconds": None, "encoder": None})
    names = {name: [f"{name}/{file.path.name}" for file in written if file.path.parent.name == name] for name in splits}
    disk.write(folder / "README.md", render_dataset_card(report, recipe, names).encode("utf-8", "backslashreplace"))
    about = {"ftdata": __version__, "fingerprint": fingerprint, "options": options}
    request_hash = request.hash_request([result.key for result in results])
    store.write_manifest(folder, {**about, "request": request_hash}, written)
    cache.evict_entries()
    return report


def _example_facts(merged: MergedShards, layout: Layout, *, has_pairs: bool) -> ExampleFacts:
    threshold, examples = layout.near_duplicate_threshold, merged.examples
    tasks = [result.task for result in merged.results]
    splits = [task.source.split for task in tasks]
    content: NDArray[np.generic] = np.broadcast_to(np.int8(0), len(examples.lengths))
    leakage_group = content
    # The hashes of millions of rows take much memory, so they are loaded only if they are compared.
    if layout.dedup or layout.test_size is not None or len(set(splits)) > 1:
        content = hashes = examples.contents
        # Rows with the same tokens, or with an equal example after a split, or with the prompt of another rated answer,
        # must be in the same split.
        row_hashes = np.ascontiguousarray(hashes.view("S8").reshape(-1, 3)[:, :2]).view("S16").ravel()
        row_groups = np.unique(row_hashes, return_index=True, return_inverse=True)
        leakage_group = near_duplicates.merge_labels(row_groups[1][row_groups[2]], examples.group_hashes)
    if threshold is not None:
        minhashes = np.concatenate([read_minhashes(folder, near_duplicates.SIZE) for folder in examples.folders])
        content = near_duplicates.merge_labels(near_duplicates.first_similar(minhashes, threshold), hashes)
        similar = near_duplicates.similarity_groups(minhashes, threshold)
        leakage_group = near_duplicates.merge_labels(similar, leakage_group)
    return ExampleFacts(
        source=examples.shard,
        # A ranked list of answers becomes several pairs, which are selected like rows.
        row=np.arange(len(examples.lengths)) // len(SIDES) if has_pairs else examples.column("row"),
        content=content,
        leakage_group=leakage_group,
        tokens=examples.lengths,
        splits=splits,
        shares=[task.source.share for task in tasks],
        places=[task.source.item_index for task in tasks],
    )


def _write_split(
    folder: Path,
    name: str,
    merged: MergedShards,
    members: NDArray[np.int64],
    layout: Layout,
    runner: TaskRunner,
    task: str,
) -> tuple[dict[str, Any], list[pack_files.WrittenFile]]:
    examples = merged.examples
    lengths = examples.lengths[members]
    has_pairs, fill = task == "preference", None
    if has_pairs:
        plan = plan_pairs(len(members))
    elif layout.packing and layout.max_length:
        plan = plan_packs(lengths, layout.max_length)
        fill = float(lengths.sum() / (len(plan) * layout.max_length)) if len(plan) else 0.0
    else:
        plan = plan_unpacked(len(members))
    disk.mkdir(folder / name)
    files = list(pack_files.plan_pack_files(folder, name, examples, members, plan, has_pairs=has_pairs))
    written = runner.run(pack_files.write_packs, None, files)
    store.write_split(folder, name, examples, members, plan, [file.path for file in written])
    trained = examples.column("trained")[members]
    sources = np.asarray(merged.source_numbers)[examples.shard[members]]
    weights, count = {"examples": None, "tokens": lengths, "trained": trained}, len(merged.sources)
    totals = {key: np.bincount(sources, weight, count).astype(int).tolist() for key, weight in weights.items()}
    about = {
        "examples": len(members),
        "rows": len(plan),
        "tokens": int(lengths.sum()),
        "trained": int(trained.sum()),
        "fill": fill,
        "sources": [
            {"source": redact_for_storage(source.path), **dict(zip(weights, counts, strict=True))}
            for source, *counts in zip(merged.sources, *totals.values(), strict=True)
            if counts[0] or (source.split or "train") == name
        ],
    }
    return about, written


def _split_notes(plan: SplitPlan, layout: Layout) -> Iterator[str]:
    for reason, count in plan.left_out.items():
        if count:
            yield f"{count_noun(count, 'row')} left out: {reason}"
    for name, count in plan.shared.items():
        yield f"leakage: {count_noun(count, 'row')} of {name} also in train"
    if layout.test_size and layout.test_size >= 1 and len(plan.splits["test"]) < layout.test_size:
        yield f"test has fewer than {layout.test_size} rows, because identical rows are in the same split"


def _empty_share_notes(
    sources: Sequence[FileSource | MemorySource], splits: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Yield a note for each source with a requested number of rows or tokens, but without a row in the train split."""
    requested = {redact_for_storage(source.path): source.share for source in sources if source.share.unit != "times"}
    for source in splits["train"]["sources"]:
        share = requested.get(source["source"])
        if share and share.amount and not source["examples"]:
            yield f"no row of {source['source']} is left for {share.unit}: {share.amount:g}"


def _file_name_notes(sources: Sequence[FileSource | MemorySource]) -> Iterator[str]:
    without_split = [source for source in sources if isinstance(source, FileSource) and source.split is None]
    paths = [redact_for_storage(source.path) for source in without_split]
    if held_out := [path for path in paths if split_from_name(Path(path).name) not in (None, "train")]:
        yield (
            f"used for training, although the names suggest another split: {', '.join(held_out[:5])} "
            "(to keep the splits, pass the folder of the files as the source)"
        )


def _fingerprint(options: Mapping[str, Any], merged: MergedShards) -> str:
    # File and folder names do not affect the contents of a build.
    nameless = {
        **options,
        "tokenizer": options["tokenizer"]["fingerprint"],
        "template": {**options["template"], "name": None},
    }
    content = [merged.examples.content, [ledger.examples for ledger in merged.ledgers]]
    parts = {"ftdata": __version__, "options": nameless, "content": content}
    return disk.hash_bytes(json.dumps(parts, sort_keys=True).encode())
