"""The examples run unchanged; a hub on localhost serves tiny models and data under their names."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from hub.small import chat
from vision import save_vision_model

pytest.importorskip("trl")
pytestmark = pytest.mark.train

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(hub_environment, hub_python, tmp_path):
    """Run an example in the folder of the test, and return its output."""

    def run(name, *options):
        command = hub_python(EXAMPLES / f"{name}.py", *options)
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=tmp_path, env=hub_environment, timeout=280
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    return run


def about(folder):
    found = json.loads((folder / "run.json").read_text())
    assert found["finished"]
    return found


TRANSLATIONS = [
    {"instruction": f"第{n}年召迴朝廷，他很高興。\n翻譯成文言文：", "output": f"明年召還，{n}。"} for n in range(20)
]


def test_a_translation(example, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(TRANSLATIONS, ensure_ascii=False))
    said = example("translate", "--epochs", "1")
    assert "SacreBLEU" in said
    run = about(tmp_path / "out" / "translate")
    assert (run["adapter"], run["setup"]["quantization"], run["steps"]) == (True, "nf4", 9)
    assert run["perplexity"] > 1


@pytest.mark.parametrize("shape", ["guanaco", pytest.param("ultrachat", marks=pytest.mark.long)])
def test_b_text_field(example, tmp_path, shape):
    said = example("text_field", "--shape", shape)
    assert "What is 0?" in said
    run = about(tmp_path / "out" / "text_field" / shape)
    assert run["adapter"]
    assert ("12 rows of" in said) == (shape == "ultrachat")
    assert run["stops"] == ["</s>"]


@pytest.mark.long  # `test_systems.py` trains the same system
def test_c_conversations(example, tmp_path):
    (tmp_path / "conversations.json").write_text(json.dumps([chat(n) for n in range(10)]))
    said = example("conversations", "--epochs", "1", "--max-length", "400")
    assert "> And what did I just ask?" in said
    run = about(tmp_path / "out" / "conversations")
    assert run["options"]["train_on"] == "assistant"


@pytest.mark.long  # `translate.py` and `company_faq.py` take the same steps
def test_d_code_alpaca(example, tmp_path):
    said = example("code_alpaca", "--epochs", "1", "--rows", "4", "--max-new-tokens", "24")
    run = about(tmp_path / "out" / "code_alpaca")
    assert "SacreBLEU" in said
    assert run["estimate"]["rows"] == 24
    assert (tmp_path / "out" / "code_alpaca" / "eval.html").is_file()


@pytest.mark.long  # `translate.py` and `image_colors.py` take the same steps
def test_e_company_faq(example, tmp_path):
    said = example("company_faq", "--max-steps", "5")
    assert "Page 0." in said
    assert "FLOP per step" in said
    assert "after:" in said
    run = about(tmp_path / "out" / "company_faq_5_steps")
    assert (run["steps"], run["estimate"]["rows"]) == (5, 18)
    assert len((tmp_path / "out" / "company_faq.jsonl").read_text().splitlines()) == 18


def test_f_image_colors(example, tmp_path):
    model = save_vision_model("qwen", tmp_path / "model")
    said = example("image_colors", "--model", model, "--rows", "12", "--epochs", "1")
    assert re.search(r"\[image \d+×\d+ → \d+ tokens\]", said)
    run = about(tmp_path / "out" / "image_colors" / "run")
    assert run["adapter"]
    assert (tmp_path / "out" / "image_colors" / "run" / "model" / "preprocessor_config.json").is_file()


@pytest.mark.long  # the page `docs/concepts/tokens.md` shows the same tokens
def test_tutorial_notebook_runs(tokenizer_dir, tmp_path):
    """`which_tokens.ipynb` shows the tokens of the model that the first cell names."""
    import nbclient
    import nbformat

    notebook = nbformat.read(EXAMPLES / "which_tokens.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = f"TOKENIZER = {tokenizer_dir('qwen')!r}"
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert "error" not in [output.output_type for output in outputs]
    assert sum("text/html" in output.data for output in outputs if "data" in output) >= 5
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    # The reasoning and the answer of both turns are trained once, and each stop token with its turn.
    assert "{} -> 33 trained tokens" in text
    assert "{'train_parts': ['answer']} -> 6 trained tokens" in text
    assert "labels differ: 1" in text


@pytest.mark.long  # the same steps as `translate.py`
def test_notebook_runs(hub_environment, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    (tmp_path / "data.json").write_text(json.dumps(TRANSLATIONS, ensure_ascii=False))
    notebook = nbformat.read(EXAMPLES / "train.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = parameters.source.replace("EPOCHS = 3", "EPOCHS = 1")
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    for name, value in hub_environment.items():
        monkeypatch.setenv(name, value)
    client.execute()
    kinds = [output.output_type for cell in notebook.cells for output in cell.get("outputs", ())]
    assert "error" not in kinds
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    assert any("image/png" in data for data in shown)
    assert sum("text/html" in data for data in shown) >= 2
    assert about(tmp_path / "out")["steps"] == 9
