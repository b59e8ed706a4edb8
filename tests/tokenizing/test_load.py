"""Loading tokenizers: changed tokenizers are reloaded, and damaged ones are refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tokenizer_makers import tiny_bpe

from ftdata import build_sft_dataset, encode
from ftdata.errors import TemplateRefused
from ftdata.tokenizing.load import load_tokenizer


def test_cached_tokenizer_is_reloaded_if_its_files_change(tokenizer_dir, tmp_path):
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
    """Some of these cause a panic in `tokenizers`, which is not an ordinary Python exception."""
    name, change = DAMAGED[damage]
    folder = Path(tiny_bpe(tmp_path / "t"))
    if "template" in damage:
        (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
    talk = [{"role": "user", "content": "a" * 60 + "b"}, {"role": "assistant", "content": "zé"}]
    with pytest.raises(TemplateRefused, match="bad_tokenizer"):
        build_sft_dataset([talk], str(folder))


def transformers_tokenizer(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def remove_a_merge(backend):
    import tokenizers

    known = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in known["merges"]]
    kept = [merge for merge in merges if not "".join(merge).startswith("Ġlazy")]
    assert len(kept) < len(merges)
    backend.model = tokenizers.models.BPE(known["vocab"], kept, unk_token=known["unk_token"])


def lowercase(backend):
    import tokenizers

    backend.normalizer = tokenizers.normalizers.Lowercase()


def add_a_token(backend):
    backend.add_tokens(["lazy dog"])


def split_differently(backend):
    import tokenizers

    parts = tokenizers.pre_tokenizers
    backend.pre_tokenizer = parts.Sequence([parts.Split("z", "isolated"), parts.ByteLevel(add_prefix_space=False)])


@pytest.mark.parametrize("wrapped", [True, False], ids=["transformers", "tokenizers"])
@pytest.mark.parametrize("change", [remove_a_merge, lowercase, add_a_token, split_differently])
def test_tokenizer_object_changed_in_place_is_reloaded(change, wrapped, tokenizer_dir):
    import tokenizers

    folder = tokenizer_dir("tiny_bpe")
    held = transformers_tokenizer(folder) if wrapped else tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    backend = held.backend_tokenizer if wrapped else held
    rows = [{"question": "The lazy dog?", "answer": "The Lazy dog, the lazy dog"}]
    before = build_sft_dataset(rows, held, "chatml")["train"]["input_ids"][:]
    assert build_sft_dataset(rows, held, "chatml")["train"]["input_ids"][:] == before
    change(backend)
    after = build_sft_dataset(rows, held, "chatml")
    fresh = tokenizers.Tokenizer.from_str(backend.to_str())
    expected = build_sft_dataset(rows, fresh, "chatml") if not wrapped else None
    assert after["train"]["input_ids"][:] != before
    assert expected is None or after["train"]["input_ids"][:] == expected["train"]["input_ids"][:]


def swap_words(backend):
    import tokenizers

    words = json.loads(backend.to_str())["model"]["vocab"]
    swapped = dict(zip(words, reversed(words.values()), strict=True))
    backend.model = tokenizers.models.WordLevel(swapped, unk_token="<unk>")


def test_encode_detects_a_changed_vocabulary():
    import tokenizers

    words = {word: id_ for id_, word in enumerate(["<unk>", "a", "b", "c", ":", "\n", "user", "assistant"])}
    held = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    held.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "b a"}]
    source = "{% for m in messages %} {{ m.role }} : {{ m.content }} {% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
    (before,) = encode(messages, held, source)
    swap_words(held)
    (after,) = encode(messages, held, source)
    assert after.input_ids.tolist() == [len(words) - 1 - id_ for id_ in before.input_ids.tolist()]


@pytest.mark.parametrize("change", [lowercase, add_a_token])
def test_encode_detects_a_changed_tokenizer_object(change, tokenizer_dir):
    held = transformers_tokenizer(tokenizer_dir("tiny_bpe"))
    messages = [{"role": "user", "content": "The Lazy dog"}, {"role": "assistant", "content": "lazy dog, The"}]
    (before,) = encode(messages, held)
    change(held.backend_tokenizer)
    (after,) = encode(messages, held)
    assert after.input_ids.tolist() != before.input_ids.tolist()


def test_encode_detects_that_an_added_token_became_special(tokenizer_dir):
    from tokenizers import AddedToken

    held = transformers_tokenizer(tokenizer_dir("tiny_bpe"))
    held.add_tokens(["lazy dog"])
    messages = [{"role": "user", "content": "The"}, {"role": "assistant", "content": "lazy dog, The"}]
    assert (
        build_sft_dataset([{"messages": messages}], held)["train"]["input_ids"][0]
        == encode(messages, held)[0].input_ids.tolist()
    )
    held.add_tokens([AddedToken("lazy dog", special=True)], special_tokens=True)
    built = build_sft_dataset([{"messages": messages}], held)["train"]["input_ids"][0]
    assert encode(messages, held)[0].input_ids.tolist() == built


def test_changed_files_of_equal_size_and_time_are_reloaded(tokenizer_dir, tmp_path):
    folder = tmp_path / "t"
    shutil.copytree(tokenizer_dir("tiny_bpe"), folder)
    one, file = load_tokenizer(folder), folder / "tokenizer.json"
    known, state = file.read_text(), file.stat()
    file.write_text(known.replace('"<|im_end|>"', '"<|xx_end|>"'))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file.stat().st_size == state.st_size
    assert load_tokenizer(folder).fingerprint != one.fingerprint


def with_added(folder, target, **token):
    shutil.copytree(folder, target)
    file = target / "tokenizer.json"
    known = json.loads(file.read_text())
    number = max(one["id"] for one in known["added_tokens"]) + 1
    plain = {
        "id": number,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    known["added_tokens"].append({**plain, **token})
    file.write_text(json.dumps(known))
    return target


@pytest.mark.parametrize("content", [" ", "   ", "\n", "e", "a", "A", "|", "7", " e"])
@pytest.mark.parametrize("flags", [{"special": True}, {"lstrip": True}, {"rstrip": True, "special": True}])
def test_special_tokens_that_are_ordinary_text_are_refused(content, flags, tokenizer_dir, tmp_path):
    """Text is decoded without special tokens, so "a one" would become "aone"."""
    folder = with_added(tokenizer_dir("tiny_bpe"), tmp_path / "t", content=content, **flags)
    with pytest.raises(TemplateRefused, match="ordinary_special_token") as caught:
        build_sft_dataset([{"question": "a one", "answer": "e one  A"}], str(folder))
    assert repr(content) in caught.value.message


@pytest.mark.parametrize("content", [" ", "   ", "\n", "e", "role", "messages", "the", "lazy dog", "|"])
def test_added_words_are_ordinary_text(content, tokenizer_dir, tmp_path):
    """The template contains some of these words, but that does not make them control tokens."""
    import tokenizers

    folder = with_added(tokenizer_dir("tiny_bpe"), tmp_path / "t", content=content)
    messages = [
        {"role": "user", "content": "the role of messages | e"},
        {"role": "assistant", "content": "e   role\nmessages the lazy dog | x"},
    ]
    (example,) = encode(messages, str(folder))
    alone = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert example.input_ids.tolist() == alone.encode(example.text, add_special_tokens=False).ids
    assert alone.decode(example.input_ids.tolist(), skip_special_tokens=False) == example.text
    assert "control_tokens" not in example.flags


@pytest.mark.parametrize("content", ["<x>", "best,", "a-b"])
def test_text_equal_to_a_stripping_token_keeps_its_whitespace(content, tokenizer_dir, tmp_path):
    folder = with_added(tokenizer_dir("tiny_bpe"), tmp_path / "t", content=content, lstrip=True, rstrip=True)
    text = f"The lazy {content}  dog"
    messages = [{"role": "user", "content": "The"}, {"role": "assistant", "content": text}]
    (example,) = encode(messages, folder, "chatml")
    assert load_tokenizer(folder).decode(example.input_ids[example.trained].tolist()).startswith(text)
    assert "control_tokens" in example.flags
