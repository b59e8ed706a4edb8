"""Files that a run directory may contain before a run starts."""

import pytest

from ftdata.errors import StorageError

pytest.importorskip("trl")

from ftdata.train import run

pytestmark = pytest.mark.train


@pytest.mark.parametrize("name", ["config.yaml", "run.json.tmp", "loss.svg", "model"])
def test_links_in_a_run_directory_are_refused(llama, tmp_path, name):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / ("precious" if "." in name else ""))
    with pytest.raises(StorageError, match="workspace_link"):
        run([{"question": "q", "answer": "a"}], model=llama, output_dir=tmp_path / "run", settings={"max_steps": 1})
    assert (tmp_path / "precious").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "run"]
