"""Render conversations with a chat template, and locate the turns in the rendered text."""

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
from ftdata.schemas.answer_text import THINKING_NAMES
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
    """A conversation whose texts are `TrackedString` objects, together with its chat template.

    Attributes:
        template: the chat template.
        messages: messages with `TrackedString` texts.
        tools: tool definitions.
        flags: flags for changes to the messages.
        watch: whether the texts of the messages are `WatchedString` objects.
    """

    template: Template
    messages: tuple[dict[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    flags: frozenset[str] = frozenset()
    watch: bool = False

    @classmethod
    def from_conversation(cls, conversation: Conversation, template: Template) -> ChatRendering:
        """Convert the strings of a conversation to `TrackedString`. Replace roles that the template does not support.

        Tool call arguments that are JSON strings become objects unless the template accepts strings.

        Raises:
            BadRow: `tool_arguments`, if the arguments are not valid JSON; `unknown_role`, if the template does not
                support the role of a message.
        """
        messages: Sequence[Mapping[str, Any]] = [
            _replace_unknown_role(message, index, template) for index, message in enumerate(conversation.messages)
        ]
        flags: frozenset[str] = frozenset()
        if not template.takes_text_arguments and any(map(_has_text_arguments, messages)):
            messages = [_convert_arguments(message, _parse_arguments) for message in messages]
            flags = frozenset({"arguments_parsed"})
        return cls(template, tuple(track_messages(messages)), conversation.tools, flags)

    def prefix(self, count: int) -> ChatRendering:
        """Return a copy that contains only the first `count` messages of the conversation."""
        return replace(self, messages=self.messages[:count])

    def render(self, count: int | None = None, *, generation_prompt: bool = False) -> TrackedString:
        """Render the first `count` messages, or all messages by default.

        The result may be a `WatchedString` if the texts of the messages are.

        Raises:
            BadRow: `template_raises`, if the template fails.
        """
        messages = list(self.messages[:count])
        variables = make_chat_variables(messages, self.tools, generation_prompt=generation_prompt)
        return self.template.run(variables, watch=self.watch)

    def with_watched_strings(self) -> ChatRendering:
        """Return a copy of the conversation in which all texts are `WatchedString` objects."""
        return replace(self, messages=tuple(watch_messages(self.messages)), watch=True)

    def render_with_message(self, index: int, message: Message | dict[str, Any]) -> str | None:
        """Replace the message at `index` and render the conversation. Return `None` if the template fails."""
        (tracked_message,) = track_messages([message])
        try:
            return str.__str__(
                replace(self, messages=(*self.messages[:index], tracked_message, *self.messages[index + 1 :])).render()
            )
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
    pieces = recover_attribution(text, pieces_of(tracked), chat.messages, chat.render_with_message)
    flags = chat.flags | check_coverage(
        chat.messages, chat.tools, text, pieces, chat.render_with_message, on_dropped_message
    )
    origins: list[Origin | None] = []
    regions, region_flags = _locate_regions(chat, tracked, pieces, turns, origins)
    assistants = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    spans = make_spans(split_thinking(text, pieces, regions, assistants), regions)
    region_flags |= _flag_empty_thinking(text, pieces, regions)
    rendered = Rendered(text, spans, flags | region_flags, messages=len(chat.messages))
    if origins and not flags and pieces == pieces_of(tracked):
        # Texts that a template joins thousands of times have origins that are nested too deep to traverse.
        with suppress(RecursionError):
            plan = _make_plan(chat, rendered, pieces, turns, origins)
            if plan is not None:
                chat.template.plan_cache.add(chat.messages, turns, plan)
    return rendered


_EMPTY_THINKING = re.compile(rf"\s*(?:<({THINKING_NAMES})>\s*</\1>|</(?:{THINKING_NAMES})>)")
"""An empty thinking block, or only its closing tag if the generation prompt ends with the opening tag."""


def _flag_empty_thinking(text: str, pieces: Sequence[TextPiece], regions: Sequence[TurnRegion]) -> frozenset[str]:
    """Return the `empty_thinking` flag if a turn begins with an empty thinking block that the template printed."""
    for region in regions:
        match = _EMPTY_THINKING.match(text, region.start, region.end)
        is_row_text = match and any(
            piece.part is not Part.SCAFFOLD
            and text[max(piece.start, match.start()) : min(piece.end, match.end())].strip()
            for piece in pieces
        )
        if match and not is_row_text:
            return frozenset({"empty_thinking"})
    return frozenset()


def _make_plan(
    chat: ChatRendering,
    rendered: Rendered,
    pieces: tuple[TextPiece, ...],
    turns: Sequence[int],
    origins: Sequence[Origin | None],
) -> RenderPlan | None:
    """Create a render plan: a recording that renders similar conversations without running the template.

    `origins` contains the recorded expression for the whole text, followed by the expressions for the prefixes. Return
    `None` if the recorded expressions are incomplete.
    """
    messages = [{"role": message["role"], "content": str.__str__(message["content"])} for message in chat.messages]
    # The treatment of control tokens in contents is checked in every row that contains them.
    if (control := chat.template.control) and any(control.search(message["content"]) for message in messages):
        return None
    key = skeleton_key(chat.messages, (), turns, rendered.text, pieces)
    cached_turns = chat.template.turn_cache.find(key, chat.messages, rendered.text, pieces)
    segments, contents = recorded_pieces(origins[0], messages, pieces, rendered.text), message_contents(messages)
    if cached_turns is None or segments is None or contents is None:
        return None
    same_origins = has_same_origins(origins[0], origins[1:])
    plan = RenderPlan.from_rendering(cached_turns, segments, rendered, pieces, same_origins=same_origins)
    if plan is None or not plan.is_bounded:
        return None
    return plan if plan.fill(messages, contents) == rendered else None


def _locate_regions(
    chat: ChatRendering,
    tracked: TrackedString,
    pieces: tuple[TextPiece, ...],
    turns: Sequence[int],
    origins: list[Origin | None],
) -> tuple[list[TurnRegion], frozenset[str]]:
    """Locate the text that the model generates in each turn. Return the text ranges and their flags.

    The generation tags in a template file of the user take precedence over the detected regions.
    """
    has_trusted_tags = chat.template.has_generation_tags and chat.template.strict
    assistants = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    tagged = locate.regions_from_blocks(pieces, assistants, turns) if has_trusted_tags else None
    try:
        located = _locate_turns(chat, tracked, pieces, turns, origins)
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
        if marked and "add_generation_prompt" not in chat.template.variables and _has_later_starts(marked, nonempty):
            return marked, flags | {"generation_tags_unconfirmed"}
        flags |= {
            "generation_tags_overruled",
            *(["stop_outside_generation_tags"] if marked and _has_earlier_ends(marked, nonempty) else []),
        }
    return regions, flags


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
    try:
        return chat, chat.render()
    except BadRow:
        if not any(message.get("tool_calls") for message in chat.messages):
            raise
        # Some templates print tool call arguments without conversion, so the arguments must be text.
        messages = tuple(track_messages([_convert_arguments(message, _dump_arguments) for message in chat.messages]))
        chat = replace(chat, messages=messages, flags=chat.flags | {"arguments_as_text"})
        return chat, chat.render()


def _locate_turns(
    chat: ChatRendering,
    tracked: TrackedString,
    pieces: tuple[TextPiece, ...],
    turns: Sequence[int],
    origins: list[Origin | None],
) -> list[locate.LocatedTurn]:
    """Return the turns in the rendered text. Use their cached positions if possible.

    If a render plan is needed, locate the turns even if their positions are cached. Also append the recorded
    expressions of all rendered texts to `origins`, with the expression of the whole text first.
    """
    text, turn_cache = str.__str__(tracked), chat.template.turn_cache
    key = skeleton_key(chat.messages, chat.tools, turns, text, pieces)
    # Long conversations rarely share a shape, and the size of a cached record grows quadratically with the messages.
    is_cacheable = len(chat.messages) <= _MAX_CACHED_MESSAGES
    needs_plan = is_cacheable and not chat.tools and chat.template.plan_cache.needs_plan(chat.messages, turns)
    if not needs_plan and (cached := turn_cache.locate(key, chat.messages, text, pieces)) is not None:
        return cached
    prefixes: dict[tuple[int, bool], TrackedString] = {}
    renderer = chat.with_watched_strings() if is_cacheable and chat.template.is_recordable else chat
    shape = conversation_shape(chat.messages, ()) if renderer.watch and not chat.tools else None

    def run(count: int, generation_prompt: bool) -> TrackedString:
        render = partial(renderer.render, count, generation_prompt=generation_prompt)
        if shape is None:
            return render()
        return chat.template.prefix_cache.get_or_render((shape[:count], generation_prompt), chat.messages, log, render)

    def prefix(count: int, generation_prompt: bool) -> TrackedString:
        prefix_key = (count, generation_prompt)
        if prefix_key not in prefixes:
            prefixes[prefix_key] = run(*prefix_key)
        return unwatch(prefixes[prefix_key])

    with record_operations() as log:
        full_text = run(len(chat.messages), False) if renderer.watch else tracked
        located = [_locate_turn(chat, text, pieces, turn, prefix) for turn in turns]
    if renderer.watch and unwatch(full_text) == tracked and pieces == pieces_of(tracked):
        # Texts that a template joins in long loops have origins that are nested too deep to compare.
        with suppress(RecursionError):
            turn_cache.add(key, log, text, map(unwatch, prefixes.values()), pieces, located)
    if needs_plan:
        origins += (
            string.origin if isinstance(string, WatchedString) else ("text", string)
            for string in (full_text, *prefixes.values())
        )
    return located


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
        raise BadRow(
            "unknown_role",
            f"template {template.name!r} does not support the role {role!r}",
            field=f"messages[{index}].role",
            hint=f"use one of the roles {', '.join(_ROLES)}",
        )
    return {**message, "role": STANDS_FOR[role]}


def _parse_arguments(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        # Python's own parser supports integers of any size.
        return json.loads(arguments) if arguments.strip() else {}
    except ValueError as error:
        raise BadRow(
            "tool_arguments", f"the tool call arguments are not valid JSON: {error}", field="tool_calls"
        ) from None


def _dump_arguments(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
