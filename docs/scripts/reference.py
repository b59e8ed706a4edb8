"""Write the pages of `docs/reference/` out of the code that they describe.

python docs/scripts/reference.py            # write what differs
python docs/scripts/reference.py --check    # write nothing; exit code 1 if a page is out of date
"""

import ast
import inspect
import itertools
import json
import re
import sys
import typing
from pathlib import Path

import errors
import msgspec
import troubleshooting
from typer.models import ArgumentInfo

from ftdata.cli import app
from ftdata.config import SECTIONS, Config, Lora
from ftdata.exporters import exporters
from ftdata.images.families import image_families
from ftdata.inspection.checks import checks
from ftdata.options import OPTIONS
from ftdata.pipeline.flags import FLAGS
from ftdata.pipeline.mask import masks
from ftdata.readers import readers
from ftdata.schemas import schemas
from ftdata.schemas.shapes import ALIASES
from ftdata.templates import templates

TARGET = Path(__file__).parents[1] / "reference"
RESULTS = TARGET.parents[1] / "benchmarks" / "exporters" / "results.json"
COMMANDS = """# Commands

Options accept `-` and `_`. Every command that prints accepts `--json`; every command accepts `-h` and `--help`.

| exit code | meaning |
|---:|---|
| 0 | done |
| 1 | findings |
| 2 | usage or configuration error |
| 3 | input rejected |
| 4 | too many rejected rows |
| 5 | local I/O error |
| 6 | network or Hub error |
| 7 | internal error |
| 130, 143 | interrupted (Ctrl-C), terminated (SIGTERM) |
"""
CHECKS = """# Checks

`ftdata audit` runs these checks on data or on a build.

```console
$ ftdata audit data.jsonl --tokenizer MODEL || [ $? = 1 ]                # exit code 1 for findings
$ ftdata audit data.jsonl -t MODEL --against test.jsonl --fail-on never  # find rows of a test set
$ ftdata build data.jsonl -t MODEL -o built && ftdata audit built --fail-on error  # check the labels of a build
$ ftdata audit data.jsonl -t MODEL --near-duplicate-threshold 0.8 --pii --fail-on never  # optional checks
$ ftdata audit data.jsonl -t MODEL --ignore script --fail-on error --output-format github
```

| severity | meaning |
|---|---|
| error | The labels are wrong. |
| warning | The labels are probably wrong. |
| note | Good to know. |

Rejected rows are errors with their [code](errors.md). `--output-format` is `text`, `json`, `sarif` (2.1.0) or `github`.
A finding lists its first ten rows (five as text). `ftdata.audit(...)` returns the same report.

Rows of splits other than `train`, and of `--against`, are held out. They are compared with the training rows by their
tokens; with `--near-duplicate-threshold`, by their words. Checks marked † need messages, and are skipped for builds.

| code | severity | of | problem | fix | option |
|---|---|---|---|---|---|
"""
OF = {
    "flag": "examples",
    "row": "a row",
    "data": "all rows",
    "template": "tokenizer, template",
    "server": "trained turns",
}
FLAG_HEAD = """# Flags

A flag marks an example with a property that you should know about: see [masks](../masks.md#flags). `ftdata audit`
reports the flags that have a severity.

| flag | severity | meaning | fix |
|---|---|---|---|
"""
CONFIGURATION = """# Configuration

Fields of the YAML or TOML file of [`ftdata train`](../train.md), and of `--set NAME=VALUE`. The fields up to
`template_kwargs` are options of `build_sft_dataset`. An unknown name is an error.

| field | type | default | description |
|---|---|---|---|
"""
SCHEMAS = """# Schemas

The schema of each row is detected from its columns; `schema=` selects a schema for all rows. `columns=` maps columns.
[Data](../data.md) describes the resulting conversations.

| schema | columns | aliases |
|---|---|---|
"""
PLUGINS = """# Plug-in points

Each registry maps names to functions. A plug-in is registered in the process, installed with a package that has the
entry point, or a function in a file, `./file.py:name`. `ftdata plugins` lists all plug-ins and their packages.

"""

