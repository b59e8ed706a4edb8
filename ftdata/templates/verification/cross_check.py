"""Compare rendered rows with the results of a second, independent renderer, which uses plain strings.

The second renderer runs templates in the same way as transformers. To find the text of a message, it inserts a
character before or after the text and renders again: the rendered text after this position moves. Each generated
region must begin at the end of its generation prompt. It must contain the whole text of its message, and no text of
other messages.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ftdata.errors import BadRow
from ftdata.templates.attribution.agreement import common_prefix_length
from ftdata.templates.chat import ChatRendering
from ftdata.templates.python_template import PythonTemplate
from ftdata.templates.sandbox.constant_folding import UnfoldedCodeGenerator
from ftdata.templates.template import TEMPLATE_ERRORS
from ftdata.types import Rendered


@dataclass(frozen=True)
class Contradiction:
    """A difference between a rendered text and the result of the second renderer.

    Attributes:
        message: index of the message, or -1 for the whole conversation.
        reason: description of the difference.
        rendered: excerpt of the rendered text.
        expected: excerpt of the text from the second renderer.
    """

    message: int
    reason: str
    rendered: str
    expected: str

    def __str__(self) -> str:
        where = f"messages[{self.message}]: " if self.message >= 0 else ""
        return f"{where}{self.reason}: ...{self.rendered!r}... instead of ...{self.expected!r}..."


def cross_check(chat: ChatRendering, rendered: Rendered, max_messages: int | None = None) -> Contradiction | None:
    """Compare a rendered text with the result of a second renderer. Return the first difference, if any.

    Args:
        chat: the conversation up to the last message of `rendered`.
        rendered: the rendered text to check.
        max_messages: maximum number of messages to change, spread over the conversation. `None`: all messages.
    """
    render, messages = _make_renderer(chat), _untrack(chat.messages)
    plain = render(messages, False)
    if plain is None:
        return Contradiction(-1, "only one of the two renderers can render the conversation", rendered.text[:60], "")
    if plain != rendered.text:
        return _make_contradiction(-1, "the texts differ", rendered.text, plain)
    regions = _generated_regions(rendered)
    ranges = {index: _find_content(messages, index, plain, render) for index in _spread(len(messages), max_messages)}
    for turn, (start, end) in regions.items():
        if turn not in ranges and max_messages is not None:
            continue
        if (contradiction := _check_start(turn, start, plain, rendered, render(messages[:turn], True))) is not None:
            return contradiction
        for index, content in ranges.items():
            if content is None:
                continue
            inside = start < content[1] and content[0] < end
            if index == turn and not (content[1] <= end and (inside or content[0] == content[1])):
                return _make_contradiction(
                    turn,
                    "the generated region does not contain the whole message",
                    plain[start:end],
                    plain[slice(*content)],
                )
            if index != turn and inside and content[0] < content[1]:
                return _make_contradiction(
                    index,
                    f"the generated region of message {turn} contains text of this message",
                    plain[start:end],
                    plain[slice(*content)],
                )
    return _find_derived_text(chat, messages, plain, regions, ranges)


def _find_derived_text(
    chat: ChatRendering,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    regions: Mapping[int, tuple[int, int]],
    indices: Iterable[int],
) -> Contradiction | None:
    """Find text in a generated region that a function made from another message, e.g. a copy in capital letters.

    Such a region changes if the message or the tools change. Jinja templates need no check: tracked strings record how
    their texts are made.
    """
    if not isinstance(chat.template, PythonTemplate):
        return None
    tools = _untrack(chat.tools)
    changes = [(index, changed, tools) for index in indices for changed in _changed_messages(messages[index])]
    if tools:
        changes.append((-1, {}, [_rename_function(tool) for tool in tools]))
    for index, changed, changed_tools in changes:
        region_counts = Counter(text[slice(*region)] for turn, region in regions.items() if turn != index)
        changed_messages = [*messages[:index], changed, *messages[index + 1 :]] if index >= 0 else messages
        moved = _make_function_renderer(chat.template, changed_tools)(changed_messages, False)
        for region, number in region_counts.items():
            if moved is not None and moved.count(region) < number:
                reason = "the generated text of another message changes if this message changes"
                return _make_contradiction(index, reason, text, moved)
    return None


def _changed_messages(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield copies of a message with another word in one of its texts."""
    for key in ("content", "reasoning_content", "name"):
        value = message.get(key)
        if isinstance(value, str) and value.strip():
            yield from ({**message, key: changed} for changed in (f"x {value}", f"{value} x"))
    calls = message.get("tool_calls") or ()
    for number, call in enumerate(calls):
        yield {**message, "tool_calls": [*calls[:number], _rename_function(call), *calls[number + 1 :]]}


