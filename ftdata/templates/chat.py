"""Render conversations with a chat template, and locate the turns in the rendered text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, reduce
from itertools import combinations, pairwise
from typing import Any

from ftdata.errors import BadRow
from ftdata.schemas import ROLES, STANDS_FOR
from ftdata.schemas.answer_text import EMPTY_THINKING
from ftdata.templates.attribution.coverage import check_coverage, recover_attribution
from ftdata.templates.attribution.spans import (
    TextPiece,
    TurnRegion,
    make_spans,
    pieces_of,
    split_thinking,
    track_messages,
)
from ftdata.templates.attribution.tracked_strings import TrackedString
from ftdata.templates.template import Template, make_chat_variables
from ftdata.templates.turns import locate
from ftdata.types import Message, Part, Rendered

_ROLES = sorted(set(ROLES.values()))


@dataclass(frozen=True)
class ChatRendering:
    """A conversation whose texts are `TrackedString` objects, together with its chat template.

    Attributes:
        template: the chat template.
        messages: messages with `TrackedString` texts.
        tools: tool definitions.
        flags: flags for changes to the messages.
    """

    template: Template
    messages: tuple[dict[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    flags: frozenset[str] = frozenset()

    @classmethod
    def from_messages(
        cls, original_messages: Sequence[Message], tools: tuple[dict[str, Any], ...], template: Template
    ) -> ChatRendering:
        """Convert the strings of a conversation to `TrackedString`. Replace roles that the template does not support.

        Tool call arguments that are JSON strings become objects unless the template accepts strings.

        Raises:
            BadRow: `tool_arguments`, if the arguments are not valid JSON; `unknown_role`, if the template does not
                support the role of a message.
        """
        messages: Sequence[Mapping[str, Any]] = [
            _replace_unknown_role(message, index, template) for index, message in enumerate(original_messages)
        ]
        flags: frozenset[str] = frozenset()
        if any(new["role"] != old["role"] for new, old in zip(messages, original_messages, strict=True)):
            flags |= {"role_replaced"}
        if not template.takes_text_arguments and any(map(_has_text_arguments, messages)):
            messages = [_convert_arguments(message, _parse_arguments) for message in messages]
            flags |= {"arguments_parsed"}
        return cls(template, tuple(track_messages(messages)), tools, flags)

    def prefix(self, count: int) -> ChatRendering:
        """Return a copy that contains only the first `count` messages of the conversation."""
        return replace(self, messages=self.messages[:count])

    def with_call_ids(self) -> ChatRendering:
        """Return a copy in which every tool call and every tool result has an id."""
        messages = tuple(track_messages([*_add_call_ids(self.messages)]))
        return replace(self, messages=messages, flags=self.flags | {"tool_call_ids_added"})

    def with_text_arguments(self) -> ChatRendering:
        """Return a copy in which the arguments of every tool call are JSON text."""
        messages = tuple(track_messages([_convert_arguments(message, _dump_arguments) for message in self.messages]))
        return replace(self, messages=messages, flags=self.flags | {"arguments_as_text"})

    def with_empty_content(self) -> ChatRendering:
        """Return a copy in which messages with tool calls and no content have an empty content."""
        messages = [{**message, "content": ""} if _lacks_content(message) else message for message in self.messages]
        return replace(self, messages=tuple(track_messages(messages)), flags=self.flags | {"empty_content_added"})

    def render(self, count: int | None = None, *, generation_prompt: bool = False) -> TrackedString:
        """Render the first `count` messages, or all messages by default.

        Raises:
            BadRow: `template_raises`, if the template fails.
        """
        messages = list(self.messages[:count])
        return self.template.render(make_chat_variables(messages, self.tools, generation_prompt=generation_prompt))

    def render_with_message(self, index: int, message: Message | dict[str, Any]) -> str | None:
        """Replace the message at `index` and render the conversation. Return `None` if the template fails."""
        (tracked_message,) = track_messages([message])
        messages = [*self.messages[:index], tracked_message, *self.messages[index + 1 :]]
        try:
            return self.template.render_text(make_chat_variables(messages, self.tools))
        except BadRow:
            return None


def render_turns(chat: ChatRendering, turns: Sequence[int], on_dropped_message: str = "reject") -> Rendered:
    """Render a conversation, check that no message is missing, and locate the assistant messages in `turns`.

    Args:
        chat: the conversation and its template.
        turns: indices of the assistant messages to locate.
        on_dropped_message: what to do if the template omits a message that is not an assistant message: `"reject"`
            or `"flag"`.

    Raises:
        BadRow: the template fails or omits text, or the boundaries of a turn are uncertain.
    """
    chat, tracked = _render_tracked(chat)
    text = str.__str__(tracked)
    ids = chat.template.token_ids(text)
    control = chat.template.control
    pieces = recover_attribution(text, pieces_of(tracked), chat.messages, chat.render_with_message, control)
    assistants = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    context = [index for index in assistants if index not in turns]
    flags = chat.flags | check_coverage(
        chat.messages, chat.tools, text, pieces, chat.render_with_message, on_dropped_message, context
    )
    regions, region_flags = _locate_regions(chat, text, pieces, turns)
    spans = make_spans(split_thinking(text, pieces, regions, assistants), regions)
    region_flags |= _flag_empty_thinking(text, pieces, regions)
    return Rendered(text, spans, flags | region_flags, messages=len(chat.messages), ids=ids)


def _flag_empty_thinking(text: str, pieces: Sequence[TextPiece], regions: Sequence[TurnRegion]) -> frozenset[str]:
    """Return the `empty_thinking` flag if a turn begins with an empty thinking block that the template printed."""
    for region in regions:
        match = EMPTY_THINKING.match(text, region.start, region.end)
        is_row_text = match and any(
            piece.part is not Part.SCAFFOLD
            and text[max(piece.start, match.start()) : min(piece.end, match.end())].strip()
            for piece in pieces
        )
        if match and not is_row_text:
            return frozenset({"empty_thinking"})
    return frozenset()


def _locate_regions(
    chat: ChatRendering, text: str, pieces: tuple[TextPiece, ...], turns: Sequence[int]
) -> tuple[list[TurnRegion], frozenset[str]]:
    """Locate the text that the model generates in each turn. Return the text ranges and their flags.

    The generation tags in a template file of the user take precedence over the detected regions.
    """
    has_trusted_tags = chat.template.has_generation_tags and chat.template.strict
    assistants = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if 0 in turns:
        message = "the conversation begins with an assistant message, which cannot be trained without a prompt"
        raise BadRow("no_prompt", message, hint="put a user message before it, remove it, or set train: false in it")
    tagged = locate.regions_from_blocks(pieces, assistants, turns) if has_trusted_tags else None
    try:
        located = _locate_turns(chat, text, pieces, turns)
        _check_disjoint([turn.region for turn in located])
    except BadRow:
        if tagged is None:
            raise
        return tagged, frozenset({"generation_tags_unconfirmed"})
    regions = [turn.region for turn in located]
    flags = frozenset[str]().union(*(turn.flags for turn in located))
    nonempty = [region for region in regions if region.start < region.end]
    if tagged is not None:
        return (regions, flags) if tagged == nonempty else (tagged, flags | {"generation_tags_unconfirmed"})
    if chat.template.has_generation_tags and (marked := _read_tags(pieces, assistants, turns)) != nonempty:
        # If a template has no generation prompt, only its tags indicate that the model does not generate the header.
        if marked and not chat.template.has_generation_prompt and _has_later_starts(marked, nonempty):
            return marked, flags | {"generation_tags_unconfirmed"}
        flags |= {
            "generation_tags_overruled",
            *(["stop_outside_generation_tags"] if marked and _has_earlier_ends(marked, nonempty) else []),
        }
    if not chat.template.has_generation_prompt:
        flags |= _flag_trained_headers(text, pieces, regions)
    return regions, flags


def _flag_trained_headers(text: str, pieces: Sequence[TextPiece], regions: Sequence[TurnRegion]) -> frozenset[str]:
    """Return the flag `header_trained` if a turn begins with template text of a template without generation prompt.

    Template text before a tool call or reasoning is not a header, but a token that the model must generate.
    """
    for region in regions:
        inside = (piece for piece in pieces if region.start <= piece.start < region.end)
        first = next((piece for piece in inside if piece.part is not Part.SCAFFOLD), None)
        if first is not None and first.part is Part.CONTENT and text[region.start : first.start].strip():
            return frozenset({"header_trained"})
    return frozenset()


def _has_later_starts(tagged: Sequence[TurnRegion], detected: Sequence[TurnRegion]) -> bool:
    same_ends = [(region.message, region.end) for region in tagged] == [
        (region.message, region.end) for region in detected
    ]
    return same_ends and all(
        tagged_region.start >= detected_region.start
        for tagged_region, detected_region in zip(tagged, detected, strict=True)
    )


def _has_earlier_ends(tagged: Sequence[TurnRegion], detected: Sequence[TurnRegion]) -> bool:
    ends = {region.message: region.end for region in tagged}
    return all(ends.get(region.message, region.end) < region.end for region in detected)


def _check_disjoint(regions: Sequence[TurnRegion]) -> None:
    for before, after in pairwise(regions):
        if after.start < before.end:
            raise BadRow(
                "overlap",
                f"the generated texts of messages {before.message} and {after.message} overlap in the rendered text",
                field=f"messages[{after.message}]",
                hint="join the two assistant messages into one message",
            )


def _render_tracked(chat: ChatRendering) -> tuple[ChatRendering, TrackedString]:
    """Render a conversation. If the template fails, try again with other forms of the tool calls.

    Raises:
        BadRow: `template_raises`, if the template fails for every form.
    """
    try:
        return chat, chat.render()
    except BadRow:
        for other_form in _other_call_forms(chat):
            with suppress(BadRow):
                return other_form, other_form.render()
        raise


def _other_call_forms(chat: ChatRendering) -> Iterator[ChatRendering]:
    """Yield copies of a conversation with other forms of its tool calls: single changes first, then combinations."""
    changes = list[Callable[[ChatRendering], ChatRendering]]()
    calls = [call for message in chat.messages for call in message.get("tool_calls") or ()]
    if any(map(_lacks_content, chat.messages)):
        # OpenAI's format has `content: null` in messages with tool calls, and some templates search in the content.
        changes.append(ChatRendering.with_empty_content)
    if any(not call.get("id") for call in calls):
        # The templates of Mistral require an id for each tool call, and many data sets have none.
        changes.append(ChatRendering.with_call_ids)
    if calls:
        # Some templates print tool call arguments without conversion, so the arguments must be text.
        changes.append(ChatRendering.with_text_arguments)
    for count in range(1, len(changes) + 1):
        for combination in combinations(changes, count):
            yield reduce(lambda form, change: change(form), combination, chat)


def _lacks_content(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls")) and "content" not in message


def _add_call_ids(messages: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Add ids to tool calls without an id, and to the results that follow them. Results are matched in order.

    The ids depend only on the positions of the calls. A cached rendering is reused for conversations of the same roles,
    keys and types, so an id that depended on the texts would be wrong in another conversation.
    """
    pending = list[str]()
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            pending = [call.get("id") or _make_call_id(index, n) for n, call in enumerate(message["tool_calls"])]
            calls = [{**call, "id": call_id} for call, call_id in zip(message["tool_calls"], pending, strict=True)]
            yield {**message, "tool_calls": calls}
        elif message["role"] == "tool" and pending:
            call_id = message.get("tool_call_id") or pending[0]
            pending = [pending_id for pending_id in pending if pending_id != call_id]
            yield {**message, "tool_call_id": call_id}
        else:
            yield message


