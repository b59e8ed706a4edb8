"""Images in previews, statistics, audits and pages, from rows and from builds."""

import json
import re

import pytest
from vision import save_image, save_qwen

from ftdata import audit, preview, stats
from ftdata.build.dataset import write_build
from ftdata.inspection.checks import checks


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_qwen(tmp_path_factory.mktemp("qwen"))


def row(path, answer="Red.", question="Which color?"):
    content = [{"type": "image", "image": str(path)}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def findings(report, code):
    return [finding for finding in report.findings if finding.code == code]


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def test_same_question_about_other_images_is_no_contradiction(qwen, tmp_path):
    red, blue = (save_image(tmp_path / f"{color}.png", (64, 64), color) for color in ("red", "blue"))
    report = audit(write_rows(tmp_path / "data.jsonl", row(red), row(blue, "Blue.")), qwen)
    assert not findings(report, "contradiction")
    report = audit(write_rows(tmp_path / "data.jsonl", row(red), row(red, "Blue.")), qwen)
    assert findings(report, "contradiction")


@pytest.mark.parametrize("is_build", [False, True])
def test_images_of_held_out_rows_in_the_training_data_are_reported(is_build, qwen, tmp_path):
    paths = [save_image(tmp_path / f"{n}.png", (64, 64), (60 * n, 0, 0)) for n in range(3)]
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl", row(paths[0]), row(paths[1], "Dark."))
    same = row(paths[0], question="And now?")
    for held_out, expected in ((same, 1), (row(paths[2]), 0)):
        write_rows(tmp_path / "rows" / "test.jsonl", held_out)
        data = str(tmp_path / "rows")
        if is_build:
            write_build(data, qwen, tmp_path / "build", overwrite=True)
            data = str(tmp_path / "build")
        found = findings(audit(data, qwen), "image_leakage")
        assert len(found) == expected
        assert not found or (found[0].severity, found[0].fix) == ("warning", checks["image_leakage"].fix)


@pytest.mark.parametrize(("size", "expected"), [((4, 64), 1), ((64, 64), 0), ((5000, 5000), 1)])
def test_very_small_and_very_large_images_are_reported(size, expected, qwen, tmp_path):
    path = save_image(tmp_path / "a.png", size)
    report = audit(write_rows(tmp_path / "data.jsonl", row(path)), qwen)
    assert len(findings(report, "image_size")) == expected


def test_statistics_count_images_and_their_tokens(qwen, tmp_path):
    path = save_image(tmp_path / "a.png", (200, 100))
    data = write_rows(tmp_path / "data.jsonl", row(path), row(path), {"prompt": "Hi", "completion": "Hello"})
    write_build(data, qwen, tmp_path / "build")
    for source in (data, str(tmp_path / "build")):
        counted = stats(source, qwen)
        assert (counted.groups[0].images, counted.groups[0].image_tokens) == (2, 56)
        assert re.search(r"2 images with 56 tokens, \d+\.\d% of all tokens", str(counted))


def test_build_is_shown_like_its_rows(qwen, tmp_path):
    path = save_image(tmp_path / "a.png", (200, 100))
    data = write_rows(tmp_path / "data.jsonl", row(path))
    write_build(data, qwen, tmp_path / "build")
    label = "⟨<|vision_start|>⟩[image 200×100 → 28 tokens]⟨<|vision_end|>⟩Which color?"
    assert label in str(preview(data, qwen))
    assert label in str(preview(str(tmp_path / "build"), qwen))


def test_page_has_a_thumbnail_of_each_image(qwen, tmp_path):
    path = save_image(tmp_path / "a.png", (400, 100))
    data = write_rows(tmp_path / "data.jsonl", row(path), {"prompt": "Hi", "completion": "Hello"})
    preview(data, qwen, n=2, html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "img-src data:" in page
    assert page.count("data:image/jpeg;base64,") == 1
    preview([{"prompt": "Hi", "completion": "Hello"}], qwen, html=tmp_path / "text.html")
    assert "img-src" not in (tmp_path / "text.html").read_text()


@pytest.mark.browser
def test_thumbnail_is_drawn_before_the_label(qwen, tmp_path, chromium):
    path = save_image(tmp_path / "a.png", (400, 100))
    preview(write_rows(tmp_path / "data.jsonl", row(path)), qwen, html=tmp_path / "page.html")
    page = chromium.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    image = page.locator("img.im")
    image.wait_for()
    assert image.evaluate("one => [one.naturalWidth, one.naturalHeight]") == [128, 32]
    assert "[image 400×100 → " in image.evaluate("one => one.parentElement.textContent")
    page.close()
