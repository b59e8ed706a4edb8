"""Render conversations and examine templates in the worker process. Use cached results if possible."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

from ftdata._version import __version__
from ftdata.errors import BadRow, TemplateRefused
from ftdata.storage import disk
from ftdata.templates import render_chat
from ftdata.templates import template as templates
from ftdata.templates.python_template import template_from_description
from ftdata.templates.render_cache import render_cache
from ftdata.templates.template import Template
from ftdata.templates.verification.probe import TemplateReport, describe_contradiction
from ftdata.templates.worker import protocol
from ftdata.templates.worker.process import (
    EXAMINE_CPU_SECONDS,
    MAX_STEPS,
    MEGABYTES,
    LimitExceeded,
    Request,
    call_worker,
    end_user_code,
    start_worker,
    submit_request,
)
from ftdata.types import Conversation, Rendered

HERE = not hasattr(os, "fork")
"""Whether all templates run in this process, because the platform has no limits for processes."""


@lru_cache(maxsize=1)
def _builtin_sources() -> frozenset[str]:
    return frozenset(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].glob("*.jinja"))


def _runs_here(template: Template) -> bool:
    """Return whether to run a template in the current process. Built-in templates are trusted to run there."""
    return HERE or template.source in _builtin_sources()


def start_template_worker() -> None:
    """Start the worker process early, so that it starts while the current process still imports modules."""
    if not HERE:
        start_worker()


PendingTexts = tuple[Rendered, ...] | Callable[[], tuple[Rendered, ...]]
"""The rendered texts, or a function that waits for them. The function raises the errors of `render_in_worker`."""


def render_in_worker(
    conversation: Conversation, template: Template, turns: str = "auto", on_dropped_message: str = "reject"
) -> tuple[Rendered, ...]:
    """Call `render_chat` in the worker process, and wait for the rendered texts.

    Raises:
        BadRow: as in `render_chat`; `template_limits`, if the template exceeds the CPU or memory limit.
        TemplateRefused: as in `render_chat`; `template_limits`, if the template exceeds the limits on several rows.
    """
    texts = submit_render(conversation, template, turns, on_dropped_message)
    return texts if isinstance(texts, tuple) else texts()


def submit_render(
    conversation: Conversation, template: Template, turns: str = "auto", on_dropped_message: str = "reject"
) -> PendingTexts:
    """Call `render_chat` in the worker process without waiting for the rendered texts."""
    try:
        # The work to fill in a cached layout is bounded (`Expressions.is_bounded`), so it needs no limits.
        cached = render_chat.render_without_template(conversation, template, turns)
        if cached is not None:
            return cached
        steps = _count_steps(conversation)
        if _runs_here(template):
            return partial(render_chat.render_chat, conversation, template, turns, on_dropped_message)
        encoded = protocol.encode_conversation(conversation)
        request = submit_request(
            "render", template, steps, conversation=encoded, turns=turns, on_dropped_message=on_dropped_message
        )
    except (BadRow, TemplateRefused, RecursionError) as error:
        return partial(_raise, error)
    return partial(_receive_rendered, template, request)


def _count_steps(conversation: Conversation) -> int:
    """Estimate the work to render a conversation: the number of messages times the number of trained answers.

    Raises:
        BadRow: `too_many_messages`, if the product exceeds `MAX_STEPS`.
    """
    messages, answers = len(conversation.messages), len(render_chat.trained_answers(conversation.messages))
    steps = messages * answers
    if steps > MAX_STEPS:
        problem = (
            f"the conversation is too long: {messages:,} messages times {answers:,} trained answers exceeds the limit "
            f"of {MAX_STEPS:,}"
        )
        hint = "split the conversation into several rows, or set train: false for most answers"
        raise BadRow("too_many_messages", problem, field="messages", hint=hint)
    return steps


def _raise(error: Exception) -> NoReturn:
    raise error


def _receive_rendered(template: Template, request: Request) -> tuple[Rendered, ...]:
    try:
        answer = request.result()
    except LimitExceeded:
        raise _make_row_error(template, request) from None
    for layout in answer["layouts"]:
        render_cache(template.key).add_layout(*protocol.decode_layout(layout))
    return tuple(map(protocol.decode_rendered_row, answer["texts"]))


def _describe_limits(template: Template, seconds: float) -> str:
    """Return a text with the limits that a template exceeds."""
    if template.is_user_code:
        return f"template {template.name!r} needs more than {seconds:.3g} s"
    return f"template {template.name!r} needs more than {seconds:.3g} s of CPU time, or more than {MEGABYTES} MB"


def _make_row_error(template: Template, request: Request) -> BadRow:
    return BadRow(
        "template_limits",
        f"{_describe_limits(template, 2 * request.cpu_seconds)}, for this row",
        hint="split the row if it is long; otherwise the template may loop forever: use another template",
    )


def cross_check_in_worker(
    conversation: Conversation, template: Template, rendered: Rendered, max_messages: int | None = None
) -> str | None:
    """Compare a rendered conversation with the result of a second renderer, which runs in the worker process.

    Raises:
        BadRow, TemplateRefused: as in `render_in_worker`.
    """
    if _runs_here(template):
        return describe_contradiction(conversation, template, rendered, max_messages)
    encoded_conversation = protocol.encode_conversation(conversation)
    encoded_row = protocol.encode_rendered_row(rendered)
    # Each changed message is rendered three times, with all other messages.
    steps = len(conversation.messages) * 3 * (max_messages or len(conversation.messages))
    request = submit_request(
        "cross_check",
        template,
        steps,
        conversation=encoded_conversation,
        rendered=encoded_row,
        max_messages=max_messages,
    )
    try:
        contradiction = request.result()["contradiction"]
    except LimitExceeded:
        raise _make_row_error(template, request) from None
    return None if contradiction is None else str(contradiction)


def scaffold_in_worker(template: Template) -> str:
    """Call `render_scaffold` in the worker process to obtain the text that a chat template prints around messages.

    Raises:
        TemplateRefused: as in `verify_template`.
    """
    if _runs_here(template) or not template.source:
        return templates.render_scaffold(template)
    try:
        return str(call_worker("scaffold", template)["text"])
    except LimitExceeded:
        raise _make_template_error(template) from None


def render_plain(template: Template, cases: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Render a template with plain variables in the worker process. The text is `None` if the template raises an error.

    Raises:
        TemplateRefused: as in `verify_template`.
    """
    if _runs_here(template):
        return [templates.render_or_none(template, variables) for variables in cases]
    try:
        return list(call_worker("render_plain", template, cases=list(cases))["texts"])
    except LimitExceeded:
        raise _make_template_error(template) from None


