"""Rows with images: the ids equal the ids of the model's processor, no image token is trained, and nothing is lost."""

import base64
import io
import json
import os
import struct
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoProcessor
from vision import CHAT_TOKENS, PROCESSORS, QWEN_TOKENS, byte_tokenizer, save_image, save_processor, save_qwen

from ftdata import build_preference_dataset, build_sft_dataset, encode, preview
from ftdata.build.dataset import load_build, write_build
from ftdata.errors import BadRow, BadRows, InputRefused, UsageError
from ftdata.testing import check_masking_rules
from ftdata.types import Part


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_qwen(tmp_path_factory.mktemp("qwen"))


IDS = byte_tokenizer({}, [*CHAT_TOKENS, *QWEN_TOKENS]).get_added_vocab()
PAD = IDS["<|image_pad|>"]


def image(path, **others):
    return {"type": "image", "image": str(path), **others}


def text(content):
    return {"type": "text", "text": content}


def png(size=(64, 64), color="red", kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


def chat(*content, answer="A red square."):
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": [text(answer)]}]


@pytest.mark.parametrize("name", PROCESSORS)
def test_ids_equal_those_of_the_processor(name, tmp_path):
    processor = save_processor(name, tmp_path / "model")
    paths = [save_image(tmp_path / f"{n}.png", size) for n, size in enumerate([(300, 200), (64, 640), (31, 29)])]
    chats = [
        chat(text("What?")),
        chat(image(paths[0]), text("What?")),
        chat(text("First "), image(paths[1]), text(" then "), image(paths[2]), text("?\n")),
        [*chat(image(paths[2]), text("One")), *chat(image(paths[0]), image(paths[1]), text("Two"), answer="No.")],
    ]
    for messages in chats:
        used = [Image.open(part["image"]) for one in messages for part in one["content"] if part["type"] == "image"]
        rendered = processor.apply_chat_template(messages, tokenize=False)
        settings = {"images_kwargs": {"do_rescale": False, "do_normalize": False}, "add_special_tokens": False}
        expected = processor(text=rendered, images=[used] if used else None, **settings)["input_ids"]
        (example,) = encode(messages, tmp_path / "model")
        assert example.input_ids.tolist() == list(np.asarray(expected[0]))
        assert len(example.images) == len(used)
        check_masking_rules(example, messages)
        answers = [example.text[span.start : span.end] for span in example.spans if span.generated]
        assert [part["text"] in "".join(answers) for part in (messages[1]["content"][0], messages[-1]["content"][0])]


@pytest.mark.parametrize("train_on", ["assistant", "all", lambda rendered, _: [True] * len(rendered.spans)])
def test_tokens_of_images_are_never_trained(train_on, qwen, tmp_path):
    path = save_image(tmp_path / "a.png", (200, 100))
    (example,) = encode(chat(image(path), text("What?")), qwen, train_on=train_on)
    media = [span for span in example.spans if span.part is Part.MEDIA]
    assert [example.text[span.start : span.end] for span in media] == ["<|image_pad|>"]
    inside = (example.offsets[:, 0] >= media[0].start) & (example.offsets[:, 1] <= media[0].end)
    assert inside.sum() == 28
    assert not example.trained[inside].any()
    assert example.trained.sum() > 10


@pytest.mark.parametrize("control_tokens", ["escape", "refuse", "allow"])
def test_typed_placeholder_is_text(control_tokens, qwen, tmp_path):
    path = save_image(tmp_path / "a.png", (64, 64))
    messages = chat(image(path), text("What is <|image_pad|>?"))
    if control_tokens == "escape":
        (example,) = encode(messages, qwen)
        assert "control_tokens" in example.flags
        assert np.sum(example.input_ids == PAD) == 4
        return
    with pytest.raises(BadRow) as error:
        encode(messages, qwen, control_tokens=control_tokens)
    assert error.value.code == {"refuse": "control_tokens", "allow": "image_tokens"}[control_tokens]


def test_image_tokens_without_an_image_are_rejected(qwen):
    with pytest.raises(BadRow) as error:
        encode([{"role": "user", "content": "<|image_pad|>"}, {"role": "assistant", "content": "No."}], qwen,
               control_tokens="allow")  # fmt: skip
    assert error.value.code == "image_tokens"


def spellings(path):
    """Yield rows with the same image and the same messages, in different spellings."""
    uri = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
    answer = {"role": "assistant", "content": "Red."}
    question = text("What?")
    yield {"messages": [{"role": "user", "content": [{"type": "image"}, question]}, answer], "images": [path]}
    yield {"messages": [{"role": "user", "content": [image(path), question]}, answer]}
    yield {"messages": [{"role": "user", "content": [image(Path(path).name), question]}, answer]}
    yield {"messages": [{"role": "user", "content": [image(f"file://{path}"), question]}, answer]}
    url = {"type": "image_url", "image_url": {"url": uri}}
    yield {"messages": [{"role": "user", "content": [url, question]}, answer]}
    yield {"messages": [{"role": "user", "content": "<image>What?"}, answer], "images": [path]}
    yield {"messages": [{"role": "user", "content": "What?"}, answer], "image": path}
    yield {
        "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Red."}],
        "image": path,
    }
    yield {
        "prompt": [{"role": "user", "content": [{"type": "image"}, question]}],
        "completion": [answer],
        "images": [path],
    }
    yield {"messages": [{"role": "user", "content": [{"image": path}, {"text": "What?"}]}, answer]}
    index = [{"type": "image", "index": 0, "text": None}, {"type": "text", "text": "What?", "index": None}]
    yield {"messages": [{"role": "user", "content": index}, answer], "images": [path]}
    said = [{"from": "human", "value": [{"type": "image"}, question]}, {"from": "gpt", "value": "Red."}]
    yield {"conversations": said, "images": [path]}
    responses = [{"type": "input_image", "image_url": uri, "detail": "high"}, {"type": "input_text", "text": "What?"}]
    yield {"messages": [{"role": "user", "content": responses}, answer]}
    source = {"type": "base64", "media_type": "image/png", "data": uri.partition(",")[2]}
    yield {"messages": [{"role": "user", "content": [{"type": "image", "source": source}, question]}, answer]}


