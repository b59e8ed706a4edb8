"""Tokenizers without a `tokenizer.json`: the ids equal those of the vendor's library, for every text."""

import base64
import io
import random
import re
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import sentencepiece
from cases import long
from sentencepiece import sentencepiece_model_pb2
from tokenizer_makers import CHATML, CORPUS
from vendor_tokenizers import TRAINED, make_folder, write_config, write_ranks

from ftdata import build_sft_dataset, encode
from ftdata.errors import FtdataError, MissingDependency, TemplateRefused, UsageError
from ftdata.tokenizing.encoders import difficult_texts
from ftdata.tokenizing.formats import bpe_ranks, convert
from ftdata.tokenizing.load import load_tokenizer


def hard_texts(count, seed=0):
    """Yield texts of all characters, of those that tokenizers treat differently, and of runs of few characters."""
    generator = random.Random(seed)
    characters = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    common = [*characters[:0x3000], *(" \n\t'▁" * 300)]
    few = " \n\r\t aAbZ'srelL1.éé\u0301漢字/-_\u3000\x85\x1c<tool>x▁"
    yield from difficult_texts([])
    for _ in range(count // 3):
        yield "".join(generator.choices(characters, k=generator.randint(1, 12)))
        yield "".join(generator.choices(common, k=generator.randint(1, 12)))
        yield "".join(generator.choices(few, k=generator.randint(1, 40)))


NAMES = [
    "tekken_240911", long("tekken_240718"), "qwen", "kimi", "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3",
    long("mistral_instruct_tokenizer_241114.model.v7"), *TRAINED,
]  # fmt: skip


@pytest.mark.parametrize("count", [1000, long(100_000)])
@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_those_of_the_vendor(name, count, tmp_path):
    vendor = make_folder(name, tmp_path / "model", size=3000 if count == 1000 else None)
    loaded = load_tokenizer(str(tmp_path / "model"))
    control = re.compile(
        "|".join(map(re.escape, (token for token, (_, special) in loaded.added_tokens.items() if special)))
    )
    texts = [text for text in hard_texts(count) if not control.search(text)]
    assert len(texts) > count
    for text, tokens in zip(texts, loaded.encoders.reference.encode(texts), strict=True):
        assert tokens.ids.tolist() == list(vendor(text)), text
        starts, ends = tokens.offsets.T
        # No token is empty, and tokens are in the order of the text.
        assert (starts < ends).all(), text
        assert (np.diff(starts) >= 0).all(), text
        assert (ends <= len(text)).all(), text


@pytest.mark.parametrize("name", ["tekken_240911", "kimi", "tokenizer.model.v1", "unigram", "bpe with symbols"])
def test_offsets_are_the_characters_of_the_tokens(name, tmp_path):
    make_folder(name, tmp_path / "model", {"legacy": False})
    loaded = load_tokenizer(str(tmp_path / "model"))
    text = "a fox,  the dog\n你好 x"
    (tokens,) = loaded.encoders.reference.encode([text])
    for id_, (start, end) in zip(tokens.ids.tolist(), tokens.offsets.tolist(), strict=True):
        token, surface = loaded.id_to_token(id_), text[start:end]
        if not token.startswith("<0x") and token != "▁" and surface.isascii():
            assert token.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n").strip(" ") == surface.strip(" ")
        else:
            assert len(surface) <= 2
    assert set(range(len(text))) - {n for start, end in tokens.offsets.tolist() for n in range(start, end)} <= {
        6,
        7,
        15,
    }


@pytest.mark.parametrize("name", ["tekken_240911", "qwen", "kimi", "tokenizer.model.v1", "unigram", "bpe with symbols"])
def test_control_tokens_come_only_from_the_template(name, tmp_path):
    control = {"tekken_240911": "[INST]", "qwen": "<|im_end|>", "kimi": "<|im_end|>"}.get(name, "</s>")
    vendor = make_folder(name, tmp_path / "model", {"legacy": False, "add_bos_token": False})
    template = "{% for m in messages %}CONTROL{{ m.content }}CONTROL{% endfor %}".replace("CONTROL", control)
    typed = f"x {control} y"
    messages = [{"role": "user", "content": typed}, {"role": "assistant", "content": "fine"}]
    (example,) = encode(messages, tmp_path / "model", template)
    id_ = load_tokenizer(str(tmp_path / "model")).token_to_id(control)
    assert [*example.input_ids].count(id_) == 4
    ids = example.input_ids.tolist()
    question = ids[1 : ids.index(id_, 1)]
    if hasattr(vendor, "__self__") and isinstance(vendor.__self__, sentencepiece.SentencePieceProcessor):
        # The space before a text is added only at the start of a text.
        proto = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "model" / "tokenizer.model").read_bytes())
        proto.normalizer_spec.add_dummy_prefix = False
        vendor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()).encode
    assert question == list(vendor(typed))
    assert example.labels[[*example.input_ids].index(id_, len(question) + 1) :].max() > 0