def _make_call_id(message: int, call: int) -> str:
    """Return an id of 9 letters and digits, as the templates of Mistral require."""
    return hashlib.sha256(f"{message}.{call}".encode()).hexdigest()[:9]


def _locate_turns(
    chat: ChatRendering, text: str, pieces: Sequence[TextPiece], turns: Sequence[int]
) -> list[locate.LocatedTurn]:
    @cache
    def prefix(count: int, generation_prompt: bool) -> TrackedString:
        return chat.render(count, generation_prompt=generation_prompt)

    return [_locate_turn(chat, text, pieces, turn, prefix) for turn in turns]


def _locate_turn(
    chat: ChatRendering, text: str, pieces: Sequence[TextPiece], turn: int, prefix: locate.RenderPrefix
) -> locate.LocatedTurn:
    try:
        return locate.locate_turn(text, pieces, turn, prefix, len(chat.messages), chat.template.stops)
    except BadRow as error:
        error.field = error.field or f"messages[{turn}]"
        # The generation tags of model vendors often include headers or omit the stop token, so they are not trusted.
        if chat.template.has_generation_tags:
            error.hint = "pass the template as a file to trust its generation tags, which could not be confirmed"
        raise


def _read_tags(pieces: Sequence[TextPiece], assistants: Sequence[int], turns: Sequence[int]) -> list[TurnRegion] | None:
    try:
        return locate.regions_from_blocks(pieces, assistants, turns)
    except BadRow:
        return None


