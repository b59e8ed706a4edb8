"""The same ids as transformers: for chat templates, prompt templates and text, with every tokenizer."""

import os

import pytest
from cases import long
from conftest import SHARED
from tokenizer_makers import MAKERS

from ftdata import build_sft_dataset, encode
from ftdata.errors import BadRow
from ftdata.tokenizing.load import load_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.train

SHARED_NAMES = (
    sorted(p.name for p in (SHARED / "tokenizers").iterdir()) if (SHARED / "tokenizers").is_dir() else ["none"]
)
SHARED_FOLDERS = [pytest.param(f"shared/{name}", marks=[pytest.mark.shared, pytest.mark.long]) for name in SHARED_NAMES]
SLOW = ("deepseek", "mistral")
FOLDERS = [*(long(name) if name in SLOW else name for name in MAKERS), *SHARED_FOLDERS]
CHATS = [
    [("user", "Hi"), ("assistant", "Hello!")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    [("user", " padded\n"), ("assistant", "\n\n café e\u0301 年 👩‍👩‍👧 ")],
    [("user", "<s> </s> <|im_end|> [INST]"), ("assistant", "{{ 7*7 }} <eos>")],
]
TEXTS = ["hello world", " leading", "年號", "<s>[INST] a [/INST] b</s>", "é e\u0301\r\n\ttab"]


@pytest.fixture
def folder(request, tokenizer_dir):
    name = request.param
    return (
        str(SHARED / "tokenizers" / name.removeprefix("shared/")) if name.startswith("shared/") else tokenizer_dir(name)
    )


@pytest.mark.parametrize("folder", FOLDERS, indirect=True)
def test_chat_templates_give_the_same_ids(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    if not theirs.chat_template:
        pytest.skip("this tokenizer has no chat template")
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        try:
            (ours,) = encode(messages, folder, turns="joint", control_tokens="allow")
        except BadRow as refusal:
            assert refusal.code in {"history_drift", "message_dropped"}
            continue
        assert ours.text == theirs.apply_chat_template(messages, tokenize=False)
        assert ours.input_ids.tolist() == theirs.apply_chat_template(messages, return_dict=False)
        (by_object,) = encode(messages, theirs, turns="joint", control_tokens="allow")
        assert by_object.input_ids.tolist() == ours.input_ids.tolist()


@pytest.mark.parametrize("folder", FOLDERS, indirect=True)
def test_prompt_templates_and_text_give_the_same_ids(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    eos = ours.special_tokens["eos_token"]
    template = "{{ prompt }}{% generation %}{{ completion }}{{ eos_token }}{% endgeneration %}"
    for text in TEXTS:
        if not text.rstrip().endswith(eos):
            (row,) = build_sft_dataset([{"text": text}], folder)["train"]
            assert row["input_ids"] == expected(theirs, ours, text + eos)
        (row,) = build_sft_dataset(
            [{"prompt": text, "completion": "x y"}], folder, template=template, control_tokens="allow"
        )["train"]
        assert row["input_ids"] == expected(theirs, ours, text + "x y" + eos)


def expected(theirs, ours, text):
    """Return the ids of transformers, without a second BOS if the text starts with one."""
    ids = theirs(text).input_ids
    bos = ours.special_tokens.get("bos_token")
    if bos and text.startswith(bos):
        ids = theirs(text, add_special_tokens=False).input_ids
    return ids


def test_environment_is_unchanged():
    assert "TOKENIZERS_PARALLELISM" not in os.environ