def test_all_spellings_give_the_same_tokens(qwen, tmp_path):
    path = save_image(tmp_path / "a.png", (200, 100))
    rows = list(spellings(path))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build = build_sft_dataset(tmp_path / "data.jsonl", qwen, output_dir=tmp_path / "out")["train"]
    assert len(build) == len(rows)
    assert len({json.dumps([row["input_ids"], row["labels"]]) for row in build}) == 1
    hashes = [[(one["hash"], one["width"], one["height"]) for one in row["images"]] for row in build]
    assert hashes == [hashes[0]] * len(rows)
    assert {row["images"][0]["path"] for row in build} == {path, "images/00000.bin"}


def test_column_of_images_can_have_another_name(qwen, tmp_path):
    path = save_image(tmp_path / "a.png", (64, 64))
    rows = [{"prompt": "What?", "completion": "Red.", "photo": path}, {"prompt": "Why?", "completion": "Because."}]
    built = build_sft_dataset(rows, qwen, columns={"image": "photo"})["train"]
    assert [[image["path"] for image in row["images"]] for row in built] == [[path], []]
    with pytest.raises(BadRows, match=r"media.*columns=\{'images': ...\}"):
        build_sft_dataset(rows, qwen)


def test_bytes_of_images_are_in_the_folder_of_the_build(qwen, tmp_path):
    contents = [png(color="red"), png((300, 100), "blue", "JPEG"), png(color="red")]
    messages = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}]] * 3
    cells = [{"bytes": content, "path": None} for content in contents]
    pq.write_table(pa.table({"messages": messages, "image": cells}), tmp_path / "data.parquet")
    in_memory = [
        {"messages": one, "image": Image.open(io.BytesIO(content))}
        for one, content in zip(messages, contents, strict=True)
    ]
    for number, data in enumerate([tmp_path / "data.parquet", in_memory]):
        folder = tmp_path / f"build{number}"
        write_build(data, qwen, folder)
        assert len(list((folder / "images").iterdir())) == 1
        for row, content in zip(load_build(folder)["train"], contents, strict=True):
            (reference,) = row["images"]
            stored = (folder / reference["path"]).read_bytes()[reference["start"] :][: reference["size"]]
            left, right = (Image.open(io.BytesIO(one)).convert("RGB") for one in (stored, content))
            assert left.tobytes() == right.tobytes()
            assert stored == content or number
    with pytest.raises(UsageError, match="set output_dir"):
        build_sft_dataset(in_memory, qwen)


def test_equal_texts_with_different_images_are_different_rows(qwen, tmp_path):
    rows = [
        {"messages": chat(image(save_image(tmp_path / f"{n}.png", (64, 64), color)), text("Which color is this?"))}
        for n, color in enumerate(["red", "blue", "red"])
    ]
    for options in ({"dedup": True}, {"dedup": True, "near_duplicate_threshold": 0.8}):
        build = build_sft_dataset(rows, qwen, **options)["train"]
        assert [row["images"][0]["path"][-5:] for row in build] == ["0.png", "1.png"]


