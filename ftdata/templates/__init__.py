"""Render: a conversation and a template -> text, with every character attributed.

A *chat template* reads `messages`; a *prompt template* reads the row's own columns (`instruction`, `output`,
...). Both are Jinja, run in the same sandbox. What is trained is marked in the template with
`{% generation %} ... {% endgeneration %}`, or, in a tokenizer's own chat template, detected (`markers`).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from ftdata.errors import BadRow, TemplateRefused, UsageError, nearest
from ftdata.registry import Registry
from ftdata.templates import markers
from ftdata.templates.markers import SPLITTABLE, Stops
from ftdata.templates.sandbox import CUT, compile_template
from ftdata.templates.spans import Piece, Region, pieces, tile, tracked, tracked_messages
from ftdata.templates.tracked import Tracked
from ftdata.types import Conversation, Message, Part, Rendered, Span

templates: Registry[Path] = Registry("ftdata.templates", "template")
for _file in sorted(Path(__file__).parent.glob("*.jinja")):
    templates.register(_file.stem)(_file)

TURNS = ("auto", "joint", "split")

DEFAULT_DATE = datetime.datetime(2026, 1, 1)  # noqa: DTZ001  (templates print wall-clock time)
"""What the clock shows where nobody said otherwise: templates with a date stay the same from day to day."""

_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What the template's own code may raise; it is foreign code, so the list is wide."""


@dataclass(frozen=True)
class Template:
    """A template, bound to a tokenizer's special tokens.

    Attributes:
        name: how to speak of it: a built-in's name, a file, `"<string>"` or `"tokenizer"`.
        source: the Jinja text; empty where a tokenizer has none, which serves already formatted text only.
        strict: printing an undefined name is an error; only a tokenizer's own template may rely on silence.
        special_tokens: `bos_token`, `eos_token`, ...: what the template may print.
        control: finds control tokens in text; what a stop is looked for among.
        date: what the clock shows to templates that print a date.
        kwargs: further variables for the template (`enable_thinking`, ...).
    """

    name: str
    source: str
    strict: bool = True
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    control: re.Pattern[str] | None = None
    date: datetime.datetime = DEFAULT_DATE
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def names(self) -> frozenset[str]:
        """The variables that the template reads.

        Raises:
            TemplateRefused: `template_syntax`, with the line.
        """
        syntax = self._compile().environment.parse(self.source)
        return frozenset(jinja2.meta.find_undeclared_variables(syntax))

    @property
    def chat(self) -> bool:
        """Whether this is a chat template: it reads `messages`."""
        return "messages" in self.names

    @cached_property
    def tagged(self) -> bool:
        """Whether the template itself marks what the model must produce."""
        tokens = self._compile().environment.lex(self.source)
        return any(kind == "name" and value == "generation" for _, kind, value in tokens)

    @property
    def uses_date(self) -> bool:
        """Whether the text may depend on the clock."""
        return "strftime_now" in self.names

    @property
    def stops(self) -> Stops:
        """How a turn may end."""
        return Stops(self.special_tokens.get("eos_token"), self.control)

    def run(self, variables: Mapping[str, Any], *, prompt_only: bool = False) -> Tracked:
        """Render once. The text is exactly what transformers renders for the same variables.

        Raises:
            BadRow: `template_raises`, with the template's own message.
        """
        given = {**self.special_tokens, **self.kwargs, **variables}
        try:
            return Tracked.of(self._compile(prompt_only=prompt_only).render(given))
        except _TEMPLATE_FAULTS as error:
            raise BadRow("template_raises", f"template {self.name!r} fails on this row: {error}") from None

    def _compile(self, *, prompt_only: bool = False) -> jinja2.Template:
        try:
            return compile_template(self.source, self.date, self.strict, prompt_only)
        except jinja2.TemplateSyntaxError as error:
            message = f"template {self.name!r}, line {error.lineno}: {error.message}"
            raise TemplateRefused("template_syntax", message) from None


