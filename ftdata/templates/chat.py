"""Chat: a conversation under a chat template, whole, cut short or changed, and the regions of its turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ftdata.errors import BadRow
from ftdata.templates import markers
from ftdata.templates.arrival import check_arrival, recover
from ftdata.templates.memory import key_of
from ftdata.templates.spans import Piece, Region, pieces, split_thinking, tile, tracked_messages
from ftdata.templates.template import Template, chat_variables
from ftdata.templates.tracked import Tracked
from ftdata.templates.watched import watched, watching
from ftdata.types import Conversation, Message, Part, Rendered


@dataclass(frozen=True)
class Chat:
    """A conversation as one chat template is given it: messages whose strings are tracked."""

    template: Template
    messages: tuple[dict[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    flags: frozenset[str] = frozenset()
    watch: bool = False

    @classmethod
    def of(cls, conversation: Conversation, template: Template) -> Chat:
        """Track the conversation's messages."""
        return cls(template, tuple(tracked_messages(conversation.messages)), conversation.tools)

    def until(self, last: int) -> Chat:
        """Return the conversation up to and including message `last`."""
        return replace(self, messages=self.messages[: last + 1])

    def text(self, count: int | None = None, *, generation_prompt: bool = False) -> Tracked:
        """Render the first `count` messages, by default all.

        Raises:
            BadRow: the template fails.
        """
        messages = list(self.messages[:count])
        variables = chat_variables(messages, self.tools, generation_prompt=generation_prompt)
        return self.template.run(variables, watch=self.watch)

    def watched(self) -> Chat:
        """Return the same conversation with its texts watched (`watched.watching`)."""
        return replace(self, messages=tuple(watched(self.messages)), watch=True)

    def changed(self, index: int, message: Message | dict[str, Any]) -> str | None:
        """Render with another message `index`; `None` where the template fails."""
        (other,) = tracked_messages([message])
        try:
            return str.__str__(
                replace(self, messages=(*self.messages[:index], other, *self.messages[index + 1 :])).text()
            )
        except BadRow:
            return None


def render_chat(chat: Chat, turns: Sequence[int], dropped: str = "refuse") -> Rendered:
    """Render a conversation, with the regions of the given assistant turns.

    Raises:
        BadRow: the template fails on it, drops some of it, or where a turn begins and ends is not certain.
    """
    chat, tracked = _rendered(chat)
    text = str.__str__(tracked)
    parts = recover(text, pieces(tracked), chat.messages, chat.changed)
    flags = chat.flags | check_arrival(chat.messages, text, parts, dropped)
    if chat.tools and not any(piece.part is Part.TOOLS for piece in parts):
        flags |= {"tools_dropped"}
    if chat.template.tagged and chat.template.strict:
        regions = _in_turns(markers.from_blocks(parts, turns), turns)
    else:
        located = _located(chat, tracked, parts, turns)
        regions = [turn.region for turn in located]
        flags = flags.union(*(turn.flags for turn in located))
        for before, after in pairwise(regions):
            if after.start < before.end:
                raise BadRow(
                    "overlap",
                    f"the model is asked for this turn before message {before.message} has ended",
                    field=f"messages[{after.message}]",
                    hint="join the two answers into one message",
                )
        if chat.template.tagged and _marked(parts, turns) != [one for one in regions if one.start < one.end]:
            flags |= {"tags_overruled"}
    return Rendered(text, tile(split_thinking(text, parts, regions), regions), flags, messages=len(chat.messages))


def _rendered(chat: Chat) -> tuple[Chat, Tracked]:
    try:
        return chat, chat.text()
    except BadRow:
        if not any(message.get("tool_calls") for message in chat.messages):
            raise
        # Some templates print the arguments of a call as they are, and so need them as text.
        messages = tuple(tracked_messages([_with_text_arguments(message) for message in chat.messages]))
        chat = replace(chat, messages=messages, flags=chat.flags | {"arguments_as_text"})
        return chat, chat.text()


def _located(chat: Chat, tracked: Tracked, parts: tuple[Piece, ...], turns: Sequence[int]) -> list[markers.Turn]:
    """Find the turns, or remember where they are in renderings like this one."""
    text, memory = str.__str__(tracked), chat.template.memory
    key = key_of(chat.messages, chat.tools, turns, text, parts)
    if (known := memory.recall(key, chat.messages, text, parts)) is not None:
        return known
    seen: dict[tuple[int, bool], Tracked] = {}
    asked = chat.watched() if chat.template.foreseeable else chat

    def prefix(count: int, generation_prompt: bool) -> Tracked:
        place = (count, generation_prompt)
        if place not in seen:
            seen[place] = asked.text(count, generation_prompt=generation_prompt)
        return seen[place]

    with watching() as log:
        same = not asked.watch or asked.text() == tracked
        found = [_locate(chat, text, parts, turn, prefix) for turn in turns]
    if asked.watch and same and parts == pieces(tracked):
        memory.keep(key, log, text, seen.values(), parts, found)
    return found


def _locate(chat: Chat, text: str, parts: Sequence[Piece], turn: int, prefix: markers.RenderPrefix) -> markers.Turn:
    try:
        return markers.locate(text, parts, turn, prefix, len(chat.messages), chat.template.stops)
    except BadRow as error:
        error.field = error.field or f"messages[{turn}]"
        # Of the tags that vendors put into templates, many train headers or miss the stop: they are no proof.
        if chat.template.tagged:
            error.hint = "its own generation tags could not be confirmed; to trust them, pass the template as a file"
        raise


def _in_turns(regions: Sequence[Region], turns: Sequence[int]) -> list[Region]:
    return [region for region in regions if region.message in turns]


def _marked(parts: Sequence[Piece], turns: Sequence[int]) -> list[Region] | None:
    try:
        return _in_turns(markers.from_blocks(parts, turns), turns)
    except BadRow:
        return None


def _with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return dict(message)
    calls: list[dict[str, Any]] = [dict(call) for call in message["tool_calls"]]
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and not isinstance(function.get("arguments"), str):
            call["function"] = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
    return {**message, "tool_calls": calls}
