"""Cache recorded renderings, and use them to render similar conversations without running the template.

A recorded rendering is called a render plan. It records where each segment of the output comes from: the template, or a
text of the row, possibly stripped. If another conversation has the same roles and turns, and all recorded operations
have the same results, the template prints the same segments. The plan then joins the segments and reuses the located
turns. The template renders all other conversations.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ftdata.templates.attribution.spans import TextPiece
from ftdata.templates.attribution.watched_strings import Origin, RecordedOperation, evaluate_origin
from ftdata.templates.cache.prefix_cache import flatten_origin
from ftdata.templates.cache.turn_cache import Anchor, CachedTurns
from ftdata.types import Part, Rendered, SpanKinds, Spans

_ROLES = {"system", "user", "assistant"}
_THINKING = re.compile(r"</(?:think|thinking|thought|reasoning)>")
_MAX_SHAPES, _MAX_PLANS = 512, 8

_MAX_WORK, _MAX_FIXED_WORK, _MAX_DEPTH = 512, 1 << 16, 50
"""Limits of a plan: characters processed per character of the row, other characters processed, and nesting depth."""

Shape = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class ContentLeaf:
    """A segment of the rendered text: the content of one message, possibly changed by methods such as `strip`.

    Attributes:
        message: index of the message.
        changes: methods that are applied to the content, with their arguments.
        whitespace: whether the content is printed unchanged, and whether it has whitespace around it. `None` if
            neither matters.
    """

    message: int
    changes: tuple[tuple[str, tuple[Any, ...]], ...]
    whitespace: tuple[bool, bool] | None

    def render(self, content: str) -> str | None:
        """Return the rendered text of another message content, or `None` if the plan does not apply to this content."""
        text = content
        for method, arguments in self.changes:
            text = getattr(text, method)(*arguments)
        if text is not content and text.strip() != content.strip():
            return None
        is_equivalent = self.whitespace is None or self.whitespace == (text == content, content.strip() != content)
        return text if is_equivalent else None


def _leaf_origin(leaf: ContentLeaf) -> Origin:
    """Return the expression that computes the rendered text of a message content from the messages."""
    origin: Origin = ("field", (leaf.message, "content"))
    for name, arguments in leaf.changes:
        origin = ("call", origin, name, arguments)
    return origin


@dataclass(frozen=True, slots=True)
class RenderPlan:
    """A recorded rendering: fixed template text, and slots for the contents of conversations with the same roles.

    Attributes:
        texts: text of each span of template text, and an empty string for each other span.
        leaves: (index of a span, leaf) of each span that contains the content of a message.
        kinds: all other properties of the spans.
        flags: flags of the rendered text.
        operations: operations on texts. The plan applies only if all of them have the recorded results.
        excluded_prefixes: (anchor, text) pairs. The plan does not apply if the text follows the anchor.
    """

    texts: tuple[str, ...]
    leaves: tuple[tuple[int, ContentLeaf], ...]
    kinds: SpanKinds
    flags: frozenset[str]
    operations: tuple[RecordedOperation, ...]
    excluded_prefixes: tuple[tuple[Anchor, str], ...]

    @classmethod
    def from_rendering(
        cls,
        cached_turns: CachedTurns,
        segments: Sequence[str | ContentLeaf],
        rendered: Rendered,
        parts: Sequence[TextPiece],
        *,
        same_origins: bool,
    ) -> RenderPlan | None:
        """Create a render plan, which can be reused, from a rendered conversation.

        Args:
            cached_turns: the located turns.
            segments: the segments of the rendered text.
            rendered: the rendered text.
            parts: the pieces of the rendered text.
            same_origins: whether the generation prompts and endings consist of the same segments as the whole text.
                Then a text is printed in the same way in all of them, whether or not it has whitespace around it.

        Returns:
            The plan, or `None` if a span is neither a whole segment nor a part of a segment of template text.
        """
        texts, leaves, firsts, number = list[str](), list[tuple[int, ContentLeaf]](), [0], 0
        for index, span in enumerate(rendered.spans):
            if span.start == parts[number].end:
                number += 1
                firsts.append(index)
            segment = segments[number]
            if span.end > parts[number].end or (isinstance(segment, ContentLeaf) and span.end < parts[number].end):
                return None
            if isinstance(segment, ContentLeaf):
                leaves.append((index, replace(segment, whitespace=None) if same_origins else segment))
            texts.append("" if isinstance(segment, ContentLeaf) else rendered.text[span.start : span.end])
        firsts.append(len(texts))
        operations = tuple(
            operation
            for operation in cached_turns.operations
            if not (same_origins and operation.expression[0] == "unchanged")
        )
        excluded_prefixes = tuple(
            ((firsts[number], offset), excluded) for (number, offset), excluded in cached_turns.excluded_prefixes
        )
        kinds = replace(Spans.from_spans(rendered.spans).kinds, has_constant_template_text=True)
        return cls(tuple(texts), tuple(leaves), kinds, rendered.flags, operations, excluded_prefixes)

    @property
    def is_bounded(self) -> bool:
        """Whether rendering with the plan takes so little work that no CPU limit is needed.

        A bounded plan processes each character of the row at most `_MAX_WORK` times, and at most `_MAX_FIXED_WORK`
        other characters.
        """
        costs, work, fixed = dict[int, _Cost](), Counter[int](), 0.0
        leaves = [_leaf_origin(leaf) for _, leaf in self.leaves]
        try:
            for origin in (*(operation.expression for operation in self.operations), *leaves):
                cost = _cost(origin, costs)
                if cost.depth > _MAX_DEPTH:
                    return False
                fixed += cost.fixed_work
                for message in _find_messages(origin, set(), set()):
                    work[message] += math.ceil(cost.work)
        except RecursionError:
            return False
        return fixed <= _MAX_FIXED_WORK and max(work.values(), default=0) <= _MAX_WORK

    def fill(self, messages: Sequence[Mapping[str, Any]], contents: Sequence[str]) -> Rendered | None:
        """Render other messages: insert their contents into the recorded text.

        Args:
            messages: the messages.
            contents: the contents of the messages, as returned by `message_contents`.

        Returns:
            The rendered text, or `None` if the plan does not apply to the messages.
        """
        texts = list(self.texts)
        try:
            for index, leaf in self.leaves:
                content = contents[leaf.message]
                segment = leaf.render(content) if leaf.changes or leaf.whitespace else content
                if segment is None:
                    return None
                texts[index] = segment
            for operation in self.operations:
                if not operation.has_same_result(messages):
                    return None
        except (ValueError, LookupError, RecursionError):
            return None
        text, sizes = "".join(texts), [*map(len, texts)]
        for (number, offset), excluded in self.excluded_prefixes:
            if text.startswith(excluded, sum(sizes[:number]) + offset):
                return None
        return Rendered(text, Spans(sizes, self.kinds), self.flags, len(messages))


@dataclass
class PlanCache:
    """A cache of recorded renderings of one template. The key contains the message roles and the turn indices.

    Attributes:
        plans_by_shape: shape of the conversation -> plans.
        miss_counts: shape of the conversation -> number of conversations that no plan could render.
        new_plans: plans that were not yet sent to the process that uses them.
    """

    plans_by_shape: dict[Shape, list[RenderPlan]] = field(default_factory=dict)
    miss_counts: Counter[Shape] = field(default_factory=Counter)
    new_plans: list[tuple[Shape, RenderPlan]] = field(default_factory=list)

    def needs_plan(self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int]) -> bool:
        """Count a conversation that no cached plan could render. Return whether to create a new plan.

        The more conversations of a shape are counted, the less often a new plan is created.
        """
        shape = conversation_shape(messages, turns)
        if shape is None or (shape not in self.miss_counts and len(self.miss_counts) == _MAX_SHAPES):
            return False
        self.miss_counts[shape] += 1
        misses = self.miss_counts[shape]
        has_room = len(self.plans_by_shape.get(shape, ())) < _MAX_PLANS
        return has_room and (misses <= _MAX_PLANS or misses & (misses - 1) == 0)

    def render(self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int]) -> Rendered | None:
        """Render messages with a cached render plan. Return `None` if no cached plan applies."""
        contents = message_contents(messages)
        if contents is None:
            return None
        for plan in self.get_plans([message["role"] for message in messages], turns):
            if (rendered := plan.fill(messages, contents)) is not None:
                return rendered
        return None

    def get_plans(self, roles: Sequence[str], turns: Sequence[int]) -> Sequence[RenderPlan]:
        """Return the cached render plans for conversations with the given message roles and turn indices."""
        return self.plans_by_shape.get((*roles, *turns), ())

    def add(self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int], plan: RenderPlan) -> None:
        """Add a render plan for conversations that have the same message roles and turn indices."""
        if shape := conversation_shape(messages, turns):
            self.plans_by_shape.setdefault(shape, []).append(plan)
            self.new_plans.append((shape, plan))


def conversation_shape(messages: Sequence[Mapping[str, Any]], turns: Sequence[int]) -> Shape | None:
    """Return the cache key of a conversation: the roles of its messages, and the indices of its turns.

    Return `None` if no plan can apply: plans support only messages with a standard role and a text content.
    """
    if message_contents(messages) is None:
        return None
    roles = [message["role"] for message in messages]
    return (*roles, *turns) if _ROLES.issuperset(roles) else None


def message_contents(messages: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return the contents of the messages, or `None` if a message contains more than a role and a text.

    Also return `None` if a content is empty or whitespace, since the template may omit it, or if it has a closing
    thinking tag, since templates remove the thinking.
    """
    contents = []
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) or (len(message) != 2 and (len(message) != 3 or "train" not in message)):
            return None
        if not content or content.isspace():
            return None
        # The search for a single character is much faster than the search for two.
        if "<" in content and "</" in content and _THINKING.search(content):
            return None
        contents.append(content)
    return contents


