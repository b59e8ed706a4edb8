"""Commands that build, convert and publish data, and commands that list templates, plugins and versions."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ftdata.cli.help import CompactCommand, CompactGroup
from ftdata.cli.options import (
    Json,
    Tokenizer,
    TrainingData,
    add_options,
    drop_shares,
    note_unused_options,
    parse_template_kwargs,
    read_request,
)
from ftdata.cli.output import print_json_or_text, print_value, progress_bar, resumable, write_stdout
from ftdata.errors import UsageError, escape_unprintable
from ftdata.progress import Progress

cache_app = typer.Typer(cls=CompactGroup, invoke_without_command=True)
config_app = typer.Typer(
    cls=CompactGroup,
    no_args_is_help=True,
    help="Import configurations of other tools, and print the schema of configurations.",
)
templates_app = typer.Typer(cls=CompactGroup, no_args_is_help=True, help="List, show and check chat templates.")


@add_options("task", "rendering", "rows", "selection", "layout", "rejects", "source")
def build(
    data: TrainingData,
    tokenizer: Tokenizer = None,
    output_dir: Annotated[
        str | None,
        typer.Option(
            "--output-dir",
            "-o",
            help="Output folder or URL (default for a configuration file: its output_dir/data)",
        ),
    ] = None,
    *,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing build of different data or options")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Number of parallel workers; does not affect the output")] = None,
    engine: Annotated[str, typer.Option(help="Where to run the workers: local, ray, or ray:ADDRESS")] = "local",
    as_json: Json = False,
    **options: Any,
) -> None:
    """Build a data set of tokens and labels."""
    from ftdata.build.dataset import write_build

    request = read_request(data, tokenizer, options)
    # `ftdata train` looks for the build of a configuration here.
    output_dir = output_dir or (f"{request.output_dir}/data" if request.output_dir else None)
    if not request.tokenizer or not output_dir:
        missing = [
            name for name, value in (("--tokenizer", request.tokenizer), ("--output-dir", output_dir)) if not value
        ]
        raise UsageError("missing_option", f"a build needs {' and '.join(missing)}")
    workers = os.cpu_count() if workers is None and engine == "local" else workers
    with resumable(), progress_bar() as progress:
        report = write_build(
            request.sources,
            request.tokenizer,
            output_dir,
            overwrite=overwrite,
            workers=workers,
            engine=engine,
            progress=progress,
            **options,
        )
    print_value(report, as_json=as_json)
    if not as_json:
        timing = f"in {report.seconds:.1f} s (tokens by {report.encoder})" if report.encoder else "earlier (up to date)"
        print(f"built    {output_dir} {timing}")


@add_options("template", "schema", "columns", "selection", "rejects", "source")
def convert(
    data: TrainingData,
    output: Annotated[Path, typer.Option("--output", "-o", help="Output file (.jsonl or .parquet)")],
    to: Annotated[str, typer.Option(help="Schema of the output: messages, prompt_completion, or text")] = "messages",
    tokenizer: Tokenizer = None,
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file")] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Convert rows to messages, to prompt/completion pairs, or to rendered text."""
    from ftdata.build.convert import convert as convert_rows

    request = read_request(data, tokenizer, options)
    # Only rendered text needs the tokenizer, which a configuration contains in any case.
    tokenizer = request.tokenizer if to == "text" else tokenizer
    note_unused_options("convert", request.sources, request.settings)
    sources, _ = drop_shares(request.sources)
    with progress_bar() as progress:
        report = convert_rows(
            sources, output, to, tokenizer=tokenizer, overwrite=overwrite, progress=progress, **options
        )
    print_value(report, as_json=as_json)


def verify(
    folder: Annotated[str, typer.Argument(help="Folder or URL of the build to verify", show_default=False)],
    as_json: Json = False,
) -> None:
    """Verify the files of a build against their hashes (exit code 1 if any file is damaged)."""
    from ftdata.build.remote import verify as verify_build

    damaged = verify_build(folder)
    lines = [f"damaged  {folder}/{name}" for name in damaged] or [f"intact   {folder}"]
    print_json_or_text({"folder": folder, "damaged": damaged}, "\n".join(lines), as_json=as_json)
    raise typer.Exit(1 if damaged else 0)


