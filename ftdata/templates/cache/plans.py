"""Plans: what a template makes of conversations that it treats alike, without running it again.

A run on watched strings tells what each stretch of the output is: the template's own text, or a text of the row, maybe
stripped. Of a conversation of the same shape, for which all that was asked of the texts has the same answers, the
template makes the same stretches. So they are joined, and where turns begin and end is known with them. What is not
like that in any way is rendered.
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
_MOST_SHAPES, _MOST_PLANS = 512, 8

_MAX_WORK, _MAX_FIXED_WORK, _MAX_DEPTH = 512, 1 << 16, 50
"""Characters that may be looked at to try a plan on a row: so many for each of the row's characters, and others;
and how deep values may be nested that are made of others."""

Shape = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class ContentLeaf:
    """A stretch that is a message's content, as it stands or changed at its ends: by methods of texts, and arguments.

    `manner`: whether all of it is printed, and whether it has blanks around it; `None` where neither matters.
    """

    message: int
    changes: tuple[tuple[str, tuple[Any, ...]], ...]
    manner: tuple[bool, bool] | None

    def of(self, content: str) -> str | None:
        """Return the stretch for another content; `None` where it is not of the same kind."""
        text = content
        for method, arguments in self.changes:
            text = getattr(text, method)(*arguments)
        if text is not content and text.strip() != content.strip():
            return None
        return text if self.manner is None or self.manner == (text == content, content.strip() != content) else None


def _leaf_origin(leaf: ContentLeaf) -> Origin:
    """Return how a content that is cut at its ends comes about."""
    origin: Origin = ("at", (leaf.message, "content"))
    for name, arguments in leaf.changes:
        origin = ("do", origin, name, arguments)
    return origin


@dataclass(frozen=True, slots=True)
class RenderPlan:
    """The spans of one way that a template takes, and what it depends on (as of a `Way`).

    `texts` holds the text of each that is the template's own, `leaves` which of them are contents, and whose, and
    `kinds` the rest of what they are.
    """

    texts: tuple[str, ...]
    leaves: tuple[tuple[int, ContentLeaf], ...]
    kinds: SpanKinds
    flags: frozenset[str]
    questions: tuple[RecordedOperation, ...]
    unlike: tuple[tuple[Anchor, str], ...]

    @classmethod
    def of(
        cls,
        way: CachedTurns,
        stretches: Sequence[str | ContentLeaf],
        rendered: Rendered,
        parts: Sequence[TextPiece],
        *,
        alike: bool,
    ) -> RenderPlan | None:
        """Return the plan for renderings like this one; `None` where a span is not told by the stretches.

        A span is a stretch, or some of one of the template's.

        `has_same_origins`: whether prompts and endings were made of the very stretches that the whole begins with. Then what is
        printed of a text is the same in all of them, whatever there is to cut at its ends.
        """
        texts, leaves, firsts, number = list[str](), list[tuple[int, ContentLeaf]](), [0], 0
        for at, span in enumerate(rendered.spans):
            if span.start == parts[number].end:
                number += 1
                firsts.append(at)
            stretch = stretches[number]
            if span.end > parts[number].end or (isinstance(stretch, ContentLeaf) and span.end < parts[number].end):
                return None
            if isinstance(stretch, ContentLeaf):
                leaves.append((at, replace(stretch, manner=None) if alike else stretch))
            texts.append("" if isinstance(stretch, ContentLeaf) else rendered.text[span.start : span.end])
        firsts.append(len(texts))
        questions = tuple(one for one in way.questions if not (alike and one.asked[0] == "same"))
        unlike = tuple(((firsts[number], offset), other) for (number, offset), other in way.unlike)
        kinds = replace(Spans.of(rendered.spans).kinds, followed=True)
        return cls(tuple(texts), tuple(leaves), kinds, rendered.flags, questions, unlike)

    @property
    def bounded(self) -> bool:
        """Whether it can be tried on any row in this process, where nothing limits how long that takes.

        Then no more than `_MAX_WORK` times the characters of the row are looked at, and `_MAX_FIXED_WORK` others.
        """
        known, work, fixed = dict[int, _Cost](), Counter[int](), 0.0
        leaves = [_leaf_origin(leaf) for _, leaf in self.leaves]
        try:
            for origin in (*(question.asked for question in self.questions), *leaves):
                cost = _cost(origin, known)
                if cost.depth > _MAX_DEPTH:
                    return False
                fixed += cost.fixed_work
                for message in _messages_in(origin, set(), set()):
                    work[message] += math.ceil(cost.work)
        except RecursionError:
            return False
        return fixed <= _MAX_FIXED_WORK and max(work.values(), default=0) <= _MAX_WORK

    def fill(self, messages: Sequence[Mapping[str, Any]], contents: Sequence[str]) -> Rendered | None:
        """Return what the template makes of these messages (`message_contents` them), `None` where that is not certain."""
        texts = list(self.texts)
        try:
            for at, leaf in self.leaves:
                content = contents[leaf.message]
                if not content or content.isspace():
                    return None
                own = leaf.of(content) if leaf.changes or leaf.manner else content
                if own is None:
                    return None
                texts[at] = own
            for question in self.questions:
                if not question.same(messages):
                    return None
        except (ValueError, LookupError, RecursionError):
            return None
        text, sizes = "".join(texts), [*map(len, texts)]
        for (number, offset), other in self.unlike:
            if text.startswith(other, sum(sizes[:number]) + offset):
                return None
        return Rendered(text, Spans(sizes, self.kinds), self.flags, len(messages))


@dataclass
class PlanCache:
    """What is known about one template. `missed` counts the conversations of each shape that no plan was for.

    `fresh` are the plans that were found since somebody took them from there.
    """

    by_shape: dict[Shape, list[RenderPlan]] = field(default_factory=dict)
    missed: Counter[Shape] = field(default_factory=Counter)
    fresh: list[tuple[Shape, RenderPlan]] = field(default_factory=list)

    def wanted(self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int]) -> bool:
        """Whether to look for a plan for these, which is done the more rarely the more often there was none."""
        shape = conversation_shape(messages, turns)
        if shape is None or (shape not in self.missed and len(self.missed) == _MOST_SHAPES):
            return False
        self.missed[shape] += 1
        times = self.missed[shape]
        return len(self.by_shape.get(shape, ())) < _MOST_PLANS and (times <= _MOST_PLANS or times & (times - 1) == 0)

    def filled(self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int]) -> Rendered | None:
        """Return what the template makes of messages, if one of the plans says so."""
        contents = message_contents(messages)
        if contents is None:
            return None
        for plan in self.of([message["role"] for message in messages], turns):
            if (rendered := plan.fill(messages, contents)) is not None:
                return rendered
        return None

    def of(self, roles: Sequence[str], turns: Sequence[int]) -> Sequence[RenderPlan]:
        """Return the plans for messages of these roles, of which these are the turns."""
        return self.by_shape.get((*roles, *turns), ())

    def keep(self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int], plan: RenderPlan) -> None:
        """Remember a plan for messages of this shape."""
        if shape := conversation_shape(messages, turns):
            self.by_shape.setdefault(shape, []).append(plan)
            self.fresh.append((shape, plan))


def conversation_shape(messages: Sequence[Mapping[str, Any]], turns: Sequence[int]) -> Shape | None:
    """Return what conversations of one plan have in common; `None` for those that have more to them than contents."""
    if message_contents(messages) is None:
        return None
    roles = [message["role"] for message in messages]
    return (*roles, *turns) if _ROLES.issuperset(roles) else None


def message_contents(messages: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return the contents of messages that have nothing more to them; `None` where one has.

    Thinking in a content is cut out of it, wherever it ends.
    """
    contents = []
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) or (len(message) != 2 and (len(message) != 3 or "train" not in message)):
            return None
        # One letter is found far faster than two.
        if "<" in content and "</" in content and _THINKING.search(content):
            return None
        contents.append(content)
    return contents


