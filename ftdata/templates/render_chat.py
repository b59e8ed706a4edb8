"""Render conversations and other rows to text, and mark the text that the model must generate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from ftdata.errors import BadRow, TemplateRefused
from ftdata.templates.attribution.spans import TurnRegion, make_spans, pieces_of, track_value
from ftdata.templates.render_cache import TemplateNeeded, render_cache, render_cached
from ftdata.templates.template import Template, templates
from ftdata.types import IMAGE_PART, Conversation, Message, Part, Rendered, Span

_SPLITTABLE = frozenset({"history_drift", "unknown_stop", "overlap"})
"""Codes of errors that may occur only if all turns of a conversation are rendered in one text."""

_FORMAT_REFUSED = frozenset({"template_raises", "message_dropped", "content_stringified"})
"""Codes of errors that occur if a template takes only text and a content is a list of parts, or the other way round."""


def render_chat(
    conversation: Conversation, template: Template, turns: str = "auto", on_dropped_message: str = "reject"
) -> tuple[Rendered, ...]:
    """Render a conversation to one or more texts, and attribute each character to a message or to the template.

    Args:
        conversation: the normalized row.
        template: the template.
        turns: `"joint"`: one text for all turns. `"split"`: one text per group of assistant messages that answer one
            user message, with the same history that the model sees at inference. `"auto"`: `"joint"` if the template
            renders earlier turns as the model wrote them, otherwise `"split"`.
        on_dropped_message: what to do if the template omits a message that is not an assistant message: `"reject"`
            or `"flag"`.

    Returns:
        One text, or several texts that each train some of the turns.

    Raises:
        BadRow: the row does not fit the template, or the boundaries of a turn are uncertain.
        TemplateRefused: `no_template`, if the row requires a template and the tokenizer has none.
    """
    if conversation.text is not None and (not template.source or template.is_chat):
        return (_render_formatted_text(conversation.text, template),)
    if not template.source:
        hint = f"pass template= with one of {', '.join(templates.names())}, or with the path of a template file"
        raise TemplateRefused("no_template", "the tokenizer has no chat template", hint=hint)
    if not template.is_chat:
        return (_render_fields(conversation, template),)
    if template.is_user_code:
        return _render_with_function(conversation, template, turns, on_dropped_message)
    try:
        return _render_or_explain(conversation, template, turns, on_dropped_message)
    except BadRow as error:
        if error.code not in _FORMAT_REFUSED:
            raise
        for flag, change in CONTENT_FORMATS.items():
            if (changed := change(conversation)) != conversation:
                with suppress(BadRow):
                    texts = _render_or_explain(changed, template, turns, on_dropped_message)
                    return tuple(text._replace(flags=text.flags | {flag}) for text in texts)
        raise


def _render_with_function(
    conversation: Conversation, template: Template, turns: str, on_dropped_message: str
) -> tuple[Rendered, ...]:
    """Render a conversation with a function. Its contents are texts: most functions would print a list as Python code.

    Raises:
        BadRow: as in `render_chat`; `content_parts`, if a content has other parts than texts.
    """
    flags = set[str]()
    for flag in ("content_parts_joined", "content_parts_merged"):
        changed = CONTENT_FORMATS[flag](conversation)
        flags |= {flag} if changed != conversation else set()
        conversation = changed
    for index, message in enumerate(conversation.messages):
        if isinstance(message.get("content"), list):
            problem = f"the content has parts that are not texts, which the function {template.name} cannot receive"
            hint = "use a Jinja template"
            raise BadRow("content_parts", problem, field=f"messages[{index}].content", hint=hint)
    texts = _render_or_explain(conversation, template, turns, on_dropped_message)
    return tuple(text._replace(flags=text.flags | flags) for text in texts)


def _render_or_explain(
    conversation: Conversation, template: Template, turns: str, on_dropped_message: str
) -> tuple[Rendered, ...]:
    """Render a conversation. If the template raises an error, add a hint to the error."""
    try:
        return _render_chat_with(conversation, template, turns, on_dropped_message)
    except BadRow as error:
        if error.code != "template_raises":
            raise
        hint = error.hint or _explain_failure(conversation, error.message)
        raise BadRow(error.code, error.message, field=error.field, hint=hint) from None


def _explain_failure(conversation: Conversation, message: str) -> str:
    """Return a hint for the error of a template, with special hints for common reasons."""
    for index, one in enumerate(conversation.messages):
        if isinstance(content := one.get("content"), list):
            if IMAGE_PART in content:
                return "use the chat template of the model, because this template may not print images"
            return f"join the text parts of message {index} to one text, because the template may accept only text"
        has_ids = any("id" in call for call in one.get("tool_calls") or ())
        if has_ids and re.search(r"\bid\b", message, re.IGNORECASE):
            return "remove the ids of tool calls and results, and ftdata adds ids of nine letters and digits"
    if any(one.get("tool_calls") or one["role"] == "tool" for one in conversation.messages):
        return "the template may not support this use of tools (see: ftdata templates check); use another template"
    return "correct the row, or use a template that accepts it"


def render_without_template(
    conversation: Conversation, template: Template, turns: str = "auto"
) -> tuple[Rendered, ...] | None:
    """Render a conversation like `render_chat`, but without running the template.

    A cached layout prints every message, so `on_dropped_message` does not apply. Return `None` if the template must run
    because no layout applies to the conversation.
    """
    if not template.source or (conversation.text is not None and template.is_chat):
        return render_chat(conversation, template, turns)
    if not template.is_chat or conversation.tools:
        return None
    try:
        return _render_chat(conversation.messages, turns, render_cache(template.key).render)
    except TemplateNeeded:
        return None


def trained_answers(messages: Sequence[Message]) -> list[int]:
    """Return the indices of all assistant messages, except messages with `train: false`."""
    return [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and (len(message) == 2 or message.get("train", True))
    ]


def join_text_parts(conversation: Conversation) -> Conversation:
    """Copy a conversation. If a content is a list of exactly one text part, convert it to a string."""
    return replace(conversation, messages=tuple(map(_join_text_part, conversation.messages)))


def _join_text_part(message: Message) -> Message:
    """Convert a message's content to a string if it is a list of exactly one text part.

    Return the message unchanged if it has several parts, since the separator between them is a choice.
    """
    content = message.get("content")
    if not isinstance(content, list) or len(content) != 1 or content[0].keys() != {"type", "text"}:
        return message
    return {**message, "content": content[0]["text"]} if content[0]["type"] == "text" else message


def merge_text_parts(conversation: Conversation) -> Conversation:
    """Copy a conversation. If a content is a list of several text parts, join them with line breaks, as vLLM does."""
    return replace(conversation, messages=tuple(map(_merge_text_parts, conversation.messages)))


def _merge_text_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, list) or any(part.keys() != {"type", "text"} for part in content):
        return message
    if any(part["type"] != "text" for part in content):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def divide_texts(conversation: Conversation) -> Conversation:
    """Copy a conversation. If a content is a string, convert it to a list of one text part."""
    return replace(conversation, messages=tuple(map(_divide_text, conversation.messages)))


def _divide_text(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


CONTENT_FORMATS: dict[str, Callable[[Conversation], Conversation]] = {
    "content_parts_joined": join_text_parts,
    "content_as_parts": divide_texts,
    "content_parts_merged": merge_text_parts,
}
"""Flag of an example -> the change with which its template accepts the contents of the messages."""

_RenderMessages = Callable[[tuple[Message, ...], Sequence[int]], Rendered]
"""Renders messages: (messages, indices of the turns to locate) -> rendered text."""


def _render_chat_with(
    conversation: Conversation, template: Template, turns: str, on_dropped_message: str
) -> tuple[Rendered, ...]:
    def render(messages: tuple[Message, ...], indices: Sequence[int]) -> Rendered:
        return render_cached(messages, conversation.tools, template, indices, on_dropped_message)

    return _render_chat(conversation.messages, turns, render)


def _render_chat(messages: tuple[Message, ...], turns: str, render: _RenderMessages) -> tuple[Rendered, ...]:
    assistants = trained_answers(messages)
    if turns != "split":
        joint = _render_joint(render, messages, assistants, required=turns == "joint")
        if joint is not None and (turns == "joint" or "history_rewritten" not in joint.flags):
            return (joint,)
    groups = _group_turns(messages, assistants)
    texts = tuple(text for group in groups for text in _split_group(render, messages, group))
    if len(texts) == 1:
        return texts
    return tuple(text._replace(flags=text.flags | {"conversation_split"}) for text in texts)


def _render_joint(
    render: _RenderMessages, messages: tuple[Message, ...], turns: Sequence[int], *, required: bool
) -> Rendered | None:
    """Render several turns in one text.

    Return `None` for an error that does not occur if the turns are rendered separately. If `required` is true, raise
    the error instead.
    """
    try:
        return render(messages, turns)
    except BadRow as error:
        if required or error.code not in _SPLITTABLE:
            raise
        return None


def append_missing_stop(rendered: Rendered, template: Template) -> Rendered:
    """Append EOS to a rendered text if the template prints no stop token after the last turn."""
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
    # Stop tokens that earlier turns lack are detected from the tokens later.
    return rendered._replace(
        text=text,
        spans=spans,
        flags=rendered.flags - {"missing_final_stop", "no_trained_stop"} | {"eos_appended"},
        ids=(),
    )


def _group_turns(messages: Sequence[Message], assistants: Sequence[int]) -> Iterator[list[int]]:
    """Group assistant messages that answer the same user message, and yield the message indices of each group."""
    group: list[int] = []
    for turn in assistants:
        if group and any(message["role"] == "user" for message in messages[group[-1] : turn]):
            yield group
            group = []
        group.append(turn)
    yield group


def _split_group(render: _RenderMessages, messages: tuple[Message, ...], group: Sequence[int]) -> Iterator[Rendered]:
    if len(group) > 1:
        joint = _render_joint(render, messages[: group[-1] + 1], group, required=False)
        if joint is not None and "history_rewritten" not in joint.flags:
            yield joint
            return
    for turn in group:
        try:
            yield render(messages[: turn + 1], [turn])
        except BadRow as error:
            if error.code != "history_drift":
                raise
            # The hint of the original error suggests splitting the conversation, but it is already split.
            hint = "merge consecutive assistant messages into one message, or use another template"
            raise BadRow(error.code, error.message, field=error.field, hint=hint) from None


def _render_formatted_text(text: str, template: Template) -> Rendered:
    eos, bos, pad = (template.special_tokens.get(f"{name}_token", "") for name in ("eos", "bos", "pad"))
    add_bos = not (bos and text.lstrip().startswith(bos))
    spans = (Span(0, len(text), Part.CONTENT, 0, True),)
    # Many trainers append a second EOS to text that a template has already formatted. The padding token, such as
    # <|endoftext|>, also ends the texts of some models.
    if not eos or text.rstrip().endswith(tuple(filter(None, (eos, pad)))):
        return Rendered(text, spans, add_bos=add_bos, keep_control=True)
    ending = Span(len(text), len(text) + len(eos), Part.SCAFFOLD, 0, True)
    flags = frozenset({"eos_appended"})
    return Rendered(text + eos, (*spans, ending), flags, add_bos=add_bos, keep_control=True)


def _render_fields(conversation: Conversation, template: Template) -> Rendered:
    variables = {
        name: track_value(value, Part.CONTENT, index) for index, (name, value) in enumerate(conversation.fields.items())
    }
    try:
        text = template.render(variables)
    except BadRow as error:
        error.hint = f"the row has {', '.join(conversation.fields) or 'messages'}; use columns= to map other names"
        raise
    pieces = pieces_of(text)
    printed = {piece.message for piece in pieces}
    for index, (name, value) in enumerate(conversation.fields.items()):
        if value.strip() and index not in printed:
            problem = f"template {template.name!r} does not print the column {name!r}"
            hint = "use a template that prints the column, or remove the column from the data"
            raise BadRow("message_dropped", problem, field=name, hint=hint)
    answer = conversation.completion_from
    blocks = dict.fromkeys(piece.block for piece in pieces if piece.block)
    regions = [
        TurnRegion(answer, min(p.start for p in pieces if p.block == b), max(p.end for p in pieces if p.block == b))
        for b in blocks
    ]
    if not regions:
        raise BadRow("nothing_marked", f"template {template.name!r} marks no text of this row as generated")
    message_pieces = (piece._replace(message=min(piece.message, 0)) for piece in pieces)
    return Rendered(str.__str__(text), make_spans(message_pieces, regions), add_bos=True)
