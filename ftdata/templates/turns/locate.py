"""Locate the text that the model generates in each turn of a rendered conversation, for any chat template.

The code contains no patterns of known formats. A turn begins where the generation prompt for the messages before it
ends, and ends with the stop token that the template prints. The template may render the messages before a turn
differently than the whole conversation. If the difference is more than a thinking block that the generation prompt
opens, the boundaries are uncertain, and the row is rejected. The error contains both renderings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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
"""(number of messages, whether to add the generation prompt) -> text"""

_THINKING = re.compile("think|thought|reason|channel|analysis", re.IGNORECASE)
"""Words in tags around thinking. A generation prompt may contain these tags where a finished answer has none."""

_GENERATED_PARTS = frozenset({Part.CONTENT, Part.REASONING, Part.TOOL_CALL})

_SPLIT_HINT = "use turns='split' to render each turn in its own text"


@dataclass(frozen=True, slots=True)
class LocatedTurn:
    """The range of the rendered text that the model generates for one message, and the flags of the message."""

    region: TurnRegion
    flags: frozenset[str] = frozenset()


def regions_from_blocks(
    parts: Sequence[TextPiece], assistants: Sequence[int], turns: Sequence[int]
) -> list[TurnRegion]:
    """Return the ranges of generated text that the template marks with `{% generation %}` blocks.

    Args:
        parts: the pieces of the rendered text.
        assistants: indices of all assistant messages.
        turns: indices of the assistant messages to return.

    Raises:
        BadRow: `generation_tags`, if it is uncertain which message a block belongs to.
    """
    blocks = list(dict.fromkeys(piece.block for piece in parts if piece.block))
    regions: list[TurnRegion] = []
    for position, block in enumerate(blocks):
        inside = [piece for piece in parts if piece.block == block]
        owners = {piece.message for piece in inside if piece.part is not Part.SCAFFOLD}
        if not owners:
            # The answer is empty. Blocks are in the order of the messages.
            owners = {indices[position] for indices in (assistants, turns) if len(indices) == len(blocks)}
        between = [piece for piece in parts if regions and regions[-1].end <= piece.start < inside[0].start]
        if not owners and regions and all(piece.part is Part.SCAFFOLD for piece in between):
            # Some templates have a block with only the EOS token after the last turn.
            owners = {regions[-1].message}
        if len(owners) != 1:
            message = f"generation block {position} of the template contains text of {len(owners)} messages, expected 1"
            hint = "put generation tags around the text that the assistant generates in each message"
            raise BadRow("generation_tags", message, hint=hint)
        regions.append(TurnRegion(owners.pop(), inside[0].start, inside[-1].end))
    return [region for region in regions if region.message in turns]


def locate_turn(
    text: str, parts: Sequence[TextPiece], turn: int, prefix: RenderPrefix, count: int, stops: TurnStops
) -> LocatedTurn:
    """Find where the generated text of one assistant message begins and ends in the rendered text.

    Args:
        text: the rendered text.
        parts: the pieces of the text.
        turn: index of the assistant message.
        prefix: renders the first messages of the conversation.
        count: number of messages in `text`.
        stops: how the template ends turns.

    Raises:
        BadRow: `history_drift`, `interleaved` or `unknown_stop`, with the rendered text.
    """
    start, flags = _find_start(text, parts, turn, prefix, stops)
    answer = _find_answer(text, parts, turn, prefix, start, is_last=turn == count - 1)
    stop_length, is_rewritten = _measure_stop(text, answer, stops)
    end = answer.end + stop_length
    flags |= _flag_turn(text, answer, stop_length, stops)
    flags |= {"history_rewritten"} if is_rewritten else set()
    _check_region(parts, turn, start, end, answer.pieces[0].start if answer.pieces else end)
    _check_text_before_stop(text, parts, turn, answer.end, stops)
    return LocatedTurn(TurnRegion(turn, start, end), frozenset(flags))


class _Answer(NamedTuple):
    """The text of an assistant message that the model generates, and the template text after it.

    Attributes:
        message: index of the message.
        start: start of the turn.
        end: end of the answer, where its stop token begins.
        pieces: the pieces of the answer; empty for an empty answer.
        is_last: whether the message is the last message of the conversation.
        ended: rendering of the conversation up to this message; `None` if the template rejects it.
        gap: text between the answer and the next text that does not belong to the answer.
        tail: the part of `gap` that the template also prints at the end of the conversation. It is empty if the
            template renders the conversation up to this message differently than the whole conversation.
    """

    message: int
    start: int
    end: int
    pieces: Sequence[TextPiece]
    is_last: bool
    ended: TrackedString | None
    gap: str
    tail: str


def _find_answer(
    text: str, parts: Sequence[TextPiece], turn: int, prefix: RenderPrefix, start: int, *, is_last: bool
) -> _Answer:
    ended = TrackedString.from_str(text) if is_last else _render_or_none(prefix, turn + 1)
    same_ended = ended if ended is not None and text.startswith(ended) else None
    pieces = _message_pieces(parts, turn, None if same_ended is None else len(same_ended), start)
    end = pieces[-1].end if pieces else start
    gap = text[end : _find_next_start(parts, turn, end)]
    tail = "" if same_ended is None else same_ended[end:][: len(gap)]
    return _Answer(turn, start, end, pieces, is_last, ended, gap, tail)


def _measure_stop(text: str, answer: _Answer, stops: TurnStops) -> tuple[int, bool]:
    """Return the number of characters from the end of the answer to the end of its stop token.

    Also return whether the template rewrites the turn.

    A template rewrites a turn if it renders the turn differently once more messages follow.
    """
    gap, tail = answer.gap, answer.tail
    if tail.strip():
        length = stops.find_end(tail)
        # The tail may end in a closing tag, and the stop token may be printed with the next message.
        may_be_late = not answer.is_last and not stops.find_known_end(tail)
        return max(length, stops.find_late_end(gap)) if may_be_late else length, False
    if answer.is_last:
        return 0, False
    ending, is_rewritten = _find_ending(answer.ended, text[: answer.end], answer.message)
    length = stops.find_end_between(ending, gap)
    if not answer.pieces and ending is not None:
        # An empty answer has no text to compare, so the generated template text is compared.
        is_rewritten |= not ending.startswith(gap[:length])
    return length, is_rewritten


def _flag_turn(text: str, answer: _Answer, stop_length: int, stops: TurnStops) -> set[str]:
    end, stop, is_last = answer.end + stop_length, stops.stop.strip(), answer.is_last
    is_late = is_last and stops.is_late and not stops.find_known_end(answer.tail)
    has_stop = is_late or stop_length > 0
    lacks_final_stop = is_last and not answer.tail.strip() and bool(stop)
    # The stop token is the only trained text of an empty answer.
    is_untrained = not answer.pieces and stop not in text[answer.start : end]
    conditions = {
        "missing_final_stop": is_late or (not has_stop and lacks_final_stop),
        "no_trained_stop": is_untrained or (not has_stop and not lacks_final_stop),
        "history_not_compared": answer.ended is None,
        "text_after_last_stop": is_last and bool(text[end:].strip()),
        "template_not_probed": not stops.is_probed,
    }
    return {flag for flag, applies in conditions.items() if applies}


def _check_region(parts: Sequence[TextPiece], turn: int, start: int, end: int, first: int) -> None:
    """Reject a row if the range of text that the model generates contains text of another message.

    Fields without a known meaning are allowed only before the position `first`, where the answer begins.
    """
    for piece in parts:
        inside = start <= piece.start < end and piece.part is not Part.SCAFFOLD
        # The model also generates other fields before the answer, such as a recipient, but none after it.
        if inside and (piece.message != turn or (piece.part is Part.OTHER and piece.start >= first)):
            raise BadRow("interleaved", "the template prints text of another message or field inside the answer")


def _check_text_before_stop(
    text: str, parts: Sequence[TextPiece], turn: int, answer_end: int, stops: TurnStops
) -> None:
    """Reject a row if the template prints another field of the message between the answer and its stop token."""
    following = next((p for p in parts if p.start >= answer_end and p.part is not Part.SCAFFOLD), None)
    if following is None or following.message != turn or following.part is not Part.OTHER:
        return
    if not stops.find_known_end(text[answer_end : following.start]):
        message = "the template prints another field of the message between the answer and the stop token"
        raise BadRow("interleaved", message)


def _find_start(
    text: str, parts: Sequence[TextPiece], turn: int, prefix: RenderPrefix, stops: TurnStops
) -> tuple[int, set[str]]:
    """Find the end of the generation prompt, where the generated text of a turn starts. Also return flags."""
    prompt = prefix(turn, True)
    if text.startswith(prompt):
        return len(prompt), set()
    # The prompt may add template text, such as an open thinking block, that the whole conversation does not contain.
    first = next((p.start for p in parts if p.message == turn and p.part is not Part.SCAFFOLD), len(text))
    start = _find_divergence(prompt, text, first)
    printed, forced = text[start:first].strip() if first < len(text) else "", prompt[start:].strip()
    is_thinking = bool(_THINKING.search(forced)) or not TAG.sub("", forced).strip()
    has_other_header = _have_shared_tags(printed, forced) or stops.find_known_end(forced)
    if not is_thinking or has_other_header or not _find_header(prompt[:start], prompt, turn, prefix, stops):
        raise BadRow("history_drift", _describe_difference(prompt, text), hint=_SPLIT_HINT)
    return start, {"prompt_mismatch"}


def _find_header(shared: str, prompt: TrackedString, turn: int, prefix: RenderPrefix, stops: TurnStops) -> str:
    """Return the header of a turn: the text after all earlier messages in the part of the prompt that both texts share.

    If the shared text contains no header, the prompt is for a different turn.
    """
    history = _render_or_none(prefix, turn)
    history_end = max((piece.end for piece in pieces_of(prompt) if piece.part is not Part.SCAFFOLD), default=0)
    if history is not None and history != prompt and prompt.startswith(history):
        history_end = max(history_end, len(history))
    header, stop = shared[history_end:], stops.stop.strip()
    return (header.replace(stop, "") if stop else header).strip()


def _have_shared_tags(printed: str, forced: str) -> bool:
    """Return whether two different texts contain the same tag. Ignore tags around thinking.

    Then the texts are two different headers, so the generation prompt does not belong to this turn.
    """
    if not printed or printed.startswith(forced):
        return False
    shared = [tag for tag in find_tags(printed) & find_tags(forced) if not _THINKING.search(tag)]
    return bool(shared)


def _find_divergence(prompt: str, text: str, first: int) -> int:
    """Return the length of the common prefix of the generation prompt and the text before the answer.

    The common prefix does not end inside a tag or a word.
    """
    position = min(common_prefix_length(prompt, text), first)
    # Only the text before the answer is examined: the position must not depend on the answer.
    for rendering in (prompt, text[:first]):
        window = rendering[max(0, position - 64) : position + 64]
        for tag in ATOM.finditer(window):
            start = tag.start() + max(0, position - 64)
            if start < position < start + len(tag.group()) and not tag.group().isspace():
                position = start
                break
    return position


def _render_or_none(prefix: RenderPrefix, count: int) -> TrackedString | None:
    try:
        return prefix(count, False)
    except BadRow:
        return None


def _message_pieces(parts: Sequence[TextPiece], turn: int, length: int | None, start: int) -> list[TextPiece]:
    """Return the ranges of a message that the model generates. Omit copies that the template prints later."""
    pieces = [p for p in parts if p.message == turn and p.part in _GENERATED_PARTS and p.end > start]
    if length is not None:
        return [piece for piece in pieces if piece.end <= length]
    stop = next(
        (p.start for p in parts if p.start >= start and p.part is not Part.SCAFFOLD and p.message != turn), None
    )
    if stop is None:
        return pieces
    if any(piece.start > stop for piece in pieces):
        raise BadRow("interleaved", "the template prints text of another message inside the assistant message")
    return [piece for piece in pieces if piece.end <= stop]


def _find_next_start(parts: Sequence[TextPiece], turn: int, position: int) -> int | None:
    candidates = (p for p in parts if p.part is not Part.SCAFFOLD and (p.message != turn or p.part is Part.OTHER))
    return next((piece.start for piece in candidates if piece.start >= position), None)


def _find_ending(ended: TrackedString | None, beginning: str, turn: int) -> tuple[str | None, bool]:
    """Compare two renderings of a turn: at the end of the conversation, and followed by more messages.

    Return the text after the answer at the end of the conversation, and whether the text before it differs.
    """
    if ended is None:
        return None, False
    pieces = [p for p in pieces_of(ended) if p.message == turn and p.part in _GENERATED_PARTS]
    end = pieces[-1].end if pieces else len(beginning)
    return ended[end:], ended[:end] != beginning


def detect_stops(probe: Callable[[str], TrackedString | None], unprobed: TurnStops) -> TurnStops:
    """Render small conversations to detect the stop token and the text around it at the end of a turn.

    Args:
        probe: renders a conversation whose roles are given by their first characters, such as `"uaua"`. Returns `None`
            if the template rejects the conversation.
        unprobed: EOS and control tokens of the tokenizer.
    """
    joint = probe("uaua")
    ranges = _content_ranges(joint)
    if joint is None or len(ranges) < len("uaua"):
        return unprobed
    before, first_gap, gap, _, last = _template_texts(joint, ranges)
    exact, stops = _detect_openers(probe, before, gap, unprobed)
    half = probe("ua")
    tail = half[ranges[1][1] :] if half is not None and joint.startswith(half) else None
    half_ranges = _content_ranges(half)
    ending = half[half_ranges[1][1] :] if half is not None and len(half_ranges) == len("ua") else None
    try:
        stop = tail[: stops.find_end(tail)] if tail and tail.strip() else gap[: stops.find_end_between(ending, gap)]
    except BadRow:
        stop = ""
    stops = replace(stops, stop=stop)
    if stop_end := stops.find_known_end(last):
        return replace(stops, footer=last[stop_end:])
    has_no_stop = not TAG.search(last) and not (unprobed.control is not None and unprobed.control.search(last))
    stops = replace(stops, is_late=bool(stop) and has_no_stop)
    if stop:
        return replace(stops, footer=common_suffix(last, first_gap))
    # There is no stop token between turns. Text that is printed only at the end of the conversation is not generated,
    # unless it is a control token that occurs nowhere else.
    closing = gap if exact is None else gap.removesuffix(exact)
    footer = last[len(common_prefix(closing if tail is None else tail, last)) :]
    token = unprobed.control.match(footer.strip()) if unprobed.control is not None else None
    is_stop = token is not None and token.group() not in joint[: ranges[3][1]]
    return stops if is_stop else replace(stops, footer=footer)


def _detect_openers(
    probe: Callable[[str], TrackedString | None], before: str, gap: str, unprobed: TurnStops
) -> tuple[str | None, TurnStops]:
    """Detect the text that the template prints before a user message.

    Args:
        probe: see `detect_stops`.
        before: text before the first user message.
        gap: text between an answer and the next user message.
        unprobed: see `detect_stops`.

    Returns:
        The text, or `None` if it is uncertain, and the stops with this text.
    """
    shared = common_suffix(before, gap)
    bos = before.removesuffix(shared).strip()
    # The opener is certain if nothing except BOS precedes it, or if two consecutive user messages show it.
    is_certain = shared.strip() and (not bos or TAG.fullmatch(bos))
    exact = shared if is_certain else _detect_opener(probe, gap)
    # EOS ends a turn, so the opener of the next message begins after it.
    opener = (shared if exact is None else exact).rpartition(unprobed.eos or "\0")[2]
    first_opener = before if exact is None else ""
    return exact, replace(unprobed, is_probed=True, opener=opener, first_opener=first_opener)


def _detect_opener(probe: Callable[[str], TrackedString | None], gap: str) -> str | None:
    """Render two consecutive user messages to detect the text that the template prints before a user message.

    Return `None` if the result is uncertain.
    """
    double, single = probe("uu"), probe("u")
    ranges, single_ranges = _content_ranges(double), _content_ranges(single)
    if double is None or single is None or len(ranges) < len("uu") or not single_ranges:
        return None
    between, closing = double[ranges[0][1] : ranges[1][0]], single[single_ranges[0][1] :]
    opener = between.removeprefix(closing)
    return opener if between.startswith(closing) and gap.endswith(opener) else None


def _template_texts(text: str, ranges: Mapping[int, tuple[int, int]]) -> list[str]:
    """Return the texts before, between and after the contents of the messages, in the order of the messages."""
    edges = [0, *(edge for _, content in sorted(ranges.items()) for edge in content), len(text)]
    return [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _content_ranges(text: TrackedString | None) -> dict[int, tuple[int, int]]:
    """Return a dict that maps a message index to the (start, end) of its content in the rendered text."""
    ranges: dict[int, tuple[int, int]] = {}
    for piece in pieces_of(text) if text is not None else ():
        if piece.part is Part.CONTENT:
            ranges[piece.message] = (ranges.get(piece.message, (piece.start, 0))[0], piece.end)
    return ranges


def _describe_difference(prefix: str, text: str) -> str:
    position = common_prefix_length(prefix, text)
    window = slice(max(0, position - 20), position + 40)
    return (
        f"the generation prompt contains ...{prefix[window]!r}..., but the whole conversation contains "
        f"...{text[window]!r}... at the same position"
    )
