"""What commands print: values, as text or JSON, through a pager where they are long; and how far they have come."""

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
    """Write to standard output; who reads it may have seen enough (`| head`), which is no fault."""
    try:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left is not to be tried again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_value(value: Any, *, as_json: bool) -> None:
    """Print a value as JSON, or as it speaks for itself."""
    # Names of columns, files and templates are of strangers, and must not drive the terminal.
    write_stdout(
        json.dumps(value.as_dict(), ensure_ascii=False, indent=2) if as_json else escape_unprintable(str(value))
    )


def print_paged(show: Callable[[Any], None], *, pager: bool = False) -> None:
    """Print what is shown on a console; through a pager where that is longer than the screen of who is watching."""
    from rich.console import Console

    console = Console()
    with console.capture() as capture:
        show(console)
    text = capture.get()
    watched = pager and console.is_terminal and os.environ.get("TERM") != "dumb"
    lines = text.count("\n") + len(text) // (2 * console.width)
    named = shlex.split(os.environ.get("PAGER", ""))
    if not watched or lines < console.height or (named and shutil.which(named[0]) is None):
        write_stdout(text)
        return
    # As git does: a pager that lets colours through, and does not clear the screen behind itself.
    os.environ.setdefault("LESS", "FRX")
    os.environ.setdefault("LESSCHARSET", "utf-8")
    pydoc.pager(text)


@contextmanager
def no_progress() -> Iterator[None]:
    """Show nothing: what comes is there at once."""
    yield None


@contextmanager
def progress_bar() -> Iterator[Any]:
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
    console = Console(stderr=True)
    if not console.is_terminal:
        # Where nobody is watching, even an empty line is one too many, and some versions of rich write one.
        yield lambda *_: None
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("build", total=None, rows=0, tokens=0, rows_each=0, tokens_each=0)

        def update(rows: int, tokens: int, share: float | None) -> None:
            seconds = bar.tasks[task].elapsed or 1
            said = {"rows": rows, "tokens": tokens, "rows_each": rows / seconds, "tokens_each": tokens / seconds}
            bar.update(task, total=share and 1, completed=share or 0, **cast(Any, said))

        yield update
