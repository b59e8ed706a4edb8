"""Tiny versions of the hub models and data sets that the examples and the docs use."""

import gzip
import json
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import tiny_model
from hub.server import serving
from tokenizer_makers import tiny_bpe

LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MODELS = {
    "google/gemma-2b": ("gemma", None, {"bos": "<bos>", "eos": "<eos>"}),
    "google/gemma-2-9b-it": ("gemma2", GEMMA, {"bos": "<bos>", "eos": "<eos>", "pad": None}),
    "NousResearch/Llama-2-7b-chat-hf": ("llama", LLAMA_2, {"bos": "<s>", "eos": "</s>"}),
    "facebook/opt-350m": ("opt", None, {"bos": "</s>", "eos": "</s>"}),
    "EleutherAI/pythia-70m": ("gpt_neox", None, {"eos": "<|endoftext|>", "pad": None}),
}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def chat(n):
    texts = (f"What is {n}?", f"It is {n}.", "Sure?", "Yes.")
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=True)]


@contextmanager
def small_hub(folder):
    """Serve these models and data sets; yield the environment variables that point to the server."""
    with serving() as (server, address):
        for name, (kind, template, tokens) in MODELS.items():
            model = tiny_model(tiny_bpe(folder / "models" / kind, template, **tokens), kind)
            server.add(name, {path.name: path.read_bytes() for path in Path(model).iterdir()}, kind="models")
        texts = [{"text": f"<s>[INST] What is {n}? [/INST] It is {n}. </s>"} for n in range(12)]
        server.add("mlabonne/guanaco-llama2-1k", {"data/train-00000-of-00001.parquet": parquet(texts)})
        chats = [{"prompt": "q", "prompt_id": str(n), "messages": chat(n)} for n in range(12)]
        splits = ("train_sft", "test_sft", "train_gen", "test_gen")
        configs = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in splits)
        card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{configs}---\n"
        tables = {f"data/{split}-00000-of-00001.parquet": parquet(chats) for split in splits}
        server.add("HuggingFaceH4/ultrachat_200k", {"README.md": card, **tables})
        code = [
            {"instruction": f"Add {n} and 1.", "input": "x" * (n % 2), "output": f"print({n} + 1)"} for n in range(60)
        ]
        server.add("sahil2801/CodeAlpaca-20k", {"code_alpaca_20k.json": json.dumps(code)})
        faq = [{"question": f"How can I do {n}?", "answer": f"There are {n} ways to do it."} for n in range(20)]
        tables = {"data/train-0.parquet": parquet(faq[:18]), "data/test-0.parquet": parquet(faq[18:])}
        server.add("lamini/lamini_docs", tables)
        c4 = lines([{"text": f"Page {n}.", "url": "u", "timestamp": "2019-04-25T12:57:54Z"} for n in range(9)])
        server.add("allenai/c4", {"en/c4-train.00000-of-01024.json.gz": gzip.compress(c4.encode())})
        server.add("tatsu-lab/alpaca", {"data/train-0.parquet": parquet(code)})
        home = {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
        yield {"HF_ENDPOINT": address, **home}
