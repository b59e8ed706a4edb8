"""Builds on a busy machine: the output does not depend on the speed of the machine."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

# A template that rewrites history: each turn is rendered on its own, in the worker.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}[latest] {% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversations():
    """Yield conversations of different lengths: some with tool calls, and a long one."""
    for n in range(20):
        yield [message(i, n) for i in range(2 * (1 + n % 7))]
    yield [message(i, 0) for i in range(80)]


def message(i, n):
    if i % 2 == 0:
        return {"role": "user", "content": f"question {i} of {n}: " + "what is that? " * (n % 5)}
    call = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": {"at": f"x{n}"}}}
    return {"role": "assistant", "content": f"an answer {i}", **({"tool_calls": [call]} if n % 11 == 5 else {})}


def spin():
    while True:
        pass


@contextmanager
def starved(processes):
    """Pin this process and its children to one core, and keep that core busy with other processes."""
    before = os.sched_getaffinity(0)
    core = {min(before)}
    os.sched_setaffinity(0, core)
    others = [multiprocessing.get_context("fork").Process(target=spin, daemon=True) for _ in range(processes)]
    try:
        for other in others:
            other.start()
        yield
    finally:
        for other in others:
            other.kill()
            other.join()
        os.sched_setaffinity(0, before)


def build(data, tokenizer, template, target):
    ran = subprocess.run(
        [
            "nice",
            "-n",
            "3",
            sys.executable,
            "-m",
            "ftdata",
            "build",
            data,
            "-t",
            tokenizer,
            "--template",
            template,
            "-o",
            target,
        ],
        env={**os.environ, "FTDATA_CACHE": str(Path(target).with_suffix(".cache"))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return {
        str(path.relative_to(target)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(target).rglob("*"))
        if path.is_file()
    }


@pytest.mark.long
@pytest.mark.parametrize("runs", [1, pytest.param(100, marks=pytest.mark.timeout(3600))])
def test_builds_are_the_same_on_a_busy_machine(runs, tmp_path, tokenizer_dir):
    data, template = tmp_path / "data.jsonl", tmp_path / "t.jinja"
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in conversations()))
    template.write_text(TEMPLATE)
    given = str(data), tokenizer_dir("tiny_bpe"), str(template)
    expected = build(*given, str(tmp_path / "idle"))
    # Two other processes take two thirds of the time of the core.
    with starved(4 if runs > 1 else 2):
        for run in range(runs):
            assert build(*given, str(tmp_path / f"{run}")) == expected, run
