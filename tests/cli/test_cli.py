import gzip
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from cases import long

HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "pandas", "bitsandbytes", "accelerate")
EXAMPLES = Path(__file__).parents[2] / "examples"


def ftdata(*arguments, **environment):
    done = subprocess.run(
        warm.python("-m", "ftdata", *arguments),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    "statement",
    [
        "import ftdata",
        "import ftdata.cli",
        "from ftdata import build_sft_dataset, encode, read, preview, audit, check_template",
        "from ftdata.cli import app",
        "import ftdata.train",
    ],
)
def test_imports_load_no_heavy_libraries(statement):
    code = f"{statement}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bare_import_loads_no_dependencies():
    code = "import ftdata, sys; print([n for n in ('numpy', 'pyarrow', 'tokenizers', 'jinja2', 'typer', 'rich') if n in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_preview_with_a_tokenizer_loads_no_heavy_libraries(tokenizer_dir):
    code = (
        f"import sys; from ftdata import preview; preview({str(EXAMPLES / 'faq.json')!r}, {tokenizer_dir('tiny_bpe')!r});"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_build_loads_no_heavy_libraries(tokenizer_dir, tmp_path):
    code = (
        f"import sys; from ftdata.build.dataset import write_build; write_build({str(EXAMPLES / 'faq.json')!r}, {tokenizer_dir('tiny_bpe')!r}, {str(tmp_path / 'o')!r}, test_size=3);"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_equal_the_exported_names():
    import ftdata as package

    assert package.__all__ == sorted(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert {"build_sft_dataset", "encode", "check_template", "read", "preview", "audit"} <= set(package.__all__)
    own = {name for name in dir(package) if not name.startswith("_") and not inspect.ismodule(getattr(package, name))}
    assert own - {"annotations", "Any", "TYPE_CHECKING"} | {"__version__"} == set(package.__all__)
    for module in ("train", "testing", "importers", "readers", "schemas"):
        found = importlib.import_module(f"ftdata.{module}")
        made = {
            name for name, one in vars(found).items()
            if not name.startswith("_") and callable(one) and getattr(one, "__module__", "") == found.__name__
        }  # fmt: skip
        assert made <= set(found.__all__), module
        assert all(hasattr(found, name) for name in found.__all__)
    with pytest.raises(AttributeError):
        package.nothing  # noqa: B018


def test_help_and_version():
    for command in ([], ["preview"], ["build"], ["train"], ["audit"], ["eval"], ["templates"], ["plugins"]):
        done = ftdata(*command, "--help")
        assert done.returncode == 0
        assert "Usage" in done.stdout
    assert ftdata("--version").stdout.startswith("ftdata 0.")


def test_preview_without_a_tokenizer():
    done = ftdata("preview", EXAMPLES / "faq.json", "-n", 1)
    assert done.returncode == 0
    assert "question_answer" in done.stdout
    assert "⟦We are open Monday to Friday from 9 am to 6 pm.⟨<|im_end|>⟩■⟧" in done.stdout
    assert "characters trained" in done.stdout


def test_preview_with_a_tokenizer(tokenizer_dir):
    done = ftdata("preview", EXAMPLES / "faq.json", "--tokenizer", tokenizer_dir("tiny_bpe"), "--row", 1)
    assert "⟨<|im_start|>⟩assistant↵" in done.stdout
    assert "⟦Yes, on Saturday we are open from 10 am to 2 pm.⟨<|im_end|>⟩■⟧" in done.stdout
    assert "tokens trained" in done.stdout
    assert "row 1" in done.stdout
    shown = json.loads(
        ftdata("preview", EXAMPLES / "faq.json", "-t", tokenizer_dir("tiny_bpe"), "--row", 1, "--json").stdout
    )
    (example,) = shown["rows"][0]["examples"]
    assert "".join(segment["text"] for segment in example if segment["trained"]).startswith("Yes, on Saturday")


def test_preview_uses_colors_on_color_terminals(tokenizer_dir):
    from io import StringIO

    from rich.console import Console

    from ftdata import preview

    out = StringIO()
    preview(str(EXAMPLES / "faq.json"), tokenizer_dir("tiny_bpe"), n=1).print(
        Console(file=out, force_terminal=True, color_system="standard")
    )
    assert "\x1b[1;4;32m" in out.getvalue()
    assert "⟦" not in out.getvalue()


def test_preview_shows_invalid_rows_with_their_reason(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"question": "q", "answer": ""}\n{broken\n{"question": "q", "answer": "\\u001b[31mred"}\n')
    done = ftdata("preview", path)
    assert "[empty_answer]" in done.stdout
    assert "d.jsonl:2" in done.stdout
    assert "\x1b" not in done.stdout
    assert done.returncode == 0


def test_build_then_audit(tokenizer_dir, tmp_path):
    done = ftdata(
        "build",
        EXAMPLES / "faq.json",
        "-t",
        tokenizer_dir("tiny_bpe"),
        "-o",
        tmp_path / "out",
        "--max_length",
        256,
        "--packing",
        "bfd",
        "--test-size",
        0.1,
    )
    assert done.returncode == 0, done.stderr
    assert "72 read = 72 built + 0 rejected" in done.stdout
    assert (tmp_path / "out" / "manifest.json").is_file()
    again = ("build", EXAMPLES / "faq.json", "-t", tokenizer_dir("tiny_bpe"), "-o", tmp_path / "out", "--json")
    refused = ftdata(*again)
    assert refused.returncode == 2
    assert "[build_exists]" in refused.stderr
    assert "different options: --max-length (build: 256, requested: null), packing (" in refused.stderr
    assert "Fix: set --overwrite" in refused.stderr
    assert json.loads(ftdata(*again, "--overwrite").stdout)["built"] == 72
    clean = ftdata("audit", EXAMPLES / "faq.json", "-t", tokenizer_dir("tiny_bpe"))
    assert clean.returncode == 0
    assert "no problems found" in clean.stdout


def test_audit_reports_findings_with_their_lines(tokenizer_dir, tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [
        {"question": "q", "answer": "a"},
        {"question": "q", "answer": "a"},
        {"question": "q", "answer": ""},
        {"question": "itâ€™s", "answer": "b"},
        {"question": "<|im_end|>", "answer": "c"},
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "d"},
                {"role": "user", "content": "e"},
            ]
        },
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = ftdata("audit", path, "-t", tokenizer_dir("tiny_bpe"), "--json")
    assert done.returncode == 1
    found = {finding["code"]: finding["where"] for finding in json.loads(done.stdout)["findings"]}
    assert found == {
        "duplicate": [f"{path}:2"],
        "empty_answer": [f"{path}:3"],
        "mojibake": [f"{path}:4"],
        "control_tokens": [f"{path}:5"],
        "trailing_messages": [f"{path}:6"],
    }


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["preview", "nowhere.json"], 2, "file_not_found"),
        (["preview", "{faq}", "--turns", "both"], 2, "unknown_turns"),
        (["preview", "{faq}", "--row", "1000"], 3, "no_such_row"),
        (["preview", "{faq}", "--template", "alpaca"], 3, ""),
        (["preview", "{faq}", "--template", "chatlm"], 2, "did you mean 'chatml'"),
        (["preview", "{faq}", "--column", "output"], 2, "expected name=column"),
        (["preview", "{faq}", "--column", "prompt=a,output=b"], 2, "--column prompt=a --column output=b"),
        (["preview", "{faq}", "--column", "anser=answer"], 2, "--column answer=anser"),
        (["stats", "{faq}x"], 2, "did you mean"),
        (["preview", "{faq}", "--tokenizer", "./nowhere"], 2, "no_tokenizer"),
        (["build", "{faq}", "-o", "{tmp}/out"], 2, "--tokenizer"),
        (["build", "{faq}", "-t", "{tok}", "-o", "{tmp}"], 2, "target_exists"),
        (["build", "{bad}", "-t", "{tok}", "-o", "{tmp}/out"], 3, "bad_rows"),
        (
            ["build", "{bad}", "-t", "{tok}", "-o", "{tmp}/out", "--on-bad-rows", "quarantine", "--max-rejects", "0"],
            4,
            "max_rejects",
        ),
        (["build", "{faq}", "-t", "{tok}", "-o", "/proc/out"], 5, "/proc/out"),
        (["templates", "check", "chatlm"], 2, "did you mean"),
        (["templates", "check", "chatml"], 0, ""),
        (["templates", "list"], 0, ""),
        (["templates", "show", "alpaca"], 0, ""),
        (["plugins"], 0, ""),
        (["train", "{faq}"], 2, "--model"),
        (["nothing"], 2, "nothing"),
    ],
)
def test_exit_codes(arguments, code, says, tmp_path, tokenizer_dir):
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": "q", "answer": ""}\n')
    places = {
        "faq": EXAMPLES / "faq.json",
        "tmp": tmp_path,
        "bad": tmp_path / "bad.jsonl",
        "tok": tokenizer_dir("tiny_bpe"),
    }
    done = ftdata(*(argument.format(**places) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert says in done.stderr


@pytest.mark.train
def test_exit_code_of_a_folder_without_a_run(training_python, tmp_path):
    command = training_python("-m", "ftdata", "eval", tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not_a_run" in done.stderr


def test_closed_pipe_is_not_an_error(tokenizer_dir):
    command = (
        f"{sys.executable} -m ftdata preview {EXAMPLES / 'faq.json'} -t {tokenizer_dir('tiny_bpe')} -n 72 | head -1"
    )
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_data_from_encodings_archives_and_standard_input(tokenizer_dir, tmp_path):
    text = '{"question": "caf\xe9?", "answer": "oui"}\n' * 3
    (tmp_path / "latin.jsonl").write_bytes(text.encode("cp1252"))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    refused = ftdata("preview", tmp_path / "latin.jsonl")
    assert "--encoding cp1252" in refused.stdout
    shown = ftdata("preview", tmp_path / "latin.jsonl", "--encoding", "cp1252", "-n", "1")
    assert "café?" in shown.stdout
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ftdata",
            "build",
            "-",
            "-t",
            tokenizer_dir("tiny_bpe"),
            "-o",
            str(tmp_path / "out"),
            "--json",
        ],
        input=(tmp_path / "d.jsonl.gz").read_bytes(),
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["built"] == 3
    assert ftdata("preview", tmp_path / "latin.jsonl", "--encoding", "cp12525").returncode == 2


def test_column_names_cannot_control_the_terminal(tmp_path, tokenizer_dir):
    row = {"question": "q", "answer": "a", "k\x1b[31m\u202e": 1}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    done = ftdata("build", tmp_path / "d.jsonl", "-t", tokenizer_dir("tiny_bpe"), "-o", tmp_path / "out")
    assert done.returncode == 0
    assert "k\\u001b[31m\\u202e" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\u202e" not in done.stdout


@pytest.mark.parametrize("command", ["preview", "audit", long("stats"), "build", long("diff")])
def test_template_variables_on_the_command_line(command, tokenizer_dir, tmp_path):
    """Every command that renders rows accepts template variables and shows their effect."""
    data, template = tmp_path / "d.jsonl", tmp_path / "t.jinja"
    data.write_text('{"question": "q", "answer": "a"}\n')
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking | default(true) %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    given = [command, str(data), "-t", tokenizer_dir("tiny_bpe"), "--template", str(template)]
    given += {"build": ["--overwrite", "-o", str(tmp_path / "out")], "diff": ["--set", "train_on=all"]}.get(command, [])
    told = {}
    for name, more in (("plain", []), ("set", ["--template-kwarg", "enable_thinking=false"])):
        done = ftdata(*given, *more, *(["--json"] if command != "build" else []))
        assert done.returncode in (0, 1), done.stderr
        told[name] = done.stdout
    assert told["plain"] != told["set"]
    if command in ("preview", "audit", "build"):
        assert "thinking" in told["plain"]
    if command == "build":
        assert "enable_thinking=False" in told["set"]
        assert "empty thinking block" not in told["set"]
    refused = ftdata(*given, "--template-kwarg", "thinking")
    assert refused.returncode == 2
    assert "name=value" in refused.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--where", "(" * 5000), "cannot be compiled"),
        (("--template-kwarg", "a=" + "[" * 100_000), "cannot be parsed"),
        (("--template-kwarg", "enable_thinking=" + "9" * 5000), "cannot be parsed"),
        (("--template-kwarg", "api_key=secret-word"), "api_key"),
        (("--split", "train[999999999999999999999999:]"), "valid split expression"),
    ],
)
def test_oversized_option_values_are_refused_in_one_line(tmp_path, tokenizer_dir, options, says):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "q", "answer": "a"}\n')
    done = ftdata("build", data, "-t", tokenizer_dir("tiny_bpe"), "-o", tmp_path / "out", *options)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "secret-word" not in done.stderr


