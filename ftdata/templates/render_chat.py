"""Render a conversation: its text, attributed, with what the model must produce in every turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ftdata.errors import BadRow, TemplateRefused
from ftdata.templates.attribution.spans import TurnRegion, make_spans, pieces_of, track_value
from ftdata.templates.chat import ChatRendering, render_turns
from ftdata.templates.template import Template, templates
from ftdata.types import Conversation, Message, Part, Rendered, Span

TURNS = ("auto", "joint", "split")

DROPPED_MESSAGE_POLICIES = ("reject", "flag")

MISSING_STOP_POLICIES = ("flag", "append_eos")

_SPLITTABLE = frozenset({"history_drift", "unknown_stop", "overlap"})
"""Refusals of a whole conversation that need not hold for its turns taken by themselves."""


_LISTS_REFUSED = frozenset({"template_raises", "message_dropped", "content_stringified"})
"""What becomes of contents that are lists of parts where a template takes only text."""


def render_chat(
    conversation: Conversation, template: Template, turns: str = "auto", on_dropped_message: str = "reject"
) -> tuple[Rendered, ...]:
    """Render a conversation, attributed: one `Rendered`, or several that train some of its turns each.

    Args:
        conversation: the normalised row.
        template: the template and the special tokens it may print.
        turns: `"joint"`: one text for all turns; `"split"`: one text for every group of assistant turns that
            answer one user message, equal to what is shown to the model when it is asked for them; `"auto"`: joint
            where the template shows earlier turns as the model wrote them, else split.
        on_dropped_message: what to do where the template leaves out a message that is not the assistant's: `"reject"` or `"flag"`.

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
    try:
        return _render_chat(conversation, template, turns, on_dropped_message)
    except BadRow as error:
        joined = join_text_parts(conversation)
        if error.code not in _LISTS_REFUSED or joined == conversation:
            raise
        texts = _render_chat(joined, template, turns, on_dropped_message)
        return tuple(one._replace(flags=one.flags | {"content_parts_joined"}) for one in texts)


class _Unknown(Exception):
    """What a template makes of a conversation is not told by a plan."""


def render_from_cache(
    conversation: Conversation, template: Template, turns: str = "auto", on_dropped_message: str = "reject"
) -> tuple[Rendered, ...] | None:
    """Return what `render_turns` does of a conversation for which the template need not be run; `None` for others."""
    if not template.source or (conversation.text is not None and template.chat):
        return render_chat(conversation, template, turns)
    try:
        return _render_chat(conversation, template, turns, on_dropped_message, runs=False) if template.chat else None
    except _Unknown:
        return None


def trained_answers(conversation: Conversation) -> list[int]:
    """Return the indices of the assistant messages that may be trained: the turns to be located."""
    return [
        index
        for index, message in enumerate(conversation.messages)
        if message["role"] == "assistant" and message.get("train", True)
    ]


def join_text_parts(conversation: Conversation) -> Conversation:
    """Return the conversation with text for each content that is a list of one text part."""
    return replace(conversation, messages=tuple(map(_with_text, conversation.messages)))


def _with_text(message: Message) -> Message:
    """Return the message with its only part of text for content: how several would be joined, nobody said."""
    content = message.get("content")
    if not isinstance(content, list) or len(content) != 1 or not isinstance(content[0].get("text"), str):
        return message
    return {**message, "content": content[0].get("text")}


def _render_chat(
    conversation: Conversation, template: Template, turns: str, on_dropped_message: str, *, runs: bool = True
) -> tuple[Rendered, ...]:
    assistants = trained_answers(conversation)
    planned = turns != "split" and not conversation.tools
    whole = template.plans.filled(conversation.messages, assistants) if planned else None
    chat = _Chats(conversation, template, on_dropped_message, runs)
    if whole is None and turns != "split":
        whole = chat.joint(assistants, must=turns == "joint")
    if whole is not None and (turns == "joint" or "history_rewritten" not in whole.flags):
        return (whole,)
    parts = [one for group in _groups(conversation.messages, assistants) for one in _split(chat, group)]
    return (
        tuple(one._replace(flags=one.flags | {"conversation_split"}) for one in parts)
        if len(parts) > 1
        else tuple(parts)
    )


