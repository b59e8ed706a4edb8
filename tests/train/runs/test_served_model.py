"""What a run leaves behind is what a server needs: the saved files give the prompts and the stops of the training."""

import json

import pytest

pytest.importorskip("trl")
pytestmark = pytest.mark.train

from transformers import AutoTokenizer, GenerationConfig  # noqa: E402

from ftdata import encode  # noqa: E402
from ftdata.build.dataset import load_build  # noqa: E402
from ftdata.tokenizing.load import load_tokenizer  # noqa: E402
from ftdata.train import run as train  # noqa: E402
from ftdata.train.inference.prompts import read_documents, split_last_turn  # noqa: E402

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not thinks %}<think></think>\n{% endif %}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is  1 + 2?\n"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "And é?"},
    {"role": "assistant", "content": "4"},
]


@pytest.mark.parametrize(
    ("template", "kwargs", "lora"),
    [(None, None, None), ("chatml", None, {"r": 4}), (THINKS, {"thinks": True}, {"r": 8})],
)
def test_saved_files_render_the_prompts_of_the_training(template, kwargs, lora, llama, tmp_path):
    data = {"template": template, "template_kwargs": kwargs, "lora": lora}
    run = train([{"messages": TALK}] * 4, model=llama, output_dir=tmp_path / "run", settings={"max_steps": 1}, **data)
    saved = AutoTokenizer.from_pretrained(run / "model")
    stops = set(json.loads((run / "model" / "generation_config.json").read_text())["eos_token_id"])
    for ids, labels, _ in read_documents(load_build(run / "data")["train"]):
        prompt, answer = split_last_turn(ids, labels, stops)
        messages = TALK[:4]
        rendered = saved.apply_chat_template(messages, add_generation_prompt=True, **(kwargs or {}))["input_ids"]
        assert rendered == prompt
        assert saved.decode(answer) == "4"
        assert ids[len(prompt) + len(answer)] in stops
    assert GenerationConfig.from_pretrained(run / "model").eos_token_id == sorted(stops)
    # The folder of the model is a tokenizer for ftdata, too, so that `ftdata audit --serve` can use it.
    (example,) = encode(TALK, str(run / "model"), template_kwargs=kwargs)
    assert example.input_ids.tolist() == ids
    assert load_tokenizer(str(run / "model")).chat_template
    card = (run / "model" / "README.md").read_text()
    assert ("--enable-lora" in card) == (lora is not None)
    assert (f"--max-lora-rank {lora['r']}" in card) if lora else ("vllm serve " in card)
    assert ("Send `chat_template_kwargs" in card) == bool(kwargs)
    assert "--serve http://localhost:8000" in card
