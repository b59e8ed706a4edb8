"""Chat: a conversation under a chat template, whole, cut short or changed, and the regions of its turns."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from ftdata.errors import BadRow
from ftdata.schemas import ROLES, STANDS_FOR
from ftdata.schemas.messages import THINKING_NAMES
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
from ftdata.templates.attribution.watched_strings import (
    Origin,
    WatchedString,
    record_operations,
    unwatch,
    watch_messages,
)
from ftdata.templates.cache.plans import (
    RenderPlan,
    conversation_shape,
    has_same_origins,
    message_contents,
    recorded_pieces,
)
from ftdata.templates.cache.turn_cache import skeleton_key
from ftdata.templates.template import Template, make_chat_variables
from ftdata.templates.turns import locate
from ftdata.types import Conversation, Message, Part, Rendered

_ROLES = sorted(set(ROLES.values()))

_MAX_CACHED_MESSAGES = 200
"""Renderings of longer conversations are not cached."""


@dataclass(frozen=True)
class ChatRendering:
    """A conversation as one chat template is given it: messages whose strings are tracked."""

    template: Template
    messages: tuple[dict[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    flags: frozenset[str] = frozenset()
    watch: bool = False

    @classmethod
    def of(cls, conversation: Conversation, template: Template) -> ChatRendering:
        """Track the conversation's messages; arguments of calls are objects where the template does not take text.

        Raises:
            BadRow: such arguments are text that is not JSON, or a message has a role that the template does not name.
        """
        messages: Sequence[Mapping[str, Any]] = [
            _in_known_role(message, index, template) for index, message in enumerate(conversation.messages)
        ]
        flags: frozenset[str] = frozenset()
        if not template.takes_text_arguments and any(map(_has_text_arguments, messages)):
            messages = [_with_arguments(message, _as_object) for message in messages]
            flags = frozenset({"arguments_parsed"})
        return cls(template, tuple(track_messages(messages)), conversation.tools, flags)

    def first(self, count: int) -> ChatRendering:
        """Return the first messages of the conversation."""
        return replace(self, messages=self.messages[:count])

    def text(self, count: int | None = None, *, generation_prompt: bool = False) -> TrackedString:
        """Render the first `count` messages, by default all; of a watched conversation the text is watched.

        Raises:
            BadRow: the template fails.
        """
        messages = list(self.messages[:count])
        variables = make_chat_variables(messages, self.tools, generation_prompt=generation_prompt)
        return self.template.rendered(variables, watch=self.watch)

    def watched(self) -> ChatRendering:
        """Return the same conversation with its texts watched (`watched.watching`)."""
        return replace(self, messages=tuple(watch_messages(self.messages)), watch=True)

    def changed(self, index: int, message: Message | dict[str, Any]) -> str | None:
        """Render with another message `index`; `None` where the template fails."""
        (other,) = track_messages([message])
        try:
            return str.__str__(
                replace(self, messages=(*self.messages[:index], other, *self.messages[index + 1 :])).text()
            )
        except BadRow:
            return None


def render_turns(chat: ChatRendering, turns: Sequence[int], on_dropped_message: str = "reject") -> Rendered:
    """Render a conversation, with the regions of the given assistant turns.

    Raises:
        BadRow: the template fails on it, drops some of it, or where a turn begins and ends is not certain.
    """
    chat, tracked = _rendered(chat)
    text = str.__str__(tracked)
    parts = recover_attribution(text, pieces_of(tracked), chat.messages, chat.changed)
    flags = chat.flags | check_coverage(chat.messages, chat.tools, text, parts, chat.changed, on_dropped_message)
    origins: list[Origin | None] = []
    regions, unusual = _regions(chat, tracked, parts, turns, origins)
    assistants = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    spans = make_spans(split_thinking(text, parts, regions, assistants), regions)
    unusual |= _thinking_flags(text, parts, regions)
    rendered = Rendered(text, spans, flags | unusual, messages=len(chat.messages))
    if origins and not flags and parts == pieces_of(tracked):
        # Texts that are joined thousands of times have origins nested too deep to be gone through.
        with suppress(RecursionError):
            plan = _plan(chat, rendered, parts, turns, origins)
            if plan is not None:
                chat.template.plans.keep(chat.messages, turns, plan)
    return rendered


_EMPTY_THINKING = re.compile(rf"\s*(?:<({THINKING_NAMES})>\s*</\1>|</(?:{THINKING_NAMES})>)")
"""An empty thinking block, whole or without the tag that the prompt ends with."""


def _thinking_flags(text: str, parts: Sequence[TextPiece], regions: Sequence[TurnRegion]) -> frozenset[str]:
    """Return the flag of texts in which the template itself begins a turn with an empty thinking block."""
    for region in regions:
        found = _EMPTY_THINKING.match(text, region.start, region.end)
        typed = found and any(
            piece.part is not Part.SCAFFOLD and piece.start < found.end() and found.start() < piece.end
            for piece in parts
        )
        if found and not typed:
            return frozenset({"empty_thinking"})
    return frozenset()


def _plan(
    chat: ChatRendering,
    rendered: Rendered,
    parts: tuple[TextPiece, ...],
    turns: Sequence[int],
    origins: Sequence[Origin | None],
) -> RenderPlan | None:
    """Return how conversations like this one are rendered, if all is known about that.

    `origins` tell how the whole came about, and what it was compared with.
    """
    messages = [{"role": message["role"], "content": str.__str__(message["content"])} for message in chat.messages]
    # What a template does about typed control tokens is looked at in each row that has them.
    if (control := chat.template.control) and any(control.search(message["content"]) for message in messages):
        return None
    key = skeleton_key(chat.messages, (), turns, rendered.text, parts)
    way = chat.template.memory.way(key, chat.messages, rendered.text, parts)
    stretches, contents = recorded_pieces(origins[0], messages, parts, rendered.text), message_contents(messages)
    if way is None or stretches is None or contents is None:
        return None
    plan = RenderPlan.of(way, stretches, rendered, parts, alike=has_same_origins(origins[0], origins[1:]))
    if plan is None or not plan.bounded:
        return None
    return plan if plan.fill(messages, contents) == rendered else None


def _regions(
    chat: ChatRendering,
    tracked: TrackedString,
    parts: tuple[TextPiece, ...],
    turns: Sequence[int],
    origins: list[Origin | None],
) -> tuple[list[TurnRegion], frozenset[str]]:
    """Return what the model must produce, as detected; where the user's own template marks it otherwise, as marked."""
    own = chat.template.tagged and chat.template.strict
    assistants = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    marked = locate.regions_from_blocks(parts, assistants, turns) if own else None
    try:
        located = _located(chat, tracked, parts, turns, origins)
        _check_disjoint([turn.region for turn in located])
    except BadRow:
        if marked is None:
            raise
        return marked, frozenset({"generation_tags_unconfirmed"})
    regions = [turn.region for turn in located]
    flags = frozenset[str]().union(*(turn.flags for turn in located))
    solid = [one for one in regions if one.start < one.end]
    if marked is not None:
        return (regions, flags) if marked == solid else (marked, flags | {"generation_tags_unconfirmed"})
    if chat.template.tagged and (tags := _marked(parts, assistants, turns)) != solid:
        # Where a template has no generation prompt, nothing but its tags says that the model need not write a header.
        if tags and "add_generation_prompt" not in chat.template.names and _begin_later(tags, solid):
            return tags, flags | {"generation_tags_unconfirmed"}
        flags |= {
            "generation_tags_overruled",
            *(["stop_outside_generation_tags"] if tags and _end_sooner(tags, solid) else []),
        }
    return regions, flags


