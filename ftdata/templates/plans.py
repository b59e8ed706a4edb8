"""Plans: what a template makes of conversations that it treats alike, without running it again.

A run on watched strings tells what each stretch of the output is: the template's own text, or a text of the row, maybe
stripped. Of a conversation of the same shape, for which all that was asked of the texts has the same answers, the
template makes the same stretches. So they are joined, and where turns begin and end is known with them. What is not
like that in any way is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftdata.templates.memory import Way
from ftdata.templates.spans import Piece
from ftdata.templates.watched import Origin, evaluate
from ftdata.types import Part, Rendered, Span

_ROLES = {"system", "user", "assistant"}
_KEYS = {"role", "content"}, {"role", "content", "train"}
_THINKING = re.compile(r"</(?:think|thinking|thought|reasoning)>")
_MOST_SHAPES, _MOST_PLANS = 512, 8

Shape = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A stretch that is a message's content, as it stands (`origin` is `None`) or changed at its ends.

    `whole` and `blank`: whether all of it is printed, and whether it has blanks around it.
    """

    message: int
    origin: Origin | None
    whole: bool
    blank: bool

    def of(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """Return the stretch for other messages, `None` where it is not of the same kind."""
        content: str = messages[self.message]["content"]
        bare = content.strip()
        if not bare or (bare != content) != self.blank:
            return None
        text = content if self.origin is None else evaluate(self.origin, messages)
        return text if (text == content) == self.whole and (self.whole or text.strip() == bare) else None


Cut = tuple[int, int, int | None, Part, int, bool]
"""A span: the number of the stretch it is in, where it begins in that and where it ends (`None`: with it), and the
rest."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The stretches of one way that a template takes, and how spans lie in them."""

    way: Way
    stretches: tuple[str | Leaf, ...]
    cuts: tuple[Cut, ...]
    flags: frozenset[str]

    @classmethod
    def of(cls, way: Way, stretches: tuple[str | Leaf, ...], rendered: Rendered, parts: Sequence[Piece]) -> Plan | None:
        """Return the plan for renderings like this one; `None` where a span is not told by the stretches."""
        cuts, number = list[Cut](), 0
        for span in rendered.spans:
            while number < len(parts) and parts[number].end <= span.start:
                number += 1
            piece = parts[number]
            whole = (span.start, span.end) == (piece.start, piece.end)
            if span.end > piece.end or (isinstance(stretches[number], Leaf) and not whole):
                return None
            end = None if span.end == piece.end else span.end - piece.start
            cuts.append((number, span.start - piece.start, end, span.part, span.message, span.generated))
        return cls(way, stretches, tuple(cuts), rendered.flags)

    def fill(self, messages: Sequence[Mapping[str, Any]]) -> Rendered | None:
        """Return what the template makes of these messages, `None` where that is not certain."""
        texts, at, starts = list[str](), 0, list[int]()
        try:
            for one in self.stretches:
                text = one if isinstance(one, str) else one.of(messages)
                if text is None:
                    return None
                texts.append(text)
                starts.append(at)
                at += len(text)
            if not all(question.same(messages) for question in self.way.questions):
                return None
        except (ValueError, LookupError):
            return None
        starts.append(at)
        text = "".join(texts)
        if any(text.startswith(other, starts[number] + offset) for (number, offset), other in self.way.unlike):
            return None
        spans = tuple(
            Span(starts[at] + begin, starts[at + 1] if end is None else starts[at] + end, part, message, generated)
            for at, begin, end, part, message, generated in self.cuts
        )
        return Rendered(text, spans, self.flags, messages=len(messages))


@dataclass
class Plans:
    """What is known about one template."""

    by_shape: dict[Shape, list[Plan]] = field(default_factory=dict)

    def filled(self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int]) -> Rendered | None:
        """Return what the template makes of messages, if one of the plans says so."""
        shape = shape_of(messages, turns)
        for plan in self.by_shape.get(shape, ()) if shape else ():
            if (rendered := plan.fill(messages)) is not None:
                return rendered
        return None

    def keep(self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int], plan: Plan) -> None:
        """Remember a plan for messages of this shape."""
        shape = shape_of(messages, turns)
        if shape and (shape in self.by_shape or len(self.by_shape) < _MOST_SHAPES):
            plans = self.by_shape.setdefault(shape, [])
            if len(plans) < _MOST_PLANS:
                plans.append(plan)


def shape_of(messages: Sequence[Mapping[str, Any]], turns: Sequence[int]) -> Shape | None:
    """Return what conversations of one plan have in common; `None` for those that have more to them than contents.

    Thinking in a content is cut out of it, wherever it ends.
    """
    for message in messages:
        content = message.get("content")
        if message.keys() not in _KEYS or message["role"] not in _ROLES or not isinstance(content, str):
            return None
        if "</" in content and _THINKING.search(content):
            return None
    return (*(message["role"] for message in messages), *turns)


def stretches_of(
    origin: Origin | None, messages: Sequence[Mapping[str, Any]], parts: Sequence[Piece], text: str
) -> tuple[str | Leaf, ...] | None:
    """Return the stretches that a run on watched strings was made of, if they are the very pieces of the text."""
    found: list[str | Leaf] = []
    for part in _flat(origin):
        if part is None:
            return None
        if isinstance(part, str):
            found = [*found[:-1], found[-1] + part] if found and isinstance(found[-1], str) else [*found, part]
            continue
        message = _message_of(part)
        if message is None:
            return None
        content = str.__str__(messages[message]["content"])
        whole = str.__str__(evaluate(part, messages)) == content
        found.append(Leaf(message, None if part[0] == "at" else part, whole, content != content.strip()))
    return _cut_as(parts, [one for one in found if one != ""], text)


def _cut_as(parts: Sequence[Piece], found: Sequence[str | Leaf], text: str) -> tuple[str | Leaf, ...] | None:
    """Return the stretches, the template's text cut where its pieces are; `None` where they are not those pieces."""
    left, cut = list(found), list[str | Leaf]()
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


def _flat(origin: Origin | None) -> Iterator[str | Origin | None]:
    if origin is None:
        yield None
    elif origin[0] == "join":
        for part in origin[1]:
            yield from _flat(part)
    else:
        yield origin[1] if origin[0] == "is" else origin


def _message_of(origin: Origin) -> int | None:
    """Return the message whose content this is, cut at its ends at most."""
    while origin[0] == "do" and origin[2] in (
        "strip",
        "lstrip",
        "rstrip",
        "removeprefix",
        "removesuffix",
        "__getitem__",
        "split",
    ):
        origin = origin[1]
    return origin[1][0] if origin[0] == "at" and len(origin[1]) == 2 and origin[1][1] == "content" else None
