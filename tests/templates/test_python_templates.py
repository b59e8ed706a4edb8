"""Templates that are Python functions: attribution, token ids of libraries, and errors."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import mistral_common
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import often
from tokenizer_makers import CHATML

from ftdata import build_sft_dataset, check_template, preview
from ftdata.build.dataset import write_build
from ftdata.errors import BadRow, BadRows, TemplateRefused, UsageError
from ftdata.pipeline.recipe import load_bare_template
from ftdata.templates import Template
from ftdata.templates.python_template import PythonTemplate, load_template, make_template
from ftdata.templates.render_chat import render_chat
from ftdata.templates.verification.probe import describe_contradiction
from ftdata.types import Conversation, Part

CHATML_FUNCTION = """
def encode(messages, add_generation_prompt=False):
    text = "".join(f"<|im_start|>{m['role']}\\n{m['content']}<|im_end|>\\n" for m in messages)
    return text + ("<|im_start|>assistant\\n" if add_generation_prompt else "")
"""

VENDOR = '''
import json

def encode(messages, tools=None, thinking=True):
    """Think only in the last turn, and print calls in another format than JSON."""
    text = "[T]" + json.dumps(tools) + "[/T]" if tools else ""
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, m in enumerate(messages):
        text += f"<|im_start|>{m['role']}\\n"
        if m["role"] == "assistant":
            if i > last and thinking:
                text += "<think>" + m.get("reasoning_content", "") + "</think>"
            text += m["content"].strip()
            for call in m.get("tool_calls", []):
                function = call["function"]
                arguments = json.loads(function["arguments"])
                text += "<call>" + function["name"]
                text += "".join(f"<{k}>{v if isinstance(v, str) else json.dumps(v)}</{k}>" for k, v in arguments.items())
        else:
            text += m["content"]
        text += "<|im_end|>\\n"
    if messages[-1]["role"] != "assistant":
        text += "<|im_start|>assistant\\n" + ("<think>" if thinking else "")
    return text
'''

CALL = {"id": "c", "type": "function", "function": {"name": "find", "arguments": {"path": 'a "b"', "depth": 2}}}
TOOL = {"type": "function", "function": {"name": "find", "description": "Find it", "parameters": {
    "type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}}}  # fmt: skip


def write(folder, code, name="enc.py"):
    path = folder / name
    path.write_text(code)
    return f"{path}:encode"


@functools.cache
def python_template(code):
    folder = Path(tempfile.mkdtemp(prefix="ftdata-templates-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_template(*load_template(write(folder, code)), special_tokens={"eos_token": "<|im_end|>"})


# Functions receive blank texts unchanged, so these count as text of the function.
TEXTS = st.text(st.sampled_from("ab <>\n\"'\\é😀"), max_size=6).filter(lambda text: not text or text.strip())


@often(200)
@given(contents=st.lists(TEXTS, min_size=2, max_size=6))
def test_spans_are_those_of_the_same_jinja_template(contents):
    roles = ["user", "assistant"] * 3
    pairs = zip(roles, contents[: len(contents) // 2 * 2], strict=False)
    messages = tuple({"role": role, "content": content} for role, content in pairs)
    jinja = Template("jinja", CHATML, special_tokens={"eos_token": "<|im_end|>"})
    outcomes = []
    for template in (jinja, python_template(CHATML_FUNCTION)):
        try:
            outcomes.append(render_chat(Conversation(messages), template, "joint"))
        except BadRow as error:
            outcomes.append(error.code)
    expected, actual = outcomes
    if isinstance(expected, str):
        assert actual == expected
    else:
        assert [text.text for text in actual] == [text.text for text in expected]
        assert [owners(text) for text in actual] == [owners(text) for text in expected]


def owners(text):
    """Return the part and the mask of each character, because empty and adjacent spans can differ."""
    return [(span.part, span.message, span.generated) for span in text.spans for _ in range(span.start, span.end)]


def test_texts_that_the_function_changes_are_attributed():
    template = python_template(VENDOR)
    messages = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": " a1 ", "reasoning_content": "r1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "found", "tool_call_id": "c"},
        {"role": "assistant", "content": "a2", "reasoning_content": "r2"},
    )
    conversation = Conversation(messages, tools=(TOOL,))
    texts = render_chat(conversation, template)
    generated = [
        "".join(text.text[span.start : span.end] for span in text.spans if span.generated and span.message == index)
        for text, index in ((texts[0], 1), (texts[1], 3), (texts[1], 5))
    ]
    assert generated == [
        "r1</think>a1<|im_end|>",
        '</think><call>find<path>a "b"</path><depth>2</depth><|im_end|>',
        "r2</think>a2<|im_end|>",
    ]
    parts = {part: [] for part in Part}
    for span in texts[1].spans:
        parts[span.part].append(texts[1].text[span.start : span.end])
    assert parts[Part.TOOL_CALL] == ["find", "path", 'a "b"', "path", "depth", "depth"]
    assert parts[Part.TOOLS] == ["find", "Find it", "path", "path"]
    assert all(describe_contradiction(conversation, template, text) is None for text in texts)


def test_verdicts():
    assert python_template(CHATML_FUNCTION).has_generation_prompt
    assert python_template(VENDOR).has_generation_prompt
    assert not python_template(CHATML_FUNCTION.replace("add_generation_prompt=False", "x=0").replace(
        "if add_generation_prompt", "if x")).has_generation_prompt  # fmt: skip


def test_check_and_build(tmp_path, tokenizer_dir):
    spec, tiny = write(tmp_path, CHATML_FUNCTION), tokenizer_dir("tiny_bpe")
    assert check_template(spec).verdict == "exact"
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    built, expected = (build_sft_dataset(rows, tiny, template=template)["train"] for template in (spec, "chatml"))
    assert built["input_ids"] == expected["input_ids"]
    assert built["labels"] == expected["labels"]


def test_builds_record_the_file_and_never_run_the_recorded_code(tmp_path, tokenizer_dir):
    spec, tiny = write(tmp_path, CHATML_FUNCTION), tokenizer_dir("tiny_bpe")
    rows = [{"question": "1+1?", "answer": "2"}]
    write_build(rows, tiny, tmp_path / "out", template=spec)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["options"]["template"]["source"] == CHATML_FUNCTION
    assert "<|im_start|>" in str(preview(str(tmp_path / "out")))
    write(tmp_path, CHATML_FUNCTION + "# changed\n")
    with pytest.raises(UsageError, match="has changed since the build"):
        preview(str(tmp_path / "out"))


MISTRAL = """
from pathlib import Path

