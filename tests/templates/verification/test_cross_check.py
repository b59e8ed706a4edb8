"""Template verification: the cross-check finds wrong renderings, and hostile templates are refused."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from ftdata import build_sft_dataset, check_template, encode
from ftdata.errors import TemplateRefused
from ftdata.templates import Template, render_in_worker
from ftdata.templates.chat import ChatRendering
from ftdata.templates.verification.cross_check import cross_check
from ftdata.templates.worker import client, process
from ftdata.types import Conversation, Part, Span

TALK = (
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bound(source=CHATML):
    return Template("t", source, strict=False, special_tokens={"eos_token": "<|im_end|>"})


def against(change):
    """Return the result of the cross-check after `change` is applied to the spans of a rendering."""
    template = bound()
    (rendered,) = render_in_worker(Conversation(TALK), template, "joint")
    spans = tuple(new for span in rendered.spans for new in change(span))
    return cross_check(ChatRendering.from_messages(TALK, (), template), rendered._replace(spans=spans))


def test_correct_rendering_is_confirmed():
    assert against(lambda span: [span]) is None


FAULTS = {
    "a header is trained": lambda s: [s._replace(generated=True, message=1)] if s.start == 31 else [s],
    "an answer is not trained": lambda s: [s._replace(generated=s.generated and s.message != 3)],
    "half an answer is not trained": lambda s: (
        [s._replace(start=s.start + 4), Span(s.start, s.start + 4, s.part, s.message, False)][::-1]
        if s.part is Part.CONTENT and s.message == 1
        else [s]
    ),
    "a question is trained": lambda s: [s._replace(generated=True, message=1)] if s.message == 2 else [s],
    "turns are exchanged": lambda s: [s._replace(message={1: 3, 3: 1}.get(s.message, s.message))],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_contradicted(fault):
    found = against(FAULTS[fault])
    if fault == "an answer is not trained":
        assert found is None  # that is for policies to say
    else:
        assert found is not None
        assert "..." in str(found)


def test_different_text_is_contradicted():
    template = bound()
    (rendered,) = render_in_worker(Conversation(TALK), template, "joint")
    chat = ChatRendering.from_messages(TALK, (), template)
    assert "texts differ" in cross_check(chat, rendered._replace(text=rendered.text + "!")).reason
    assert cross_check(ChatRendering.from_messages(TALK[:2], (), template), rendered) is not None


HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "fills the memory": "{% set n = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "computes while it is compiled": "{{ 9 ** 99999999 }}",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_templates_are_refused(attack, tokenizer_dir):
    began = time.monotonic()
    with pytest.raises(TemplateRefused, match="template_limits"):
        encode(TALK, tokenizer_dir("tiny_bpe"), HOSTILE[attack] + CHATML)
    assert time.monotonic() - began < 4 * process.EXAMINE_CPU_SECONDS
    assert check_template("chatml").verdict == "exact"


def test_verdicts_are_cached_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("FTDATA_CACHE", str(tmp_path))
    client._examine_cached.cache_clear()
    first = client.verify_template(bound())
    (kept,) = (tmp_path / "verdicts").iterdir()
    asked = []
    monkeypatch.setattr(client, "call_worker", lambda *given, **_: asked.append(given))
    client._examine_cached.cache_clear()
    assert client.verify_template(bound()) == first
    assert not asked
    kept.write_text("not JSON")
    monkeypatch.undo()
    monkeypatch.setenv("FTDATA_CACHE", str(tmp_path))
    client._examine_cached.cache_clear()
    assert client.verify_template(bound()) == first


def test_unwritable_cache_is_ignored(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FTDATA_CACHE", str(blocked))
    client._examine_cached.cache_clear()
    assert client.verify_template(bound()).verdict == "exact"


def test_contradicted_template_is_refused(tokenizer_dir, monkeypatch):
    report = replace(
        client.verify_template(bound()), contradictions=("plain: messages[1]: the region begins elsewhere",)
    )
    monkeypatch.setattr(client, "verify_template", lambda template: report)
    with pytest.raises(TemplateRefused, match="template_not_verified.*begins elsewhere"):
        encode(TALK, tokenizer_dir("tiny_bpe"), CHATML + "{# another #}")


@pytest.mark.parametrize("is_cached", [True, False])
def test_real_rows_are_cross_checked_in_every_build(tokenizer_dir, monkeypatch, is_cached):
    """A fault in a single row stops the build; the error names the row and the message."""
    from ftdata.templates import chat, render_cache

    located, fill = chat._locate_turns, render_cache.TextLayout.fill

    def wrong(it, *given):
        turns = located(it, *given)
        if "row 7" not in it.messages[0]["content"]:
            return turns
        return [replace(turn, region=turn.region._replace(start=turn.region.start - 3)) for turn in turns]

    def wrongly_filled(self, contents):
        found = fill(self, contents)
        if found is None or contents[0] != "row 7":
            return found
        at = next(n for n, span in enumerate(found.spans) if span.generated)
        before, own = found.spans[at - 1 : at + 1]
        moved = before._replace(end=before.end - 3), own._replace(start=own.start - 3)
        return found._replace(spans=(*found.spans[: at - 1], *moved, *found.spans[at + 1 :]))

    rows = [
        {"messages": [{"role": "user", "content": "row 7" if n == 7 else f"row {n + 10}"}, TALK[1]]} for n in range(20)
    ]
    # A worker sends each layout once. Earlier tests may have evicted the template from the cache of this process.
    render_cache.render_cache.cache_clear()
    process._get_worker().stop()
    build_sft_dataset(rows, tokenizer_dir("tiny_bpe"))
    if is_cached:
        monkeypatch.setattr(render_cache.TextLayout, "fill", wrongly_filled)
    else:
        monkeypatch.setattr(client, "HERE", True)  # where it can be made to fail
        monkeypatch.setattr(render_cache.RenderCache, "fill_layout", lambda *_: None)
        monkeypatch.setattr(chat, "_locate_turns", wrong)
    with pytest.raises(TemplateRefused, match="template_not_verified") as caught:
        build_sft_dataset(rows, tokenizer_dir("tiny_bpe"))
    assert "[7]" in caught.value.where
    assert "messages[1]" in caught.value.message


def test_template_report_contains_its_properties(tokenizer_dir):
    source = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant made of letters.<|im_end|>\n"
        "{% endif %}Today is {{ strftime_now('%d %B') }}.\n"
    )
    report = check_template(source + CHATML.replace("{{ m.content }}", "{{ m.content | trim }}"))
    assert "helpful assistant made of letters" in report.adds
    assert report.rewrites == ("blanks",)
    assert set(report.lacks) == {"tools", "tool_calls", "reasoning", "names"}
    assert report.uses_date
    assert "made of letters" in str(report)


def test_interrupted_request_leaves_no_answer_for_the_next_one(monkeypatch, tmp_path):
    """After Ctrl-C the next template must not receive the verdict of the previous one."""
    monkeypatch.setenv("FTDATA_CACHE", str(tmp_path))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(process._Worker, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client._examine(bound(CHATML + "{# interrupted #}").description)
    monkeypatch.undo()
    monkeypatch.setenv("FTDATA_CACHE", str(tmp_path))
    assert client.verify_template(bound("{{ raise_exception('never') }}{{ messages }}")).verdict == "refused"


def test_killed_template_worker_is_restarted(monkeypatch, tmp_path):
    monkeypatch.setenv("FTDATA_CACHE", str(tmp_path))
    process._get_worker().process.kill()
    assert client.verify_template(bound(CHATML + "{# killed #}")).verdict == "exact"


@pytest.mark.parametrize("kept", ["[]", "null", "5", '"x"', "{}"])
def test_damaged_verdict_is_recomputed(kept, monkeypatch, tmp_path):
    monkeypatch.setenv("FTDATA_CACHE", str(tmp_path))
    client._examine_cached.cache_clear()
    client.verify_template(bound())
    (file,) = (tmp_path / "verdicts").iterdir()
    file.write_text(kept)
    client._examine_cached.cache_clear()
    assert client.verify_template(bound()).verdict == "exact"


def test_forked_processes_exit(tokenizer_dir):
    script = (
        "import os, sys; from ftdata import check_template; check_template('chatml')\n"
        "if os.fork() == 0:\n    check_template('zephyr'); sys.exit(0)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout == "0\n", ran.stderr
