"""What templates do, asked of the process in which they run; what they are known to do is not asked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

from ftdata._version import __version__
from ftdata.errors import BadRow, TemplateRefused
from ftdata.storage import disk
from ftdata.templates import render_chat
from ftdata.templates import template as templates
from ftdata.templates.template import Template
from ftdata.templates.verification.probe import TemplateReport
from ftdata.templates.verification.probe import describe_contradiction as contradicted_here
from ftdata.templates.worker import protocol
from ftdata.templates.worker.process import (
    EXAMINE_CPU_SECONDS,
    MAX_STEPS,
    MEGABYTES,
    LimitExceeded,
    Request,
    call_worker,
    start_worker,
    submit_request,
)
from ftdata.types import Conversation, Rendered

HERE = not hasattr(os, "fork")
"""Where there are no limits for processes, templates run in this one."""


@lru_cache(maxsize=1)
def _own() -> frozenset[str]:
    return frozenset(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].glob("*.jinja"))


def _here(template: Template) -> bool:
    """Whether a template runs in this process: ours are no strangers'."""
    return HERE or template.source in _own()


def start_template_worker() -> None:
    """Begin the process in which templates run: it is ready when what is loaded meanwhile is."""
    if not HERE:
        start_worker()


def render_in_worker(
    conversation: Conversation, template: Template, turns: str = "auto", on_dropped_message: str = "reject"
) -> tuple[Rendered, ...]:
    """Render a conversation, as `rendering.render` does.

    Raises:
        BadRow: as it does; `template_limits`: the template takes more time or memory than any needs.
        TemplateRefused: as it does, or `template_limits` on several rows.
    """
    return submit_render(conversation, template, turns, on_dropped_message)()


def submit_render(
    conversation: Conversation, template: Template, turns: str = "auto", on_dropped_message: str = "reject"
) -> Callable[[], tuple[Rendered, ...]]:
    """Begin to render a conversation; what is returned waits for it, and returns and raises what `render_in_worker` does."""
    try:
        steps = _steps(conversation)
        if _here(template):
            return partial(render_chat.render_chat, conversation, template, turns, on_dropped_message)
        known = render_chat.render_from_cache(conversation, template, turns, on_dropped_message)
        if known is not None:
            return lambda: known
        sent = protocol.encode_conversation(conversation)
        request = submit_request(
            "render", template, steps, conversation=sent, turns=turns, on_dropped_message=on_dropped_message
        )
    except (BadRow, TemplateRefused, RecursionError) as error:
        return partial(_raised, error)
    return partial(_rendered, template, request)


def _steps(conversation: Conversation) -> int:
    """Return how often rendering a conversation looks at a message: at each of them, for each trained answer.

    Raises:
        BadRow: `too_many_messages`: more than `MAX_STEPS`.
    """
    messages, answers = len(conversation.messages), len(render_chat.trained_answers(conversation))
    steps = messages * answers
    if steps > MAX_STEPS:
        raise BadRow(
            "too_many_messages",
            f"has {messages:,} messages and {answers:,} trained answers; their product may be at most {MAX_STEPS:,}, "
            "since answers are located one by one",
            field="messages",
            hint="split the conversation into several rows, or give most answers train: false",
        )
    return steps


def _raised(error: Exception) -> NoReturn:
    raise error


def _rendered(template: Template, request: Request) -> tuple[Rendered, ...]:
    try:
        answer = request.result()
    except LimitExceeded:
        raise _row_exceeds(template, request) from None
    for shape, plan in answer["plans"]:
        template.plans.by_shape.setdefault(tuple(shape), []).append(protocol.decode_plan(plan))
    return tuple(map(protocol.decode_rendered_row, answer["texts"]))


def _row_exceeds(template: Template, request: Request) -> BadRow:
    return BadRow(
        "template_limits",
        f"template {template.name!r} needs more than {2 * request.cpu_seconds:.3g} s of CPU time, or more than "
        f"{MEGABYTES} MB, for this row",
        hint="split the row if it is long; otherwise the template loops: use another one",
    )


