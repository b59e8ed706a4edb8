"""Record what a template does with the texts of a conversation, and repeat it with the texts of other conversations.

A template can take another path for another conversation with the same roles, keys and types only if an operation on a
text, such as a search for `</think>`, has another result. Therefore the template runs with strings that record all
operations (`WatchedString`). The recorded run contains these operations with their results. It also contains the
rendered text as a list of template texts and expressions. An expression is a text of the conversation, possibly
stripped or split. If all operations have the same results for the texts of another conversation, then the template
prints the same list, with the values of the expressions for these texts. This requires that every operation is
recorded. A template that can read a text in another way (`Template.is_recordable`) is not recorded, and a run that
calls an unknown function with a text (`OperationLog.opaque`) is not reused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftdata.templates.attribution.tracked_strings import Run, TrackedString, concat_tracked
from ftdata.templates.attribution.watched_strings import OperationLog, Origin, WatchedString, unwatch

_MAX_PARTS, _MAX_WORK, _MAX_FIXED_WORK = 10_000, 512, 1 << 16
"""Limits of a run: parts of its text, characters processed per character of a text, and other characters processed."""

Call = tuple[int, str, tuple[Any, ...]]
"""A method call: number of the value that it is called on, name of the method, and arguments.

The number is -1 for a concatenation. Then the arguments are constant texts and numbers of values.
"""


@dataclass(frozen=True, slots=True)
class Expressions:
    """Expressions on the texts of a conversation.

    The values of the expressions are numbered: first the texts, then the results of calls.

    Attributes:
        size: number of texts.
        calls: method calls on earlier values.
        results: for each operation that the template can observe, the number of the value and the recorded value.
    """

    size: int
    calls: tuple[Call, ...]
    results: tuple[tuple[int, Any], ...]

    def evaluate(self, texts: Sequence[str]) -> list[Any] | None:
        """Return all values for other texts, or `None` if an operation has another result than recorded."""
        values: list[Any] = [*texts[: self.size]]
        try:
            for base, method, arguments in self.calls:
                if base < 0:
                    values.append("".join([values[part] if isinstance(part, int) else part for part in arguments]))
                elif method == "__bool__":
                    values.append(bool(values[base]))
                else:
                    values.append(getattr(values[base], method)(*arguments))
        except (ValueError, LookupError, TypeError, AttributeError):
            return None
        for number, result in self.results:
            if values[number] != result:
                return None
        return values

    @property
    def is_bounded(self) -> bool:
        """Whether the evaluation takes so little work that no CPU limit is needed.

        Each character of a text is processed at most `_MAX_WORK` times, and other characters at most `_MAX_FIXED_WORK`
        times in total. For each value, the code computes the length per character of a text, the constant length, and
        the texts that the value contains.
        """
        lengths = [(1.0, 0.0)] * self.size
        sources = [frozenset({number}) for number in range(self.size)]
        work, fixed_work = Counter[int](), 0.0
        for base, method, arguments in self.calls:
            if base < 0:
                parts = [part for part in arguments if isinstance(part, int)]
                factor, growth = 1, 1.0
                length = sum(lengths[part][0] for part in parts)
                constant = sum(lengths[part][1] for part in parts) + sum(map(len, _texts_of(arguments)))
                source = frozenset[int]().union(*(sources[part] for part in parts))
            else:
                factor, growth, added = _cost_of_call(method, _texts_of(arguments))
                length, constant, source = lengths[base][0], lengths[base][1] + added, sources[base]
            lengths.append((length * growth, constant * growth))
            sources.append(source)
            work.update(dict.fromkeys(source, factor * length * growth))
            fixed_work += 1 + factor * constant * growth
        return fixed_work <= _MAX_FIXED_WORK and max(work.values(), default=0) <= _MAX_WORK


def _texts_of(arguments: Sequence[Any]) -> list[str]:
    nested = [item for argument in arguments for item in (argument if isinstance(argument, tuple) else (argument,))]
    return [item for item in nested if isinstance(item, str)]


def _cost_of_call(method: str, texts: Sequence[str]) -> tuple[int, float, int]:
    """Return how often a method processes each character, how much longer its result is, and the constant work."""
    added = sum(map(len, texts))
    if method in ("strip", "lstrip", "rstrip", "split", "rsplit") and texts:
        # Each character to strip is compared with each character of the text.
        return 1 + len(texts[0]), 1.0, added
    if method == "replace" and len(texts) > 1:
        growth = len(texts[1]) / len(texts[0]) if texts[0] else len(texts[1]) + 1
        return 1, max(1.0, growth), added
    return 1, 3.0 if method in ("upper", "lower", "casefold", "title", "capitalize", "swapcase") else 1.0, added


class ExpressionsBuilder:
    """Collects calls and numbers their values. Equal calls have the same number."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[Call] = []
        self.results: dict[tuple[int, Any], None] = {}
        self._numbers: dict[str, int] = {}
        self._origins: dict[int, int] = {}

    def add_call(self, call: Call) -> int:
        """Return the number of the value of a call."""
        # Slices have no hash before Python 3.12.
        number = self._numbers.setdefault(repr(call), self.size + len(self.calls))
        if number == self.size + len(self.calls):
            self.calls.append(call)
        return number

    def add_origin(self, origin: Origin) -> int:
        """Return the number of the value of an expression."""
        if origin[0] == "field":
            return int(origin[1])
        if id(origin) not in self._origins:
            self._origins[id(origin)] = self.add_call(self._convert_origin(origin))
        return self._origins[id(origin)]

    def _convert_origin(self, origin: Origin) -> Call:
        if origin[0] == "call":
            _, base, method, arguments = origin
            return self.add_origin(base), method, arguments
        parts = origin[1] if origin[0] == "join" else (origin,)
        return -1, "join", tuple(part[1] if part[0] == "text" else self.add_origin(part) for part in parts)

    def include(self, expressions: Expressions) -> list[int]:
        """Add all calls and results of `expressions`. Return the new number of each of its values."""
        numbers = list(range(expressions.size))
        for base, method, arguments in expressions.calls:
            if base < 0:
                parts = tuple(numbers[part] if isinstance(part, int) else part for part in arguments)
                numbers.append(self.add_call((base, method, parts)))
            else:
                numbers.append(self.add_call((numbers[base], method, arguments)))
        self.results |= {(numbers[number], result): None for number, result in expressions.results}
        return numbers

    def finish(self) -> Expressions:
        """Return all expressions that were added."""
        return Expressions(self.size, tuple(self.calls), tuple(self.results))