def test_packs_have_the_images_of_their_examples(qwen, tmp_path):
    rows = [
        {
            "messages": chat(
                *[image(save_image(tmp_path / f"{n}.{k}.png", (64 + 28 * n, 64))) for k in range(n)], text("?")
            )
        }
        for n in (0, 1, 2, 0, 3)
    ]
    build = build_sft_dataset(rows, qwen, max_length=400, packing="bfd")["train"]
    assert len(build) < len(rows)
    for row in build:
        pads = sum(id_ == PAD for id_ in row["input_ids"])
        counts = [round(one["width"] / 28) * round(one["height"] / 28) for one in row["images"]]
        assert pads == sum(counts)
    assert sum(len(row["images"]) for row in build) == 6


def test_truncation_never_keeps_a_part_of_an_image(qwen, tmp_path):
    path = save_image(tmp_path / "a.png", (200, 100))
    messages = [*chat(image(path), text("One?"), answer="1"), *chat(image(path), text("Two?"), answer="2")]
    (whole,) = encode(messages, qwen)
    rows = [{"messages": messages}]
    first_answer = int(whole.trained.argmax()) + 1
    seen = set()
    for length in (*range(first_answer, len(whole) - 1, 2), len(whole) - 1):
        for overlong in ("truncate", "drop_turns"):
            options = {"max_length": length, "overlong": overlong}
            if overlong == "drop_turns" and length <= first_answer:
                with pytest.raises(InputRefused, match="no answer fits completely"):
                    build_sft_dataset(rows, qwen, **options)
                continue
            build = build_sft_dataset(rows, qwen, **options)["train"]
            ids, images = build[0]["input_ids"], build[0]["images"]
            assert len(ids) <= length
            assert ids == whole.input_ids[: len(ids)].tolist()
            assert sum(id_ == PAD for id_ in ids) == 28 * len(images)
            # The token that announces an image is not the last token.
            assert ids[-1] != IDS["<|vision_start|>"]
            seen.add((overlong, len(images)))
    assert seen == {("truncate", 1), ("truncate", 2), ("drop_turns", 1), ("drop_turns", 2)}


def test_no_turn_before_an_image_fits(qwen, tmp_path):
    path = save_image(tmp_path / "a.png", (100, 60))
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "x" * 300},
        *chat(image(path), text("?"), answer="abc"),
    ]
    with pytest.raises(InputRefused, match="no answer fits completely"):
        build_sft_dataset([{"messages": messages}], qwen, max_length=128, overlong="drop_turns")


