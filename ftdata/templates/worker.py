"""The process in which templates run: answers each packet of stdin, a question, with one on stdout.

Templates are examined in a child of this process, each in one of its own, which starts in no time. Rows are rendered in
this process itself, which learns from each how to render others; it may use so much memory and no more, and is ended
by who asks where it takes too long.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftdata.errors import BadRow, TemplateRefused
from ftdata.templates import protocol, rendering
from ftdata.templates.process import BYTES_A_LETTER, EXAMINED_SECONDS, MEGABYTES
from ftdata.templates.template import Template, scaffold
from ftdata.templates.verify import contradicted, examine

_MOST_SAID = 2000
_LONG = 1 << 22


def _render(template: Template, asked: Mapping[str, Any]) -> dict[str, Any]:
    conversation = protocol.conversation(asked["conversation"])
    texts = rendering.render(conversation, template, asked["turns"], asked["dropped"])
    plans, template.plans.fresh = template.plans.fresh, []
    return {
        "texts": [protocol.of_rendered(one) for one in texts],
        "plans": [(shape, protocol.of_plan(plan)) for shape, plan in plans],
    }


def _contradict(template: Template, asked: Mapping[str, Any]) -> dict[str, Any]:
    conversation, rendered = protocol.conversation(asked["conversation"]), protocol.rendered(asked["rendered"])
    return {"found": contradicted(conversation, template, rendered, asked["most"])}


def _scaffold(template: Template, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": scaffold(template)}


def _examine(template: Template, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"report": examine(template).as_dict()}


DISHES: dict[str, Callable[[Template, Mapping[str, Any]], dict[str, Any]]] = {
    "render": _render,
    "contradict": _contradict,
    "scaffold": _scaffold,
    "examine": _examine,
}


def main() -> None:
    """Answer until nobody asks any more."""
    known: dict[str, Template] = {}
    received = bytearray()
    while part := os.read(0, 1 << 18):
        received += part
        made = bytearray()
        while (size := protocol.whole(received)) is not None:
            asked = protocol.unpacked(bytes(received[protocol.HEAD : size]))
            del received[:size]
            if "know" in asked:
                template = Template.described(asked["know"])
                known[template.key] = template
            else:
                made += _told(known[asked["template"]], asked, size)
        _write(made)


def _write(answers: bytes | bytearray) -> None:
    left = memoryview(answers)
    while left:
        left = left[os.write(1, left) :]


def _told(template: Template, asked: Mapping[str, Any], size: int) -> bytes:
    return _apart(template, asked) if asked["do"] == "examine" else _answer(template, asked, size)


def _apart(template: Template, asked: Mapping[str, Any]) -> bytes:
    """Answer in a child of this process, which knows nothing of other templates afterwards."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (EXAMINED_SECONDS, EXAMINED_SECONDS))
        with os.fdopen(writing, "wb") as stream:
            stream.write(_answer(template, asked, 0))
        os._exit(0)
    os.close(writing)
    answer = bytearray()
    end = time.monotonic() + EXAMINED_SECONDS
    while select.select([reading], [], [], max(0.0, end - time.monotonic()))[0] and (more := os.read(reading, 1 << 16)):
        answer += more
    os.close(reading)
    with suppress(OSError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return bytes(answer) if protocol.whole(answer) == len(answer) else protocol.packet({"over": True})


def _answer(template: Template, asked: Mapping[str, Any], size: int) -> bytes:
    restored = _limited(size)
    try:
        made = protocol.packet(DISHES[asked["do"]](template, asked))
        return made if len(made) < _LONG + BYTES_A_LETTER * size else protocol.packet({"over": True})
    except BadRow as error:
        return protocol.packet({"bad": {**_said(error), "field": error.field}})
    except TemplateRefused as error:
        return protocol.packet({"refused": _said(error)})
    except RecursionError:
        return protocol.packet({"deep": True})
    except MemoryError:
        return protocol.packet({"over": True})
    except Exception as error:  # noqa: BLE001  (told to the process that asked)
        return protocol.packet({"failed": f"{type(error).__name__}: {error}"[:_MOST_SAID]})
    finally:
        restored()


def _said(error: BadRow | TemplateRefused) -> dict[str, str]:
    return {"code": error.code, "message": error.message[:_MOST_SAID], "where": error.where, "hint": error.hint}


def _limited(size: int) -> Callable[[], None]:
    """Limit the memory of this process from here on, and return what lifts that."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return lambda: None
    kind, (before, most) = resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)
    room = pages * resource.getpagesize() + (MEGABYTES << 20) + BYTES_A_LETTER * size
    resource.setrlimit(kind, (room if most < 0 else min(room, most), most))
    return lambda: resource.setrlimit(kind, (before, most))


if __name__ == "__main__":
    # What a row leaves behind is in no cycle, but for errors.
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)
    main()
