"""The worker process in which templates run: answers each frame of requests with a frame of answers.

Every request has a limit of CPU time and of memory. The kernel ends this process where a template exceeds one
(SIGPROF); the process that sent the request starts another worker. Templates are examined in a fork of this process,
which ends without taking the worker with it.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from ftdata.errors import BadRow, TemplateRefused
from ftdata.templates import render_chat
from ftdata.templates.template import Template, render_scaffold
from ftdata.templates.verification.probe import describe_contradiction, probe_template
from ftdata.templates.worker import protocol
from ftdata.templates.worker.process import BYTES_PER_CHARACTER, EXAMINE_CPU_SECONDS, MEGABYTES

_MAX_MESSAGE = 2000
_MAX_OUTPUT = 1 << 22


def _render(template: Template, arguments: Mapping[str, Any]) -> dict[str, Any]:
    conversation = protocol.decode_conversation(arguments["conversation"])
    texts = render_chat.render_chat(conversation, template, arguments["turns"], arguments["on_dropped_message"])
    plans, template.plans.fresh = template.plans.fresh, []
    return {
        "texts": [protocol.encode_rendered_row(one) for one in texts],
        "plans": [(shape, protocol.encode_plan(plan)) for shape, plan in plans],
    }


def _contradict(template: Template, arguments: Mapping[str, Any]) -> dict[str, Any]:
    conversation, rendered = (
        protocol.decode_conversation(arguments["conversation"]),
        protocol.decode_rendered_row(arguments["rendered"]),
    )
    return {"found": describe_contradiction(conversation, template, rendered, arguments["most"])}


def _scaffold(template: Template, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": render_scaffold(template)}


def _examine(template: Template, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"report": probe_template(template).as_dict()}


ACTIONS: dict[str, Callable[[Template, Mapping[str, Any]], dict[str, Any]]] = {
    "render": _render,
    "contradict": _contradict,
    "scaffold": _scaffold,
    "examine": _examine,
}


def main(connection: Connection) -> None:
    """Answer requests until the other process closes the connection."""
    # Both may be inherited otherwise.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    templates: dict[str, Template] = {}
    with suppress(EOFError, OSError):
        while True:
            answers = list[bytes]()
            for action, key, body, cpu_seconds in protocol.decode_values(connection.recv_bytes()):
                if action == "define_template":
                    templates[key] = Template.described(body.decode())
                elif action == "examine":
                    answers.append(_answer_in_fork(templates[key], action, body))
                else:
                    answers.append(_answer(templates[key], action, body, cpu_seconds))
            connection.send_bytes(protocol.encode_values(answers))


def _answer_in_fork(template: Template, action: str, body: bytes) -> bytes:
    """Answer in a fork of this process, which ends with all that it learned of the template."""
    receiver, sender = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            sender.send_bytes(_answer(template, action, body, EXAMINE_CPU_SECONDS))
        finally:
            os._exit(0)
    sender.close()
    try:
        return receiver.recv_bytes()
    except (OSError, EOFError):
        return protocol.encode_values({"examination_ended": True})
    finally:
        receiver.close()
        os.waitpid(child, 0)


def _answer(template: Template, action: str, body: bytes, cpu_seconds: float) -> bytes:
    """Return the encoded answer to one request; the limits hold until it is encoded."""
    with _memory_limit(len(body)):
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            answer = protocol.encode_values(ACTIONS[action](template, protocol.decode_values(body)))
            too_long = len(answer) > _MAX_OUTPUT + BYTES_PER_CHARACTER * len(body)
            return protocol.encode_values({"output_too_long": len(answer)}) if too_long else answer
        except BadRow as error:
            return protocol.encode_values({"bad_row": {**_described(error), "field": error.field}})
        except TemplateRefused as error:
            return protocol.encode_values({"template_refused": _described(error)})
        except RecursionError:
            return protocol.encode_values({"too_deep": True})
        except MemoryError:
            # As when the CPU limit is exceeded; the memory would not be given back, either.
            os.kill(os.getpid(), signal.SIGPROF)
            raise
        except Exception as error:  # noqa: BLE001  (reported to the process that sent the request)
            return protocol.encode_values({"failed": f"{type(error).__name__}: {error}"[:_MAX_MESSAGE]})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _described(error: BadRow | TemplateRefused) -> dict[str, str]:
    return {"code": error.code, "message": error.message[:_MAX_MESSAGE], "where": error.where, "hint": error.hint}


@contextmanager
def _memory_limit(size: int) -> Iterator[None]:
    """Limit how much memory this process may take, beyond what it has, for a request of so many bytes."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    kind, (before, most) = resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)
    room = pages * resource.getpagesize() + (MEGABYTES << 20) + BYTES_PER_CHARACTER * size
    resource.setrlimit(kind, (room if most < 0 else min(room, most), most))
    try:
        yield
    finally:
        resource.setrlimit(kind, (before, most))


if __name__ == "__main__":
    # What a row leaves behind is in no cycle, but for errors.
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)
    main(Connection(int(sys.argv[1])))
