"""G23: a resumed run equals an uninterrupted run; damaged checkpoints and changed inputs are reported."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import mostly_long

from ftdata import build_sft_dataset
from ftdata.config import load_config
from ftdata.errors import InputRefused, UsageError

pytest.importorskip("trl")
pytestmark = pytest.mark.train

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from ftdata.train import checkpoints, run  # noqa: E402

ROWS = [
    {"question": f"What is {a}?", "answer": f"{a}, {b} and {c}"}
    for a, b, c in zip("abcdefgh", "ijklmnop", "qrstuvwx", strict=True)
]
SETTINGS = {
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 10,
}
DROPOUT = {"lora": {"r": 4, "dropout": 0.3}}


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture(scope="module")
def whole(llama, data, tmp_path_factory):
    """An uninterrupted run with dropout, so that the random state matters."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(data, model=llama, output_dir=folder, settings=SETTINGS, **DROPOUT)
    return folder


@pytest.fixture
def interrupted(whole, tmp_path):
    """A copy of the run in its state after step 6."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-8")
    shutil.rmtree(folder / "model")
    about = json.loads((folder / "run.json").read_text())
    kept = {name: about[name] for name in ("ftdata", "fingerprint", "setup")}
    (folder / "run.json").write_text(json.dumps({**kept, "finished": False}))
    return folder


def losses(folder):
    about = json.loads((folder / "run.json").read_text())
    assert about["finished"]
    return about["loss"]


def weights(folder):
    return load_file(next((folder / "model").glob("*.safetensors")))


def same(one, other):
    assert losses(one) == losses(other)
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(checkpoint):
    path = checkpoint / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path)


DAMAGES = {
    "weights cut": lambda last: cut(last / "adapter_model.safetensors"),
    "weights zeroed in place": zeroed,
    "optimizer cut": lambda last: cut(last / "optimizer.pt"),
    "optimizer missing": lambda last: (last / "optimizer.pt").unlink(),
    "scheduler missing": lambda last: (last / "scheduler.pt").unlink(),
    "random state missing": lambda last: (last / "rng_state.pth").unlink(),
    "trainer's state missing": lambda last: (last / "trainer_state.json").unlink(),
    "an empty newer checkpoint": lambda last: last.with_name("checkpoint-7").mkdir(),
    "no seal": lambda last: (last / checkpoints.SEAL).unlink(),
    "a seal that is no seal": lambda last: (last / checkpoints.SEAL).write_text('{"files": 3}'),
}
TELLING_DAMAGES = "weights zeroed in place", "optimizer missing", "an empty newer checkpoint", "a seal that is no seal"


@pytest.mark.parametrize("damage", mostly_long(DAMAGES, *TELLING_DAMAGES))
def test_damaged_checkpoint_is_skipped(whole, interrupted, damage, capsys):
    DAMAGES[damage](interrupted / "checkpoint-6")
    run(interrupted, resume=True)
    same(interrupted, whole)
    said = capsys.readouterr().err
    assert "skipped" in said
    assert not (interrupted / "checkpoint-7").exists()


def test_checkpoint_of_another_run_is_skipped(whole, interrupted, llama, data, tmp_path, capsys):
    run(data, model=llama, output_dir=tmp_path / "other", settings={**SETTINGS, "learning_rate": 1e-3}, **DROPOUT)
    shutil.rmtree(interrupted / "checkpoint-6")
    shutil.copytree(tmp_path / "other" / "checkpoint-6", interrupted / "checkpoint-6")
    run(interrupted, resume=True)
    same(interrupted, whole)
    assert "it belongs to another run" in capsys.readouterr().err


def test_resumed_run_equals_the_uninterrupted_run(whole, interrupted, capsys):
    run(interrupted, resume=True)
    same(interrupted, whole)
    assert "skipped" not in capsys.readouterr().err


def test_run_without_a_valid_checkpoint_is_refused(interrupted):
    for path in interrupted.glob("checkpoint-*"):
        (path / "optimizer.pt").unlink()
    with pytest.raises(InputRefused, match="checkpoint-6: optimizer.pt is missing; checkpoint-4"):
        run(interrupted, resume=True)


class Opens:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickle_with_code_is_refused_despite_a_valid_seal(interrupted, tmp_path):
    last = interrupted / "checkpoint-6"
    torch.save(Opens(str(tmp_path / "ran")), last / "optimizer.pt")
    about = json.loads((interrupted / "run.json").read_text())
    checkpoints.write_seal(last, checkpoints.CheckpointSeal(about["fingerprint"], about["setup"]))
    with pytest.raises(InputRefused, match="unsafe_checkpoint"):
        run(interrupted, resume=True)
    assert not (tmp_path / "ran").exists()


CHANGES = {
    "data": lambda folder, given: write(Path(given["source"]), [*ROWS[:7], {"question": "x", "answer": "y"}]),
    "template": lambda folder, given: given.update(template="question_answer"),
    "max_length": lambda folder, given: given.update(max_length=40, overlong="truncate"),
    "mask": lambda folder, given: given.update(train_on="all"),
    "rank": lambda folder, given: given.update(lora={"r": 8, "dropout": 0.3}),
    "learning rate": lambda folder, given: given.update(settings={**SETTINGS, "learning_rate": 1e-3}),
    "model": lambda folder, given: given.update(model=other_weights(folder, given["model"])),
    "model's configuration": lambda folder, given: given.update(model=other_config(folder, given["model"])),
}


def other_weights(folder, model):
    shutil.copytree(model, folder / "other")
    path = folder / "other" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    return str(folder / "other")


def other_config(folder, model):
    shutil.copytree(model, folder / "other")
    path = folder / "other" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.3}))
    return str(folder / "other")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_resume_with_changed_inputs_is_refused(llama, interrupted, tmp_path, change):
    source = write(tmp_path / "data.jsonl")
    given = {"source": source, "model": llama, "output_dir": interrupted, "settings": SETTINGS, **DROPOUT}
    change(tmp_path, given)
    before = sorted(path.name for path in interrupted.rglob("*"))
    with pytest.raises(InputRefused, match="(run|data)_differs"):
        run(given.pop("source"), resume=True, **given)
    assert sorted(path.name for path in interrupted.rglob("*")) == before


def test_settings_without_effect_on_training_may_change(llama, data, interrupted, whole, tmp_path):
    """Another path of the same model, evaluation and data loading settings, and an explicit default."""
    shutil.copytree(llama, tmp_path / "elsewhere")
    more = {
        "per_device_eval_batch_size": 2,
        "dataloader_num_workers": 1,
        "lr_scheduler_type": "linear",
    }
    given = {
        "model": str(tmp_path / "elsewhere"),
        "output_dir": interrupted,
        "settings": {**SETTINGS, **more},
        **DROPOUT,
    }
    run(data, resume=True, **given)
    same(interrupted, whole)


@pytest.fixture(scope="module")
def stopped(llama, data, tmp_path_factory):
    """A run that ended when the metric stopped improving."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    settings = {"num_train_epochs": 40, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.05}
    settings |= {"per_device_train_batch_size": 2, "logging_steps": 1, "save_total_limit": 50}
    return run(data, model=llama, output_dir=folder, test_size=2, early_stopping=3, settings=settings)


