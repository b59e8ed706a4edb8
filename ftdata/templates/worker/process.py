"""Start the template worker process, send requests to it, and enforce its limits of CPU time and memory.

Templates are untrusted code that may loop forever or exhaust memory.

Each process has one worker (`ftdata.templates.worker.main`). If the worker ends, a new worker starts. Requests and
answers are frames of a `multiprocessing` connection; `ftdata.templates.worker.protocol` defines their contents.

Limits apply to the CPU time of the worker, not to wall time: the result for a row must not depend on the load of the
machine. The limit of a request depends only on its size, and is far above the needs of ordinary templates. The kernel
ends a worker that exceeds the limit (SIGPROF). The request is then repeated once in a new worker, alone and with twice
the limit. If the second attempt fails, the row is rejected.

Only Python functions of the user also have limits of wall time, without a second attempt, because they can wait.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import Connection, Pipe
from typing import Any

from ftdata.errors import BadRow, InternalError, StorageError, TemplateRefused
from ftdata.templates.template import Template
from ftdata.templates.worker import protocol

CPU_SECONDS, CHARACTERS_PER_SECOND, SECONDS_PER_STEP = 0.5, 20_000, 0.0005
"""CPU limit of a request: constant seconds, characters per additional second, and seconds per step."""

EXAMINE_CPU_SECONDS = 3.0
"""CPU limit of the examination of a template."""

PREPARE_SECONDS = 300
"""Limit of wall time to execute a file of the user. For its requests, the limit of wall time is the CPU limit."""

MEGABYTES, BYTES_PER_CHARACTER = 512, 64
"""Memory limit of a request: constant megabytes, and bytes per character of the request."""

MAX_STEPS = 1 << 22
"""Conversations with more steps (messages times trained answers) are rejected: each answer is rendered separately."""

MAX_LOST = 5
"""How many workers may end for external reasons (killed, out of memory) before the build stops."""

_MAX_ATTEMPTS = 2
"""How many times a request may exceed its limits."""

_MAX_UNANSWERED, _MIN_FRAME = 1 << 15, 1 << 13
"""Maximum size in bytes of unanswered requests, well below a socket's buffer, and minimum size of a frame."""

_ENDED_BY_TEMPLATE = {
    signal.SIGPROF, signal.SIGALRM, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE,
}  # fmt: skip
"""Signals with which a template may end its worker: the CPU limit, and crashes such as a C stack overflow."""


class LimitExceeded(Exception):
    """Raised if a template exceeds the CPU or memory limit of a request."""


def start_worker() -> None:
    """Start the worker process if it is not running, so that it is ready before the first request."""
    with _lock(os.getpid()):
        _get_worker()


def call_worker(action: str, template: Template, cpu_seconds: float | None = None, **arguments: Any) -> dict[str, Any]:
    """Send a request to the worker process, and wait for the answer.

    Args:
        action: a key of `worker.main.ACTIONS`.
        template: the template.
        cpu_seconds: CPU limit of the request. `None`: it depends on the size of the request.
        arguments: arguments of the action, as JSON values.

    Raises:
        BadRow, TemplateRefused: the action raised this error.
        RecursionError: the arguments are nested too deep.
        LimitExceeded: the template exceeds its limits.
        StorageError: `template_worker_lost`, if workers end repeatedly for other reasons.
    """
    return submit_request(action, template, cpu_seconds=cpu_seconds, **arguments).result()


def submit_request(
    action: str, template: Template, steps: int = 0, cpu_seconds: float | None = None, **arguments: Any
) -> Request:
    """Send a request to the worker process without waiting for the answer.

    Args:
        action: a key of `worker.main.ACTIONS`.
        template: the template.
        steps: minimum number of messages that the template processes, which increases the CPU limit.
        cpu_seconds: CPU limit of the request. `None`: it depends on the size of the request and on `steps`.
        arguments: arguments of the action, JSON values.
    """
    body = protocol.encode_values(arguments)
    if cpu_seconds is None:
        cpu_seconds = CPU_SECONDS + len(body) / CHARACTERS_PER_SECOND + steps * SECONDS_PER_STEP
    request = Request(action, template, body, cpu_seconds * template.cpu_factor)
    if template.key in _exceeding:
        # The template is likely to exceed its limits again, so only the last attempt is made, alone.
        request.exceeded = _MAX_ATTEMPTS - 1
        return request
    with _lock(os.getpid()), suppress(WorkerEnded):
        worker = _get_worker_for(template)
        # Sending more than the buffer of the socket holds would cause a deadlock with the worker.
        while worker.pending and worker.unanswered + len(body) > _MAX_UNANSWERED:
            worker.receive()
        worker.send(request, flush=False)
    return request


