"""Detect: where, in a conversation rendered by any chat template, the model's own text begins and ends.

Nothing is searched for by its looks. A turn begins where the generation prompt of the messages before it
ends; it ends with the stop that the template prints. Where the template answers differently for the prefix and
for the whole, and the difference is more than a thinking scaffold that the prompt forces, there is no certain
answer in this text, and the conversation is refused with the two renderings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ftdata.errors import BadRow
from ftdata.templates.attribution.agreement import (
    ATOM,
    TAG,
    common_prefix,
    common_prefix_length,
    common_suffix,
    find_tags,
)
from ftdata.templates.attribution.spans import TextPiece, TurnRegion, pieces_of
from ftdata.templates.attribution.tracked_strings import TrackedString
from ftdata.templates.turns.stops import TurnStops
from ftdata.types import Part

RenderPrefix = Callable[[int, bool], TrackedString]
"""(number of messages, add the generation prompt) -> text"""

_THINKING = re.compile("think|thought|reason|channel|analysis", re.IGNORECASE)
"""In names of tags: a scaffold around thinking, which a prompt may force and a finished answer lack."""

_PAYLOAD = frozenset({Part.CONTENT, Part.REASONING, Part.TOOL_CALL})

_SPLIT = "turns='split' trains each turn in a text of its own"


@dataclass(frozen=True, slots=True)
class LocatedTurn:
    """One assistant message in a rendering: its region, and flags for what is unusual about it."""

    region: TurnRegion
    flags: frozenset[str] = frozenset()


def regions_from_blocks(
    parts: Sequence[TextPiece], assistants: Sequence[int], turns: Sequence[int]
) -> list[TurnRegion]:
    """Return the regions that `{% generation %}` blocks mark for the `turns`, a part of the `assistants`' messages.

    Raises:
        BadRow: it is not clear which message a block belongs to.
    """
    blocks = list(dict.fromkeys(piece.block for piece in parts if piece.block))
    regions: list[TurnRegion] = []
    for position, block in enumerate(blocks):
        inside = [piece for piece in parts if piece.block == block]
        owners = {piece.message for piece in inside if piece.part is not Part.SCAFFOLD}
        if not owners:
            # An empty answer: blocks come in the order of the messages.
            owners = {each[position] for each in (assistants, turns) if len(each) == len(blocks)}
        if len(owners) != 1:
            raise BadRow(
                "generation_tags",
                f"generation block {position} of the template holds text of {len(owners)} messages, expected one",
            )
        regions.append(TurnRegion(owners.pop(), inside[0].start, inside[-1].end))
    return [region for region in regions if region.message in turns]


def locate_turn(
    text: str, parts: Sequence[TextPiece], turn: int, prefix: RenderPrefix, count: int, stops: TurnStops
) -> LocatedTurn:
    """Return the region of assistant message `turn` in the rendering `text` of `count` messages.

    Raises:
        BadRow: `no_prompt`, `history_drift`, `interleaved` or `unknown_stop`, with the evidence.
    """
    last = turn == count - 1
    start, flags = _begin(text, parts, turn, prefix, stops)
    ended = TrackedString.of(text) if last else _or_none(prefix, turn + 1)
    whole = ended is not None and text.startswith(ended)
    own = _own(parts, turn, len(ended) if ended is not None and whole else None, start)
    answered = own[-1].end if own else start
    gap = text[answered : _next(parts, turn, answered)]
    tail = ended[answered:][: len(gap)] if ended is not None and whole else ""
    if tail.strip():
        stop = stops.own(tail)
        # It may end in a closing tag, and the stop be printed with the next message.
        stop = stop if last or stops.known(tail) else max(stop, stops.later(gap))
    elif last:
        stop = 0
    else:
        ending, rewritten = _ending(ended, text[:answered], turn)
        flags |= {"history_rewritten"} if rewritten else set()
        stop = stops.between(ending, gap)
    end = answered + stop
    if last and stops.late and not stops.known(tail):
        flags |= {"missing_final_stop"}
    elif not stop:
        flags |= {"missing_final_stop" if last and not tail.strip() and stops.stop.strip() else "no_trained_stop"}
    if not own and stops.stop.strip() not in text[start:end]:
        # Of an empty answer nothing but the stop is to be learned.
        flags |= {"no_trained_stop"}
    if ended is None:
        flags |= {"history_not_compared"}
    if last and text[end:].strip():
        flags |= {"text_after_last_stop"}
    if not stops.learnt:
        flags |= {"template_not_probed"}
    _check_own(parts, turn, start, end, own[0].start if own else end)
    _check_closed(text, parts, turn, answered, stops)
    return LocatedTurn(TurnRegion(turn, start, end), frozenset(flags))


def _check_own(parts: Sequence[TextPiece], turn: int, start: int, end: int, first: int) -> None:
    """Refuse a region that holds another message's text; `first` is where the answer itself begins."""
    for piece in parts:
        inside = start <= piece.start < end and piece.part is not Part.SCAFFOLD
        # A recipient that stands before the answer, the model says too; what follows the answer is not its own.
        if inside and (piece.message != turn or (piece.part is Part.OTHER and piece.start >= first)):
            raise BadRow("interleaved", "the template prints text inside the answer that is not the answer's")


