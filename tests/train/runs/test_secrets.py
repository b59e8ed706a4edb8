"""A run writes and prints no secret, and it can be resumed without its secret or with a new one."""

import json
import subprocess

import pytest

from ftdata.config import load_config
from ftdata.errors import UsageError
from ftdata.redaction import REDACTED

pytest.importorskip("trl")
pytestmark = pytest.mark.train

from ftdata.train import _resolve, checkpoints, run  # noqa: E402
from ftdata.train.runs import train_model  # noqa: E402

SECRET = "hf_" + "aB3dE6" * 6
WEB = "pa55word"
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"It is {n}."}) + "\n" for n in range(6)))
    return str(path)


@pytest.fixture(scope="module")
def finished(training_python, llama, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    command = training_python("-m", "ftdata", "train", data, "-m", llama, "-o", folder, f"--set=hub_token={SECRET}")
    command += [f"--set={name}={value}" for name, value in SETTINGS.items()]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return folder, done.stdout + done.stderr


def files_with(folder, secret):
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and secret.encode() in path.read_bytes()
    ]


def test_run_directory_and_output_contain_no_token(finished):
    folder, printed = finished
    assert files_with(folder, SECRET) == []
    assert SECRET not in printed
    assert f"hub_token: '{REDACTED}'" in (folder / "config.yaml").read_text()
    card = (folder / "model" / "README.md").read_text()
    assert f"hub_token: '{REDACTED}'" in card
    assert "max_steps: 2" in card
    assert (folder / "checkpoint-2" / "ftdata.json").is_file()


def test_run_resumes_without_its_token_or_with_a_new_one(finished, monkeypatch):
    folder, _ = finished
    config, _ = _resolve(folder, None, None, {}, resume=True)
    assert "hub_token" not in config.train
    assert config.train["max_steps"] == 2
    seen = []
    monkeypatch.setattr(
        train_model,
        "train_model",
        lambda config, build, **how: seen.append((config.train.get("hub_token"), how["notes"])),
    )
    monkeypatch.delenv("HF_TOKEN", raising=False)
    run(folder, resume=True)
    monkeypatch.setenv("HF_TOKEN", "another")
    run(folder, resume=True)
    run(folder, resume=True, settings={"hub_token": "new"})
    (left, (note,)), (env, (from_env,)), (new, none) = seen
    assert (left, env, new, none) == (None, None, "new", ())
    assert "train.hub_token was redacted" in note
    assert "--set train.hub_token=" in note
    assert "taken from HF_TOKEN" in from_env


def test_token_does_not_change_the_identity_of_a_run(finished, tmp_path, capsys):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    run(folder, resume=True, settings={"max_steps": 3})
    assert "train.hub_token was redacted" in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text())["steps"] == 3
    run(folder, resume=True, settings={"max_steps": 4, "hub_token": "hf_" + "zY9" * 12})
    assert json.loads((folder / "run.json").read_text())["steps"] == 4
    assert files_with(folder, "zY9zY9") == []


def test_secrets_are_not_part_of_the_run_setup(tmp_path):
    from ftdata.config import make_config

    values = {"data": "d", "task": "sft", "model": "m", "output_dir": "o"}
    one, other = (
        checkpoints.describe_setup(make_config({**values, "train": {"tracker_api_key": key}}), "", 1)["setup"]
        for key in ("a", "b")
    )
    assert one == other
    checkpoints.write_json_atomically(
        tmp_path / "run.json", {"data": f"https://me:{WEB}@host/d.json", "steps": 2, "stops": ["</s>"]}
    )
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "data": f"https://{REDACTED}@host/d.json",
        "steps": 2,
        "stops": ["</s>"],
    }


def test_credentials_in_data_urls_are_not_in_the_model_card(tmp_path):
    from ftdata.config import make_config
    from ftdata.train.runs.model_card import render_model_card

    config = make_config({"data": f"https://me:{WEB}@host/d.json", "model": "me/model", "output_dir": "o"})
    options = {
        "tokenizer": {"name": "t"},
        "template": {"name": "chatml"},
        "train_on": "assistant",
        "train_parts": None,
        "max_length": 1,
        "packing": None,
    }
    about = {
        "adapter": False,
        "fingerprint": "f",
        "stops": [],
        "steps": 1,
        "loss": [],
        "estimate": {"rows": 1, "tokens": 1, "trained_tokens": 1},
    }
    text = render_model_card(config, about, {"options": options})
    assert WEB not in text
    assert f"https://{REDACTED}@host/d.json" in text


def test_redacted_data_url_is_refused(llama, tmp_path):
    kept = tmp_path / "config.yaml"
    kept.write_text(f"data: https://{REDACTED}@host/d.json\nmodel: {llama}\noutput_dir: {tmp_path / 'out'}\n")
    with pytest.raises(UsageError, match="redacted.*--set data="):
        run(kept)
    config, _ = _resolve(kept, None, None, {"data": "d.json"})
    assert config.data == "d.json"
    assert load_config(kept).model == llama
