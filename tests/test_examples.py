"""The examples as they stand, with the names of their models and data, from a hub on localhost that serves tiny ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_model
from hub.server import serving
from makers import tiny_bpe

pytest.importorskip("trl")
pytestmark = pytest.mark.train

EXAMPLES = Path(__file__).parents[1] / "examples"
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


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Every model and data set that the examples name, small."""
    with serving() as (server, address):
        for name, (kind, template, tokens) in MODELS.items():
            folder = tiny_model(tiny_bpe(tmp_path_factory.mktemp("models") / kind, template, **tokens), kind)
            server.add(name, {path.name: path.read_bytes() for path in Path(folder).iterdir()}, kind="models")
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
        server.add("allenai/c4", {"en/c4-train.00000-of-01024.json.gz": __import__("gzip").compress(c4.encode())})
        server.add("tatsu-lab/alpaca", {"data/train-0.parquet": parquet(code)})
        home = tmp_path_factory.mktemp("home")
        yield {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}


def example(hub, folder, name, *options):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | hub
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *options]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment, "COLUMNS": "200"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def about(folder):
    found = json.loads((folder / "run.json").read_text())
    assert found["finished"]
    return found


TRANSLATIONS = [
    {"instruction": f"第{n}年召迴朝廷，他很高興。\n翻譯成文言文：", "output": f"明年召還，{n}。"} for n in range(20)
]


def test_a_translation(hub, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(TRANSLATIONS, ensure_ascii=False))
    said = example(hub, tmp_path, "translate", "--epochs", "1")
    assert "SacreBLEU" in said
    run = about(tmp_path / "out" / "translate")
    assert (run["adapter"], run["setup"]["quantization"], run["steps"]) == (True, "nf4", 9)
    assert run["perplexity"] > 1


@pytest.mark.parametrize("shape", ["guanaco", "ultrachat"])
def test_b_text_field(hub, tmp_path, shape):
    said = example(hub, tmp_path, "text_field", "--shape", shape)
    assert "What is 0?" in said
    run = about(tmp_path / "out" / "text_field" / shape)
    assert run["adapter"]
    assert ("12 rows of" in said) == (shape == "ultrachat")
    assert run["stops"] == ["</s>"]


def test_c_conversations(hub, tmp_path):
    (tmp_path / "conversations.json").write_text(json.dumps([chat(n) for n in range(10)]))
    said = example(hub, tmp_path, "conversations", "--epochs", "1", "--max-length", "400")
    assert "> And what did I just ask?" in said
    run = about(tmp_path / "out" / "conversations")
    assert run["options"]["train_on"] == "assistant"


def test_d_code_alpaca(hub, tmp_path):
    said = example(hub, tmp_path, "code_alpaca", "--epochs", "1", "--rows", "4", "--max-new-tokens", "24")
    run = about(tmp_path / "out" / "code_alpaca")
    assert "SacreBLEU" in said
    assert run["estimate"]["rows"] == 24
    assert (tmp_path / "out" / "code_alpaca" / "eval.html").is_file()


def test_e_company_faq(hub, tmp_path):
    said = example(hub, tmp_path, "company_faq", "--max-steps", "5")
    assert "Page 0." in said
    assert "FLOP a step" in said
    assert "after:" in said
    run = about(tmp_path / "out" / "company_faq_5_steps")
    assert (run["steps"], run["estimate"]["rows"]) == (5, 18)
    assert len((tmp_path / "out" / "company_faq.jsonl").read_text().splitlines()) == 18


def test_the_notebook_runs(hub, tmp_path):
    import nbclient
    import nbformat

    (tmp_path / "data.json").write_text(json.dumps(TRANSLATIONS, ensure_ascii=False))
    notebook = nbformat.read(EXAMPLES / "train.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = parameters.source.replace("EPOCHS = 3", "EPOCHS = 1")
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    before = {name: os.environ.get(name) for name in hub}
    os.environ.update(hub)
    try:
        client.execute()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    kinds = [output.output_type for cell in notebook.cells for output in cell.get("outputs", ())]
    assert "error" not in kinds
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    assert any("image/png" in data for data in shown)
    assert sum("text/html" in data for data in shown) >= 2
    assert about(tmp_path / "out")["steps"] == 9
