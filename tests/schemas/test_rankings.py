"""Ranked lists of answers: their pairs, and invalid lists."""

import pytest

from ftdata import build_preference_dataset, preview
from ftdata.errors import BadRow, BadRows
from ftdata.schemas import expand_rankings, normalize
from ftdata.testing import byte_tokenizer
from ftdata.types import UNKNOWN_SOURCE, Row

LIST = {"prompt": "q", "completions": ["a", "b", "c"]}


def pairs(row, columns=None):
    rows = expand_rankings([Row(row, UNKNOWN_SOURCE)], columns)
    sides = [normalize(one, task="preference").sides for one in rows]
    return [tuple(side.messages[-1]["content"] for side in pair) for pair in sides]


def test_answers_are_ordered_by_rank_or_by_score():
    assert pairs(LIST) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs({**LIST, "scores": [1, 3, 2.5]}) == [("b", "c"), ("b", "a"), ("c", "a")]
    assert pairs({**LIST, "scores": [1, 2, 1]}) == [("b", "a"), ("b", "c")]
    assert pairs({"prompt": "q", "answers": ["a", "b"]}, {"completions": "answers"}) == [("a", "b")]
    messages = [[{"role": "assistant", "content": text}] for text in "ab"]
    assert pairs({"prompt": [{"role": "user", "content": "q"}], "completions": messages}) == [("a", "b")]


def test_scores_are_kept():
    (row, *_) = expand_rankings([Row({**LIST, "scores": [9, 7, 8]}, UNKNOWN_SOURCE)])
    assert [side.feedback for side in normalize(row, task="preference").sides] == [{"score": 9}, {"score": 8}]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"completions": ["a"]}, "expected a list of at least two answers"),
        ({"completions": "a"}, "expected a list of at least two answers"),
        ({"completions": None}, "expected a list of at least two answers"),
        ({"scores": [1, 2]}, "expected a list of 3 numbers"),
        ({"scores": [1, 2, "3"]}, "expected a list of 3 numbers"),
        ({"scores": 5}, "expected a list of 3 numbers"),
        ({"scores": [1, 2, 10**400]}, "expected a list of 3 numbers"),
        ({"scores": [1, 2, True]}, "expected a list of 3 numbers"),
        ({"rejected": "c"}, "expected either completions, or chosen and rejected"),
        ({"completions": ["a", "b", "a"]}, "contains an answer twice"),
        ({"scores": [1, 1, 1]}, "all scores are equal"),
    ],
)
def test_invalid_lists_are_rejected(change, reason):
    with pytest.raises(BadRow, match=f"ranking.*{reason}"):
        pairs({**LIST, **change})
    with pytest.raises(BadRows, match=f"ranking.*{reason}"):
        build_preference_dataset([{**LIST, **change}], byte_tokenizer(), "chatml")


def test_builds_and_previews_contain_the_pairs():
    ds = build_preference_dataset([LIST, {"prompt": "q", "chosen": "x", "rejected": "y"}], byte_tokenizer(), "chatml")
    assert len(ds["train"]) == 4
    assert "pairs from ranked lists of answers (one for each two answers of different rank): 3 rows" in str(ds.report)
    for shown in (preview([LIST], byte_tokenizer(), "chatml", task="dpo"), preview([LIST], task="dpo")):
        assert str(shown).count("── chosen ──") == 3


def test_explicit_sides_are_not_replaced():
    row = {**LIST, "chosen": "good", "rejected": "bad"}
    assert pairs(row) == [("good", "bad")]
    with pytest.raises(BadRow, match="expected a list of 3 numbers"):
        pairs({**LIST, "scores": [3, float("nan"), 1]})
