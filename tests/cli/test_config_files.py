"""Every command that reads data accepts a configuration file, and its errors use the keys of the file."""

import json
import subprocess

import jsonschema
import pytest
import warm

from ftdata.cli.config_schema import make_config_schema
from ftdata.config import Config, load_data_config, make_config
from ftdata.errors import UsageError
from ftdata.options import OPTIONS
from ftdata.readers import resolve_sources
from ftdata.spelling import spell_options

ROWS = [{"question": f"{n}+1?", "answer": f"{n + 1}"} for n in range(20)]


@pytest.fixture
def folder(tmp_path, tokenizer_dir):
    """A folder with two data files and a configuration that mixes them."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{**row, "answer": name + row["answer"]} for row in ROWS]))
    config = {
        "data": [{"path": str(tmp_path / "a.json"), "weight": 2}, {"path": str(tmp_path / "b.json"), "rows": 3}],
        "tokenizer": tokenizer_dir("tiny_bpe"),
        "output_dir": str(tmp_path / "run"),
        "mask": {"train_on": "all"},
        "test_size": 4,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    return tmp_path


def run(*arguments, code=0):
    command = warm.python("-m", "ftdata", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    return done


def test_commands_read_a_configuration(folder):
    config = folder / "run.yaml"
    shown = run("preview", config, "-n", 1).stdout
    assert "a.json, " in shown
    assert "(96%)" in shown  # because of train_on
    assert "(96%)" not in run("preview", config, "-n", 1, "--train-on", "assistant").stdout
    assert json.loads(run("stats", config, "--json").stdout)
    audit = run("audit", config, "--fail-on", "never")
    assert audit.stdout
    assert "audit ignores these options of the configuration: weight, rows, test_size" in audit.stderr
    built = json.loads(run("build", config, "--json").stdout)
    assert (folder / "run" / "data" / "manifest.json").is_file()
    assert built["splits"]["test"]["examples"] == 4
    assert {one["source"].rpartition("/")[2]: one["examples"] for one in built["splits"]["train"]["sources"]}[
        "b.json"
    ] == 3
    assert (
        "convert ignores these options of the configuration: weight, rows, test_size"
        in run("convert", config, "-o", folder / "out.jsonl").stderr
    )
    assert len((folder / "out.jsonl").read_text().splitlines()) == 40
    compared = run("diff", config, "--set", "train_on=assistant", code=1)
    assert "diff ignores these options of the configuration: weight, rows, test_size" in compared.stderr
    exported = run("export", config, "--to", "trl", "-o", folder / "exported")
    assert "train    " in exported.stderr  # the report of the build
    assert "exported" in exported.stdout
    changed = folder / "changed.yaml"
    changed.write_text(config.read_text().replace('"test_size": 4', '"test_size": 6'))
    refused = run("export", changed, "--to", "trl", "-o", folder / "exported", code=2)
    assert "build_exists" in refused.stderr
    run("export", changed, "--to", "trl", "-o", folder / "exported", "--overwrite")
    (folder / "short.yaml").write_text("data: a.json")
    refused = run("export", folder / "short.yaml", "--to", "trl", "-o", folder / "refused", code=2)
    assert "short.yaml needs the field tokenizer" in refused.stderr


def test_configuration_is_not_combined_with_other_data(folder):
    for arguments in (("preview", "--encoding", "cp1252"), ("stats", folder / "a.json")):
        command, *others = arguments
        done = run(command, folder / "run.yaml", *others, code=2)
        assert "config_alone" in done.stderr


def test_build_names_all_missing_options(folder):
    assert "a build needs --tokenizer and --output-dir" in run("build", folder / "a.json", code=2).stderr


def test_messages_spell_options_as_the_user_set_them(folder):
    (folder / "bad.jsonl").write_text(
        '{"a": 1}\n{"a": 1}\n{"a": 2}\n{"a": 1}\n{"a": 5}\n{"question": "q", "answer": "a"}\n'
    )
    tokenizer = json.loads((folder / "run.yaml").read_text())["tokenizer"]
    said = run("build", folder / "bad.jsonl", "-t", tokenizer, "-o", folder / "out", code=3).stderr
    assert "--on-bad-rows quarantine --max-rejects 5" in said
    assert "--column prompt=..." in said
    config = {"data": str(folder / "bad.jsonl"), "tokenizer": tokenizer, "output_dir": str(folder / "run")}
    (folder / "bad.yaml").write_text(json.dumps(config))
    said = run("build", folder / "bad.yaml", code=3).stderr
    assert "on_bad_rows: quarantine, max_rejects: 5" in said
    assert "columns: {prompt: ..., completion: ...}" in said


def test_equal_rejects_are_grouped(folder):
    (folder / "bad.jsonl").write_text('{"a": 1}\n' * 5 + '{"question": "q", "answer": ""}\n{"b": 1}\n')
    tokenizer = json.loads((folder / "run.yaml").read_text())["tokenizer"]
    said = run("build", folder / "bad.jsonl", "-t", tokenizer, "-o", folder / "out", code=3).stderr
    assert "7 rows are invalid" in said
    assert "[unknown_schema] 5 rows: " in said
    assert f"({', '.join(f'{folder}/bad.jsonl:{line}' for line in (1, 2, 3))}, ...)" in said
    assert "[empty_answer] " in said
    assert said.count("Known schemas") == 1


def test_option_names_are_only_replaced_in_messages():
    text = "its columns: 'max_length', max_length2, [max_rejects] data/test_size and e.g. --set turns=split"
    assert spell_options(text, "flags") == text
    assert spell_options("set columns={'output': 'a b'}, or where='x'", "arguments").startswith("set columns=")
    listing = "unknown flag; known: control_tokens, no_stop\nset max_length"
    assert spell_options(listing, "flags") == "unknown flag; known: control_tokens, no_stop\nset --max-length"
    assert spell_options("d.jsonl:2 max_length: is null", "flags") == "d.jsonl:2 max_length: is null"
    assert spell_options("where=\"lang == 'en'\" failed", "flags") == "--where \"lang == 'en'\" failed"


def test_misspelled_keys_of_sources_are_refused(folder):
    misspelled = [{"path": str(folder / "a.json"), "wieght": 2}, str(folder / "b.json")]
    with pytest.raises(UsageError, match="unknown key 'wieght'.*did you mean 'weight'"):
        resolve_sources(misspelled)
    (folder / "bad.yaml").write_text(json.dumps({"data": misspelled}))
    with pytest.raises(UsageError, match=r"bad.yaml: data has the unknown key 'wieght'.*did you mean 'weight'"):
        load_data_config(folder / "bad.yaml")
    # Keys of a file are not spelled as flags.
    assert "known: data_files, encoding" in run("preview", folder / "bad.yaml", code=2).stderr
    # Rows can have a column `path`.
    assert len(resolve_sources([{"path": "a", "text": "b"}])) == 1


def test_unknown_suffix_needs_a_format(folder):
    (folder / "a.json").rename(folder / "a.txt")
    assert "set --format, e.g. --format jsonl" in run("preview", folder / "a.txt", code=3).stderr
    assert "0+1?" in run("preview", folder / "a.txt", "--format", "json", "-n", 1).stdout


@pytest.mark.parametrize(
    ("values", "is_valid"),
    [
        ({"data": "a.json"}, True),
        ({"data": {"path": "a.json", "weight": 2}}, True),
        ({"data": ["a", {"path": "b", "split": "train"}], "lora": {"lora_alpha": 3, "use_dora": True}}, True),
        ({"data": "a", "mask": "all", "length": {"max_length": 5, "overlong": "truncate"}, "pack": "bfd"}, True),
        ({"data": "a", "packing": None, "reject_flags": ["no_trained_stop"], "max_rejects": "1%"}, True),
        ({"data": {"path": "a.json", "wieght": 2}}, False),
        ({"data": "a", "packing": True}, False),
        ({"data": "a", "max_lenght": 3}, False),
        ({"data": "a", "length": {"turns": "split"}}, False),
        ({"data": "a", "overlong": "cut"}, False),
        ({"model": "m"}, False),
    ],
)
def test_schema_accepts_what_the_configuration_accepts(values, is_valid):
    schema = make_config_schema()
    assert jsonschema.Draft202012Validator(schema).is_valid(values) is is_valid
    if is_valid:
        make_config({"model": "m", "output_dir": "o", **values})


def test_schema_describes_every_field():
    fields = make_config_schema()["properties"]
    assert set(Config.__struct_fields__) | {"mask", "length", "pack"} == set(fields)
    assert all(field["description"] for field in fields.values())
    assert {name for name in OPTIONS if "enum" in fields[name]} == {name for name in OPTIONS if OPTIONS[name].choices}
    jsonschema.Draft202012Validator.check_schema(make_config_schema())
    assert json.loads(run("config", "schema").stdout) == make_config_schema()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"packing": True}, "packing is true, expected 'bfd' or null"),
        ({"max_length": "5"}, "max_length is '5', expected an integer or null"),
        ({"lora": {"r": "x"}}, "lora.r is x, expected an integer"),
        ({"reject_flags": "x"}, "reject_flags is x, expected a list"),
        ({"sample": "x"}, "sample is x, expected a number or null"),
        ({"columns": {"a": 3}}, "expected text"),
    ],
)
def test_type_errors_are_sentences(values, says):
    with pytest.raises(UsageError) as caught:
        make_config({"data": "d", "model": "m", "output_dir": "o", **values})
    assert says in str(caught.value)


def test_misspelled_columns_files_and_folders_are_suggested(folder):
    (folder / "c.jsonl").write_text('{"Question": "2+2?", "anwser": "4"}\n')
    shown = run("preview", folder / "c.jsonl", code=3).stdout
    assert "set --column question=Question --column answer=anwser" in shown
    assert (
        "2+2?"
        in run("preview", folder / "c.jsonl", "--column", "question=Question", "--column", "answer=anwser").stdout
    )
    (folder / "data").mkdir()
    (folder / "a.json").rename(folder / "data" / "a.json")
    assert "data/a.json'?" in run("preview", folder / "data" / "a.jsn", code=2).stderr
    # A missing local file is not searched on the Hub.
    command = warm.python("-m", "ftdata", "preview", "dta/a.json")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 2
    assert "contains no folder 'dta'; did you mean 'data'?" in done.stderr


def test_packing_of_a_configuration_does_not_prevent_a_preview(folder):
    config = json.loads((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(json.dumps({**config, "packing": "bfd", "max_length": 64}))
    assert "row 0" in run("preview", folder / "run.yaml", "-n", 1).stdout
    assert "row 3" in run("preview", folder / "run.yaml", "--row", 3).stdout
    assert (
        "packing applies only"
        in run("preview", folder / "a.json", "--packing", "bfd", "-t", config["tokenizer"], code=2).stderr
    )
    run("build", folder / "run.yaml", "-o", folder / "built")
    refused = run("build", folder / "run.yaml", "-o", folder / "built", "--max-length", 65, code=2).stderr
    assert "max_length (build: 64, requested: 65). Fix: set --overwrite to replace it" in refused
