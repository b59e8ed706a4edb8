"""Added tokens that the configuration of a tokenizer without `tokenizer.json` declares are used or refused, never lost."""

import json
import re
import shutil

import pytest
from tokenizer_makers import CHATML
from vendor_tokenizers import MISTRAL, make_folder, write_ranks

from ftdata import audit, build_sft_dataset, encode
from ftdata.errors import FtdataError, TemplateRefused
from ftdata.tokenizing.load import load_tokenizer

MESSAGES = [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "a fox"}]


def declare(tokens, **options):
    return {str(id_): {"content": text, "special": True, **options} for text, id_ in tokens.items()}


@pytest.mark.parametrize("name", ["bpe", "unigram"])
@pytest.mark.parametrize("special", [True, False])
def test_declared_tokens_are_encoded(name, special, tmp_path):
    make_folder(name, tmp_path / "model")
    size = load_tokenizer(str(tmp_path / "model")).size
    tokens = {"<|im_start|>": size, "<|im_end|>": size + 1, "<think>": size + 2}
    config = {
        "added_tokens_decoder": declare(tokens, special=special),
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    (example,) = encode([MESSAGES[0], {"role": "assistant", "content": "<think>x"}], tmp_path / "model")
    ids = example.input_ids.tolist()
    assert [ids.count(id_) for id_ in (size, size + 1)] == [2, 2]
    # A token that is not special is ordinary text, which a row can contain, except for control tokens.
    assert ids.count(size + 2) == (0 if special else 1)


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_tokens_of_older_folders_are_read(name, tmp_path):
    make_folder(name, tmp_path / "model")
    size = load_tokenizer(str(tmp_path / "model")).size
    (tmp_path / "model" / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 1, "<|im_start|>": size}))
    config = {
        "additional_special_tokens": ["<|im_start|>"],
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": CHATML,
    }
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    (example,) = encode(MESSAGES, tmp_path / "model")
    assert example.labels.tolist().count(size + 1) == 1
    assert load_tokenizer(str(tmp_path / "model")).added_tokens["<|im_start|>"] == (size, True)


def test_declared_tokens_of_qwen_are_added_to_the_known_ones(tmp_path):
    make_folder("qwen", tmp_path / "model", {"added_tokens_decoder": declare({"<|tool|>": 3300})})
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert [loaded.token_to_id(text) for text in ("<|im_end|>", "<|tool|>")] == [3002, 3300]


def test_gap_in_a_bpe_model_is_allowed(tmp_path):
    make_folder("bpe", tmp_path / "model", {"added_tokens_decoder": declare({"<|a|>": 390, "<|b|>": 401})})
    assert load_tokenizer(str(tmp_path / "model")).added_tokens["<|b|>"] == (401, True)


