"""Run the tasks of a build and report their progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

from ftdata.build.executors import run_tasks
from ftdata.build.shards import Progress, ShardResult, Task, build_shard
from ftdata.errors import InputRefused
from ftdata.pipeline.recipe import Recipe
from ftdata.readers import FileSource

Item = TypeVar("Item")
Result = TypeVar("Result")

BYTES_PER_WORKER = 32 << 20
"""Minimum amount of data per worker process, because each process has to load the tokenizer."""


@dataclass(frozen=True)
class TaskRunner:
    """Runs the tasks of a build in local processes or on a Ray cluster."""

    workers: int | None
    engine: str

    def run(self, work: Callable[[Any, Item], Result], common: Any, tasks: Sequence[Item]) -> list[Result]:
        """Call `work(common, task)` for each task, and return the results in the order of the tasks."""
        if len(tasks) == 1:
            return [work(common, tasks[0])]
        workers = self.workers if self.engine != "local" else min(self.workers or 1, len(tasks))
        done = sorted(run_tasks(work, common, tasks, workers, self.engine), key=itemgetter(0))
        return [result for _, result in done]

    def build(self, recipe: Recipe, tasks: Sequence[Task], progress: Progress | None) -> list[ShardResult]:
        """Build one shard per task. Omit shards that contain only rows beyond the row limit.

        Raises:
            EncodersDiffer: as in `build_shard`.
        """
        results: dict[int, ShardResult] = {}
        limited = any(task.limit for task in tasks)
        sizes = [task.source.size for task in tasks]
        engine, workers = self.engine, self.workers
        # Only this process can read data from memory or a pipe. With a limit, tasks depend on the tasks before them.
        if limited or not all(map(is_rereadable, tasks)):
            engine, workers = "local", 1
        if engine == "local":
            workers = min(workers or 1, len(tasks), 1 + sum(sizes) // BYTES_PER_WORKER)
        reporter = _ProgressReporter(progress, sizes)
        # In this process, progress is reported per batch. Worker processes report it when a shard is done.
        on_batch = reporter.report_batch if progress and engine == "local" and workers == 1 else None
        remaining = _apply_limit(tasks, results) if limited else tasks
        for number, result in run_tasks(partial(build_shard, progress=on_batch), recipe, remaining, workers, engine):
            results[number] = result
            reporter.report_shard(number, result)
        return [results[number] for number in sorted(results)]


@dataclass
class _ProgressReporter:
    """Counts finished shards, rows, tokens and bytes, and passes the counts to a progress function."""

    progress: Progress | None
    sizes: Sequence[int]
    shards: int = 0
    rows: int = 0
    tokens: int = 0
    size: int = 0

    def __post_init__(self) -> None:
        self._total_size = max(sum(self.sizes), 1)

    def report_shard(self, number: int, result: ShardResult) -> None:
        """Add a finished shard to the counts, and report the progress."""
        self.shards += 1
        self.rows += result.ledger.read
        self.tokens += result.ledger.tokens_kept
        self.size += self.sizes[number]
        self.report_batch(0, 0, None)

    def report_batch(self, rows: int, tokens: int, share: float | None) -> None:
        """Report the progress of the build. The arguments describe the finished part of the current shard."""
        if self.progress is not None:
            size = self.sizes[self.shards] * (share or 0.0) if self.shards < len(self.sizes) else 0
            total_share = (self.size + size) / self._total_size
            self.progress(self.rows + rows, self.tokens + tokens, total_share or share or None)


def is_rereadable(task: Task) -> bool:
    """Return whether the source of a task can be read more than once, also by other processes."""
    return isinstance(task.source, FileSource) and task.source.path != "-"


def check_all_rereadable(tasks: Sequence[Task], engine: str) -> None:
    """Check that all sources can be read twice, because the second reading tokenizes them with `tokenizers`.

    Raises:
        InputRefused: the source of a task can be read only once.
    """
    if not all(map(is_rereadable, tasks)):
        problem = f"{engine} and tokenizers produce different tokens, and this data cannot be read a second time"
        raise InputRefused("engine_differs", problem, hint="pass the data as a file, or uninstall fastokens")


def _apply_limit(tasks: Sequence[Task], results: Mapping[int, ShardResult]) -> Iterator[Task]:
    """Yield each task with its remaining row limit. Tasks for the same `data` item and split share one limit."""
    for task in tasks:
        group = task.source.item_index, task.source.split
        earlier = [item for item in results.values() if (item.task.source.item_index, item.task.source.split) == group]
        remaining = (task.limit or 0) - sum(item.ledger.read - item.ledger.filtered for item in earlier)
        if remaining > 0:
            yield replace(task, limit=remaining)
