"""Training fields: followed or rejected, never ignored."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schema_helpers import ASSISTANT, USER, convert

from ftdata import build_sft_dataset, encode
from ftdata.errors import BadRow, BadRows
from ftdata.readers.row_filter import RowFilter
from ftdata.schemas import normalize
from ftdata.schemas.training_fields import TRAIN_FIELDS, is_mask_name
from ftdata.types import UNKNOWN_SOURCE, Part, Row

OFF = [False, 0, 0.0]
ON = [True, 1, 1.0]
ROWS = {
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "output": "a"},
    "question_answer": {"question": "q", "answer": "a"},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("name", TRAIN_FIELDS)
@pytest.mark.parametrize("value", OFF, ids=str)
def test_false_training_fields_exclude_the_message(name, value, tokenizer_dir):
    assert convert({"messages": [USER, {**ASSISTANT, name: value}]}).messages[1]["train"] is False
    row = {"messages": [USER, {**ASSISTANT, "content": "untrained", name: value}, USER, ASSISTANT]}
    built = build_sft_dataset([row], tokenizer_dir("tiny_bpe"))["train"][0]
    whole = build_sft_dataset([{"messages": row["messages"][2:]}], tokenizer_dir("tiny_bpe"))["train"][0]
    assert [label for label in built["labels"] if label != -100] == [
        label for label in whole["labels"] if label != -100
    ]


@pytest.mark.parametrize("name", TRAIN_FIELDS)
@pytest.mark.parametrize("value", ON, ids=str)
def test_true_training_fields_include_the_message(name, value):
    assert convert({"messages": [USER, {**ASSISTANT, name: value}]}).messages[1]["train"] is True


@pytest.mark.parametrize("name", TRAIN_FIELDS)
@pytest.mark.parametrize("value", [0.5, 2, -1, [0], {"x": 1}, "0.5"], ids=str)
def test_fractional_weights_are_rejected(name, value):
    with pytest.raises(BadRow, match="weight_value") as caught:
        convert({"messages": [USER, {**ASSISTANT, name: value}]})
    assert caught.value.field == f"messages[1].{name}"


UNKNOWN = ["mask", "is_masked", "train_on_turn", "no_train", "lossMask", "my_loss", "sample_weight", "token_weights"]


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("value", [0, 1, False, 0.3, [1, 0], "0", "true"], ids=str)
@pytest.mark.parametrize("place", ["message", "row", "part"])
def test_unknown_mask_fields_are_rejected(name, value, place):
    part = {"type": "text", "text": "a"}
    row = {
        "message": {"messages": [USER, {**ASSISTANT, name: value}]},
        "row": {"messages": [USER, ASSISTANT], name: value},
        "part": {"messages": [USER, {**ASSISTANT, "content": [{**part, name: value}]}]},
    }[place]
    with pytest.raises(BadRow, match="unknown_mask_field") as caught:
        convert(row)
    assert caught.value.field.endswith(name)
    assert "schema=" in caught.value.hint


@pytest.mark.parametrize("name", ["constraints", "glossary", "terrain", "lang", "weigh"])
def test_names_that_only_contain_mask_words_are_ignored(name):
    assert not is_mask_name(name)
    assert convert({"messages": [USER, ASSISTANT], name: 1}).messages == (USER, ASSISTANT)


@pytest.mark.parametrize("value", [None, "", [], {}], ids=str)
def test_empty_fields_are_ignored(value):
    assert len(convert({"messages": [USER, ASSISTANT], "weight_of_parcel": value}).messages) == 2


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("name", TRAIN_FIELDS)
def test_untrained_rows_are_rejected(shape, name):
    for value in (*OFF, "0", "false"):
        with pytest.raises(BadRow, match="row_not_trained") as caught:
            convert({**ROWS[shape], name: value})
        assert caught.value.field == name
        where = caught.value.hint.partition('"')[2].partition('"')[0]
        rows = [{name: value}, {name: True}, {}]
        kept = RowFilter(where=where).filter_rows(Row(row, UNKNOWN_SOURCE) for row in rows)
        assert [row.data for row in kept] == rows[1:]
    for value in (*ON, "1", "true", None, ""):
        assert convert({**ROWS[shape], name: value}).messages == convert(ROWS[shape]).messages
    with pytest.raises(BadRow, match="weight_value"):
        convert({**ROWS[shape], name: 0.7})


def test_untrained_rows_can_be_filtered(tokenizer_dir):
    rows = [{**ROWS["messages"], "trainable": flag} for flag in (True, False, True)]
    report = build_sft_dataset(rows, tokenizer_dir("tiny_bpe"), where="trainable").report
    assert (report.totals["built"], report.totals["filtered"]) == (2, 1)


@pytest.mark.parametrize("shape", ROWS)
def test_labels_next_to_text_are_rejected(shape):
    with pytest.raises(BadRow, match="labels_beside_text"):
        convert({**ROWS[shape], "labels": [-100, 5]})
    assert convert({**ROWS[shape], "labels": "positive"}).messages == convert(ROWS[shape]).messages


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks", "loss_mask"])
def test_token_masks_next_to_messages_are_rejected(name):
    with pytest.raises(BadRow, match="unknown_mask_field|weight_value"):
        convert({"messages": [USER, ASSISTANT], name: [0, 0, 1]})


MEDIA_FIELDS = [
    "image", "images", "Images", "imageUrl", "image_urls", "image_path", "image-path", "image path", "image_0", "image0",
    "image_list", "image_data", "image_base64", "image_b64", "input_image", "decoded_image", "image_embeds", "img",
    "picture", "photo", "screenshot", "video", "videos", "video_path", "video_frames", "audio", "audio_file",
    "pixel_values", "mm_data", "multi_modal_data",
]  # fmt: skip


@pytest.mark.parametrize("name", MEDIA_FIELDS)
def test_media_are_rejected(name, tokenizer_dir):
    for row in (
        {**ROWS["alpaca"], "instruction": "<image>What?", name: ["a.png"]},
        {**ROWS["sharegpt"], name: {"bytes": "abc"}},
        {"messages": [{**USER, name: "a.png"}, ASSISTANT]},
        {"messages": [{**USER, "content": [{"type": "text", "text": "q", name: "a.png"}]}, ASSISTANT]},
    ):
        with pytest.raises(BadRow, match="media") as caught:
            convert(row)
        assert caught.value.field.endswith(name)
    for nothing in (None, "", [], {}):
        assert convert({**ROWS["messages"], name: nothing}).messages == (USER, ASSISTANT)
    with pytest.raises(BadRows, match="media"):
        build_sft_dataset([{**ROWS["messages"], name: ["a.png"]}], tokenizer_dir("tiny_bpe"))


INVISIBLE = [
    "\u200b",
    "\ufeff",
    "\x00",
    "\u200b\u200d\n",
    "\u2060",
    "\u00ad",
    "\u2800",
    "\u3164",
    "\ufe0f",
    "\x1b",
    "\u202e",
]


THOUGHTS = [
    "<think>hm</think>",
    "<think>a</think><think>b</think>",
    "hm\n</think>\n\n",
    "</think>",
    "[THINK]hm[/THINK]",
    "<Think>hm</Think>",
]


@pytest.mark.parametrize("answer", ["", " \n\t", *INVISIBLE], ids=ascii)
def test_answers_without_a_visible_character_are_empty(answer, tokenizer_dir):
    shapes = [
        {"messages": [USER, {"role": "assistant", "content": answer}]},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]},
        {"question": "q", "answer": answer},
        {"text": answer},
    ]
    for row in shapes:
        with pytest.raises(BadRows, match="empty_answer"):
            # Many rows of a shape, so that cached renderings are used, too.
            build_sft_dataset([ROWS["messages"]] * 40 + [row], tokenizer_dir("tiny_bpe"))


@pytest.mark.parametrize("answer", THOUGHTS)
def test_answers_of_thinking_only_are_empty(answer, tokenizer_dir):
    for row in ({"messages": [USER, {"role": "assistant", "content": answer}]}, {"question": "q", "answer": answer}):
        with pytest.raises(BadRows, match="empty_answer"):
            build_sft_dataset([ROWS["messages"]] * 40 + [row], tokenizer_dir("tiny_bpe"))


@given(st.text(st.sampled_from(["\u200b", "\ufeff", "\x00", " ", "a", "é", "中", "🙂"]), min_size=1))
def test_one_visible_character_is_an_answer(answer):
    from ftdata.schemas.answer_text import has_visible_text

    assert has_visible_text(answer) == bool(set(answer) & set("aé中🙂"))


def test_rejected_side_of_a_preference_is_reported(tokenizer_dir, tmp_path):
    from ftdata import audit, preview

    rows = [{"prompt": "q", "chosen": "yes", "rejected": "no"}]
    options = {"template": "chatml", "schema": "preference"}
    tokenizer = tokenizer_dir("tiny_bpe")
    built = build_sft_dataset(rows, tokenizer, **options)
    assert "rejected side is not used" in str(built.report)
    assert "rejected_side_dropped" in json.dumps(preview(rows, tokenizer, **options).as_dict())
    assert "rejected_side_dropped" in json.dumps(preview(rows, **options).as_dict())
    assert [one.code for one in audit(rows, tokenizer, **options).findings if "rejected" in one.code]
    with pytest.raises(BadRows, match="rejected_side_dropped"):
        build_sft_dataset(rows, tokenizer, **options, reject_flags=["rejected_side_dropped"])


def test_encode_accepts_the_same_training_fields(tokenizer_dir):
    talk = [USER, {**ASSISTANT, "trainable": False, "content": "b"}, USER, ASSISTANT]
    (example,) = encode(talk, tokenizer_dir("tiny_bpe"), "chatml")
    (trained,) = encode([USER, ASSISTANT], tokenizer_dir("tiny_bpe"), "chatml")
    assert example.trained.sum() == trained.trained.sum()


PAIR = {"prompt": "Q?", "completion": "A!"}
CALL = {"function": {"name": "f", "arguments": {}}, "train": False}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"input_ids": [1, 2], "labels": [1, 2], "loss_mask": [0, 0]}, "two_masks"),
        ({"input_ids": [1, 2], "labels": [-100, 2], "completion_mask": [1, 1]}, "two_masks"),
        ({"input_ids": [1, 2], "completion_mask": [0, 1], "assistant_masks": [1, 0]}, "two_masks"),
        ({**PAIR, "labels": "[-100, 3]"}, "labels_beside_text"),
        ({**PAIR, "label": False}, "row_not_trained"),
        ({**PAIR, "kto_tag": "False"}, "row_not_trained"),
        ({**PAIR, "train": "no"}, "row_not_trained"),
        ({**PAIR, "loss_mask": "[0, 1]"}, "unknown_mask_field"),
        ({**PAIR, "train_on_inputs": "yes"}, "unknown_mask_field"),
        ({**PAIR, "metadata": {"train": False}}, "unknown_mask_field"),
        ({**PAIR, "imageUrl": "a.png"}, "media"),
        ({**PAIR, "image_paths": ["a.png"]}, "media"),
        ({"messages": [USER, {**ASSISTANT, "mask": "no"}]}, "unknown_mask_field"),
        ({"messages": [USER, {**ASSISTANT, "extra": {"weight": 0}}]}, "unknown_mask_field"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [CALL]}]}, "part_mask"),
    ],
)
def test_contradicting_masks_and_labels_are_rejected(row, code):
    with pytest.raises(BadRow) as caught:
        normalize(Row(row, UNKNOWN_SOURCE))
    assert caught.value.code == code


@pytest.mark.parametrize("key", ["train", "loss_mask"])
@pytest.mark.parametrize("block", [{"type": "thinking", "thinking": "hm"}, {"type": "tool_use", "name": "f"}])
def test_content_blocks_with_masks_are_rejected(block, key):
    blocks = [{**block, key: False}, {"type": "text", "text": "yo"}]
    with pytest.raises(BadRow, match="part_mask"):
        normalize(Row({"messages": [USER, {"role": "assistant", "content": blocks}]}, UNKNOWN_SOURCE))
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "x", "image": "a.png"}]}
    with pytest.raises(BadRow, match="media"):
        normalize(Row({"messages": [USER, {"role": "user", "content": [result]}]}, UNKNOWN_SOURCE))


@pytest.mark.parametrize(
    "row",
    [
        {**PAIR, "label": 0},
        {**PAIR, "label": True},
        {**PAIR, "metadata": {"loss": 2.5, "trained_by": "x"}},
        {**PAIR, "pretrained_model": "x"},
        {**PAIR, "labels": "positive"},
        {"input_ids": [1, 2], "labels": [-100, 2], "loss_mask": [0, 1]},
    ],
)
def test_consistent_training_fields_are_accepted(row):
    assert normalize(Row(row, UNKNOWN_SOURCE)).schema in ("prompt_completion", "tokens")


CALL = {"function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize("mask", [{"train": False}, {"loss_mask": [0, 1]}])
def test_masks_in_the_function_of_a_tool_call_are_rejected(mask):
    call = {"function": {**CALL["function"], **mask}}
    with pytest.raises(BadRow, match="part_mask|weight_value"):
        convert({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]})


def test_untrained_message_of_blocks_has_untrained_tool_results():
    block = {"type": "tool_result", "tool_use_id": "1", "content": "r"}
    messages = convert({"messages": [USER, {"role": "user", "train": False, "content": [block]}, ASSISTANT]}).messages
    assert messages[1]["train"] is False


MASK_TEXTS = [
    "[True, False]",
    "[null, 0, 1]",
    "array([0, 1])",
    "0 1",
    "0,1",
    "True,False",
    '{"0": 1}',
    "0.0",
    "never",
    "70 kg",
]


@pytest.mark.parametrize("text", MASK_TEXTS)
def test_masks_stored_as_text_are_rejected(text):
    for name in ("response_mask", "sample_weight", "trained"):
        for row in ({**PAIR, name: text}, {"messages": [USER, {**ASSISTANT, name: text}]}):
            with pytest.raises(BadRow) as caught:
                convert(row)
            assert caught.value.code == "unknown_mask_field"
    with pytest.raises(BadRow, match="unknown_mask_field|weight_value"):
        convert({**PAIR, "train": text})


@pytest.mark.parametrize("value", [{"train": False}, {"loss_weight": 0.0}, {"a": [{"mask": "0 1"}]}])
@pytest.mark.parametrize("form", [lambda value: value, json.dumps, lambda value: [value]])
def test_masks_in_metadata_are_rejected(value, form):
    for row in ({**PAIR, "metadata": form(value)}, {"messages": [USER, {**ASSISTANT, "metadata": form(value)}]}):
        with pytest.raises(BadRow, match="unknown_mask_field"):
            convert(row)


IMAGE = {"bytes": b"\x89PNG", "path": None}


@pytest.mark.parametrize("value", [IMAGE, [IMAGE], b"\x89PNG", {"array": [0.1], "sampling_rate": 8000, "path": None}])
def test_media_values_are_rejected_under_any_name(value):
    with pytest.raises(BadRow, match="media"):
        convert({**PAIR, "page": value})


@pytest.mark.parametrize(
    "field", [{"train": False}, {"images": ["a.png"]}, {"weight": 0.5}, {"meta": {"train": False}}]
)
def test_fields_next_to_a_mapped_path_are_checked(field):
    row = {"data": {"messages": [USER, ASSISTANT], **field}}
    with pytest.raises(BadRow) as caught:
        normalize(Row(row, UNKNOWN_SOURCE), columns={"messages": "data.messages"})
    assert caught.value.field.startswith(f"data.{next(iter(field))}")
    row = {"answers": [{"text": "a", **field}], "question": "q"}
    with pytest.raises(BadRow):
        normalize(Row(row, UNKNOWN_SOURCE), columns={"answer": "answers[0].text"})


def test_fields_next_to_a_mapped_path_are_reported():
    row = Row({"data": {"q": "2+2?", "a": "4", "id": 7}}, UNKNOWN_SOURCE)
    conversation = normalize(row, columns={"question": "data.q", "answer": "data.a"})
    assert conversation.notes == {"column data.id"}


def test_train_on_all_skips_untrained_messages(tokenizer_dir):
    messages = [USER, {**ASSISTANT, "content": "BAD", "train": False}, USER, ASSISTANT]
    (example,) = encode(messages, tokenizer_dir("tiny_bpe"), "chatml", train_on="all")
    (span,) = [span for span in example.spans if span.message == 1 and span.part is Part.CONTENT]
    start, end = example.offsets.T
    inside = (start < span.end) & (end > span.start)
    assert inside.any()
    assert not example.trained[inside].any()
    assert example.trained[start >= span.end + len("<|im_end|>")].all()