@dataclass
class _Chats:
    """A conversation under a chat template, and what it is up to each of its turns; `runs`: if need be, it is run."""

    conversation: Conversation
    template: Template
    on_dropped_message: str
    runs: bool

    @cached_property
    def _whole(self) -> ChatRendering:
        return ChatRendering.of(self.conversation, self.template)

    def until(self, turns: Sequence[int], count: int | None = None) -> Rendered:
        """Render the first `count` messages, by a plan where there is one, or all, for which there is none.

        Raises:
            BadRow: as `render_turns` does.
        """
        messages = self.conversation.messages[:count]
        planned = count is not None and not self.conversation.tools
        known = self.template.plans.filled(messages, turns) if planned else None
        if known is None and not self.runs:
            raise _Unknown
        return known or render_turns(self._whole.first(len(messages)), turns, self.on_dropped_message)

    def joint(self, turns: Sequence[int], count: int | None = None, *, must: bool) -> Rendered | None:
        """Render them in one text; `None` where that is refused, and each alone need not be."""
        try:
            return self.until(turns, count)
        except BadRow as error:
            if must or error.code not in _SPLITTABLE:
                raise
            return None


def append_missing_stop(rendered: Rendered, template: Template) -> Rendered:
    """Return the text with EOS after a last turn that the template leaves without a stop; else as it is."""
    eos = template.special_tokens.get("eos_token")
    last = max((span for span in rendered.spans if span.generated), default=None)
    if last is None or eos is None or rendered.text[last.end :].strip():
        return rendered
    if "missing_final_stop" not in rendered.flags and (
        "no_trained_stop" not in rendered.flags or last.part is Part.SCAFFOLD
    ):
        return rendered
    text = rendered.text[: last.end] + eos
    spans = (
        *(span for span in rendered.spans if span.end <= last.end),
        Span(last.end, len(text), Part.SCAFFOLD, last.message, True),
    )
    # Whether an earlier turn has no stop either, its tokens tell.
    return rendered._replace(
        text=text, spans=spans, flags=rendered.flags - {"missing_final_stop", "no_trained_stop"} | {"eos_appended"}
    )


def _groups(messages: Sequence[Message], assistants: Sequence[int]) -> Iterator[list[int]]:
    """Yield the assistant turns that follow one user message: a call, and the answer to what it returned."""
    group: list[int] = []
    for turn in assistants:
        if group and any(message["role"] == "user" for message in messages[group[-1] : turn]):
            yield group
            group = []
        group.append(turn)
    yield group


def _split(chat: _Chats, group: Sequence[int]) -> Iterator[Rendered]:
    if len(group) > 1:
        together = chat.joint(group, group[-1] + 1, must=False)
        if together is not None and "history_rewritten" not in together.flags:
            yield together
            return
    for turn in group:
        yield chat.until([turn], turn + 1)


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
        name: track_value(value, Part.CONTENT, index) for index, (name, value) in enumerate(conversation.fields.items())
    }
    try:
        text = template.run(owners)
    except BadRow as error:
        error.hint = f"the row has {', '.join(conversation.fields) or 'messages'}; columns= maps other names"
        raise
    parts = pieces_of(text)
    arrived = {piece.message for piece in parts}
    for index, (name, value) in enumerate(conversation.fields.items()):
        if value.strip() and index not in arrived:
            raise BadRow(
                "message_dropped",
                f"template {template.name!r} does not print this column",
                field=name,
                hint="use a template that has room for it, or take it out of the data",
            )
    answer = conversation.completion_from
    blocks = dict.fromkeys(piece.block for piece in parts if piece.block)
    regions = [
        TurnRegion(answer, min(p.start for p in parts if p.block == b), max(p.end for p in parts if p.block == b))
        for b in blocks
    ]
    if not regions:
        raise BadRow("nothing_marked", f"template {template.name!r} marks nothing as trained for this row")
    prompt_parts = (piece._replace(message=min(piece.message, 0)) for piece in parts)
    return Rendered(str.__str__(text), make_spans(prompt_parts, regions), add_bos=True)
