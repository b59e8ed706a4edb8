"""Build: read everything, keep the ledger, split, pack, write.

Each source is a shard task of its own: it writes its examples beside the target and reports its ledger. The
pack plan is made from the lengths of all of them; tokens are gathered when the packs are written.
"""

from __future__ import annotations

import datetime
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ftdata import cache, similar, store
from ftdata._version import __version__
from ftdata.card import card
from ftdata.engines import EngineDiffers
from ftdata.errors import InputRefused, UsageError, one_of
from ftdata.executors import ENGINES, run
from ftdata.layout import Facts, Laid, Layout, lay_out
from ftdata.ledger import Report, notes_of
from ftdata.mask import Policy
from ftdata.pack import best_fit_decreasing, unpacked
from ftdata.readers import FileSource, sources
from ftdata.readers.naming import split_of
from ftdata.readers.select import Selection
from ftdata.recipe import Recipe, make_recipe
from ftdata.shards import Progress, ShardResult, Task, build_shard
from ftdata.tolerance import Tolerance

if TYPE_CHECKING:
    import datasets


BYTES_PER_WORKER = 32 << 20
"""Data from which on another process pays: each has to load the tokenizer."""


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
    dropped: str = "refuse",
    unclosed: str = "flag",
    refuse: Sequence[str] = (),
    max_length: int | None = None,
    overlong: str = "reject",
    packing: str | None = None,
    where: str | None = None,
    limit: int | None = None,
    dedup: bool = False,
    near: float | None = None,
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
        dropped: `"refuse"` or `"flag"` rows of which the template leaves out a message that is not the assistant's.
        unclosed: `"flag"` a last turn that the template leaves without a stop, or `"append_eos"` and train it.
        refuse: flags of the report, such as `"no_stop"`, that make a row a bad one.
        max_length: tokens that an example, and a pack, may have.
        overlong: `"reject"`, `"drop_turns"` or `"truncate"`.
        packing: `None` or `"bfd"` (best-fit decreasing, whole examples only; needs `max_length`).
        where: a Jinja expression over the columns of a row, such as `lang == "en" and messages | length > 2`: the other
            rows are passed over, and counted.
        limit: rows to read of each thing that `data` names, and of each split of it.
        dedup: leave out rows whose tokens and labels are those of an earlier one.
        near: how similar rows must be, such as 0.8, to count as equal for `dedup` and `test_size` (Jaccard similarity
            of words, five at a time, estimated; needs `ftdata[dedup]`).
        sample: share (below 1) or number of rows to take, by chance.
        shuffle: put the rows of the train split into another order.
        test_size: share (below 1) or number of rows for a `"test"` split; equal rows go together.
        seed: decides all that is left to chance, the same way on every machine: the rows with the smallest
            `ftdata.layout.mixed(number, seed)` are taken.
        on_bad_rows: `"error"` (all bad rows are collected, then one error) or `"quarantine"` (go on without them).
        max_rejects: with `"quarantine"`: how many rows (or `"1%"`) may be rejected.
        output_dir: where to write the build; `None` keeps it in memory.
        workers: processes at most (`None`: this one); the result does not depend on it. There is one for each file,
            and for each 32 MB of data. As with every process pool, a script that asks for more than one needs
            `if __name__ == "__main__":`.
        engine: `"local"`.
        date: what templates that print a date are shown.
        template_kwargs: further variables for the template.
        progress: called with the rows and tokens done so far, and which share of the data that is (0 to 1, `None`
            where nobody knows).

    Returns:
        A `datasets.DatasetDict` with `"train"` (and `"test"`), columns `input_ids`, `labels` and `seq_lengths`
        (int32 lists; one row per pack, or per example), and the `Report` as `.report`.

    Raises:
        UsageError: an option cannot be meant.
        BadRows: rows are refused (`on_bad_rows="error"`).
        TooManyRejects: more than `max_rejects`.
        InputRefused: a source cannot be read, or nothing was left to build.
    """
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(output_dir) if output_dir is not None else Path(scratch) / "build"
        report = write_build(
            data,
            tokenizer,
            target,
            template=template,
            schema=schema,
            columns=columns,
            train_on=train_on,
            train_parts=train_parts,
            turns=turns,
            control_tokens=control_tokens,
            dropped=dropped,
            unclosed=unclosed,
            refuse=refuse,
            max_length=max_length,
            overlong=overlong,
            packing=packing,
            where=where,
            limit=limit,
            dedup=dedup,
            near=near,
            sample=sample,
            shuffle=shuffle,
            test_size=test_size,
            seed=seed,
            on_bad_rows=on_bad_rows,
            max_rejects=max_rejects,
            workers=workers,
            engine=engine,
            date=date,
            template_kwargs=template_kwargs,
            progress=progress,
        )
        return load_build(target.resolve(), report, in_memory=output_dir is None)


def write_build(
    data: Any,
    tokenizer: Any,
    output_dir: str | Path,
    *,
    packing: str | None = None,
    where: str | None = None,
    limit: int | None = None,
    dedup: bool = False,
    near: float | None = None,
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
    """Build as `build_sft_dataset` does, without loading the result (or `datasets`); return the report."""
    made = make_recipe(tokenizer, **recipe)
    layout = Layout(packing, made.max_length, test_size, seed, dedup, near, sample, shuffle)
    if near is not None:
        similar.require()
    selection = Selection(where, limit)
    tolerance = Tolerance(on_bad_rows, max_rejects)
    if workers is not None and workers < 1:
        raise UsageError("workers", f"workers is {workers}, expected at least 1")
    one_of("engine", engine, ENGINES)
    if (
        callable(made.train_on)
        and workers not in (None, 1)
        and "<lambda>" in getattr(made.train_on, "__qualname__", "")
    ):
        raise UsageError("train_on", "a lambda cannot go to other processes", hint="use a named function, or workers=1")
    with store.new_folder(Path(output_dir).resolve()) as folder:
        return _build(made, layout, selection, data, folder, tolerance, workers, engine, progress)


def load_build(folder: Path, report: Report | None = None, *, in_memory: bool = False) -> datasets.DatasetDict:
    """Load a finished build as a `datasets.DatasetDict`, with its report where there is one."""
    import datasets

    loaded = datasets.load_from_disk(str(folder), keep_in_memory=in_memory)
    loaded.report = report
    return loaded


def _build(
    recipe: Recipe,
    layout: Layout,
    selection: Selection,
    data: Any,
    folder: Path,
    tolerance: Tolerance,
    workers: int | None,
    engine: str,
    progress: Progress | None,
) -> Report:
    began = time.monotonic()
    shards = folder / "shards"
    chosen = selection.where, selection.limit
    tasks = [
        Task(source, shards / f"{number:05d}", *chosen, near=layout.near is not None)
        for number, source in enumerate(sources(data))
    ]
    try:
        results = _run(recipe, tasks, workers, engine, progress)
    except EngineDiffers as differs:
        # What one text shows may be so for others: all is done again.
        _check_rereadable(tasks, str(differs))
        shutil.rmtree(shards)
        cache.clear()
        results = _run(recipe, [replace(task, trusted=False) for task in tasks], workers, engine, progress)
    tasks = [result.task for result in results]
    ledgers = tuple(result.ledger for result in results)
    rejects = [reject for result in results for reject in result.rejects]
    tolerance.judge(ledgers, rejects)
    examples = store.Examples.open([task.folder for task in tasks])
    for result, lengths in zip(results, _lengths_by_shard(examples, len(tasks)), strict=True):
        result.ledger.check(len(lengths), int(lengths.sum()), len(result.rejects))
    splits = {}
    laid = lay_out(_facts(examples, tasks, layout), layout)
    if not len(laid.splits["train"]):
        why = ", ".join(_left_out(laid, layout)) or "the sources have none, or none that their shares have room for"
        raise InputRefused("nothing_built", f"no row was left to train on: {why}")
    named = [(task.source.path, task.source.split or "train") for task in tasks]
    for name, members in laid.splits.items():
        splits[name] = _write_split(folder, name, examples, members, layout, named)
    shutil.rmtree(shards)
    cache.tidy()
    options = {
        **recipe.describe(),
        **asdict(layout),
        **dict(zip(("where", "limit"), chosen, strict=True)),
        "sources": [{"split": task.source.split, **task.source.share._asdict()} for task in tasks],
    }
    fingerprint = _fingerprint(options, results)
    report = Report(
        ledgers,
        splits,
        (*notes_of(ledgers, recipe), *_left_out(laid, layout), *_named_otherwise(tasks)),
        tuple(str(reject) for reject in rejects[:20]),
        fingerprint,
        {**options, **asdict(tolerance), "data": _named(data)},
        round(time.monotonic() - began, 3),
        ", ".join(dict.fromkeys(result.engine for result in results)),
    )
    store.write_rejects(folder / "rejects.jsonl", rejects)
    store.write_json(folder / "dataset_dict.json", {"splits": list(splits)})
    # How long it took, and who did it, is no part of what was built: equal builds are equal files.
    store.write_json(folder / "report.json", {**report.as_dict(), "seconds": None, "engine": None})
    files = {name: [f"{name}/{one.name}" for one in sorted((folder / name).glob("data-*.arrow"))] for name in splits}
    (folder / "README.md").write_text(card(report, recipe, files), encoding="utf-8")
    store.write_manifest(folder, {"ftdata": __version__, "fingerprint": fingerprint, "options": options})
    return report


def _run(
    recipe: Recipe, tasks: Sequence[Task], workers: int | None, engine: str, progress: Progress | None
) -> list[ShardResult]:
    results: list[ShardResult] = []
    limited = any(task.limit for task in tasks)
    # What is in memory, or comes through a pipe, is here alone; how many rows are wanted, the tasks before say.
    sizes = [task.source.size for task in tasks]
    alone = limited or not all(map(_is_file, tasks))
    processes = 1 if alone else min(workers or 1, len(tasks), 1 + sum(sizes) // BYTES_PER_WORKER)
    # Within this process progress is told per batch; worker processes are told of when a shard is done.
    here = processes == 1

    def told(rows: int, tokens: int, share: float | None) -> None:
        assert progress
        size = sizes[len(results)] * (share or 0.0) if len(results) < len(sizes) else 0
        whole = (sum(sizes[: len(results)]) + size) / max(sum(sizes), 1)
        counted = [result.ledger for result in results]
        done = sum(one.read for one in counted) + rows, sum(one.tokens_kept for one in counted) + tokens
        progress(*done, whole or share or None)

    work = partial(build_shard, recipe, progress=told if here and progress else None)
    for result in run(work, _limited(tasks, results) if limited else tasks, processes, engine):
        results.append(result)
        if progress:
            told(0, 0, None)
    return results


def _is_file(task: Task) -> bool:
    return isinstance(task.source, FileSource) and task.source.path != "-"


def _check_rereadable(tasks: Sequence[Task], engine: str) -> None:
    if not all(map(_is_file, tasks)):
        found = f"{engine} gives other tokens than tokenizers, and this data can be read but once"
        raise InputRefused("engine_differs", found, hint="pass it as a file, or uninstall fastokens")


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


def _limited(tasks: Sequence[Task], results: Sequence[ShardResult]) -> Iterator[Task]:
    """Yield the tasks that still have rows to read, of the limit of each place and split, as results come in."""
    for task in tasks:
        own = task.source.place, task.source.split
        before = [one.ledger for one in results if (one.task.source.place, one.task.source.split) == own]
        left = (task.limit or 0) - sum(ledger.read - ledger.passed for ledger in before)
        if left > 0:
            yield replace(task, limit=left)


def _lengths_by_shard(examples: store.Examples, shards: int) -> list[NDArray[np.int64]]:
    lengths = examples.lengths
    return [lengths[examples.shard == number] for number in range(shards)]


def _facts(examples: store.Examples, tasks: Sequence[Task], layout: Layout) -> Facts:
    near = layout.near
    splits = [task.source.split for task in tasks]
    content: NDArray[np.generic] = np.broadcast_to(np.int8(0), len(examples.lengths))
    asked = content
    # Of millions of rows, hashes that nobody compares take room.
    if layout.dedup or layout.test_size is not None or len(set(splits)) > 1:
        content = contents = examples.contents
        asked = np.ascontiguousarray(contents.view("S8").reshape(-1, 3)[:, :2]).view("S16").ravel()
    if near is not None:
        minhashes = np.concatenate([store.minhashes(task.folder, similar.SIZE) for task in tasks])
        content = similar.united(similar.first_alike(minhashes, near), contents)
        asked = similar.united(similar.groups(minhashes, near), asked)
    return Facts(
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
    folder: Path,
    name: str,
    examples: store.Examples,
    members: NDArray[np.int64],
    layout: Layout,
    sources: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    lengths = examples.lengths[members]
    if layout.packing and layout.max_length:
        plan = best_fit_decreasing(lengths, layout.max_length)
        fill = float(lengths.sum() / (len(plan) * layout.max_length)) if len(plan) else 0.0
    else:
        plan, fill = unpacked(len(members)), None
    store.write_split(folder, name, examples, members, plan)
    trained = examples.column("trained")[members]
    shard = examples.shard[members]
    each = {"examples": None, "tokens": lengths, "trained": trained}
    of_source = {name: np.bincount(shard, counts, len(sources)).astype(int).tolist() for name, counts in each.items()}
    return {
        "examples": len(members),
        "rows": len(plan),
        "tokens": int(lengths.sum()),
        "trained": int(trained.sum()),
        "fill": fill,
        "sources": [
            {"source": source, **dict(zip(each, counts, strict=True))}
            for (source, split), *counts in zip(sources, *of_source.values(), strict=True)
            if counts[0] or split == name
        ],
    }


def _left_out(laid: Laid, layout: Layout) -> Iterator[str]:
    for reason, count in laid.left_out.items():
        if count:
            yield f"{count:,} rows are left out: {reason}"
    for name, count in laid.shared.items():
        yield f"{count:,} rows of {name} are in train, too"
    if layout.test_size and layout.test_size >= 1 and len(laid.splits["test"]) < layout.test_size:
        yield f"test holds fewer rows than {layout.test_size}: equal ones stay together"


def _named_otherwise(tasks: Sequence[Task]) -> Iterator[str]:
    plain = [task.source.path for task in tasks if isinstance(task.source, FileSource) and task.source.split is None]
    if others := [path for path in plain if split_of(Path(path).name) not in (None, "train")]:
        yield f"trained on, though named as of another split: {', '.join(others[:5])}"


def _fingerprint(options: Mapping[str, Any], results: Sequence[ShardResult]) -> str:
    # Names of files and folders decide nothing.
    nameless = {
        **options,
        "tokenizer": options["tokenizer"]["fingerprint"],
        "template": {**options["template"], "name": None},
    }
    parts = {"ftdata": __version__, "options": nameless, "content": [result.content for result in results]}
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())