@dataclass(eq=False)
class Request:
    """A request to the template worker process. The answer is added when it is received.

    Attributes:
        action: a key of `worker.main.ACTIONS`.
        template: the template.
        body: the encoded arguments.
        cpu_seconds: the CPU limit of the first attempt.
        answer: answer of the worker, or `None` before it is received.
        exceeded: number of attempts that exceeded the limits.
        lost: number of attempts in which the worker ended for an external reason.
    """

    action: str
    template: Template
    body: bytes
    cpu_seconds: float
    answer: dict[str, Any] | None = None
    exceeded: int = 0
    lost: int = 0

    @property
    def frame(self) -> list[Any]:
        """The values that are sent to the worker: action, template key, arguments and CPU limit."""
        return [self.action, self.template.key, self.body, self.cpu_seconds * (1 + self.exceeded)]

    def result(self) -> dict[str, Any]:
        """Wait for the answer of the worker, and return the answer.

        Raises:
            BadRow, TemplateRefused, RecursionError, LimitExceeded, StorageError: as in `call_worker`.
        """
        with _lock(os.getpid()):
            while self.answer is None:
                if self.exceeded >= _MAX_ATTEMPTS:
                    _exceeding.add(self.template.key)
                    raise LimitExceeded
                with suppress(WorkerEnded):
                    worker = _get_worker_for(self.template)
                    if self not in worker.pending:
                        # Send the request alone, so that it is the cause if the worker ends.
                        worker.receive_all()
                        worker.send(self)
                    worker.receive_until(self)
        answer = self.answer
        if "examination_ended" in answer:
            raise LimitExceeded
        if "bad_row" in answer:
            raise BadRow(**answer["bad_row"])
        if "template_refused" in answer:
            raise TemplateRefused(**answer["template_refused"])
        if "too_deep" in answer:
            raise RecursionError
        if "failed" in answer:
            raise InternalError("template", f"the template worker failed: {answer['failed']}")
        return answer


_exceeding: set[str] = set()
"""The keys of templates that exceeded their limits in this process."""


@lru_cache(maxsize=1)
def _lock(process_id: int) -> threading.Lock:  # noqa: ARG001  (a forked process needs a new lock, which is not held)
    return threading.Lock()


class WorkerEnded(Exception):
    """Raised if the worker process ends before it answers. The next request starts a new worker."""


