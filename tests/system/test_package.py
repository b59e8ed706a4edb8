"""The package as users install it: files, dependencies, type hints and shell completion."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import ftdata

ROOT = Path(__file__).parents[2]
FTDATA = Path(sys.executable).parent / "ftdata"
EXTRAS = (
    "train",
    "dedup",
    "engines",
    "excel",
    "fast",
    "gs",
    "images",
    "ray",
    "s3",
    "sentencepiece",
    "tekken",
    "tiktoken",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist and the wheel, which is built from the sdist so that missing files are detected."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_sdist_and_wheel_contain_the_expected_files(built):
    sdist, wheel = built
    with tarfile.open(sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    with zipfile.ZipFile(wheel) as packed:
        inside = set(packed.namelist())
    source = {
        str(path.relative_to(ROOT)) for path in (ROOT / "ftdata").rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    assert source <= names
    assert {name for name in inside if not name.startswith("ftdata-")} == source
    assert {"ftdata/py.typed", "ftdata/templates/chatml.jinja", "ftdata/inspection/assets/page.js"} <= inside
    assert {
        "tests/system/test_package.py",
        "docs/index.md",
        "examples/faq.json",
        "Makefile",
        ".ci/run",
        "LICENSE",
    } <= names


@pytest.mark.long
def test_wheel_works_in_a_bare_environment(built, tmp_path):
    """Only the declared dependencies are installed, so an undeclared one would be missing."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", built[1]], check=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"NO_COLOR": "1"}

    def run(*arguments):
        done = subprocess.run(
            [python, "-W", "error", "-m", "ftdata", *arguments],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    assert run("--version").stdout == f"ftdata {ftdata.__version__}\n"
    data = ROOT / "examples" / "faq.json"
    assert "characters trained" in run("preview", data, "-n", "1").stdout
    assert "numpy" in run("env").stdout
    told = run("train", data, "--model", "m", "-o", "o")
    assert told.returncode == 2
    assert "pip install 'ftdata[train]'" in told.stderr
    installed = subprocess.run(
        [python, "-m", "pip", "list"], env=clean, capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"^(torch|transformers|trl|pytest|hypothesis)\s", installed, re.MULTILINE)


@pytest.mark.long
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_resolves(built, extra):
    constraints = ROOT / ".ci" / "constraints.txt"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--dry-run",
        "--ignore-installed",
        "-c",
        constraints,
        f"{built[1]}[{extra}]",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_extra_is_tested():
    """The extras for users are tested above."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*project["optional-dependencies"]} == {*EXTRAS, "test", "docs", "dev"}


USER_CODE = """
from typing import assert_type

import numpy as np
from numpy.typing import NDArray

from ftdata import FtdataError, audit, build_sft_dataset, check_template, encode, preview, read
from ftdata.types import Conversation, Example, Rendered, Row, Span
from ftdata.testing import try_template
from ftdata.train import generate, run

(example,) = encode([{"role": "user", "content": "a"}], tokenizer="m")
assert_type(example, Example)
assert_type(example.labels, NDArray[np.int32])
assert_type(example.trained, NDArray[np.bool_])
for span in example.spans:
    assert_type(span, Span)
for row in read("data.json"):
    assert_type(row, Row)


def mine(rendered: Rendered, conversation: Conversation) -> list[bool]:
    return [span.generated for span in rendered.spans]


built = build_sft_dataset("data.json", tokenizer="m", train_on=mine, max_length=5, packing="bfd")
print(built["train"])
print(preview("data.json").rows, audit("data.json", "m").findings, check_template("m").verdict)
print(generate("out", ["a"])[0].strip(), run("data.json").name, try_template("m"))
try:
    encode([], tokenizer="m")
except FtdataError as error:
    print(error.code.upper(), error.where, error.hint)
"""
MISUSE = """
from ftdata import build_sft_dataset, encode

build_sft_dataset("data.json", tokenizer="m", max_lenght=5)
encode([], tokenizer="m").labels
"""


@pytest.mark.slow
@pytest.mark.long
def test_type_hints_are_available_to_users(tmp_path):
    """`py.typed`: mypy uses the types of the package and reports wrong calls."""
    (tmp_path / "use.py").write_text(USER_CODE)
    (tmp_path / "misuse.py").write_text(MISUSE)
    # The settings of this project skip the sources of torch and other large packages.
    options = ["--strict", "--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache"]
    command = [sys.executable, "-m", "mypy", *options, "use.py", "misuse.py"]
    clean = {**os.environ, "MYPYPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    found = [line.split(":")[:2] for line in done.stdout.splitlines() if ": error:" in line]
    assert found == [["misuse.py", "4"], ["misuse.py", "5"]], done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_works(shell):
    # Without detection, the option takes the name of a shell; on a build machine there may be none to detect.
    named = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = subprocess.run(
        [FTDATA, "--show-completion", shell], env=named, capture_output=True, text=True, check=True
    ).stdout
    assert "_FTDATA_COMPLETE" in script
    asked = {
        "bash": {"COMP_WORDS": "ftdata pre", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "ftdata pre"},
        "fish": {"_TYPER_COMPLETE_ARGS": "ftdata pre", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }
    environment = {**os.environ, "_FTDATA_COMPLETE": f"complete_{shell}", **asked[shell]}
    done = subprocess.run([FTDATA], env=environment, capture_output=True, text=True, check=False)
    assert "preview" in done.stdout
    assert "build" not in done.stdout.split()


def test_changelog_contains_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## ([\d.]+)", text, re.MULTILINE)[1] == ftdata.__version__.removesuffix(".dev0")
    kinds = {"removed", "changed", "added", "fixed"}
    assert {path.name.split(".")[-2] for path in (ROOT / "changelog.d").iterdir() if path.name != "README.md"} <= kinds


def test_environment_report_contains_versions_and_no_secrets(monkeypatch):
    from ftdata.cli.environment import describe_environment

    secrets = {
        "HF_ENDPOINT": "https://me:secret@hub.example/?token=secret",
        "HF_TOKEN": "secret",
        "HF_HUB_TOKEN": "secret",
        "HF_HOME": "//[secret@x",
        "HTTPS_PROXY": "user:sec/ret@host:80",
        "FTDATA_API_KEY": "secret",
        "FTDATA_CACHE": "s3://AKIA:sec/ret@bucket",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    found = describe_environment()
    assert found.ftdata == ftdata.__version__
    assert {"numpy", "tokenizers", "trl", "torch"} <= found.packages.keys()
    assert "pytest" not in found.packages
    assert found.packages["numpy"]
    assert "sec" not in str(found)
    assert "akia" not in str(found).lower()
    assert found.as_dict()["settings"]["HF_ENDPOINT"] == "https://..."
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:8080/a/b")
    assert describe_environment().settings["HF_ENDPOINT"] == "https://hub.example:8080"
    assert found.settings["HTTPS_PROXY"] == "(set)"
