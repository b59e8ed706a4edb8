"""Run tasks in this process, in a process pool, or on a Ray cluster. The results are the same.

Tasks depend only on the data, never on the number of workers, and can safely run twice. A task whose worker or node is
lost runs again. On a cluster, a second copy of a task starts if the task takes much longer than the others.
"""

from __future__ import annotations

import logging
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
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, TypeVar

import orjson

from ftdata.errors import MissingDependency, StorageError, UsageError, count_noun, suggest_names

Common = TypeVar("Common")
Task = TypeVar("Task")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)

ENGINES = ("local", "ray")

TRIES = 3
"""Maximum number of attempts to run a task whose worker is lost."""

SLOW, SLOW_SECONDS = 4.0, 60.0
"""A second copy of a task starts when the task takes this many times the median duration and at least this many
seconds, and no other task is waiting."""


def check_engine(engine: str) -> None:
    """Check that the name of an engine is valid, and that the package of the engine is installed.

    Raises:
        UsageError: the engine is neither one of `ENGINES` nor `ray:ADDRESS`.
        MissingDependency: Ray is not installed.
    """
    name = engine.partition(":")[0] if isinstance(engine, str) else engine
    if name not in ENGINES or (name == "local" and engine != "local"):
        message = f"the engine {engine!r} does not exist"
        raise UsageError("unknown_engine", message, hint=suggest_names(str(engine), ENGINES))
    if name == "ray":
        try:
            import ray  # noqa: F401  (checks that Ray is installed)
        except ImportError:
            hint = "pip install 'ftdata[ray]'"
            raise MissingDependency("no_ray", "engine='ray' requires the package ray", hint=hint) from None


