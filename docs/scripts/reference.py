"""Write the pages of `docs/reference/` out of the code that they describe.

python docs/scripts/reference.py            # write what differs
python docs/scripts/reference.py --check    # write nothing; exit code 1 if a page is out of date
"""

import ast
import inspect
import itertools
import re
import sys
import typing
from pathlib import Path

import errors
import msgspec
from typer.models import ArgumentInfo

from ftdata.cli import app
from ftdata.config import SECTIONS, Config, Lora
from ftdata.inspection.checks import checks
from ftdata.pipeline.mask import masks
from ftdata.readers import readers
from ftdata.schemas import schemas
from ftdata.schemas.shapes import ALIASES
from ftdata.templates import templates

TARGET = Path(__file__).parents[1] / "reference"
COMMANDS = """# Commands

Flags take `-` and `_` alike. Every command that prints takes `--json`, and each `-h` or `--help`. Exit codes: 0 done,
1 findings, 2 usage or configuration, 3 input refused, 4 too many rejects, 5 local I/O, 6 network or hub, 7 internal
error, 130 interrupted.
"""
CHECKS = """# What `ftdata audit` looks for

```console
$ ftdata audit data.jsonl --tokenizer MODEL || [ $? = 1 ]                # exit code 1 if anything is found
$ ftdata audit data.jsonl -t MODEL --against test.jsonl --fail-on never  # no row of the test set may be trained on
$ ftdata build data.jsonl -t MODEL -o built && ftdata audit built --fail-on error  # the labels that a build holds
$ ftdata audit data.jsonl -t MODEL --near-duplicate-threshold 0.8 --pii --fail-on never      # what is looked for when asked only
$ ftdata audit data.jsonl -t MODEL --ignore script --fail-on error --format github
```

An *error* says that what is trained is wrong, a *warning* that it likely is, a *note* what is good to know. Rows that
are [refused](errors.md) are errors, by their own codes, even where a check of the same code is a warning. `--format` is
`text`, `json`, `sarif` (2.1.0) or `github` (annotations); each finding names its first ten rows (as text five) by file
and line, or row. Codes stay as they are. In Python: `ftdata.audit(...)` returns the same report.

Rows of splits that are not for training, and of `--against`, are held out: they are compared with those that are
trained on, token by token; `--near-duplicate-threshold` compares words. Rows of a build are those of the data that it was made of,
wherever packs hold their examples. Checks marked † need messages, or what was decided when a build was made, so a
build is not asked for them.

| code | severity | of | says | way out | asked by |
|---|---|---|---|---|---|
"""
OF = {"flag": "examples", "row": "a row", "data": "all rows", "template": "tokenizer, template"}
CONFIGURATION = """# Configuration

Fields of the file that [`ftdata train`](../train.md) takes, in YAML or TOML, and of `--set NAME=VALUE`. Up to
`template_kwargs` they are the options of `build_sft_dataset`. Unknown names are refused, with the nearest known one.

| field | type | default | |
|---|---|---|---|
"""
SCHEMAS = """# Schemas

The shape of a row is found from its columns, row by row; `schema=` names one for all. The columns are those that
`columns=` may map. What each becomes, and how messages may be spelled: [data](../data.md).

| schema | columns | also read as |
|---|---|---|
"""
PLUGINS = """# Plug-in points

Four maps from a name to a function. A plug-in is a name in one of them: registered in process, installed with a
package that has such an entry point, or a function in a file of yours, `./file.py:name`, wherever a name is asked for.
`ftdata plugins` lists what there is, and the package that it comes from.

"""