Segment = tuple[str | int, tuple[Run, ...], int | None]
"""A part of a rendered text: template text with its runs, or the number of a value with the owner of its characters.

The owner is `None` if the value was empty in the recorded text.
"""


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A recorded run of a template, which gives the rendered text of other conversations of the same shape.

    Attributes:
        expressions: the expressions in the rendered text, and the operations of the template on texts.
        segments: the parts of the rendered text.
    """

    expressions: Expressions
    segments: tuple[Segment, ...]

    @classmethod
    def from_rendering(cls, rendered: TrackedString, log: OperationLog, texts: Sequence[str]) -> RecordedRun | None:
        """Create a `RecordedRun` from a rendered text. Return `None` if it cannot be replayed for other texts.

        Args:
            rendered: the rendered text, as a `WatchedString` if it contains a text of the conversation.
            log: the operations of the template.
            texts: the texts of the conversation.
        """
        text = unwatch(rendered)
        parts = _flatten(rendered.origin) if isinstance(rendered, WatchedString) else [str.__str__(text)]
        if log.opaque or parts is None:
            return None
        builder = ExpressionsBuilder(len(texts))
        numbers = [part if isinstance(part, str) else builder.add_origin(part) for part in parts]
        builder.results = {(builder.add_origin(origin), result): None for origin, result in log.operations}
        expressions = builder.finish()
        if not expressions.is_bounded or (values := expressions.evaluate(texts)) is None:
            return None
        segments, position = list[Segment](), 0
        for part in numbers:
            length = len(part if isinstance(part, str) else values[part])
            runs = TrackedString.from_str(text[position : position + length]).runs
            position += length
            if isinstance(part, int) and len(runs) > 1:
                return None
            segments.append((part, tuple(runs), runs[0][1] if runs else None))
        run = cls(expressions, tuple(segments))
        replayed = run.replay(texts)
        return run if replayed is not None and replayed.runs == text.runs and replayed == text else None

    def replay(self, texts: Sequence[str]) -> TrackedString | None:
        """Return the rendered text for other texts, or `None` if the template may take another path for them."""
        values = self.expressions.evaluate(texts)
        if values is None:
            return None
        pieces = list[TrackedString]()
        for content, runs, owner in self.segments:
            if isinstance(content, str):
                pieces.append(TrackedString(content, runs))
            elif value := values[content]:
                if owner is None:
                    return None
                pieces.append(TrackedString(value, ((len(value), owner),)))
        return TrackedString.from_str(concat_tracked(pieces))


def _flatten(origin: Origin | None) -> list[str | Origin] | None:
    """List the parts of a rendered text: constant texts and expressions. Return `None` if a part is unknown."""
    parts, pending = list[str | Origin](), [origin]
    while pending:
        part = pending.pop()
        if part is None or len(parts) + len(pending) > _MAX_PARTS:
            return None
        if part[0] == "join":
            pending += reversed(part[1])
        elif part[0] != "text":
            parts.append(part)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += part[1]
        else:
            parts.append(part[1])
    return parts
