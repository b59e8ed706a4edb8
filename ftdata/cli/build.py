"""Commands that make data, or list what there is: a few lines over the public function of the same name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from ftdata.cli.options import (
    PLACES,
    Columns,
    ControlTokens,
    Date,
    Dedup,
    Encoding,
    Json,
    Limit,
    MaxLength,
    MaxRejects,
    NearDuplicateThreshold,
    OnBadRows,
    OnDroppedMessage,
    OnMissingStop,
    Overlong,
    Packing,
    Quoting,
    RejectFlags,
    Sample,
    Schema,
    Seed,
    Shuffle,
    Split,
    Template,
    TemplateKwarg,
    TestSize,
    Tokenizer,
    TrainOn,
    TrainParts,
    Turns,
    Where,
    collect_recipe_options,
    make_sources,
    parse_columns,
)
from ftdata.cli.output import print_value, progress_bar
from ftdata.errors import UsageError, escape_unprintable

config_app = typer.Typer(no_args_is_help=True, help="Take over configurations of other tools.")
templates_app = typer.Typer(no_args_is_help=True, help="List, show and check templates.")


def build(
    data: Annotated[list[str], typer.Argument(help=f"What to read, each {PLACES}.", show_default=False)],
    tokenizer: Annotated[str, typer.Option("--tokenizer", "-t", help="A folder with tokenizer.json, or a hub id.")],
    output_dir: Annotated[
        str, typer.Option("--output-dir", "-o", help="Folder for the build; or a URL, such as s3://bucket/name.")
    ],
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
    packing: Packing = None,
    where: Where = None,
    limit: Limit = None,
    dedup: Dedup = False,
    near_duplicate_threshold: NearDuplicateThreshold = None,
    sample: Sample = None,
    shuffle: Shuffle = False,
    test_size: TestSize = None,
    seed: Seed = 0,
    on_bad_rows: OnBadRows = "error",
    max_rejects: MaxRejects = None,
    date: Date = None,
    template_kwarg: TemplateKwarg = None,
    workers: Annotated[
        int | None, typer.Option(help="Tasks at once, at most; the result does not depend on it.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, ray, or ray:ADDRESS of a cluster.")] = "local",
    encoding: Encoding = None,
    quoting: Quoting = None,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """Build a data set: tokens and labels, with a report of every row."""
    given = locals()
    from ftdata.build.dataset import write_build

    with progress_bar() as progress:
        report = write_build(
            make_sources(data, encoding, split, quoting),
            tokenizer,
            output_dir,
            template=template,
            **collect_recipe_options(given),
            packing=packing,
            where=where,
            limit=limit,
            dedup=dedup,
            near_duplicate_threshold=near_duplicate_threshold,
            sample=sample,
            shuffle=shuffle,
            test_size=test_size,
            seed=seed,
            on_bad_rows=on_bad_rows,
            max_rejects=max_rejects,
            workers=os.cpu_count() if workers is None and engine == "local" else workers,
            engine=engine,
            progress=progress,
        )
    print_value(report, as_json=as_json)
    if not as_json:
        how = (
            f"in {report.seconds:.1f} s (tokens by {report.encoder})"
            if report.encoder
            else "before: nothing has changed"
        )
        print(f"built    {output_dir} {how}")


def convert(
    data: Annotated[list[str], typer.Argument(help=f"What to read, each {PLACES}.", show_default=False)],
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
    quoting: Quoting = None,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """Write rows of any shape in one: as messages, as prompt and completion, or as templated text."""
    from ftdata.build.convert import convert as write

    done = write(
        make_sources(data, encoding, split, quoting),
        output,
        to,
        tokenizer=tokenizer,
        template=template,
        schema=schema,
        columns=parse_columns(column),
        where=where,
        limit=limit,
        on_bad_rows=on_bad_rows,
        max_rejects=max_rejects,
    )
    print_value(done, as_json=as_json)


def verify(
    folder: Annotated[str, typer.Argument(help="A build: a folder, or a URL.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Find every bit of a build that is not as it was written; exit code 1 if there is any."""
    from ftdata.build.remote import verify as broken

    damaged = broken(folder)
    print(
        json.dumps({"folder": folder, "damaged": damaged}, ensure_ascii=False)
        if as_json
        else "\n".join(f"damaged  {folder}/{name}" for name in damaged) or f"whole    {folder}"
    )
    raise typer.Exit(1 if damaged else 0)


def push(
    folder: Annotated[Path, typer.Argument(help="A build.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="owner/name on the hub; made if it is not there.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new one private.")] = False,
) -> None:
    """Upload a build to the hub, with its card."""
    from ftdata.build.push import push as upload

    print(upload(folder, repo, private=private))


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
    from ftdata.templates import find_template

    found, source = find_template(name)
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
    from ftdata.pipeline.recipe import check_template

    report = check_template(template)
    print_value(report, as_json=as_json)
    raise typer.Exit(1 if report.verdict == "refused" else 0)


@config_app.command("import")
def config_import(
    file: Annotated[
        Path,
        typer.Argument(
            help="Axolotl's YAML, LLaMA-Factory's training YAML, or its dataset_info.json.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; - prints it.")] = Path("-"),
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Which of its data sets: name, path, or number from 0. Repeatable; default: all."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The base model, if the file names none.")] = None,
    as_json: Json = False,
) -> None:
    """Turn a configuration of Axolotl or LLaMA-Factory into one of ours; what is not the same is named."""
    from ftdata.importers import import_config

    if str(output) != "-" and output.exists():
        raise UsageError("target_exists", f"{output} is there already", hint="choose another name with --output")
    found = import_config(file, dataset or (), model=model)
    if str(output) == "-":
        print_value(found, as_json=as_json)
        return
    output.write_text(str(found), encoding="utf-8")
    print_value(found, as_json=True) if as_json else print(
        escape_unprintable("\n".join((*found.notes, f"wrote {output}")))
    )


def env(as_json: Json = False) -> None:
    """Print versions of ftdata, Python and packages, and settings, for a bug report."""
    from ftdata.cli.environment import describe_environment

    print_value(describe_environment(), as_json=as_json)


def plugins(as_json: Json = False) -> None:
    """List readers, schemas, templates and mask policies, built in and installed."""
    from ftdata.pipeline.mask import masks
    from ftdata.readers import readers
    from ftdata.schemas import schemas
    from ftdata.templates import templates

    found = {registry.group: registry.plugins() for registry in (readers, schemas, templates, masks)}
    if as_json:
        print(json.dumps({group: [one._asdict() for one in plugins] for group, plugins in found.items()}, indent=2))
    else:
        print("\n".join(f"{group}: {', '.join(map(str, plugins))}" for group, plugins in found.items()))
