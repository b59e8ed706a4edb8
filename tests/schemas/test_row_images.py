"""Images of rows are found in every common spelling, and belong to one place in the messages."""

import pytest

from ftdata.errors import BadRow
from ftdata.schemas import normalize
from ftdata.types import Row, Source

IMAGE = {"type": "image"}
ANSWER = {"role": "assistant", "content": "A cat."}


def text(content):
    return {"type": "text", "text": content}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def read(data):
    return normalize(Row(data, Source("rows.jsonl", 0, 1)), images=True)


URL = "data:image/png;base64,aaaa"
PARTS = {
    "image": ({"type": "image", "image": "a.png"}, "image", "a.png"),
    "path": ({"type": "image", "path": "a.png"}, "path", "a.png"),
    "url": ({"type": "image", "url": "a.png"}, "url", "a.png"),
    "bytes": ({"type": "image", "bytes": b"x"}, "bytes", b"x"),
    "base64": ({"type": "image", "base64": "aaaa"}, "base64", URL),
    "OpenAI chat": ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, "image_url", {"url": URL, "detail": "low"}),
    "OpenAI responses": ({"type": "input_image", "image_url": URL}, "image_url", URL),
    "Anthropic": ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aaaa"}}, "source", URL),
    "Anthropic URL": ({"type": "image", "source": {"type": "url", "url": "a.png"}}, "source", {"type": "url", "url": "a.png"}),
    "Qwen": ({"image": "a.png"}, "image", "a.png"),
    "datasets": ({"type": "image", "image": {"bytes": b"x", "path": None}}, "image", {"bytes": b"x", "path": None}),
    "table": ({"type": "image", "image": "a.png", "text": None, "url": None}, "image", "a.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_image_in_a_part_of_a_message(name):
    part, key, value = PARTS[name]
    table_text = {"type": "text", "text": "What?", "image": None}
    conversation = read({"messages": [user(part, table_text), ANSWER]})
    assert conversation.messages == (user(IMAGE, text("What?")), ANSWER)
    assert conversation.images == ((f"messages[0].content[0].{key}", value),)


def test_parts_without_images_take_the_images_of_the_column():
    messages = [user(IMAGE, text("a"), IMAGE), ANSWER, user({"type": "image", "image": "own.png"}, text("b")), ANSWER]
    conversation = read({"messages": messages, "images": ["1.png", "2.png"]})
    assert conversation.messages[2] == user(IMAGE, text("b"))
    assert [image.value for image in conversation.images] == ["1.png", "2.png", "own.png"]
    assert [image.field for image in conversation.images] == ["images[0]", "images[1]", "messages[2].content[0].image"]


def test_markers_of_llava():
    turns = [
        {"from": "human", "value": "<image>\nWhat?<image>"},
        {"from": "gpt", "value": "An <image> tag."},
    ]
    conversation = read({"conversations": turns, "image": ["1.png", "2.png"]})
    answer = {"role": "assistant", "content": "An <image> tag."}
    assert conversation.messages == (user(IMAGE, text("\nWhat?"), IMAGE), answer)
    assert [image.value for image in conversation.images] == ["1.png", "2.png"]


@pytest.mark.parametrize("data", [
    {"question": "What?", "answer": "A cat."},
    {"prompt": "What?", "completion": "A cat."},
    {"instruction": "What?", "output": "A cat."},
    {"messages": [{"role": "user", "content": "What?"}, ANSWER]},
    {"messages": [user(text("What?")), ANSWER]},
    {"prompt": [{"role": "user", "content": "What?"}], "completion": [ANSWER]},
])  # fmt: skip
def test_image_of_a_row_without_places_belongs_before_the_first_question(data):
    conversation = read({**data, "image": "a.png"})
    assert conversation.messages == (user(IMAGE, text("What?")), ANSWER)
    assert conversation.images == (("image", "a.png"),)


def test_image_parts_in_prompt_and_completion():
    row = {"prompt": [user(IMAGE, text("What?"))], "completion": [ANSWER], "images": [{"bytes": b"x", "path": "a.png"}]}
    assert read(row).images == (("images[0]", {"bytes": b"x", "path": "a.png"}),)


def test_row_without_images_is_unchanged():
    row = {"messages": [{"role": "user", "content": "An image?"}, ANSWER], "images": [], "image": None}
    conversation = read(row)
    assert (conversation.messages, conversation.images) == (tuple(row["messages"]), ())


@pytest.mark.parametrize(("data", "problem"), [
    ({"messages": [user(text("<image>a")), ANSWER], "images": []}, "0 images in its columns, and 1 <image> marker"),
    ({"messages": [user(IMAGE, text("a")), ANSWER]}, "0 images in its columns, and 1 empty image part"),
    ({"messages": [user(IMAGE, text("a")), ANSWER], "images": ["1", "2"]}, "2 images in its columns, and 1 empty image part"),
    ({"messages": [user({"type": "image", "image": "a"}), ANSWER], "image": "b"}, "1 image in .* 0 empty image parts"),
    ({"messages": [{"role": "user", "content": "<image><image>?"}, ANSWER], "image": "a"}, "1 image in .* 2 <image> markers"),
    ({"text": "A cat.", "image": "a"}, "only conversations can have images"),
    ({"messages": [{"role": "system", "content": "x"}, ANSWER], "image": "a"}, "no user message"),
])  # fmt: skip
def test_other_number_of_images_is_rejected(data, problem):
    with pytest.raises(BadRow, match=problem) as caught:
        read(data)
    assert caught.value.code == "image_count"
    assert caught.value.where.startswith("rows.jsonl:1")


@pytest.mark.parametrize("data", [
    {"messages": [user(IMAGE, text("a")), ANSWER]},
    {"messages": [{"role": "user", "content": "a"}, ANSWER], "image": "a.png"},
    {"messages": [user({"type": "video", "video": "a.mp4"}, text("a")), ANSWER], "image": "a.png"},
])  # fmt: skip
def test_images_are_rejected_unless_they_are_read(data):
    with pytest.raises(BadRow):
        normalize(Row(data, Source("rows.jsonl", 0, 1)))


def test_videos_and_audio_are_rejected():
    with pytest.raises(BadRow, match="unsupported types: video"):
        read({"messages": [user(IMAGE, {"type": "video", "video": "a.mp4"}), ANSWER], "image": "a.png"})
    with pytest.raises(BadRow, match="media"):
        read({"messages": [{"role": "user", "content": "a"}, ANSWER], "image": "a.png", "audio": "a.wav"})