def _rename_function(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call or a tool definition with another name of its function."""
    function = item.get("function")
    return {**item, "function": {**function, "name": f"x{function.get('name')}"}} if function else dict(item)


def _check_start(turn: int, start: int, text: str, rendered: Rendered, prompt: str | None) -> Contradiction | None:
    if prompt is None:
        return Contradiction(
            turn, "the template cannot render the generation prompt of this turn", text[start : start + 40], ""
        )
    if text.startswith(prompt):
        # Without a generation prompt, generation tags may exclude a header that the model would have to generate.
        has_tagged_start = "generation_tags_unconfirmed" in rendered.flags and start > len(prompt)
        if start == len(prompt) or has_tagged_start:
            return None
        return _make_contradiction(
            turn, "the generated region does not begin at the prompt's end", text[:start], prompt
        )
    if "prompt_mismatch" in rendered.flags and start <= common_prefix_length(text, prompt):
        return None
    return _make_contradiction(
        turn, "the generation prompt differs from the text before the turn", text[:start], prompt
    )


def _generated_regions(rendered: Rendered) -> dict[int, tuple[int, int]]:
    regions: dict[int, tuple[int, int]] = {}
    for span in rendered.spans:
        if span.generated:
            regions[span.message] = (regions.get(span.message, (span.start, 0))[0], span.end)
    return regions


def _spread(count: int, max_count: int | None) -> Sequence[int]:
    if max_count is None or count <= max_count:
        return range(count)
    return sorted({round(n * (count - 1) / (max_count - 1)) for n in range(max_count)})


def _find_content(
    messages: Sequence[Mapping[str, Any]], index: int, text: str, render: _Render
) -> tuple[int, int] | None:
    """Find a message's content in the rendered text: change the content, render again, and compare the texts.

    Return the range (start, end), or `None` if the comparison is ambiguous.
    """
    content = messages[index].get("content")
    if not isinstance(content, str) or not content.strip():
        return None
    ends: list[int] = []
    for changed in (_different_character(content[0]) + content, content + _different_character(content[-1])):
        moved = render([*messages[:index], {**messages[index], "content": changed}, *messages[index + 1 :]], False)
        if moved is None:
            return None
        position = common_prefix_length(text, moved)
        if len(moved) != len(text) + 1 or moved[position + 1 :] != text[position:]:
            return None
        ends.append(min(position, len(text) - common_prefix_length(text[::-1], moved[::-1])) if ends else position)
    return ends[0], max(ends)


def _different_character(character: str) -> str:
    return "y" if character == "x" else "x"


def _make_contradiction(message: int, reason: str, rendered: str, expected: str) -> Contradiction:
    position = common_prefix_length(rendered, expected)
    window = slice(max(0, position - 20), position + 40)
    return Contradiction(message, reason, rendered[window], expected[window])


_Render = Callable[[Sequence[Mapping[str, Any]], bool], str | None]


def _make_renderer(chat: ChatRendering) -> _Render:
    template = chat.template
    if isinstance(template, PythonTemplate):
        return _make_function_renderer(template, _untrack(chat.tools))
    constants = {**template.special_tokens, **template.kwargs, "documents": None}
    tools = _untrack(chat.tools) or None
    program = _compile(template.source, template.date)

    def render(messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str | None:
        variables = {"messages": messages, "tools": tools, "add_generation_prompt": generation_prompt}
        try:
            return program.render({**constants, **variables})
        except TEMPLATE_ERRORS:
            return None

    return render


def _make_function_renderer(template: PythonTemplate, tools: Any) -> _Render:
    def render(messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str | None:
        variables = {"messages": messages, "tools": tools, "add_generation_prompt": generation_prompt}
        try:
            return template.render_text(variables)
        except BadRow:
            return None

    return render


def _untrack(value: Any) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_untrack(key): _untrack(item) for key, item in value.items()}
    return [_untrack(item) for item in value] if isinstance(value, list | tuple) else value


class _PlainGenerationTag(Extension):
    """A `{% generation %}` tag that prints its content without marking it as generated."""

    tags = {"generation"}  # noqa: RUF012  (Jinja requires this attribute)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=64)
def _compile(source: str, date: datetime.datetime) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_PlainGenerationTag, loopcontrols]
    )
    environment.code_generator_class = UnfoldedCodeGenerator
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": date.strftime}
    return environment.from_string(source)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
