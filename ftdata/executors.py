"""Run shard tasks: in this process, or in a pool of processes. Results come back in the order of the tasks.

A task is planned from the data alone, never from the number of workers, so the output is the same for any.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

ENGINES = ("local",)


def run(
    work: Callable[[Task], Result], tasks: Iterable[Task], workers: int = 1, engine: str = "local"
) -> Iterator[Result]:
    """Yield `work(task)` for each task, in order.

    Args:
        work: a picklable function.
        tasks: picklable tasks.
        workers: processes; 1 means this one, and a task is taken when the one before it is done.
        engine: one of `ENGINES`.
    """
    assert engine in ENGINES
    if workers <= 1:
        yield from map(work, tasks)
        return
    # Spawned, not forked: a fork copies locked thread pools of tokenizers and Arrow.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, tasks)