@dataclass(frozen=True, eq=False)
class _Worker:
    """A running worker process, with the connection to the process and its unanswered requests.

    Attributes:
        process: the worker process.
        connection: the connection to the worker process.
        known_templates: keys of the templates that were sent to the process.
        user_files: sources of the files of the user that the process executed.
        pending: unanswered requests, oldest first.
        unsent: requests to send in the next frame.
    """

    process: subprocess.Popen[bytes]
    connection: Connection
    known_templates: set[str] = field(default_factory=set)
    user_files: set[str] = field(default_factory=set)
    pending: deque[Request] = field(default_factory=deque)
    unsent: list[list[Any]] = field(default_factory=list)

    @property
    def unanswered(self) -> int:
        """Total size of the unanswered requests in bytes."""
        return sum(len(request.body) for request in self.pending)

    def send(self, request: Request, *, flush: bool = True) -> None:
        """Send a request. If `flush` is false, the request may be sent later, together with other requests.

        Raises:
            WorkerEnded: the worker has ended.
        """
        if request.template.key not in self.known_templates:
            self.known_templates.add(request.template.key)
            template = request.template
            if environment := template.environment:
                self.unsent.append(["set_environment", template.key, protocol.encode_values(environment), 0.0])
            self.unsent.append(["define_template", template.key, template.description.encode(), 0.0])
        self.unsent.append(request.frame)
        self.pending.append(request)
        if flush or sum(len(body) for _, _, body, _ in self.unsent) >= _MIN_FRAME:
            self._exchange(self._flush)

    def receive(self) -> None:
        """Receive the answers to the oldest unanswered requests that were sent together.

        Raises:
            WorkerEnded: the worker has ended.
        """
        self._exchange(self._receive)

    def receive_all(self) -> None:
        """Receive the answers to all pending requests.

        Raises:
            WorkerEnded: the worker has ended.
        """
        while self.pending:
            self.receive()

    def receive_until(self, request: Request) -> None:
        """Receive answers until `request` is answered or exceeds its limits.

        Raises:
            WorkerEnded: the worker has ended.
        """
        exceeded = request.exceeded
        while request.answer is None and request.exceeded == exceeded:
            self.receive()

    def _flush(self) -> None:
        if self.unsent:
            self.connection.send_bytes(protocol.encode_values(self.unsent))
            self.unsent.clear()

    def _receive(self) -> None:
        self._flush()
        for answer in map(protocol.decode_values, protocol.decode_values(self.connection.recv_bytes())):
            request = self.pending.popleft()
            if "output_too_long" in answer:
                # Every attempt would have the same output.
                request.exceeded = _MAX_ATTEMPTS
            else:
                request.answer = answer

    def _exchange(self, transfer: Callable[[], None]) -> None:
        """Send or receive data. Stop the worker if the connection fails or the transfer is interrupted."""
        try:
            transfer()
        except (OSError, EOFError):
            self._count_end()
            raise WorkerEnded from None
        except BaseException:
            # Also on Ctrl-C: a late answer must not be read as the answer to another request.
            self.stop()
            raise

    def _count_end(self) -> None:
        """Record the end of the worker in all pending requests, since any of these requests may be the cause.

        Raises:
            StorageError: `template_worker_lost`, if too many workers ended for external reasons.
        """
        pending = list(self.pending)
        status = self.process.wait()
        self.stop()
        for request in pending:
            if -status == signal.SIGALRM and len(pending) == 1:
                request.exceeded = _MAX_ATTEMPTS
                continue
            if -status in _ENDED_BY_TEMPLATE:
                # Several requests are repeated one by one to find the request that exceeds the limits.
                request.exceeded = request.exceeded + 1 if len(pending) == 1 else 1
                continue
            request.lost += 1
            if request.lost >= MAX_LOST:
                problem = f"the template worker process ended unexpectedly {MAX_LOST} times (exit status {status})"
                hint = "check whether the system runs out of memory, then run the command again to resume"
                raise StorageError("template_worker_lost", problem, hint=hint)

    def stop(self) -> None:
        """Kill the worker process. The next request starts a new worker."""
        if _current[-1:] == [self]:
            _current.clear()
        self.pending.clear()
        self.process.kill()
        self.process.wait()
        self.connection.close()


_ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "PYTHONPYCACHEPREFIX", "TMPDIR", "TZ")
"""The environment variables of the worker. They contain no tokens or keys."""

_current: list[_Worker] = []
"""The worker of this process, if there is one."""

_owner: list[int] = []
"""The id of the process that `_current` belongs to. A forked process must not use the worker of its parent."""


def _get_worker() -> _Worker:
    """Return the worker that belongs to the current process. Start a worker if none is running."""
    if _owner != [os.getpid()]:
        _current.clear()
        _owner[:] = [os.getpid()]
    if not _current:
        _current.append(_start_process())
    return _current[0]


def end_user_code() -> None:
    """End the worker if it executed code of the user, so that the next build executes the present code."""
    with _lock(os.getpid()):
        if _owner == [os.getpid()] and _current and _current[0].user_files:
            _current[0].stop()


def _get_worker_for(template: Template) -> _Worker:
    """Return the worker of the current process. A worker executes the code of only one file of the user.

    The modules of two files can have the same names, and a changed module would not be imported again.

    Raises:
        WorkerEnded: as in `_Worker.receive_all`.
    """
    worker = _get_worker()
    if template.is_user_code and template.key not in worker.known_templates:
        if worker.user_files - {template.source}:
            worker.receive_all()
            worker.stop()
            worker = _get_worker()
        worker.user_files.add(template.source)
    return worker


def _start_process() -> _Worker:
    path = os.pathsep.join(str(folder) for folder in sys.path if folder)
    connection, worker_connection = Pipe()
    process = subprocess.Popen(  # noqa: S603  (this interpreter, with a list of arguments)
        [sys.executable, "-P", "-m", "ftdata.templates.worker.main", str(worker_connection.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[worker_connection.fileno()],
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        start_new_session=True,
    )
    worker_connection.close()
    return _Worker(process, connection)


@atexit.register
def _stop_worker() -> None:
    # A forked process inherits this function, but must not stop the worker of its parent.
    if _owner == [os.getpid()] and _current:
        _current[0].stop()
