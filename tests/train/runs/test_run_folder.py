"""Files that a run directory may contain before a run starts."""

import json
import subprocess

import pytest

from ftdata.errors import StorageError, UsageError

pytest.importorskip("trl")

from ftdata.train import dry_run, run
from ftdata.train.checkpoints import lock_run

pytestmark = pytest.mark.train

ROW = {"question": "q", "answer": "a"}


@pytest.mark.parametrize("name", ["config.yaml", "run.json.tmp", "loss.svg", "model"])
def test_links_in_a_run_directory_are_refused(llama, tmp_path, name):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / ("precious" if "." in name else ""))
    with pytest.raises(StorageError, match="workspace_link"):
        run([ROW], model=llama, output_dir=tmp_path / "run", settings={"max_steps": 1})
    assert (tmp_path / "precious").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "run"]


def test_only_one_process_trains_in_a_run_directory(training_python, llama, tmp_path):
    """The process that holds the lock is a separate process: a file lock of the same process would not be refused."""
    folder = tmp_path / "run"
    code = f"""
import pathlib, sys
from ftdata.train.checkpoints import lock_run
with lock_run(pathlib.Path({str(folder)!r})):
    print("locked", flush=True)
    sys.stdin.read()
"""
    command = training_python("-c", code)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match="run_in_use.*another process is training"):
            run([ROW], model=llama, output_dir=folder, settings={"max_steps": 1})
        assert [path.name for path in folder.iterdir()] == [".lock"]
        other.communicate("")
    assert not folder.exists()
    assert run([ROW], model=llama, output_dir=folder, settings={"max_steps": 1}) == folder
    assert not (folder / ".lock").exists()


def test_failed_run_leaves_no_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="stopped"), lock_run(tmp_path / "run"):
        raise ValueError("stopped")
    assert not (tmp_path / "run").exists()


def test_estimate_is_possible_for_a_directory_with_a_run(llama, tmp_path):
    folder = run([ROW], model=llama, output_dir=tmp_path / "run", settings={"max_steps": 1})
    estimate, [note] = dry_run([ROW], model=llama, output_dir=folder)
    assert estimate.steps > 0
    assert note.startswith("training cannot start yet: ")
    assert "already contains a run" in note


def test_model_folder_is_not_a_run_directory(llama):
    with pytest.raises(UsageError, match="contains a model"):
        run([ROW], model=llama, output_dir=llama, settings={"max_steps": 1})


def test_resuming_with_fewer_steps_is_refused(llama, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    settings = {"max_steps": 3}
    folder = run(tmp_path / "rows.jsonl", model=llama, output_dir=tmp_path / "run", settings=settings)
    with pytest.raises(UsageError, match="has already trained 3 steps, but the settings allow 2"):
        run(folder, resume=True, settings={"max_steps": 2})


def test_estimate_states_the_rows_that_are_left_out(llama, tmp_path):
    rows = [{"question": f"q {n}", "answer": "a " * (200 if n == 0 else 2)} for n in range(10)]
    estimate, [note] = dry_run(rows, model=llama, output_dir=tmp_path / "run", max_length=64, packing="bfd")
    assert note.startswith("left out: 1 of 10 rows (10.0%)")
    assert (estimate.examples, estimate.rows < 9) == (9, True)
    assert "packs with 9 examples" in str(estimate)
