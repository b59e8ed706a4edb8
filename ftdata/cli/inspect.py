"""Commands that inspect data and builds: `preview`, `audit`, `stats` and `diff`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ftdata.cli.options import (
    Data,
    DataList,
    Json,
    Pager,
    Tokenizer,
    add_options,
    note_unused_options,
    parse_row_numbers,
    read_request,
    split_names,
)
from ftdata.cli.output import print_report, progress_bar, write_stdout
from ftdata.errors import UsageError, count_noun


@add_options("task", "rendering", "rows", "packing", "selection", "source")
def preview(
    data: Data,
    tokenizer: Tokenizer = None,
    *,
    n: Annotated[
        int | None,
        typer.Option("-n", help="Number of rows to show (default: 3; with --outliers: 1 per kind of outlier)", min=1),
    ] = None,
    row: Annotated[str | None, typer.Option(help="Show the rows with these indices, e.g. 7 or 3,8-11")] = None,
    id_: Annotated[
        str | None, typer.Option("--id", help="Show the rows whose id, uuid or similar column has this value")
    ] = None,
    grep: Annotated[str | None, typer.Option(help="Show rows with text that matches this regular expression")] = None,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Show outliers, such as very long, duplicate and rejected rows")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report to this file")] = None,
    pager: Pager = True,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Show rows with their rendered text and trained tokens."""
    from ftdata.inspection.preview import preview as preview_rows

    from_command_line = options.get("packing") is not None
    request = read_request([data], tokenizer, options)
    is_overview = html is not None and not outliers and row is id_ is grep is None
    if not is_overview and not from_command_line:
        # The packing of a configuration applies to an overview page, not to selected rows.
        options["packing"] = None
    selection: dict[str, Any] = {"n": n, "row": parse_row_numbers(row), "id": id_, "grep": grep, "outliers": outliers}
    with progress_bar() if outliers or html else nullcontext() as progress:
        result = preview_rows(request.sources, request.tokenizer, **selection, **options, html=html, progress=progress)
    if html and not as_json:
        write_stdout(f"{html}: {count_noun(len(result.rows), 'row')}, {html.stat().st_size:,} bytes")
    else:
        print_report(result, as_json=as_json, pager=pager)
    if result.rows and all(row.rejected for row in result.rows):
        raise typer.Exit(3)


@add_options("task", "rendering", "rows", "selection", "source")
def audit(
    data: DataList,
    tokenizer: Tokenizer = None,
    *,
    against: Annotated[list[str] | None, typer.Option(help="Report rows that also occur in this test set")] = None,
    near_duplicate_threshold: Annotated[
        float | None, typer.Option(help="Report near-duplicates (similarity, e.g. 0.8)")
    ] = None,
    pii: Annotated[bool, typer.Option("--pii", help="Also look for personal data (PII)")] = False,
    serve: Annotated[str | None, typer.Option(help="URL of a server whose prompts are compared")] = None,
    ignore: Annotated[str | None, typer.Option(help="Names of checks to skip, e.g. duplicate,script")] = None,
    fail_on: Annotated[str, typer.Option(help="Lowest severity for exit code 1: note, warning, error, never")] = "note",
    output_format: Annotated[
        str, typer.Option("--output-format", help="Output format: text, json, sarif or github")
    ] = "text",
    as_json: Json = False,
    **options: Any,
) -> None:
    """Check data or a build for problems (exit code 1 if there are findings)."""
    from ftdata.errors import check_choice
    from ftdata.inspection.audit import FAIL_ON
    from ftdata.inspection.audit import audit as audit_data

    check_choice("output_format", output_format, ("text", "json", "sarif", "github"))
    check_choice("fail_on", fail_on, FAIL_ON)
    held_out = None if against is None else read_request(against, None, {**options, "split": None}).sources
    request = read_request(data, tokenizer, options)
    note_unused_options("audit", request.sources, request.settings)
    with progress_bar() as progress:
        report = audit_data(
            request.sources,
            request.tokenizer,
            against=held_out,
            near_duplicate_threshold=near_duplicate_threshold,
            pii=pii,
            serve=serve,
            ignore=split_names(ignore) or (),
            progress=progress,
            **options,
        )
    if output_format == "sarif":
        write_stdout(json.dumps(report.as_sarif(), ensure_ascii=False, indent=2))
    elif output_format == "github":
        write_stdout(report.as_github())
    else:
        print_report(report, as_json=as_json or output_format == "json")
    raise typer.Exit(1 if report.fails(fail_on) else 0)


@add_options("task", "rendering", "rows", "selection", "source")
def stats(
    data: DataList,
    tokenizer: Tokenizer = None,
    *,
    svg: Annotated[Path | None, typer.Option(help="Write charts (lengths.svg, trained.svg) to this folder")] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Count the rows, turns, tokens and trained tokens in data or a build."""
    from ftdata.inspection.stats import stats as count_rows

    request = read_request(data, tokenizer, options)
    note_unused_options("stats", request.sources, request.settings)
    with progress_bar() as progress:
        report = count_rows(request.sources, request.tokenizer, svg=svg, progress=progress, **options)
    print_report(report, as_json=as_json)


@add_options("task", "template", "template_kwargs")
def diff(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help="First data set: a build, a configuration file, or data", show_default=False),
    ],
    b: Annotated[
        str | None, typer.Argument(metavar="B", help="Second data set (default: the first data set, changed by --set)")
    ] = None,
    tokenizer: Tokenizer = None,
    *,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override an option of the second data set, e.g. turns=split")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Maximum number of changed rows to show", min=0)] = 10,
    html: Annotated[Path | None, typer.Option(help="Write a side-by-side HTML report to this file")] = None,
    pager: Pager = True,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Compare two builds and show the tokens and labels that differ (exit code 1 if any differ)."""
    from ftdata.config import is_config_file, load_data_config
    from ftdata.inspection.diff import diff as diff_builds
    from ftdata.inspection.diff import side_options

    for path in dict.fromkeys((a, b or a)):
        if is_config_file(path):
            config = load_data_config(Path(path))
            note_unused_options("diff", config.data, config.build_options())
    first = side_options(a, tokenizer=tokenizer, **options)
    second = side_options(a if b is None else b, tokenizer=tokenizer, **options, changes=set_ or [])
    if b is None and not set_:
        problem = "the second side B is missing, so there is nothing to compare"
        raise UsageError("diff", problem, hint="pass B, or change an option: --set turns=split")
    for name in ("task", "template", "template_kwargs"):
        if options.get(name) and not any(name in side for side in (first, second)):
            problem = f"{name} does not apply to finished builds"
            raise UsageError("option_of_finished_build", problem, hint="remove the option")
    with progress_bar() as progress:
        changes = diff_builds(first, second, n=n, html=html, progress=progress)
    print_report(changes, as_json=as_json, pager=pager)
    if html and not as_json:
        write_stdout(f"{html}: {count_noun(len(changes.changed), 'row')} side by side")
    raise typer.Exit(1 if changes else 0)