def mark_unfinished(folder, *without):
    for name in without:
        shutil.rmtree(folder / name)
    about = json.loads((folder / "run.json").read_text())
    kept = {name: about[name] for name in ("ftdata", "fingerprint", "setup")}
    (folder / "run.json").write_text(json.dumps({**kept, "finished": False}))


def test_early_stopping_patience_is_resumed(stopped, tmp_path):
    about = json.loads((stopped / "run.json").read_text())
    assert about["steps"] < 100
    for patience in (None, 2):
        with pytest.raises(UsageError, match="stopped improving"):
            run(stopped, resume=True, early_stopping=patience)
    # Killed when patience was used up already, it has nothing left to train.
    shutil.copytree(stopped, tmp_path / "late")
    mark_unfinished(tmp_path / "late", "model")
    run(tmp_path / "late", resume=True)
    same(tmp_path / "late", stopped)
    # From where the run was moved to.
    shutil.copytree(stopped, tmp_path / "moved")
    mark_unfinished(tmp_path / "moved", f"checkpoint-{about['steps']}")
    run(tmp_path / "moved", resume=True)
    again = json.loads((tmp_path / "moved" / "run.json").read_text())
    assert (again["steps"], again["best_step"]) == (about["steps"], about["best_step"])
    assert again["test_loss"] == about["test_loss"]
    same(tmp_path / "moved", stopped)