def export(
    build_dir: Annotated[
        str | None,
        typer.Argument(
            help="Folder or URL of the build, or a configuration file", metavar="[BUILD]", show_default=False
        ),
    ] = None,
    to: Annotated[str | None, typer.Option(help="Export format; see --list", show_default=False)] = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", "-o", help="Output folder")] = None,
    *,
    allow: Annotated[list[str] | None, typer.Option(help="Accept a limitation of the format (repeatable)")] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an export of another build or format, and the build of other options"
        ),
    ] = False,
    list_formats: Annotated[bool, typer.Option("--list", help="List the formats, and exit")] = False,
    as_json: Json = False,
) -> None:
    """Export a build to the input format of a trainer."""
    from ftdata.config import is_config_file
    from ftdata.exporters.export import describe_formats
    from ftdata.exporters.export import export as export_build
    from ftdata.exporters.formats import exporters

    if list_formats:
        formats = describe_formats()
        lines = [
            "\n".join([name, *(f"    {key:11} {value}" for key, value in row.items())]) for name, row in formats.items()
        ]
        print_json_or_text(formats, "\n".join(lines), as_json=as_json)
        return
    if not build_dir or not to or not output_dir:
        values = {"the folder of a build": build_dir, "--to": to, "--output-dir": output_dir}
        missing = [name for name, value in values.items() if not value]
        hint = "ftdata export --list lists the formats" if not to else ""
        raise UsageError("missing_option", f"an export needs {' and '.join(missing)}", hint=hint)
    # A build can take hours, so the format is checked first.
    exporters.get(to)
    with resumable(), progress_bar() as progress:
        is_config = is_config_file(build_dir)
        folder = _build_configuration(build_dir, progress, overwrite=overwrite) if is_config else build_dir
        report = export_build(folder, to, output_dir, allow=allow or (), overwrite=overwrite, progress=progress)
    print_value(report, as_json=as_json)


