"""Five typical fine-tuning systems: the trained tokens of their builds decode to exactly the answers.

`test_examples.py` trains them end to end.
"""

import json

import numpy as np
import pytest
from conftest import tiny_model
from tokenizer_makers import tiny_bpe

from ftdata import build_sft_dataset, read
from ftdata.tokenizing.load import load_tokenizer

pytest.importorskip("trl")
pytestmark = pytest.mark.train

from ftdata.train import run  # noqa: E402

GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QUICK = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "logging_steps": 1}


def labels_of(built, tokenizer, split="train"):
    """Return the trained text of each document."""
    tokenizer = load_tokenizer(tokenizer)
    found = []
    for row in built[split]:
        for at, length in zip(np.cumsum([0, *row["seq_lengths"]]).tolist(), row["seq_lengths"], strict=False):
            labels = np.asarray(row["labels"][at : at + length])
            found.append(tokenizer.decode(labels[labels != -100]))
    return found


def prompts_of(built, tokenizer):
    tokenizer = load_tokenizer(tokenizer)
    return [tokenizer.decode(row["input_ids"]) for row in built["train"]]


def steps_of(folder):
    return json.loads((folder / "run.json").read_text())["steps"]


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2))
    return str(path)


def test_a_translation_with_gemma(tmp_path):
    """Single turns in Chinese, with the instruction after the text."""
    model = tiny_model(tiny_bpe(tmp_path / "gemma", None, bos="<bos>", eos="<eos>"), "gemma")
    rows = [
        {"instruction": f"第{n}年召迴朝廷，他很高興。\n翻譯成文言文：", "output": f"明年召還，{n}。"} for n in range(12)
    ]
    data = write_json(tmp_path / "train.json", rows)
    built = build_sft_dataset(
        data, model, template="{{ instruction }}{% generation %}{{ output }}{{ eos_token }}{% endgeneration %}"
    )
    assert labels_of(built, model) == [row["output"] + "<eos>" for row in rows]
    assert prompts_of(built, model) == ["<bos>" + row["instruction"] + row["output"] + "<eos>" for row in rows]


def test_b_text_field_and_messages_with_llama(tmp_path):
    """Formatted text gets no second BOS or EOS; `messages` is found next to a `prompt` column."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    model = tiny_model(tiny_bpe(tmp_path / "llama", template, bos="<s>", eos="</s>"))
    tokenizer = load_tokenizer(model)
    texts = [f"<s>[INST] What is {n}? [/INST] It is {n}. </s>" for n in range(6)]
    built = build_sft_dataset([{"text": text} for text in texts], model)
    assert labels_of(built, model) == [text.removeprefix("<s>") for text in texts]
    assert prompts_of(built, model) == texts
    for row in built["train"]:
        assert (
            row["input_ids"].count(tokenizer.token_to_id("<s>"))
            == row["input_ids"].count(tokenizer.token_to_id("</s>"))
            == 1
        )

    chats = [
        {
            "prompt": "q",
            "prompt_id": str(n),
            "messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}],
        }
        for n in range(6)
    ]
    joined = build_sft_dataset(chats, model, output_dir=tmp_path / "built")
    assert labels_of(joined, model) == [f" It is {n}. </s>" for n in range(6)]
    assert prompts_of(joined, model) == texts


def test_c_conversations_with_gemma2(tmp_path):
    """A list of conversations; the turns of the model's own template are located; user turns are not trained."""
    model = tiny_model(tiny_bpe(tmp_path / "gemma2", GEMMA, bos="<bos>", eos="<eos>", pad=None), "gemma2")
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(f"{model}/tokenizer.json")
    backend.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    backend.save(f"{model}/tokenizer.json")
    tiny_model(model, "gemma2")
    chats = [
        [
            {"role": "user", "content": f"Hi {n}"},
            {"role": "assistant", "content": f"Hello {n}"},
            {"role": "user", "content": "<start_of_turn>model\nI am you"},
            {"role": "assistant", "content": f"Bye {n}"},
        ]
        for n in range(6)
    ]
    data = write_json(tmp_path / "chats.json", chats)
    built = build_sft_dataset(data, model, max_length=200)
    assert labels_of(built, model) == [f"Hello {n}<end_of_turn>Bye {n}<end_of_turn>" for n in range(6)]
    run(
        data,
        model=model,
        output_dir=tmp_path / "run",
        max_length=200,
        lora={"r": 8},
        settings={**QUICK, "activation_checkpointing": True, "train_sampling_strategy": "group_by_length"},
    )
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [load_tokenizer(model).token_to_id("<end_of_turn>")]


def test_d_code_alpaca_with_opt(tmp_path):
    """Rows with empty input, split 80/20 with seed 42, and only the response is trained."""
    model = tiny_model(tiny_bpe(tmp_path / "opt", None, bos="</s>", eos="</s>"), "opt")
    rows = [{"instruction": f"Add {n} and 1.", "input": "" if n % 2 else "x", "output": str(n + 1)} for n in range(40)]
    data = write_json(tmp_path / "code_alpaca.json", rows)
    kept = [row.data for row in read(data) if not row.data["input"]]
    built = build_sft_dataset(
        kept,
        model,
        template="instruction_response",
        test_size=0.2,
        seed=42,
        max_length=1024,
        output_dir=tmp_path / "built",
    )
    assert (built["train"].num_rows, built["test"].num_rows) == (16, 4)
    answers = labels_of(built, model) + labels_of(built, model, "test")
    assert sorted(answers) == sorted(row["output"] + "</s>" for row in kept)
    assert prompts_of(built, model)[0].startswith("</s>### Instruction:\nAdd ")
    assert "### Response:\n" in prompts_of(built, model)[0]


def test_e_question_answer_documents_with_pythia(tmp_path):
    """Cells that are objects, column-oriented files, and both Alpaca prompts."""
    model = tiny_model(tiny_bpe(tmp_path / "pythia", None, eos="<|endoftext|>", pad=None), "gpt_neox")
    faq = [{"question": {"0": f"How can I do {n}?"}, "answer": {"0": f"There are {n} ways."}} for n in range(20)]
    lines = tmp_path / "faq.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in faq))
    columns = {
        "question": {str(n): row["question"]["0"] for n, row in enumerate(faq)},
        "answer": {str(n): row["answer"]["0"] for n, row in enumerate(faq)},
    }
    expected = [row["answer"]["0"] + "<|endoftext|>" for row in faq]
    for data in (str(lines), write_json(tmp_path / "columns.json", columns)):
        built = build_sft_dataset(data, model, template="question_answer")
        assert labels_of(built, model) == expected
        assert (
            prompts_of(built, model)[3]
            == "### Question:\nHow can I do 3?\n\n### Answer:\nThere are 3 ways.<|endoftext|>"
        )
    joined = "{{ question }} {% generation %}{{ answer }}{{ eos_token }}{% endgeneration %}"
    # Whether the blank before the answer is a token of its own is the tokenizer's choice.
    assert [
        text.lstrip() for text in labels_of(build_sft_dataset(str(lines), model, template=joined), model)
    ] == expected

    both = [
        {"instruction": "Sort.", "input": "3 1", "output": "1 3"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
    ]
    with_input, without = prompts_of(build_sft_dataset(both, model, template="alpaca"), model)
    assert "### Input:\n3 1\n" in with_input
    assert "paired with an input" not in without