def test_damaged_best_checkpoint_is_not_used(stopped, tmp_path, capsys):
    about = json.loads((stopped / "run.json").read_text())
    shutil.copytree(stopped, tmp_path / "run")
    mark_unfinished(tmp_path / "run")
    weights = tmp_path / "run" / f"checkpoint-{about['best_step']}" / "model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    run(tmp_path / "run", resume=True)
    assert "the best checkpoint before it is" in capsys.readouterr().err
    same(tmp_path / "run", stopped)


def test_run_without_a_checkpoint_restarts_with_the_same_command(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    mark_unfinished(tmp_path / "run", *(path.name for path in checkpoints.list_checkpoints(tmp_path / "run")), "model")
    run(tmp_path / "run", resume=True)
    same(tmp_path / "run", whole)


def test_resume_refuses_options_of_the_data(interrupted, llama, tmp_path):
    build_sft_dataset(ROWS, llama, packing="bfd", max_length=64, output_dir=tmp_path / "packed")
    with pytest.raises(UsageError, match="options cannot change: packing"):
        run(tmp_path / "packed", model=llama, output_dir=tmp_path / "run", settings=["pack=null"])
    with pytest.raises(UsageError, match="contains no run to resume"):
        run(tmp_path / "nowhere", resume=True)
    for options in ({"template": "zephyr"}, {"max_length": 16}, {"limit": 3}, {"train_on": "all"}):
        with pytest.raises(UsageError, match="already_built"):
            run(interrupted, resume=True, **options)


def test_resume_after_the_last_step_trains_no_step(whole, tmp_path):
    """Also if the last step is in the middle of an epoch."""
    for steps, last in ((8, 8), (6, 6)):
        folder = tmp_path / str(steps)
        shutil.copytree(whole, folder)
        mark_unfinished(
            folder, *(path.name for path in checkpoints.list_checkpoints(folder) if int(path.name[11:]) > last), "model"
        )
        run(folder, resume=True, settings={"max_steps": steps})
        assert json.loads((folder / "run.json").read_text())["steps"] == steps
        assert losses(folder) == losses(whole)[:steps]
        left, right = load_file(folder / f"checkpoint-{steps}" / "adapter_model.safetensors"), weights(folder)
        assert all(torch.equal(left[name], right[name]) for name in left)
    with pytest.raises(UsageError, match="cannot be resumed in another folder"):
        run(whole, output_dir=tmp_path / "other", resume=True)


def test_resume_with_more_steps_updates_the_configuration(interrupted):
    run(interrupted, resume=True, settings={"max_steps": 10})
    assert load_config(interrupted / "config.yaml").train["max_steps"] == 10
    assert "max_steps: 10" in (interrupted / "model" / "README.md").read_text()


def test_resume_with_another_tokenizer_is_refused(llama, interrupted, tmp_path, data):
    shutil.copytree(llama, tmp_path / "other")
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text(template.read_text().replace("\n", "\n ") + " ")
    given = {"model": llama, "output_dir": interrupted, "settings": SETTINGS, **DROPOUT}
    with pytest.raises(InputRefused, match="data_differs"):
        run(data, tokenizer=str(tmp_path / "other"), resume=True, **given)


KILLED = """
import os, signal, sys
from ftdata.train import checkpoints, run
from ftdata.train.runs import trainer

point, at = sys.argv[1], int(sys.argv[2])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if point == "before the seal":
    seal = checkpoints.write_seal
    checkpoints.write_seal = lambda path, *rest: die() if path.name == f"checkpoint-{at}" else seal(path, *rest)
elif point == "before the old one goes":
    remove = trainer.shutil.rmtree
    trainer.shutil.rmtree = lambda path, **how: die() if str(path).endswith(f"checkpoint-{at}") else remove(path, **how)
elif point == "in a step":
    step = trainer.BuildTrainer.training_step
    def stepped(self, *rest):
        if self.state.global_step == at:
            die()
        return step(self, *rest)
    trainer.BuildTrainer.training_step = stepped
run(*eval(sys.argv[3]), **eval(sys.argv[4]))
"""


@pytest.mark.parametrize(
    ("point", "at", "lost"),
    [
        ("in a step", 5, 4),
        pytest.param("before the seal", 6, 4, marks=pytest.mark.long),
        pytest.param("before the old one goes", 4, 6, marks=pytest.mark.long),
        pytest.param("in a step", 3, 2, marks=pytest.mark.long),
    ],
)
def test_killed_run_loses_only_the_steps_since_the_last_checkpoint(
    training_python, llama, data, whole, tmp_path, point, at, lost, capsys
):
    settings = {**SETTINGS, "save_total_limit": 1}
    given = {"model": llama, "output_dir": str(tmp_path / "run"), "settings": settings, **DROPOUT}
    call = training_python("-c", KILLED, point, at, repr((data,)), repr(given))
    assert subprocess.run(call, check=False, capture_output=True).returncode == -signal.SIGKILL
    sound = [path for path in checkpoints.list_checkpoints(tmp_path / "run") if checkpoints.find_damage(path) is None]
    assert sound[-1].name == f"checkpoint-{lost}"
    run(tmp_path / "run", resume=True)
    same(tmp_path / "run", whole)


@pytest.mark.long
def test_run_killed_at_any_time_resumes_with_one_command(llama, data, whole, tmp_path):
    """SIGKILL from outside, a little later each time, until the run is complete."""
    command = [sys.executable, "-m", "ftdata", "train", data, "-m", llama, "-o", str(tmp_path / "run")]
    options = [f"--set={name}={value}" for name, value in {**SETTINGS, "save_steps": 1}.items()]
    options += ["--set=lora.r=4", "--set=lora.dropout=0.3"]
    resume, patience, killed = [], 6.0, 0
    for _ in range(20):
        target = (
            [sys.executable, "-m", "ftdata", "train", str(tmp_path / "run"), *resume]
            if resume
            else [*command, *options]
        )
        process = subprocess.Popen(target, stderr=subprocess.PIPE)
        try:
            _, said = process.communicate(timeout=patience)
            assert process.returncode == 0, said
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
        patience += 0.7
        resume = ["--resume"] if checkpoints.list_checkpoints(tmp_path / "run") else []
        if not resume:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert killed
    same(tmp_path / "run", whole)


def test_interrupt_prints_the_resume_command(training_python, llama, data, tmp_path):
    command = training_python("-m", "ftdata", "train", data, "-m", llama, "-o", tmp_path / "run")
    command += ["--set=num_train_epochs=100000", "--set=save_strategy=steps", "--set=save_steps=1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint-*/ftdata.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    while True:
        # As a person does: where Python is in the middle of forgetting something, it passes over an interrupt.
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=15)
            break
        except subprocess.TimeoutExpired:
            assert time.monotonic() < deadline + 120
    assert process.returncode == 130
    assert f"resume with: ftdata train {tmp_path / 'run'} --resume" in said
    assert "Traceback" not in said
