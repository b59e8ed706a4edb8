"""Modelfiles for Ollama: the text of the template in Go's language, and templates that cannot be converted."""

import re
import subprocess
import sys

import pytest

from ftdata.errors import TemplateRefused
from ftdata.templates import Template
from ftdata.templates.ollama import detect_layout, make_modelfile

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
HEADERS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def template(source):
    return Template("tested", source, strict=False, special_tokens=TOKENS)


def test_layout_and_modelfile():
    layout = detect_layout(template(HEADERS))
    assert layout.start == "<s>"
    assert layout.prefixes == {"system": "<s>[system]", "user": "[user]", "assistant": "[assistant]"}
    assert set(layout.suffixes.values()) == {"</s>"}
    assert layout.prompt == "[assistant]"
    modelfile = make_modelfile(template(HEADERS), "model.gguf")
    assert modelfile == (
        "# Not in this template: tools, reasoning.\n"
        "FROM model.gguf\n"
        'TEMPLATE """{{ range $index, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $index)) 1 }}'
        '{{ if eq .Role "system" }}[system]{{ .Content }}</s>{{ end }}'
        '{{ if eq .Role "user" }}[user]{{ .Content }}</s>{{ end }}'
        '{{ if eq .Role "assistant" }}[assistant]{{ .Content }}{{ if not $last }}</s>{{ end }}{{ end }}'
        '{{ if and $last (ne .Role "assistant") }}[assistant]{{ end }}{{ end }}"""\n'
        'PARAMETER stop "</s>"\n'
    )


def test_default_system_prompt_and_braces_are_kept():
    source = "{% if messages[0].role != 'system' %}[system]Be {{ '{{' }}brief{{ '}}' }}</s>{% endif %}" + HEADERS[15:]
    modelfile = make_modelfile(template(source))
    assert '{{ if and (eq $index 0) (ne .Role "system") }}[system]Be {{ "{{" }}brief}}</s>{{ end }}' in modelfile


def test_template_without_system_messages():
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + HEADERS
    assert make_modelfile(template(source)).startswith("# Not in this template: tools, reasoning, system messages.\n")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (HEADERS.replace("[{{ m.role }}]", "[{{ loop.index }}]"), "depends on|would print"),
        (HEADERS.replace("{{ m.content }}", "{{ m.content.upper() }}"), "does not print a conversation"),
        ("{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}", "BOS token before each message"),
        (HEADERS.replace("</s>", '"""'), "which a Modelfile cannot contain"),
        (HEADERS.replace("{% for", "{% if messages|length > 3 %}long{% endif %}{% for"), "would print|depends on"),
    ],
)
def test_templates_that_cannot_be_converted(source, reason):
    with pytest.raises(TemplateRefused, match=reason) as caught:
        make_modelfile(template(source))
    assert caught.value.code == "not_convertible"


def test_command(tmp_path):
    command = [sys.executable, "-m", "ftdata", "templates", "modelfile", "chatml", "--from", "x.gguf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "<|im_start|>" in done.stdout
    assert re.search(r"^FROM x\.gguf$", done.stdout, re.MULTILINE)
