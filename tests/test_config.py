"""Configuration files: typed values, and clear errors for invalid files."""

import itertools

import pytest

from ftdata import config as config_module
from ftdata.config import Config, Lora, load_config, make_config
from ftdata.errors import UsageError

REQUIRED = {"data": "d.json", "model": "m", "output_dir": "o"}


def test_config_file_is_typed(tmp_path):
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
        ({**REQUIRED, "lora": {"r": "3"}}, "lora.r"),
        ({**REQUIRED, "quantization": 4}, "quantization"),
        ({"data": "d"}, "model"),
    ],
)
def test_invalid_config_is_refused(values, says):
    with pytest.raises(UsageError, match=says):
        make_config(values)


NAMED = "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in itertools.pairwise("abcdefgh"))

MERGED = "".join(f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in itertools.pairwise("abcdefgh"))

BROKEN = [
    "- a\n- b\n", "a: [", "a: !!python/object:os.system {}", "seed: !!int x", "date: !!timestamp x", "a: !!binary '@'",
    "seed: !!bool x", f"seed: {'9' * 5000}", f"seed: {'9' * 30}", f"a: {'[' * 5000}", "mask: {1: 2}", "mask: {0: 2}", "mask: {null: 2}", "lora: &a {r: *a}",
    "a: &a [*a]", "a: &a {<<: *a}", "a: &a [x]\n" + NAMED, "a: &a {x: 1}\n" + MERGED, "a: " + "x" * 600_000, "\0", "a." * 2000 + "b = 1",
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_malformed_config_file_is_refused(tmp_path, text, suffix):
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"run\.(yaml|toml)"):
        load_config(path)


def test_every_field_can_be_overridden():
    """Also a field with a name that could be a parameter of the function."""
    assert make_config(REQUIRED, "run.yaml", where="not input").where == "not input"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("batch_size", "use train.per_device_train_batch_size"),
        ("base_model", "use model"),
        ("sequence_len", "use max_length"),
        ("lora_r", "use lora.r"),
        ("learning_rate", "settings of the trainer belong in the section train"),
    ],
)
def test_keys_of_other_tools_are_explained(key, hint):
    with pytest.raises(UsageError, match=f"unknown key '{key}'") as caught:
        make_config({"data": "d.json", "model": "m", "output_dir": "o", key: 4})
    assert hint in caught.value.hint


def test_familiar_names_are_keys_of_the_configuration():
    """No hint names a key that does not exist, and none hides a key that exists."""
    for name, hint in config_module._FAMILIAR_NAMES.items():
        section, _, field = hint.removeprefix("use ").partition(":")[0].partition(".")
        assert section in Config.__struct_fields__, hint
        assert section != "lora" or field in Lora.__struct_fields__, hint
        assert name not in Config.__struct_fields__


def test_repeated_keys_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: d\nmodel: m\noutput_dir: o\nmax_length: 64\nmax_length: 2048\n")
    with pytest.raises(UsageError, match=r"line 5, column 1: the key 'max_length' occurs twice"):
        load_config(path)
    path.write_text("x: &x {r: 4}\ndata: d\nmodel: m\noutput_dir: o\nlora: {<<: *x, r: 8}\n")
    with pytest.raises(UsageError, match="unknown key 'x'"):
        load_config(path)