def _check_closed(text: str, parts: Sequence[TextPiece], turn: int, answered: int, stops: TurnStops) -> None:
    """Refuse an answer that another field of the message follows before its stop."""
    following = next((p for p in parts if p.start >= answered and p.part is not Part.SCAFFOLD), None)
    if following is None or following.message != turn or following.part is not Part.OTHER:
        return
    if not stops.known(text[answered : following.start]):
        raise BadRow("interleaved", "the template prints another field of the message between the answer and its stop")


def _begin(
    text: str, parts: Sequence[TextPiece], turn: int, prefix: RenderPrefix, stops: TurnStops
) -> tuple[int, set[str]]:
    """Return where the model starts, which is where its prompt ends."""
    if turn == 0:
        raise BadRow("no_prompt", "opens the conversation: nothing asks for it", hint="put a message before it")
    prompt = prefix(turn, True)
    if text.startswith(prompt):
        return len(prompt), set()
    # The prompt may force a scaffold (an open thinking block) that the whole conversation does not have there.
    first = next((p.start for p in parts if p.message == turn and p.part is not Part.SCAFFOLD), len(text))
    start = _part(prompt, text, first)
    before = _or_none(prefix, turn)
    known = max((piece.end for piece in pieces_of(prompt) if piece.part is not Part.SCAFFOLD), default=0)
    if before is not None and before != prompt and prompt.startswith(before):
        known = max(known, len(before))
    # At least the turn's header must be the same in both, or this is another turn than the one asked for.
    header = prompt[known:start].replace(stops.stop.strip(), "") if stops.stop.strip() else prompt[known:start]
    own, forced = text[start:first].strip() if first < len(text) else "", prompt[start:].strip()
    thinking = _THINKING.search(forced) or not TAG.sub("", forced).strip()
    if not header.strip() or not thinking or _other_turn(own, forced) or stops.known(forced):
        raise BadRow("history_drift", _disagreement(prompt, text), hint=_SPLIT)
    return start, {"prompt_mismatch"}


def _other_turn(own: str, forced: str) -> bool:
    """Whether what follows the shared text belongs to two different headers, rather than to thinking."""
    if not own or own.startswith(forced):
        return False
    shared = [tag for tag in find_tags(own) & find_tags(forced) if not _THINKING.search(tag)]
    return bool(shared)


def _part(prompt: str, text: str, first: int) -> int:
    """Return where the two renderings part: before a tag that they only half share, and before the answer."""
    at = min(common_prefix_length(prompt, text), first)
    # What follows the answer's beginning is not looked at: where the two part must not depend on what it says.
    for one in (prompt, text[:first]):
        line = one[max(0, at - 64) : at + 64]
        for tag in ATOM.finditer(line):
            begin = tag.start() + max(0, at - 64)
            if begin < at < begin + len(tag.group()) and not tag.group().isspace():
                at = begin
                break
    return at


def _or_none(prefix: RenderPrefix, count: int) -> TrackedString | None:
    try:
        return prefix(count, False)
    except BadRow:
        return None


def _own(parts: Sequence[TextPiece], turn: int, length: int | None, start: int) -> list[TextPiece]:
    """Return the pieces of the message where it stands: not where a later message repeats some of it."""
    mine = [p for p in parts if p.message == turn and p.part in _PAYLOAD and p.end > start]
    if length is not None:
        return [piece for piece in mine if piece.end <= length]
    stop = next(
        (p.start for p in parts if p.start >= start and p.part is not Part.SCAFFOLD and p.message != turn), None
    )
    if stop is None:
        return mine
    if any(piece.start > stop for piece in mine):
        raise BadRow("interleaved", "the template prints text of another message inside this one")
    return [piece for piece in mine if piece.end <= stop]


