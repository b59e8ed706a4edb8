"""Encoders: the fast encoder gives the same tokens and offsets as the reference, or it is not used."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import long
from hypothesis import given
from hypothesis import strategies as st
from laws import often

from ftdata import build_sft_dataset, preview
from ftdata.build.dataset import write_build
from ftdata.errors import InputRefused
from ftdata.testing import text_strategy
from ftdata.tokenizing import encoders
from ftdata.tokenizing.load import load_tokenizer

ROWS = [{"question": f"q{n} é \u200d👍🏽", "answer": "a\u0301 " * n + "<|im_end|>"} for n in range(1, 40)]
PAIRS = {}


def pair(folder):
    """Return the fast and the reference encoder of a tokenizer."""
    if folder not in PAIRS:
        loaded = load_tokenizer(folder)
        PAIRS[folder] = encoders.load_fast_encoder(loaded.json, loaded.encoders.reference), loaded.encoders.reference
    return PAIRS[folder]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_bpe", "qwen", long("deepseek"), "tiny_prepend", "tiny_replace"])
@often(200)
@given(data=st.data())
def test_fast_encoder_equals_the_reference(tokenizer_dir, name, data):
    fast, reference = pair(tokenizer_dir(name))
    added = st.sampled_from([token for token in load_tokenizer(tokenizer_dir(name)).added_tokens if token])
    given_texts = data.draw(st.lists(st.lists(text_strategy(min_size=0) | added, max_size=4).map("".join), max_size=5))
    assert fast is not None
    assert encoders.find_first_difference(fast, reference, given_texts) is None


@pytest.mark.parametrize("name", ["tiny_metaspace", "tiny_wordpiece"])
def test_unsupported_tokenizers_have_no_fast_encoder(tokenizer_dir, name):
    assert pair(tokenizer_dir(name))[0] is None


def test_comparison_with_difficult_texts_is_cached(tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("FTDATA_CACHE", str(tmp_path))
    loaded, compared = load_tokenizer(tokenizer_dir("tiny_bpe")), []

    def compare(*_):
        compared.append(1)

    monkeypatch.setattr(encoders, "find_first_difference", compare)
    for _ in range(2):
        assert encoders.load_fast_encoder(loaded.json, loaded.encoders.reference)
    assert len(compared) == 1
    (file,) = (tmp_path / "encoders").iterdir()
    file.write_bytes(b"damaged")
    assert encoders.load_fast_encoder(loaded.json, loaded.encoders.reference)
    assert len(compared) == 2
    assert encoders.load_fast_encoder(loaded.json + b" ", loaded.encoders.reference)
    assert len(compared) == 3


@pytest.fixture
def source(tmp_path):
    import json

    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["tiny_bpe", "tiny_prepend", "tiny_replace"])
def test_build_does_not_depend_on_the_encoder(tokenizer_dir, tmp_path, source, monkeypatch, name):
    tiny = load_tokenizer(tokenizer_dir(name))
    used = [write_build(source, replace(tiny), tmp_path / "reference").encoder]
    monkeypatch.setattr(encoders, "FAST_MIN_CHARACTERS", 0)
    used.append(write_build(source, replace(tiny), tmp_path / "fast").encoder)
    monkeypatch.setitem(sys.modules, "fastokens", None)
    used.append(write_build(source, replace(tiny), tmp_path / "none").encoder)
    assert [name.split()[0] for name in used] == ["tokenizers", "fastokens", "tokenizers"]
    assert files(tmp_path / "reference") == files(tmp_path / "fast") == files(tmp_path / "none")


@pytest.mark.parametrize("cache", ["off", "cache"])
def test_differing_fast_encoder_is_not_used(tokenizer_dir, tmp_path, source, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    tiny = load_tokenizer(tokenizer_dir("tiny_bpe"))
    right = write_build(source, replace(tiny), tmp_path / "right")
    encode = encoders.FastEncoder.encode

    def wrong(self, given_texts):
        found = encode(self, given_texts)
        wrong = {number: found[number] for number, text in enumerate(given_texts) if "q39 " in text}
        return found.with_replacements({number: one._replace(ids=np.flip(one.ids)) for number, one in wrong.items()})

    monkeypatch.setattr(encoders, "FAST_MIN_CHARACTERS", 0)
    monkeypatch.setattr(encoders.FastEncoder, "encode", wrong)
    monkeypatch.setenv("FTDATA_CACHE", cache)
    report = write_build(source, replace(tiny), tmp_path / "built")
    # What the other one made is not remembered.
    assert files(tmp_path / "built") == files(tmp_path / "right")
    shutil.rmtree(tmp_path / "built")
    report = write_build(source, replace(tiny), tmp_path / "built")
    assert report.encoder.startswith("tokenizers")
    assert files(tmp_path / "built") == files(tmp_path / "right")
    assert report.fingerprint == right.fingerprint
    with pytest.raises(InputRefused, match="engine_differs"):
        build_sft_dataset(iter(ROWS), replace(tiny))
    (seen,) = preview(source, replace(tiny), n=1).rows
    assert not seen.rejected


def test_fast_encoder_that_differs_on_probe_texts_is_not_loaded(tokenizer_dir, monkeypatch):
    loaded = load_tokenizer(tokenizer_dir("tiny_bpe"))
    monkeypatch.setattr(
        encoders.FastEncoder,
        "encode",
        lambda self, given_texts: self.reference.encode([text.strip() for text in given_texts]),
    )
    assert encoders.load_fast_encoder(loaded.json, loaded.encoders.reference) is None


def test_user_settings_of_the_fast_encoder_take_precedence(tokenizer_dir, monkeypatch):
    loaded, seen = load_tokenizer(tokenizer_dir("tiny_bpe")), []
    monkeypatch.setenv("FASTOKENS_BPE_THREADS", "2")
    monkeypatch.delenv("FASTOKENS_INPUT_CACHE", raising=False)
    compare = encoders.find_first_difference
    notes = lambda *given: seen.append({**os.environ}) or compare(*given)
    monkeypatch.setattr(encoders, "find_first_difference", notes)
    assert encoders.load_fast_encoder(loaded.json, loaded.encoders.reference)
    assert (seen[0]["FASTOKENS_BPE_THREADS"], seen[0]["FASTOKENS_INPUT_CACHE"]) == ("2", "0")
    assert os.environ["FASTOKENS_BPE_THREADS"] == "2"
    assert "FASTOKENS_INPUT_CACHE" not in os.environ
