"""Objects in a notebook: examples, reports and audits are shown as HTML, and tab completion shows public names."""

import html
import re

import ftdata
from ftdata import audit, build_sft_dataset, encode

TALK = [{"role": "user", "content": "2 < 3?\nYes or no"}, {"role": "assistant", "content": "Yes & naïve 👍🏽"}]


def visible_text(page):
    return html.unescape(re.sub("<[^>]+>", "", page))


def test_example_shows_its_text_and_trained_tokens(tokenizer_dir):
    (example,) = encode(TALK, tokenizer_dir("tiny_bpe"))
    page = example._repr_html_()
    assert visible_text(page).startswith(example.text.replace("\n", "↵\n"))
    assert f"{int(example.trained.sum())} of {len(example)} tokens trained" in page
    assert page.count("underline") == int(example.trained.sum())
    assert [int(id_) for id_ in re.findall('title="(\\d+)"', page)] == example.input_ids.tolist()


def test_reports_are_shown(tokenizer_dir):
    rows = [{"question": "<b>?", "answer": "a"}, {"question": "q", "answer": "N/A"}]
    report = build_sft_dataset(rows, tokenizer_dir("tiny_bpe")).report
    assert visible_text(report._repr_html_()) == str(report)
    findings = audit(rows, tokenizer_dir("tiny_bpe"))
    page = findings._repr_html_()
    assert "trivial_answer" in page
    assert "&lt;memory&gt;" in page
    assert "2 rows: 1 warning to check" in visible_text(page)
    assert "<table>" not in audit(rows[:1], tokenizer_dir("tiny_bpe"))._repr_html_()


def test_completion_shows_public_names():
    assert sorted(dir(ftdata)) == sorted(ftdata.__all__)
