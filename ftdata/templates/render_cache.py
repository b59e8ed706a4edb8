"""Cache renderings, and reuse them for conversations of the same shape without running the template.

The shape of a conversation is everything except its texts: roles, keys, types and tool definitions. The rendered text
of another conversation with the same shape is computed from a recorded run (`RecordedRun`).

To locate the turns of a conversation, its first messages are also rendered. If all these renderings are recorded, and
the positions of the turns cannot depend on the texts, then the spans are recorded, too. After that, a conversation is
rendered by joining its texts and the template text (`TextLayout`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, TypeGuard

from ftdata.errors import BadRow
from ftdata.schemas.answer_text import THINKING_NAMES
from ftdata.templates.attribution.spans import is_content_part, template_fields
from ftdata.templates.attribution.tracked_strings import TrackedString
from ftdata.templates.attribution.watched_strings import record_operations, unwatch, watch_messages
from ftdata.templates.chat import ChatRendering, render_turns
from ftdata.templates.recorded_runs import Expressions, ExpressionsBuilder, RecordedRun
from ftdata.templates.template import Template, make_chat_variables
from ftdata.types import Message, Part, Rendered, SpanKinds, Spans

_MAX_MESSAGES = 200
"""Longer conversations are not cached: they rarely share a shape, and a run has a size proportional to their length."""

_MAX_SHAPES, _MAX_RUNS, _MAX_LAYOUTS = 1024, 4, 8
"""Limits of a cache: shapes of runs and of layouts, runs of a shape, and layouts of a shape."""

_MAX_TEMPLATES = 64

_THINKING_TAG = re.compile(rf"</?(?:{THINKING_NAMES})>")


class Shape(NamedTuple):
    """The shape of a conversation, and its texts.

    Attributes:
        messages: a description of each message without its texts.
        tools: a description of the tool definitions.
        texts: all texts of the messages, in the order in which `watch_messages` visits them.
        is_plain: whether every message has only a role and a content of texts and images, and every text is printed
            like any other text: it is not blank, which templates often omit, and contains no thinking tag, which
            divides an answer into parts.
        owners: the index of the message of each text.
    """

    messages: tuple[str, ...]
    tools: str
    texts: list[str]
    is_plain: bool
    owners: list[int]


def describe_shape(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Shape:
    """Return the shape of a conversation.

    >>> describe_shape([{"role": "user", "content": "2+2?"}])
    Shape(messages=('user',), tools='', texts=['2+2?'], is_plain=True, owners=[0])
    """
    descriptions, texts, is_plain, owners = list[str](), list[str](), not tools, list[int]()
    for number, message in enumerate(messages):
        content, first = message.get("content"), len(texts)
        is_short = len(message) == 2 or (len(message) == 3 and "train" in message)
        if type(content) is str and is_short:
            descriptions.append(message["role"])
            texts.append(content)
            # The search for a single character is much faster than the search for a tag.
            if not content or content.isspace() or ("<" in content and _THINKING_TAG.search(content)):
                is_plain = False
        elif is_short and _has_plain_parts(content):
            descriptions.append(f"\n{message['role']}{[part['type'] for part in content]}")
            texts += [part["text"] for part in content if "text" in part]
            is_plain = is_plain and all(text.strip() and not _THINKING_TAG.search(text) for text in texts[first:])
        else:
            # Templates branch on roles, so they are not tracked. The line break distinguishes descriptions from roles.
            fields = template_fields(message)
            values = {
                key: _describe_content(item, texts)
                if key == "content"
                else item
                if key == "role"
                else _describe_value(item, texts)
                for key, item in fields.items()
            }
            descriptions.append(f"\n{values!r}")
            is_plain = False
        owners += [number] * (len(texts) - first)
    return Shape(tuple(descriptions), repr(tools) if tools else "", texts, is_plain, owners)


def _has_plain_parts(content: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Return whether a content is a list of texts and images without other fields."""
    return isinstance(content, list) and all(
        is_content_part(part) and part.keys() == ({"type", "text"} if part["type"] == "text" else {"type"})
        for part in content
    )


def _describe_content(content: Any, texts: list[str]) -> Any:
    """Describe a content. The types of its parts belong to the shape, because templates branch on them."""
    if not isinstance(content, list | tuple):
        return _describe_value(content, texts)
    return [
        {key: item if key == "type" else _describe_value(item, texts) for key, item in part.items()}
        if is_content_part(part)
        else _describe_value(part, texts)
        for part in content
    ]


