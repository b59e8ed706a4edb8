"""The examples run unchanged; a hub on localhost serves tiny models and data under their names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub.small import chat, small_hub

pytest.importorskip("trl")
pytestmark = pytest.mark.train

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with small_hub(tmp_path_factory.mktemp("hub")) as environment:
        yield environment


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
    assert "FLOP per step" in said
    assert "after:" in said
    run = about(tmp_path / "out" / "company_faq_5_steps")
    assert (run["steps"], run["estimate"]["rows"]) == (5, 18)
    assert len((tmp_path / "out" / "company_faq.jsonl").read_text().splitlines()) == 18


def test_notebook_runs(hub, tmp_path):
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
