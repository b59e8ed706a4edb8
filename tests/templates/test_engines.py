"""Other template engines are compared with Jinja2: each difference is found, and equal texts are not reported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizer_makers import CHATML

from ftdata.errors import MissingDependency, TemplateRefused
from ftdata.templates import Template
from ftdata.templates.engines import CASES, compare_engines

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def compare(source, engine="minijinja"):
    (report,) = compare_engines(Template("tested", source, special_tokens=TOKENS), [engine])
    return report


def test_equal_engine_has_no_differences():
    report = compare(CHATML)
    assert report.differences == ()
    # A message without text, and a list of parts, are printed by all engines.
    assert report.cases >= len(CASES) - 4
    assert str(report).startswith("minijinja 3")
    assert str(report).endswith("as Jinja2 does")


@pytest.mark.parametrize(
    ("addition", "case", "expected", "rendered"),
    [
        ("{{ tools | tojson if tools }}", "tools", "<key>", "\\u003ckey"),
        ("{{ messages[0].content.title() }}", "unicode and markup", "X'", "x'"),
        ("{{ strftime_now('%Y') }}", "one turn", None, None),
    ],
)
def test_differences_are_described(addition, case, expected, rendered):
    report = compare(addition + CHATML)
    found = {difference.case: difference for difference in report.differences}
    if expected is None:
        assert found == {}
        return
    assert case in found
    assert found[case].expected.startswith(expected)
    assert found[case].rendered.startswith(rendered)
    assert case in str(report)


def test_engine_that_cannot_parse_a_template_is_named():
    report = compare("{% generation %}{% endgeneration %}" + CHATML)
    assert len(report.differences) == report.cases
    assert "minijinja" in str(report)
    assert "fails on every conversation: syntax error: unknown statement generation" in str(report)


def test_error_of_the_template_is_an_error_of_the_engine():
    """If only the other engine reaches `raise_exception`, its message is shown."""
    source = "{% if messages[0].content is iterable and messages[0].content is not string %}{{ raise_exception('No parts!') }}{% endif %}"
    report = compare(source + CHATML)
    assert all("text parts" not in difference.case for difference in report.differences)


def test_template_with_an_endless_loop_is_refused():
    with pytest.raises(TemplateRefused, match="template_limits"):
        compare("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}" + CHATML)


def test_missing_engines_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "minijinja", None)
    with pytest.raises(MissingDependency, match="no_engine.*minijinja.*not installed") as caught:
        compare(CHATML)
    assert "pip install 'ftdata[engines]'" in str(caught.value)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependency, match="needs node"):
        compare(CHATML, "huggingface.js")
    with pytest.raises(MissingDependency, match="no other template engine is installed"):
        compare_engines(Template("tested", CHATML))


def has_javascript_engine():
    node = shutil.which("node")
    command = [node or "node", "-e", "require('@huggingface/jinja')"]
    return node is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not has_javascript_engine(), reason="needs node, and npm install @huggingface/jinja")
def test_javascript_engine_is_compared():
    # A template that takes only text prints lists as Python or as JavaScript do.
    assert {one.case.partition(",")[0] for one in compare(CHATML, "huggingface.js").differences} == {"text parts"}
    report = compare("{% if tools %}{{ ['a'] }}{% endif %}" + CHATML, "huggingface.js")
    assert {one.case: one.expected[:2] for one in report.differences}["tools"] == "'a"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_missing_javascript_package_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NODE_PATH", raising=False)
    with pytest.raises(MissingDependency, match="needs @huggingface/jinja"):
        compare(CHATML, "huggingface.js")


def test_command_compares_the_engines(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ tools | tojson if tools }}" + CHATML)
    command = [str(Path(sys.executable).parent / "ftdata"), "templates", "check", "t.jinja", "--engines"]
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "minijinja" in done.stdout
    assert "tools, character" in done.stdout
    done = subprocess.run(
        [*command, "--json"], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert json.loads(done.stdout)["engines"][0]["engine"].startswith("minijinja")


FUNCTION = """
def encode(messages, tools=None, add_generation_prompt=False):
    if any("reasoning_content" in message for message in messages):
        raise ValueError("no reasoning")
    text = "".join(f"<|im_start|>{m['role']}\\n{str(m['content']).strip()}<|im_end|>\\n" for m in messages)
    return text + ("<|im_start|>assistant\\n" if add_generation_prompt else "")
"""


def test_function_is_compared_with_the_template(tmp_path):
    (tmp_path / "enc.py").write_text(FUNCTION)
    template = Template("tested", CHATML, special_tokens=TOKENS)
    (report,) = compare_engines(template, (), [f"{tmp_path / 'enc.py'}:encode"])
    assert report.engine.endswith("enc.py:encode")
    failing = {difference.case for difference in report.differences if difference.position < 0}
    assert failing == {"reasoning", "reasoning, next answer"}
    differing = {difference.case for difference in report.differences if difference.position >= 0}
    assert differing == {"whitespace", "whitespace, next answer"}


def test_function_is_compared_on_the_command_line(tmp_path):
    (tmp_path / "enc.py").write_text(FUNCTION)
    command = [sys.executable, "-m", "ftdata", "templates", "check", "chatml", "--function", "./enc.py:encode"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "./enc.py:encode: renders" in done.stdout
