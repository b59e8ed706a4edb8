"""Functions as templates: unusual functions, imports, state between builds, and limits."""

import json

import pytest

from ftdata import build_sft_dataset, check_template, preview
from ftdata.build.dataset import write_build
from ftdata.errors import BadRows, TemplateRefused, UsageError
from ftdata.pipeline.recipe import load_bare_template
from ftdata.templates.python_template import load_template
from ftdata.templates.worker.client import require_verified

HEAD = "def encode(messages, add_generation_prompt=False, tools=None):\n    text = ''\n"
TAIL = "    return text + ('<|im_start|>assistant\\n' if add_generation_prompt else '')\n"
LOOP = """    for i, m in enumerate(messages):
        text += f"<|im_start|>{m['role']}\\n" + CONTENT + "<|im_end|>\\n"
"""


def code(content="m['content']", *, head="", before="", signature=HEAD, end=TAIL):
    """Return the code of a ChatML function with another expression for contents."""
    return head + signature + before + LOOP.replace("CONTENT", content) + end


def write(folder, text, name="enc.py"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return f"{folder / name}:encode"


def talk(*contents):
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]}


def decode(rows, tokenizer):
    from ftdata.tokenizing.load import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return [loaded.decode(ids) for ids in rows["input_ids"]]


def test_parts_of_contents_are_merged_before_the_function_is_called(tmp_path, tokenizer_dir):
    tiny = tokenizer_dir("tiny_bpe")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rows = [talk(parts, "x")]
    built = [build_sft_dataset(data, tiny, template=write(tmp_path, code()))["train"]
             for data in (rows, [talk("a\nb", "x")])]  # fmt: skip
    assert built[0]["input_ids"] == built[1]["input_ids"]
    rows = [talk([*parts, {"type": "audio", "audio": "a.wav"}], "x")]
    with pytest.raises(BadRows, match="content"):
        build_sft_dataset(rows, tiny, template=write(tmp_path, code()))


def test_functions_that_cut_results_never_receive_lists(tmp_path, tokenizer_dir):
    spec = write(tmp_path, code("(m['content'][:50] if m['role'] == 'tool' else m['content'])"))
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "I look", "tool_calls": [call]},
                {"role": "tool", "content": "y" * 60, "tool_call_id": "c"},
                {"role": "assistant", "content": "done"}]  # fmt: skip
    with pytest.raises(BadRows) as caught:
        build_sft_dataset([{"messages": messages}], tokenizer_dir("tiny_bpe"), template=spec)
    assert "message_dropped" in str(caught.value)


@pytest.mark.parametrize("content", ["m['content'][::-1]", "m['content'][:8]"])
def test_functions_that_change_texts_are_refused(tmp_path, tokenizer_dir, content):
    spec = write(tmp_path, code(content))
    assert check_template(spec).verdict != "exact"
    with pytest.raises((BadRows, TemplateRefused)):
        build_sft_dataset([talk("Hello there", "a longer text")], tokenizer_dir("tiny_bpe"), template=spec)


OTHERS = {
    "reasoning": ("m['content'] + ''.join(n['reasoning_content'].upper() for n in messages[:i] if 'reasoning_content' in n)"
                  " + ('[' + m['reasoning_content'] + ']' if 'reasoning_content' in m else '')"),
    "name of the user": "m['content'] + (messages[0].get('name', '').upper() if m['role'] == 'assistant' else '')",
    "tools": "m['content'] + (str([t['function']['name'] for t in tools or []]).upper() if m['role'] == 'assistant' else '')",
    "number of words": "m['content'] + (str(len(messages[0]['content'].split())) if m['role'] == 'assistant' else '')",
}  # fmt: skip


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_answers_do_not_depend_on_other_texts(tmp_path, content):
    with pytest.raises(TemplateRefused, match="not_verified"):
        require_verified(load_bare_template(write(tmp_path, code(content))))


DERIVED = {
    "before": "(messages[i - 1]['content'][::-1] if m['role'] == 'assistant' else '') + m['content']",
    "after": "m['content'] + (messages[i - 1]['content'].upper() if m['role'] == 'assistant' else '')",
    "note": "m['content'] + (' (re ' + messages[i - 1]['content'].upper() + ')' if m['role'] == 'assistant' else '')",
}


