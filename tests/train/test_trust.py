"""G17: code and pickles in models and runs are not executed."""

import json
import shutil

import pytest

from ftdata.errors import InputRefused, UsageError

pytest.importorskip("trl")
pytestmark = pytest.mark.train

import torch  # noqa: E402
import transformers as hf  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from ftdata.train import compare, generate, run  # noqa: E402
from ftdata.train.model.load import load_model  # noqa: E402

QUICK = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"It is {n}."}) + "\n" for n in range(8)))
    return str(path)


def test_remote_code_is_refused(llama, data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    (model / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('ran')\nclass Own: pass\n")
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    with pytest.raises(InputRefused, match="remote_code"):
        run(data, model=str(model), output_dir=tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_run_directory_cannot_declare_itself_trusted(llama, data, tmp_path):
    """A run and its checkpoints may be untrusted; their own `trust_remote_code` is ignored."""
    folder, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(llama, base)
    run(data, model=str(base), output_dir=folder, settings=QUICK)
    about, config = json.loads((folder / "run.json").read_text()), json.loads((base / "config.json").read_text())
    assert not about["trust_remote_code"]
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    for model in (base, folder / "model"):
        (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('ran')\nclass Own: pass\n")
        (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    about["setup"]["weights"] = None
    (folder / "run.json").write_text(json.dumps({**about, "trust_remote_code": True}))
    for ask in (lambda: generate(folder, ["one"]), lambda: compare(folder)):
        with pytest.raises(InputRefused, match="remote_code"):
            ask()
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + "\ntrust_remote_code: true\n")
    (folder / "run.json").write_text(json.dumps({**about, "finished": False}))
    with pytest.raises((InputRefused, UsageError)):
        run(folder, resume=True)
    assert not (tmp_path / "ran").exists()


def test_weights_must_be_complete_safetensors(llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    index = model / "model.safetensors.index.json"
    for files in (["pytorch_model.bin"], ["../model.safetensors"], ["/etc/passwd"], [3], None, "x"):
        index.write_text(
            json.dumps({"weight_map": dict.fromkeys(map(str, files), files[0]) if isinstance(files, list) else files})
        )
        with pytest.raises(InputRefused, match="weights_index"):
            load_model(str(model))
    index.unlink()
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputRefused, match=r"missing_weights.*model.layers.0.self_attn.q_proj.weight"):
        load_model(str(model))


def test_pickled_weights_are_not_read(llama, data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    (model / "model.safetensors").unlink()
    torch.save(hf.AutoModelForCausalLM.from_pretrained(llama).state_dict(), model / "pytorch_model.bin")
    with pytest.raises(InputRefused, match="no_safetensors|no_model"):
        run(data, model=str(model), output_dir=tmp_path / "run")