def find(spec: str | Path) -> tuple[str, str]:
    """Return the name and the Jinja text of a template: a built-in or plug-in name, a file, or Jinja itself.

    Raises:
        UsageError: there is no such template; the hint holds the nearest names.
    """
    text = str(spec)
    if "{{" in text or "{%" in text:
        return "<string>", text
    path = templates.get(text) if text in templates.names() else Path(text)
    if not path.is_file():
        raise UsageError(
            "unknown_template",
            f"no template named {text!r}, and no file of that name",
            hint=nearest(text, templates.names()),
        )
    return text, path.read_bytes().decode("utf-8")


def check(template: Template) -> None:
    """Refuse a template that could never train anything, before any row is read.

    Raises:
        TemplateRefused: `template_syntax`, or `nothing_marked` for a prompt template without a generation block.
    """
    if template.source and not template.chat and not template.tagged:
        raise TemplateRefused(
            "nothing_marked",
            f"template {template.name!r} reads no messages and marks nothing as trained",
            hint="put {% generation %} before the response and {% endgeneration %} after its stop token",
        )


def scaffold(template: Template) -> str:
    """Return what a chat template prints around messages, whatever they say: where it glues control tokens together.

    Templates that refuse a probe are silent here, and judged by the rows.
    """
    found = ""
    for roles in (("user", "assistant"), ("system", "user", "assistant")) if template.source and template.chat else ():
        try:
            messages = [{"role": role, "content": "x"} for role in roles]
            found += template.run({"messages": messages, "tools": None, "add_generation_prompt": True})
        except BadRow:
            continue
    return found


def render(conversation: Conversation, template: Template, turns: str = "auto") -> tuple[Rendered, ...]:
    """Render a conversation, attributed: one `Rendered`, or one per assistant turn.

    Args:
        conversation: the normalised row.
        template: the template and the special tokens it may print.
        turns: `"joint"`: one text for all turns; `"split"`: one text per assistant turn, each equal to what is
            shown to the model when it is asked for that turn; `"auto"`: joint, and split where joint is refused.

    Raises:
        BadRow: the row does not fit the template, or where its turns begin and end is not certain.
        TemplateRefused: the row needs a template and there is none.
    """
    if conversation.text is not None and (not template.source or template.chat):
        return (_already_formatted(conversation.text, template),)
    if not template.source:
        raise TemplateRefused(
            "no_template",
            "this tokenizer has no chat template",
            hint=f"pass template=, one of {', '.join(templates.names())}, or a file of your own",
        )
    if not template.chat:
        return (_render_fields(conversation, template),)
    if turns != "split":
        try:
            return (_render_chat(conversation, template, conversation.messages, _assistants(conversation.messages)),)
        except BadRow as error:
            if turns == "joint" or error.code not in SPLITTABLE:
                raise
    each = [(conversation.messages[: turn + 1], [turn]) for turn in _assistants(conversation.messages)]
    rendered = (_render_chat(conversation, template, messages, turn) for messages, turn in each)
    return tuple(replace(one, flags=one.flags | {"split"}) for one in rendered)


def prompt(conversation: Conversation, template: Template) -> str:
    """Return what the model is shown when it is asked for the last answer: the same template, no response.

    For a chat template, the messages before the final assistant message with the generation prompt; for a
    prompt template, the text before its first generation block.

    Raises:
        BadRow: the template fails on the row.
    """
    if not template.chat:
        return template.run(conversation.fields, prompt_only=True).partition(CUT)[0]
    messages = conversation.messages
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return str.__str__(template.run(_chat_variables(conversation, tracked_messages(before), True)))


def _already_formatted(text: str, template: Template) -> Rendered:
    eos = template.special_tokens.get("eos_token")
    bos = template.special_tokens.get("bos_token")
    # A second EOS is the classic fault of trainers on text that was templated before.
    ending = eos if eos and not text.rstrip().endswith(eos) else ""
    spans = [Span(0, len(text), Part.CONTENT, 0, True)]
    if ending:
        spans.append(Span(len(text), len(text) + len(ending), Part.SCAFFOLD, 0, True))
    return Rendered(text + ending, tuple(spans), add_bos=not (bos and text.lstrip().startswith(bos)), keep_control=True)


