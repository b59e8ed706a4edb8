"""File names that are not UTF-8: Linux allows them, and Python represents their bytes as lone surrogates."""

import json
import os
import subprocess

import pytest
import warm

from ftdata import build_sft_dataset, verify
from ftdata.errors import UsageError

ROWS = [{"question": "q", "answer": "a"}, {"question": "q2"}]
QUARANTINE = ["--on-bad-rows", "quarantine", "--max-rejects", "9"]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / os.fsdecode(b"d\xff")
    folder.mkdir()
    path = folder / os.fsdecode(b"x\xfe.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(*words):
    done = subprocess.run(warm.python("-m", "ftdata", *words), capture_output=True, check=False)
    assert b"internal" not in done.stderr, done.stderr
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("forms", [("text", "sarif"), pytest.param(("json", "github"), marks=pytest.mark.long)])
def test_every_command_accepts_file_names_that_are_not_utf8(data, tokenizer_dir, tmp_path, forms):
    tokenizer, built = tokenizer_dir("tiny_bpe"), data.parent / os.fsdecode(b"out\xfd")
    assert run("preview", data, "-t", tokenizer) == 0
    assert run("preview", data, "-t", tokenizer, "--html", data.with_suffix(".html")) == 0
    assert run("build", data, "-t", tokenizer, "-o", built, *QUARANTINE) == 0
    assert run("build", data, "-t", tokenizer, "-o", built, *QUARANTINE) == 0
    assert run("convert", data, "-o", data.with_suffix(".parquet"), *QUARANTINE) == 0
    for command in (
        ["verify"],
        ["preview"],
        ["stats", "--json"],
        ["stats", "--svg", data.parent / "pictures"],
    ):
        assert run(*command[:1], built, *command[1:]) == 0
    for form in forms:
        assert run("audit", data, "-t", tokenizer, "--output-format", form) == 1
        assert run("audit", built, "--output-format", form) in (0, 1)
    assert run("diff", built, built) == 0
    assert verify(built) == []


def test_reports_are_valid_json_for_every_parser(data, tokenizer_dir):
    import orjson

    built = data.parents[1] / "built"
    options = {"on_bad_rows": "quarantine", "max_rejects": 9}
    build_sft_dataset(str(data), tokenizer_dir("tiny_bpe"), output_dir=built, **options)
    with pytest.raises(UsageError, match="output_name"):
        build_sft_dataset(str(data), tokenizer_dir("tiny_bpe"), output_dir=data.parent / "built", **options)
    report = orjson.loads((built / "report.json").read_bytes())
    assert report["sources"][0]["source"].endswith("d\\udcff/x\\udcfe.jsonl")
    assert orjson.loads((built / "rejects.jsonl").read_bytes())["file"].endswith("x\\udcfe.jsonl")
    assert orjson.loads((built / "manifest.json").read_bytes())
    assert "x" in (built / "README.md").read_text()
