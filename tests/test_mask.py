"""From spans to tokens: which are trained, and where turns end, on texts laid out by hand."""

import numpy as np
import pytest

from ftdata.errors import UsageError
from ftdata.mask import policy_of, trained_tokens
from ftdata.truncate import truncate, turn_ends
from ftdata.types import Example, Part, Rendered, Source, Span

C = Part.CONTENT
TWO_TURNS = (Span(0, 2, C, 0, True), Span(2, 4, C, 1, True), Span(4, 6, C, 2, False))


def letters(count, width=1):
    return np.asarray([(at, at + width) for at in range(0, count * width, width)], dtype=np.int32)


def example(trained, spans=TWO_TURNS, offsets=None):
    offsets = letters(6) if offsets is None else offsets
    ids = np.arange(len(offsets), dtype=np.int32)
    return Example(ids, np.asarray(trained, dtype=bool), offsets, "abcdef", spans, frozenset(), Source("x", 0))


@pytest.mark.parametrize(
    ("offsets", "chosen", "trained", "straddles"),
    [
        (letters(6), [True, True, False], [0, 1, 1, 1, 0, 0], False),
        (letters(6), [False, True, False], [0, 0, 1, 1, 0, 0], False),
        (letters(3, 2), [False, True, True], [0, 1, 1], False),
        (letters(2, 3), [False, True, False], [0, 1], True),
        (letters(2, 3), [True, False, False], [0, 0], False),
        (letters(2, 3), [False, True, True], [0, 1], False),
        (np.zeros((2, 2), dtype=np.int32), [True, True, True], [0, 0], False),
    ],
)
def test_a_token_is_trained_if_a_trained_character_is_in_it(offsets, chosen, trained, straddles):
    found, straddle = trained_tokens(offsets, Rendered("abcdef", TWO_TURNS), chosen)
    assert (found.tolist(), straddle) == (list(map(bool, trained)), straddles)
    with pytest.raises(UsageError, match="2 answers for 3 spans"):
        trained_tokens(offsets, Rendered("abcdef", TWO_TURNS), chosen[:2])


@pytest.mark.parametrize(
    ("trained", "ends"),
    [
        ([0, 1, 1, 1, 0, 0], [2, 4]),
        ([0, 1, 0, 0, 0, 0], [2]),
        ([0, 0, 0, 1, 1, 0], [4]),
        ([0, 0, 0, 0, 1, 1], []),
        ([0, 0, 0, 0, 0, 0], []),
        ([1, 1, 1, 1, 1, 1], [2, 4]),
    ],
)
def test_turns_end_with_their_last_trained_token(trained, ends):
    assert turn_ends(example(trained)).tolist() == ends


def test_the_last_turn_may_be_any_message():
    for message in (2, 3):
        spans = (Span(0, 3, C, 0, False), Span(3, 6, C, message, True))
        assert turn_ends(example([0, 0, 0, 1, 1, 1], spans)).tolist() == [6]


def test_whole_turns_are_kept_or_none():
    whole = example([0, 1, 1, 1, 0, 0])
    assert truncate(whole, 6, "reject") is whole
    assert [len(truncate(whole, most, "drop_turns")) for most in (2, 3, 4, 5)] == [2, 2, 4, 4]


def test_unknown_parts_are_named_by_their_option():
    with pytest.raises(UsageError, match=r"unknown_train_parts.*train_parts is 'anwser'.*did you mean 'answer'"):
        policy_of("assistant", ["anwser"])
