"""Run the tasks of a build and report their progress."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, TypeVar

from ftdata.build.executors import run_tasks
from ftdata.build.shards import ShardResult, Task, build_shard
from ftdata.errors import InputRefused
from ftdata.pipeline.recipe import Recipe
from ftdata.progress import Progress, ProgressUpdate
from ftdata.readers import FileSource

_log = logging.getLogger(__name__)

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
        reporter = _ProgressReporter(progress, sizes) if progress else None
        report = reporter.report if reporter else None
        remaining = _apply_limit(tasks, results) if limited else tasks
        for number, result in run_tasks(build_shard, recipe, remaining, workers, engine, report):
            results[number] = result
            if reporter:
                reporter.report(number, (result.ledger.read, result.ledger.tokens_kept, 1.0))
        return [results[number] for number in sorted(results)]


@dataclass
class _ProgressReporter:
    """Adds up the progress of all shards, and passes the sums to a progress function."""

    progress: Progress
    sizes: Sequence[int]
    counts: dict[int, tuple[int, int, float | None]] = field(default_factory=dict)
    rows: int = 0
    tokens: int = 0
    size: float = 0.0

    def __post_init__(self) -> None:
        self._total_size = sum(self.sizes)

    def report(self, number: int, counts: tuple[int, int, float | None]) -> None:
        """Report the progress of one shard: its processed rows, tokens and share."""
        rows, tokens, share = self.counts.get(number, (0, 0, 0.0))
        self.counts[number] = counts
        self.rows += counts[0] - rows
        self.tokens += counts[1] - tokens
        self.size += self.sizes[number] * ((counts[2] or 0.0) - (share or 0.0))
        share = self.size / self._total_size if self._total_size else counts[2] if len(self.sizes) == 1 else None
        self.progress(ProgressUpdate("tokenize", self.rows, self.tokens, share or None))


def is_rereadable(task: Task) -> bool:
    """Return whether the source of a task can be read more than once, also by other processes."""
    return isinstance(task.source, FileSource) and task.source.path != "-"


def check_all_rereadable(tasks: Sequence[Task], engine: str) -> None:
    """Check that all sources can be read a second time, which is necessary to tokenize them again with `tokenizers`.

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


def log_reuse(results: Sequence[ShardResult]) -> None:
    """Log how many shards were reused from an interrupted build or from the cache."""
    # If a file is listed twice, its second shard is found among the finished shards of the same build.
    origins = {result.key or result.folder: result.origin for result in reversed(results)}
    counts = Counter(origins.values())
    if counts["resumed"]:
        _log.info("resumed: %d of %d parts of the data were already built", counts["resumed"], len(results))
    if counts["cached"]:
        _log.info("%d of %d parts of the data come from the cache (see: ftdata cache)", counts["cached"], len(results))
