"""Images in formats of other tools: chat templates that take only lists, objects in memory, images beside the data."""

import base64
import json
from pathlib import Path

import pytest
from PIL import Image
from vision import save_image, save_processor, save_qwen

from ftdata import build_sft_dataset, encode
from ftdata.errors import BadRow, BadRows, InputRefused, UsageError
from ftdata.testing import byte_tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize("name", ["llava_next", "idefics3"])
def test_templates_that_take_only_lists_print_texts(name, tmp_path):
    processor = save_processor(name, tmp_path / "model")
    save_image(tmp_path / "0.png", (80, 60))
    row = {
        "image": "0.png",
        "conversations": [{"from": "human", "value": "<image>\nWhich color?"}, {"from": "gpt", "value": "red"}],
    }
    plain = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    built = build_sft_dataset(str(tmp_path / "data.json"), tmp_path / "model")
    parts = [{"type": "image"}, {"type": "text", "text": "\nWhich color?"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    prompt = processor.apply_chat_template(messages, tokenize=False)
    (ids,) = processor(text=[prompt], images=[Image.open(tmp_path / "0.png")], add_special_tokens=False)["input_ids"]
    assert built["train"][0]["input_ids"] == list(ids)
    assert "lists with a text part" in str(built.report)
    (example,) = encode(plain["messages"], tmp_path / "model")
    assert "Yes." in example.text
    assert example.trained.any()


def test_objects_in_memory_are_encoded(qwen, tmp_path):
    path = save_image(tmp_path / "a.png", (80, 60))
    with Image.open(path) as opened:
        picture = opened.copy()
    values = [path, Path(path), Path(path).read_bytes(), picture]
    examples = [
        encode(
            [
                {"role": "user", "content": [{"type": "image", "image": value}, {"type": "text", "text": "?"}]},
                {"role": "assistant", "content": "red"},
            ],
            qwen,
        )[0]
        for value in values
    ]
    assert {tuple(example.input_ids.tolist()) for example in examples} == {tuple(examples[0].input_ids.tolist())}
    for value in (object(), {1}):
        with pytest.raises(BadRow, match="not_json"):
            encode([{"role": "user", "content": value}], qwen)
    with pytest.raises(BadRow, match="not_json"):
        # Without an image processor, images are refused.
        encode([{"role": "user", "content": [{"type": "image", "image": b"x"}]}], byte_tokenizer(), "chatml")


def test_bytes_in_json_are_base64(qwen, tmp_path):
    content = Path(save_image(tmp_path / "a.png", (80, 60))).read_bytes()
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "bytes": base64.b64encode(content).decode()}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": "red"},
    ]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (row,) = build_sft_dataset(str(tmp_path / "data.jsonl"), qwen, output_dir=tmp_path / "built")["train"]
    assert [(image["width"], image["height"]) for image in row["images"]] == [(80, 60)]
    messages[0]["content"][0]["bytes"] = "no base64!"
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises((BadRows, InputRefused), match="base64 is invalid"):
        build_sft_dataset(str(tmp_path / "data.jsonl"), qwen, output_dir=tmp_path / "again")


def test_images_beside_the_data_are_not_data(qwen, tmp_path):
    save_image(tmp_path / "0.png", (80, 60))
    row = {
        "messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red"}],
        "images": ["0.png"],
    }
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    built = build_sft_dataset(str(tmp_path), qwen)
    assert {split: len(built[split]) for split in built} == {"train": 1, "test": 1}
    (tmp_path / "only").mkdir()
    save_image(tmp_path / "only" / "0.png", (80, 60))
    with pytest.raises(InputRefused, match="no_reader"):
        build_sft_dataset(str(tmp_path / "only" / "0.png"), qwen)
    with pytest.raises(UsageError, match="contains no data files"):
        build_sft_dataset(str(tmp_path / "only"), qwen)


def test_image_that_cannot_be_stored_is_named(qwen, tmp_path):
    closed = Image.open(save_image(tmp_path / "a.png", (80, 60)))
    closed.close()
    messages = [{"role": "user", "content": [{"type": "image", "image": closed}, {"type": "text", "text": "?"}]}]
    with pytest.raises(BadRow, match=r"image_value.*messages\[0\].*cannot be stored"):
        encode([*messages, {"role": "assistant", "content": "red"}], qwen)