import mistral_common
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

FILE = str(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json")
prompts = MistralTokenizer.from_file(FILE, mode=ValidationMode.test)
answers = MistralTokenizer.from_file(FILE, mode=ValidationMode.finetuning)


def encode(messages, tools=None):
    request = ChatCompletionRequest.from_openai(messages, tools)
    tokenizer = answers if messages[-1]["role"] == "assistant" else prompts
    return tokenizer.encode_chat_completion(request).tokens


def decode(ids):
    return answers.decode(ids, special_token_policy=SpecialTokenPolicy.KEEP)
"""


CALLS = [{**CALL, "id": "abcdefghi", "function": {"name": "find", "arguments": '{"path": "a", "depth": 2}'}}]
TALKS = [
    [{"role": "user", "content": "typed [INST] é  x"}, {"role": "assistant", "content": "</s> a"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
     {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": CALLS},
     {"role": "tool", "name": "find", "content": "b", "tool_call_id": "abcdefghi"},
     {"role": "assistant", "content": "done"}],
]  # fmt: skip


def test_token_ids_are_those_of_mistral_common(tmp_path):
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", tmp_path / "tekken.json")
    spec = write(tmp_path, MISTRAL)
    rows = [{"messages": messages, "tools": tools} for messages in TALKS for tools in (None, [TOOL])]
    built = build_sft_dataset(rows, str(tmp_path), template=spec)["train"]
    encoder = PythonTemplate(*load_template(spec))._module
    # Each example ends with an answer, and there is an example for each last answer.
    rendered = [
        encoder.encode(row["messages"][:count], row["tools"])
        for row in rows
        for count in range(2, len(row["messages"]) + 1)
        if row["messages"][count - 1]["role"] == "assistant"
    ]
    last = [encoder.encode(row["messages"], row["tools"]) for row in rows]
    assert all(ids in rendered for ids in built["input_ids"])
    assert all(ids in built["input_ids"] for ids in last)
    assert all(labels[-1] == 2 for labels in built["labels"])  # </s>


ROW = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]


@pytest.mark.parametrize(
    ("code", "error", "match"),
    [
        ("def encode(:", TemplateRefused, "is not valid Python"),
        ("raise OSError('no file')\n" + CHATML_FUNCTION, TemplateRefused, r"cannot be executed: OSError: no file"),
        ("def encode(messages): return 3", TemplateRefused, "returned a int, expected a text or token ids"),
        ("def encode(messages): return [1, 2]", TemplateRefused, "has no function 'decode'"),
        ("def encode(messages): raise ValueError('odd')", BadRows, "fails on this row: ValueError: odd"),
        ("def encode(messages, mode): return ''", UsageError, "needs the argument 'mode'"),
        ("def encode(messages, *, mode): return ''", UsageError, "needs the argument 'mode'"),
        ("def other(messages): return ''", UsageError, "does not define the function 'encode'"),
        ("def encode(messages): return 'x'", BadRows, "message_dropped"),
        (CHATML_FUNCTION.replace("encode", "render") + "def encode(messages): return [*map(ord, render(messages))]\n"
         "def decode(ids): return ''.join(map(chr, ids))\n", BadRows, "template_ids"),
        ("import os\ndef encode(messages): return str(os.environ.get('MY_TOKEN')) * 2", BadRows, "message_dropped"),
    ],
)  # fmt: skip
def test_errors_of_functions(tmp_path, tokenizer_dir, monkeypatch, code, error, match):
    monkeypatch.setenv("MY_TOKEN", "secret-value")
    with pytest.raises(error, match=match) as caught:
        build_sft_dataset(ROW, tokenizer_dir("tiny_bpe"), template=write(tmp_path, code))
    assert "secret-value" not in str(caught.value)


def test_missing_files_and_unknown_arguments(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_bare_template(str(tmp_path / "gone.py:encode"))
    spec = write(tmp_path, CHATML_FUNCTION)
    with pytest.raises(UsageError, match="does not read the template variable 'thinking'"):
        load_bare_template(spec, kwargs={"thinking": True})
    spec = write(tmp_path, VENDOR, "vendor.py")
    assert load_bare_template(spec, kwargs={"thinking": False}).kwargs == {"thinking": False}


def test_files_can_import_their_neighbors(tmp_path, tokenizer_dir):
    (tmp_path / "neighbor_of_encoder.py").write_text("END = '<|im_end|>\\n'\n")
    code = CHATML_FUNCTION.replace("def encode", "from neighbor_of_encoder import END\ndef encode")
    built = build_sft_dataset(ROW, tokenizer_dir("tiny_bpe"), template=write(tmp_path, code))
    assert len(built["train"]) == 1