@pytest.mark.parametrize("content", DERIVED.values(), ids=DERIVED)
def test_text_that_is_derived_from_a_question_is_never_trained(tmp_path, tokenizer_dir, content):
    spec = write(tmp_path, code(content))
    with pytest.raises((BadRows, TemplateRefused)):
        build_sft_dataset([talk("Hello there", "ok")], tokenizer_dir("tiny_bpe"), template=spec)
    plain = code(content).replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert check_template(write(tmp_path, plain)).verdict == "refused"


def test_a_changed_copy_of_a_question_keeps_the_control_tokens(tmp_path, tokenizer_dir):
    topic = "    text = '<|im_start|>system\\nTopic: ' + messages[0]['content'].lower() + '<|im_end|>\\n'\n"
    spec, tiny = write(tmp_path, code(before=topic)), tokenizer_dir("tiny_bpe")
    with pytest.raises((BadRows, TemplateRefused)):
        build_sft_dataset([talk("Hello", "ok", "Hello again", "sure")], tiny, template=spec)


def test_trained_headers_are_reported(tmp_path):
    ignored = write(
        tmp_path, code(signature="def encode(messages, **kwargs):\n    text = ''\n", end="    return text\n")
    )
    strict = "    if any(a['role'] == b['role'] for a, b in zip(messages, messages[1:])):\n        raise ValueError('order')\n"
    alternating = code(before=strict, signature="def encode(messages):\n    text = ''\n", end="    return text\n")
    for spec in (ignored, write(tmp_path, alternating, "other.py")):
        assert "header_trained" in check_template(spec).flags


def test_token_ids_of_long_conversations_are_compared(tmp_path, tokenizer_dir):
    head = "def decode(ids):\n    return ''.join(map(chr, ids))\n\n"
    text = (
        code(head=head)
        .replace("    return text + (", "    return [ord(c) for c in text + (")
        .replace("'')\n", "'')]\n")
    )
    spec = write(tmp_path, text)
    with pytest.raises(BadRows, match="template_ids"):
        build_sft_dataset([talk(*["Hello"] * 80)], tokenizer_dir("tiny_bpe"), template=spec)


def test_arguments_stay_objects_if_the_function_requires_a_system_message(tmp_path, tokenizer_dir):
    before = "    if messages[0]['role'] != 'system':\n        raise ValueError('no system message')\n"
    content = "m['content'] + ''.join(json.dumps(c['function']) for c in m.get('tool_calls', []))"
    spec = write(tmp_path, code(content, head="import json\n", before=before))
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"city": "Paris"}}}
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [call]}]  # fmt: skip
    tiny = tokenizer_dir("tiny_bpe")
    (text,) = decode(build_sft_dataset([{"messages": messages}], tiny, template=spec)["train"], tiny)
    assert '"arguments": {"city": "Paris"}' in text


def test_changed_imports_are_noticed(tmp_path, tokenizer_dir, monkeypatch):
    tiny = tokenizer_dir("tiny_bpe")
    texts = []
    for folder, rule in (("a", "ONE"), ("b", "TWO"), ("b", "SIX")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "shared_rules.py").write_text(f"RULE = '{rule}'\n")
        spec = write(tmp_path / folder, code("RULE + m['content']", head="from shared_rules import RULE\n"))
        monkeypatch.chdir(tmp_path / folder)
        write_build([talk("q", "a")], tiny, tmp_path / folder / "out", template="./enc.py:encode", overwrite=True)
        assert spec
        texts += [str(preview(str(tmp_path / folder / "out")))]
    assert ["ONE" in texts[0], "TWO" in texts[1], "SIX" in texts[2]] == [True] * 3
    manifest = json.loads((tmp_path / "b" / "out" / "manifest.json").read_text())
    assert "# ftdata: file shared_rules.py " in manifest["options"]["template"]["source"]
    monkeypatch.chdir(tmp_path)
    assert "SIX" in str(preview(str(tmp_path / "b" / "out")))
    (tmp_path / "b" / "shared_rules.py").write_text("RULE = 'TEN'\n")
    with pytest.raises(UsageError, match="has changed since the build"):
        preview(str(tmp_path / "b" / "out"))