EXPORTS = """# Export formats

`ftdata export BUILD --to FORMAT -o DIR` writes the tokens and labels of a build in the input format of a trainer:
see [Export](../trainers/export.md). The column *rows* states whether a row is a packed sequence (`packs`) or a
document. The last column names the code of the trainer that reads the labels.

| format | tested with | rows | labels | document boundaries | padding | limitations | reader (source code) |
|---|---|---|---|---|---|---|---|
{properties}

## Verification with the loaders of the trainers

For each format, the trainer's own loader and collator read an export of 1,000 conversations. The token ids, the targets
of the loss and the boundaries of all documents are the same as in the build. Where a loss can be computed on a CPU, the
loss of two batches was compared with the loss that PyTorch computes for each document separately; the table contains
the largest difference. `make exporters` repeats the comparison.

| format | version | build | documents | mismatches | loss difference | million tokens per second |
|---|---|---|---:|---:|---:|---:|
{confirmations}

{unconfirmed}ftdata has no export format for these trainers:

- OpenRLHF reads only text (OpenRLHF 0.11.2, `openrlhf/datasets/sft_dataset.py`).
- slime reads text. To pass tokens, write a Python function and set it with `--rollout-function-path`. The function can
  read the format `parquet`, and return `Sample` objects with `tokens`, `loss_mask` and `response_length`.
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
    """Yield the options of a command: parameter, type, and typer's description."""
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
        code = f"`{one.code}`{' †' if one.needs_messages else ''}"
        asked = f"`--{one.enabled_by}`" if one.enabled_by else ""
        lines.append(f"| {code} | {one.severity} | {OF[one.scope]} | {one.message} | {one.fix} | {asked} |")
    return CHECKS + "\n".join(lines) + "\n"


def flag_page():
    """Return the page of all flags of examples."""
    rows = (
        f"| `{code}` | {flag.severity} | {cell(flag.sentence)} | {cell(flag.fix)} |" for code, flag in FLAGS.items()
    )
    return FLAG_HEAD + "\n".join(rows) + "\n"


def said(kind):
    """Return the docstrings of the fields of a class."""
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
    """Return the page of the configuration fields. Fields without a docstring have the help of their option."""
    helps = {name: option.help for name, option in OPTIONS.items()}
    sections = "\n".join(
        f"| `{name}` | {', '.join(f'`{one}`' for one in grouped)} |" for name, grouped in SECTIONS.items()
    )
    return "\n".join((
        CONFIGURATION.rstrip("\n"),
        *fields(Config, helps=helps),
        *fields(Lora, "lora."),
        "",
        "Fields can be grouped in sections. A single value of a section is the value of its first field:",
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
        schemas: ("a function `(Mapping) -> Conversation`, or a `Schema`, which is also detected", "`schema`"),
        templates: ("the path of a `.jinja` file", "`template`"),
        masks: ("a function `(Rendered, Conversation) -> Sequence[bool]`, a bool for every span", "`train_on`"),
        image_families: ("an `ftdata.images.families.ImageFamily`", "the processor of the tokenizer"),
        exporters: ("an `ftdata.exporters.ExportFormat`", "`ftdata export --to`"),
    }
    lines = ["| entry point | value | named by | built in |", "|---|---|---|---|"]
    for registry, (value, named) in of.items():
        own = ", ".join(f"`{name}`" for name in registry.registered())
        lines.append(f"| `{registry.group}` | {value} | {named} | {own} |")
    return PLUGINS + "\n".join(lines) + "\n\nOne of each, step by step: [plug-ins](../howto/plugins.md).\n"


def export_page():
    """Return the page of all export formats, with the results of `benchmarks/exporters/run.py`."""
    results = json.loads(RESULTS.read_text())
    properties, confirmations = [], []
    for name in exporters.registered():
        one = exporters.get(name)
        limits = "; ".join(f"`{loss}`: {text}" for loss, text in one.limitations.items())
        cells = (f"`{name}`", one.trainer, one.rows, one.labels, one.boundaries, one.padding, limits, one.source)
        properties.append(f"| {' | '.join(cells)} |")
        for kind, result in results.get(name, {}).items():
            loss = result["loss_difference"]
            difference = "" if loss is None else f"{loss:.0e}"
            speed = f"{result['tokens_per_second'] / 1e6:.0f}"
            different = str(result["missing"] + result["unexpected"])
            cells = (f"`{name}`", result["version"], kind, f"{result['documents']:,}", different, difference, speed)
            confirmations.append(f"| {' | '.join(cells)} |")
    unconfirmed = ", ".join(f"`{name}`" for name in exporters.registered() if name not in results)
    texts = {"properties": "\n".join(properties), "confirmations": "\n".join(confirmations)}
    return EXPORTS.format(**texts, unconfirmed=unconfirmed and f"These formats are not confirmed yet: {unconfirmed}. ")


PAGES = {
    "commands.md": commands,
    "configuration.md": configuration,
    "checks.md": check_page,
    "errors.md": errors.page,
    "flags.md": flag_page,
    "schemas.md": schema_page,
    "plugins.md": plugin_page,
    "export-formats.md": export_page,
    "../troubleshooting.md": troubleshooting.page,
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
