"""Examine templates in a process of their own: they are code from strangers, and may loop, or fill the memory.

The verdict is kept by content: the same template with the same tokens and options is examined once.
"""

from __future__ import annotations

import atexit
import datetime
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import xxhash

from ftdata._version import __version__
from ftdata.errors import InternalError, TemplateRefused
from ftdata.templates.template import Template
from ftdata.templates.verify import TemplateReport, examine

SECONDS = 5
MEGABYTES = 512


def verify(template: Template) -> TemplateReport:
    """Examine a template in a child process of at most 5 s and 512 MB, or remember what was found.

    Verdicts are kept in `$XDG_CACHE_HOME/ftdata` (`~/.cache/ftdata`), where that can be written.

    Raises:
        TemplateRefused: it cannot be compiled; `template_limits`: it takes more time or memory than any template
            needs.
    """
    return _examined(json.dumps(_description(template), sort_keys=True))


def trusted(template: Template) -> Template:
    """Return the template, examined and not contradicted.

    Raises:
        TemplateRefused: as `verify`, or `template_unproved`: two ways of finding what is trained disagree about it.
    """
    if template.source and (against := verify(template).contradictions):
        raise TemplateRefused(
            "template_unproved",
            f"two ways of finding what template {template.name!r} has the model produce disagree: {against[0]}",
            hint="mark what is trained with {% generation %} in a template file of your own",
        )
    return template


def _description(template: Template) -> dict[str, Any]:
    return {
        "name": template.name,
        "source": template.source,
        "strict": template.strict,
        "special_tokens": dict(template.special_tokens),
        "control": template.control.pattern if template.control is not None else None,
        "date": template.date.isoformat(),
        "kwargs": dict(template.kwargs),
    }


@lru_cache(maxsize=1024)
def _examined(description: str) -> TemplateReport:
    key = xxhash.xxh3_128_hexdigest(f"{__version__} {_own_code()} {description}".encode())
    file = _cache() / f"{key}.json"
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return _report(json.loads(file.read_text(encoding="utf-8")))
    answer = _ask(description)
    if "failed" in answer:
        raise InternalError("template_examination", answer["failed"])
    if "refused" in answer:
        raise TemplateRefused(**answer["refused"])
    with suppress(OSError):
        _keep(file, json.dumps(answer["report"]))
    return _report(answer["report"])


def _report(found: Mapping[str, Any]) -> TemplateReport:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return TemplateReport(**fields)


@lru_cache(maxsize=1)
def _own_code() -> str:
    """Return a hash of the modules that reach a verdict: an editable install changes without a new version."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return xxhash.xxh3_64_hexdigest(b"".join(file.read_bytes() for file in files))


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftdata" / "verdicts"
    except RuntimeError:
        # No home, and a user that is not known, as in many containers: nothing is kept there.
        return Path(os.devnull) / "verdicts"


def _keep(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as temporary:
        temporary.write(text)
    Path(temporary.name).replace(file)


def _ask(description: str) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return _asked(description)
    # A server that was killed from outside says nothing about the template: it is asked once more.
    try:
        return _asked(description)
    except (OSError, ValueError):
        raise _over_limits(description) from None


def _asked(description: str) -> dict[str, Any]:
    with _lock(os.getpid()):
        server = _server(os.getpid())
        try:
            server.stdin.write(description + "\n")
            server.stdin.flush()
            return dict(json.loads(server.stdout.readline()))
        except BaseException:
            # Interrupted while waiting, too: the answer that is still to come must not be taken for another's.
            server.stop()
            raise


def _over_limits(description: str) -> TemplateRefused:
    return TemplateRefused(
        "template_limits",
        f"template {json.loads(description)['name']!r} needs more than {SECONDS} s or {MEGABYTES} MB for a few small "
        "conversations",
        hint="use another template: this one loops, or is an attack",
    )


@lru_cache(maxsize=1)
def _lock(process_id: int) -> threading.Lock:  # noqa: ARG001  (a forked process needs one that nobody holds)
    return threading.Lock()


@dataclass(frozen=True)
class _Server:
    process: subprocess.Popen[str]
    stdin: IO[str]
    stdout: IO[str]

    def stop(self) -> None:
        """End the process, which holds nothing worth keeping; the next question starts another."""
        _server.cache_clear()
        self.process.kill()
        self.process.wait()
        for stream in (self.stdin, self.stdout):
            with suppress(OSError):
                stream.close()


@lru_cache(maxsize=1)
def _server(process_id: int) -> _Server:
    """Start the process that examines templates: one child of it for each, which starts in no time."""
    path = os.pathsep.join(str(entry) for entry in sys.path if entry)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "ftdata.templates.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    server = _Server(process, process.stdin, process.stdout)

    @atexit.register
    def stop() -> None:
        # A forked process inherits this, but not the server.
        if os.getpid() == process_id and process.poll() is None:
            server.stop()

    return server


def main() -> None:
    """Answer each line of stdin, a template's description, with one line: its report, or the refusal."""
    for line in sys.stdin:
        sys.stdout.write((_limited(line) if hasattr(os, "fork") else _answer(line)) + "\n")
        sys.stdout.flush()


def _limited(line: str) -> str:
    """Answer in a child of this process, which may use so much and no more."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _limit()
        with os.fdopen(writing, "w", encoding="utf-8") as stream:
            stream.write(_answer(line))
        os._exit(0)
    os.close(writing)
    answer = b""
    end = time.monotonic() + SECONDS
    while select.select([reading], [], [], max(0.0, end - time.monotonic()))[0] and (more := os.read(reading, 1 << 16)):
        answer += more
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return answer.decode() if answer.endswith(b"}") else json.dumps({"refused": _refusal(_over_limits(line))})


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(line: str) -> str:
    found = json.loads(line)
    control = re.compile(found["control"]) if found["control"] else None
    date = datetime.datetime.fromisoformat(found["date"])
    try:
        report = examine(Template(**{**found, "control": control, "date": date}))
    except TemplateRefused as error:
        return json.dumps({"refused": _refusal(error)})
    except MemoryError:
        return json.dumps({"refused": _refusal(_over_limits(line))})
    except Exception as error:  # noqa: BLE001  (told to the process that asked)
        return json.dumps({"failed": f"{type(error).__name__}: {error}"})
    return json.dumps({"report": report.as_dict()})


def _refusal(error: TemplateRefused) -> dict[str, str]:
    return {"code": error.code, "message": error.message, "hint": error.hint}


if __name__ == "__main__":
    main()
