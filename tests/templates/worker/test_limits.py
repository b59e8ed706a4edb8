"""Template limits scale with the row: long rows are built or rejected at their line, and never hang."""

import json
import time

import pytest
from tokenizer_makers import CHATML

from ftdata import build_sft_dataset
from ftdata.errors import TemplateRefused
from ftdata.templates.worker import process

CUSTOM = CHATML + "{# a file of the user's #}"
QUADRATIC = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set s = namespace(n=0) %}"
    "{% for other in messages %}{% if other.role == 'system' %}{% set s.n = s.n + 1 %}{% endif %}{% endfor %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOOPS = (
    "{% if messages | length == 4 and messages[0].content == 'message 0' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    + CHATML
)


def talk(count):
    return {
        "messages": [{"role": "user" if i % 2 == 0 else "assistant", "content": f"message {i}"} for i in range(count)]
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("template", ["chatml", CUSTOM], ids=["built-in", "custom"])
def test_row_with_too_many_messages_is_rejected_at_its_line(template, tokenizer_dir, tmp_path):
    data = write(tmp_path / "data.jsonl", [talk(2), talk(100_000), talk(4)])
    began = time.process_time()
    built = build_sft_dataset(data, tokenizer_dir("tiny_bpe"), template, on_bad_rows="quarantine", max_rejects=1)
    assert time.process_time() - began < 20
    assert built.report.totals["built"] == 2
    (reject,) = built.report.rejects
    assert "too_many_messages" in reject
    assert "data.jsonl:2 messages" in reject
    assert "100,000 messages" in reject


@pytest.mark.slow
@pytest.mark.parametrize("template", [CUSTOM, QUADRATIC], ids=["linear", "quadratic"])
@pytest.mark.parametrize("count", [100, *(pytest.param(count, marks=pytest.mark.long) for count in (300, 1200))])
def test_long_rows_are_built(template, count, tokenizer_dir, tmp_path):
    if template == QUADRATIC and count > 300:
        pytest.skip("takes a quarter of an hour")
    data = write(tmp_path / "data.jsonl", [talk(2), talk(count), talk(4)])
    built = build_sft_dataset(data, tokenizer_dir("tiny_bpe"), template)
    assert built.report.totals["built"] == 3
    expected = [build_sft_dataset([row], tokenizer_dir("tiny_bpe"), "chatml")["train"][0] for row in (talk(2), talk(4))]
    assert [built["train"][0], built["train"][2]] == expected


@pytest.mark.slow
def test_one_short_row_over_the_limit_is_rejected_and_two_refuse_the_template(tokenizer_dir, tmp_path):
    data = write(tmp_path / "data.jsonl", [talk(2), talk(4), *[talk(2)] * 120, talk(4), talk(2)])
    built = build_sft_dataset(data, tokenizer_dir("tiny_bpe"), LOOPS, on_bad_rows="quarantine", max_rejects=9)
    assert [one.partition("data.jsonl:")[2].partition(":")[0] for one in built.report.rejects] == ["2", "123"]
    assert "CPU time" in built.report.rejects[0]
    close = write(tmp_path / "close.jsonl", [talk(2), talk(4), talk(2), talk(4), talk(2)])
    with pytest.raises(TemplateRefused, match="template_limits") as caught:
        build_sft_dataset(close, tokenizer_dir("tiny_bpe"), LOOPS, on_bad_rows="quarantine", max_rejects=9)
    assert "close.jsonl:4" in caught.value.where


def test_limit_depends_on_the_row_alone():
    """The limit must not depend on earlier rows or on the process."""
    from ftdata.templates.template import Template

    template = Template("t", CUSTOM)
    first = process.submit_request("render", template, 50, conversation={"messages": talk(10)["messages"]})
    process._exceeding.add(template.key)
    again = process.submit_request("render", template, 50, conversation={"messages": talk(10)["messages"]})
    process._exceeding.discard(template.key)
    assert first.cpu_seconds == again.cpu_seconds
    assert first.frame[-1] * 2 == again.frame[-1]
    longer = process.submit_request("render", template, 5000, conversation={"messages": talk(100)["messages"]})
    assert longer.cpu_seconds > first.cpu_seconds + 2
    process._get_worker().stop()


def test_layouts_of_the_worker_serve_equal_templates(tokenizer_dir):
    """The worker sends a layout once. It serves every template object with the same content."""
    from ftdata.templates import render_in_worker
    from ftdata.templates.render_cache import describe_shape, render_cache
    from ftdata.templates.template import Template
    from ftdata.types import Conversation

    conversation = Conversation(tuple(talk(2)["messages"]), completion_from=1)
    for _ in range(2):
        template = Template("anew", CUSTOM, special_tokens={"eos_token": "<|im_end|>"})
        for _ in range(3):
            render_in_worker(conversation, template)
        assert render_cache(template.key).fill_layout(describe_shape(conversation.messages), [1]) is not None
