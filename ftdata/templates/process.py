"""Templates run in a process of their own: they are code from strangers, and may loop, or fill the memory.

Each process of ours has one such child, which it ends, and begins anew, where an answer takes too long (`kitchen` is
what runs there, `wire` says how values are sent).
"""

from __future__ import annotations

import atexit
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ftdata.errors import BadRow, InternalError, TemplateRefused
from ftdata.templates.protocol import HEAD, packet, unpacked, whole
from ftdata.templates.template import Template

SECONDS, LETTERS_A_SECOND = 2.5, 20_000
"""How long an answer may take: seconds, and one more for every so many characters of the question."""

AHEAD_SECONDS, AGAIN_SECONDS = 0.5, 1.0
"""How long one of several queued answers may take before each is asked for by itself; and any of a template that took
too long before."""

EXAMINED_SECONDS = 3
"""How long it may take to examine a template."""

MEGABYTES, BYTES_A_LETTER = 512, 64
"""How much memory it may take: megabytes, and bytes for every character of the question."""

MOST_OVER, APART = 2, 100
"""A template is refused with so many rows over these limits, if fewer than so many rows lie between them."""

_PIPE, _TOGETHER = 1 << 15, 1 << 13
"""Bytes sent before answers are read: half of what a pipe holds; and from how many on the buffer is flushed."""

_over: Counter[str] = Counter()
_since: Counter[str] = Counter()
"""Of each template: the rows that went over the limits, and those that did not since."""


class OverLimits(Exception):
    """The child took too long, too much memory, or was ended by what it did."""


def warm() -> None:
    """Begin the child, if there is none."""
    with _lock(os.getpid()):
        _server(os.getpid())


def ask(do: str, template: Template, seconds: float | None = None, **given: Any) -> dict[str, Any]:
    """Return what the child answers.

    Args:
        do: what it shall do, one of `kitchen.DISHES`.
        template: with which.
        seconds: how long that may take; `None`: as long as it may for so much.
        given: with what, as plain values.

    Raises:
        BadRow, TemplateRefused: as it finds.
        RecursionError: what is given is nested too deep.
        OverLimits: it does not answer.
    """
    return begin(do, template, seconds, **given).answer()


def begin(do: str, template: Template, seconds: float | None = None, **given: Any) -> Asked:
    """Ask as `ask` does, and do not wait: while the child is at work, so may this process be."""
    sent = packet({"do": do, "template": template.key, **given})
    wait = AGAIN_SECONDS if template.key in _over else SECONDS
    asked = Asked(template, sent, seconds or wait + len(sent) / LETTERS_A_SECOND)
    with _lock(os.getpid()), suppress(OSError):
        server = _server(os.getpid())
        # What does not fit into a pipe would make us wait for a child that waits for us.
        while server.waiting and server.room < len(sent):
            server.receive(server.waiting[0])
        if server.room >= len(sent):
            server.send(asked, now=False)
    return asked


@dataclass(eq=False)
class Asked:
    """A question, and the answer when there is one; `over`: there will be none."""

    template: Template
    sent: bytes
    wait: float
    found: dict[str, Any] | None = None
    over: bool = False

    def answer(self) -> dict[str, Any]:
        """Wait for the answer, and return it.

        Raises:
            BadRow, TemplateRefused, RecursionError, OverLimits: as `ask` does.
        """
        with _lock(os.getpid()):
            # A child that was ended, by another question or from outside, says nothing about this one: another is
            # asked, and one more.
            for _ in range(3):
                if self.found is None and not self.over:
                    with suppress(OSError):
                        server = _server(os.getpid())
                        if self not in server.waiting:
                            server.receive_all()
                            server.send(self)
                        server.receive(self)
        if self.found is None or "over" in self.found:
            raise OverLimits
        if self.template.key in _over:
            _since[self.template.key] += 1
        if "bad" in self.found:
            raise BadRow(**self.found["bad"])
        if "refused" in self.found:
            raise TemplateRefused(**self.found["refused"])
        if "deep" in self.found:
            raise RecursionError
        if "failed" in self.found:
            raise InternalError("template", self.found["failed"])
        return self.found


