"""The exceptions that ftdata raises, and functions that format their messages.

    FtdataError                     .code  .where  .hint  .exit_code
    ├── UsageError (ValueError)         an invalid request                       exit 2
    ├── MissingDependency (ImportError) an optional package is not installed     exit 2
    ├── InputRefused (ValueError)       unreadable input, a damaged build        exit 3
    │   ├── BadRow                      one row
    │   ├── BadRows                     all bad rows of a run, together
    │   └── TemplateRefused             a template or tokenizer, for every row
    ├── TooManyRejects (ValueError)     rejects above `max_rejects`              exit 4
    ├── StorageError (OSError)          the disk, a permission, an unsafe link   exit 5
    ├── HubError (OSError)              network or hub                           exit 6
    └── InternalError (RuntimeError)    a bug in ftdata                          exit 7

Every message has the same four parts: the location, the value found, the value expected, and the fix:

    >>> print(BadRow("content_type", "is a number, expected text", where="data.jsonl:7 messages[1].content",
    ...              hint="quote the value"))
    [content_type] data.jsonl:7 messages[1].content: is a number, expected text. Fix: quote the value
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path


class FtdataError(Exception):
    """The base class of all ftdata exceptions.

    Attributes:
        code: the error code, which is stable across versions; listed in docs/reference/errors.md.
        message: the value found and the value expected.
        where: the file and line, row or field; empty if the error has no location.
        hint: how to fix the problem; may be empty.
        exit_code: exit status of the command line.
        max_message_length: limit in characters, because messages contain names from data, of any length.

    >>> try:
    ...     raise BadRow("content_type", "is a number, expected text", where="data.jsonl:7")
    ... except FtdataError as error:
    ...     print(error.code, error.where, error.exit_code)
    content_type data.jsonl:7 3
    """

    exit_code = 7
    max_message_length = 2_000

    def __init__(self, code: str, message: str, *, where: str = "", hint: str = "") -> None:
        message, hint = shorten(message, self.max_message_length), shorten(hint)
        where = escape_line_breaks(shorten(where))
        super().__init__(code, message, where, hint)
        self.code = code
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        location = f"{self.where}: " if self.where else ""
        separator = "" if self.message.endswith("\n") else " " if self.message.endswith(".") else ". "
        fix = f"{separator}Fix: {self.hint}" if self.hint else ""
        return f"[{self.code}] {location}{self.message}{fix}"

    def __reduce__(self) -> tuple[object, ...]:
        # Pickle rebuilds exceptions from positional arguments, and this constructor takes keyword arguments.
        return _rebuild, (type(self), self.code, self.message, self.where, self.hint, self.__dict__)


def _rebuild(
    error_class: type[FtdataError], code: str, message: str, where: str, hint: str, state: dict[str, object]
) -> FtdataError:
    error = error_class.__new__(error_class)
    FtdataError.__init__(error, code, message, where=where, hint=hint)
    error.__dict__.update(state)
    return error


class UsageError(FtdataError, ValueError):
    """A request is invalid: an option has an unknown value, options contradict each other, or a file is missing."""

    exit_code = 2


class MissingDependency(FtdataError, ImportError):
    """An optional package is not installed. The hint is the `pip install` command."""

    exit_code = 2


class InputRefused(FtdataError, ValueError):
    """The input cannot be read, or it is ambiguous. A guess could train the wrong tokens, so ftdata stops."""

    exit_code = 3


class BadRow(InputRefused):
    """One row is invalid. `field` is the path of the invalid value inside the row."""

    def __init__(self, code: str, message: str, *, where: str = "", hint: str = "", field: str = "") -> None:
        super().__init__(code, message, where=where, hint=hint)
        self.field = shorten(field)

    def with_location(self, where: str) -> BadRow:
        """Return a copy of the error with another location and without a traceback.

        Millions of rows can share one error object, so the original must not change.
        """
        error = BadRow.__new__(BadRow)
        error.__dict__.update(self.__dict__)
        error.where = escape_line_breaks(shorten(where))
        error.args = (self.code, self.message, error.where, self.hint)
        return error


class BadRows(InputRefused):
    """One or more rows are invalid. `count` is the number of invalid rows. The message lists the reasons.

    The message contains a list, so its maximum length is larger than for other errors.
    """

    max_message_length = 200_000

    def __init__(self, count: int, lines: Iterable[str], *, hint: str) -> None:
        listing = "\n  ".join(lines)
        noun = "row is" if count == 1 else "rows are"
        super().__init__("bad_rows", f"{count:,} {noun} invalid:\n  {listing}\n", hint=hint)
        self.count = count


class TemplateRefused(InputRefused):
    """The template or the tokenizer cannot be used for any row."""


class TooManyRejects(FtdataError, ValueError):
    """More rows were rejected than `max_rejects` allows."""

    exit_code = 4


class StorageError(FtdataError, OSError):
    """A file or build cannot be read or written. The message contains the path."""

    exit_code = 5


class HubError(FtdataError, OSError):
    """A network or Hub request failed. The message contains the repository, the file and the HTTP status."""

    exit_code = 6


class InternalError(FtdataError, RuntimeError):
    """A bug in ftdata. Please report it with the message."""


# Python considers these printable, but they are invisible: fillers, the Braille blank, variation selectors.
_INVISIBLE = re.compile("[\u115f\u1160\u2800\u3164\uffa0\U000e0100-\U000e01ef]")


def escape_unprintable(text: str) -> str:
    r"""Escape control characters (except line breaks and tabs) and invisible characters as `\uXXXX`."""
    if text.isascii() and text.isprintable():
        return text
    escaped = "".join(char if char.isprintable() or char in "\n\t" else f"\\u{ord(char):04x}" for char in text)
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match.group()):04x}", escaped)


def shorten(text: str, max_length: int = 2_000) -> str:
    """Shorten a text that is longer than `max_length` characters by removing its middle.

    >>> shorten("abcdefghij" * 10, 40)
    'abcdefghij ... 80 more ... abcdefghij'
    """
    # A message begins with the value found, and often ends with the value expected.
    half = max((max_length - 20) // 2, 1)
    return text if len(text) <= max_length else f"{text[:half]} ... {len(text) - 2 * half:,} more ... {text[-half:]}"


def describe_exception(error: BaseException, max_length: int = 300) -> str:
    r"""Return the message of an exception on one line, cut to `max_length` characters.

    >>> describe_exception(ValueError("line one\n  line two"))
    'line one line two'
    """
    return " ".join(str(error).split())[:max_length]


def escape_line_breaks(text: str) -> str:
    r"""Escape line breaks as `\n` and `\r`, so that a name cannot add lines to a log."""
    return text.replace("\n", "\\n").replace("\r", "\\r")


def suggest_names(name: str, candidates: Iterable[str]) -> str:
    """Return a hint that lists all `candidates` and suggests the candidate closest to `name`.

    >>> suggest_names("chatlm", ["chatml", "alpaca"])
    "did you mean 'chatml'? known: alpaca, chatml"
    >>> suggest_names("x", ["b", "a"])
    'known: a, b'
    """
    names = sorted(candidates)
    matches = difflib.get_close_matches(name, names, n=1)
    listing = f"known: {', '.join(names)}"
    return f"did you mean {matches[0]!r}? {listing}" if matches else listing


def suggest_similar(name: str, candidates: Iterable[str]) -> str:
    """Return a hint with the candidate closest to `name`, or an empty string if no candidate is similar.

    >>> suggest_similar("qwen33", ["qwen3", "llama"]), suggest_similar("x", ["qwen3"])
    ("did you mean 'qwen3'?", '')
    """
    similar = _find_similar(name, candidates)
    return f"did you mean {similar!r}?" if similar else ""


def _find_similar(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate closest to `name`, regardless of upper and lower case; `None` if no candidate is similar."""
    by_folded_name = {candidate.casefold(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.casefold(), by_folded_name, n=1)
    return by_folded_name[matches[0]] if matches else None


def suggest_path(path: str | Path) -> str:
    """Return a hint with a file or folder of a similar name, or `""` if `path` exists or no name is similar."""
    path = Path(path)
    similar = None
    with suppress(OSError):
        if not path.exists():
            similar = _find_similar(path.name, [sibling.name for sibling in path.parent.iterdir()])
    return f"did you mean {str(path.parent / similar)!r}?" if similar else ""


def first_difference(first: Sequence[object], second: Sequence[object]) -> int:
    """Return the index of the first items that differ: the length of the shorter sequence if it begins the longer one.

    >>> first_difference([1, 2, 3], [1, 5]), first_difference("ab", "abc")
    (1, 2)
    """
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (item, other) in pairs if item != other), min(len(first), len(second)))


def count_noun(count: int, noun: str) -> str:
    """Return a number with a noun in the singular or plural.

    >>> count_noun(1, "row"), count_noun(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Check that an option has one of its allowed values.

    Raises:
        UsageError: the value is not allowed. The hint suggests the closest allowed value.
    """
    if not isinstance(value, str) or value not in allowed:
        problem = f"{name} is {value!r}, expected a known value"
        raise UsageError(f"unknown_{name}", problem, hint=suggest_names(str(value), allowed))