def _begin_later(marked: Sequence[TurnRegion], found: Sequence[TurnRegion]) -> bool:
    pairs = [(one.message, one.end) for one in marked] == [(one.message, one.end) for one in found]
    return pairs and all(one.start >= other.start for one, other in zip(marked, found, strict=True))


def _end_sooner(marked: Sequence[TurnRegion], found: Sequence[TurnRegion]) -> bool:
    ends = {one.message: one.end for one in marked}
    return all(ends.get(one.message, one.end) < one.end for one in found)


def _check_disjoint(regions: Sequence[TurnRegion]) -> None:
    for before, after in pairwise(regions):
        if after.start < before.end:
            raise BadRow(
                "overlap",
                f"the model is asked for this turn before message {before.message} has ended",
                field=f"messages[{after.message}]",
                hint="join the two answers into one message",
            )


def _rendered(chat: ChatRendering) -> tuple[ChatRendering, TrackedString]:
    try:
        return chat, chat.text()
    except BadRow:
        if not any(message.get("tool_calls") for message in chat.messages):
            raise
        # Some templates print the arguments of a call as they are, and so need them as text.
        messages = tuple(track_messages([_with_arguments(message, _as_text) for message in chat.messages]))
        chat = replace(chat, messages=messages, flags=chat.flags | {"arguments_as_text"})
        return chat, chat.text()


