"""Strings that note what a template finds out about them.

Which way a template takes depends on the shape of a conversation and on what it asks of the texts: whether
`</think>` is in one, how another begins. A `Watched` string notes each such question with its answer, so that it
is known for which other texts the template goes the same way. What cannot be noted makes the whole run `opaque`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self

from ftdata.templates.attribution.tracked_strings import Tracked, concat

Origin = tuple[Any, ...]
"""How a value came about: `("is", text)`, `("at", path)` in the messages, `("do", origin, method, arguments)`,
`("join", origins)`, or `("same", origin)`: whether what was done last, a `"do"`, changed nothing."""


def evaluate(origin: Origin, messages: Sequence[Mapping[str, Any]]) -> Any:
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
        return "".join(evaluate(part, messages) for part in rest[0])
    if kind == "same":
        _, before, name, arguments = rest[0]
        value = evaluate(before, messages)
        return getattr(value, name)(*arguments) == value
    before, name, arguments = rest
    value = evaluate(before, messages)
    return bool(value) if name == "__bool__" else getattr(value, name)(*arguments)


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked of a text, and the answer."""

    asked: Origin
    answer: Any

    def same(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these messages give the same answer."""
        try:
            return bool(evaluate(self.asked, messages) == self.answer)
        except (ValueError, LookupError, RecursionError):
            return False


@dataclass
class Log:
    """What a template asked in the runs that were watched."""

    questions: list[Question] = field(default_factory=list)
    opaque: bool = False


_log: ContextVar[Log] = ContextVar("log")


@contextmanager
def watching() -> Iterator[Log]:
    """Note what is asked of watched strings inside this block."""
    token = _log.set(Log())
    try:
        yield _log.get()
    finally:
        _log.reset(token)


def opaque() -> None:
    """Note that the template did something that cannot be asked again."""
    _log.get().opaque = True


class Watched(Tracked):
    """A tracked string that notes what is asked of it; `origin` is how it came about, `None` for unknown."""

    __slots__ = ("origin",)
    origin: Origin | None

    @classmethod
    def at(cls, text: str, origin: Origin | None) -> Self:
        """Watch a text."""
        self = cls(str.__str__(text), Tracked.of(text).runs)
        self.origin = origin
        return self

    def in_block(self, number: int) -> Tracked:
        """Return the string with the block number set in every owner."""
        return Watched.at(super().in_block(number), self.origin)

    def plain(self) -> Tracked:
        """Return the tracked string, not watched."""
        return Tracked(str.__str__(self), self.runs)

    def after(self, name: str, arguments: tuple[Any, ...]) -> Origin | None:
        """Return the origin of what a method returns."""
        known = self.origin is not None and not any(isinstance(argument, Watched) for argument in arguments)
        return ("do", self.origin, name, arguments) if known else None

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> Tracked:
        return joined((self, other))

    def __radd__(self, other: str) -> Tracked:
        return joined((other, self))

    def __iter__(self) -> Iterator[str]:
        opaque()
        return iter(self.plain())

    def __hash__(self) -> int:
        opaque()
        return str.__hash__(self)


def plain(text: Tracked) -> Tracked:
    """Return a tracked string that is not watched."""
    return text.plain() if isinstance(text, Watched) else text


class Length(int):
    """The length of a watched string: it is compared with others far more often than it is told."""

    origin: Origin | None


def _note(asked: Origin | None, answer: Any) -> None:
    if asked is None or not isinstance(answer, bool | int):
        opaque()
    else:
        _log.get().questions.append(Question(asked, answer))


def length(value: Any) -> int:
    """As Jinja's filter of that name."""
    if not isinstance(value, Watched):
        return len(value)
    found = Length(len(value.plain()))
    found.origin = value.after("__len__", ())
    return found


def joined(pieces: Iterable[str]) -> Tracked:
    """Join strings; the result is watched if one of them is."""
    parts = list(pieces)
    text = Tracked.of(concat(parts))
    if not any(isinstance(part, Watched) for part in parts):
        return text
    origins = [part.origin if isinstance(part, Watched) else ("is", str.__str__(part)) for part in parts]
    known = [origin for origin in origins if origin is not None]
    if len(known) < len(parts):
        return Watched.at(text, None)
    # A sum, which may be one of many that grow in a loop, is not gone through.
    return Watched.at(text, ("join", tuple(known if len(known) == 2 else _merged(known))))


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


def watched(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Return a copy of messages in which every text but roles is watched. Keys are part of the shape, and are not."""
    if isinstance(value, Tracked):
        return Watched.at(value, ("at", path))
    if isinstance(value, Mapping):
        return {key: watched(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [watched(item, (*path, index)) for index, item in enumerate(value)]
    return value


def watched_method(text: str, name: str) -> Callable[..., Any]:
    """Return a method of a string that is not watched, but may be given watched ones."""
    method = getattr(Tracked.of(text), name)

    def call(*arguments: Any, **options: Any) -> Any:
        if name == "join":
            between = [part for piece in arguments[0] for part in (text, piece)]
            return joined(between[1:])
        if any(isinstance(argument, Watched) for argument in (*arguments, *options.values())):
            opaque()
        return method(*arguments, **options)

    return call


def watched_result(function: Callable[..., str]) -> Callable[..., str]:
    """Return the function with its result watched, where any of the row's text is in it."""

    def call(*arguments: Any, **options: Any) -> str:
        result = Tracked.of(function(*arguments, **options))
        return Watched.at(result, None) if any(owner for _, owner in result.runs) else result

    call.__dict__.update(getattr(function, "__dict__", {}))
    return call


def watched_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, which nothing is known about, so that to call it makes the run opaque."""

    def call(*arguments: Any, **options: Any) -> Any:
        opaque()
        return function(*arguments, **options)

    call.__dict__.update(getattr(function, "__dict__", {}))
    return call


def _deriving(name: str) -> Callable[..., Any]:
    def method(self: Watched, *arguments: Any, **options: Any) -> Any:
        try:
            made = getattr(self.plain(), name)(*arguments, **options)
        except IndexError:
            _note(self.after("__len__", ()), len(self.plain()))
            raise
        origin = self.after(name, arguments) if not options else None
        # What has nothing to trim or to replace may be printed otherwise elsewhere, and it does not show.
        if origin is not None and not (name == "__getitem__" and not isinstance(arguments[0], slice)):
            _note(("same", origin), str.__eq__(made, self))
        return Watched.at(made, origin)

    return method


def _splitting(name: str) -> Callable[..., Any]:
    def method(self: Watched, *arguments: Any, **options: Any) -> Any:
        pieces = getattr(self.plain(), name)(*arguments, **options)
        origin = self.after(name, arguments) if not options else None
        _note(None if origin is None else ("do", origin, "__len__", ()), len(pieces))
        made = [
            Watched.at(piece, None if origin is None else ("do", origin, "__getitem__", (number,)))
            for number, piece in enumerate(pieces)
        ]
        return tuple(made) if isinstance(pieces, tuple) else made

    return method


def _asking(name: str) -> Callable[..., Any]:
    def method(self: Watched, *arguments: Any) -> Any:
        answer = bool(self.plain()) if name == "__bool__" else getattr(self.plain(), name)(*arguments)
        _note(self.after(name, arguments), answer)
        return answer

    return method


def _unknown(name: str) -> Callable[..., Any]:
    def method(self: Watched, *arguments: Any, **options: Any) -> Any:
        opaque()
        return getattr(self.plain(), name)(*arguments, **options)

    return method


def _comparing(name: str) -> Callable[..., Any]:
    def method(self: Length, *arguments: Any) -> Any:
        answer = getattr(int.__int__(self), name)(*arguments)
        _note(None if self.origin is None else ("do", self.origin, name, arguments), answer)
        return answer

    return method


def _telling(name: str) -> Callable[..., Any]:
    def method(self: Length, *arguments: Any) -> Any:
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


_cover(Watched, str, {_deriving: _DERIVE, _splitting: _SPLIT, _asking: _ASK}, _unknown)
_cover(Length, int, {_comparing: _ORDER}, _telling)