def test_images_of_a_column_are_placed_by_their_index(qwen, tmp_path):
    paths = [save_image(tmp_path / f"{n}.png", (64 + 28 * n, 64)) for n in range(2)]
    content = [{"type": "image", "index": 1}, text("then"), {"type": "image", "index": 0}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    (row,) = build_sft_dataset([{"messages": messages, "images": paths}], qwen)["train"]
    assert [one["path"] for one in row["images"]] == paths[::-1]


def test_preview_shows_the_size_and_the_tokens_of_an_image(qwen, tmp_path):
    path = save_image(tmp_path / "a.png", (200, 100))
    shown = str(preview([{"messages": chat(image(path), text("What?"))}], qwen))
    assert "⟨<|vision_start|>⟩[image 200×100 → 28 tokens]⟨<|vision_end|>⟩What?" in shown
    assert "image_pad" not in shown


def part(**fields):
    return chat(fields, text("?"))


TWO = chat({"type": "image"}, {"type": "image"}, text("?"))
HUGE = b"IHDR" + struct.pack(">II", 60_000, 60_000) + png()[24:29]
BAD_FILES = {
    "empty.png": b"",
    "text.png": b"no image",
    "picture.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'/>",
    "paper.pdf": b"%PDF-1.7",
    "cut.png": png((500, 500))[:-20],
    "cut.jpg": png((500, 500), kind="JPEG")[:-20],
    "cut.gif": png((500, 500), kind="GIF")[:100],
    "cut.webp": png((500, 500), kind="WEBP")[:-20],
    "cut.bmp": png((50, 50), kind="BMP")[:-20],
    "header.png": png()[:40],
    "tiff.png": png(kind="TIFF"),
    "huge.png": png()[:12] + HUGE + struct.pack(">I", zlib.crc32(HUGE)) + png()[33:],
    "long.png": png((900, 2)),
}
BAD_ROWS = {
    **{name: (part(type="image", image=name), {}, code) for name, code in {
        "empty.png": "image_format", "text.png": "image_format", "picture.svg": "image_format",
        "paper.pdf": "image_format", "cut.png": "image_truncated", "cut.jpg": "image_truncated",
        "cut.gif": "image_truncated", "cut.webp": "image_format", "cut.bmp": "image_truncated",
        "header.png": "image_format", "tiff.png": "image_format", "huge.png": "image_too_large",
        "long.png": "image_ratio", "missing.png": "image_missing", ".": "image_missing", "a\0b.png": "image_missing",
        "https://example.com/a.png": "image_remote", "hf://owner/name/a.png": "image_remote",
        "s3://bucket/a.png": "image_remote", "data:image/png;base64,???": "image_value",
        "data:text/plain;base64,aGk=": "image_value", "data:image/png;base64,aGk=": "image_format",
        "   ": "image_value",
    }.items()},
    "number": (part(type="image", image=3), {}, "image_value"),
    "true": (part(type="image", image=True), {}, "image_value"),
    "no address": (part(type="image_url", image_url={"url": None}), {}, "image_value"),
    "no address and no column": (part(type="image"), {}, "image_count"),
    "too few images": (TWO, {"images": ["a.png"]}, "image_count"),
    "too many images": (part(type="image"), {"images": ["a.png", "a.png"]}, "image_count"),
    "images and a part with an image": (part(type="image", image="a.png"), {"images": ["a.png"]}, "image_count"),
    "too many markers": (chat(text("<image> or <image>?")), {"images": ["a.png"]}, "image_count"),
    "too few markers": (chat(text("<image>?")), {"images": ["a.png", "a.png"]}, "image_count"),
    "no question": ([{"role": "assistant", "content": "A."}], {"images": ["a.png"]}, "image_count"),
    "list in a list": (part(type="image"), {"images": [["a.png"]]}, "image_value"),
    "object": (part(type="image"), {"images": [{"name": "a.png"}]}, "image_value"),
    "null in a list": (part(type="image"), {"images": [None]}, "image_value"),
    "video": (part(type="video", video="a.mp4"), {}, "content_type"),
    "audio": (part(type="input_audio", input_audio={"data": "aGk=", "format": "wav"}), {}, "content_type"),
    "video column": (chat(text("?")), {"video": "a.mp4"}, "media"),
    "audio column": (chat(text("?")), {"audio": "a.wav"}, "media"),
    "another image column": (chat(text("?")), {"image_2": "a.png"}, "media"),
    "text in an image part": (part(type="image", image="a.png", text="Lost?"), {}, "image_part"),
    "two images in a part": (part(type="image", image="a.png", path="b.png"), {}, "image_part"),
    "settings in a part": (part(type="image", image="a.png", max_pixels=100), {}, "image_part"),
    "index that is no number": (part(type="image", index="0"), {"images": ["a.png"]}, "image_part"),
    "index that is too large": (part(type="image", index=1), {"images": ["a.png"]}, "image_count"),
    "image in an answer": (
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": [image("a.png"), text("!")]}],
        {},
        "image_in_answer",
    ),
    "marker without an image": (chat(text("<image>?")), {"images": []}, "image_count"),
    "marker and null": (chat(text("<image>?")), {"image": None}, "image_count"),
    "device": (part(type="image", image="/dev/zero"), {}, "image_missing"),
    "pipe": (part(type="image", image="pipe"), {}, "image_missing"),
    "tokens": (None, {"input_ids": [1, 2], "labels": [-100, 2], "images": ["a.png"]}, "image_count"),
    "tokens of images": (None, {"input_ids": [1, PAD, 2], "labels": [-100, -100, 2]}, "image_tokens"),
    "text": (None, {"text": "abc", "image": "a.png"}, "image_count"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_image_is_rejected_with_its_place(name, qwen, tmp_path):
    assert len(BAD_ROWS) >= 40
    save_image(tmp_path / "a.png", (64, 64))
    for file, content in BAD_FILES.items():
        (tmp_path / file).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    messages, columns, code = BAD_ROWS[name]
    row = {**({"messages": messages} if messages else {}), **columns}
    good = {"messages": chat(image("a.png"), text("Good?"))}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (good, row)))
    report = build_sft_dataset(tmp_path / "data.jsonl", qwen, on_bad_rows="quarantine", max_rejects=1).report
    (reject,) = report.rejects
    assert f"[{code}] {tmp_path / 'data.jsonl'}:2" in reject
    assert "Fix:" in reject


def test_pairs_with_images_are_rejected(qwen, tmp_path):
    path = save_image(tmp_path / "a.png", (64, 64))
    row = {"prompt": "What?", "chosen": "This.", "rejected": "That.", "image": path}
    with pytest.raises(BadRows, match="image_task"):
        build_preference_dataset([row], qwen)


def test_unsupported_processor_is_refused_only_for_rows_with_images(tmp_path):
    folder = save_qwen(tmp_path / "model", {"processor_class": "OtherVLProcessor"})
    path = save_image(tmp_path / "a.png", (64, 64))
    assert len(build_sft_dataset([{"messages": chat(text("What?"))}], folder)["train"]) == 1
    with pytest.raises(UsageError, match="OtherVLProcessor .* not supported"):
        build_sft_dataset([{"messages": chat(image(path), text("What?"))}], folder)


def test_template_without_images_is_reported(qwen, tmp_path):
    path = save_image(tmp_path / "a.png", (64, 64))
    row = {"messages": chat(image(path), text("What?"))}
    silent = "{% for m in messages %}{{ m.role }}: {{ m.content if m.content is string else m.content[-1].text }}<|im_end|>{% endfor %}"
    for template, message in (
        ("chatml", "use the chat template of the model"),
        (silent, "prints 0 image placeholders"),
    ):
        with pytest.raises(BadRows, match=message):
            build_sft_dataset([row], qwen, template=template)


def test_processor_of_transformers_is_a_tokenizer(tmp_path):
    save_processor("gemma3", tmp_path / "model")
    loaded = AutoProcessor.from_pretrained(tmp_path / "model")
    path = save_image(tmp_path / "a.png", (64, 64))
    messages = chat(image(path), text("What?"))
    (expected,) = encode(messages, tmp_path / "model")
    for tokenizer in (loaded, loaded.tokenizer):
        (example,) = encode(messages, tokenizer, template=None if tokenizer is loaded else loaded.chat_template)
        assert example.input_ids.tolist() == expected.input_ids.tolist()


@pytest.fixture
def image_server(tmp_path):
    """The URL of a server with the files of a folder, and the requested paths."""
    requested = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "served"))

        def log_message(self, *_):
            requested.append(self.path)

    (tmp_path / "served").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    server.server_close()


