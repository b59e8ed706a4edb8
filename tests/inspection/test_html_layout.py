"""The HTML page: its summary, badges, separators, and its layout on a phone."""

import json

import pytest
from audit_helpers import talk
from tokenizer_makers import tiny_bpe

from ftdata import preview

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_summary_says_what_is_wrong_and_how_to_fix_it(simple):
    page = simple([talk("q", "an answer"), talk("q", ""), talk("q", "word " * 100)], max_length=60, overlong="truncate")
    assert page.inner_text("#summary .verdict") == "3 rows: 2 errors to fix before you train"
    problems = page.locator("#summary .problems li").all_inner_texts()
    assert "1 row rejected: empty_answer (1). Fix: correct the rows" in problems[0]
    assert "max_length cuts an answer in the middle" in problems[1]
    assert "Fix: raise max_length" in problems[1]
    assert "every trained turn ends with a trained stop token" not in page.inner_text("#summary")
    page = simple([talk("q", "an answer")])
    assert page.inner_text("#summary .verdict") == "1 row: no problems found"
    assert "every trained turn ends with a trained stop token" in page.inner_text("#summary")


def test_badges_explain_and_filter(simple):
    """The filter counts all rows of the data, also those that are not on the page."""
    page = simple([talk(f"q {n}", "an answer") for n in range(3)] + [talk("q", "same")] * 36, n=2)
    options = page.locator("#kind option").all_inner_texts()
    assert "duplicate (1 of 35)" in options
    badge = page.locator(".badge", has_text="duplicate").first
    assert badge.get_attribute("title") == "the same tokens and labels as an earlier row"
    badge.click()
    assert page.input_value("#kind") == "duplicate"
    assert page.inner_text("#explanation") == "duplicate: the same tokens and labels as an earlier row"
    assert page.locator(".row").count() == 1
    assert page.faults == []


def test_examples_of_a_split_conversation_are_separated(simple):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = talk("q", "<think>so</think>a")["messages"] + talk("r", "<think>ah</think>b")["messages"]
    page = simple([{"messages": turns}, talk("q", "a")], template=template)
    assert page.locator("h4.part").all_inner_texts() == ["example 1 of 2", "example 2 of 2"]


@pytest.mark.parametrize("width", [320, 390])
def test_page_fits_a_phone(tmp_path, opened, width):
    folder = tmp_path / ("a-very-long-folder-name-without-a-space" * 3)
    folder.mkdir()
    path = folder / "data.jsonl"
    path.write_text(json.dumps(talk("q", "a")) + "\n{broken\n")
    preview(path, tiny_bpe(tmp_path / "t"), html=tmp_path / "page.html", packing="bfd", max_length=64)
    page = opened(tmp_path / "page.html")
    page.set_viewport_size({"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