def recorded_pieces(
    origin: Origin | None, messages: Sequence[Mapping[str, Any]], parts: Sequence[TextPiece], text: str
) -> tuple[str | ContentLeaf, ...] | None:
    """Convert the recorded expression of a rendered text to a list of template texts and message contents.

    Return `None` if the segments do not match the pieces of the rendered text.
    """
    segments: list[str | ContentLeaf] = []
    for part in flatten_origin(origin):
        if part is None:
            return None
        if isinstance(part, str):
            segments = (
                [*segments[:-1], segments[-1] + part]
                if segments and isinstance(segments[-1], str)
                else [*segments, part]
            )
            continue
        if (leaf := _make_leaf(part)) is None:
            return None
        content = str.__str__(messages[leaf.message]["content"])
        whitespace = str.__str__(evaluate_origin(part, messages)) == content, content != content.strip()
        segments.append(replace(leaf, whitespace=whitespace))
    return _align_segments(parts, [segment for segment in segments if segment != ""], text)


def has_same_origins(origin: Origin | None, prefixes: Iterable[Origin | None]) -> bool:
    """Return whether messages are printed in the same way in the whole conversation and in its rendered prefixes.

    Template text is not compared.
    """
    row_parts = [part for part in flatten_origin(origin) if not isinstance(part, str)]
    for prefix in prefixes:
        prefix_parts = [part for part in flatten_origin(prefix) if not isinstance(part, str)]
        if None in prefix_parts or prefix_parts != row_parts[: len(prefix_parts)]:
            return False
    return True


