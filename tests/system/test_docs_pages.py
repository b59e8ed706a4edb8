"""Docs: the examples of a page are run in order in one folder; `test_docs.py` checks the others."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import PAGES, ROOT, blocks, commands
from hub.small import small_hub

LONG = {"docs/train.md", "docs/start/training.md", "docs/recipes.md", "docs/howto/trainer.md"}
"""Pages that train several models; shorter pages or `examples/` cover the same commands."""


def run_pages():
    for page in PAGES:
        if any(kind in ("console", "python") for kind, _, _ in blocks(page)):
            yield pytest.param(page, marks=pytest.mark.long if page in LONG else ())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    pytest.importorskip("trl")
    with small_hub(tmp_path_factory.mktemp("hub")) as environment:
        yield environment


@pytest.fixture
def place(tmp_path, llama):
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
    translations = [{"instruction": f"第{n}年召迴朝廷。\n翻譯成文言文：", "output": "明年召還。"} for n in range(20)]
    (tmp_path / "translations.json").write_text(json.dumps(translations))
    (tmp_path / "chats").mkdir()
    packed = gzip.compress(json.dumps({"messages": talk}).encode())
    (tmp_path / "chats" / "a.jsonl.gz").write_bytes(packed)
    subprocess.run(
        [sys.executable, "-m", "ftdata", "convert", "data.json", "-o", "tables.parquet"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    return tmp_path


def environment(hub):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quick = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return {**quick, **hub, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "", "OMP_NUM_THREADS": "1"}


@pytest.mark.train
@pytest.mark.parametrize("page", list(run_pages()))
def test_examples_of_a_page_run_and_print_their_output(page, place, hub):
    """Run commands and Python blocks, compare the printed output, and write the named files."""
    for language, name, text in blocks(page):
        if name:
            (place / name).write_text(text)
        elif language == "console":
            for command, printed in commands(text):
                done = subprocess.run(
                    ["bash", "-c", command],
                    cwd=place,
                    env=environment(hub),
                    capture_output=True,
                    text=True,
                    input="Hello?\n",
                    check=False,
                    timeout=240,
                )
                assert done.returncode == 0, (command, done.stdout, done.stderr)
                assert_is_printed(printed, done.stdout)
        elif language == "python":
            done = subprocess.run(
                [sys.executable, "-c", text],
                cwd=place,
                env=environment(hub),
                capture_output=True,
                text=True,
                check=False,
                timeout=240,
            )
            assert done.returncode == 0, (text, done.stderr)


def assert_is_printed(shown, printed):
    """Assert that the shown lines are printed in order; `...` stands for any lines."""
    if shown.strip():
        pattern = r"[\s\S]*".join(re.escape(part.strip()) for part in re.split(r"^\.\.\.$", shown, flags=re.MULTILINE))
        assert re.fullmatch(pattern, printed.strip()), printed
