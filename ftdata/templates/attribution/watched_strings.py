"""A `str` subclass that records every operation that a template performs on it.

The output of a template depends on the shape of a conversation and on the results of operations on its texts: whether
a text contains `</think>`, or how another text begins. A `WatchedString` records each operation with its result.
The template takes the same path for all other texts with the same results. If an operation cannot be recorded, the
whole run is marked as opaque, which means that its result cannot be reused for other texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Self

from ftdata.templates.attribution.tracked_strings import TrackedString, concat_tracked

Origin = tuple[Any, ...]
"""The expression that computes a value.

- `("text", text)`: a constant text.
- `("field", number)`: a text of the conversation, in the order in which `watch_messages` visits the texts.
- `("call", origin, method, arguments)`: the result of a method.
- `("join", origins)`: a concatenation.
"""


@dataclass
class OperationLog:
    """A log of the operations that a template performs on the strings of a row during one run.

    Attributes:
        operations: the expression and the result of each operation.
        opaque: whether an operation could not be recorded.
    """

    operations: list[tuple[Origin, bool | int]] = field(default_factory=list)
    opaque: bool = False


_log: ContextVar[OperationLog] = ContextVar("log")


@contextmanager
def record_operations() -> Iterator[OperationLog]:
    """Record all operations on `WatchedString` objects inside this `with` block."""
    token = _log.set(OperationLog())
    try:
        yield _log.get()
    finally:
        _log.reset(token)


def mark_opaque() -> None:
    """Record that the template performed an operation that cannot be replayed for other messages."""
    _log.get().opaque = True


class WatchedString(TrackedString):
    """A `TrackedString` that records every operation that a template performs on it.

    Attributes:
        origin: the expression that computes the string, or `None` if it is unknown.
    """

    __slots__ = ("origin",)
    origin: Origin | None

    @classmethod
    def from_origin(cls, text: str, origin: Origin | None) -> Self:
        """Create a `WatchedString` from `text`. `origin` is the expression that computes this text."""
        self = cls(str.__str__(text), TrackedString.from_str(text).runs)
        self.origin = origin
        return self

    def in_block(self, number: int) -> TrackedString:
        """Return a copy in which every character is marked as part of the `{% generation %}` block `number`."""
        return WatchedString.from_origin(super().in_block(number), self.origin)

    def to_tracked(self) -> TrackedString:
        """Convert to a plain `TrackedString`, which does not record operations."""
        return TrackedString(str.__str__(self), self.runs)

    def derive_origin(self, name: str, arguments: tuple[Any, ...]) -> Origin | None:
        """Return the expression for a call of method `name` on this string. Return `None` if it cannot be recorded."""
        is_recordable = self.origin is not None and not any(
            isinstance(argument, WatchedString) for argument in arguments
        )
        return ("call", self.origin, name, arguments) if is_recordable else None

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> TrackedString:
        return join_watched((self, other))

    def __radd__(self, other: str) -> TrackedString:
        return join_watched((other, self))

    def __iter__(self) -> Iterator[str]:
        mark_opaque()
        return iter(self.to_tracked())

    def __hash__(self) -> int:
        mark_opaque()
        return str.__hash__(self)


def unwatch(text: TrackedString) -> TrackedString:
    """Convert a `WatchedString` to a plain `TrackedString`. Return other strings unchanged."""
    return text.to_tracked() if isinstance(text, WatchedString) else text


class WatchedLength(int):
    """The length of a `WatchedString`. Comparisons record only their result; other operations record the length."""

    origin: Origin | None


def _record(expression: Origin | None, result: Any) -> None:
    if expression is None or not isinstance(result, bool | int):
        mark_opaque()
    else:
        _log.get().operations.append((expression, result))


def watched_length(value: Any) -> int:
    """Apply Jinja's `length` filter. Return a `WatchedLength` for a `WatchedString`."""
    if not isinstance(value, WatchedString):
        return len(value)
    length = WatchedLength(len(value.to_tracked()))
    length.origin = value.derive_origin("__len__", ())
    return length