def _describe_value(value: Any, texts: list[str]) -> Any:
    if isinstance(value, str):
        texts.append(value)
        return ...
    if isinstance(value, Mapping):
        return {key: _describe_value(item, texts) for key, item in value.items()}
    return [_describe_value(item, texts) for item in value] if isinstance(value, list | tuple) else value


LayoutKey = tuple[tuple[str, ...], tuple[int, ...]]
"""The key of a layout: descriptions of the messages, and indices of the turns."""


class Slot(NamedTuple):
    """A span that contains one text of a message, possibly stripped.

    Attributes:
        span: number of the span.
        value: number of the value that is printed.
        text: number of the text.
    """

    span: int
    value: int
    text: int


@dataclass(frozen=True, slots=True)
class TextLayout:
    """The spans of a rendered conversation, whose positions do not depend on the texts of the messages.

    Attributes:
        expressions: the expressions of all runs that located the turns.
        texts: the text of each span of template text, and an empty string for each slot.
        slots: the spans of the texts of messages, one per text.
        equal_values: pairs of numbers of values. The layout applies only if both values are equal.
        excluded_starts: (number of a value, text) pairs. The layout applies only if the value does not begin with the
            first character of the text.
        kinds: all properties of the spans except their sizes.
        flags: flags of the rendered text.
        messages: number of the messages.
    """

    expressions: Expressions
    texts: tuple[str, ...]
    slots: tuple[Slot, ...]
    equal_values: tuple[tuple[int, int], ...]
    excluded_starts: tuple[tuple[int, str], ...]
    kinds: SpanKinds
    flags: frozenset[str]
    messages: int

    @property
    def is_constant(self) -> bool:
        """True if no expression of the template operates on a text."""
        return not self.expressions.calls and not self.expressions.results

    def fill(self, contents: Sequence[str]) -> Rendered | None:
        """Render a conversation with the given texts, or return `None` if the layout does not apply to the texts."""
        # Most layouts contain no expressions, only the texts themselves.
        values = contents if self.is_constant else self.expressions.evaluate(contents)
        if values is None:
            return None
        for first, second in self.equal_values:
            if values[first] != values[second]:
                return None
        for number, excluded in self.excluded_starts:
            if values[number][:1] == excluded[:1]:
                return None
        texts = [*self.texts]
        for span, number, slot_text in self.slots:
            text, content = values[number], contents[slot_text]
            if text is not content and text.strip() != content.strip():
                return None
            texts[span] = text
        return Rendered("".join(texts), Spans([*map(len, texts)], self.kinds), self.flags, self.messages)

    @classmethod
    def from_runs(
        cls, shape: Shape, rendered: Rendered, run: RecordedRun, prefix_runs: Sequence[RecordedRun]
    ) -> TextLayout | None:
        """Create a layout. Return `None` if the positions of the turns may depend on the texts.

        Args:
            shape: the shape of the conversation.
            rendered: the rendered conversation.
            run: the run on the whole conversation.
            prefix_runs: the runs on the first messages, with which the turns were located.
        """
        builder = ExpressionsBuilder(len(shape.texts))
        parts = _renumber(run, builder.include(run.expressions))
        prefixes = [_renumber(prefix_run, builder.include(prefix_run.expressions)) for prefix_run in prefix_runs]
        expressions = builder.finish()
        values = expressions.evaluate(shape.texts)
        if values is None or not expressions.is_bounded:
            return None
        equal_values, excluded_starts = dict[tuple[int, int], None](), dict[tuple[int, str], None]()
        for prefix in prefixes:
            conditions = _compare(parts, prefix)
            if conditions is None:
                return None
            equal_values.update(dict.fromkeys(conditions.equal_values))
            excluded_starts.update(dict.fromkeys(conditions.excluded_starts))
        slots = _find_slots(rendered, parts, values, shape.owners)
        if slots is None:
            return None
        texts = [rendered.text[span.start : span.end] for span in rendered.spans]
        for slot in slots:
            texts[slot.span] = ""
        kinds = replace(Spans.from_spans(rendered.spans).kinds, has_constant_template_text=True)
        layout = cls(
            expressions,
            tuple(texts),
            tuple(slots),
            tuple(equal_values),
            tuple(excluded_starts),
            kinds,
            rendered.flags,
            len(shape.messages),
        )
        return layout if layout.fill(shape.texts) == rendered else None


def _renumber(run: RecordedRun, numbers: Sequence[int]) -> list[str | int]:
    """Return the parts of a recorded text, with other numbers of the values."""
    return [content if isinstance(content, str) else numbers[content] for content, *_ in run.segments]


