"""Loading tokenizers: what changed is loaded anew, what is damaged refused."""

import json
from pathlib import Path

import pytest
from makers import tiny_bpe

from ftdata import build_sft_dataset
from ftdata.errors import TemplateRefused
from ftdata.tokenize import load_tokenizer


def test_a_cached_tokenizer_follows_its_files(tokenizer_dir, tmp_path):
    import shutil

    folder = tmp_path / "t"
    shutil.copytree(tokenizer_dir("tiny_bpe"), folder)
    one = load_tokenizer(folder)
    assert load_tokenizer(str(folder)).fingerprint == one.fingerprint
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(folder).chat_template == "{{ messages }}"
    assert load_tokenizer(folder).fingerprint != one.fingerprint


DAMAGED = {
    "a list": ("tokenizer_config.json", lambda _: []),
    "null": ("tokenizer_config.json", lambda _: None),
    "a template that is no text": ("tokenizer_config.json", lambda config: {**config, "chat_template": 5}),
    "a template without a name": ("tokenizer_config.json", lambda config: {**config, "chat_template": [{"name": "x"}]}),
    "an empty vocabulary": ("tokenizer.json", lambda one: {**one, "model": {**one["model"], "vocab": {}}}),
    "no unknown token": ("tokenizer.json", lambda one: {**one, "model": {"type": "Unigram", "vocab": [["a", -1.0]]}}),
    "a slow pattern": ("tokenizer.json", lambda one: {**one, "pre_tokenizer": pattern("(a+)+$")}),
    "no pattern": ("tokenizer.json", lambda one: {**one, "pre_tokenizer": pattern("(")}),
    "no map": (
        "tokenizer.json",
        lambda one: {**one, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    ),
}


def pattern(text):
    return {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_tokenizers_are_refused(damage, tmp_path):
    """In words: some of these end `tokenizers` with a panic, which Python takes for no error."""
    name, change = DAMAGED[damage]
    folder = Path(tiny_bpe(tmp_path / "t"))
    if "template" in damage:
        (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
    talk = [{"role": "user", "content": "a" * 60 + "b"}, {"role": "assistant", "content": "zé"}]
    with pytest.raises(TemplateRefused, match="bad_tokenizer"):
        build_sft_dataset([talk], str(folder))
