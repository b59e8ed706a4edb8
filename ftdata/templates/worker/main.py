"""The program of the worker process, which runs untrusted templates and answers requests of the main process.

The worker answers each frame of requests with a frame of answers. Every request has a limit of CPU time and memory.
If a template exceeds a limit, the kernel ends the worker (SIGPROF), and the main process starts a new worker. Templates
are examined in a fork of the worker, so that the worker survives a failed examination.

Templates that are Python functions of the user have no memory limit. They have a limit of wall time (SIGALRM), because
they can wait. They are not examined in a fork.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from ftdata.errors import BadRow, TemplateRefused
from ftdata.templates import render_chat
from ftdata.templates.python_template import template_from_description
from ftdata.templates.render_cache import render_cache
from ftdata.templates.template import Template, render_or_none, render_scaffold
from ftdata.templates.verification.probe import describe_contradiction, probe_template
from ftdata.templates.worker import protocol
from ftdata.templates.worker.process import (
    BYTES_PER_CHARACTER,
    MEGABYTES,
    PREPARE_SECONDS,
)

_MAX_MESSAGE = 2000
_MAX_OUTPUT = 1 << 22


def _render(template: Template, arguments: Mapping[str, Any]) -> dict[str, Any]:
    conversation = protocol.decode_conversation(arguments["conversation"])
    texts = render_chat.render_chat(conversation, template, arguments["turns"], arguments["on_dropped_message"])
    cache = render_cache(template.key)
    layouts, cache.new_layouts = cache.new_layouts, []
    return {
        "texts": [protocol.encode_rendered_row(text) for text in texts],
        "layouts": [protocol.encode_layout(key, layout) for key, layout in layouts],
    }


def _cross_check(template: Template, arguments: Mapping[str, Any]) -> dict[str, Any]:
    conversation, rendered = (
        protocol.decode_conversation(arguments["conversation"]),
        protocol.decode_rendered_row(arguments["rendered"]),
    )
    return {"contradiction": describe_contradiction(conversation, template, rendered, arguments["max_messages"])}


def _scaffold(template: Template, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": render_scaffold(template)}


def _examine(template: Template, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"report": probe_template(template).as_dict()}


def _render_plain(template: Template, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"texts": [render_or_none(template, variables) for variables in arguments["cases"]]}


ACTIONS: dict[str, Callable[[Template, Mapping[str, Any]], dict[str, Any]]] = {
    "render": _render,
    "cross_check": _cross_check,
    "scaffold": _scaffold,
    "render_plain": _render_plain,
    "examine": _examine,
}


def main(connection: Connection) -> None:
    """Receive requests from the main process and answer them until the connection is closed."""
    # A different handler and a blocked signal may be inherited from the parent process.
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    templates: dict[str, Template] = {}
    with suppress(EOFError, OSError):
        while True:
            answers = list[bytes]()
            for action, key, body, cpu_seconds in protocol.decode_values(connection.recv_bytes()):
                if action == "set_environment":
                    os.environ.update(protocol.decode_values(body))
                elif action == "define_template":
                    templates[key] = template_from_description(body.decode())
                    _prepare(templates[key])
                elif action == "examine" and not templates[key].is_user_code:
                    # In a fork, the code of a user would lack the threads that it started before.
                    answers.append(_answer_in_fork(templates[key], action, body, cpu_seconds))
                else:
                    answers.append(_answer(templates[key], action, body, cpu_seconds))
            connection.send_bytes(protocol.encode_values(answers))


def _prepare(template: Template) -> None:
    """Prepare a template. SIGALRM ends the process if the code of the user waits forever."""
    signal.setitimer(signal.ITIMER_REAL, PREPARE_SECONDS)
    template.prepare()
    signal.setitimer(signal.ITIMER_REAL, 0)


def _answer_in_fork(template: Template, action: str, body: bytes, cpu_seconds: float) -> bytes:
    """Answer a request in a fork of the worker process, so that the worker survives if the request fails."""
    receiver, sender = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            sender.send_bytes(_answer(template, action, body, cpu_seconds))
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
    """Run the action of a request within the CPU and memory limits, and return the encoded answer."""
    with nullcontext() if template.is_user_code else _memory_limit(len(body)):
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        # Sandboxed templates cannot wait. The code of the user can, e.g. for a lock or a server.
        signal.setitimer(signal.ITIMER_REAL, cpu_seconds if template.is_user_code else 0)
        try:
            answer = protocol.encode_values(ACTIONS[action](template, protocol.decode_values(body)))
            too_long = len(answer) > _MAX_OUTPUT + BYTES_PER_CHARACTER * len(body)
            return protocol.encode_values({"output_too_long": len(answer)}) if too_long else answer
        except BadRow as error:
            return protocol.encode_values({"bad_row": {**_describe_error(error), "field": error.field}})
        except TemplateRefused as error:
            return protocol.encode_values({"template_refused": _describe_error(error)})
        except RecursionError:
            return protocol.encode_values({"too_deep": True})
        except MemoryError:
            # End the process as if the CPU limit were exceeded. Python would not release the memory.
            os.kill(os.getpid(), signal.SIGPROF)
            raise
        except Exception as error:  # noqa: BLE001  (reported to the process that sent the request)
            return protocol.encode_values({"failed": f"{type(error).__name__}: {error}"[:_MAX_MESSAGE]})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)


def _describe_error(error: BadRow | TemplateRefused) -> dict[str, str]:
    return {"code": error.code, "message": error.message[:_MAX_MESSAGE], "where": error.where, "hint": error.hint}


@contextmanager
def _memory_limit(size: int) -> Iterator[None]:
    """Limit how much memory the worker may allocate for a request of `size` bytes."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    kind, (soft_limit, hard_limit) = resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + (MEGABYTES << 20) + BYTES_PER_CHARACTER * size
    resource.setrlimit(kind, (limit if hard_limit < 0 else min(limit, hard_limit), hard_limit))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft_limit, hard_limit))


if __name__ == "__main__":
    # Rendering a row creates reference cycles only in errors, so garbage collection can be rare.
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)
    main(Connection(int(sys.argv[1])))