class _Conditions(NamedTuple):
    """Conditions under which two rendered texts first differ at the same place. See `TextLayout` for the attributes."""

    equal_values: list[tuple[int, int]]
    excluded_starts: list[tuple[int, str]]


def _compare(parts: Sequence[str | int], prefix: Sequence[str | int]) -> _Conditions | None:
    """Compare the parts of a rendered conversation with the parts of a rendering of its first messages.

    Return the conditions under which both texts first differ at the same place for all other texts, or `None` if this
    depends on other properties of the texts.
    """
    equal_values = list[tuple[int, int]]()
    for index, (part, prefix_part) in enumerate(zip(parts, prefix, strict=False)):
        if part == prefix_part:
            continue
        if isinstance(prefix_part, int):
            if isinstance(part, str):
                return None
            equal_values.append((part, prefix_part))
        elif isinstance(part, int):
            return _Conditions(equal_values, [(part, prefix_part)])
        elif part.startswith(prefix_part):
            # The prefix must end here. Otherwise, it continues with text of a message, which may also equal `part`.
            return _Conditions(equal_values, []) if index == len(prefix) - 1 else None
        elif prefix_part.startswith(part) and index + 1 < len(parts):
            next_value = parts[index + 1]
            assert isinstance(next_value, int)
            return _Conditions(equal_values, [(next_value, prefix_part[len(part) :])])
        else:
            return _Conditions(equal_values, [])
    return _Conditions(equal_values, [])


def _find_slots(
    rendered: Rendered, parts: Sequence[str | int], values: Sequence[Any], owners: Sequence[int]
) -> list[Slot] | None:
    """Find the span of each text. Return `None` if a value is not exactly one span, or if a text is not one value.

    The texts of a message are assumed to be printed in their order, which `TextLayout.fill` checks.
    """
    lengths = [len(part if isinstance(part, str) else values[part]) for part in parts]
    ends = accumulate(lengths)
    numbers = {
        (end - length, end): part
        for part, length, end in zip(parts, lengths, ends, strict=True)
        if isinstance(part, int)
    }
    texts_of_message = defaultdict[int, list[int]](list)
    for text, message in enumerate(owners):
        texts_of_message[message].append(text)
    slots = list[Slot]()
    for index, span in enumerate(rendered.spans):
        if span.part is Part.CONTENT and (span.start, span.end) in numbers:
            if not (texts := texts_of_message[span.message]):
                return None
            slots.append(Slot(index, numbers.pop((span.start, span.end)), texts.pop(0)))
    return None if numbers or any(texts_of_message.values()) else slots


class TemplateNeeded(Exception):
    """Raised if a conversation cannot be rendered from the cache, so that the template must run."""


@dataclass
class RenderCache:
    """A cache of recorded runs and layouts of one template. It exists until the process ends.

    Attributes:
        runs: (descriptions of the messages and of the tools, whether a generation prompt is added) -> recorded runs.
        layouts: (descriptions of the messages, turns) -> layouts.
        new_layouts: layouts that were created in this process, and not yet sent to the main process, with their keys.
    """

    runs: dict[Hashable, list[RecordedRun]] = field(default_factory=dict)
    layouts: dict[LayoutKey, list[TextLayout]] = field(default_factory=dict)
    new_layouts: list[tuple[LayoutKey, TextLayout]] = field(default_factory=list)
    _attempts: Counter[LayoutKey] = field(default_factory=Counter)

    def add_layout(self, key: LayoutKey, layout: TextLayout) -> None:
        """Add a layout, unless the cache is full."""
        layouts = self.layouts.get(key, [])
        if len(layouts) < _MAX_LAYOUTS and (layouts or len(self.layouts) < _MAX_SHAPES):
            self.layouts[key] = [*layouts, layout]

    def fill_layout(self, shape: Shape, turns: Sequence[int]) -> Rendered | None:
        """Render a conversation with a cached layout. Return `None` if no layout applies."""
        for layout in self.layouts.get((shape.messages, tuple(turns)), ()) if shape.is_plain else ():
            if (rendered := layout.fill(shape.texts)) is not None:
                return rendered
        return None

    def render(self, messages: Sequence[Message], turns: Sequence[int]) -> Rendered:
        """Render messages with a cached layout.

        Raises:
            TemplateNeeded: no layout applies.
        """
        rendered = self.fill_layout(describe_shape(messages), turns)
        if rendered is None:
            raise TemplateNeeded
        return rendered

    def needs_layout(self, key: LayoutKey) -> bool:
        """Count an attempt to create a layout, and return whether to make it. The attempts become rarer."""
        if key not in self._attempts and len(self._attempts) >= _MAX_SHAPES:
            return False
        self._attempts[key] += 1
        attempts = self._attempts[key]
        return attempts <= _MAX_LAYOUTS or attempts & (attempts - 1) == 0


