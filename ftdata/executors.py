"""Run shard tasks: in this process, or in a pool of processes. Results come back in the order of the tasks.

A task is planned from the data alone, never from the number of workers, so the output is the same for any.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from ftdata.errors import UsageError, nearest

Task = TypeVar("Task")
Result = TypeVar("Result")

ENGINES = ("local",)


def run(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None = None, engine: str = "local",
        ) -> Iterator[Result]:  # fmt: skip
    """Yield `work(task)` for each task, in order.

    Args:
        work: a picklable function.
        tasks: picklable tasks.
        workers: processes, never more than there are tasks; `None` and 1 mean this process.
        engine: `"local"`.

    Raises:
        UsageError: an unknown engine, or less than one worker.
    """
    if engine not in ENGINES:
        raise UsageError("unknown_engine", f"no engine named {engine!r}", hint=nearest(engine, ENGINES))
    if workers is not None and workers < 1:
        raise UsageError("workers", f"workers is {workers}, expected at least 1")
    processes = min(workers or 1, len(tasks))
    if processes <= 1:
        yield from map(work, tasks)
        return
    # Spawned, not forked: a fork copies locked thread pools of tokenizers and Arrow.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, tasks)
