"""Commands that look: each is a few lines over the public function of the same name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ftdata.cli.options import (
    PLACES,
    Columns,
    ControlTokens,
    Data,
    Date,
    Encoding,
    Json,
    Limit,
    MaxLength,
    OnDroppedMessage,
    OnMissingStop,
    Overlong,
    Packing,
    Quoting,
    RejectFlags,
    Schema,
    Split,
    Template,
    TemplateKwarg,
    Tokenizer,
    TrainOn,
    TrainParts,
    Turns,
    Where,
    collect_recipe_options,
    make_sources,
    parse_row_numbers,
    parse_template_kwargs,
    split_names,
)
from ftdata.cli.output import no_progress, print_paged, print_value, progress_bar, write_stdout
from ftdata.errors import UsageError


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
    on_dropped_message: OnDroppedMessage = "reject",
    on_missing_stop: OnMissingStop = "flag",
    reject_flags: RejectFlags = None,
    max_length: MaxLength = None,
    overlong: Overlong = "reject",
    date: Date = None,
    template_kwarg: TemplateKwarg = None,
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
    quoting: Quoting = None,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """Show what rows become: the text, the control tokens, and what of it is trained; of data, or of a build."""
    given = locals()
    from ftdata.inspection.preview import preview as look

    with progress_bar() if odd or html else no_progress() as progress:
        shown = look(
            make_sources([data], encoding, split, quoting),
            tokenizer,
            template,
            **collect_recipe_options(given),
            n=n,
            row=parse_row_numbers(row),
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
        print_value(shown, as_json=True)
    elif html:
        write_stdout(f"{html}: {len(shown.rows):,} rows, {html.stat().st_size:,} bytes")
    else:
        print_paged(shown.print, pager=pager)


def audit(
    data: Annotated[list[str], typer.Argument(help=f"What to look at: a build, or {PLACES}.", show_default=False)],
    tokenizer: Tokenizer = None,
    template: Template = None,
    schema: Schema = "auto",
    column: Columns = None,
    train_on: TrainOn = "assistant",
    train_parts: TrainParts = None,
    turns: Turns = "auto",
    control_tokens: ControlTokens = "escape",
    on_dropped_message: OnDroppedMessage = "reject",
    on_missing_stop: OnMissingStop = "flag",
    reject_flags: RejectFlags = None,
    max_length: MaxLength = None,
    overlong: Overlong = "reject",
    where: Where = None,
    limit: Limit = None,
    date: Date = None,
    template_kwarg: TemplateKwarg = None,
    against: Annotated[
        list[str] | None, typer.Option(help="A test set, of which no row may be trained on. Repeatable.")
    ] = None,
    near_duplicate_threshold: Annotated[
        float | None, typer.Option(help="Look for rows that are so similar, e.g. 0.8.")
    ] = None,
    pii: Annotated[bool, typer.Option("--pii", help="Look for what belongs to a person, too.")] = False,
    ignore: Annotated[str | None, typer.Option(help="Codes not to look for: duplicate,script.")] = None,
    fail_on: Annotated[
        str, typer.Option(help="The least severity that is exit code 1: note, warning, error; or never.")
    ] = "note",
    format_: Annotated[str, typer.Option("--format", help="text, json, sarif or github (annotations).")] = "text",
    encoding: Encoding = None,
    quoting: Quoting = None,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """Look for what would go wrong in training on data or on a build; exit code 1 if there is anything."""
    given = locals()
    from ftdata.errors import check_choice
    from ftdata.inspection.audit import FAIL_ON
    from ftdata.inspection.audit import audit as inspect

    check_choice("format", format_, ("text", "json", "sarif", "github"))
    check_choice("fail_on", fail_on, FAIL_ON)
    with progress_bar() as progress:
        report = inspect(
            make_sources(data, encoding, split, quoting),
            tokenizer,
            template,
            **collect_recipe_options(given),
            where=where,
            limit=limit,
            against=None if against is None else make_sources(against, encoding, None, quoting),
            near_duplicate_threshold=near_duplicate_threshold,
            pii=pii,
            ignore=split_names(ignore) or (),
            progress=progress,
        )
    if format_ == "sarif":
        write_stdout(json.dumps(report.as_sarif(), ensure_ascii=False, indent=2))
    elif format_ == "github":
        write_stdout(report.as_github())
    elif as_json or format_ == "json":
        print_value(report, as_json=True)
    else:
        print_paged(report.print)
    raise typer.Exit(1 if report.fails(fail_on) else 0)


def stats(
    data: Annotated[list[str], typer.Argument(help=f"What to count: a build, or {PLACES}.", show_default=False)],
    tokenizer: Tokenizer = None,
    template: Template = None,
    schema: Schema = "auto",
    column: Columns = None,
    train_on: TrainOn = "assistant",
    train_parts: TrainParts = None,
    turns: Turns = "auto",
    control_tokens: ControlTokens = "escape",
    on_dropped_message: OnDroppedMessage = "reject",
    on_missing_stop: OnMissingStop = "flag",
    reject_flags: RejectFlags = None,
    max_length: MaxLength = None,
    overlong: Overlong = "reject",
    where: Where = None,
    limit: Limit = None,
    date: Date = None,
    template_kwarg: TemplateKwarg = None,
    svg: Annotated[Path | None, typer.Option(help="A folder for pictures: lengths.svg, trained.svg.")] = None,
    encoding: Encoding = None,
    quoting: Quoting = None,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """Count rows, turns, tokens and what is trained, by source and schema; of data, or of a build."""
    given = locals()
    from ftdata.inspection.stats import stats as count

    with progress_bar() as progress:
        found = count(
            make_sources(data, encoding, split, quoting),
            tokenizer,
            template,
            **collect_recipe_options(given),
            where=where,
            limit=limit,
            svg=svg,
            progress=progress,
        )
    if as_json:
        print_value(found, as_json=True)
    else:
        print_paged(found.print)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A build, a config file, or data.", show_default=False)],
    b: Annotated[str | None, typer.Argument(metavar="B", help="The same; without it, A with --set.")] = None,
    tokenizer: Tokenizer = None,
    template: Template = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="How B differs from A: template=chatml, turns=split. Repeatable.")
    ] = None,
    template_kwarg: TemplateKwarg = None,
    n: Annotated[int, typer.Option("-n", help="How many rows that differ to show.", min=0)] = 10,
    html: Annotated[Path | None, typer.Option(help="Write these to this file, side by side.")] = None,
    pager: Annotated[bool, typer.Option(help="Page through what is longer than the screen.")] = True,
    as_json: Json = False,
) -> None:
    """Compare the same rows, built in two ways: which tokens or labels are others; exit code 1 if there are any."""
    from ftdata.inspection.diff import diff as compare
    from ftdata.inspection.diff import side_options

    both: dict[str, Any] = {
        "tokenizer": tokenizer,
        "template": template,
        "template_kwargs": parse_template_kwargs(template_kwarg),
    }
    first = side_options(a, **both)
    second = side_options(a if b is None else b, **both, changes=set_ or [])
    if b is None and not set_:
        raise UsageError(
            "diff", "there is nothing to compare with", hint="name B, or say how it differs: --set turns=split"
        )
    with progress_bar() as progress:
        found = compare(first, second, n=n, html=html, progress=progress)
    if as_json:
        print_value(found, as_json=True)
    else:
        print_paged(found.print, pager=pager)
        if html:
            write_stdout(f"{html}: {len(found.changed):,} rows side by side")
    raise typer.Exit(1 if found else 0)