def test_images_at_urls_are_downloaded_on_request(image_server, qwen, tmp_path):
    url, requested = image_server
    paths = [save_image(tmp_path / "served" / f"{n}.png", (64 + 28 * n, 64)) for n in range(3)]
    rows = [{"messages": chat(image(f"{url}/{n % 3}.png"), text("What?"))} for n in range(6)]
    rows.insert(2, {"messages": chat(image(f"{url}/missing.png"), text("What?"))})
    with pytest.raises(BadRows, match=r"image_remote.*set download_images=True"):
        build_sft_dataset(rows, qwen, output_dir=tmp_path / "build")
    assert not requested
    options = {"download_images": True, "on_bad_rows": "quarantine", "max_rejects": 1}
    splits = build_sft_dataset(rows, qwen, output_dir=tmp_path / "build", **options)
    (reject,) = splits.report.rejects
    assert "[image_missing] <memory>[2]" in reject
    assert f"{url}/missing.png" in reject
    for number, row in enumerate(splits["train"]):
        (reference,) = row["images"]
        stored = (tmp_path / "build" / reference["path"]).read_bytes()[reference["start"] :][: reference["size"]]
        assert stored == Path(paths[number % 3]).read_bytes()
    downloads = [path for path in requested if "missing" not in path and not path.startswith("HEAD")]
    assert len(set(downloads)) == 3


def test_relative_paths_begin_in_the_folder_of_images(qwen, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "rows").mkdir()
    path = save_image(tmp_path / "photos" / "a.png", (64, 64))
    data = tmp_path / "rows" / "data.jsonl"
    data.write_text(json.dumps({"messages": chat(image("a.png"), text("What?"))}))
    with pytest.raises(BadRows, match="image_missing"):
        build_sft_dataset(data, qwen)
    built = build_sft_dataset(data, qwen, image_folder=str(tmp_path / "photos"))["train"]
    assert built[0]["images"][0]["path"] == path
    with pytest.raises(UsageError, match="image_folder is .* not a folder"):
        build_sft_dataset(data, qwen, image_folder=str(tmp_path / "photo"))
