"""The command line: each command is a few lines over the public function of the same name.

Exit codes: 0 done, 1 findings, 2 usage or config, 3 input refused, 4 rejects above the limit, 5 local I/O,
6 network or hub, 7 internal error, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import pydoc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import ftdata
from ftdata.errors import FtdataError, UsageError

app = typer.Typer(
    name="ftdata",
    help="Turn fine-tuning data into exactly the tokens and labels a model should be trained on; look at them; train.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)
templates_app = typer.Typer(no_args_is_help=True, help="List, show and check templates.")
app.add_typer(templates_app, name="templates")


def _number(text: str) -> float:
    """Return a number of rows, or a share of them: 1 is one row, and 1.0 neither."""
    return int(text) if text.isdecimal() else float(text)


_MOST_ROWS = 10_000
_PLACES = (
    "a file (json, jsonl, csv, tsv, parquet, arrow, xlsx; packed or not), glob, folder, URL, or - for standard input"
)
Data = Annotated[str, typer.Argument(help=f"What to read: {_PLACES}.", show_default=False)]
Encoding = Annotated[str | None, typer.Option(help="What text is written in that is not Unicode, e.g. cp1252.")]
Split = Annotated[str | None, typer.Option(help="The split to read, of data that has several.")]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", "-t", help="A folder with tokenizer.json, or a hub id.")]
Template = Annotated[
    str | None, typer.Option(help="A built-in name, a .jinja file, or Jinja text. Default: the tokenizer's.")
]
Schema = Annotated[str, typer.Option(help="The shape of every row; auto finds it per row.")]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="Map a column, e.g. --column output=answer. Repeatable.")
]
TrainOn = Annotated[str, typer.Option(help="assistant, last_assistant, completion, all, or ./file.py:function.")]
Turns = Annotated[str, typer.Option(help="auto, joint or split: one example per conversation, or per assistant turn.")]
TrainParts = Annotated[
    str | None, typer.Option(help="Of what is trained, these parts only: reasoning,answer,tool_call.")
]
Dropped = Annotated[str, typer.Option(help="Messages that the template leaves out (system): refuse or flag the row.")]
Unclosed = Annotated[str, typer.Option(help="Last turns that the template leaves without a stop: flag or append_eos.")]
Refuse = Annotated[str | None, typer.Option(help="Flags of the report that make a row a bad one: no_stop,content_cut.")]
ControlTokens = Annotated[str, typer.Option(help="Control-token text inside data: escape, refuse or allow.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens that an example, and a pack, may have.")]
Overlong = Annotated[str, typer.Option(help="What becomes of longer examples: reject, drop_turns or truncate.")]
Date = Annotated[str | None, typer.Option(help="What templates that print a date are shown, e.g. 2026-01-31.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Packing = Annotated[str | None, typer.Option(help="bfd: put whole examples together, best fit first.")]
Where = Annotated[str | None, typer.Option(help="Rows to read: lang == 'en' and messages | length > 2 (Jinja).")]
Limit = Annotated[int | None, typer.Option(help="How many rows to read of each place named.", min=1)]
Dedup = Annotated[bool, typer.Option("--dedup", help="Leave out rows that are equal to an earlier one.")]
Near = Annotated[float | None, typer.Option(help="How similar rows count as equal for --dedup and --test-size: 0.8.")]
Sample = Annotated[
    float | None, typer.Option(parser=_number, help="Share (below 1) or number of rows to take, by chance.")
]
Shuffle = Annotated[bool, typer.Option("--shuffle", help="Put the rows into another order.")]
TestSize = Annotated[
    float | None, typer.Option(parser=_number, help="Share (below 1) or number of rows for a test split.")
]
Seed = Annotated[int, typer.Option(help="Decides which rows go to the test split.")]
OnBadRows = Annotated[str, typer.Option(help="error: show all and stop; quarantine: go on without them.")]
MaxRejects = Annotated[str | None, typer.Option(help="With quarantine: how many rows may be rejected, e.g. 100 or 1%.")]


def main() -> None:
    """Run the command line; every error that ftdata knows is one message, without a traceback."""
    # Terminals that cannot show a character must not stop the work.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        app()
    except FtdataError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output (`| head`) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"[io] {error.filename or ''}: {error.strerror or error}", 5)
    except Exception as error:
        if os.environ.get("FTDATA_DEBUG"):
            raise
        _fail(f"[internal] {type(error).__name__}: {error}. This is a bug of ftdata; FTDATA_DEBUG=1 shows where", 7)


def _fail(message: str, code: int) -> None:
    print(f"ftdata: {message}", file=sys.stderr)
    sys.exit(code)


def _print(value: Any, *, as_json: bool) -> None:
    print(json.dumps(value.as_dict(), ensure_ascii=False, indent=2) if as_json else value)


def _columns(pairs: list[str] | None) -> dict[str, str] | None:
    for pair in pairs or []:
        if "=" not in pair:
            raise UsageError("column", f"--column is {pair!r}, expected name=column, e.g. output=answer")
    return {pair.split("=", 1)[0]: pair.split("=", 1)[1] for pair in pairs} if pairs else None


def _listed(names: str | None) -> list[str] | None:
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def _rows(text: str | None) -> list[int] | None:
    """Return the numbers that `3,8-11` stands for."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or int(last) - int(first) > _MOST_ROWS:
            raise UsageError("row", f"--row is {text!r}, expected numbers from 0, such as 7 or 3,8-11")
        found += range(int(first), int(last) + 1)
    return found