def cell(text):
    """Return a text as a cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def every_command(group=app, path="ftdata"):
    """Yield the name of every command, and the function behind it, those of groups within it too."""
    for one in group.registered_commands:
        yield f"{path} {one.name or one.callback.__name__}", one.callback
    for one in group.registered_groups:
        yield from every_command(one.typer_instance, f"{path} {one.name}")


def options(function):
    """Yield the options of a command: parameter, type, what is said of it."""
    for one in inspect.signature(function, eval_str=True).parameters.values():
        kind, info = typing.get_args(one.annotation)
        yield one, kind, info


def flags(one, kind, info):
    """Return the names of an option on the command line, or of an argument in its usage."""
    if isinstance(info, ArgumentInfo):
        return (one.name.upper(),)
    plain = f"--{one.name.replace('_', '-')}"
    both = (plain, plain.replace("--", "--no-", 1)) if kind is bool else (plain,)
    # Where a parameter is annotated, typer finds the first of its names in the place of the default.
    named = tuple(one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str))
    return named or both


def takes(kind):
    """Return the type of a value as a word."""
    many = typing.get_origin(kind) is list or any(typing.get_origin(part) is list for part in typing.get_args(kind))
    names = re.findall(r"Path|str|int|float", str(kind))
    return ({"Path": "path", "str": "text", "int": "int", "float": "number"}[names[0]] if names else "") + "..." * many


def option_row(one, kind, info):
    """Return the row of an option: its names, what it takes, its default, what it says."""
    default = "required" if one.default is one.empty else f"`{one.default}`" * (one.default not in (None, False))
    names = ", ".join(flags(one, kind, info))
    return f"| `{names}` | {takes(kind)} | {default} | {cell(info.help)} |"


def commands():
    """Return the page of all commands with all their options."""
    parts = [COMMANDS]
    for name, function in every_command():
        rows = "\n".join(option_row(*option) for option in options(function))
        table = f"\n| | takes | default | |\n|---|---|---|---|\n{rows}\n" if rows else ""
        parts.append(f"## `{name}`\n\n{cell(function.__doc__)}\n{table}")
    return "\n".join(parts)


def check_page():
    """Return the page of all checks of `ftdata audit`."""
    lines = []
    for one in checks.values():
        code = f"`{one.code}`{' †' if one.of_messages else ''}"
        asked = f"`--{one.asked}`" if one.asked else ""
        lines.append(f"| {code} | {one.severity} | {OF[one.of]} | {one.says} | {one.fix} | {asked} |")
    return CHECKS + "\n".join(lines) + "\n"


def said(kind):
    """Return field -> the text that stands below it in a class."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def fields(kind, prefix="", *, helps=None):
    """Yield a row for each field of a configuration."""
    told = {**(helps or {}), **said(kind)}
    lines = ast.parse(inspect.getsource(kind)).body[0].body
    types = {one.target.id: ast.unparse(one.annotation) for one in lines if isinstance(one, ast.AnnAssign)}
    for one in msgspec.structs.fields(kind):
        default = (
            "required"
            if one.required
            else f"`{one.default!r}`"
            if one.default is not msgspec.NODEFAULT
            else f"`{one.default_factory()!r}`"
        )
        yield f"| `{prefix}{one.name}` | `{cell(types[one.name])}` | {default} | {cell(told[one.name])} |"


def configuration():
    """Return the page of all fields of a configuration, which say what the options of the same name do."""
    functions = dict(every_command())
    helps = {
        one.name.replace("column", "columns"): info.help
        for name in ("train", "build")
        for one, _, info in options(functions[f"ftdata {name}"])
    }
    sections = "\n".join(
        f"| `{name}` | {', '.join(f'`{one}`' for one in grouped)} |" for name, grouped in SECTIONS.items()
    )
    return "\n".join((
        CONFIGURATION.rstrip("\n"),
        *fields(Config, helps=helps),
        *fields(Lora, "lora."),
        "",
        "Some may stand in a section; a single value there is that of the first:",
        "",
        "| section | fields |",
        "|---|---|",
        sections,
        "",
    ))  # fmt: skip


def schema_page():
    """Return the page of all schemas."""
    lines = []
    for name, one in schemas.registered().items():
        others = ", ".join(f"`{other}` for `{column}`" for column in one.columns for other in ALIASES.get(column, ()))
        lines.append(f"| `{name}` | {', '.join(f'`{column}`' for column in one.columns)} | {others} |")
    return SCHEMAS + "\n".join(lines) + "\n"


def plugin_page():
    """Return the page of the plug-in points."""
    of = {
        readers: ("a function `(Input) -> Iterator[Row \\| Reject]`", "a suffix, or `format`"),
        schemas: ("a function `(Mapping) -> Conversation`, or a `Schema`, which is also found by itself", "`schema`"),
        templates: ("the path of a `.jinja` file", "`template`"),
        masks: ("a function `(Rendered, Conversation) -> Sequence[bool]`, a bool for every span", "`train_on`"),
    }
    lines = ["| entry point | value | named by | built in |", "|---|---|---|---|"]
    for registry, (value, named) in of.items():
        own = ", ".join(f"`{name}`" for name in registry.registered())
        lines.append(f"| `{registry.group}` | {value} | {named} | {own} |")
    return PLUGINS + "\n".join(lines) + "\n\nOne of each, step by step: [plug-ins](../howto/plugins.md).\n"


PAGES = {
    "commands.md": commands,
    "configuration.md": configuration,
    "checks.md": check_page,
    "errors.md": errors.page,
    "schemas.md": schema_page,
    "plugins.md": plugin_page,
}


def main():
    """Write the pages that differ; with `--check`, name them only."""
    old = [
        name for name, page in PAGES.items() if not (TARGET / name).exists() or (TARGET / name).read_text() != page()
    ]
    for name in old:
        if "--check" not in sys.argv:
            (TARGET / name).write_text(PAGES[name]())
        print(f"{'out of date' if '--check' in sys.argv else 'wrote'}  docs/reference/{name}")
    sys.exit(bool(old) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