def recorded_pieces(
    origin: Origin | None, messages: Sequence[Mapping[str, Any]], parts: Sequence[TextPiece], text: str
) -> tuple[str | ContentLeaf, ...] | None:
    """Return the stretches that a run on watched strings was made of, if they are the very pieces of the text."""
    found: list[str | ContentLeaf] = []
    for part in flatten_origin(origin):
        if part is None:
            return None
        if isinstance(part, str):
            found = [*found[:-1], found[-1] + part] if found and isinstance(found[-1], str) else [*found, part]
            continue
        if (leaf := _leaf(part)) is None:
            return None
        content = str.__str__(messages[leaf.message]["content"])
        manner = str.__str__(evaluate_origin(part, messages)) == content, content != content.strip()
        found.append(replace(leaf, manner=manner))
    return _cut_as(parts, [one for one in found if one != ""], text)


def has_same_origins(whole: Origin | None, others: Iterable[Origin | None]) -> bool:
    """Whether other runs were made of the same texts of the row as this one begins with, changed in the same ways."""
    own = [part for part in flatten_origin(whole) if not isinstance(part, str)]
    for other in others:
        theirs = [part for part in flatten_origin(other) if not isinstance(part, str)]
        if None in theirs or theirs != own[: len(theirs)]:
            return False
    return True