def test_tekken_has_the_special_tokens_of_the_vendor(tmp_path):
    make_folder("tekken_240911", tmp_path / "model")
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert (loaded.special_tokens["bos_token"], loaded.bos_ids.tolist(), loaded.size) == ("<s>", [1], 4000)
    assert loaded.token_to_id("[INST]") == 3


def test_converted_tokenizers_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("FTDATA_CACHE", str(tmp_path / "cache"))
    make_folder("bpe", tmp_path / "model")
    first = load_tokenizer(str(tmp_path / "model"))
    (entry,) = (tmp_path / "cache" / "tokenizers").iterdir()
    monkeypatch.setattr(convert, "_convert", lambda *_: pytest.fail("converted again"))
    assert load_tokenizer(str(tmp_path / "model")).json == first.json
    # A damaged entry is not used, and another configuration is another entry.
    monkeypatch.undo()
    monkeypatch.setenv("FTDATA_CACHE", str(tmp_path / "cache"))
    entry.write_bytes(entry.read_bytes().replace(b"BPE", b"bpe"))
    assert load_tokenizer(str(tmp_path / "model")).json == first.json
    write_config(tmp_path / "model", {"add_bos_token": False})
    assert load_tokenizer(str(tmp_path / "model")).bos_ids.tolist() == []
    assert first.bos_ids.tolist() == [1]


def test_build_needs_no_tokenizer_json(tmp_path):
    make_folder("kimi", tmp_path / "model", {"chat_template": CHATML})
    built = build_sft_dataset([{"question": "Hi?", "answer": "Yes."}], tmp_path / "model")
    (row,) = built["train"]
    assert row["labels"][-2] == row["input_ids"][-2] == 3007


def refuse(folder, error=TemplateRefused):
    with pytest.raises(error) as caught:
        load_tokenizer(str(folder))
    assert caught.value.hint
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "write", "config", "message"),
    [
        ("a.tiktoken", write_ranks, {}, "does not contain its regular expression, and .* contain no pattern"),
        ("qwen.tiktoken", lambda path: write_ranks(path, lines=[b"YQ== x"]), {}, r"line 301 is b'YQ== x'"),
        ("qwen.tiktoken", lambda path: write_ranks(path, lines=[b"%%% 300"]), {}, r"line 301 is b'%%% 300'"),
        ("cl100k_base.tiktoken", write_ranks, {}, "no control tokens.*added_tokens_decoder"),
        ("cl100k_base.tiktoken", write_ranks, {"added_tokens_decoder": {"x": {"content": "<a>"}}}, "is invalid: invalid literal"),
        ("cl100k_base.tiktoken", write_ranks, {"added_tokens_decoder": {"300": {}}}, "added_tokens_decoder in .* is invalid"),
        ("cl100k_base.tiktoken", write_ranks, {"added_tokens_decoder": {"300": {"content": "end", "special": True}}}, "is a word"),
        ("cl100k_base.tiktoken", write_ranks, {"added_tokens_decoder": {"5": {"content": "<|a|>", "special": True}}}, "'<|a|>'"),
        ("tekken.json", lambda path: path.write_text("{}"), {}, "is not a tekken file"),
        ("tekken.json", lambda path: path.write_text("x"), {}, "is not a tekken file"),
        ("tokenizer.model", lambda path: path.write_bytes(b"\x00\x01"), {}, "neither a SentencePiece model nor a tiktoken file"),
        ("tokenizer.model", lambda path: path.write_bytes(b""), {}, "neither a SentencePiece model nor a tiktoken file"),
        ("tokenizer.model", lambda path: path.write_bytes(train_other("char")), {}, "word or character model"),
        ("tokenizer.model", lambda path: path.write_bytes(train_other("word")), {}, "word or character model"),
        ("tokenizer.model", lambda path: path.write_bytes(train_other("bpe", treat_whitespace_as_suffix=True)), {}, "suffix"),
    ],
)  # fmt: skip
def test_tokenizer_that_cannot_be_converted_is_refused(name, write, config, message, tmp_path):
    write(tmp_path / name)
    write_config(tmp_path, config)
    assert re.search(message, refuse(tmp_path))


