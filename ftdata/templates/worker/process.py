"""Run templates in a worker process: they are untrusted code, which may loop forever or fill the memory.

Each process has one worker (`ftdata.templates.worker.main`), which is replaced when it ends. Requests and answers are
frames of a `multiprocessing` connection; `ftdata.templates.worker.protocol` defines their contents.

Limits are counted in CPU time of the worker, never in wall time: what becomes of a row must not depend on what else the
machine does. The limit of a request follows from its size alone, and is many times what honest templates need. A worker
that exceeds it is ended by the kernel (SIGPROF). The request is then repeated once, alone and with twice the limit, in
a new worker; only if that fails too, the row is rejected.
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
"""CPU limit of a request: seconds, one more for so many characters, and so many for each step (`steps`)."""

EXAMINE_CPU_SECONDS = 3.0
"""CPU limit of the examination of a template."""

MEGABYTES, BYTES_PER_CHARACTER = 512, 64
"""Memory limit of a request: megabytes, and bytes for every character of it."""

MAX_STEPS = 1 << 22
"""Conversations with more steps (messages times answers) are rejected: each answer needs renderings of its own."""

MAX_LOST = 5
"""How often a worker may end for reasons outside of its control (killed, out of memory) before the build stops."""

_MAX_ATTEMPTS = 2
"""How often a request may exceed its limits."""

_MAX_UNANSWERED, _MIN_FRAME = 1 << 15, 1 << 13
"""Bytes sent before answers are read, well below the buffer of a socket; and bytes that requests are collected to."""

_ENDED_BY_TEMPLATE = {signal.SIGPROF, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}
"""Signals by which a template ends its worker: the CPU limit, and crashes such as an overflow of the C stack."""


class LimitExceeded(Exception):
    """The template needs more CPU time or memory than its request is allowed."""


def start_worker() -> None:
    """Start the worker of this process unless it is running, so that it is ready by the first request."""
    with _lock(os.getpid()):
        _worker()


def call_worker(action: str, template: Template, **arguments: Any) -> dict[str, Any]:
    """Have the worker do something with a template, and return its answer.

    Args:
        action: one of `worker.ACTIONS`.
        template: the template.
        arguments: JSON values that the action takes.

    Raises:
        BadRow, TemplateRefused: the action raises it.
        RecursionError: the arguments are nested too deep.
        LimitExceeded: the template exceeds its limits.
        StorageError: `template_worker_lost`: workers end again and again for other reasons.
    """
    return submit_request(action, template, **arguments).result()


def submit_request(action: str, template: Template, steps: int = 0, **arguments: Any) -> Request:
    """Send a request as `call_worker` does, and return without waiting for the answer.

    Args:
        action: one of `worker.ACTIONS`.
        template: the template.
        steps: how often a template looks at a message, at least: this scales the CPU limit.
        arguments: JSON values that the action takes.
    """
    body = protocol.encode_values(arguments)
    limit = CPU_SECONDS + len(body) / CHARACTERS_PER_SECOND + steps * SECONDS_PER_STEP
    request = Request(action, template, body, limit)
    if template.key in _exceeding:
        # The last attempt decides. It comes at once, alone, where it is to be expected.
        request.exceeded = _MAX_ATTEMPTS - 1
        return request
    with _lock(os.getpid()), suppress(WorkerEnded):
        worker = _worker()
        # Sending more than the socket's buffer holds would wait for a worker that waits for us.
        while worker.pending and worker.unanswered + len(body) > _MAX_UNANSWERED:
            worker.receive()
        worker.send(request, flush=False)
    return request


@dataclass(eq=False)
class Request:
    """A request to the worker and, once received, its answer.

    Attributes:
        action: one of `worker.ACTIONS`.
        template: the template.
        body: the encoded arguments.
        cpu_seconds: the CPU limit of the first attempt.
        answer: what the worker answered; `None` until then.
        exceeded: how many attempts exceeded the limits.
        lost: how many attempts ended with a worker that something else had killed.
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
        """The request as it is sent."""
        return [self.action, self.template.key, self.body, self.cpu_seconds * (1 + self.exceeded)]

    def result(self) -> dict[str, Any]:
        """Wait for the answer and return it.

        Raises:
            BadRow, TemplateRefused, RecursionError, LimitExceeded, StorageError: as `call_worker` does.
        """
        with _lock(os.getpid()):
            while self.answer is None:
                if self.exceeded >= _MAX_ATTEMPTS:
                    _exceeding.add(self.template.key)
                    raise LimitExceeded
                with suppress(WorkerEnded):
                    worker = _worker()
                    if self not in worker.pending:
                        # Alone, so that a worker that ends is known to end because of this request.
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
            raise InternalError("template", answer["failed"])
        return answer