def verify_template(template: Template) -> TemplateReport:
    """Examine a template in the worker process and return the report. Use the cached report if there is one.

    Reports are cached in `$XDG_CACHE_HOME/ftdata` (`~/.cache/ftdata`), if this folder is writable. The key is a hash
    of the template, its special tokens and its options.

    Raises:
        TemplateRefused: `template_syntax`, if the template cannot be compiled; `template_limits`, if it exceeds the
            CPU or memory limit.
    """
    return (_examine_user_code if template.is_user_code else _examine_cached)(template.description)


def require_verified(template: Template) -> Template:
    """Examine a template. Return it if two renderers agree on all test conversations, otherwise raise an error.

    Raises:
        TemplateRefused: as in `verify_template`; `template_not_verified`, if a cross-check fails.
    """
    if template.source and (contradictions := verify_template(template).contradictions):
        problem = f"the cross-check of template {template.name!r} failed: {contradictions[0]}"
        hint = "mark the generated text with {% generation %} in a copy of the template"
        if template.is_user_code:
            hint = "print each text once, and no text that depends on other messages inside of answers"
        raise TemplateRefused("template_not_verified", problem, hint=hint)
    return template


def forget_user_code() -> None:
    """End the worker if it executed code of the user, and forget the reports on such code."""
    end_user_code()
    _examine_user_code.cache_clear()


def _examine(description: str) -> TemplateReport:
    key = disk.hash_bytes(f"{__version__} {_code_hash()} {description}".encode())
    template = template_from_description(description)
    # The code of a user can depend on files that the key does not contain.
    root = None if template.is_user_code else disk.cache_root()
    file = root / "verdicts" / f"{key}.json" if root else Path(os.devnull)
    with suppress(OSError, ValueError, TypeError, AttributeError, LookupError):
        return _make_report(_check_cached(json.loads(disk.read_regular_file(file))))
    try:
        report = _request_report(template)
    except LimitExceeded:
        raise _make_template_error(template) from None
    if root is not None:
        disk.write_cache_file(file, json.dumps({"report": report, "sha256": _hash(report)}).encode())
    return _make_report(report)


_examine_cached = lru_cache(maxsize=1024)(_examine)
_examine_user_code = lru_cache(maxsize=64)(_examine)


def _hash(report: Any) -> str:
    return disk.hash_bytes(json.dumps(report, sort_keys=True).encode())


def _check_cached(cached: Mapping[str, Any]) -> Mapping[str, Any]:
    """Compare the cached report with its stored hash, and return the report.

    Raises:
        ValueError: the report does not match its hash.
    """
    report: Mapping[str, Any] = cached["report"]
    if cached["sha256"] != _hash(report):
        raise ValueError("the cached report does not match its hash")
    return report


def _request_report(template: Template) -> Mapping[str, Any]:
    if HERE:
        from ftdata.templates.verification.probe import probe_template

        return probe_template(template).as_dict()
    try:
        return dict(call_worker("examine", template, EXAMINE_CPU_SECONDS)["report"])
    except RecursionError:
        problem = f"template {template.name!r} contains loops, macros or expressions that are nested too deeply"
        hint = "use another template or simplify this template"
        raise TemplateRefused("template_too_deep", problem, hint=hint) from None


def _make_template_error(template: Template) -> TemplateRefused:
    seconds = EXAMINE_CPU_SECONDS * template.cpu_factor
    problem = f"{_describe_limits(template, seconds)}, for small conversations"
    hint = "use another template: this template may loop forever, or is malicious"
    if template.is_user_code:
        hint = "import large libraries at the top of the file, and correct loops and waits that do not end"
    return TemplateRefused("template_limits", problem, hint=hint)


def _make_report(values: Mapping[str, Any]) -> TemplateReport:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return TemplateReport(**fields)


@lru_cache(maxsize=1)
def _code_hash() -> str:
    """Return a hash of the source code in `ftdata.templates`, which can change without a new version number."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return disk.hash_bytes(b"".join(file.read_bytes() for file in files))