def _next(parts: Sequence[TextPiece], turn: int, at: int) -> int | None:
    others = (p for p in parts if p.part is not Part.SCAFFOLD and (p.message != turn or p.part is Part.OTHER))
    return next((piece.start for piece in others if piece.start >= at), None)


def _ending(ended: TrackedString | None, begun: str, turn: int) -> tuple[str | None, bool]:
    """Return what follows the answer where the conversation ends there, and whether the answer itself differs there."""
    if ended is None:
        return None, False
    mine = [p for p in pieces_of(ended) if p.message == turn and p.part in _PAYLOAD]
    at = mine[-1].end if mine else len(begun)
    return ended[at:], ended[:at] != begun


def learn_stops(probe: Callable[[str], TrackedString | None], bare: TurnStops) -> TurnStops:
    """Learn how turns end under a template.

    Args:
        probe: renders a conversation of roles given by their first letters, as `"uaua"`; `None` where the template
            refuses it.
        bare: what is known of the tokenizer.
    """
    whole = probe("uaua")
    texts = _by_message(whole)
    if whole is None or len(texts) < len("uaua"):
        return bare
    before, first, gap = whole[: texts[0][0]], whole[texts[0][1] : texts[1][0]], whole[texts[1][1] : texts[2][0]]
    shared = common_suffix(before, gap)
    begun = before.removesuffix(shared).strip()
    # Either the first message's opener is all that stands before it, but for BOS, or two user messages in a row tell.
    exact = shared if shared.strip() and (not begun or TAG.fullmatch(begun)) else _opener(probe, gap)
    # Whatever ends a turn opens none.
    opener = (shared if exact is None else exact).rpartition(bare.eos or "\0")[2]
    stops = replace(bare, learnt=True, opener=opener, before=before if exact is None else "")
    half = probe("ua")
    tail = half[texts[1][1] :] if half is not None and whole.startswith(half) else None
    ending = half[ended[1][1] :] if half is not None and len(ended := _by_message(half)) == len("ua") else None
    try:
        stop = tail[: stops.own(tail)] if tail and tail.strip() else gap[: stops.between(ending, gap)]
    except BadRow:
        stop = ""
    stops = replace(stops, stop=stop)
    last = whole[texts[3][1] :]
    if closed := stops.known(last):
        return replace(stops, leftover=last[closed:])
    open_ended = not TAG.search(last) and not (bare.control is not None and bare.control.search(last))
    stops = replace(stops, late=bool(stop) and open_ended)
    if stop:
        return replace(stops, leftover=common_suffix(last, first))
    # No stops between turns: what is printed only where the conversation ends is none of the model's, unless it is a
    # control token that stands nowhere else.
    closing = gap if exact is None else gap.removesuffix(exact)
    leftover = last[len(common_prefix(closing if tail is None else tail, last)) :]
    token = bare.control.match(leftover.strip()) if bare.control is not None else None
    return stops if token and token.group() not in whole[: texts[3][1]] else replace(stops, leftover=leftover)


def _opener(probe: Callable[[str], TrackedString | None], gap: str) -> str | None:
    """Return what the template prints before a user message, told by two in a row; `None` where they do not tell."""
    twice, alone = probe("uu"), probe("u")
    texts, own = _by_message(twice), _by_message(alone)
    if twice is None or alone is None or len(texts) < len("uu") or not own:
        return None
    between, closing = twice[texts[0][1] : texts[1][0]], alone[own[0][1] :]
    opener = between.removeprefix(closing)
    return opener if between.startswith(closing) and gap.endswith(opener) else None


def _by_message(text: TrackedString | None) -> dict[int, tuple[int, int]]:
    """Return where the text of each message stands."""
    found: dict[int, tuple[int, int]] = {}
    for piece in pieces_of(text) if text is not None else ():
        if piece.part is Part.CONTENT:
            found[piece.message] = (found.get(piece.message, (piece.start, 0))[0], piece.end)
    return found


def _disagreement(prefix: str, text: str) -> str:
    at = common_prefix_length(prefix, text)
    shown = slice(max(0, at - 20), at + 40)
    return (
        f"the template renders the conversation up to here as ...{prefix[shown]!r}... but inside the whole as "
        f"...{text[shown]!r}..."
    )