def _render_fields(conversation: Conversation, template: Template) -> Rendered:
    owners = {
        name: tracked(value, Part.CONTENT, index) for index, (name, value) in enumerate(conversation.fields.items())
    }
    try:
        text = template.run(owners)
    except BadRow as error:
        error.hint = f"the row has {', '.join(conversation.fields) or 'messages'}; columns= maps other names"
        raise
    parts = pieces(text)
    arrived = {piece.message for piece in parts}
    for index, (name, value) in enumerate(conversation.fields.items()):
        if value.strip() and index not in arrived:
            raise BadRow(
                "payload_dropped",
                f"template {template.name!r} does not print this column",
                field=name,
                hint="use a template that has room for it, or take it out of the data",
            )
    answer = conversation.completion_from
    blocks = dict.fromkeys(piece.block for piece in parts if piece.block)
    regions = [
        Region(answer, min(p.start for p in parts if p.block == b), max(p.end for p in parts if p.block == b))
        for b in blocks
    ]
    if not regions:
        raise BadRow("nothing_marked", f"template {template.name!r} marks nothing as trained for this row")
    prompt_parts = (replace(piece, message=min(piece.message, 0)) for piece in parts)
    return Rendered(str.__str__(text), tile(prompt_parts, regions), add_bos=True)


def _render_chat(
    conversation: Conversation, template: Template, messages: Sequence[Message], turns: Sequence[int]
) -> Rendered:
    given = tracked_messages(messages)
    try:
        text = Tracked.of(template.run(_chat_variables(conversation, given, False)))
    except BadRow:
        if not any(message.get("tool_calls") for message in messages):
            raise
        # Some templates print the arguments of a call as they are, and so need them as text.
        given = tracked_messages([_with_text_arguments(message) for message in messages])
        text = Tracked.of(template.run(_chat_variables(conversation, given, False)))

    def prefix(count: int, generation_prompt: bool) -> str:
        return template.run(_chat_variables(conversation, given[:count], generation_prompt))

    parts = pieces(text)
    flags = markers.check_arrival(messages, parts)
    if template.tagged and template.strict:
        regions = [region for region in markers.from_blocks(parts, turns) if region.message in turns]
    else:
        regions = [_locate(template, text, parts, turn, prefix, len(messages)) for turn in turns]
        if template.tagged and _marked(parts, turns) != [region for region in regions if region.start < region.end]:
            flags |= {"tags_overruled"}
    return Rendered(str.__str__(text), tile(parts, regions), flags)


def _locate(
    template: Template,
    text: str,
    parts: Sequence[Piece],
    turn: int,
    prefix: markers.RenderPrefix,
    count: int,
) -> Region:
    try:
        return markers.locate(text, parts, turn, prefix, count, template.stops)
    except BadRow as error:
        # Of the tags that vendors put into templates, many train headers or miss the stop: they are no proof.
        if template.tagged:
            error.hint = "its own generation tags could not be confirmed; to trust them, pass the template as a file"
        raise


def _marked(parts: Sequence[Piece], turns: Sequence[int]) -> list[Region] | None:
    try:
        return [region for region in markers.from_blocks(parts, turns) if region.message in turns]
    except BadRow:
        return None


def _with_text_arguments(message: Message) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return dict(message)
    calls: list[dict[str, Any]] = [dict(call) for call in message["tool_calls"]]
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and not isinstance(function.get("arguments"), str):
            call["function"] = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
    return {**message, "tool_calls": calls}


def _assistants(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _chat_variables(
    conversation: Conversation, messages: list[dict[str, Any]], generation_prompt: bool
) -> dict[str, Any]:
    tools = tracked(conversation.tools, Part.TOOLS, -1) if conversation.tools else None
    return {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": generation_prompt}
