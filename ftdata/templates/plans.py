"""Plans: what a template makes of conversations that it treats alike, without running it again.

A run on watched strings tells what each stretch of the output is: the template's own text, or a text of the row, maybe
stripped. Of a conversation of the same shape, for which all that was asked of the texts has the same answers, the
template makes the same stretches. So they are joined, and where turns begin and end is known with them. What is not
like that in any way is rendered.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftdata.templates.memory import Anchor, Way
from ftdata.templates.runs import flat
from ftdata.templates.spans import Piece
from ftdata.templates.watched import Origin, Question, evaluate
from ftdata.types import Kinds, Part, Rendered, Spans

_ROLES = {"system", "user", "assistant"}
_THINKING = re.compile(r"</(?:think|thinking|thought|reasoning)>")
_MOST_SHAPES, _MOST_PLANS, _MOST_GROWTH = 512, 8, 8

Shape = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Leaf:
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


@dataclass(frozen=True, slots=True)
class Plan:
    """The spans of one way that a template takes, and what it depends on (as of a `Way`).

    `texts` holds the text of each that is the template's own, `leaves` which of them are contents, and whose, and
    `kinds` the rest of what they are.
    """

    texts: tuple[str, ...]
    leaves: tuple[tuple[int, Leaf], ...]
    kinds: Kinds
    flags: frozenset[str]
    questions: tuple[Question, ...]
    unlike: tuple[tuple[Anchor, str], ...]

    @classmethod
    def of(
        cls, way: Way, stretches: Sequence[str | Leaf], rendered: Rendered, parts: Sequence[Piece], *, alike: bool
    ) -> Plan | None:
        """Return the plan for renderings like this one; `None` where a span is not told by the stretches.

        A span is a stretch, or some of one of the template's.

        `alike`: whether prompts and endings were made of the very stretches that the whole begins with. Then what is
        printed of a text is the same in all of them, whatever there is to cut at its ends.
        """
        texts, leaves, firsts, number = list[str](), list[tuple[int, Leaf]](), [0], 0
        for at, span in enumerate(rendered.spans):
            if span.start == parts[number].end:
                number += 1
                firsts.append(at)
            stretch = stretches[number]
            if span.end > parts[number].end or (isinstance(stretch, Leaf) and span.end < parts[number].end):
                return None
            if isinstance(stretch, Leaf):
                leaves.append((at, replace(stretch, manner=None) if alike else stretch))
            texts.append("" if isinstance(stretch, Leaf) else rendered.text[span.start : span.end])
        firsts.append(len(texts))
        questions = tuple(one for one in way.questions if not (alike and one.asked[0] == "same"))
        unlike = tuple(((firsts[number], offset), other) for (number, offset), other in way.unlike)
        kinds = replace(Spans.of(rendered.spans).kinds, followed=True)
        return cls(tuple(texts), tuple(leaves), kinds, rendered.flags, questions, unlike)

    @property
    def bounded(self) -> bool:
        """Whether its questions can be asked of any row: that is done here, not where templates are held to limits."""
        return all(_growth(one.asked) <= _MOST_GROWTH for one in self.questions)

    def fill(self, messages: Sequence[Mapping[str, Any]], contents: Sequence[str]) -> Rendered | None:
        """Return what the template makes of these messages (`contents_of` them), `None` where that is not certain."""
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
        except (ValueError, LookupError):
            return None
        text, sizes = "".join(texts), [*map(len, texts)]
        for (number, offset), other in self.unlike:
            if text.startswith(other, sum(sizes[:number]) + offset):
                return None
        return Rendered(text, Spans(sizes, self.kinds), self.flags, len(messages))


@dataclass
class Plans:
    """What is known about one template. `missed` counts the conversations of each shape that no plan was for.

    `fresh` are the plans that were found since somebody took them from there.
    """

    by_shape: dict[Shape, list[Plan]] = field(default_factory=dict)
    missed: Counter[Shape] = field(default_factory=Counter)
    fresh: list[tuple[Shape, Plan]] = field(default_factory=list)

    def wanted(self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int]) -> bool:
        """Whether to look for a plan for these, which is done the more rarely the more often there was none."""
        shape = shape_of(messages, turns)
        if shape is None or (shape not in self.missed and len(self.missed) == _MOST_SHAPES):
            return False
        self.missed[shape] += 1
        times = self.missed[shape]
        return len(self.by_shape.get(shape, ())) < _MOST_PLANS and (times <= _MOST_PLANS or times & (times - 1) == 0)

    def filled(self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int]) -> Rendered | None:
        """Return what the template makes of messages, if one of the plans says so."""
        contents = contents_of(messages)
        if contents is None:
            return None
        for plan in self.of([message["role"] for message in messages], turns):
            if (rendered := plan.fill(messages, contents)) is not None:
                return rendered
        return None

    def of(self, roles: Sequence[str], turns: Sequence[int]) -> Sequence[Plan]:
        """Return the plans for messages of these roles, of which these are the turns."""
        return self.by_shape.get((*roles, *turns), ())

    def keep(self, messages: Sequence[Mapping[str, Any]], turns: Sequence[int], plan: Plan) -> None:
        """Remember a plan for messages of this shape."""
        if shape := shape_of(messages, turns):
            self.by_shape.setdefault(shape, []).append(plan)
            self.fresh.append((shape, plan))


def shape_of(messages: Sequence[Mapping[str, Any]], turns: Sequence[int]) -> Shape | None:
    """Return what conversations of one plan have in common; `None` for those that have more to them than contents."""
    if contents_of(messages) is None:
        return None
    roles = [message["role"] for message in messages]
    return (*roles, *turns) if _ROLES.issuperset(roles) else None


def contents_of(messages: Sequence[Mapping[str, Any]]) -> list[str] | None:
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


def stretches_of(
    origin: Origin | None, messages: Sequence[Mapping[str, Any]], parts: Sequence[Piece], text: str
) -> tuple[str | Leaf, ...] | None:
    """Return the stretches that a run on watched strings was made of, if they are the very pieces of the text."""
    found: list[str | Leaf] = []
    for part in flat(origin):
        if part is None:
            return None
        if isinstance(part, str):
            found = [*found[:-1], found[-1] + part] if found and isinstance(found[-1], str) else [*found, part]
            continue
        if (leaf := _leaf(part)) is None:
            return None
        content = str.__str__(messages[leaf.message]["content"])
        manner = str.__str__(evaluate(part, messages)) == content, content != content.strip()
        found.append(replace(leaf, manner=manner))
    return _cut_as(parts, [one for one in found if one != ""], text)


def alike(whole: Origin | None, others: Iterable[Origin | None]) -> bool:
    """Whether other runs were made of the same texts of the row as this one begins with, changed in the same ways."""
    own = [part for part in flat(whole) if not isinstance(part, str)]
    for other in others:
        theirs = [part for part in flat(other) if not isinstance(part, str)]
        if None in theirs or theirs != own[: len(theirs)]:
            return False
    return True


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


_CHANGES = ("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "__getitem__", "split")


def _growth(origin: Any) -> float:
    """Return how many times longer than what the row gives a text may become on the way to a value of it."""
    if not isinstance(origin, tuple):
        return 1.0
    before = max(map(_growth, origin), default=1.0)
    if origin[:1] != ("do",) or origin[2] != "replace":
        return before
    old, new = (len(one) if isinstance(one, str) else 0 for one in (*origin[3], "", "")[:2])
    return before * max(1.0, new / old if old else new + 1)


def _leaf(origin: Origin) -> Leaf | None:
    """Return whose content this is, cut at its ends at most."""
    changes = list[tuple[str, tuple[Any, ...]]]()
    while origin[0] == "do" and origin[2] in _CHANGES:
        _, origin, method, arguments = origin
        changes.insert(0, (method, arguments))
    if origin[0] != "at" or len(origin[1]) != 2 or origin[1][1] != "content":
        return None
    return Leaf(origin[1][0], tuple(changes), None)
