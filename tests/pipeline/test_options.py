"""The table of options: signatures, configuration fields, command-line options and the manifest agree with it."""

import inspect
import subprocess
import sys
import typing

import msgspec
import pytest
from tokenizer_makers import CHATML

import ftdata
from ftdata.build.reject_limit import RejectLimit
from ftdata.build.splits import Layout
from ftdata.cli import app
from ftdata.config import SECTIONS, Config, make_config
from ftdata.errors import UsageError
from ftdata.inspection.target import make_target
from ftdata.options import OPTIONS, check_choices, option_names
from ftdata.pipeline.recipe import Options, make_recipe
from ftdata.readers.row_filter import RowFilter

COMPLETE = {
    ftdata.build_sft_dataset: option_names("rendering", "rows", "selection", "layout", "rejects"),
    ftdata.preview: option_names("task", "rendering", "rows", "packing", "selection"),
    ftdata.encode: tuple(
        name
        for name in option_names("rendering", "rows")
        if name not in ("schema", "columns", "max_length", "overlong")
    ),
    ftdata.convert: option_names("template", "schema", "columns", "selection", "rejects"),
    ftdata.audit: option_names("template", "selection"),
    ftdata.stats: option_names("template", "selection"),
    make_target: option_names("template", "selection"),
    make_recipe: option_names("rendering"),
    Options: option_names("task", "rows"),
    Layout: option_names("layout"),
    RowFilter: option_names("selection"),
    RejectLimit: option_names("rejects"),
}
"""Each public function, and each class with options of a group -> the options in its signature."""
DIFFERENT = {("encode", "turns"), ("audit", "near_duplicate_threshold"), ("Layout", "max_length")}
"""Options of the same name that are compared separately, or have another meaning."""
UNORDERED = (Layout,)
"""Classes whose fields have another order, because manifests contain them in this order."""


def parameters(function):
    return inspect.signature(function).parameters


@pytest.mark.parametrize("function", COMPLETE, ids=lambda function: function.__name__)
def test_signatures_equal_the_table(function):
    known = {name: parameter for name, parameter in parameters(function).items() if name in OPTIONS}
    name = function.__name__
    found = [option for option in known if (name, option) not in DIFFERENT]
    expected = [option for option in COMPLETE[function] if (name, option) not in DIFFERENT]
    assert found == expected if function not in UNORDERED else sorted(found) == sorted(expected)
    for option in found:
        assert (known[option].default or None) == (OPTIONS[option].default or None), option


def test_encode_has_the_default_of_turns():
    assert parameters(ftdata.encode)["turns"].default == OPTIONS["turns"].default


def test_fields_of_configurations_equal_the_table():
    fields = {field.name: field for field in msgspec.structs.fields(Config)}
    names = list(fields)
    assert names[names.index("template") : names.index("template_kwargs") + 1] == list(OPTIONS)
    for name, option in OPTIONS.items():
        default = fields[name].default_factory() if fields[name].default is msgspec.NODEFAULT else fields[name].default
        assert (fields[name].type, tuple(default) if isinstance(default, list) else default) == (
            option.type,
            option.default,
        )
    config = make_config({"data": "d", "model": "m", "output_dir": "o"})
    assert list(config.build_options()) == list(OPTIONS)


def test_sections_of_configurations_contain_each_option_once():
    names = [name for fields in SECTIONS.values() for name in fields]
    assert sorted(names) == sorted(name for name, option in OPTIONS.items() if option.section)


SPELLINGS = {"download_images": "--download-images", "columns": "--column", "template_kwargs": "--template-kwarg"}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("build", tuple(OPTIONS)),
        ("preview", COMPLETE[ftdata.preview]),
        ("audit", option_names("task", "rendering", "rows", "selection")),
        ("stats", option_names("task", "rendering", "rows", "selection")),
        ("convert", COMPLETE[ftdata.convert]),
        ("diff", ("template", "task", "template_kwargs")),
        ("init", ("template", "task", "limit")),
    ],
)
def test_options_of_commands_equal_the_table(command, expected):
    (function,) = (item.callback for item in app.registered_commands if item.callback.__name__ == command)
    found = {name: parameter for name, parameter in parameters(function).items() if name in OPTIONS}
    if command == "audit":
        found.pop("near_duplicate_threshold")
    assert tuple(found) == expected
    for name, parameter in found.items():
        _, info = typing.get_args(parameter.annotation)
        assert info.help == OPTIONS[name].help
        # A configuration file can contain the value of an option that is not set.
        assert parameter.default is None, name
        assert (info.show_default or None) == (OPTIONS[name].default or None) or str(OPTIONS[name].default), name
        assert info.default in (..., SPELLINGS.get(name, f"--{name}"))


