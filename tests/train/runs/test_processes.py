"""Training in two processes equals training in one; one process builds and prints."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytestmark = pytest.mark.train

from accelerate.commands.launch import launch_command_parser  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from ftdata.train import run  # noqa: E402

ROWS = [{"question": f"What is {a}?", "answer": f"{a} is number {n}"} for n, a in enumerate("abcdefghijklmnop")]
SETTINGS = {"num_train_epochs": 2, "learning_rate": 5e-3, "logging_steps": 1, "train_sampling_strategy": "sequential"}
OPTIONS = {"packing": "bfd", "max_length": 80, "test_size": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="module")
def together(training_python, data, llama):
    """Train in two processes, as described in the documentation."""

    def train(folder, *more, source=data, **settings):
        torchrun = training_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python")
        command = [*torchrun, *training_python("-m", "ftdata", "train", source, "-m", llama, "-o", folder)]
        command += ["--packing", "bfd", "--max-length", "80", "--test-size", "3", *more]
        settings = {**SETTINGS, "per_device_train_batch_size": 1, **settings}
        command += [f"--set={name}={value}" for name, value in settings.items()]
        environment = {**os.environ, "FTDATA_CACHE": "off", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == 0, done.stderr
        return done

    return train


@pytest.fixture(scope="module")
def two(together, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "two"
    return folder, together(folder)


def test_two_processes_train_the_same_model_as_one(two, data, llama, tmp_path):
    folder, _ = two
    alone = run(
        data,
        model=llama,
        output_dir=tmp_path / "one",
        settings={**SETTINGS, "per_device_train_batch_size": 2},
        **OPTIONS,
    )
    several, one = (json.loads((path / "run.json").read_text()) for path in (folder, alone))
    # What trains in several processes by name, and in one in truth, would be found equal as well.
    assert (several["setup"]["processes"], one["setup"]["processes"]) == (2, 1)
    assert several["fingerprint"] == one["fingerprint"]
    assert several["steps"] == one["steps"] == several["estimate"]["steps"]
    assert several["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert math.isclose(several["test_loss"], one["test_loss"], rel_tol=1e-5)
    left, right = (load_file(path / "model" / "model.safetensors") for path in (folder, alone))
    assert all((left[name] - right[name]).abs().max() < 1e-4 for name in left)


def test_only_one_process_prints(two):
    _, done = two
    assert done.stderr.count("rows     16 read") == 1
    assert done.stderr.count("saved, and checked by reloading: ") == 1


def test_documented_accelerate_commands_are_valid():
    text = (Path(__file__).parents[3] / "docs" / "train.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^accelerate launch (.*?) -m ftdata train run.yaml$", text, re.MULTILINE)
    assert len(commands) == 4
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    asked = {word for command in commands for word in command.split() if word.startswith("--")}
    assert asked <= known


@pytest.mark.long
def test_two_processes_resume_exactly(two, together, tmp_path):
    folder, _ = two
    shutil.copytree(folder, tmp_path / "again")
    last = max((tmp_path / "again").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    together(tmp_path / "again", "--resume")
    assert (
        json.loads((tmp_path / "again" / "run.json").read_text())["loss"]
        == json.loads((folder / "run.json").read_text())["loss"]
    )


@pytest.mark.long
def test_two_processes_stop_together_if_one_fails(together, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "a", "answer": ""}\n')
    with pytest.raises(AssertionError, match="bad_rows"):
        together(tmp_path / "run", source=path)
