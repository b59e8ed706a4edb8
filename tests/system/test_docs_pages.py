"""Docs: the examples of a page are run in order in one folder; `test_docs.py` checks the others."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import PAGES, ROOT, blocks, commands
from vision import save_colors, save_vision_model

from ftdata import convert

FTDATA = Path(sys.executable).parent / "ftdata"
LONG = {
    "docs/train.md", "docs/start/training.md", "docs/recipes.md", "docs/trainers/trl.md", "docs/data.md",
    # The same steps with another format as in the pages of LLaMA-Factory and of exports.
    *(f"docs/trainers/{name}.md" for name in ("axolotl", "data-libraries", "litgpt", "mlx-lm", "ms-swift", "nemo")),
    *(f"docs/trainers/{name}.md" for name in ("rl-frameworks", "tinker", "torchtune")),
    # Previews, as in the pages of tokens and of prompt templates.
    "docs/concepts/turns.md", "docs/concepts/masks.md", "docs/howto/thinking-and-tools.md",
    # Builds and trainings, as in `tests/train` and in `examples/`.
    "docs/howto/preference-pairs.md", "docs/howto/images.md", "docs/trainers/pytorch.md", "docs/trainers/transformers.md",
    # Commands that `tests/cli` runs.
    "docs/howto/share.md", "docs/migrate.md", "docs/start/library.md", "docs/masks.md",
}  # fmt: skip
"""Pages whose commands other pages or `examples/` run as well."""


def run_pages():
    for page in PAGES:
        if any(kind in ("console", "python") for kind, _, _ in blocks(page)):
            yield pytest.param(page, marks=pytest.mark.long if page in LONG else ())


@pytest.fixture
def place(tmp_path, llama, page):
    """A folder with the files that the pages mention."""
    shutil.copytree(llama, tmp_path / "MODEL")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    rows = json.loads((ROOT / "examples" / "faq.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "held_out.json").write_text(json.dumps(rows[:2]))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    (tmp_path / "chats.csv").write_text("question,answer\nWhen?,Now.\n")
    said = ("What is 2?", "It is two.", "And 3?", "Three.")
    talk = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, said, strict=True)]
    thinks = [{**one, "reasoning_content": "So."} if one["role"] == "assistant" else one for one in talk]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    calls = [talk[0], call, {"role": "tool", "content": "2"}, talk[1]]
    for name, messages in (("chats", talk), ("thoughts", thinks), ("tools", calls)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "conversations.json").write_text(json.dumps([talk] * 4))
    if page == "docs/howto/images.md":
        save_vision_model("qwen", tmp_path / "VISION-MODEL")
        save_colors(tmp_path, 12).rename(tmp_path / "photos.jsonl")
    translations = [{"instruction": f"第{n}年召迴朝廷。\n翻譯成文言文：", "output": "明年召還。"} for n in range(20)]
    (tmp_path / "translations.json").write_text(json.dumps(translations))
    (tmp_path / "chats").mkdir()
    packed = gzip.compress(json.dumps({"messages": talk}).encode())
    (tmp_path / "chats" / "a.jsonl.gz").write_bytes(packed)
    convert(str(tmp_path / "data.json"), str(tmp_path / "tables.parquet"))
    return tmp_path


@pytest.fixture(scope="session")
def environment(hub_environment, hub_python, tmp_path_factory):
    """The environment of a page, with `ftdata` and `python` on the `PATH`."""
    folder = tmp_path_factory.mktemp("programs")
    for name, arguments in (("python", ()), ("ftdata", (FTDATA,))):
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(hub_python(*arguments))} "$@"\n')
        (folder / name).chmod(0o755)
    return {**hub_environment, "PATH": os.pathsep.join((str(folder), str(FTDATA.parent), hub_environment["PATH"]))}


@pytest.mark.train
@pytest.mark.parametrize("page", list(run_pages()))
def test_examples_of_a_page_run_and_print_their_output(page, place, environment):
    """Run commands and Python blocks, compare the printed output, and write the named files."""
    for language, name, text in blocks(page):
        if name:
            (place / name).write_text(text)
        elif language == "console":
            for command, printed in commands(text):
                assert_is_printed(printed, run_command(["bash", "-c", command], place, environment))
        elif language == "python":
            run_command(["python", "-c", text], place, environment)


def run_command(command, folder, environment):
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        input="Hello?\n",
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def assert_is_printed(shown, printed):
    """Assert that the shown lines are printed in order; `...` stands for any lines."""
    if shown.strip():
        pattern = r"[\s\S]*".join(re.escape(part.strip()) for part in re.split(r"^\.\.\.$", shown, flags=re.MULTILINE))
        assert re.fullmatch(pattern, printed.strip()), printed