def _cut_as(
    parts: Sequence[TextPiece], found: Sequence[str | ContentLeaf], text: str
) -> tuple[str | ContentLeaf, ...] | None:
    """Return the stretches, the template's text cut where its pieces are; `None` where they are not those pieces."""
    left, cut = list(found), list[str | ContentLeaf]()
    for piece in parts:
        one = left.pop(0) if left else ""
        if isinstance(one, str):
            own = text[piece.start : piece.end]
            if piece.part is not Part.SCAFFOLD or not one.startswith(own):
                return None
            cut.append(own)
            left = [one[len(own) :], *left] if one != own else left
        elif piece.part is Part.CONTENT and piece.message == one.message:
            cut.append(one)
        else:
            return None
    return None if left else tuple(cut)


_CHANGES = ("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "__getitem__", "split")

_STRIPS = {"strip", "lstrip", "rstrip", "split", "rsplit"}


class _Cost(NamedTuple):
    """What it takes to make a value again out of other messages, for every character of these, and apart from them.

    `size` and `fixed` are characters of the value; `work` and `fixed_work` are those that are looked at on the way.
    """

    size: float
    fixed: float
    work: float
    fixed_work: float
    depth: int


def _cost(origin: Any, known: dict[int, _Cost]) -> _Cost:
    """Return the cost of a value. A text that is joined with itself counts twice, however often it is shared.

    `known` holds the costs of what was looked at before, by its id.
    """
    if id(origin) in known:
        return known[id(origin)]
    kind = origin[0]
    if kind == "is":
        written = len(str(origin[1]))
        cost = _Cost(0, written, 0, written + 1, 1)
    elif kind == "at":
        cost = _Cost(1, 0, 1, 1, 1)
    elif kind == "join":
        costs = [_cost(part, known) for part in origin[1]]
        size, fixed = math.fsum(one.size for one in costs), math.fsum(one.fixed for one in costs)
        work = size + math.fsum(one.work for one in costs)
        fixed_work = 1 + fixed + math.fsum(one.fixed_work for one in costs)
        cost = _Cost(size, fixed, work, fixed_work, 1 + max(one.depth for one in costs))
    else:
        _, before, name, arguments = origin[1] if kind == "same" else origin
        cost = _changed_cost(_cost(before, known), name, arguments)
    known[id(origin)] = cost
    return cost


def _changed_cost(before: _Cost, name: str, arguments: Sequence[Any]) -> _Cost:
    """Return the cost of a value that a method makes of another."""
    given = [len(one) for one in arguments if isinstance(one, str)]
    # Characters to strip are compared with each character of the text; whatever is searched for, about once.
    factor = 1 + (given[0] if name in _STRIPS and given else 0)
    growth = 1.0
    if name == "replace" and len(given) > 1:
        growth = max(1.0, given[1] / given[0] if given[0] else given[1] + 1)
    elif name in ("upper", "lower", "casefold", "title", "capitalize", "swapcase"):
        growth = 3.0
    size = before.size * growth
    fixed = before.fixed * growth + (given[1] if name == "replace" and given[1:] else 0)
    work, fixed_work = before.work + factor * size, before.fixed_work + factor * fixed + sum(given) + 1
    return _Cost(size, fixed, work, fixed_work, 1 + before.depth)


def _messages_in(origin: Any, found: set[int], seen: set[int]) -> set[int]:
    """Return the messages that a value is made of."""
    if id(origin) in seen or not isinstance(origin, tuple):
        return found
    seen.add(id(origin))
    if origin[:1] == ("at",):
        found.add(origin[1][0])
    else:
        for part in origin[1] if origin[:1] == ("join",) else origin[1:2]:
            _messages_in(part, found, seen)
    return found


def _leaf(origin: Origin) -> ContentLeaf | None:
    """Return whose content this is, cut at its ends at most."""
    changes = list[tuple[str, tuple[Any, ...]]]()
    while origin[0] == "do" and origin[2] in _CHANGES:
        _, origin, method, arguments = origin
        changes.insert(0, (method, arguments))
    if origin[0] != "at" or len(origin[1]) != 2 or origin[1][1] != "content":
        return None
    return ContentLeaf(origin[1][0], tuple(changes), None)
