"""Remember: where turns begin and end is found out once for each way that a template takes.

A conversation has a shape (roles, keys, types, everything but its texts), and its rendering a skeleton (the
template's own text, and whose text stands between). For both the same, and all questions that the template asked of the
texts answered the same, the generation prompts and the endings come out the same, so the regions do too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftdata.templates.attribution.spans import TextPiece, TurnRegion, pieces_of
from ftdata.templates.attribution.tracked_strings import TrackedString
from ftdata.templates.attribution.watched_strings import OperationLog, RecordedOperation
from ftdata.templates.turns.locate import LocatedTurn
from ftdata.types import Part

Key = tuple[Any, ...]
Anchor = tuple[int, int]
"""(index of a piece of the skeleton, characters into it)"""

_MOST_KEYS, _MOST_WAYS = 512, 8
"""Bounds on what is kept: a way is some 20 kB for a long conversation, so 100 MB at most."""


@dataclass(frozen=True, slots=True)
class CachedTurns:
    """The turns of one skeleton, as they were found once.

    They are those of another row if it gives the same answers to `questions`, and none of its texts begins with what
    stands in `unlike`, where a prompt goes on with the template's own text and the conversation with the row's.
    """

    questions: tuple[RecordedOperation, ...]
    unlike: tuple[tuple[Anchor, str], ...]
    turns: tuple[tuple[int, Anchor, Anchor, frozenset[str]], ...]

    def located(self, parts: Sequence[TextPiece]) -> list[LocatedTurn]:
        """Return the turns in a text that has these pieces."""
        return [
            LocatedTurn(TurnRegion(message, _position(parts, start), _position(parts, end)), flags)
            for message, start, end, flags in self.turns
        ]


@dataclass
class TurnCache:
    """What is known about one template's ways."""

    ways: dict[Key, list[CachedTurns]] = field(default_factory=dict)

    def recall(
        self, key: Key, messages: Sequence[Mapping[str, Any]], text: str, parts: Sequence[TextPiece]
    ) -> list[LocatedTurn] | None:
        """Return the turns of a rendering whose like was seen before, else `None`."""
        way = self.way(key, messages, text, parts)
        return None if way is None else way.located(parts)

    def way(
        self, key: Key, messages: Sequence[Mapping[str, Any]], text: str, parts: Sequence[TextPiece]
    ) -> CachedTurns | None:
        """Return the way that a rendering took, if it was seen before."""
        for way in self.ways.get(key, ()):
            if any(text.startswith(other, _position(parts, anchor)) for anchor, other in way.unlike):
                continue
            if all(question.same(messages) for question in way.questions):
                return way
        return None

    def keep(
        self,
        key: Key,
        log: OperationLog,
        text: str,
        prefixes: Iterable[TrackedString],
        parts: Sequence[TextPiece],
        turns: Sequence[LocatedTurn],
    ) -> None:
        """Remember the turns, if all that they were found from would be the same for other texts of this key."""
        if log.opaque or (key not in self.ways and len(self.ways) >= _MOST_KEYS):
            return
        unlike = []
        for prefix in prefixes:
            apart = _apart(text, parts, prefix)
            if apart is _BY_CHANCE or any(text.startswith(other, _position(parts, at)) for at, other in apart):
                return
            unlike += apart
        anchored = []
        for turn in turns:
            start, end = _anchor(parts, turn.region.start), _anchor(parts, turn.region.end)
            if start is None or end is None:
                return
            anchored.append((turn.region.message, start, end, turn.flags))
        ways = self.ways.setdefault(key, [])
        questions = {repr(question): question for question in log.questions}
        way = CachedTurns(tuple(questions.values()), tuple(dict.fromkeys(unlike)), tuple(anchored))
        if len(ways) < _MOST_WAYS and way not in ways:
            ways.append(way)


def skeleton_key(
    messages: Sequence[Mapping[str, Any]], tools: object, turns: Sequence[int], text: str, parts: Sequence[TextPiece]
) -> Key:
    """Return shape and skeleton of a rendered conversation."""
    skeleton = tuple(
        text[piece.start : piece.end]
        if piece.part is Part.SCAFFOLD
        else (piece.message, piece.part, *_manner(messages, piece, text))
        for piece in parts
    )
    return _shape(messages), repr(tools) if tools else "", tuple(turns), skeleton


def _manner(messages: Sequence[Mapping[str, Any]], piece: TextPiece, text: str) -> tuple[bool, bool, bool]:
    """Say whether a message's content is printed whole, whether there are blanks around it, and whether it is nothing.

    A template may print one message otherwise in a prompt than in the whole: in texts that have nothing to cut, that
    does not show.
    """
    content = messages[piece.message].get("content") if piece.part is Part.CONTENT else None
    if not isinstance(content, str):
        return False, False, False
    whole = str.__str__(content)
    return text[piece.start : piece.end] == whole, whole != whole.strip(), not whole.strip()


def _shape(value: Any) -> Any:
    if isinstance(value, TrackedString):
        return str
    if isinstance(value, Mapping):
        return tuple((str.__str__(key), _shape(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return (list, *map(_shape, value))
    return type(value), value


_BY_CHANCE: list[tuple[Anchor, str]] = [((-1, -1), "")]
"""Two texts of the row stand where the renderings part: whether they do depends on all of what they say."""


def _apart(text: str, parts: Sequence[TextPiece], prefix: TrackedString) -> list[tuple[Anchor, str]]:
    """Return where the row's text must go on otherwise than `prefix` does, for the two to compare as they do now.

    Nothing, where `prefix` has the very pieces of the text, or the template itself parts them.
    """
    written, said = pieces_of(prefix), str.__str__(prefix)
    for index, (own, other) in enumerate(zip(written, parts, strict=False)):
        mine, theirs = said[own.start : own.end], text[other.start : other.end]
        if (own.part, own.message, mine) == (other.part, other.message, theirs):
            continue
        if own.part is not Part.SCAFFOLD:
            return _BY_CHANCE
        if other.part is not Part.SCAFFOLD:
            return [((index, 0), mine)]
        if theirs.startswith(mine):
            return [] if own is written[-1] else _BY_CHANCE
        return [((index + 1, 0), mine[len(theirs) :])] if mine.startswith(theirs) else []
    return []


def _anchor(parts: Sequence[TextPiece], at: int) -> Anchor | None:
    """Return a position by the piece it stands in; `None` inside a text of the row, where it depends on the text."""
    for index, piece in enumerate(parts):
        if piece.start <= at < piece.end:
            return (index, at - piece.start) if piece.part is Part.SCAFFOLD or at == piece.start else None
    return len(parts), 0


def _position(parts: Sequence[TextPiece], anchor: Anchor) -> int:
    index, offset = anchor
    return parts[index].start + offset if index < len(parts) else parts[-1].end