def _located(
    chat: ChatRendering,
    tracked: TrackedString,
    parts: tuple[TextPiece, ...],
    turns: Sequence[int],
    origins: list[Origin | None],
) -> list[locate.LocatedTurn]:
    """Find the turns, or remember where they are in renderings like this one.

    Where a plan may come of it, they are found, and `origins` tell how the texts that were compared came about: the
    whole first.
    """
    text, memory = str.__str__(tracked), chat.template.memory
    key = skeleton_key(chat.messages, chat.tools, turns, text, parts)
    # Long conversations are rarely of one shape, and what is recorded of one grows with the square of its messages.
    cached = len(chat.messages) <= _MAX_CACHED_MESSAGES
    planned = cached and not chat.tools and chat.template.plans.wanted(chat.messages, turns)
    if not planned and (known := memory.recall(key, chat.messages, text, parts)) is not None:
        return known
    seen: dict[tuple[int, bool], TrackedString] = {}
    asked = chat.watched() if cached and chat.template.foreseeable else chat
    shape = conversation_shape(chat.messages, ()) if asked.watch and not chat.tools else None

    def run(count: int, generation_prompt: bool) -> TrackedString:
        render = partial(asked.text, count, generation_prompt=generation_prompt)
        if shape is None:
            return render()
        return chat.template.runs.text((shape[:count], generation_prompt), chat.messages, log, render)

    def prefix(count: int, generation_prompt: bool) -> TrackedString:
        place = (count, generation_prompt)
        if place not in seen:
            seen[place] = run(*place)
        return unwatch(seen[place])

    with record_operations() as log:
        whole = run(len(chat.messages), False) if asked.watch else tracked
        found = [_locate(chat, text, parts, turn, prefix) for turn in turns]
    if asked.watch and unwatch(whole) == tracked and parts == pieces_of(tracked):
        # The origins of texts that are joined in long loops are nested too deep to be compared.
        with suppress(RecursionError):
            memory.keep(key, log, text, map(unwatch, seen.values()), parts, found)
    if planned:
        origins += (one.origin if isinstance(one, WatchedString) else ("is", one) for one in (whole, *seen.values()))
    return found


def _locate(
    chat: ChatRendering, text: str, parts: Sequence[TextPiece], turn: int, prefix: locate.RenderPrefix
) -> locate.LocatedTurn:
    try:
        return locate.locate_turn(text, parts, turn, prefix, len(chat.messages), chat.template.stops)
    except BadRow as error:
        error.field = error.field or f"messages[{turn}]"
        # Of the tags that vendors put into templates, many train headers or miss the stop: they are no proof.
        if chat.template.tagged:
            error.hint = "its own generation tags could not be confirmed; to trust them, pass the template as a file"
        raise


def _marked(parts: Sequence[TextPiece], assistants: Sequence[int], turns: Sequence[int]) -> list[TurnRegion] | None:
    try:
        return locate.regions_from_blocks(parts, assistants, turns)
    except BadRow:
        return None


def _has_text_arguments(message: Mapping[str, Any]) -> bool:
    functions = (call.get("function") for call in message.get("tool_calls") or ())
    return any(isinstance(one, Mapping) and isinstance(one.get("arguments"), str) for one in functions)


def _with_arguments(message: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    calls: list[dict[str, Any]] = [dict(call) for call in message.get("tool_calls") or ()]
    for call in calls:
        function = call.get("function")
        if isinstance(function, Mapping):
            call["function"] = {**function, "arguments": change(function.get("arguments"))}
    return {**message, "tool_calls": calls} if calls else dict(message)


def _in_known_role(message: Message, index: int, template: Template) -> Message:
    """Return the message, in the role that its own stands for where the template does not name that."""
    role = message["role"]
    if role in _ROLES or re.search(rf"""(['"]){re.escape(role)}\1""", template.source):
        return message
    if role not in STANDS_FOR:
        raise BadRow(
            "unknown_role",
            f"is {role!r}, which template {template.name!r} does not name",
            field=f"messages[{index}].role",
            hint=f"give it one of the roles {', '.join(_ROLES)}",
        )
    return {**message, "role": STANDS_FOR[role]}


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        # Python's own reader keeps whole numbers of any size.
        return json.loads(arguments) if arguments.strip() else {}
    except ValueError as error:
        raise BadRow("tool_arguments", f"arguments are text that is not JSON: {error}", field="tool_calls") from None


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
