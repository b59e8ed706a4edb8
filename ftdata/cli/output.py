"""Functions that print results, open long output in a pager, and show progress."""

from __future__ import annotations

import json
import logging
import os
import pydoc
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ftdata.errors import escape_unprintable
from ftdata.progress import Progress, ProgressUpdate
from ftdata.redaction import redact_text

if TYPE_CHECKING:
    from rich.console import Console


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


def print_error(message: str) -> None:
    """Print an error message to standard error. On a terminal, the error code and the word "Fix" have colors."""
    message = f"ftdata: {escape_unprintable(message)}"
    if not sys.stderr.isatty():
        print(message, file=sys.stderr)
        return
    from rich.console import Console
    from rich.text import Text

    text = Text(message)
    text.highlight_regex(r"^ftdata: (\[\w+\])?", "bold red")
    text.highlight_regex(r"\bFix:", "bold green")
    Console(stderr=True).print(text, soft_wrap=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """If Ctrl-C interrupts the `with` block, say that the same command continues the work, and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("ftdata: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)


class LogHandler(logging.Handler):
    """Prints log records of ftdata as lines to the current standard error, which a progress bar may replace."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a log record."""
        print(f"ftdata: {escape_unprintable(redact_text(record.getMessage()))}", file=sys.stderr)


_LINE_SECONDS = 10.0
"""Time between two lines of progress if standard error is not a terminal."""


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show progress on standard error: a bar on a terminal, or else a line every ten seconds."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with _show_bar(console) as show:
            yield show
    else:
        yield _LineProgress()


@contextmanager
def _show_bar(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as ProgressBars

    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[share]}"),
        TextColumn("{task.fields[counts]}"),
    )
    with ProgressBars(*columns, console=console, transient=True, expand=True) as bars:
        task, clock = bars.add_task("plan", total=None, share="", counts=""), _PhaseClock()

        def show(update: ProgressUpdate) -> None:
            fields: Any = {"counts": _describe_progress(update, clock.seconds(update.phase)), "share": ""}
            total, completed = None, 0.0
            if update.share is not None:
                total, completed, fields["share"] = 1.0, update.share, f"{update.share:>4.0%}"
            bars.update(task, description=update.phase, total=total, completed=completed, **fields)

        yield show


class _PhaseClock:
    """Measures the time since the current phase began."""

    def __init__(self) -> None:
        self._phase, self._start = "", time.monotonic()

    def seconds(self, phase: str) -> float:
        """Return the seconds since the first call with this phase."""
        if phase != self._phase:
            self._phase, self._start = phase, time.monotonic()
        return time.monotonic() - self._start


class _LineProgress:
    """Prints a line of progress to standard error every ten seconds, for log files."""

    def __init__(self) -> None:
        self._last, self._clock = time.monotonic(), _PhaseClock()

    def __call__(self, update: ProgressUpdate) -> None:
        """Print a line if the last line is ten seconds old."""
        now, seconds = time.monotonic(), self._clock.seconds(update.phase)
        if now - self._last >= _LINE_SECONDS:
            self._last = now
            share = "" if update.share is None else f" {update.share:.0%}"
            print(f"ftdata: {update.phase}{share} {_describe_progress(update, seconds)}".rstrip(), file=sys.stderr)


def _describe_progress(update: ProgressUpdate, seconds: float) -> str:
    """Describe progress in at most 60 characters, so that a line with a bar fits 80 columns.

    >>> _describe_progress(ProgressUpdate("tokenize", 1_234_567, 987_654_321, 0.25), 60)
    '1.2M rows (21k/s) 988M tokens (16M/s) 3:00 left'
    """
    if not update.rows:
        return ""
    if update.share is None and seconds < 1:
        return f"{_shorten_number(update.rows)} rows {_shorten_number(update.tokens)} tokens"
    each = max(seconds, 0.1)
    rows, tokens, row_rate, token_rate = map(
        _shorten_number, (update.rows, update.tokens, update.rows / each, update.tokens / each)
    )
    text = f"{rows} rows ({row_rate}/s) {tokens} tokens ({token_rate}/s)"
    if not update.share:
        return text
    left = int(seconds * (1 - update.share) / update.share)
    hours, minutes = f"{left // 3600}:" if left >= 3600 else "", left // 60 % 60
    return f"{text} {hours}{minutes:{'02' if hours else ''}}:{left % 60:02} left"


def _shorten_number(number: float) -> str:
    """Write a number with at most three digits.

    >>> _shorten_number(7), _shorten_number(1234), _shorten_number(45_600_000)
    ('7', '1.2k', '46M')
    """
    for unit in ("", "k", "M", "B", "T"):
        if number < 999.5:
            return f"{number:.1f}{unit}" if unit and number < 9.95 else f"{number:.0f}{unit}"
        number /= 1000
    return f"{number:.0f}P"