def _align_segments(
    parts: Sequence[TextPiece], segments: Sequence[str | ContentLeaf], text: str
) -> tuple[str | ContentLeaf, ...] | None:
    """Divide the template texts in `segments` so that each segment corresponds to one piece in `parts`.

    Return `None` if the segments do not match the pieces.
    """
    remaining, aligned = list(segments), list[str | ContentLeaf]()
    for piece in parts:
        segment = remaining.pop(0) if remaining else ""
        if isinstance(segment, str):
            piece_text = text[piece.start : piece.end]
            if piece.part is not Part.SCAFFOLD or not segment.startswith(piece_text):
                return None
            aligned.append(piece_text)
            remaining = [segment[len(piece_text) :], *remaining] if segment != piece_text else remaining
        elif piece.part is Part.CONTENT and piece.message == segment.message:
            aligned.append(segment)
        else:
            return None
    return None if remaining else tuple(aligned)


_CHANGES = ("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "__getitem__", "split")

_STRIPS = {"strip", "lstrip", "rstrip", "split", "rsplit"}


class _Cost(NamedTuple):
    """The estimated work to evaluate an expression for other messages: the number of processed characters.

    Attributes:
        size: length of the value in characters, per character of the messages.
        fixed: number of characters in the value that do not depend on the messages.
        work: number of processed characters, per character of the messages.
        fixed_work: number of processed characters that do not depend on the messages.
        depth: nesting depth of the expression.
    """

    size: float
    fixed: float
    work: float
    fixed_work: float
    depth: int


def _cost(origin: Any, costs: dict[int, _Cost]) -> _Cost:
    """Estimate the cost of evaluating an expression. If a part of it occurs twice, the cost of this part counts twice.

    Args:
        origin: the expression.
        costs: costs that were computed before, by the `id` of the expression.
    """
    if id(origin) in costs:
        return costs[id(origin)]
    kind = origin[0]
    if kind == "text":
        length = len(str(origin[1]))
        cost = _Cost(0, length, 0, length + 1, 1)
    elif kind == "field":
        cost = _Cost(1, 0, 1, 1, 1)
    elif kind == "join":
        parts = [_cost(part, costs) for part in origin[1]]
        size, fixed = math.fsum(part.size for part in parts), math.fsum(part.fixed for part in parts)
        work = size + math.fsum(part.work for part in parts)
        fixed_work = 1 + fixed + math.fsum(part.fixed_work for part in parts)
        cost = _Cost(size, fixed, work, fixed_work, 1 + max(part.depth for part in parts))
    else:
        _, base, name, arguments = origin[1] if kind == "unchanged" else origin
        cost = _method_cost(_cost(base, costs), name, arguments)
    costs[id(origin)] = cost
    return cost


def _method_cost(base: _Cost, name: str, arguments: Sequence[Any]) -> _Cost:
    """Return the cost of calling a `str` method. The result includes `base`, the cost of computing the string."""
    lengths = [len(argument) for argument in arguments if isinstance(argument, str)]
    # Characters to strip are compared with each character of the text. Searches process each character about once.
    factor = 1 + (lengths[0] if name in _STRIPS and lengths else 0)
    growth = 1.0
    if name == "replace" and len(lengths) > 1:
        growth = max(1.0, lengths[1] / lengths[0] if lengths[0] else lengths[1] + 1)
    elif name in ("upper", "lower", "casefold", "title", "capitalize", "swapcase"):
        growth = 3.0
    size = base.size * growth
    fixed = base.fixed * growth + (lengths[1] if name == "replace" and lengths[1:] else 0)
    work, fixed_work = base.work + factor * size, base.fixed_work + factor * fixed + sum(lengths) + 1
    return _Cost(size, fixed, work, fixed_work, 1 + base.depth)


def _find_messages(origin: Any, messages: set[int], visited: set[int]) -> set[int]:
    """Return the indices of the messages that an expression reads."""
    if id(origin) in visited or not isinstance(origin, tuple):
        return messages
    visited.add(id(origin))
    if origin[:1] == ("field",):
        messages.add(origin[1][0])
    else:
        for part in origin[1] if origin[:1] == ("join",) else origin[1:2]:
            _find_messages(part, messages, visited)
    return messages


def _make_leaf(origin: Origin) -> ContentLeaf | None:
    """Convert the expression for a message content to a `ContentLeaf`.

    Return `None` unless the expression is the content of a message, changed only by methods in `_CHANGES`.
    """
    changes = list[tuple[str, tuple[Any, ...]]]()
    while origin[0] == "call" and origin[2] in _CHANGES:
        _, origin, method, arguments = origin
        changes.insert(0, (method, arguments))
    if origin[0] != "field" or len(origin[1]) != 2 or origin[1][1] != "content":
        return None
    return ContentLeaf(origin[1][0], tuple(changes), None)