def run_tasks(
    work: Callable[..., Result],
    common: Common,
    tasks: Iterable[Task],
    workers: int | None = 1,
    engine: str = "local",
    report: Callable[[int, Any], None] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Call `work(common, task)` for each task. Yield the number and the result of a task as soon as it is finished.

    Args:
        work: a picklable function.
        common: the first argument of every call; it is sent to each worker once.
        tasks: picklable tasks. In this process, each task is taken from the iterable when the previous task is done.
        workers: the number of parallel tasks; 1 runs local tasks in this process; `None` uses all processors.
        engine: `"local"`, `"ray"` (the cluster at `RAY_ADDRESS`, or a new local cluster), or `"ray:ADDRESS"` with an
            address for `ray.init`: `HOST:PORT`, `ray://HOST:PORT` or `auto`.
        report: called with the number of a task and its progress. If it is set, local tasks are run with a function as
            third argument, `work(common, task, progress)`; the arguments of `progress` are the progress of the task.

    Raises:
        StorageError: `worker_lost`: the workers of a task terminate repeatedly.
    """
    name, _, address = engine.partition(":")
    if name == "ray":
        # `ray://host:port` is already the complete address of a Ray client.
        yield from _run_on_ray(work, common, tasks, workers, engine if address.startswith("//") else address)
    elif workers == 1:
        for number, task in enumerate(tasks):
            yield number, work(common, task, _bind_report(report, number)) if report else work(common, task)
    else:
        yield from _run_in_pool(work, common, tasks, workers or os.cpu_count() or 1, report)


def _bind_report(report: Callable[[int, Any], None], number: int) -> Callable[..., None]:
    return lambda *progress: report(number, progress)


def _worker_lost_error(task: object, reason: str) -> StorageError:
    problem = f"the worker terminated {TRIES} times while running {task}: {reason}"
    return StorageError("worker_lost", problem, hint="check the available memory, or use fewer workers")


_work_and_common: tuple[Callable[..., Any], Any]
_progress_sender: Connection | None = None
_REPORT_SECONDS = 0.25
"""Minimum time between two progress messages of a worker process."""


def _run_in_pool(
    work: Callable[..., Result],
    common: Common,
    tasks: Iterable[Task],
    workers: int,
    report: Callable[[int, Any], None] | None,
) -> Iterator[tuple[int, Result]]:
    new_tasks, retries, attempts = enumerate(tasks), deque[tuple[int, Task]](), Counter[int]()
    while True:
        # Processes are spawned, because a fork would copy locked thread pools of tokenizers and Arrow.
        spawn = multiprocessing.get_context("spawn")
        receiver, sender = spawn.Pipe(duplex=False)
        pool = ProcessPoolExecutor(workers, spawn, _initialize_worker, (work, common, sender if report else None))
        running: dict[Future[Result], tuple[int, Task]] = {}
        try:
            while True:
                while len(running) < 2 * workers and (item := retries.popleft() if retries else next(new_tasks, None)):
                    attempts[item[0]] += 1
                    running[pool.submit(_run_task, *item)] = item
                if not running:
                    pool.shutdown()
                    return
                done = wait(running, timeout=_REPORT_SECONDS if report else None, return_when=FIRST_COMPLETED).done
                while report and receiver.poll():
                    report(*orjson.loads(receiver.recv_bytes()))
                for future in done:
                    result = future.result()
                    number, _ = running.pop(future)
                    yield number, result
        except BrokenProcessPool as error:
            for number, task in sorted(running.values(), key=lambda item: item[0]):
                if attempts[number] >= TRIES:
                    raise _worker_lost_error(task, str(error)) from None
                retries.append((number, task))
            _log.warning("a worker process ended unexpectedly: %s run again", count_noun(len(retries), "part"))
        finally:
            _terminate(pool)
            receiver.close()
            sender.close()


def _terminate(pool: ProcessPoolExecutor) -> None:
    """Kill the worker processes of a pool. This pool is either replaced by a new pool, or no longer needed."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)


def _initialize_worker(work: Callable[..., Any], common: Any, sender: Connection | None) -> None:
    global _work_and_common, _progress_sender
    _work_and_common, _progress_sender = (work, common), sender
    # The parent process handles Ctrl-C. If the parent terminates, the worker terminates as well.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _run_task(number: int, task: Any) -> Any:
    work, common = _work_and_common
    if _progress_sender is None:
        return work(common, task)
    sender, last_time = _progress_sender, 0.0

    def send(*progress: Any) -> None:
        nonlocal last_time
        if time.monotonic() - last_time >= _REPORT_SECONDS:
            last_time = time.monotonic()
            # All workers share the pipe. Writes of less than 4 kB are not interleaved (POSIX, PIPE_BUF).
            with suppress(OSError):
                sender.send_bytes(orjson.dumps([number, progress]))

    return work(common, task, send)


def _run_on_ray(
    work: Callable[[Common, Task], Result], common: Common, tasks: Iterable[Task], workers: int | None, address: str
) -> Iterator[tuple[int, Result]]:
    import ray

    is_owner = not ray.is_initialized()
    if is_owner:
        _connect(ray, address)
    try:
        yield from _RayRunner(ray, ray.put((work, common, str(Path.cwd()))), workers).run(tasks)
    finally:
        if is_owner:
            ray.shutdown()


@dataclass
class _RayRunner:
    """Runs tasks on a Ray cluster, and starts a second copy of each slow task.

    Attributes:
        ray: the module `ray`.
        common: a reference to the function, its common argument and the working directory.
        workers: the maximum number of parallel tasks.
        running: the number, the task and the start time of each running task, by the reference to its result.
        seconds: the durations of finished tasks.
    """

    ray: Any
    common: Any
    workers: int | None
    running: dict[Any, tuple[int, Any, float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def run(self, tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Run the tasks, and yield the number and the result of each task."""
        new_tasks = enumerate(tasks)
        while True:
            capacity = self.capacity
            while len(self.running) < capacity and (item := next(new_tasks, None)):
                self.start(*item)
            if not self.running:
                return
            ready, _ = self.ray.wait(list(self.running), timeout=1.0)
            for reference in ready:
                if reference in self.running:
                    yield self.finish(reference)
            if not ready and len(self.running) < capacity:
                for number, task in self.find_stragglers():
                    _log.info("%s takes long: a second copy of the task starts", task)
                    self.start(number, task)

    @property
    def capacity(self) -> int:
        """Maximum number of submitted, unfinished tasks. The default keeps every CPU busy."""
        return self.workers or 2 + 2 * int(self.ray.cluster_resources().get("CPU", 1))

    @cached_property
    def remote_function(self) -> Any:
        """The Ray remote function that runs a task. It is registered with the cluster on first use."""
        return self.ray.remote(max_retries=TRIES, num_cpus=1)(_run_ray_task)

    def start(self, number: int, task: Any) -> None:
        """Submit a task to the cluster."""
        self.running[self.remote_function.remote([self.common], task)] = number, task, time.monotonic()

    def finish(self, reference: Any) -> tuple[int, Any]:
        """Return the number and the result of a finished task. Cancel any second copy of the task."""
        number, task, start_time = self.running.pop(reference)
        try:
            result, error = self.ray.get(reference)
        except self.ray.exceptions.RayError as ray_error:
            raise _worker_lost_error(task, str(ray_error).partition("\n")[0]) from None
        if error is not None:
            raise error
        self.seconds.append(time.monotonic() - start_time)
        for copy in [other for other, (other_number, *_) in self.running.items() if other_number == number]:
            self.ray.cancel(copy, force=True)
            del self.running[copy]
        return number, result

    def find_stragglers(self) -> list[tuple[int, Any]]:
        """Return the tasks that have run much longer than the finished tasks and that have no second copy yet."""
        if not self.seconds:
            return []
        limit = time.monotonic() - max(SLOW_SECONDS, SLOW * statistics.median(self.seconds))
        copies = Counter(number for number, *_ in self.running.values())
        return [
            (number, task) for number, task, start in self.running.values() if start < limit and copies[number] == 1
        ]


def _connect(ray: Any, address: str) -> None:
    host, _, port = address.rpartition("//")[2].rpartition(":")
    _log.info("connecting to %s", f"the Ray cluster at {address}" if address else "Ray")
    try:
        if port.isdecimal():
            # Ray itself tries to connect for minutes, so an unreachable address fails here first.
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address or None, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        problem = f"ftdata cannot connect to a Ray cluster at {address or 'RAY_ADDRESS'}: {error}"
        hint = "start a cluster with `ray start --head`, or remove the address"
        raise UsageError("ray_address", problem, hint=hint) from None


_common_cache: dict[str, Any] = {}


def _run_ray_task(references: list[Any], task: Any) -> tuple[Any, Exception | None]:
    """Run a task in a Ray worker. The worker keeps the function and the shared argument for later tasks."""
    import ray

    key = references[0].hex()
    if key not in _common_cache:
        _common_cache.clear()
        work, common, folder = ray.get(references[0])
        # Relative paths on a node refer to the same folder as in the calling process.
        if Path(folder).is_dir():
            os.chdir(folder)
        _common_cache[key] = work, common
    work, common = _common_cache[key]
    try:
        return work(common, task), None
    except Exception as error:  # noqa: BLE001  (the calling process raises it again)
        return None, error
