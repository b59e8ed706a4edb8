"""G1, G2: each input of the shared bad-input corpus is built exactly, rejected at its line, or refused clearly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
DRIVER = """
import runpy, sys
import badinput_adapter
sys.modules["adapters"] = badinput_adapter
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.shared
@pytest.mark.long
@pytest.mark.timeout(900)
def test_bad_inputs_are_built_exactly_or_refused(shared, tmp_path):
    pytest.importorskip("psutil")  # the harness measures memory with it
    folder, out = shared / "badinput", tmp_path / "verdicts.jsonl"
    command = [
        sys.executable,
        "-c",
        DRIVER,
        str(folder / "harness" / "run.py"),
        "ftdata",
        str(out),
        str(folder / "dev" / "cases"),
    ]
    subprocess.run(command, check=True, cwd=HERE, capture_output=True)
    found = {one["id"]: (one["verdict"], one["detail"]) for one in map(json.loads, out.read_text().splitlines())}
    assert len(found) == 52
    assert {name: said for name, said in found.items() if said[0] not in ("RIGHT", "CLEAR_ERROR")} == {}
