"""Parse the JSON text of rows without loss. Text that two parsers could read differently is rejected."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from ftdata.readers.json_scan import json_depth
from ftdata.readers.streams import MAX_VALUES
from ftdata.types import Reject, Row, Source

RAW_BYTES = 4096
"""Number of bytes of an invalid row that are stored."""

_MIN_TOGETHER = 4
"""Minimum number of lines that are parsed together. The checks of fewer lines are faster one by one."""

MAX_DEPTH = 128
"""Maximum number of nested brackets in a row."""

_KEY = re.compile(rb'"[ \t\r\n]*:')
# To search for a number of 19 digits quickly, all digits are replaced by zeros.
_DIGITS, _LONG_NUMBER = bytes.maketrans(b"123456789", b"000000000"), b"0" * 19
_QUOTE_ESCAPE = rb"\u0022"
_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
# Escapes that hide a quote, a space or a colon, so that a text looks like a key or a key like a text.
_ESCAPES = (rb"\u0022", rb"\u0020", rb"\u003a", rb"\u003A")


def parse_lines(texts: list[bytes], sources: list[Source]) -> list[Row | Reject]:
    """Parse lines together. If this fails, or the lines need a slower check, parse each half."""
    if len(texts) < _MIN_TOGETHER:
        return parse_each_line(texts, sources)
    try:
        values = [*map(orjson.loads, texts)]
    except orjson.JSONDecodeError:
        values = []
    if values and {*map(type, values)} <= {dict, list} and _are_lossless(values, texts):
        return [*map(Row, values, sources)]
    middle = len(texts) // 2
    return parse_lines(texts[:middle], sources[:middle]) + parse_lines(texts[middle:], sources[middle:])


def parse_each_line(texts: list[bytes], sources: list[Source]) -> list[Row | Reject]:
    """Parse lines of JSON Lines one by one."""
    return [_parse_line(text, source) for text, source in zip(texts, sources, strict=True)]


def _parse_line(text: bytes, source: Source) -> Row | Reject:
    row = parse_row(text, source, whole_line=True)
    if isinstance(row, Reject) and not text.endswith(b"\n") and _is_unclosed(text):
        reason = f"{row.reason}; the file ends inside this line"
        return replace(row, code="partial_file", reason=reason, fix="write the file again, it is probably truncated")
    return row


_ESCAPE = re.compile(rb"\\.", re.DOTALL)


def _is_unclosed(text: bytes) -> bool:
    """Return whether a bracket or a quote is not closed."""
    parts = _ESCAPE.sub(b"", text).split(b'"')
    # Strings are at odd positions.
    outside = b"".join(parts[::2])
    opened, closed = (sum(map(outside.count, brackets)) for brackets in ((b"{", b"["), (b"}", b"]")))
    return len(parts) % 2 == 0 or opened > closed


def parse_row(text: bytes, source: Source, *, whole_line: bool = False) -> Row | Reject:
    """Parse the JSON text of a row.

    A row that two parsers could read differently is rejected, e.g. a repeated key or a lone surrogate.

    Args:
        text: the JSON text.
        source: source of the row.
        whole_line: whether the text is a complete line, so that errors name a column instead of a byte in the file.
    """
    try:
        value = _parse_value(text, source, whole_line=whole_line)
        if type(value) is not dict and type(value) is not list:
            problem = f"the row is a {type(value).__name__}, expected an object or a list of messages"
            raise _Fault("not_a_row", problem, "write each row as an object with named columns")
    except _Fault as fault:
        return Reject(source, fault.code, "", fault.reason, fault.fix, raw_text(text))
    return Row(value, source)


class _Fault(Exception):
    def __init__(self, code: str, reason: str, fix: str = "") -> None:
        super().__init__(code)
        self.code, self.reason, self.fix = code, reason, fix


def _too_deep_fault() -> _Fault:
    return _Fault("too_deep", f"the row is nested deeper than {MAX_DEPTH} levels")


def _parse_value(text: bytes, source: Source, *, whole_line: bool) -> Any:
    if len(text) > MAX_VALUES and (values := text.count(b",")) > MAX_VALUES:
        reason = f"the row has {values:,} commas, expected at most {MAX_VALUES:,}"
        raise _Fault("row_too_long", reason, "split the row into several rows")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if json_depth(text) > MAX_DEPTH:
            raise _too_deep_fault() from None
        return _parse_with_json(text.rstrip(), source, error, whole_line=whole_line)
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH and orjson.dumps(value) == text.rstrip():
        return value
    keys, has_floats = _count_keys(value)
    # orjson converts integers beyond 64 bits to floats.
    if has_floats and _LONG_NUMBER in text.translate(_DIGITS):
        return _parse_with_json(text, source, None, whole_line=whole_line)
    if _may_repeat_keys(text, value, keys):
        json.loads(text, object_pairs_hook=_unique_keys)
    return value


def _are_lossless(values: Sequence[Any], texts: Sequence[bytes]) -> bool:
    r"""Check quickly whether parsed values contain all data of their JSON texts, and are not nested too deeply.

    `False` means that a slower check is necessary. Of an object that repeats a key, orjson keeps only the last value.
    Each key and each string has two quotes, and orjson writes a quote inside a string as the text does, except for
    the escape `\u0022`. So if the values have as many quotes as the texts, no key was lost.
    """
    joined = b"".join(texts)
    codes = np.frombuffer(joined, np.uint8)
    # "[" and "{" differ only in the bit 0x20.
    brackets = np.flatnonzero(codes | 0x20 == ord("{"))
    counts = np.searchsorted(brackets, [*accumulate(map(len, texts), initial=0)])
    if (counts[1:] - counts[:-1]).max() > MAX_DEPTH:
        return False
    dumped = orjson.dumps(values)
    if dumped == b"[%s]" % b",".join([text.rstrip() for text in texts]):
        return True
    if _has_quote_escape(codes) or _count_quotes(codes) != _count_quotes(np.frombuffer(dumped, np.uint8)):
        return False
    # orjson converts integers beyond 64 bits to floats. Such an integer has at least 19 digits, so among every fourth
    # character of the text, four consecutive characters are digits.
    are_digits = codes[::4] - ord("0") < 10
    are_pairs = are_digits[1:] & are_digits[:-1]
    may_have_long_number = bool((are_pairs[2:] & are_pairs[:-2]).any())
    return not (may_have_long_number and _LONG_NUMBER in joined.translate(_DIGITS))


def _has_quote_escape(codes: NDArray[np.uint8]) -> bool:
    """Return whether a text contains the escape of a quote, `u0022` after a backslash."""
    first, second = _QUOTE_ESCAPE[:2]
    candidates = np.flatnonzero((codes[:-1] == first) & (codes[1:] == second))
    for distance, code in enumerate(_QUOTE_ESCAPE):
        candidates = candidates[codes.take(candidates + distance, mode="clip") == code]
    return len(candidates) > 0


def _count_quotes(codes: NDArray[np.uint8]) -> int:
    # This is five times as fast as `bytes.count`.
    return int(np.count_nonzero(codes == ord('"')))


def _count_keys(value: Any, depth: int = 1) -> tuple[int, bool]:
    """Count the keys in a JSON value. Also return whether the value contains floats."""
    if depth > MAX_DEPTH:
        raise _too_deep_fault()
    keys, has_floats = len(value) if type(value) is dict else 0, type(value) is float
    items = value.values() if type(value) is dict else value if type(value) is list else ()
    for item in items:
        kind = type(item)
        if kind is str:
            continue
        if kind is dict or kind is list:
            inner_keys, has_inner_floats = _count_keys(item, depth + 1)
            keys, has_floats = keys + inner_keys, has_floats or has_inner_floats
        elif kind is float:
            has_floats = True
    return keys, has_floats


def _json_fix(text: bytes) -> str:
    if b"\r" in text.strip():
        return "separate the rows by line feeds (LF); the file contains carriage returns (CR)"
    if text.lstrip().startswith((b"{'", b"[{'")):
        return "write the rows with json.dumps; JSON requires double quotes"
    return "correct the JSON, or remove the row"


def _parse_with_json(text: bytes, source: Source, error: orjson.JSONDecodeError | None, *, whole_line: bool) -> Any:
    # Unlike orjson, the json module accepts NaN, which is harmless in columns that are not trained on.
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as fault:
        raise _Fault("encoding", *describe_invalid_utf8(text[fault.start : fault.start + 3], fault.start)) from None
    except UnicodeEncodeError:
        message = "the row contains an escaped lone surrogate, which is not a valid character"
        raise _Fault("lone_surrogate", message) from None
    except ValueError:
        assert error is not None  # text that orjson accepts is valid for the json module
        line = (source.line or 1) + error.lineno - 1
        position = f"line {line}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        if whole_line and error.lineno > 1:
            # The row contains the line break at its end, so the error is at the end of the line.
            position = "the end of the line"
        if error.lineno == 1 and not whole_line:
            position = f"byte {(source.offset or 0) + len(error.doc[: error.pos].encode())}"
        raise _Fault("json", f"the row is not valid JSON at {position}: {error.msg}", _json_fix(text)) from None
    return value


def describe_invalid_utf8(invalid: bytes, offset: int) -> tuple[str, str]:
    """Return an error message and a fix for text that is invalid in UTF-8 or in the encoding of the file.

    Args:
        invalid: up to three bytes from the first invalid byte on.
        offset: offset of the first invalid byte in the row.
    """
    surrogate = invalid.decode("utf-8", "surrogatepass") if _SURROGATE.fullmatch(invalid) else ""
    if "\udc80" <= surrogate <= "\udcff":
        reason = f"is not valid text in the encoding of the file: byte 0x{ord(surrogate) - 0xDC00:02x}"
        return reason, "pass a different encoding"
    reason = f"is not UTF-8 text: byte 0x{invalid[0]:02x} at offset {offset} of the row"
    return (
        reason,
        "set the encoding, e.g. encoding='cp1252', or {path: ..., encoding: cp1252} if only this file has it",
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Fault("duplicate_key", f"an object contains the duplicate key {repeated!r}", "remove one of the keys")
    return value


def _may_repeat_keys(text: bytes, value: Any, keys: int) -> bool:
    """Return whether an object in the text may contain a key twice. For such a key, orjson keeps only the last value.

    The text of a key ends with a quote and a colon, so a repeated key causes more such pairs than there are keys.
    """
    pairs = len(_KEY.findall(text))
    if pairs == keys:
        return False
    # Strings may contain such pairs, too; they remain when the value is serialized again.
    is_hidden = b"\\u00" in text and any(escape in text for escape in _ESCAPES)
    return is_hidden or pairs != len(_KEY.findall(orjson.dumps(value)))


def raw_text(text: bytes) -> str:
    """Return the beginning of an invalid row as text."""
    return text[:RAW_BYTES].decode("utf-8", "backslashreplace").rstrip("\r\n")
