"""Strings that note what a template finds out about them.

Which way a template takes depends on the shape of a conversation and on what it asks of the texts: whether
`</think>` is in one, how another begins. A `WatchedString` string notes each such question with its answer, so that it
is known for which other texts the template goes the same way. What cannot be noted makes the whole run opaque.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self

from ftdata.templates.attribution.tracked_strings import TrackedString, concat_tracked

Origin = tuple[Any, ...]
"""How a value came about: `("is", text)`, `("at", path)` in the messages, `("do", origin, method, arguments)`,
`("join", origins)`, or `("same", origin)`: whether what was done last, a `"do"`, changed nothing."""


def evaluate_origin(origin: Origin, messages: Sequence[Mapping[str, Any]]) -> Any:
    """Make the value again, out of other messages.

    Raises:
        LookupError, ValueError: a method fails on it.
    """
    kind, *rest = origin
    if kind == "is":
        return rest[0]
    if kind == "at":
        value: Any = messages
        for key in rest[0]:
            value = value[key]
        return str.__str__(value)
    if kind == "join":
        return "".join(evaluate_origin(part, messages) for part in rest[0])
    if kind == "same":
        _, before, name, arguments = rest[0]
        value = evaluate_origin(before, messages)
        return getattr(value, name)(*arguments) == value
    before, name, arguments = rest
    value = evaluate_origin(before, messages)
    return bool(value) if name == "__bool__" else getattr(value, name)(*arguments)


@dataclass(frozen=True, slots=True)
class RecordedOperation:
    """What was asked of a text, and the answer."""

    asked: Origin
    answer: Any

    def same(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these messages give the same answer."""
        try:
            return bool(evaluate_origin(self.asked, messages) == self.answer)
        except (ValueError, LookupError, RecursionError):
            return False


@dataclass
class OperationLog:
    """What a template asked in the runs that were watched."""

    questions: list[RecordedOperation] = field(default_factory=list)
    opaque: bool = False


_log: ContextVar[OperationLog] = ContextVar("log")


@contextmanager
def record_operations() -> Iterator[OperationLog]:
    """Note what is asked of watched strings inside this block."""
    token = _log.set(OperationLog())
    try:
        yield _log.get()
    finally:
        _log.reset(token)


def mark_opaque() -> None:
    """Note that the template did something that cannot be asked again."""
    _log.get().opaque = True


class WatchedString(TrackedString):
    """A tracked string that notes what is asked of it; `origin` is how it came about, `None` for unknown."""

    __slots__ = ("origin",)
    origin: Origin | None

    @classmethod
    def at(cls, text: str, origin: Origin | None) -> Self:
        """Watch a text."""
        self = cls(str.__str__(text), TrackedString.of(text).runs)
        self.origin = origin
        return self

    def in_block(self, number: int) -> TrackedString:
        """Return the string with the block number set in every owner."""
        return WatchedString.at(super().in_block(number), self.origin)

    def plain(self) -> TrackedString:
        """Return the tracked string, not watched."""
        return TrackedString(str.__str__(self), self.runs)

    def after(self, name: str, arguments: tuple[Any, ...]) -> Origin | None:
        """Return the origin of what a method returns."""
        known = self.origin is not None and not any(isinstance(argument, WatchedString) for argument in arguments)
        return ("do", self.origin, name, arguments) if known else None

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> TrackedString:
        return join_watched((self, other))

    def __radd__(self, other: str) -> TrackedString:
        return join_watched((other, self))

    def __iter__(self) -> Iterator[str]:
        mark_opaque()
        return iter(self.plain())

    def __hash__(self) -> int:
        mark_opaque()
        return str.__hash__(self)


def unwatch(text: TrackedString) -> TrackedString:
    """Return a tracked string that is not watched."""
    return text.plain() if isinstance(text, WatchedString) else text


class WatchedLength(int):
    """The length of a watched string: it is compared with others far more often than it is told."""

    origin: Origin | None


def _note(asked: Origin | None, answer: Any) -> None:
    if asked is None or not isinstance(answer, bool | int):
        mark_opaque()
    else:
        _log.get().questions.append(RecordedOperation(asked, answer))


def watched_length(value: Any) -> int:
    """As Jinja's filter of that name."""
    if not isinstance(value, WatchedString):
        return len(value)
    found = WatchedLength(len(value.plain()))
    found.origin = value.after("__len__", ())
    return found


def join_watched(pieces: Iterable[str]) -> TrackedString:
    """Join strings; the result is watched if one of them is."""
    parts = list(pieces)
    text = TrackedString.of(concat_tracked(parts))
    if not any(isinstance(part, WatchedString) for part in parts):
        return text
    origins = [part.origin if isinstance(part, WatchedString) else ("is", str.__str__(part)) for part in parts]
    known = [origin for origin in origins if origin is not None]
    if len(known) < len(parts):
        return WatchedString.at(text, None)
    # A sum, which may be one of many that grow in a loop, is not gone through.
    return WatchedString.at(text, ("join", tuple(known if len(known) == 2 else _merged(known))))


def _merged(origins: Sequence[Origin]) -> list[Origin]:
    """Return the same with what was joined before as its parts, and neighbours of the template's own text as one."""
    found = list[Origin]()
    for origin in origins:
        for one in origin[1] if origin[0] == "join" else (origin,):
            if one[0] == "is" and found and found[-1][0] == "is":
                found[-1] = ("is", found[-1][1] + one[1])
            else:
                found.append(one)
    return found


