"""Prove: the same regions by a second way, which knows nothing of tracked strings.

Here templates run as transformers runs them, on plain strings, and what the data wrote is found by changing it: a
letter put before or after a message's text moves the rendering from there on. Each region must begin where the
generation prompt ends, hold all of its own message, and nothing of another.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ftdata.templates.attribution.agreement import common_prefix_length
from ftdata.templates.chat import ChatRendering
from ftdata.templates.sandbox.constant_folding import UnfoldedCodeGenerator
from ftdata.templates.template import TEMPLATE_FAULTS
from ftdata.types import Rendered


@dataclass(frozen=True)
class Contradiction:
    """Two ways that disagree: about which message, and how; the two renderings where they part."""

    message: int
    reason: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        where = f"messages[{self.message}]: " if self.message >= 0 else ""
        return f"{where}{self.reason}: ...{self.ours!r}... against ...{self.theirs!r}..."


def cross_check(chat: ChatRendering, rendered: Rendered, most: int | None = None) -> Contradiction | None:
    """Return what speaks against a rendering of this conversation, or `None`.

    Args:
        chat: the conversation, cut after the last message that `rendered` shows.
        rendered: what is to be proved.
        most: how many messages are changed at most, spread over the conversation; `None` for all.
    """
    render, messages = _renderer(chat), _plain(chat.messages)
    plain = render(messages, False)
    if plain is None:
        return Contradiction(-1, "only one of the two can render it", rendered.text[:60], "")
    if plain != rendered.text:
        return _apart(-1, "the texts differ", rendered.text, plain)
    regions = _regions(rendered)
    places = {index: _place(messages, index, plain, render) for index in _spread(len(messages), most)}
    for turn, (start, end) in regions.items():
        if turn not in places and most is not None:
            continue
        if (found := _start(turn, start, plain, rendered, render(messages[:turn], True))) is not None:
            return found
        for index, place in places.items():
            if place is None:
                continue
            inside = start < place[1] and place[0] < end
            if index == turn and not (place[1] <= end and (inside or place[0] == place[1])):
                return _apart(turn, "the region misses text of its own message", plain[start:end], plain[slice(*place)])
            if index != turn and inside and place[0] < place[1]:
                return _apart(index, f"its text is trained with message {turn}", plain[start:end], plain[slice(*place)])
    return None


def _start(turn: int, start: int, text: str, rendered: Rendered, prompt: str | None) -> Contradiction | None:
    if prompt is None:
        return Contradiction(turn, "the template cannot ask for this turn", text[start : start + 40], "")
    if text.startswith(prompt):
        # Where there is no generation prompt, tags may leave out a header that the model would have to write.
        tagged = "generation_tags_unconfirmed" in rendered.flags and start > len(prompt)
        if start == len(prompt) or tagged:
            return None
        return _apart(turn, "the region begins elsewhere", text[:start], prompt)
    if "prompt_mismatch" in rendered.flags and start <= common_prefix_length(text, prompt):
        return None
    return _apart(turn, "the generation prompt is not what stands before the turn", text[:start], prompt)


def _regions(rendered: Rendered) -> dict[int, tuple[int, int]]:
    found: dict[int, tuple[int, int]] = {}
    for span in rendered.spans:
        if span.generated:
            found[span.message] = (found.get(span.message, (span.start, 0))[0], span.end)
    return found


def _spread(count: int, most: int | None) -> Sequence[int]:
    if most is None or count <= most:
        return range(count)
    return sorted({round(n * (count - 1) / (most - 1)) for n in range(most)})


def _place(messages: Sequence[Mapping[str, Any]], index: int, text: str, render: _Render) -> tuple[int, int] | None:
    """Return where the content of a message stands, if a letter before and after it shows that plainly."""
    content = messages[index].get("content")
    if not isinstance(content, str) or not content.strip():
        return None
    ends: list[int] = []
    for changed in (_other(content[0]) + content, content + _other(content[-1])):
        moved = render([*messages[:index], {**messages[index], "content": changed}, *messages[index + 1 :]], False)
        if moved is None:
            return None
        at = common_prefix_length(text, moved)
        if len(moved) != len(text) + 1 or moved[at + 1 :] != text[at:]:
            return None
        ends.append(min(at, len(text) - common_prefix_length(text[::-1], moved[::-1])) if ends else at)
    return ends[0], max(ends)


def _other(letter: str) -> str:
    return "y" if letter == "x" else "x"


def _apart(message: int, reason: str, ours: str, theirs: str) -> Contradiction:
    at = common_prefix_length(ours, theirs)
    shown = slice(max(0, at - 20), at + 40)
    return Contradiction(message, reason, ours[shown], theirs[shown])


_Render = Callable[[Sequence[Mapping[str, Any]], bool], str | None]


def _renderer(chat: ChatRendering) -> _Render:
    template = chat.template
    fixed = {**template.special_tokens, **template.kwargs, "documents": None}
    tools = _plain(chat.tools) or None
    program = _program(template.source, template.date)

    def render(messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str | None:
        given = {"messages": messages, "tools": tools, "add_generation_prompt": generation_prompt}
        try:
            return program.render({**fixed, **given})
        except TEMPLATE_FAULTS:
            return None

    return render


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


class _Transparent(Extension):
    """`{% generation %}` that prints what stands in it."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own contract)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=64)
def _program(source: str, date: datetime.datetime) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Transparent, loopcontrols]
    )
    environment.code_generator_class = UnfoldedCodeGenerator
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": date.strftime}
    return environment.from_string(source)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
