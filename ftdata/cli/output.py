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
from ftdata.spelling import spell_options

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
    """Print an error message to standard error. On a terminal, the error code and the word "Fix" are colored."""
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
def resumable() -> Iterator[None]:
    """Mark the `with` block as resumable: if it is interrupted, the same command keeps the finished parts."""
    _is_resumable[0] = True
    # After an exception, the mark stays for `describe_signal`.
    yield
    _is_resumable[0] = False


_is_resumable = [False]
_SIGNALS = {130: "interrupted", 143: "terminated"}


def describe_signal(code: Any) -> str | None:
    """Return the message for the exit code of an interrupted or terminated command, or `None` for other codes."""
    if code not in _SIGNALS:
        return None
    resume = "; run the same command again: finished parts of the data are kept" if _is_resumable[0] else ""
    return f"{_SIGNALS[code]}{resume}"


class LogHandler(logging.Handler):
    """Prints log records of ftdata as lines to the current standard error, which a progress bar may replace."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a log record."""
        message = spell_options(redact_text(record.getMessage()))
        print(f"ftdata: {escape_unprintable(message)}", file=sys.stderr)


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
            fields: Any = {"counts": _describe_progress(update, *clock.measure(update)), "share": ""}
            total, completed = None, 0.0
            if update.share is not None:
                total, completed, fields["share"] = 1.0, update.share, f"{update.share:>4.0%}"
            bars.update(task, description=update.phase, total=total, completed=completed, **fields)

        yield show


class _PhaseClock:
    """Measures the time since the current phase began, and the work since then.

    A resumed build starts with finished work, which must not count as speed.
    """

    def __init__(self) -> None:
        self._first, self._start = ProgressUpdate(""), time.monotonic()

    def measure(self, update: ProgressUpdate) -> tuple[ProgressUpdate, float]:
        """Return the first update of the phase, and the seconds since then."""
        if update.phase != self._first.phase:
            self._first, self._start = update, time.monotonic()
        return self._first, time.monotonic() - self._start


class _LineProgress:
    """Prints a line of progress to standard error every ten seconds, for log files."""

    def __init__(self) -> None:
        self._last, self._clock = time.monotonic(), _PhaseClock()

    def __call__(self, update: ProgressUpdate) -> None:
        """Print a line if the last line is ten seconds old."""
        now, (first, seconds) = time.monotonic(), self._clock.measure(update)
        if now - self._last >= _LINE_SECONDS:
            self._last = now
            share = "" if update.share is None else f" {update.share:.0%}"
            line = f"ftdata: {update.phase}{share} {_describe_progress(update, first, seconds)}"
            print(line.rstrip(), file=sys.stderr)


def _describe_progress(update: ProgressUpdate, first: ProgressUpdate, seconds: float) -> str:
    """Describe progress in at most 60 characters, so that a line with a bar fits 80 columns.

    Args:
        update: the progress.
        first: the first progress of the phase.
        seconds: the time since the first progress.

    >>> first = ProgressUpdate("tokenize", share=0.0)
    >>> _describe_progress(ProgressUpdate("tokenize", 1_234_567, 987_654_321, 0.25), first, 60)
    '1.2M rows (21k/s) 988M tokens (16M/s) 3:00 left'
    """
    if not update.rows:
        return ""
    rows, tokens = _shorten_number(update.rows), _shorten_number(update.tokens)
    new_rows, new_tokens = update.rows - first.rows, update.tokens - first.tokens
    if seconds < 1 or not new_rows:
        return f"{rows} rows {tokens} tokens"
    row_rate, token_rate = _shorten_number(new_rows / seconds), _shorten_number(new_tokens / seconds)
    text = f"{rows} rows ({row_rate}/s) {tokens} tokens ({token_rate}/s)"
    new_share = 0.0 if update.share is None else update.share - (first.share or 0.0)
    if update.share is None or new_share <= 0:
        return text
    left = int(seconds * (1 - update.share) / new_share)
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
