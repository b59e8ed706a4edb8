"""The README, word for word, as a new user follows it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory, llama):
    """A folder with the files that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(llama, folder / "MODEL")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copy(ROOT / "examples" / "faq.json", folder / "data.json")
    return folder


def test_the_first_preview_is_what_the_command_prints(place):
    command, expected = re.match(r"\$ ftdata (.*?)\n(.*)", blocks("console")[0], re.DOTALL).groups()
    done = subprocess.run(
        [sys.executable, "-m", "ftdata", *command.split()], cwd=place, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected.strip()


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run(place, number):
    subprocess.run([sys.executable, "-W", "error", "-c", blocks("python")[number]], cwd=place, check=True)


@pytest.mark.train
def test_the_commands_run(place):
    pytest.importorskip("trl")
    quick = {"OMP_NUM_THREADS": "1", **os.environ}
    for line in blocks("console")[1].splitlines():
        command = line.removeprefix("$ ftdata ").partition("#")[0].split()
        done = subprocess.run(
            [sys.executable, "-m", "ftdata", *command],
            cwd=place,
            env=quick,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (line, done.stderr)
    assert "exact match" in done.stdout


def test_the_template_in_the_readme_is_the_built_in_one():
    assert blocks("jinja")[0] == (ROOT / "ftdata" / "templates" / "question_answer.jinja").read_text()


def test_every_command_is_named():
    from ftdata.cli import app

    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert all(f"ftdata {name}" in README for name in commands if name != "plugins")
