"""What a build says while it runs: its phases, and what it reuses. `ftdata cache` shows and clears what is kept."""

import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
import warm
from cases import long

from ftdata.cli import output
from ftdata.progress import ProgressUpdate


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"{n}."}) + "\n" for n in range(2000)))
    return path


def run(*arguments, **environment):
    command = warm.python("-m", "ftdata", *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})


def test_reused_work_is_reported_and_the_cache_can_be_cleared(data, tokenizer_dir, tmp_path):
    environment = {"FTDATA_CACHE": str(tmp_path / "cache")}
    build = ("build", data, "-t", tokenizer_dir("tiny_bpe"), "-o")
    assert run(*build, tmp_path / "a", **environment).stderr == ""
    assert "1 of 1 parts of the data come from the cache" in run(*build, tmp_path / "b", **environment).stderr
    size = json.loads(run("cache", "--json", **environment).stdout)
    assert size["folder"] == environment["FTDATA_CACHE"]
    assert size["kinds"]["shards"]["entries"] == 1
    assert 0 < size["bytes"] < size["limit"]
    assert "finished parts of builds" in run("cache", **environment).stdout
    assert "removed" in run("cache", "clear", **environment).stdout
    assert json.loads(run("cache", "--json", **environment).stdout)["bytes"] == 0
    assert run(*build, tmp_path / "c", **environment).stderr == ""
    assert "disabled" in run("cache", FTDATA_CACHE="off").stdout


def test_interrupted_build_resumes(data, tokenizer_dir, tmp_path):
    """After Ctrl-C, the message says how to continue, and the next build reports what it reuses."""
    more = [tmp_path / f"{n}.jsonl" for n in range(4)]
    for number, path in enumerate(more):
        path.write_text(data.read_text().replace("?", f"? {number}"))
    command = [sys.executable, "-m", "ftdata", "build", *more, "-t", tokenizer_dir("tiny_bpe"), "-o", tmp_path / "out"]
    command += ["--workers", "1"]
    stopped = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "FTDATA_FAILPOINT": "rename:3:interrupt"},
        # A background job of a shell ignores SIGINT, and its child processes inherit this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr == "ftdata: interrupted; run the same command again: finished parts of the data are kept\n"
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "of 4 parts of the data were already built" in done.stderr


@pytest.mark.parametrize("columns", [80, long(120)])
def test_terminal_shows_phases_within_its_width(data, tokenizer_dir, tmp_path, columns):
    text = show_on_terminal(
        ["-m", "ftdata", "build", str(data), "-t", tokenizer_dir("tiny_bpe"), "-o", str(tmp_path / "out")],
        columns,
        NO_COLOR="1",
    )
    assert "plan" in text
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)
    lines = [line for line in re.split(r"[\r\n]", text) if "plan" in line or "tokens (" in line]
    assert max(map(len, lines)) <= columns


def show_on_terminal(arguments, columns, code=0, **variables):
    """Return what a command writes to a terminal."""
    parent, child = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment = {**inherited, "COLUMNS": str(columns), "TERM": "xterm", **variables}
    process = subprocess.Popen([sys.executable, *arguments], stdout=child, stderr=child, env=environment)
    os.close(child)
    written = b""
    while True:
        try:
            written += os.read(parent, 1 << 16)
        except OSError:
            break
    os.close(parent)
    assert process.wait() == code, written
    return written.decode()


def test_errors_on_a_terminal_have_colors(tmp_path):
    """The code and the word "Fix" are styled; the text is the same as without a terminal."""
    arguments = ["-m", "ftdata", "preview", str(tmp_path / "data.json")]
    styled = show_on_terminal(arguments, 80, code=2)
    assert re.search(r"\x1b\[1;31mftdata: \[file_not_found\]", styled)
    assert re.search(r"\x1b\[1;32mFix:", styled)
    plain = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False).stderr
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", styled).replace("\r\n", "\n") == plain


def test_log_files_get_a_line_per_interval(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    show = output._LineProgress()
    for now[0], share in ((0.0, 0.0), (4.0, 0.1), (11.0, 0.25), (12.0, 0.26), (25.0, 0.5)):
        show(ProgressUpdate("tokenize", int(4e6 * share), int(2e9 * share), share))
    assert capsys.readouterr().err.splitlines() == [
        "ftdata: tokenize 25% 1.0M rows (91k/s) 500M tokens (45M/s) 0:33 left",
        "ftdata: tokenize 50% 2.0M rows (80k/s) 1.0B tokens (40M/s) 0:25 left",
    ]


def test_counts_fit_on_a_line():
    longest = ProgressUpdate("tokenize", 999_499_999, 999_400_000_000_000, 0.001)
    assert len(output._describe_progress(longest, ProgressUpdate("tokenize"), 300.0)) <= 60


def test_finished_work_of_a_resumed_build_is_not_speed():
    resumed = ProgressUpdate("tokenize", 600_000, 6_000_000, 0.6)
    assert output._describe_progress(resumed, resumed, 0.0) == "600k rows 6.0M tokens"
    later = ProgressUpdate("tokenize", 700_000, 7_000_000, 0.7)
    assert output._describe_progress(later, resumed, 10.0) == "700k rows (10k/s) 7.0M tokens (100k/s) 0:30 left"
