"""Run tasks: in this process, in a pool of processes, or on a Ray cluster. What comes of it is the same.

A task is planned from the data alone, never from the number of workers, and doing it twice does no harm: one whose
worker, or node, is lost is done again, and on a cluster one that takes far longer than others is begun once more.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, TypeVar

from ftdata.errors import MissingDependency, StorageError, UsageError, suggest_names

Common = TypeVar("Common")
Task = TypeVar("Task")
Result = TypeVar("Result")

ENGINES = ("local", "ray")

TRIES = 3
"""How often a task is begun before the workers that it is lost with are blamed on it."""

SLOW, SLOW_SECONDS = 4.0, 60.0
"""A task is begun a second time elsewhere when it takes so many times as long as most, and longer than so many seconds,
and nothing else is left to begin."""


def check_engine(engine: str) -> None:
    """Refuse an engine that there is not.

    Raises:
        UsageError: it is none of `ENGINES`, nor `ray:ADDRESS`.
        MissingDependency: Ray is not installed.
    """
    name = engine.partition(":")[0] if isinstance(engine, str) else engine
    if name not in ENGINES or (name == "local" and engine != "local"):
        raise UsageError("unknown_engine", f"engine is {engine!r}", hint=suggest_names(str(engine), ENGINES))
    if name == "ray":
        try:
            import ray  # noqa: F401  (is it there?)
        except ImportError:
            hint = "pip install 'ftdata[ray]'"
            raise MissingDependency("no_ray", "this engine needs Ray", hint=hint) from None


def run_tasks(
    work: Callable[[Common, Task], Result],
    common: Common,
    tasks: Iterable[Task],
    workers: int | None = 1,
    engine: str = "local",
) -> Iterator[tuple[int, Result]]:
    """Yield the number of each task, and `work(common, task)`, as they are done.

    Args:
        work: a picklable function.
        common: what it is given with each task; it goes to each worker once.
        tasks: picklable tasks; in this process each is taken when the one before it is done.
        workers: how many tasks at once; locally 1 means in this process; `None` as many as there are processors.
        engine: `"local"`, `"ray"` (the cluster of `RAY_ADDRESS`, else one on this machine), or `"ray:ADDRESS"`, where
            ADDRESS is as `ray.init` takes it: `HOST:PORT`, `ray://HOST:PORT` or `auto`.

    Raises:
        StorageError: `worker_lost`: a task's workers end before it does, again and again.
    """
    name, _, address = engine.partition(":")
    if name == "ray":
        # `ray://host:port` is the address of a client as it stands.
        yield from _on_ray(work, common, tasks, workers, engine if address.startswith("//") else address)
    elif workers == 1:
        for number, task in enumerate(tasks):
            yield number, work(common, task)
    else:
        yield from _in_pool(work, common, tasks, workers or os.cpu_count() or 1)


def _lost(task: object, why: str) -> StorageError:
    found = f"a worker ended {TRIES} times while it was at {task}: {why}"
    return StorageError("worker_lost", found, hint="is there too little memory? try fewer workers")


_given: tuple[Callable[[Any, Any], Any], Any]


def _in_pool(
    work: Callable[[Common, Task], Result], common: Common, tasks: Iterable[Task], workers: int
) -> Iterator[tuple[int, Result]]:
    left, again, begun = enumerate(tasks), deque[tuple[int, Task]](), Counter[int]()
    while True:
        # Spawned, not forked: a fork copies locked thread pools of tokenizers and Arrow.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawn, _begin, (work, common))
        running: dict[Future[Result], tuple[int, Task]] = {}
        try:
            while True:
                while len(running) < 2 * workers and (one := again.popleft() if again else next(left, None)):
                    begun[one[0]] += 1
                    running[pool.submit(_do, one[1])] = one
                if not running:
                    pool.shutdown()
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    number, _ = running.pop(future)
                    yield number, result
        except BrokenProcessPool as error:
            for number, task in sorted(running.values(), key=lambda one: one[0]):
                if begun[number] >= TRIES:
                    raise _lost(task, str(error)) from None
                again.append((number, task))
        finally:
            _end(pool)


def _end(pool: ProcessPoolExecutor) -> None:
    """End what is still running: nobody waits for it, and what it has done half is done again."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)


