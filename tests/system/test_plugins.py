"""Plug-ins: one of each kind from an installed package, and readers from files, with their errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from vision import CHAT_TOKENS, SIMPLE, byte_tokenizer, save_image

from ftdata import build_sft_dataset, read
from ftdata.errors import FtdataError

PACKAGE = Path(__file__).parents[1] / "plugin_package"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of a process in which the package is installed."""
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        target,
        PACKAGE,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return {**os.environ, "PYTHONPATH": str(target)}


def ftdata(environment, *arguments, code=0):
    command = warm.python("-m", "ftdata", *arguments, environment=environment)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.slow
def test_installed_plugin_of_each_kind_works(installed, tokenizer_dir, tmp_path):
    listed = json.loads(ftdata(installed, "plugins", "--json"))
    names = {
        "ftdata.readers": "dialogue",
        "ftdata.schemas": "interview",
        "ftdata.templates": "terse",
        "ftdata.masks": "first_answer",
        "ftdata.image_families": "ruler",
    }
    for group, name in names.items():
        (found,) = (one for one in listed[group] if one["name"] == name)
        assert found == {"name": name, "package": "ftdata-dialogue", "version": "1.2.0"}
    assert "first_answer (ftdata-dialogue 1.2.0)" in ftdata(installed, "plugins")
    data = tmp_path / "talk.dialogue"
    data.write_text("Who? => Me.\nWhere? => Here.\n")
    options = ("--schema", "interview", "--template", "terse", "--train-on", "first_answer")
    shown = ftdata(installed, "preview", data, "-t", tokenizer_dir("tiny_bpe"), *options)
    assert "> Who?↵\n⟦Me.⟨<|im_end|>⟩■⟧" in shown
    ftdata(installed, "build", data, "-t", tokenizer_dir("tiny_bpe"), *options, "-o", tmp_path / "out", "--workers", 2)
    data.write_text("Who? => Me.\nWhere?\n")
    told = ftdata(installed, "build", data, "-t", tokenizer_dir("tiny_bpe"), *options, "-o", tmp_path / "new", code=3)
    assert f"[no_arrow] {data}:2: has no ' => '. Fix: put one between question and answer" in told


@pytest.mark.slow
def test_installed_image_family_computes_the_tokens_of_an_image(installed, tmp_path):
    tokenizer = byte_tokenizer({}, [*CHAT_TOKENS, "<image>"])
    tokenizer.chat_template = SIMPLE.replace("PLACEHOLDER", "<image>")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"processor_class": "RulerProcessor", "step": 20}')
    content = [{"type": "image", "image": save_image(tmp_path / "a.png", (100, 30))}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Red."}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": messages}))
    shown = ftdata(installed, "preview", tmp_path / "data.jsonl", "-t", tmp_path / "model")
    assert "[image 100×30 → 5 tokens]" in shown


def test_reader_from_a_file_is_a_format(tokenizer_dir, tmp_path):
    data = tmp_path / "talk.log"
    data.write_text("Who? => Me.\n")
    name = f"{PACKAGE / 'ftdata_dialogue' / '__init__.py'}"
    spec = {"path": str(data), "format": f"{name}:read_dialogue"}
    built = build_sft_dataset(spec, tokenizer_dir("tiny_bpe"), schema=f"{name}:interview")
    assert built["train"].num_rows == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return 5", "reader_failed.*TypeError"),
        ("return [{'text': 'a'}]", "reader_failed.*yields a dict, expected ftdata.types.Row"),
        ("raise KeyError('x')", "reader_failed.*KeyError"),
        ("return [Row({'text': 'a'}, 3)]", "reader_failed.*whose source is a int"),
        ("return [Row({'text': 'a'}, Source('x', '0'))]", "reader_failed.*invalid source"),
        ("return [Row({'text': 'a'}, Source('x', 0))] * 2", "reader_failed.*row 0 after row 0"),
        ("return [Reject(Source('x', 0), 'c', 'f', None)]", "reader_failed.*field that is not a string"),
    ],
)
def test_failing_reader_is_named(body, says, tokenizer_dir, tmp_path):
    (tmp_path / "mine.py").write_text(f"from ftdata.types import Reject, Row, Source\ndef read(file):\n    {body}\n")
    (tmp_path / "a.log").write_text("x")
    with pytest.raises(FtdataError, match=says):
        build_sft_dataset(
            {"path": str(tmp_path / "a.log"), "format": f"{tmp_path}/mine.py:read"}, tokenizer_dir("tiny_bpe")
        )


def test_unknown_format_is_named(tokenizer_dir, tmp_path):
    (tmp_path / "a.log").write_text("x")
    with pytest.raises(FtdataError, match=r"unknown_reader.*did you mean 'jsonl'"):
        build_sft_dataset({"path": str(tmp_path / "a.log"), "format": "jsonll"}, tokenizer_dir("tiny_bpe"))


def test_reader_may_reuse_one_object_for_all_rows(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from ftdata.types import Row, Source\n"
        "def read(file):\n"
        "    row = {}\n"
        "    for n in range(3):\n"
        "        row['text'] = f'text {n}'\n"
        "        yield Row(row, Source(file.path, n))\n"
    )
    (tmp_path / "a.log").write_text("x")
    rows = list(read({"path": str(tmp_path / "a.log"), "format": f"{tmp_path}/mine.py:read"}))
    assert [row.data["text"] for row in rows] == ["text 0", "text 1", "text 2"]
