"""Command-line interface. Each command calls the public function of the same name.

Exit codes: 0 success, 1 findings, 2 usage or configuration error, 3 input refused, 4 too many rejected rows,
5 local I/O error, 6 network or Hub error, 7 internal error, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

import ftdata
from ftdata.cli.build import build, cache_app, config_app, convert, env, export, plugins, push, templates_app, verify
from ftdata.cli.help import CompactCommand, CompactGroup
from ftdata.cli.inspect import audit, diff, preview, stats
from ftdata.cli.output import LogHandler, describe_signal, print_error
from ftdata.cli.train import chat, evaluate, generate, init, merge, train
from ftdata.errors import FtdataError
from ftdata.redaction import redact_text
from ftdata.spelling import set_style, spell_options

app = typer.Typer(
    name="ftdata",
    cls=CompactGroup,
    help="Prepare and inspect fine-tuning data, and train models on it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)
for _command in (preview, build, verify, convert, export, push, audit, stats, diff, init, train, generate, chat, merge):
    app.command(cls=CompactCommand)(_command)
app.command("eval", cls=CompactCommand)(evaluate)
app.command(cls=CompactCommand)(plugins)
app.command(cls=CompactCommand)(env)
app.add_typer(templates_app, name="templates")
app.add_typer(config_app, name="config")
app.add_typer(cache_app, name="cache")


def main() -> None:
    """Run the command-line interface.

    An expected error is printed as one message without a traceback.
    """
    _prepare_streams()
    set_style("flags")
    logger = logging.getLogger("ftdata")
    logger.addHandler(LogHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        app()
    except FtdataError as error:
        _fail(spell_options(str(error)), error.exit_code)
    except SystemExit as end:
        if message := describe_signal(end.code):
            print_error(message)
        raise
    except BrokenPipeError:
        # The reader of the output, such as `head`, closed the pipe early.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"[io] {error.filename or ''}: {error.strerror or error}", 5)
    except Exception as error:
        if os.environ.get("FTDATA_DEBUG"):
            raise
        hint = "This is a bug in ftdata. Set FTDATA_DEBUG=1 to see the traceback"
        _fail(f"[internal] {type(error).__name__}: {error}. {hint}", 7)


def _prepare_streams() -> None:
    # Python sets a stream to None if it is closed when the process starts (`<&-`, `>&-`).
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  (the stream stays open until the process exits)
    # A character that the terminal cannot encode must not abort the command.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int) -> None:
    print_error(redact_text(message))
    sys.exit(code)


def _print_version(value: bool) -> None:
    if value:
        print(f"ftdata {ftdata.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    pass