def over_limits(template: Template) -> BadRow | TemplateRefused:
    """Return what is said of a template that takes too much on a row; when it does so often, on all."""
    _over[template.key] = 1 if _since.pop(template.key, 0) >= APART else _over[template.key] + 1
    found = f"template {template.name!r} needs more than {SECONDS} s or {MEGABYTES} MB"
    hint = "use another template: this one loops, or is an attack"
    if _over[template.key] < MOST_OVER:
        return BadRow("template_limits", f"{found} for this row", hint=hint)
    return TemplateRefused("template_limits", f"{found} for each of {MOST_OVER} rows", hint=hint)


@lru_cache(maxsize=1)
def _lock(process_id: int) -> threading.Lock:  # noqa: ARG001  (a forked process needs one that nobody holds)
    return threading.Lock()


@dataclass(frozen=True, eq=False)
class _Server:
    """The child, and the questions that it has not answered yet, in the order in which it will."""

    process: subprocess.Popen[bytes]
    known: set[str] = field(default_factory=set)
    waiting: deque[Asked] = field(default_factory=deque)
    unsent: bytearray = field(default_factory=bytearray)
    unread: bytearray = field(default_factory=bytearray)

    @property
    def room(self) -> int:
        """How many bytes may be sent without waiting for answers."""
        return _PIPE - sum(len(asked.sent) for asked in self.waiting)

    def send(self, asked: Asked, *, now: bool = True) -> None:
        """Send a question; several at once, where that has time.

        Raises:
            OSError: nobody reads it.
        """
        if asked.template.key not in self.known:
            self.known.add(asked.template.key)
            self.unsent.extend(packet({"know": asked.template.description}))
        self.unsent.extend(asked.sent)
        self.waiting.append(asked)
        if now or len(self.unsent) >= _TOGETHER:
            self._flush()

    def _flush(self) -> None:
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(self.unsent)
            self.process.stdin.flush()
            self.unsent.clear()
        except BaseException:
            self.stop()
            raise

    def receive_all(self) -> None:
        """Take all answers."""
        while self.waiting:
            self.receive(self.waiting[-1])

    def receive(self, asked: Asked) -> None:
        """Take answers until a question has its own; who waits in vain ends the child.

        Raises:
            OSError: the child has ended.
        """
        self._flush()
        try:
            while self.waiting and asked.found is None:
                first = self.waiting[0]
                # Of several, nobody knows at which the child is.
                alone = len(self.waiting) == 1
                first.found = unpacked(self._read(first.wait if alone else AHEAD_SECONDS))
                self.waiting.popleft()
                if "over" in first.found:
                    # So much memory is not given back.
                    self.stop()
        except OverLimits:
            first.over = alone
            self.stop()
        except ValueError:
            self.stop()
            raise OSError from None
        except BaseException:
            # Interrupted while waiting, too: the answer that is still to come must not be taken for another's.
            self.stop()
            raise

    def _read(self, wait: float) -> bytes:
        """Return the packet that comes within so many seconds, without its head.

        Raises:
            OverLimits: none does.
            OSError: none will.
        """
        assert self.process.stdout is not None
        end, descriptor = time.monotonic() + wait, self.process.stdout.fileno()
        while (size := whole(self.unread)) is None:
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                raise OverLimits
            part = os.read(descriptor, 1 << 18)
            if not part:
                raise OSError
            self.unread.extend(part)
        found = bytes(self.unread[HEAD:size])
        del self.unread[:size]
        return found

    def stop(self) -> None:
        """End the process, which holds nothing worth keeping; the next question starts another."""
        _server.cache_clear()
        self.waiting.clear()
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]  # they are pipes


_KEPT = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "PYTHONPYCACHEPREFIX", "TMPDIR", "TZ")
"""What of the environment the process is given: where Python and its libraries are, and how they spell."""


@lru_cache(maxsize=1)
def _server(process_id: int) -> _Server:
    path = os.pathsep.join(str(entry) for entry in sys.path if entry)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "ftdata.templates.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Tokens and keys are no business of what runs there.
        env={name: os.environ[name] for name in _KEPT if name in os.environ}
        | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        start_new_session=True,
    )
    server = _Server(process)

    @atexit.register
    def stop() -> None:
        # A forked process inherits this, but not the server.
        if os.getpid() == process_id and process.poll() is None:
            server.stop()

    return server
