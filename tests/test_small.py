"""Registry, errors, configuration, templates' reports: the small modules."""

import itertools
import json
import pickle
from pathlib import Path

import pytest
from makers import tiny_bpe

from ftdata import build_sft_dataset, check_template
from ftdata.config import load_config, make_config
from ftdata.errors import BadRow, BadRows, FtdataError, InputRefused, TemplateRefused, UsageError, nearest
from ftdata.registry import Registry
from ftdata.tokenize import load_tokenizer

REQUIRED = {"data": "d.json", "model": "m", "output_dir": "o"}


def test_errors_have_four_parts_and_survive_pickling():
    error = BadRow("code", "what", where="file:3", hint="do this", field="messages[0]")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "[code] file:3: what. Fix: do this"
    assert (again.code, again.where, again.hint, again.field) == ("code", "file:3", "do this", "messages[0]")
    many = pickle.loads(pickle.dumps(BadRows(30, ["a", "b"], hint="h")))
    assert many.count == 30
    assert "28 more" in str(many)


def test_every_error_is_of_two_families():
    def leaves(kind):
        return [kind, *(leaf for child in kind.__subclasses__() for leaf in leaves(child))]

    for kind in leaves(FtdataError)[1:]:
        assert any(
            not issubclass(base, FtdataError) and base is not Exception
            for base in kind.__mro__
            if issubclass(base, Exception)
        )
        assert kind.exit_code in {2, 3, 4, 5, 6, 7}
    assert issubclass(InputRefused, ValueError)


def test_nearest_without_candidates():
    assert nearest("x", []) == "known: "


def test_a_registry_loads_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def shape():\n    return 4\n")
    registry = Registry("ftdata.tests", "shape")
    assert registry.get(f"{path}:shape")() == 4
    with pytest.raises(UsageError, match="did you mean 'shape'"):
        registry.get(f"{path}:shap")
    with pytest.raises(UsageError, match="no file"):
        registry.get(f"{tmp_path}/none.py:shape")


def test_a_config_file_is_typed(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: d.json\nmodel: m\noutput_dir: o\nlora: {r: 8}\ntrain: {learning_rate: 1.0e-4}\n")
    config = load_config(path, max_length=64, packing=None)
    assert (config.lora.r, config.max_length, config.packing, config.train["learning_rate"]) == (8, 64, None, 1e-4)
    toml = tmp_path / "run.toml"
    toml.write_text('data = "d.json"\nmodel = "m"\noutput_dir = "o"\n[lora]\nr = 8\n')
    assert load_config(toml).lora == config.lora


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({**REQUIRED, "max_lenght": 5}, "did you mean 'max_length'"),
        ({**REQUIRED, "max_length": "5"}, "max_length"),
        ({**REQUIRED, "lora": {"rank": 3}}, "unknown key 'rank'"),
        ({"data": "d"}, "model"),
    ],
)
def test_a_bad_config_is_refused(values, says):
    with pytest.raises(UsageError, match=says):
        make_config(values)


NAMED = "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in itertools.pairwise("abcdefgh"))
MERGED = "".join(f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in itertools.pairwise("abcdefgh"))
BROKEN = [
    "- a\n- b\n", "a: [", "a: !!python/object:os.system {}", "seed: !!int x", "date: !!timestamp x", "a: !!binary '@'",
    "seed: !!bool x", f"seed: {'9' * 5000}", f"seed: {'9' * 30}", f"a: {'[' * 5000}", "mask: {1: 2}", "mask: {0: 2}", "mask: {null: 2}", "lora: &a {r: *a}",
    "a: &a [*a]", "a: &a {<<: *a}", "a: &a [x]\n" + NAMED, "a: &a {x: 1}\n" + MERGED, "a: " + "x" * 600_000, "\0",
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_a_broken_config_file_is_refused(tmp_path, text, suffix):
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"run\.(yaml|toml)"):
        load_config(path)


def test_template_reports(tokenizer_dir):
    exact = check_template(tokenizer_dir("deepseek"))
    assert (exact.verdict, exact.prefix_stable) == ("exact", True)
    split = check_template(tokenizer_dir("qwen"))
    assert (split.verdict, split.prefix_stable, split.stop) == ("split", False, "<|im_end|>")
    assert "<think>" in split.reasons[0]
    assert split.rewrites == ("turns", "reasoning", "think_tags")
    assert exact.proved > len(exact.lacks)
    refused = check_template("{{ raise_exception('never') }}{{ messages }}")
    assert refused.verdict == "refused"
    assert "never" in refused.reasons[0]
    assert check_template("alpaca").kind == "prompt"


def test_a_cached_tokenizer_follows_its_files(tokenizer_dir, tmp_path):
    import shutil

    folder = tmp_path / "t"
    shutil.copytree(tokenizer_dir("tiny_bpe"), folder)
    one = load_tokenizer(folder)
    assert load_tokenizer(str(folder)).fingerprint == one.fingerprint
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(folder).chat_template == "{{ messages }}"
    assert load_tokenizer(folder).fingerprint != one.fingerprint


def test_every_field_can_be_overridden():
    """Also one that is called as a parameter might be."""
    assert make_config(REQUIRED, "run.yaml", where="not input").where == "not input"


DAMAGED = {
    "a list": ("tokenizer_config.json", lambda _: []),
    "null": ("tokenizer_config.json", lambda _: None),
    "a template that is no text": ("tokenizer_config.json", lambda config: {**config, "chat_template": 5}),
    "a template without a name": ("tokenizer_config.json", lambda config: {**config, "chat_template": [{"name": "x"}]}),
    "an empty vocabulary": ("tokenizer.json", lambda one: {**one, "model": {**one["model"], "vocab": {}}}),
    "no unknown token": ("tokenizer.json", lambda one: {**one, "model": {"type": "Unigram", "vocab": [["a", -1.0]]}}),
    "a slow pattern": ("tokenizer.json", lambda one: {**one, "pre_tokenizer": pattern("(a+)+$")}),
    "no pattern": ("tokenizer.json", lambda one: {**one, "pre_tokenizer": pattern("(")}),
    "no map": (
        "tokenizer.json",
        lambda one: {**one, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    ),
}


def pattern(text):
    return {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_tokenizers_are_refused(damage, tmp_path):
    """In words: some of these end `tokenizers` with a panic, which Python takes for no error."""
    name, change = DAMAGED[damage]
    folder = Path(tiny_bpe(tmp_path / "t"))
    if "template" in damage:
        (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
    talk = [{"role": "user", "content": "a" * 60 + "b"}, {"role": "assistant", "content": "zé"}]
    with pytest.raises(TemplateRefused, match="bad_tokenizer"):
        build_sft_dataset([talk], str(folder))
