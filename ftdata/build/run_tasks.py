"""Runner: who does the tasks of a build, and how far they have come."""

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
"""Data from which on another process pays: each has to load the tokenizer."""


@dataclass(frozen=True)
class TaskRunner:
    """So many workers of an engine."""

    workers: int | None
    engine: str

    def do(self, work: Callable[[Any, Item], Result], common: Any, tasks: Sequence[Item]) -> list[Result]:
        """Return what `work` makes of each task."""
        if len(tasks) == 1:
            return [work(common, tasks[0])]
        workers = self.workers if self.engine != "local" else min(self.workers or 1, len(tasks))
        done = sorted(run_tasks(work, common, tasks, workers, self.engine), key=itemgetter(0))
        return [result for _, result in done]

    def build(self, recipe: Recipe, tasks: Sequence[Task], progress: Progress | None) -> list[ShardResult]:
        """Build the shards; those that a limit leaves nothing of are not in the result.

        Raises:
            EncodersDiffer: as `build_shard`.
        """
        results: dict[int, ShardResult] = {}
        limited = any(task.limit for task in tasks)
        sizes = [task.source.size for task in tasks]
        engine, workers = self.engine, self.workers
        # What is in memory, or comes through a pipe, is here alone; how many rows are wanted, the tasks before say.
        if limited or not all(map(is_rereadable, tasks)):
            engine, workers = "local", 1
        if engine == "local":
            workers = min(workers or 1, len(tasks), 1 + sum(sizes) // BYTES_PER_WORKER)
        told = _Told(progress, sizes)
        # Within this process progress is told per batch; others tell of what they have done when a shard is.
        here = told.batch if progress and engine == "local" and workers == 1 else None
        left = _limited(tasks, results) if limited else tasks
        for number, result in run_tasks(partial(build_shard, progress=here), recipe, left, workers, engine):
            results[number] = result
            told.shard(number, result)
        return [results[number] for number in sorted(results)]


@dataclass
class _Told:
    """What was told of the shards that are done: rows, tokens, bytes."""

    progress: Progress | None
    sizes: Sequence[int]
    shards: int = 0
    rows: int = 0
    tokens: int = 0
    size: int = 0

    def __post_init__(self) -> None:
        self._all = max(sum(self.sizes), 1)

    def shard(self, number: int, result: ShardResult) -> None:
        """Tell of a shard that is done."""
        self.shards += 1
        self.rows += result.ledger.read
        self.tokens += result.ledger.tokens_kept
        self.size += self.sizes[number]
        self.batch(0, 0, None)

    def batch(self, rows: int, tokens: int, share: float | None) -> None:
        """Tell of a part of the shard that is at work, the next one."""
        if self.progress is not None:
            size = self.sizes[self.shards] * (share or 0.0) if self.shards < len(self.sizes) else 0
            self.progress(self.rows + rows, self.tokens + tokens, (self.size + size) / self._all or share or None)


def is_rereadable(task: Task) -> bool:
    """Whether a task reads what others can read, and read again."""
    return isinstance(task.source, FileSource) and task.source.path != "-"


def check_all_rereadable(tasks: Sequence[Task], engine: str) -> None:
    """Refuse to do tasks again that cannot be.

    Raises:
        InputRefused: they cannot.
    """
    if not all(map(is_rereadable, tasks)):
        found = f"{engine} gives other tokens than tokenizers, and this data can be read but once"
        raise InputRefused("engine_differs", found, hint="pass it as a file, or uninstall fastokens")


def _limited(tasks: Sequence[Task], results: Mapping[int, ShardResult]) -> Iterator[Task]:
    """Yield the tasks that still have rows to read, of the limit of each place and split, as results come in."""
    for task in tasks:
        own = task.source.place, task.source.split
        before = [one.ledger for one in results.values() if (one.task.source.place, one.task.source.split) == own]
        left = (task.limit or 0) - sum(ledger.read - ledger.filtered for ledger in before)
        if left > 0:
            yield replace(task, limit=left)
