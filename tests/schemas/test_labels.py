"""Rows for KTO: the forms of a label, and invalid rows."""

import pytest

from ftdata import build_preference_dataset, preview
from ftdata.errors import BadRow, BadRows, UsageError
from ftdata.schemas import normalize
from ftdata.testing import byte_tokenizer
from ftdata.types import UNKNOWN_SOURCE, Row

ROW = {"prompt": "q", "completion": "a"}
TALK = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "b"},
]


def read(row, **options):
    return normalize(Row(row, UNKNOWN_SOURCE), task="kto", **options)


@pytest.mark.parametrize(
    ("value", "label"),
    [(True, 1), (False, 0), (1, 1), (0, 0), (1.0, 1), ("true", 1), ("False", 0), ("yes", 1), ("0", 0), ("1.0", 1)],
)
def test_labels_are_read(value, label):
    for column in ("label", "kto_tag"):
        assert read({**ROW, column: value}).feedback == {"label": label}
    assert read({**ROW, "good": value}, columns={"label": "good"}).feedback == {"label": label}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (ROW, "no_label"),
        ({**ROW, "label": None}, "no_label"),
        ({**ROW, "label": True, "kto_tag": True}, "no_label"),
        ({"chosen": "a", "rejected": "b", "prompt": "q"}, "no_label"),
        ({**ROW, "label": "good"}, "kto_label"),
        ({**ROW, "label": 2}, "kto_label"),
        ({**ROW, "label": 0.5}, "kto_label"),
        ({**ROW, "label": [True]}, "kto_label"),
        ({**ROW, "label": {"good": True}}, "kto_label"),
        ({**ROW, "label": ""}, "kto_label"),
        ({**ROW, "label": True, "loss_mask": [1]}, "unknown_mask_field"),
        ({"label": True}, "unknown_schema"),
        ({"prompt": "q", "completion": None, "label": True}, "missing_column"),
    ],
)
def test_invalid_rows_are_rejected(row, code):
    with pytest.raises(BadRow) as caught:
        read(row)
    assert caught.value.code == code


def test_only_the_last_answer_of_a_conversation_is_trained():
    rows = [{"messages": TALK, "label": True}, {**ROW, "label": False}]
    ds = build_preference_dataset(rows, byte_tokenizer(), "chatml", task="kto")
    tokenizer = byte_tokenizer()
    trained = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in ds["train"]]
    assert trained == ["b", "a"]
    assert ds["train"]["label"] == [True, False]
    assert "labels: desirable (1 row), undesirable (1 row)" in str(ds.report)


def test_completions_with_several_answers_are_trained():
    row = {"prompt": [TALK[0]], "completion": TALK[1:], "label": 1}
    (built,) = build_preference_dataset([row], byte_tokenizer(), "chatml", task="kto")["train"].to_list()
    assert byte_tokenizer().decode([one for one in built["labels"] if one != -100]) == "ab"


def test_equal_answers_with_different_labels_are_no_duplicates():
    rows = [{**ROW, "label": True}, {**ROW, "label": False}, {**ROW, "label": True}]
    ds = build_preference_dataset(rows, byte_tokenizer(), "chatml", task="kto", dedup=True)
    assert sorted(ds["train"]["label"]) == [False, True]


def test_previews_show_the_label(tmp_path):
    rows = [{**ROW, "label": True}, {**ROW, "label": False}]
    assert "· undesirable ──" in str(preview(rows, byte_tokenizer(), "chatml", task="kto", row=1))


def test_other_functions_and_options_are_refused():
    labeled = [{**ROW, "label": True}]
    with pytest.raises(UsageError, match="use build_sft_dataset"):
        build_preference_dataset(labeled, byte_tokenizer(), "chatml", task="sft")
    with pytest.raises(UsageError, match="train_on='all' would train the prompts"):
        build_preference_dataset(labeled, byte_tokenizer(), "chatml", task="kto", train_on="all")
    with pytest.raises(BadRows, match="no_label"):
        build_preference_dataset([ROW], byte_tokenizer(), "chatml", task="kto")