def _has_text_arguments(message: Mapping[str, Any]) -> bool:
    functions = (call.get("function") for call in message.get("tool_calls") or ())
    return any(isinstance(function, Mapping) and isinstance(function.get("arguments"), str) for function in functions)


def _convert_arguments(message: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    calls: list[dict[str, Any]] = [dict(call) for call in message.get("tool_calls") or ()]
    for call in calls:
        function = call.get("function")
        if isinstance(function, Mapping):
            call["function"] = {**function, "arguments": convert(function.get("arguments"))}
    return {**message, "tool_calls": calls} if calls else dict(message)


def _replace_unknown_role(message: Message, index: int, template: Template) -> Message:
    """Replace the role of a message with an equivalent standard role if the template does not mention the role."""
    role = message["role"]
    if role in _ROLES or re.search(rf"""(['"]){re.escape(role)}\1""", template.source):
        return message
    if role not in STANDS_FOR:
        problem = f"template {template.name!r} does not support the role {role!r}"
        hint = f"use one of the roles {', '.join(_ROLES)}"
        raise BadRow("unknown_role", problem, field=f"messages[{index}].role", hint=hint)
    return {**message, "role": STANDS_FOR[role]}


def _parse_arguments(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        # Python's own parser supports integers of any size.
        return json.loads(arguments) if arguments.strip() else {}
    except ValueError as error:
        problem = f"the tool call arguments are not valid JSON: {error}"
        raise BadRow("tool_arguments", problem, field="tool_calls") from None


def _dump_arguments(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