@pytest.mark.parametrize(("legacy", "prefixes"), [(True, 2), (False, 0), (None, 2)])
def test_space_after_control_tokens(legacy, prefixes, tmp_path):
    """Without a `tokenizer_config.json`, other files do not change where a space is added."""
    make_folder("unigram", tmp_path / "model", None if legacy is None else {"legacy": legacy, "add_bos_token": False})
    (tmp_path / "model" / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    loaded = load_tokenizer(str(tmp_path / "model"))
    (tokens,) = loaded.encode(["</s>the</s>fox"])
    assert [loaded.id_to_token(id_).startswith("▁") for id_ in tokens.ids.tolist()].count(True) == prefixes


def test_prefix_can_be_disabled(tmp_path):
    for name in ("bpe", "unigram"):
        make_folder(name, tmp_path / name, {"add_prefix_space": False})
        loaded = load_tokenizer(str(tmp_path / name))
        (tokens,) = loaded.encode(["the dog"])
        assert not loaded.id_to_token(int(tokens.ids[0])).startswith("▁")


def test_unknown_characters_are_encoded_as_the_unknown_token(tmp_path):
    config = {"chat_template": "{% for m in messages %}{{ m.content }}</s>{% endfor %}"}
    make_folder("unigram without bytes", tmp_path / "model", config)
    rows = [{"messages": [MESSAGES[0], {"role": "assistant", "content": "fox 🙂 the"}]}]
    built = build_sft_dataset(rows, tmp_path / "model")
    assert "unknown_token" in [one.code for one in audit(rows, tmp_path / "model").findings]
    unknown = load_tokenizer(str(tmp_path / "model")).token_to_id("<unk>")
    assert unknown in built["train"][0]["labels"]
    assert "encodes as its unknown token" in str(built.report)
    # The text of the token itself is not an unknown character.
    template = "{% for m in messages %}<unk>{{ m.content }}</s>{% endfor %}"
    (example,) = encode(MESSAGES, tmp_path / "model", template)
    assert unknown in example.input_ids.tolist()
    assert "unknown_token" not in example.flags


CASES = [
    ("tokenizer.model.v3", {"added_tokens_decoder": declare({"<tool_call>": 10})}, "'<tool_call>' has the id 10, which is the id of"),
    ("bpe", {"added_tokens_decoder": declare({"<|im_start|>": 1, "<|im_end|>": 2})}, "the id 1, which is the id of '<s>'"),
    ("bpe", {"added_tokens_decoder": declare({"<a>": 400})  | declare({"</s>": 401})}, "'</s>' has the ids 2 and 401"),
    ("bpe", {"eos_token": "<|im_end|>"}, "names the token '<|im_end|>', which has no id"),
    ("bpe", {"additional_special_tokens": ["<|x|>"]}, "names the token '<|x|>', which has no id"),
    ("unigram", {"extra_special_tokens": {"a_token": "<|x|>"}}, "names the token '<|x|>', which has no id"),
    ("unigram", {"added_tokens_decoder": declare({"<a>": 5000})}, "do not follow its .* pieces without a gap"),
    ("unigram", {"added_tokens_decoder": declare({"</s>": 2}, rstrip=True)}, "rstrip: true, which sentencepiece does not support"),
    ("bpe", {"added_tokens_decoder": {"5": {"content": "<a>", "special": "false"}}}, "special of token 5 is 'false'"),
    ("bpe", {"added_tokens_decoder": {"-1": {"content": "<a>"}}}, "the id -1 is out of range"),
    ("bpe", {"added_tokens_decoder": {"99999999999": {"content": "<a>"}}}, "is out of range"),
    ("bpe", {"added_tokens_decoder": {"400": {"content": ""}}}, "is no text"),
    ("bpe", {"added_tokens_decoder": {"400": {"content": "\ud800"}}}, "is invalid"),
    ("tekken_240911", {"added_tokens_decoder": declare({"<|x|>": 3})}, "which is the id of '\\[INST\\]'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "message"), CASES)
def test_contradictions_are_refused(name, config, message, tmp_path):
    if name == "tokenizer.model.v3":
        (tmp_path / "model").mkdir()
        shutil.copy(MISTRAL / "mistral_instruct_tokenizer_240323.model.v3", tmp_path / "model" / name)
        (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        make_folder(name, tmp_path / "model", config)
    with pytest.raises(TemplateRefused) as caught:
        load_tokenizer(str(tmp_path / "model"))
    assert re.search(message, str(caught.value))
    assert caught.value.hint


def write_tekken(folder, change):
    data = json.loads((MISTRAL / "tekken_240911.json").read_bytes())
    data["vocab"] = data["vocab"][:1000]
    data["config"]["default_vocab_size"] = 2000
    change(data)
    (folder / "tekken.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["config"].update(version="v99"),
        lambda data: data["config"].pop("version"),
        lambda data: data.update(special_tokens=5),
        lambda data: data["config"].update(pattern="("),
        lambda data: data["config"].update(pattern=None),
        lambda data: data.update(vocab=[]),
        lambda data: data["vocab"].reverse(),
        lambda data: data["config"].update(default_num_special_tokens=0),
        lambda data: data["config"].update(default_vocab_size=1100),
    ],
)
def test_damaged_tekken_files_are_refused(change, tmp_path):
    write_tekken(tmp_path, change)
    with pytest.raises(TemplateRefused, match=r"tekken.json cannot be used"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("line", [b"YQ== 5", b"YWFhYWFh -3", b"YWFhYWFh 99999999999", None])
def test_damaged_tiktoken_files_are_refused(line, tmp_path):
    if line is None:
        (tmp_path / "qwen.tiktoken").write_bytes(b"")
    else:
        write_ranks(tmp_path / "qwen.tiktoken", lines=[line])
    with pytest.raises(TemplateRefused, match=r"qwen.tiktoken cannot be used"):
        load_tokenizer(str(tmp_path))


def test_several_files_are_refused(tmp_path):
    for name in ("qwen.tiktoken", "other.tiktoken"):
        write_ranks(tmp_path / name)
    with pytest.raises(FtdataError, match=r"several tokenizers: other.tiktoken, qwen.tiktoken"):
        load_tokenizer(str(tmp_path))
