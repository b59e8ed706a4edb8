"""Every error that ftdata raises on purpose.

    FtdataError                     .code  .where  .hint  .exit_code
    ├── UsageError (ValueError)         an invalid request                       exit 2
    ├── MissingDependency (ImportError) an optional package is not installed     exit 2
    ├── InputRefused (ValueError)       the input cannot be read or understood   exit 3
    │   ├── BadRow                      one row
    │   ├── BadRows                     all bad rows of a run, together
    │   └── TemplateRefused             a template or tokenizer, for every row
    ├── TooManyRejects (ValueError)     rejects above `max_rejects`              exit 4
    ├── StorageError (OSError)          disk, permission, a damaged build        exit 5
    ├── HubError (OSError)              network or hub                           exit 6
    └── InternalError (RuntimeError)    a promise of ours was broken: a bug      exit 7

A message always has the same four parts: where, what was found, what was expected, and the way out:

    >>> print(BadRow("content_type", "is a number, expected text", where="data.jsonl:7 messages[1].content",
    ...              hint="quote the value"))
    [content_type] data.jsonl:7 messages[1].content: is a number, expected text. Fix: quote the value
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class FtdataError(Exception):
    """Base of the tree: what ftdata raises on purpose.

    Attributes:
        code: a name that stays the same from version to version; listed in docs/reference/errors.md.
        message: what was found, and what was expected.
        where: file and line, row, field; empty where it is about no place.
        hint: the way out; may be empty.
        exit_code: of the command line.

    >>> try:
    ...     raise BadRow("content_type", "is a number, expected text", where="data.jsonl:7")
    ... except FtdataError as error:
    ...     print(error.code, error.where, error.exit_code)
    content_type data.jsonl:7 3
    """

    exit_code = 7
    longest = 2_000
    """Characters of a message: what data gives for names has no end."""

    def __init__(self, code: str, message: str, *, where: str = "", hint: str = "") -> None:
        message, where, hint = shorten(message, self.longest), escape_line_breaks(shorten(where)), shorten(hint)
        super().__init__(code, message, where, hint)
        self.code = code
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        before = "" if self.message.endswith("\n") else ". "
        way_out = f"{before}Fix: {self.hint}" if self.hint else ""
        return f"[{self.code}] {place}{self.message}{way_out}"

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from positional arguments when they cross a process boundary.
        return _rebuild, (type(self), self.code, self.message, self.where, self.hint, self.__dict__)


def _rebuild(
    kind: type[FtdataError], code: str, message: str, where: str, hint: str, state: dict[str, object]
) -> FtdataError:
    error = kind.__new__(kind)
    FtdataError.__init__(error, code, message, where=where, hint=hint)
    error.__dict__.update(state)
    return error


class UsageError(FtdataError, ValueError):
    """An invalid request: an unknown option value, options that contradict each other, a file that is not there."""

    exit_code = 2


class MissingDependency(FtdataError, ImportError):
    """An optional package is needed for this request; the hint is the `pip install` line."""

    exit_code = 2


class InputRefused(FtdataError, ValueError):
    """The input cannot be read or understood, and guessing would train the wrong tokens."""

    exit_code = 3


class BadRow(InputRefused):
    """One row is refused; `field` is the path of the value inside the row."""

    def __init__(self, code: str, message: str, *, where: str = "", hint: str = "", field: str = "") -> None:
        super().__init__(code, message, where=where, hint=hint)
        self.field = shorten(field)

    def located(self, where: str) -> BadRow:
        """Return this error, without its traceback, at another place; millions of rows may share one cause."""
        error = BadRow.__new__(BadRow)
        error.__dict__.update(self.__dict__)
        error.where = escape_line_breaks(shorten(where))
        error.args = (self.code, self.message, error.where, self.hint)
        return error


class BadRows(InputRefused):
    """All bad rows of a run; `count` of them, the first few with their reasons in the message."""

    longest = 200_000

    def __init__(self, count: int, lines: Iterable[str], *, hint: str) -> None:
        lines = list(lines)
        more = f"\n  ... and {count - len(lines)} more" if count > len(lines) else ""
        listed = "\n  ".join(lines)
        noun = "row is" if count == 1 else "rows are"
        super().__init__("bad_rows", f"{count} {noun} refused:\n  {listed}{more}\n", hint=hint)
        self.count = count


class TemplateRefused(InputRefused):
    """A template or a tokenizer cannot be used, whatever the row."""


class TooManyRejects(FtdataError, ValueError):
    """More rows were rejected than `max_rejects` allows."""

    exit_code = 4


class StorageError(FtdataError, OSError):
    """Reading or writing a build failed; the message names the path."""

    exit_code = 5


class HubError(FtdataError, OSError):
    """The network or the hub failed; the message names repository, file and status."""

    exit_code = 6


class InternalError(FtdataError, RuntimeError):
    """A promise of ftdata's own was broken. Please report it with the message."""


# They show nothing, though Python calls them printable: fillers, a blank of Braille, selectors of variants.
_BLANK = re.compile("[\u115f\u1160\u2800\u3164\uffa0\U000e0100-\U000e01ef]")


def escape_unprintable(text: str) -> str:
    """Return a text with codes for what would drive a terminal, or show nothing; line breaks and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    spelled = "".join(char if char.isprintable() or char in "\n\t" else f"\\u{ord(char):04x}" for char in text)
    return _BLANK.sub(lambda found: f"\\u{ord(found.group()):04x}", spelled)


def shorten(text: str, most: int = 2_000) -> str:
    """Return a text, without its middle where it is longer than that.

    >>> shorten("abcdefghij" * 10, 40)
    'abcdefghij ... 80 more ... abcdefghij'
    """
    # What is said of what was found begins a message, and what was expected often ends it.
    kept = max((most - 20) // 2, 1)
    return text if len(text) <= most else f"{text[:kept]} ... {len(text) - 2 * kept:,} more ... {text[-kept:]}"


def describe_exception(error: BaseException, most: int = 300) -> str:
    r"""Return what an error of another library says, on one line, and no more of it than that.

    >>> describe_exception(ValueError("line one\n  line two"))
    'line one line two'
    """
    return " ".join(str(error).split())[:most]


def escape_line_breaks(text: str) -> str:
    """Return a name without line breaks, after which a reader of logs takes it for something else."""
    return text.replace("\n", "\\n").replace("\r", "\\r")


def suggest_names(name: str, candidates: Iterable[str]) -> str:
    """Say which of `candidates` a mistyped `name` may have meant.

    >>> suggest_names("chatlm", ["chatml", "alpaca"])
    "did you mean 'chatml'? known: alpaca, chatml"
    >>> suggest_names("x", ["b", "a"])
    'known: a, b'
    """
    known = sorted(candidates)
    close = difflib.get_close_matches(name, known, n=1)
    listing = f"known: {', '.join(known)}"
    return f"did you mean {close[0]!r}? {listing}" if close else listing


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Refuse a `value` of option `name` that is not among the `allowed` ones.

    Raises:
        UsageError: with the nearest allowed value.
    """
    if not isinstance(value, str) or value not in allowed:
        raise UsageError(f"unknown_{name}", f"{name} is {value!r}", hint=suggest_names(str(value), allowed))