def _paged(show: Callable[[Any], None], *, pager: bool) -> None:
    """Print, through a pager where that is longer than the screen of somebody who is watching."""
    from rich.console import Console

    console = Console()
    if not pager or not console.is_terminal or os.environ.get("TERM") == "dumb":
        show(console)
        return
    with console.capture() as capture:
        show(console)
    text = capture.get()
    if text.count("\n") + len(text) // (2 * console.width) < console.height:
        console.file.write(text)
        return
    # As git does: a pager that lets colours through, and does not clear the screen behind itself.
    os.environ.setdefault("LESS", "FRX")
    os.environ.setdefault("LESSCHARSET", "utf-8")
    pydoc.pager(text)


def _places(data: list[str], encoding: str | None, split: str | None) -> Any:
    given = {"encoding": encoding, "split": split}
    more = {name: value for name, value in given.items() if value is not None}
    return [{"path": place, **more} for place in data] if more else data


def _version(value: bool) -> None:
    if value:
        print(f"ftdata {ftdata.__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def preview(
    data: Data,
    tokenizer: Tokenizer = None,
    template: Template = None,
    schema: Schema = "auto",
    column: Columns = None,
    train_on: TrainOn = "assistant",
    train_parts: TrainParts = None,
    turns: Turns = "auto",
    control_tokens: ControlTokens = "escape",
    dropped: Dropped = "refuse",
    unclosed: Unclosed = "flag",
    refuse: Refuse = None,
    max_length: MaxLength = None,
    overlong: Overlong = "reject",
    date: Date = None,
    n: Annotated[int | None, typer.Option("-n", help="How many rows: 3, of odd ones 1 of each kind.", min=1)] = None,
    row: Annotated[str | None, typer.Option(help="Show these rows, from 0: 7, or 3,8-11.")] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Show the rows of this id, uuid or the like.")] = None,
    grep: Annotated[str | None, typer.Option(help="Show rows in which this regular expression is found.")] = None,
    odd: Annotated[bool, typer.Option("--odd", help="Show the rows that stand out, and why.")] = False,
    where: Where = None,
    limit: Limit = None,
    packing: Packing = None,
    html: Annotated[Path | None, typer.Option(help="Write all that is to be seen to this file, as one page.")] = None,
    pager: Annotated[bool, typer.Option(help="Page through what is longer than the screen.")] = True,
    encoding: Encoding = None,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """Show what rows become: the text, the control tokens, and what of it is trained; of data, or of a build."""
    from ftdata.look.preview import preview as look

    with _progress() if odd or html else _quiet() as progress:
        shown = look(
            _places([data], encoding, split),
            tokenizer,
            template,
            schema=schema,
            columns=_columns(column),
            train_on=train_on,
            train_parts=_listed(train_parts),
            turns=turns,
            control_tokens=control_tokens,
            dropped=dropped,
            unclosed=unclosed,
            refuse=_listed(refuse) or (),
            max_length=max_length,
            overlong=overlong,
            date=date,
            n=n,
            row=_rows(row),
            id=id_,
            grep=grep,
            odd=odd,
            where=where,
            limit=limit,
            packing=packing,
            html=html,
            progress=progress,
        )
    if as_json:
        _print(shown, as_json=True)
    elif html:
        print(f"{html}: {len(shown.rows):,} rows, {html.stat().st_size:,} bytes")
    else:
        _paged(shown.print, pager=pager)


@app.command()
def build(
    data: Annotated[list[str], typer.Argument(help=f"What to read, each {_PLACES}.", show_default=False)],
    tokenizer: Annotated[str, typer.Option("--tokenizer", "-t", help="A folder with tokenizer.json, or a hub id.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the build.")],
    template: Template = None,
    schema: Schema = "auto",
    column: Columns = None,
    train_on: TrainOn = "assistant",
    train_parts: TrainParts = None,
    turns: Turns = "auto",
    control_tokens: ControlTokens = "escape",
    dropped: Dropped = "refuse",
    unclosed: Unclosed = "flag",
    refuse: Refuse = None,
    max_length: MaxLength = None,
    overlong: Overlong = "reject",
    packing: Packing = None,
    where: Where = None,
    limit: Limit = None,
    dedup: Dedup = False,
    near: Near = None,
    sample: Sample = None,
    shuffle: Shuffle = False,
    test_size: TestSize = None,
    seed: Seed = 0,
    on_bad_rows: OnBadRows = "error",
    max_rejects: MaxRejects = None,
    date: Date = None,
    workers: Annotated[int | None, typer.Option(help="Processes at most; the result does not depend on it.")] = None,
    engine: Annotated[str, typer.Option(help="local.")] = "local",
    encoding: Encoding = None,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """Build a data set: tokens and labels, with a report of every row."""
    from ftdata.build import write_build

    with _progress() as progress:
        report = write_build(
            _places(data, encoding, split),
            tokenizer,
            output_dir,
            template=template,
            schema=schema,
            columns=_columns(column),
            train_on=train_on,
            train_parts=_listed(train_parts),
            turns=turns,
            control_tokens=control_tokens,
            dropped=dropped,
            unclosed=unclosed,
            refuse=_listed(refuse) or (),
            max_length=max_length,
            overlong=overlong,
            packing=packing,
            where=where,
            limit=limit,
            dedup=dedup,
            near=near,
            sample=sample,
            shuffle=shuffle,
            test_size=test_size,
            seed=seed,
            on_bad_rows=on_bad_rows,
            max_rejects=max_rejects,
            workers=os.cpu_count() if workers is None else workers,
            engine=engine,
            date=date,
            progress=progress,
        )
    _print(report, as_json=as_json)
    if not as_json:
        print(f"built    {output_dir} in {report.seconds:.1f} s (tokens by {report.engine})")


@app.command()
def convert(
    data: Annotated[list[str], typer.Argument(help=f"What to read, each {_PLACES}.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .jsonl or .parquet file.")],
    to: Annotated[
        str, typer.Option(help="messages, prompt_completion, or text (as the template prints it).")
    ] = "messages",
    tokenizer: Tokenizer = None,
    template: Template = None,
    schema: Schema = "auto",
    column: Columns = None,
    where: Where = None,
    limit: Limit = None,
    on_bad_rows: OnBadRows = "error",
    max_rejects: MaxRejects = None,
    encoding: Encoding = None,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """Write rows of any shape in one: as messages, as prompt and completion, or as templated text."""
    from ftdata._convert import convert as write

    done = write(
        _places(data, encoding, split),
        output,
        to,
        tokenizer=tokenizer,
        template=template,
        schema=schema,
        columns=_columns(column),
        where=where,
        limit=limit,
        on_bad_rows=on_bad_rows,
        max_rejects=max_rejects,
    )
    _print(done, as_json=as_json)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A build.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="owner/name on the hub; made if it is not there.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new one private.")] = False,
) -> None:
    """Upload a build to the hub, with its card."""
    from ftdata._push import push as upload

    print(upload(folder, repo, private=private))