def watch_messages(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Return a copy of messages in which every text but roles is watched. Keys are part of the shape, and are not."""
    if isinstance(value, TrackedString):
        return WatchedString.at(value, ("at", path))
    if isinstance(value, Mapping):
        return {key: watch_messages(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [watch_messages(item, (*path, index)) for index, item in enumerate(value)]
    return value


def watch_method(text: str, name: str) -> Callable[..., Any]:
    """Return a method of a string that is not watched, but may be given watched ones."""
    method = getattr(TrackedString.of(text), name)

    def call(*arguments: Any, **options: Any) -> Any:
        if name == "join":
            between = [part for piece in arguments[0] for part in (text, piece)]
            return join_watched(between[1:])
        if any(isinstance(argument, WatchedString) for argument in (*arguments, *options.values())):
            mark_opaque()
        return method(*arguments, **options)

    return call


def watch_result(function: Callable[..., str]) -> Callable[..., str]:
    """Return the function with its result watched, where any of the row's text is in it."""

    def call(*arguments: Any, **options: Any) -> str:
        result = TrackedString.of(function(*arguments, **options))
        return WatchedString.at(result, None) if any(owner for _, owner in result.runs) else result

    call.__dict__.update(getattr(function, "__dict__", {}))
    return call


def watch_unknown_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, which nothing is known about, so that to call it makes the run opaque."""

    def call(*arguments: Any, **options: Any) -> Any:
        mark_opaque()
        return function(*arguments, **options)

    call.__dict__.update(getattr(function, "__dict__", {}))
    return call


def _deriving(name: str) -> Callable[..., Any]:
    def method(self: WatchedString, *arguments: Any, **options: Any) -> Any:
        try:
            made = getattr(self.plain(), name)(*arguments, **options)
        except IndexError:
            _note(self.after("__len__", ()), len(self.plain()))
            raise
        origin = self.after(name, arguments) if not options else None
        # What has nothing to trim or to replace may be printed otherwise elsewhere, and it does not show.
        if origin is not None and not (name == "__getitem__" and not isinstance(arguments[0], slice)):
            _note(("same", origin), str.__eq__(made, self))
        return WatchedString.at(made, origin)

    return method


def _splitting(name: str) -> Callable[..., Any]:
    def method(self: WatchedString, *arguments: Any, **options: Any) -> Any:
        pieces = getattr(self.plain(), name)(*arguments, **options)
        origin = self.after(name, arguments) if not options else None
        _note(None if origin is None else ("do", origin, "__len__", ()), len(pieces))
        made = [
            WatchedString.at(piece, None if origin is None else ("do", origin, "__getitem__", (number,)))
            for number, piece in enumerate(pieces)
        ]
        return tuple(made) if isinstance(pieces, tuple) else made

    return method


def _asking(name: str) -> Callable[..., Any]:
    def method(self: WatchedString, *arguments: Any) -> Any:
        answer = bool(self.plain()) if name == "__bool__" else getattr(self.plain(), name)(*arguments)
        _note(self.after(name, arguments), answer)
        return answer

    return method


def _unknown(name: str) -> Callable[..., Any]:
    def method(self: WatchedString, *arguments: Any, **options: Any) -> Any:
        mark_opaque()
        return getattr(self.plain(), name)(*arguments, **options)

    return method


def _comparing(name: str) -> Callable[..., Any]:
    def method(self: WatchedLength, *arguments: Any) -> Any:
        answer = getattr(int.__int__(self), name)(*arguments)
        _note(None if self.origin is None else ("do", self.origin, name, arguments), answer)
        return answer

    return method


def _telling(name: str) -> Callable[..., Any]:
    def method(self: WatchedLength, *arguments: Any) -> Any:
        _note(self.origin, plain := int.__int__(self))
        return getattr(plain, name)(*arguments)

    return method


_ORDER = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__"}
_DERIVE = {"strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "replace", "__getitem__"}
_DERIVE |= {"upper", "lower", "capitalize", "title", "swapcase", "casefold"}
_SPLIT = {"split", "rsplit", "splitlines", "partition", "rpartition"}
_ASK = _ORDER | {"__contains__", "__len__", "startswith", "endswith", "find", "rfind", "count"}
_ASK |= {name for name in dir(str) if name.startswith("is")}

_OBJECT = set(dir(object)) - _ORDER - {"__str__", "__repr__", "__hash__", "__format__"} | {"__getnewargs__"}
"""What makes an object an object, and tells nothing about its value."""


def _cover(cls: type, base: type, kinds: Mapping[Callable[[str], Any], set[str]], rest: Callable[[str], Any]) -> None:
    """Give a class each method of its base anew, made by the kind that names it, else by `rest`."""
    makers = {name: make for make, names in kinds.items() for name in names}
    for name in {*dir(base), *makers} - set(vars(cls)) - _OBJECT:
        if callable(getattr(base, name, None)) or name in makers:
            setattr(cls, name, makers.get(name, rest)(name))


_cover(WatchedString, str, {_deriving: _DERIVE, _splitting: _SPLIT, _asking: _ASK}, _unknown)
_cover(WatchedLength, int, {_comparing: _ORDER}, _telling)