def _build_configuration(path: str, progress: Progress, *, overwrite: bool) -> str:
    """Return the folder with the build of a configuration file. Like `ftdata train`, build its data if necessary."""
    from ftdata.build.dataset import write_build
    from ftdata.build.remote import find_build

    request = read_request([path], None, {})
    if build := find_build(request.sources):
        return str(build)
    for name, value in (("tokenizer", request.tokenizer), ("output_dir", request.output_dir)):
        if not value:
            raise UsageError("missing_option", f"{path} needs the field {name}")
    folder = f"{request.output_dir}/data"
    report = write_build(
        request.sources,
        request.tokenizer,
        folder,
        overwrite=overwrite,
        workers=os.cpu_count(),
        progress=progress,
        **request.settings,
    )
    print(escape_unprintable(str(report)), file=sys.stderr)
    return folder


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of the build to upload", show_default=False)],
    repo: Annotated[
        str, typer.Argument(help="Hub repository (owner/name), created if it does not exist", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private")] = False,
) -> None:
    """Upload a build and its data set card to the Hub."""
    from ftdata.build.push import push as push_build

    print(push_build(folder, repo, private=private))


@templates_app.command("list", cls=CompactCommand)
def templates_list(as_json: Json = False) -> None:
    """List built-in and installed templates."""
    from ftdata.templates import templates

    print_json_or_text(templates.names(), "\n".join(templates.names()), as_json=as_json)


@templates_app.command("show", cls=CompactCommand)
def templates_show(
    name: Annotated[str, typer.Argument(help="Template name or .jinja file")], as_json: Json = False
) -> None:
    """Print the Jinja source of a template."""
    from ftdata.templates import find_template

    template_name, source = find_template(name)
    print_json_or_text({"name": template_name, "source": source}, source, as_json=as_json)


@templates_app.command("check", cls=CompactCommand)
def templates_check(
    template: Annotated[
        str, typer.Argument(help="Template to check: name, .jinja file, file.py:function or tokenizer")
    ],
    engines: Annotated[
        bool, typer.Option("--engines", help="Also compare the template engines of inference servers with Jinja2")
    ] = False,
    functions: Annotated[
        list[str] | None,
        typer.Option(
            "--function", help="Also compare a function, e.g. of mistral-common: file.py:function (repeatable)"
        ),
    ] = None,
    template_kwargs: Annotated[
        list[str] | None, typer.Option("--template-kwarg", help="Template variable: name=value (repeatable)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check whether a template prints stop tokens, changes earlier messages, or leaves out fields."""
    from ftdata.pipeline.recipe import check_template, resolve_template
    from ftdata.templates.engines import EngineReport, compare_engines

    kwargs = parse_template_kwargs(template_kwargs)
    report = check_template(template, kwargs)
    reports = list[EngineReport]()
    if engines or functions:
        reports = compare_engines(resolve_template(template, kwargs), None if engines else (), functions or ())
    values = report.as_dict() | ({"engines": [one.as_dict() for one in reports]} if reports else {})
    print_json_or_text(values, escape_unprintable("\n".join(map(str, (report, *reports)))), as_json=as_json)
    is_different = any(one.differences for one in reports)
    raise typer.Exit(1 if report.verdict == "refused" or is_different else 0)


@templates_app.command("modelfile", cls=CompactCommand)
def templates_modelfile(
    template: Annotated[str, typer.Argument(help="Chat template: name, .jinja file, or tokenizer")],
    source: Annotated[
        str, typer.Option("--from", help="Model for the instruction FROM: a folder or a GGUF file")
    ] = ".",
    as_json: Json = False,
) -> None:
    """Print a Modelfile for Ollama, with the chat template in Go's template language and the stop token."""
    from ftdata.pipeline.recipe import resolve_template
    from ftdata.templates.ollama import make_modelfile

    modelfile = make_modelfile(resolve_template(template), source)
    print_json_or_text({"modelfile": modelfile}, modelfile.rstrip("\n"), as_json=as_json)


@config_app.command("import", cls=CompactCommand)
def config_import(
    file: Annotated[
        Path, typer.Argument(help="Axolotl YAML, LLaMA-Factory YAML, or dataset_info.json", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output file, or - for standard output")] = Path("-"),
    dataset: Annotated[
        list[str] | None, typer.Option(help="Data set to import: name, path, or index from 0 (repeatable)")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model (default: the model in the imported file)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert an Axolotl or LLaMA-Factory configuration, and list the differences."""
    from ftdata.importers import import_config

    if str(output) != "-" and (output.exists() or output.is_symlink()):
        raise UsageError("target_exists", f"{output} already exists", hint="choose another file with --output")
    imported = import_config(file, dataset or (), model=model)
    if str(output) == "-":
        print_value(imported, as_json=as_json)
        return
    output.write_text(str(imported), encoding="utf-8")
    text = "\n".join((*imported.notes, f"wrote {output}"))
    print_json_or_text(imported.as_dict(), escape_unprintable(text), as_json=as_json)


@config_app.command("schema", cls=CompactCommand)
def config_schema() -> None:
    """Print the JSON schema of configuration files, with which editors complete and check them."""
    from ftdata.cli.config_schema import make_config_schema

    write_stdout(json.dumps(make_config_schema(), indent=2))


@cache_app.callback()
def cache_show(context: typer.Context, as_json: Json = False) -> None:
    """Show the size of the cache, which builds use to skip finished work."""
    from ftdata.build.cache import measure_cache

    if context.invoked_subcommand is None:
        print_value(measure_cache(), as_json=as_json)


@cache_app.command("clear", cls=CompactCommand)
def cache_clear() -> None:
    """Remove everything from the cache."""
    from rich.filesize import decimal

    from ftdata.build.cache import KINDS, clear_cache, measure_cache

    size = measure_cache()
    clear_cache(KINDS)
    print(f"removed {decimal(size.total)} from {size.folder}" if size.folder else size)


def env(as_json: Json = False) -> None:
    """Print versions and settings for a bug report."""
    from ftdata.cli.environment import describe_environment

    print_value(describe_environment(), as_json=as_json)


def plugins(as_json: Json = False) -> None:
    """List built-in and installed readers, schemas, templates, mask policies and export formats."""
    from ftdata.exporters import exporters
    from ftdata.images.families import image_families
    from ftdata.pipeline.mask import masks
    from ftdata.readers import readers
    from ftdata.schemas import schemas
    from ftdata.templates import templates

    registries = (readers, schemas, templates, masks, image_families, exporters)
    groups = {registry.group: registry.plugins() for registry in registries}
    lines = [f"{group}: {', '.join(map(str, plugins))}" for group, plugins in groups.items()]
    values = {group: [plugin._asdict() for plugin in plugins] for group, plugins in groups.items()}
    print_json_or_text(values, "\n".join(lines), as_json=as_json)