def join_watched(pieces: Iterable[str]) -> TrackedString:
    """Concatenate strings. Return a `WatchedString` if at least one input is a `WatchedString`."""
    parts = list(pieces)
    text = TrackedString.from_str(concat_tracked(parts))
    if not any(isinstance(part, WatchedString) for part in parts):
        return text
    origins = [part.origin if isinstance(part, WatchedString) else ("text", str.__str__(part)) for part in parts]
    known_origins = [origin for origin in origins if origin is not None]
    if len(known_origins) < len(parts):
        return WatchedString.from_origin(text, None)
    # The sum of two strings is not merged: it may be one step of a loop, which would take quadratic time.
    joined = known_origins if len(known_origins) == 2 else _merge_origins(known_origins)
    return WatchedString.from_origin(text, ("join", tuple(joined)))


def _merge_origins(origins: Sequence[Origin]) -> list[Origin]:
    """Simplify the parts of a concatenation: resolve nested concatenations, and merge adjacent constant texts."""
    merged = list[Origin]()
    for origin in origins:
        for part in origin[1] if origin[0] == "join" else (origin,):
            if part[0] == "text" and merged and merged[-1][0] == "text":
                merged[-1] = ("text", merged[-1][1] + part[1])
            else:
                merged.append(part)
    return merged


def watch_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Copy messages and convert each `TrackedString` to a `WatchedString`. Keys of objects are not converted.

    Also return the number of converted texts.
    """
    numbers = count()
    return _watch_value(messages, numbers), next(numbers)


def _watch_value(value: Any, numbers: Iterator[int]) -> Any:
    if isinstance(value, TrackedString):
        return WatchedString.from_origin(value, ("field", next(numbers)))
    if isinstance(value, Mapping):
        return {key: _watch_value(item, numbers) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_watch_value(item, numbers) for item in value]
    return value


def watch_method(text: str, name: str) -> Callable[..., Any]:
    """Wrap a method of a plain string so that it records calls with `WatchedString` arguments."""
    method = getattr(TrackedString.from_str(text), name)

    def call(*arguments: Any, **options: Any) -> Any:
        if name == "join":
            pieces = [part for piece in arguments[0] for part in (text, piece)]
            return join_watched(pieces[1:])
        if any(isinstance(argument, WatchedString) for argument in (*arguments, *options.values())):
            mark_opaque()
        return method(*arguments, **options)

    return call


def watch_result(function: Callable[..., str]) -> Callable[..., str]:
    """Wrap a function so that it returns a `WatchedString` if the result contains text of the row."""

    def call(*arguments: Any, **options: Any) -> str:
        result = TrackedString.from_str(function(*arguments, **options))
        return WatchedString.from_origin(result, None) if any(owner for _, owner in result.runs) else result

    call.__dict__.update(getattr(function, "__dict__", {}))
    return call


def watch_unknown_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function whose calls cannot be replayed for other messages. Each call records this limitation."""

    def call(*arguments: Any, **options: Any) -> Any:
        mark_opaque()
        return function(*arguments, **options)

    call.__dict__.update(getattr(function, "__dict__", {}))
    return call


def _make_deriving_method(name: str) -> Callable[..., Any]:
    """Create an override of a `str` method such as `strip`. The override returns one `WatchedString`."""

    def method(self: WatchedString, *arguments: Any, **options: Any) -> Any:
        try:
            derived = getattr(self.to_tracked(), name)(*arguments, **options)
        except IndexError:
            _record(self.derive_origin("__len__", ()), len(self.to_tracked()))
            raise
        return WatchedString.from_origin(derived, self.derive_origin(name, arguments) if not options else None)

    return method