def test_builds_with_functions_are_never_reused(tmp_path, tokenizer_dir, monkeypatch):
    (tmp_path / "rule.txt").write_text("ONE")
    head = f"import os\nfrom pathlib import Path\nRULE = Path({str(tmp_path / 'rule.txt')!r}).read_text()\n"
    content = "RULE + os.environ.get('RULE', '') + m['content']"
    spec, data = write(tmp_path, code(content, head=head)), tmp_path / "data.jsonl"
    data.write_text(json.dumps(talk("q", "a")) + "\n")
    for rule in ("ONE", "TWO"):
        (tmp_path / "rule.txt").write_text(rule)
        monkeypatch.setenv("RULE", rule.lower())
        write_build(str(data), tokenizer_dir("tiny_bpe"), tmp_path / "out", template=spec, overwrite=True)
        assert rule + rule.lower() in str(preview(str(tmp_path / "out")))


@pytest.mark.parametrize("statement", ["from .prompts import S", "from pkg.prompts import S", "import pkg.prompts"])
def test_imports_of_imported_modules_are_recorded(tmp_path, statement):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("# -*- coding: latin-1 -*-\nfrom pkg.render import run\n" + code())
    folder = tmp_path / "snapshot"
    (folder / "pkg").mkdir(parents=True)
    (folder / "enc.py").symlink_to(tmp_path / "blobs" / "abc")
    (folder / "pkg" / "render.py").write_text(f"{statement}\nfrom {'.' * 99}x import y\nrun = 1\n")
    sources = []
    for rule in ("ONE", "TWO"):
        (folder / "pkg" / "prompts.py").write_text(f"S = '{rule}'\n")
        sources.append(load_template(f"{folder / 'enc.py'}:encode")[1])
    assert "# ftdata: file pkg/prompts.py " in sources[0]
    assert sources[0] != sources[1]


FILES = {
    "byte order mark": "\ufeff" + code(),
    "strict arguments": code(
        "m['content'] + ''.join(check(c['function'], tools) for c in m.get('tool_calls', []))",
        head="import json\n\ndef check(function, tools):\n"
             "    if function['name'] not in [t['function']['name'] for t in tools]:\n        raise ValueError('unknown')\n"
             "    return function['name'] + str(sorted(json.loads(function['arguments']).values()))\n\n"),
    "required tools": code(signature="def encode(messages, tools, add_generation_prompt=False):\n    text = ''\n"),
    "data classes": code(head="from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass A:\n    a: int\n\n"),
    "late import": code(before="    from late_neighbor import A\n"),
    "threads": code(
        head="from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(1)\npool.submit(len, '').result()\n",
        before="    pool.submit(len, '').result()\n"),
    "memory": code(before="    import mmap\n    mmap.mmap(-1, 1 << 30)\n"),
}  # fmt: skip


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_supported_functions(tmp_path, tokenizer_dir, text):
    (tmp_path / "late_neighbor.py").write_text("A = 1\n")
    spec = write(tmp_path, text)
    built = build_sft_dataset([talk("q", "a")], tokenizer_dir("tiny_bpe"), template=spec)
    assert len(built["train"]) == 1
    assert check_template(spec).verdict == "exact"


EXITS = {
    "function exits": (code(before="    raise SystemExit(3)\n"), "SystemExit: 3"),
    "file exits": (code(head="raise SystemExit(3)\n"), "SystemExit: 3"),
    "decode fails": ("def decode(ids):\n    raise KeyError(1)\n\ndef encode(messages):\n    return (1, 2)\n", "KeyError"),
    "decode returns bytes": ("def decode(ids):\n    return b''\n\ndef encode(messages):\n    return [1]\n", "a bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), EXITS.values(), ids=EXITS)
def test_code_that_exits_or_fails(tmp_path, tokenizer_dir, text, reason):
    with pytest.raises((BadRows, TemplateRefused), match=reason):
        build_sft_dataset([talk("q", "a")], tokenizer_dir("tiny_bpe"), template=write(tmp_path, text))


def test_code_that_waits_is_ended(tmp_path, monkeypatch):
    spec = write(tmp_path, code(head="import time\n", before="    time.sleep(1000)\n"))
    monkeypatch.setattr("ftdata.templates.python_template.PythonTemplate.cpu_factor", 0.1)
    with pytest.raises(TemplateRefused, match="template_limits|waits"):
        load_bare_template(spec)