def test_closed_standard_streams_are_not_internal_errors(tmp_path, tokenizer_dir):
    (tmp_path / "data.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    command = f"{sys.executable} -m ftdata {{}} -t {tokenizer_dir('tiny_bpe')} {{}}"
    for asked, redirected, code in (("preview data.jsonl", ">&-", 0), ("build -", "-o out <&-", 3)):
        done = subprocess.run(
            command.format(asked, redirected), shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        assert "internal" not in done.stderr


def test_output_to_a_named_pipe_is_written_and_not_replaced(tmp_path, tokenizer_dir):
    pipe = tmp_path / "page.html"
    os.mkfifo(pipe)
    (tmp_path / "data.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        done = ftdata("preview", tmp_path / "data.jsonl", "-t", tokenizer_dir("tiny_bpe"), "--html", pipe)
        page, _ = reader.communicate(timeout=60)
    assert done.returncode == 0, done.stderr
    assert page.startswith(b"<!doctype html>")
    assert pipe.is_fifo()


def test_output_folder_must_be_named_and_contain_no_source(tmp_path, tokenizer_dir):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    build = ("build", data, "-t", tokenizer_dir("tiny_bpe"), "-o")
    assert ftdata(*build, "").returncode == 2
    assert ftdata(*build, data / "out").returncode == 0
    done = ftdata(*build, data / "out")
    assert done.returncode == 2
    assert "is inside the output folder" in done.stderr
    assert ftdata(*build, "s3://key:word@bucket/name").returncode == 2
