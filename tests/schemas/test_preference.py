"""Rows of preference data: the formats of other tools, and invalid rows."""

import pytest

from ftdata.errors import BadRow
from ftdata.schemas import normalize
from ftdata.types import UNKNOWN_SOURCE, Row


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def read(row):
    return normalize(Row(row, UNKNOWN_SOURCE), task="preference")


PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
SIDES = {"chosen": "good", "rejected": "bad"}
MESSAGES = {"chosen": [user("q"), answer("good")], "rejected": [user("q"), answer("bad")]}

FORMS = {
    "texts": PAIR,
    "text prompt, message answers": {"prompt": "q", "chosen": [answer("good")], "rejected": [answer("bad")]},
    "message prompt, text answers": {"prompt": [user("q")], **SIDES},
    "prompt in the sides": MESSAGES,
    "prompt in all columns": {"prompt": "q", **MESSAGES},
    "single messages": {"messages": [user("q")], "chosen": answer("good"), "rejected": answer("bad")},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "question": {"question": "q", **SIDES},
    "instruction": {"instruction": "q", "input": "", **SIDES},
    "messages of the chosen side": {"prompt": "q", "messages": MESSAGES["chosen"], **MESSAGES},
    "messages without a prompt column": {"messages": MESSAGES["chosen"], **MESSAGES},
    "scores as text": {**PAIR, "score_chosen": "10", "score_rejected": "9"},
    "scores that are words": {**PAIR, "score_chosen": "good", "score_rejected": "very good"},
    "scores": {**PAIR, "score_chosen": 5.0, "score_rejected": 5.0},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_forms_of_pairs_are_read(row):
    pair = read(row)
    texts = [[message["content"] for message in side.messages] for side in pair.sides]
    assert texts == [["q", "good"], ["q", "bad"]]
    assert pair.completion_from == 1


def test_scores_and_margins_of_a_pair_are_read():
    pair = read({**PAIR, "chosen_score": "3", "rejected_score": 1, "margin": "0.5"})
    assert [side.feedback for side in pair.sides] == [{"score": 3, "margin": 0.5}, {"score": 1, "margin": 0.5}]
    assert not [note for note in pair.notes if "score" in note or "margin" in note]
    with pytest.raises(BadRow, match="margin_value"):
        read({**PAIR, "margin": "large"})
    assert not read({**PAIR, "margin": "", "score_chosen": ""}).sides[0].feedback


def test_scores_that_are_not_numbers_are_reported_as_not_read():
    pair = read({**PAIR, "score_chosen": "1,5", "score_rejected": "2,5", "chosen_score": 1})
    assert {"column score_chosen", "column score_rejected"} <= pair.notes
    assert "column chosen_score" not in pair.notes


def test_context_of_a_pair_is_read():
    pair = read({"system": "s", "instruction": "q", "input": "i", "history": [["a", "b"]], **SIDES})
    assert [message["content"] for message in pair.sides[1].messages] == ["s", "a", "b", "q\n\ni", "bad"]


BAD = {
    "answer in the prompt": ({"messages": [*MESSAGES["chosen"]], "chosen": "good", "rejected": "bad"}, "answer_in_prompt"),
    "ranked list and a side": ({"prompt": "q", "completions": ["a", "b"], "rejected": "c"}, "ranking"),
    "margin that is true": ({**PAIR, "margin": True}, "margin_value"),
    "huge margin": ({**PAIR, "margin": 10**400}, "margin_value"),
    "no prompt": (SIDES, "no_prompt"),
    "null prompt": ({**PAIR, "prompt": None}, "no_prompt"),
    "blank prompt": ({**PAIR, "prompt": " "}, "no_prompt"),
    "two prompts": ({"question": "a", "instruction": "b", **SIDES}, "no_prompt"),
    "no rejected": ({"prompt": "q", "chosen": "good"}, "unknown_schema"),
    "null rejected": ({**PAIR, "rejected": None}, "missing_column"),
    "null sides": ({**PAIR, "chosen": None, "rejected": None}, "missing_column"),
    "number": ({**PAIR, "chosen": 1}, "content_type"),
    "list of texts": ({**PAIR, "chosen": ["good", "better"]}, "message_type"),
    "empty list": ({**PAIR, "chosen": []}, "no_messages"),
    "unknown role": ({**PAIR, "chosen": [{"role": "judge", "content": "good"}]}, "unknown_role"),
    "identical": ({**PAIR, "rejected": "good"}, "identical_sides"),
    "other prompt": ({**MESSAGES, "prompt": "x"}, "prompt_differs"),
    "different questions": ({**MESSAGES, "rejected": [user("p"), answer("bad")]}, "prompt_differs"),
    "user answer": ({"chosen": [user("q"), user("good")], "rejected": MESSAGES["rejected"]}, "prompt_differs"),
    "system on one side": (
        {**MESSAGES, "chosen": [{"role": "system", "content": "s"}, *MESSAGES["chosen"]]},
        "prompt_differs",
    ),
    "side without an answer": ({**MESSAGES, "chosen": [user("q")]}, "no_answer"),
    "one side continues": ({**MESSAGES, "rejected": [*MESSAGES["chosen"], user("x"), answer("y")]}, "no_answer"),
    "lower score": ({**PAIR, "score_chosen": 1, "score_rejected": 2}, "score_order"),
    "lower score as text": ({**PAIR, "score_chosen": "9", "score_rejected": "10"}, "score_order"),
    "lower rating": ({**PAIR, "chosen_rating": 1.5, "rejected_rating": 2.5}, "score_order"),
    "images": ({**PAIR, "images": ["a.png"]}, "media"),
    "not trained": ({**PAIR, "train": False}, "row_not_trained"),
    "mask": ({**PAIR, "loss_mask": [0, 1]}, "unknown_mask_field"),
    "labels": ({**PAIR, "labels": "[-100, 3]"}, "labels_beside_text"),
    "KTO": ({"prompt": "q", "completion": "good", "label": True}, "not_a_pair"),
    "no pair": ({"messages": MESSAGES["chosen"]}, "not_a_pair"),
    "tokens": ({"input_ids": [1, 2], "labels": [-100, 2]}, "not_a_pair"),
    "text": ({"text": "a text"}, "not_a_pair"),
    "tools": ({**PAIR, "tools": "[{bad"}, "json_text"),
    "two systems": (
        {"prompt": [{"role": "system", "content": "a"}, user("q")], **MESSAGES,
         "chosen": [{"role": "system", "content": "b"}, *MESSAGES["chosen"]]},
        "two_systems",
    ),
    "list": ([user("q"), answer("good")], "not_a_pair"),
    "not a row": ("text", "not_a_row"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "code"), BAD.values(), ids=BAD)
def test_invalid_pairs_are_rejected(row, code):
    with pytest.raises(BadRow) as caught:
        read(row)
    assert caught.value.code == code
    assert str(caught.value)


def test_rows_of_a_build_of_pairs_are_named():
    row = {"prompt_ids": [1], "chosen_ids": [2], "chosen_labels": [2], "rejected_ids": [3], "rejected_labels": [3]}
    for task in ("preference", "sft"):
        with pytest.raises(BadRow, match="pair_build.*build the original data"):
            normalize(Row(row, UNKNOWN_SOURCE), task=task)