def _make_splitting_method(name: str) -> Callable[..., Any]:
    """Create an override of a `str` method such as `split`. The override returns several `WatchedString` objects."""

    def method(self: WatchedString, *arguments: Any, **options: Any) -> Any:
        pieces = getattr(self.to_tracked(), name)(*arguments, **options)
        origin = self.derive_origin(name, arguments) if not options else None
        _record(None if origin is None else ("call", origin, "__len__", ()), len(pieces))
        watched = [
            WatchedString.from_origin(piece, None if origin is None else ("call", origin, "__getitem__", (number,)))
            for number, piece in enumerate(pieces)
        ]
        return tuple(watched) if isinstance(pieces, tuple) else watched

    return method


def _make_query_method(name: str) -> Callable[..., Any]:
    """Create an override of a `str` method that returns a boolean or a number. The override records the result."""

    def method(self: WatchedString, *arguments: Any) -> Any:
        result = bool(self.to_tracked()) if name == "__bool__" else getattr(self.to_tracked(), name)(*arguments)
        _record(self.derive_origin(name, arguments), result)
        return result

    return method


def _make_opaque_method(name: str) -> Callable[..., Any]:
    """Create an override of a `str` method whose calls cannot be replayed. Each call records this limitation."""

    def method(self: WatchedString, *arguments: Any, **options: Any) -> Any:
        mark_opaque()
        return getattr(self.to_tracked(), name)(*arguments, **options)

    return method


def _make_length_comparison(name: str) -> Callable[..., Any]:
    """Create an override of an `int` method that compares a length. The override records only the result."""

    def method(self: WatchedLength, *arguments: Any) -> Any:
        result = getattr(int.__int__(self), name)(*arguments)
        _record(None if self.origin is None else ("call", self.origin, name, arguments), result)
        return result

    return method


def _make_length_method(name: str) -> Callable[..., Any]:
    """Create an override of an `int` method that is not a comparison. The override records the exact length."""

    def method(self: WatchedLength, *arguments: Any) -> Any:
        _record(self.origin, length := int.__int__(self))
        return getattr(length, name)(*arguments)

    return method


_COMPARISONS = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__"}
_DERIVING = {"strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "replace", "__getitem__"}
_DERIVING |= {"upper", "lower", "capitalize", "title", "swapcase", "casefold"}
_SPLITTING = {"split", "rsplit", "splitlines", "partition", "rpartition"}
_QUERIES = _COMPARISONS | {"__contains__", "__len__", "startswith", "endswith", "find", "rfind", "count"}
_QUERIES |= {name for name in dir(str) if name.startswith("is")}

REPLAYED_METHODS = _DERIVING | _SPLITTING | _QUERIES | {"join"}
"""Methods in the recorded expressions. All results are texts, numbers, or lists of texts."""

_OBJECT = set(dir(object)) - _COMPARISONS - {"__str__", "__repr__", "__hash__", "__format__"} | {"__getnewargs__"}
"""Methods that every object has, whose results do not depend on the value."""


def _override_methods(
    cls: type, base: type, kinds: Mapping[Callable[[str], Any], set[str]], default: Callable[[str], Any]
) -> None:
    """Define overrides in `cls` for the methods of the class `base`, so that calls are recorded.

    Args:
        cls: the class that receives the overrides.
        base: the class whose methods are overridden.
        kinds: function that creates an override -> names of the methods that it overrides.
        default: function that creates the overrides of all other methods.
    """
    factories = {name: make for make, names in kinds.items() for name in names}
    for name in {*dir(base), *factories} - set(vars(cls)) - _OBJECT:
        if callable(getattr(base, name, None)) or name in factories:
            setattr(cls, name, factories.get(name, default)(name))


_override_methods(
    WatchedString,
    str,
    {_make_deriving_method: _DERIVING, _make_splitting_method: _SPLITTING, _make_query_method: _QUERIES},
    _make_opaque_method,
)
_override_methods(WatchedLength, int, {_make_length_comparison: _COMPARISONS}, _make_length_method)