def _begin(work: Callable[[Any, Any], Any], common: Any) -> None:
    global _given  # noqa: PLW0603  (a worker process is for one work)
    _given = work, common
    # Ctrl-C is for the process that waits for us; and where that is no more, nobody does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _do(task: Any) -> Any:
    work, common = _given
    return work(common, task)


def _on_ray(
    work: Callable[[Common, Task], Result], common: Common, tasks: Iterable[Task], workers: int | None, address: str
) -> Iterator[tuple[int, Result]]:
    import ray

    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    try:
        yield from _Ray(ray, ray.put((work, common, str(Path.cwd()))), workers).run(tasks)
    finally:
        if ours:
            ray.shutdown()


@dataclass
class _Ray:
    """Tasks on a cluster: what is running, by the reference of its result, and how long others took."""

    ray: Any
    given: Any
    workers: int | None
    running: dict[Any, tuple[int, Any, float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def run(self, tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Yield what each task becomes."""
        left = enumerate(tasks)
        while True:
            room = self.room
            while len(self.running) < room and (one := next(left, None)):
                self.begin(*one)
            if not self.running:
                return
            ready, _ = self.ray.wait(list(self.running), timeout=1.0)
            for reference in ready:
                if reference in self.running:
                    yield self.end(reference)
            if not ready and len(self.running) < room:
                for number, task in self.stragglers():
                    self.begin(number, task)

    @property
    def room(self) -> int:
        """How many tasks may run: a few more than there are processors, so that none of them waits for us."""
        return self.workers or 2 + 2 * int(self.ray.cluster_resources().get("CPU", 1))

    @cached_property
    def do(self) -> Any:
        """What does a task on the cluster, which learns of it once."""
        return self.ray.remote(max_retries=TRIES, num_cpus=1)(_do_on_ray)

    def begin(self, number: int, task: Any) -> None:
        """Have a task done somewhere."""
        self.running[self.do.remote([self.given], task)] = number, task, time.monotonic()

    def end(self, reference: Any) -> tuple[int, Any]:
        """Return what a task became that is done, and give up others that are the same."""
        number, task, since = self.running.pop(reference)
        try:
            result, error = self.ray.get(reference)
        except self.ray.exceptions.RayError as lost:
            raise _lost(task, str(lost).partition("\n")[0]) from None
        if error is not None:
            raise error
        self.seconds.append(time.monotonic() - since)
        for other in [other for other, (same, *_) in self.running.items() if same == number]:
            self.ray.cancel(other, force=True)
            del self.running[other]
        return number, result

    def stragglers(self) -> list[tuple[int, Any]]:
        """Return the tasks that take far longer than others did, and are not yet done in two places."""
        if not self.seconds:
            return []
        limit = time.monotonic() - max(SLOW_SECONDS, SLOW * statistics.median(self.seconds))
        copies = Counter(number for number, *_ in self.running.values())
        return [
            (number, task) for number, task, since in self.running.values() if since < limit and copies[number] == 1
        ]


def _connect(ray: Any, address: str) -> None:
    host, _, port = address.rpartition("//")[2].rpartition(":")
    try:
        if port.isdecimal():
            # Ray itself goes on trying for minutes.
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address or None, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        found = f"no Ray cluster answers at {address or 'RAY_ADDRESS'}: {error}"
        raise UsageError(
            "ray_address", found, hint="start one with `ray start --head`, or leave the address out"
        ) from None


_known: dict[str, Any] = {}


def _do_on_ray(references: list[Any], task: Any) -> tuple[Any, Exception | None]:
    """Do a task in a worker of Ray, which keeps what is common to all."""
    import ray

    key = references[0].hex()
    if key not in _known:
        _known.clear()
        work, common, folder = ray.get(references[0])
        # Relative names mean on each node what they mean to who runs this.
        if Path(folder).is_dir():
            os.chdir(folder)
        _known[key] = work, common
    work, common = _known[key]
    try:
        return work(common, task), None
    except Exception as error:  # noqa: BLE001  (raised again where it is waited for)
        return None, error