@lru_cache(maxsize=_MAX_TEMPLATES)
def render_cache(template_key: str) -> RenderCache:  # noqa: ARG001  (the key identifies the cache)
    """Return the cache of the template with the given `Template.key`."""
    return RenderCache()


def render_cached(
    messages: tuple[Message, ...],
    tools: tuple[dict[str, Any], ...],
    template: Template,
    turns: Sequence[int],
    on_dropped_message: str = "reject",
) -> Rendered:
    """Call `render_turns`. Reuse cached renderings if possible, otherwise run the template and cache its renderings.

    Raises:
        BadRow: as in `render_turns`.
    """
    cache, shape = render_cache(template.key), describe_shape(messages, tools)
    if (rendered := cache.fill_layout(shape, turns)) is not None:
        return rendered
    chat = ChatRendering.from_messages(messages, tools, template)
    # The arguments of tool calls are converted, and templates print them as JSON, which cannot be replayed.
    has_calls = any(message.get("tool_calls") for message in messages)
    if has_calls or len(messages) > _MAX_MESSAGES or not template.is_recordable:
        return render_turns(chat, turns, on_dropped_message)
    recording = _Recording(cache, shape)
    recorded = _RecordedRendering(template, chat.messages, chat.tools, chat.flags, recording=recording)
    rendered = render_turns(recorded, turns, on_dropped_message)
    key = (shape.messages, tuple(turns))
    if shape.is_plain and recording.is_complete and cache.needs_layout(key):
        # Rows with control tokens are checked one by one.
        is_safe = template.control is None or not any(map(template.control.search, shape.texts))
        run = recording.runs.pop((len(shape.messages), False))
        if is_safe and (layout := TextLayout.from_runs(shape, rendered, run, [*recording.runs.values()])):
            cache.add_layout(key, layout)
            cache.new_layouts.append((key, layout))
    return rendered


@dataclass
class _Recording:
    """The recorded runs with which one conversation is rendered.

    Attributes:
        cache: the cache of the template.
        shape: the shape of the conversation.
        runs: (number of messages, whether a generation prompt is added) -> recorded run.
        is_complete: whether every rendering of the conversation is a recorded run.
    """

    cache: RenderCache
    shape: Shape
    runs: dict[tuple[int, bool], RecordedRun] = field(default_factory=dict)
    is_complete: bool = True


@dataclass(frozen=True)
class _RecordedRendering(ChatRendering):
    """A conversation that is rendered with recorded runs if possible. Other runs are recorded."""

    recording: _Recording = field(kw_only=True)

    def render(self, count: int | None = None, *, generation_prompt: bool = False) -> TrackedString:
        """Render the first `count` messages with a recorded run, or run the template and record the run."""
        recording, count = self.recording, len(self.messages) if count is None else count
        cached_runs, shape = recording.cache.runs, recording.shape
        key = (shape.messages[:count], shape.tools, generation_prompt)
        runs = cached_runs.get(key, [])
        for run in runs:
            if (replayed := run.replay(shape.texts)) is not None:
                recording.runs[count, generation_prompt] = run
                return replayed
        text, new_run = super().render(count, generation_prompt=generation_prompt), None
        if len(runs) < _MAX_RUNS and (runs or len(cached_runs) < _MAX_SHAPES):
            new_run = self._record(text, count, generation_prompt=generation_prompt)
        if new_run is None:
            recording.is_complete = False
        else:
            cached_runs[key] = [*runs, new_run]
            recording.runs[count, generation_prompt] = new_run
        return text

    def _record(self, text: TrackedString, count: int, *, generation_prompt: bool) -> RecordedRun | None:
        """Run the template again and record its operations. Return `None` if they cannot be replayed."""
        messages, size = watch_messages(self.messages[:count])
        variables = make_chat_variables(messages, self.tools, generation_prompt=generation_prompt)
        # Texts that a template joins thousands of times have origins that are nested too deep to traverse.
        with suppress(BadRow, RecursionError), record_operations() as log:
            watched = self.template.run(variables, watch=True)
            if unwatch(watched) == text and unwatch(watched).runs == text.runs:
                return RecordedRun.from_rendering(watched, log, self.recording.shape.texts[:size])
        return None

    def render_with_message(self, index: int, message: Message | dict[str, Any]) -> str | None:
        """Render a changed conversation without the cache."""
        self.recording.is_complete = False
        return ChatRendering(self.template, self.messages, self.tools, self.flags).render_with_message(index, message)
