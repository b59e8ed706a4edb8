"""Functions that print results, open long output in a pager, and show progress."""

from __future__ import annotations

import json
import os
import pydoc
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from ftdata.errors import escape_unprintable


def write_stdout(text: str) -> None:
    """Write text to standard output. Ignore the error if the receiving program, such as `head`, closed the pipe."""
    try:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush the remaining output again at exit and fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_value(value: Any, *, as_json: bool) -> None:
    """Print a value as JSON or as text."""
    # Names of columns, files and templates are untrusted and may contain terminal escape sequences.
    write_stdout(
        json.dumps(value.as_dict(), ensure_ascii=False, indent=2) if as_json else escape_unprintable(str(value))
    )


def print_json_or_text(value: Any, text: str, *, as_json: bool) -> None:
    """Print a value as JSON, or the text that describes it."""
    write_stdout(json.dumps(value, ensure_ascii=False, indent=2) if as_json else text)


def print_report(report: Any, *, as_json: bool, pager: bool = False) -> None:
    """Print a report as JSON, or as styled text, which a pager shows if it is long."""
    if as_json:
        print_value(report, as_json=True)
    else:
        print_paged(report.print, pager=pager)


def print_paged(render: Callable[[Any], None], *, pager: bool = False) -> None:
    """Print output through a rich console, and use a pager if the output is long.

    Args:
        render: a function that prints the output to the console that it receives.
        pager: use a pager on a terminal if the output is longer than the screen.
    """
    from rich.console import Console

    console = Console()
    with console.capture() as capture:
        render(console)
    text = capture.get()
    is_pageable = pager and console.is_terminal and os.environ.get("TERM") != "dumb"
    lines = text.count("\n") + len(text) // (2 * console.width)
    command = shlex.split(os.environ.get("PAGER", ""))
    if not is_pageable or lines < console.height or (command and shutil.which(command[0]) is None):
        write_stdout(text)
        return
    # These are the defaults of git: keep colors, and leave the output on the screen.
    os.environ.setdefault("LESS", "FRX")
    os.environ.setdefault("LESSCHARSET", "utf-8")
    pydoc.pager(text)


@contextmanager
def progress_bar() -> Iterator[Any]:
    """Show a progress bar with rows and tokens on stderr. Show nothing if stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.fields[rows]:,} rows ({task.fields[rows_each]:,.0f}/s)"),
        TextColumn("{task.fields[tokens]:,} tokens ({task.fields[tokens_each]:,.0f}/s)"),
        TimeElapsedColumn(),
        TextColumn("remaining:"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        # Some versions of rich write an empty line even if the output is not a terminal.
        yield lambda *_: None
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("build", total=None, rows=0, tokens=0, rows_each=0, tokens_each=0)

        def update(rows: int, tokens: int, share: float | None) -> None:
            seconds = bar.tasks[task].elapsed or 1
            fields = {"rows": rows, "tokens": tokens, "rows_each": rows / seconds, "tokens_each": tokens / seconds}
            bar.update(task, total=share and 1, completed=share or 0, **cast(Any, fields))

        yield update
