"""Merging: the adapter is added in float32 and rounded once; a model with a large error is not written."""

import json
import subprocess

import pytest

from ftdata.errors import InputRefused, UsageError

pytest.importorskip("trl")
pytestmark = pytest.mark.train

import torch  # noqa: E402
import transformers as hf  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from ftdata.train import merge, run  # noqa: E402
from ftdata.train.inference import merge_adapter  # noqa: E402

SETTINGS = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.05, "logging_steps": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"It is {n}."}) + "\n" for n in range(6)))
    return str(path)


@pytest.fixture(scope="module")
def base(llama, tmp_path_factory):
    """A base model in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "bfloat16"
    hf.AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapted(base, data, tmp_path_factory):
    return run(data, model=base, output_dir=tmp_path_factory.mktemp("runs") / "run", lora={"r": 4}, settings=SETTINGS)


def test_adapter_is_merged_in_float32_and_rounded_once(adapted, base, tmp_path):
    found = merge(adapted, tmp_path / "merged")
    assert (found.dtype, found.limit) == ("bfloat16", 5e-2)
    assert 0 < found.error < found.limit
    right = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    right = PeftModel.from_pretrained(right, str(adapted / "model")).merge_and_unload().state_dict()
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(weight.dtype is torch.bfloat16 for weight in saved.values())
    assert all(torch.equal(weight, right[name].to(torch.bfloat16)) for name, weight in saved.items())
    whole = merge(adapted, tmp_path / "whole", dtype="float32")
    assert whole.error < 1e-5 < found.error
    assert hf.AutoConfig.from_pretrained(tmp_path / "whole").dtype is torch.float32


def test_merge_error_is_measured_on_the_saved_model_and_ordinary_tokens(adapted, base, tmp_path):
    found = merge(adapted, tmp_path / "merged")
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer(merge_adapter._TEXT, add_special_tokens=False).input_ids])
    ordinary = [id_ for id_ in range(len(tokenizer)) if id_ not in tokenizer.all_special_ids]
    tuned = PeftModel.from_pretrained(
        hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapted / "model"
    )
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.inference_mode():
        before, after = (model(ids).logits[0][:, ordinary] for model in (tuned, merged))
    assert found.error == pytest.approx(float((after - before).abs().max() / before.abs().max()), rel=1e-3)


def test_merge_error_above_the_limit_stops_and_leaves_no_output(adapted, tmp_path, monkeypatch):
    monkeypatch.setitem(merge_adapter.LIMITS, "bfloat16", 1e-9)
    with pytest.raises(
        InputRefused, match=r"merge_error.*times the largest.*Fix: merge with --dtype float32"
    ) as refused:
        merge(adapted, tmp_path / "merged")
    assert refused.value.exit_code == 3
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr(merge_adapter, "_logits", lambda *_: torch.tensor([float("nan")]))
    with pytest.raises(InputRefused, match="merge_error"):
        merge(adapted, tmp_path / "merged", dtype="float32")
    with pytest.raises(UsageError, match="unknown_dtype"):
        merge(adapted, tmp_path / "merged", dtype="int8")


def test_merge_command_prints_dtype_error_and_limit(training_python, adapted, tmp_path):
    command = training_python("-m", "ftdata", "merge", adapted, "-o", tmp_path / "m")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "in bfloat16" in done.stdout
    assert "(limit 0.05)" in done.stdout
