"""Cache the text positions of assistant turns, and reuse them for conversations with the same structure.

A conversation has a shape: its roles, keys and types, without its texts. Its rendered text has a skeleton: the template
text, and the owners of the text in between. If two conversations have the same shape and the same skeleton, and all
operations of the template on their texts have the same results, then their generation prompts and endings are the
same, and so are their turns.
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
"""(index of a piece of the skeleton, number of characters from its start)"""

_MAX_KEYS, _MAX_ENTRIES = 512, 8
"""Limits of the cache. An entry takes about 20 kB for a long conversation, so the cache takes at most 100 MB."""


@dataclass(frozen=True, slots=True)
class CachedTurns:
    """The positions of turns in a rendered text, and the conditions for reusing them for another text.

    Attributes:
        operations: operations on texts, which must have the same results for another row.
        excluded_prefixes: (anchor, text) pairs. The positions do not apply if the text follows the anchor. At an
            anchor, a rendered prefix of the conversation continues with template text, and the whole rendered
            conversation continues with text of the row.
        turns: message, start, end and flags of each turn.
    """

    operations: tuple[RecordedOperation, ...]
    excluded_prefixes: tuple[tuple[Anchor, str], ...]
    turns: tuple[tuple[int, Anchor, Anchor, frozenset[str]], ...]

    def locate(self, parts: Sequence[TextPiece]) -> list[LocatedTurn]:
        """Return the turns of another rendered text. `parts` contains the pieces of this text."""
        return [
            LocatedTurn(TurnRegion(message, _position(parts, start), _position(parts, end)), flags)
            for message, start, end, flags in self.turns
        ]


@dataclass
class TurnCache:
    """A cache of turn positions. The key is the result of `skeleton_key`."""

    entries: dict[Key, list[CachedTurns]] = field(default_factory=dict)

    def locate(
        self, key: Key, messages: Sequence[Mapping[str, Any]], text: str, parts: Sequence[TextPiece]
    ) -> list[LocatedTurn] | None:
        """Return the turns of a rendered text, or `None` if no cached positions apply."""
        cached = self.find(key, messages, text, parts)
        return None if cached is None else cached.locate(parts)

    def find(
        self, key: Key, messages: Sequence[Mapping[str, Any]], text: str, parts: Sequence[TextPiece]
    ) -> CachedTurns | None:
        """Return the cache entry that applies to a rendered text, or `None` if no entry applies."""
        for cached in self.entries.get(key, ()):
            if any(
                text.startswith(excluded, _position(parts, anchor)) for anchor, excluded in cached.excluded_prefixes
            ):
                continue
            if all(operation.has_same_result(messages) for operation in cached.operations):
                return cached
        return None

    def add(
        self,
        key: Key,
        log: OperationLog,
        text: str,
        prefixes: Iterable[TrackedString],
        parts: Sequence[TextPiece],
        turns: Sequence[LocatedTurn],
    ) -> None:
        """Cache the positions of turns if the key and the recorded operations fully determine the positions."""
        if log.opaque or (key not in self.entries and len(self.entries) >= _MAX_KEYS):
            return
        excluded_prefixes = []
        for prefix in prefixes:
            exclusions = _find_exclusions(text, parts, prefix)
            if exclusions is _TEXT_DEPENDENT or any(
                text.startswith(excluded, _position(parts, anchor)) for anchor, excluded in exclusions
            ):
                return
            excluded_prefixes += exclusions
        anchored_turns = []
        for turn in turns:
            start, end = _anchor(parts, turn.region.start), _anchor(parts, turn.region.end)
            if start is None or end is None:
                return
            anchored_turns.append((turn.region.message, start, end, turn.flags))
        entries = self.entries.setdefault(key, [])
        operations = {repr(operation): operation for operation in log.operations}
        cached = CachedTurns(tuple(operations.values()), tuple(dict.fromkeys(excluded_prefixes)), tuple(anchored_turns))
        if len(entries) < _MAX_ENTRIES and cached not in entries:
            entries.append(cached)


def skeleton_key(
    messages: Sequence[Mapping[str, Any]], tools: object, turns: Sequence[int], text: str, parts: Sequence[TextPiece]
) -> Key:
    """Return the cache key of a rendered conversation: its template text, and all properties except its texts."""
    skeleton = tuple(
        text[piece.start : piece.end]
        if piece.part is Part.SCAFFOLD
        else (piece.message, piece.part, *_describe_whitespace(messages, piece, text))
        for piece in parts
    )
    return _shape(messages), repr(tools) if tools else "", tuple(turns), skeleton


def _describe_whitespace(messages: Sequence[Mapping[str, Any]], piece: TextPiece, text: str) -> tuple[bool, bool, bool]:
    """Return whether a content (1) is printed unchanged, (2) has outer whitespace, (3) is only whitespace.

    A template may strip a content only when it renders the generation prompt. Contents without surrounding whitespace
    do not show this, so they need a different key.
    """
    content = messages[piece.message].get("content") if piece.part is Part.CONTENT else None
    if not isinstance(content, str):
        return False, False, False
    plain = str.__str__(content)
    return text[piece.start : piece.end] == plain, plain != plain.strip(), not plain.strip()


def _shape(value: Any) -> Any:
    if isinstance(value, TrackedString):
        return str
    if isinstance(value, Mapping):
        return tuple((str.__str__(key), _shape(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return (list, *map(_shape, value))
    return type(value), value


_TEXT_DEPENDENT: list[tuple[Anchor, str]] = [((-1, -1), "")]
"""Marks two renderings that diverge at different texts of the row, so that the result depends on all of both texts."""


def _find_exclusions(text: str, parts: Sequence[TextPiece], prefix: TrackedString) -> list[tuple[Anchor, str]]:
    """Return the conditions under which another row has the same first difference between `prefix` and the whole text.

    Each condition is an (anchor, text) pair: this text must not follow the anchor. The list is empty if `prefix` has
    the same pieces as the text, or if the two texts diverge in template text.
    """
    prefix_pieces, prefix_text = pieces_of(prefix), str.__str__(prefix)
    for index, (prefix_piece, piece) in enumerate(zip(prefix_pieces, parts, strict=False)):
        piece_of_prefix, piece_of_text = (
            prefix_text[prefix_piece.start : prefix_piece.end],
            text[piece.start : piece.end],
        )
        if (prefix_piece.part, prefix_piece.message, piece_of_prefix) == (piece.part, piece.message, piece_of_text):
            continue
        if prefix_piece.part is not Part.SCAFFOLD:
            return _TEXT_DEPENDENT
        if piece.part is not Part.SCAFFOLD:
            return [((index, 0), piece_of_prefix)]
        if piece_of_text.startswith(piece_of_prefix):
            return [] if prefix_piece is prefix_pieces[-1] else _TEXT_DEPENDENT
        return (
            [((index + 1, 0), piece_of_prefix[len(piece_of_text) :])]
            if piece_of_prefix.startswith(piece_of_text)
            else []
        )
    return []


def _anchor(parts: Sequence[TextPiece], position: int) -> Anchor | None:
    """Convert a position to (index of a piece, offset in the piece). Return `None` for a position inside row text."""
    for index, piece in enumerate(parts):
        if piece.start <= position < piece.end:
            return (index, position - piece.start) if piece.part is Part.SCAFFOLD or position == piece.start else None
    return len(parts), 0


def _position(parts: Sequence[TextPiece], anchor: Anchor) -> int:
    index, offset = anchor
    return parts[index].start + offset if index < len(parts) else parts[-1].end
