"""Models whose tokenizer has no `tokenizer.json`: the saved model encodes texts to the ids of the training."""

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


@pytest.mark.parametrize("name", ["kimi", "unigram"])
def test_saved_model_has_the_tokenizer_of_the_training(name, tmp_path):
    tokens = {"kimi": {"bos_token": "[BOS]", "eos_token": "<|im_end|>"}, "unigram": {}}[name]
    make_folder(
        name,
        tmp_path / "base",
        {**tokens, "chat_template": CHATML.replace("<|im_end|>", tokens.get("eos_token", "</s>"))},
    )
    base = tiny_model(str(tmp_path / "base"))
    run = train(ROWS, model=base, output_dir=tmp_path / "run", settings={"max_steps": 1}, test_size=2)
    saved, original = load_tokenizer(str(run / "model")), load_tokenizer(base)
    texts = ["It is  7. ½", "a\n\n b 你好", "  <tool> x"]
    for first, second in zip(saved.encode(texts), original.encode(texts), strict=True):
        assert first.ids.tolist() == second.ids.tolist()
    assert (run / "model" / "tokenizer.json").exists() == (name == "kimi")
    assert saved.chat_template == original.chat_template
    assert len(compare(run, n=2, max_new_tokens=2).rows) == 2