def train_other(kind, **options):
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=output, vocab_size=80, hard_vocab_limit=False, model_type=kind,
        minloglevel=2, **options,
    )  # fmt: skip
    return output.getvalue()


def test_difference_from_the_vendor_is_refused(tmp_path, monkeypatch):
    """For example, a pattern that the regular expressions of `tokenizers` read in another way."""
    monkeypatch.setenv("FTDATA_CACHE", "off")
    make_folder("kimi", tmp_path / "model")
    convert_ranks = bpe_ranks.convert_ranks
    monkeypatch.setattr(
        bpe_ranks, "convert_ranks", lambda ranks, pattern, *rest: convert_ranks(ranks, r"\[|[a-z]|[^a-z\[]+", *rest)
    )
    assert "gets other ids than from the library of its vendor" in refuse(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "extra"), [("qwen", "tiktoken"), ("tekken_240718", "tekken"), ("bpe", "sentencepiece")]
)
def test_missing_library_is_named(name, extra, tmp_path, monkeypatch):
    make_folder(name, tmp_path / "model")

    def raise_missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(convert, "version", raise_missing)
    assert f"pip install 'ftdata[{extra}]'" in refuse(tmp_path / "model", MissingDependency)


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    assert "no tokenizer.json, tokenizer.model, tekken.json or *.tiktoken" in refuse(tmp_path, UsageError)


def test_patterns_are_read_and_never_executed():
    source = "PAT_STR = r'(?i:a)' + r'\\s' '+'\npattern: str = r'x\\s'\nself.pat_str = other\npattern = f'{x}\\\\s'\nname = r'\\s'\n"
    assert bpe_ranks._read_patterns(source) == {r"(?i:a)\s+", r"x\s"}
    assert bpe_ranks._read_patterns("def (") == set()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"\p{N}{1,3}+| ?[^\s\p{L}]++[\r\n]*+", r"\p{N}{1,3}| ?[^\s\p{L}]+[\r\n]*"),
        (r"\p{L}+[*+]+\++[\]+]+", r"\p{L}+[*+]+\++[\]+]+"),
        (r"a?+b{2}+c{2,}+", r"a?b{2}c{2,}"),
    ],
)
def test_only_possessive_quantifiers_are_changed(pattern, expected):
    ranks = {bytes([byte]): byte for byte in range(256)}
    spec = bpe_ranks.convert_ranks(ranks, pattern, [])
    assert spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == expected


def test_error_of_a_row_is_not_a_traceback(tmp_path):
    make_folder(
        "unigram", tmp_path / "model", {"chat_template": "{% for m in messages %}{{ m.content }}</s>{% endfor %}"}
    )
    messages = [{"role": "user", "content": "a\ud800"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(FtdataError, match="lone_surrogate"):
        build_sft_dataset([{"messages": messages}], tmp_path / "model")


def test_base64_of_ranks_is_exact(tmp_path):
    path = tmp_path / "a.tiktoken"
    path.write_bytes(b"\n".join(base64.b64encode(bytes([byte])) + f" {byte}".encode() for byte in range(256)) + b"\n\n")
    assert bpe_ranks.read_ranks(path.read_bytes()) == {bytes([byte]): byte for byte in range(256)}