@app.command()
def audit(
    data: Annotated[list[str], typer.Argument(help=f"What to look at: a build, or {_PLACES}.", show_default=False)],
    tokenizer: Tokenizer = None,
    template: Template = None,
    schema: Schema = "auto",
    column: Columns = None,
    train_on: TrainOn = "assistant",
    train_parts: TrainParts = None,
    turns: Turns = "auto",
    control_tokens: ControlTokens = "escape",
    dropped: Dropped = "refuse",
    unclosed: Unclosed = "flag",
    max_length: MaxLength = None,
    overlong: Overlong = "reject",
    where: Where = None,
    limit: Limit = None,
    date: Date = None,
    against: Annotated[
        list[str] | None, typer.Option(help="A test set, of which no row may be trained on. Repeatable.")
    ] = None,
    near: Annotated[float | None, typer.Option(help="Look for rows that are so similar, e.g. 0.8.")] = None,
    pii: Annotated[bool, typer.Option("--pii", help="Look for what belongs to a person, too.")] = False,
    ignore: Annotated[str | None, typer.Option(help="Codes not to look for: duplicate,script.")] = None,
    fail_on: Annotated[
        str, typer.Option(help="The least severity that is exit code 1: note, warning, error; or never.")
    ] = "note",
    format_: Annotated[str, typer.Option("--format", help="text, json, sarif or github (annotations).")] = "text",
    encoding: Encoding = None,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """Look for what would go wrong in training on data or on a build; exit code 1 if there is anything."""
    from ftdata.errors import one_of
    from ftdata.look.audit import FAIL_ON
    from ftdata.look.audit import audit as inspect

    one_of("format", format_, ("text", "json", "sarif", "github"))
    one_of("fail_on", fail_on, FAIL_ON)
    with _progress() as progress:
        report = inspect(
            _places(data, encoding, split),
            tokenizer,
            template,
            schema=schema,
            columns=_columns(column),
            train_on=train_on,
            train_parts=_listed(train_parts),
            turns=turns,
            control_tokens=control_tokens,
            dropped=dropped,
            unclosed=unclosed,
            max_length=max_length,
            overlong=overlong,
            where=where,
            limit=limit,
            date=date,
            against=against,
            near=near,
            pii=pii,
            ignore=_listed(ignore) or (),
            progress=progress,
        )
    if format_ == "sarif":
        print(json.dumps(report.as_sarif(), ensure_ascii=False, indent=2))
    elif format_ == "github":
        print(report.as_github())
    elif as_json or format_ == "json":
        _print(report, as_json=True)
    else:
        from rich.console import Console

        report.print(Console())
    raise typer.Exit(1 if report.fails(fail_on) else 0)


@app.command()
def stats(
    data: Annotated[list[str], typer.Argument(help=f"What to count: a build, or {_PLACES}.", show_default=False)],
    tokenizer: Tokenizer = None,
    template: Template = None,
    schema: Schema = "auto",
    column: Columns = None,
    train_on: TrainOn = "assistant",
    train_parts: TrainParts = None,
    turns: Turns = "auto",
    control_tokens: ControlTokens = "escape",
    dropped: Dropped = "refuse",
    unclosed: Unclosed = "flag",
    max_length: MaxLength = None,
    overlong: Overlong = "reject",
    where: Where = None,
    limit: Limit = None,
    date: Date = None,
    svg: Annotated[Path | None, typer.Option(help="A folder for pictures: lengths.svg, trained.svg.")] = None,
    encoding: Encoding = None,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """Count rows, turns, tokens and what is trained, by source and schema; of data, or of a build."""
    from rich.console import Console

    from ftdata.look.stats import stats as count

    with _progress() as progress:
        found = count(
            _places(data, encoding, split),
            tokenizer,
            template,
            schema=schema,
            columns=_columns(column),
            train_on=train_on,
            train_parts=_listed(train_parts),
            turns=turns,
            control_tokens=control_tokens,
            dropped=dropped,
            unclosed=unclosed,
            max_length=max_length,
            overlong=overlong,
            where=where,
            limit=limit,
            date=date,
            svg=svg,
            progress=progress,
        )
    if as_json:
        _print(found, as_json=True)
    else:
        found.print(Console())


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A build, a config file, or data.", show_default=False)],
    b: Annotated[str | None, typer.Argument(metavar="B", help="The same; without it, A with --set.")] = None,
    tokenizer: Tokenizer = None,
    template: Template = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="How B differs from A: template=chatml, turns=split. Repeatable.")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="How many rows that differ to show.", min=0)] = 10,
    html: Annotated[Path | None, typer.Option(help="Write these to this file, side by side.")] = None,
    pager: Annotated[bool, typer.Option(help="Page through what is longer than the screen.")] = True,
    as_json: Json = False,
) -> None:
    """Compare the same rows, built in two ways: which tokens or labels are others; exit code 1 if there are any."""
    from ftdata.look.diff import diff as compare
    from ftdata.look.diff import side_options

    first = side_options(a, tokenizer=tokenizer, template=template)
    second = side_options(a if b is None else b, tokenizer=tokenizer, template=template, changes=set_ or [])
    if b is None and not set_:
        raise UsageError(
            "diff", "there is nothing to compare with", hint="name B, or say how it differs: --set turns=split"
        )
    with _progress() as progress:
        found = compare(first, second, n=n, html=html, progress=progress)
    if as_json:
        _print(found, as_json=True)
    else:
        _paged(found.print, pager=pager)
        if html:
            print(f"{html}: {len(found.changed):,} rows side by side")
    raise typer.Exit(1 if found else 0)


