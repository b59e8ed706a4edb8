"""Models whose tokenizer has no `tokenizer.json`: the saved model encodes texts to the ids of the training."""

import json

import pytest
from tokenizer_makers import CHATML
from vendor_tokenizers import make_folder

pytest.importorskip("trl")
pytestmark = pytest.mark.train

from conftest import tiny_model  # noqa: E402

from ftdata.tokenizing.load import load_tokenizer  # noqa: E402
from ftdata.train import compare  # noqa: E402
from ftdata.train import run as train  # noqa: E402

ROWS = [{"question": f"What is {n} ½?", "answer": f"It is  {n}."} for n in range(8)]


@pytest.mark.parametrize("name", ["kimi", "unigram", "unigram without a configuration"])
def test_saved_model_has_the_tokenizer_of_the_training(name, tmp_path):
    name, _, has_no_config = name.partition(" without ")
    tokens = {"kimi": {"bos_token": "[BOS]", "eos_token": "<|im_end|>"}, "unigram": {}}[name]
    make_folder(
        name,
        tmp_path / "base",
        {**tokens, "chat_template": CHATML.replace("<|im_end|>", tokens.get("eos_token", "</s>"))},
    )
    if has_no_config:
        template = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())["chat_template"]
        (tmp_path / "base" / "tokenizer_config.json").unlink()
        (tmp_path / "base" / "chat_template.jinja").write_text(template)
    base = tiny_model(str(tmp_path / "base"))
    run = train(ROWS, model=base, output_dir=tmp_path / "run", settings={"max_steps": 1}, test_size=2)
    saved, original = load_tokenizer(str(run / "model")), load_tokenizer(base)
    texts = ["</s>It</s> is", "It is  7. ½", "a\n\n b 你好", "  <tool> x"]
    for first, second in zip(saved.encode(texts), original.encode(texts), strict=True):
        assert first.ids.tolist() == second.ids.tolist()
    assert (run / "model" / "tokenizer.json").exists() == (name == "kimi")
    assert saved.chat_template == original.chat_template
    assert len(compare(run, n=2, max_new_tokens=2).rows) == 2