def test_options_of_train_have_no_defaults():
    """The configuration file contains the values of unset options."""
    (function,) = (item.callback for item in app.registered_commands if item.callback.__name__ == "train")
    found = {name: parameter.default for name, parameter in parameters(function).items() if name in OPTIONS}
    assert set(found.values()) == {None}
    assert list(found) == [name for name in OPTIONS if name in found]


def test_manifest_contains_every_option_of_the_recipe(tokenizer_dir, tmp_path):
    recipe = make_recipe(tokenizer_dir("tiny_bpe"))
    described = recipe.describe()
    assert list(described) == ["tokenizer", "template", *option_names("task", "rows")]
    defaults = {name: OPTIONS[name].default for name in option_names("task", "rows")}
    # The recipe contains the detected task.
    defaults["task"] = "sft"
    assert {**described, "columns": described["columns"] or None, "reject_flags": ()} == {**described, **defaults}
    assert type(recipe).from_manifest(described, recipe.tokenizer).describe() == described


def test_recipe_of_a_manifest_has_the_recorded_options(tokenizer_dir):
    options = {
        "columns": {"output": "answer"},
        "schema": "alpaca",
        "train_on": "last_assistant",
        "train_parts": ["answer"],
        "turns": "split",
        "control_tokens": "refuse",
        "on_dropped_message": "flag",
        "on_missing_stop": "append_eos",
        "reject_flags": ["no_trained_stop"],
        "image_folder": "photos",
        "download_images": True,
        "max_length": 64,
        "overlong": "truncate",
    }
    assert set(options) == set(option_names("rows"))
    recipe = make_recipe(
        tokenizer_dir("tiny_bpe"), date="2026-03-04", template="{{ a }}" + CHATML, template_kwargs={"a": 1}, **options
    )
    described = recipe.describe()
    assert type(recipe).from_manifest(described).describe() == described
    without = type(recipe).from_manifest(described, excluded=("train_on", "overlong"))
    assert (without.train_on, without.overlong, without.turns) == ("assistant", "reject", "split")
    foreign = {**described, "schema": "./mine.py:read", "train_on": "./mine.py:mask"}
    assert type(recipe).from_manifest(foreign).schema == "auto"
    assert type(recipe).from_manifest(foreign).train_on == "assistant"


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.choices])
def test_values_outside_the_table_are_refused(name):
    for value in OPTIONS[name].choices:
        check_choices({name: value})
        assert value in OPTIONS[name].help or value == "auto"
    with pytest.raises(UsageError, match=f"unknown_{name}"):
        check_choices({name: "other"})
    if OPTIONS[name].group == "rows":
        with pytest.raises(UsageError, match=f"unknown_{name}"):
            Options(**{name: "other"})


def test_unknown_options_of_a_build_are_refused(tmp_path, tokenizer_dir):
    from ftdata.build.dataset import write_build

    with pytest.raises(UsageError, match="did you mean 'max_length'"):
        write_build([], tokenizer_dir("tiny_bpe"), tmp_path / "out", max_lenght=3)


def test_the_table_imports_no_heavy_module():
    code = "import sys, ftdata.options, ftdata.config; print({'numpy', 'pyarrow', 'tokenizers', 'jinja2'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_values_of_on_bad_rows_equal_the_table():
    with pytest.raises(UsageError, match=f"known: {', '.join(sorted(OPTIONS['on_bad_rows'].choices))}$"):
        RejectLimit("other")


def test_overlong_without_max_length_is_refused():
    with pytest.raises(UsageError, match="overlong='truncate' has no effect without max_length"):
        Options(overlong="truncate")