@templates_app.command("list")
def templates_list(as_json: Json = False) -> None:
    """List the built-in and installed templates."""
    from ftdata.templates import templates

    print(json.dumps(templates.names()) if as_json else "\n".join(templates.names()))


@templates_app.command("show")
def templates_show(
    name: Annotated[str, typer.Argument(help="A template's name or file.")], as_json: Json = False
) -> None:
    """Print a template's Jinja text."""
    from ftdata.templates import find

    found, source = find(name)
    print(
        json.dumps({"name": found, "source": source}, ensure_ascii=False) if as_json else source,
        end="\n" if as_json else "",
    )


@templates_app.command("check")
def templates_check(
    template: Annotated[str, typer.Argument(help="A template, or a tokenizer whose template is checked.")],
    as_json: Json = False,
) -> None:
    """Say what a template does: its stop, whether it rewrites earlier turns, what it drops."""
    from ftdata.recipe import check_template

    report = check_template(template)
    _print(report, as_json=as_json)
    raise typer.Exit(1 if report.verdict == "refused" else 0)


@app.command()
def train(
    source: Annotated[
        str, typer.Argument(help="A config file (.yaml, .toml), a build, or a data file.", show_default=False)
    ],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Folder or hub id of the base model.")] = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", "-o", help="Folder for the run.")] = None,
    template: Template = None,
    max_length: MaxLength = None,
    packing: Packing = None,
    test_size: TestSize = None,
    quantization: Annotated[str | None, typer.Option(help="nf4: QLoRA, the base model in 4 bits.")] = None,
    lora_r: Annotated[int | None, typer.Option(help="Rank of the LoRA adapter.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A field of SFTConfig, e.g. --set learning_rate=1e-4.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the run's folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model on data or on a build, with LoRA, QLoRA or in full; save, and draw the loss."""
    from ftdata.train import run

    folder = run(
        source,
        model=model,
        output_dir=output_dir,
        template=template,
        max_length=max_length,
        packing=packing,
        test_size=test_size,
        quantization=quantization,
        lora_r=lora_r,
        settings=set_ or [],
        resume=resume,
    )
    if as_json:
        print((folder / "run.json").read_text(encoding="utf-8"), end="")


@app.command("eval")
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="A finished run of `ftdata train`.")],
    data: Annotated[str | None, typer.Option(help="Questions with expected answers; default: the run's data.")] = None,
    n: Annotated[int, typer.Option("-n", help="How many rows.", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """Ask base and tuned model the same questions, side by side, with exact match and SacreBLEU."""
    from ftdata.train import compare

    report = compare(run_dir, data, n)
    if as_json:
        _print(report, as_json=True)
    else:
        from rich.console import Console

        report.print(Console())


@app.command()
def plugins(as_json: Json = False) -> None:
    """List readers, schemas, templates and mask policies, built in and installed."""
    from ftdata.mask import masks
    from ftdata.readers import readers
    from ftdata.schemas import schemas
    from ftdata.templates import templates

    found = {registry.group: registry.names() for registry in (readers, schemas, templates, masks)}
    print(
        json.dumps(found, indent=2)
        if as_json
        else "\n".join(f"{group}: {', '.join(names)}" for group, names in found.items())
    )


@contextmanager
def _quiet() -> Iterator[None]:
    yield None


@contextmanager
def _progress() -> Iterator[Any]:
    """Show rows and tokens done on stderr, where a person is watching."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.fields[rows]:,} rows ({task.fields[rows_each]:,.0f}/s)"),
        TextColumn("{task.fields[tokens]:,} tokens ({task.fields[tokens_each]:,.0f}/s)"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("build", total=None, rows=0, tokens=0, rows_each=0, tokens_each=0)

        def update(rows: int, tokens: int, share: float | None) -> None:
            seconds = bar.tasks[task].elapsed or 1
            said = {"rows": rows, "tokens": tokens, "rows_each": rows / seconds, "tokens_each": tokens / seconds}
            bar.update(task, total=share and 1, completed=share or 0, **cast(Any, said))

        yield update