_exceeding: set[str] = set()
"""The keys of templates that exceeded their limits in this process."""


@lru_cache(maxsize=1)
def _lock(process_id: int) -> threading.Lock:  # noqa: ARG001  (a forked process needs a lock that nobody holds)
    return threading.Lock()


class WorkerEnded(Exception):
    """The worker ended before it answered; it was replaced or will be."""


@dataclass(frozen=True, eq=False)
class _Worker:
    """The worker process, and the requests that it has not answered yet, oldest first."""

    process: subprocess.Popen[bytes]
    connection: Connection
    known_templates: dict[str, Template] = field(default_factory=dict)
    pending: deque[Request] = field(default_factory=deque)
    unsent: list[list[Any]] = field(default_factory=list)

    @property
    def unanswered(self) -> int:
        """Bytes of the requests that are not answered yet."""
        return sum(len(request.body) for request in self.pending)

    def send(self, request: Request, *, flush: bool = True) -> None:
        """Send a request; with `flush=False`, maybe only together with the next ones.

        Raises:
            WorkerEnded: the worker has ended.
        """
        if self.known_templates.get(request.template.key) is not request.template:
            # An equal template that was made anew has none of the plans that the worker has sent before.
            self.known_templates[request.template.key] = request.template
            self.unsent.append(["define_template", request.template.key, request.template.description.encode(), 0.0])
        self.unsent.append(request.frame)
        self.pending.append(request)
        if flush or sum(len(body) for _, _, body, _ in self.unsent) >= _MIN_FRAME:
            self._guarded(self._flush)

    def receive(self) -> None:
        """Receive the answers to the requests that were sent together and are the oldest unanswered ones.

        Raises:
            WorkerEnded: the worker has ended.
        """
        self._guarded(self._receive)

    def receive_all(self) -> None:
        """Receive all answers.

        Raises:
            WorkerEnded: the worker has ended.
        """
        while self.pending:
            self.receive()

    def receive_until(self, request: Request) -> None:
        """Receive answers until there is one for this request, or an attempt at it exceeded the limits.

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
                # It is as long however often the request is repeated.
                request.exceeded = _MAX_ATTEMPTS
            else:
                request.answer = answer

    def _guarded(self, exchange: Callable[[], None]) -> None:
        """Exchange frames with the worker; replace it when it ends, and when anything interrupts the exchange."""
        try:
            exchange()
        except (OSError, EOFError):
            self._count_end()
            raise WorkerEnded from None
        except BaseException:
            # Also Ctrl-C: an answer that is still to come must not be taken for the answer to another request.
            self.stop()
            raise

    def _count_end(self) -> None:
        """Count, for each pending request, that the worker ended; which of several ended it is not known.

        Raises:
            StorageError: something kills the workers.
        """
        pending = list(self.pending)
        status = self.process.wait()
        self.stop()
        for request in pending:
            if -status in _ENDED_BY_TEMPLATE:
                # Each of several requests is repeated alone. Only then it is known which of them is to blame.
                request.exceeded = request.exceeded + 1 if len(pending) == 1 else 1
                continue
            request.lost += 1
            if request.lost >= MAX_LOST:
                raise StorageError(
                    "template_worker_lost",
                    f"the process that runs templates ended {MAX_LOST} times (exit status {status})",
                    hint="is there too little memory, or does something kill it? Run the command again to resume",
                )

    def stop(self) -> None:
        """End the process, which holds nothing worth keeping; the next request starts another."""
        if _current[-1:] == [self]:
            _current.clear()
        self.pending.clear()
        self.process.kill()
        self.process.wait()
        self.connection.close()


_ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "PYTHONPYCACHEPREFIX", "TMPDIR", "TZ")
"""The environment variables that the worker gets: tokens and keys are not among them."""

_current: list[_Worker] = []
"""The worker of this process, if there is one."""

_owner: list[int] = []
"""The process that `_current` belongs to: a forked process must not use the worker of its parent."""


def _worker() -> _Worker:
    """Return the running worker of this process; start one if there is none."""
    if _owner != [os.getpid()]:
        _current.clear()
        _owner[:] = [os.getpid()]
    if not _current:
        _current.append(_start())
    return _current[0]


def _start() -> _Worker:
    path = os.pathsep.join(str(entry) for entry in sys.path if entry)
    ours, theirs = Pipe()
    process = subprocess.Popen(  # noqa: S603  (our own interpreter, with a list of arguments)
        [sys.executable, "-P", "-m", "ftdata.templates.worker.main", str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        start_new_session=True,
    )
    theirs.close()
    return _Worker(process, ours)


@atexit.register
def _stop_worker() -> None:
    # A forked process inherits this function, but must not stop the worker of its parent.
    if _owner == [os.getpid()] and _current:
        _current[0].stop()
