"""Spans: text pieces, turn regions and thinking blocks in contents."""

import pytest

from ftdata.templates.attribution.spans import (
    TextPiece,
    TurnRegion,
    find_thinking_tags,
    make_spans,
    override_part,
    pieces_of,
    split_thinking,
    track_messages,
)
from ftdata.templates.attribution.tracked_strings import concat_tracked
from ftdata.types import Part, Span

S, C, R = Part.SCAFFOLD, Part.CONTENT, Part.REASONING


def laid(*texts):
    """Return a text, given as (part, message, text) triples, and its pieces."""
    found, at = [], 0
    for part, message, text in texts:
        found.append(TextPiece(at, at + len(text), part, message, 0))
        at += len(text)
    return "".join(text for _, _, text in texts), found


def test_regions_split_pieces_and_text_outside_keeps_its_origin():
    _, parts = laid((S, -1, "<u>"), (C, 0, "ask"), (S, -1, "<a>"), (C, 1, "say"), (S, -1, "</s>\n"))
    assert make_spans(parts, [TurnRegion(1, 7, 16)]) == (
        Span(0, 3, S, -1, False),
        Span(3, 6, C, 0, False),
        Span(6, 7, S, -1, False),
        Span(7, 9, S, 1, True),
        Span(9, 12, C, 1, True),
        Span(12, 16, S, 1, True),
        Span(16, 17, S, -1, False),
    )
    assert make_spans(parts[1:2], [TurnRegion(1, 0, 4)]) == (Span(3, 4, C, 1, True), Span(4, 6, C, 0, False))
    assert make_spans(parts[1:2], [TurnRegion(1, 4, 5)]) == (
        Span(3, 4, C, 0, False),
        Span(4, 5, C, 1, True),
        Span(5, 6, C, 0, False),
    )


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 9, [(2, 6, R)]),
        (3, 5, [(2, 3, C), (3, 5, R), (5, 6, C)]),
        (2, 4, [(2, 4, R), (4, 6, C)]),
        (4, 6, [(2, 4, C), (4, 6, R)]),
        (0, 2, [(2, 6, C)]),
        (6, 9, [(2, 6, C)]),
    ],
)
def test_override_part_changes_only_pieces_of_that_part(start, end, expected):
    piece = TextPiece(2, 6, C, 1, 0)
    assert [(one.start, one.end, one.part) for one in override_part(piece, start, end, C, part=R)] == expected
    assert list(override_part(piece, start, end, S, part=R)) == [piece]


def thinking(*texts, regions=(), assistants=(1, 3)):
    text, parts = laid(*texts)
    found = split_thinking(text, parts, regions, assistants)
    return [(one.part, text[one.start : one.end]) for one in found]


def test_thinking_is_split_inside_and_outside_regions():
    talk = [(C, 0, "<think>u</think>"), (C, 1, "plain"), (S, -1, "|"), (C, 3, "<think>hm</think>\n\na")]
    expected = [
        (C, "<think>u</think>"),
        (C, "plain"),
        (S, "|"),
        (S, "<think>"),
        (R, "hm"),
        (S, "</think>"),
        (R, "\n\n"),
        (C, "a"),
    ]
    assert thinking(*talk) == thinking(*talk, regions=[TurnRegion(1, 16, 21), TurnRegion(3, 22, 42)]) == expected


def test_thinking_opened_before_the_answer_is_reasoning():
    opened = [(S, -1, "<think>"), (C, 1, "hm</think>a")]
    assert thinking(*opened, regions=[TurnRegion(1, 7, 18)])[1:] == [(R, "hm"), (S, "</think>"), (C, "a")]
    # What the prompt forces may be what the answer spells.
    spelt = [(S, -1, "x"), (C, 1, "<think>hm</think>a")]
    assert thinking(*spelt, regions=[TurnRegion(1, 8, 19)])[1:] == [
        (S, "<think>"),
        (R, "hm"),
        (S, "</think>"),
        (C, "a"),
    ]
    far = [(S, -1, "<think>" + " " * 70), (C, 1, "hm</think>a")]
    assert thinking(*far, regions=[TurnRegion(1, 77, 88)])[1:] == [(C, "hm</think>a")]


def test_thinking_of_one_character_and_across_pieces():
    assert thinking((S, -1, "<think>"), (C, 1, "h</think>a"), regions=[TurnRegion(1, 7, 17)])[1:] == [
        (R, "h"),
        (S, "</think>"),
        (C, "a"),
    ]
    parted = [(C, 1, "<think>hm"), (S, -1, "|"), (C, 1, "</think>a")]
    assert thinking(*parted, regions=[TurnRegion(1, 0, 19)]) == [
        (S, "<think>"),
        (R, "hm"),
        (S, "|"),
        (S, "</think>"),
        (C, "a"),
    ]


def test_thinking_tags_outside_regions_belong_to_no_message():
    text, parts = laid((C, 1, "<think>hm</think>a"), (C, 3, "b"))
    spans = make_spans(split_thinking(text, parts, [TurnRegion(3, 18, 19)], [1, 3]), [TurnRegion(3, 18, 19)])
    assert [(span.part, span.message) for span in spans] == [(S, -1), (R, 1), (S, -1), (C, 1), (C, 3)]


def test_whitespace_in_thinking_is_reasoning():
    empty = [(C, 1, "<think>\n\n</think>\n\na")]
    assert thinking(*empty) == [(S, "<think>"), (R, "\n\n"), (S, "</think>"), (R, "\n\n"), (C, "a")]


@pytest.mark.parametrize(
    ("content", "opened", "expected"),
    [("x</None>", None, []), ("</think>", "think", [(0, 8)]), ("a</think>", "thought", []), ("a <think>b</think>", None, [])],
)  # fmt: skip
def test_thinking_tags_are_found(content, opened, expected):
    assert find_thinking_tags(content, opened) == expected


def test_messages_are_tracked_for_templates():
    (message,) = track_messages([{"role": "assistant", "content": "", "thinking": "hm", "name": None, "train": False}])
    assert message == {"role": "assistant", "content": "", "thinking": "hm", "reasoning_content": "hm"}
    assert message["content"].runs == ()
    whole = concat_tracked([message["thinking"], "|", track_messages([{"role": "user", "mood": "m"}])[0]["mood"]])
    assert [(one.part, one.message) for one in pieces_of(whole)] == [(R, 0), (S, -1), (Part.OTHER, 0)]