def cross_check_in_worker(
    conversation: Conversation, template: Template, rendered: Rendered, most: int | None = None
) -> str | None:
    """Return what speaks against a rendering, as `verify_template.contradicted` does.

    Raises:
        BadRow, TemplateRefused: as `render_in_worker`.
    """
    if _here(template):
        return contradicted_here(conversation, template, rendered, most)
    sent, made = protocol.encode_conversation(conversation), protocol.encode_rendered_row(rendered)
    # Each of the messages that are changed is rendered three times, with all others.
    steps = len(conversation.messages) * 3 * (most or len(conversation.messages))
    request = submit_request("contradict", template, steps, conversation=sent, rendered=made, most=most)
    try:
        found = request.result()["found"]
    except LimitExceeded:
        raise _row_exceeds(template, request) from None
    return None if found is None else str(found)


def scaffold_in_worker(template: Template) -> str:
    """Return what a chat template prints around messages, as `template.scaffold` does.

    Raises:
        TemplateRefused: as `verify_template`.
    """
    if _here(template) or not template.source:
        return templates.render_scaffold(template)
    try:
        return str(call_worker("scaffold", template)["text"])
    except LimitExceeded:
        raise _refused(template) from None


def verify_template(template: Template) -> TemplateReport:
    """Examine a template, or remember what was found.

    Verdicts are kept in `$XDG_CACHE_HOME/ftdata` (`~/.cache/ftdata`), where that can be written, by content: the same
    template with the same tokens and options is examined once.

    Raises:
        TemplateRefused: it cannot be compiled; `template_limits`: it takes more time or memory than any template
            needs.
    """
    return _examined(template.description)


def require_verified(template: Template) -> Template:
    """Return the template, examined and not contradicted.

    Raises:
        TemplateRefused: as `verify_template`, or `template_not_verified`: two ways of finding what is trained disagree about it.
    """
    if template.source and (against := verify_template(template).contradictions):
        raise TemplateRefused(
            "template_not_verified",
            f"two ways of finding what template {template.name!r} has the model produce disagree: {against[0]}",
            hint="mark what is trained with {% generation %} in a template file of your own",
        )
    return template


@lru_cache(maxsize=1024)
def _examined(description: str) -> TemplateReport:
    key = disk.hash_bytes(f"{__version__} {_own_code()} {description}".encode())
    root = disk.cache_root()
    file = root / "verdicts" / f"{key}.json" if root else Path(os.devnull)
    with suppress(OSError, ValueError, TypeError, AttributeError, LookupError):
        return _report(_unsealed(json.loads(disk.read_regular_file(file))))
    template = Template.described(description)
    try:
        report = _asked(template)
    except LimitExceeded:
        raise _refused(template) from None
    with suppress(OSError):
        if root is None:
            return _report(report)
        disk.mkdir(file.parent, parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")
        disk.write(beside, json.dumps({"report": report, "sha256": _hash(report)}).encode())
        disk.rename(beside, file)
    return _report(report)


def _hash(report: Any) -> str:
    return disk.hash_bytes(json.dumps(report, sort_keys=True).encode())


def _unsealed(kept: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a report that was kept.

    Raises:
        ValueError: it is not as it was written.
    """
    report: Mapping[str, Any] = kept["report"]
    if kept["sha256"] != _hash(report):
        raise ValueError("the report is damaged")
    return report


def _asked(template: Template) -> Mapping[str, Any]:
    if HERE:
        from ftdata.templates.verification.probe import probe_template

        return probe_template(template).as_dict()
    try:
        return dict(call_worker("examine", template)["report"])
    except RecursionError:
        raise TemplateRefused(
            "template_too_deep",
            f"template {template.name!r} nests texts, loops or macros too deep to be examined",
            hint="use another template, or a simpler one",
        ) from None


def _refused(template: Template) -> TemplateRefused:
    return TemplateRefused(
        "template_limits",
        f"template {template.name!r} needs more than {EXAMINE_CPU_SECONDS:.3g} s of CPU time, or more than "
        f"{MEGABYTES} MB, for small conversations",
        hint="use another template: this one loops, or is an attack",
    )


def _report(found: Mapping[str, Any]) -> TemplateReport:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return TemplateReport(**fields)


@lru_cache(maxsize=1)
def _own_code() -> str:
    """Return a hash of the modules that reach a verdict: an editable install changes without a new version."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return disk.hash_bytes(b"".join(file.read_bytes() for file in files))
