"""From spans to tokens: trained tokens and turn ends, for hand-written texts."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftdata.errors import UsageError
from ftdata.pipeline.mask import resolve_policy, trained_tokens
from ftdata.pipeline.truncate import truncate, turn_ends
from ftdata.tokenizing.batches import EncodedText, Encodings, RenderedBatch
from ftdata.types import Conversation, Example, Part, Rendered, Source, Span

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
def test_token_with_a_trained_character_is_trained(offsets, chosen, trained, straddles):
    found, straddle = together([(offsets, Rendered("abcdef", TWO_TURNS), chosen)])
    assert (found.tolist(), straddle.tolist()) == (list(map(bool, trained)), [straddles])


def together(batch):
    """Mask a batch of texts, each given by its token offsets, its spans and the trained spans."""
    encoded = [EncodedText(np.zeros(len(offsets), np.int32), offsets) for offsets, _, _ in batch]
    tokens = Encodings.from_texts(encoded, [len(one.text) for _, one, _ in batch])
    return trained_tokens(tokens, RenderedBatch([one for _, one, _ in batch]), [chosen for _, _, chosen in batch])


def one_by_one(offsets, rendered, chosen):
    """Mask one text token by token and character by character."""
    letters = {
        at for span, yes in zip(rendered.spans, chosen, strict=True) if yes for at in range(span.start, span.end)
    }
    trained = [at > 0 and bool(letters & set(range(*pair))) for at, pair in enumerate(offsets.tolist())]
    straddles = any(
        yes and not set(range(*pair)) <= letters for yes, pair in zip(trained, offsets.tolist(), strict=True)
    )
    return trained, straddles


@st.composite
def masked(draw):
    cuts = sorted(draw(st.lists(st.integers(0, 12), max_size=6)))
    spans = tuple(Span(a, b, C, 0, True) for a, b in pairwise([0, *cuts, 12]))
    tokens = st.tuples(st.integers(0, 12), st.integers(0, 4)).map(lambda pair: (pair[0], min(sum(pair), 12)))
    offsets = draw(st.lists(tokens, max_size=10))
    offsets = sorted(offsets) if draw(st.integers(0, 3)) else offsets
    chosen = draw(st.lists(st.booleans(), min_size=len(spans), max_size=len(spans)))
    return np.asarray(offsets, dtype=np.int32).reshape(-1, 2), Rendered("x" * 12, spans), chosen


@given(st.lists(masked(), max_size=4))
def test_batched_masks_equal_single_masks(batch):
    trained, straddles = together(batch)
    expected = [one_by_one(*one) for one in batch]
    assert trained.tolist() == [yes for own, _ in expected for yes in own]
    assert straddles.tolist() == [straddle for _, straddle in expected]


def test_mask_policy_must_return_one_boolean_per_span():
    rendered = Rendered("abcdef", TWO_TURNS)
    for answers, code in (([True, False], "mask_length"), ([1, 0, 1], "mask_type"), (None, "mask_type")):
        with pytest.raises(UsageError, match=code):
            resolve_policy(lambda *_, answers=answers: answers)(rendered, Conversation(()))


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
def test_turn_ends_with_its_last_trained_token(trained, ends):
    assert turn_ends(example(trained)).tolist() == ends


def test_last_turn_may_be_any_message():
    for message in (2, 3):
        spans = (Span(0, 3, C, 0, False), Span(3, 6, C, message, True))
        assert turn_ends(example([0, 0, 0, 1, 1, 1], spans)).tolist() == [6]


def test_drop_turns_keeps_only_complete_turns():
    whole = example([0, 1, 1, 1, 0, 0])
    assert truncate(whole, 6, "reject") is whole
    assert [len(truncate(whole, most, "drop_turns")) for most in (2, 3, 4, 5)] == [2, 2, 4, 4]


def test_unknown_parts_are_named_by_their_option():
    with pytest.raises(UsageError, match=r"unknown_train_parts.*train_parts is 'anwser'.*did you mean 'answer'"):
        resolve_policy("assistant", ["anwser"])
