"""Runs: what one run of a template on the first messages of a conversation came to, for others that begin alike.

Every turn is looked for in two runs on what comes before it, and a longer conversation begins with all of those of a
shorter one. A run on watched strings that has the same roles, and the same answers to all that it asks of the texts,
makes the same of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ftdata.templates.attribution.tracked_strings import TrackedString, concat_tracked
from ftdata.templates.attribution.watched_strings import (
    OperationLog,
    Origin,
    RecordedOperation,
    WatchedString,
    evaluate_origin,
    record_operations,
)

_MOST_KEYS, _MOST_RUNS = 1024, 4


@dataclass(frozen=True, slots=True)
class PrefixRun:
    """The stretches of what a template made: its own text, or how one of the row came about, and its owner."""

    questions: tuple[RecordedOperation, ...]
    origin: Origin
    stretches: tuple[TrackedString | tuple[Origin, int], ...]

    @classmethod
    def of(cls, text: TrackedString, log: OperationLog, messages: Sequence[Mapping[str, Any]]) -> PrefixRun | None:
        """Return what a run on these messages can tell of others; `None` where not all of it is known."""
        if log.opaque or not isinstance(text, WatchedString) or text.origin is None:
            return None
        stretches = list[TrackedString | tuple[Origin, int]]()
        owners = _Owners(text.runs)
        for part in flatten_origin(text.origin):
            if part is None:
                return None
            own: str = part if isinstance(part, str) else evaluate_origin(part, messages)
            runs = owners.next(len(own))
            if isinstance(part, str):
                stretches.append(TrackedString(own, runs))
            elif len(runs) == 1:
                stretches.append((part, runs[0][1]))
            else:
                return None
        return None if owners.left else cls(tuple(log.questions), text.origin, tuple(stretches))

    def again(self, messages: Sequence[Mapping[str, Any]], log: OperationLog) -> WatchedString | None:
        """Return what the template makes of other messages, if it takes the same way, and note what it asks."""
        made, asked = list[TrackedString](), list[RecordedOperation]()
        try:
            for question in self.questions:
                # What a method changes is no answer that the template gets.
                if question.asked[0] == "same":
                    asked.append(RecordedOperation(question.asked, evaluate_origin(question.asked, messages)))
                elif question.same(messages):
                    asked.append(question)
                else:
                    return None
            for stretch in self.stretches:
                if isinstance(stretch, TrackedString):
                    made.append(stretch)
                    continue
                origin, owner = stretch
                own = evaluate_origin(origin, messages)
                if not own:
                    return None
                made.append(TrackedString(own, ((len(own), owner),)))
        except (ValueError, LookupError, RecursionError):
            return None
        log.questions += asked
        return WatchedString.at(concat_tracked(made), self.origin)


class _Owners:
    """The owners of a text's characters, taken from its beginning."""

    def __init__(self, runs: Sequence[tuple[int, int]]) -> None:
        self.left = list(reversed(runs))

    def next(self, count: int) -> list[tuple[int, int]]:
        """Return those of the next characters, as runs."""
        taken = list[tuple[int, int]]()
        while count and self.left:
            length, owner = self.left.pop()
            if length > count:
                self.left.append((length - count, owner))
                length = count
            taken.append((length, owner))
            count -= length
        return taken


@dataclass
class PrefixCache:
    """The runs of one template that are known."""

    by_key: dict[tuple[Any, ...], list[PrefixRun]] = field(default_factory=dict)

    def text(
        self,
        key: tuple[Any, ...],
        messages: Sequence[Mapping[str, Any]],
        log: OperationLog,
        render: Callable[[], TrackedString],
    ) -> TrackedString:
        """Return what `render` gives, which is not called where a run of the same key tells."""
        for run in self.by_key.get(key, ()):
            if (known := run.again(messages, log)) is not None:
                return known
        with record_operations() as own:
            try:
                text = render()
            finally:
                log.questions += own.questions
                log.opaque |= own.opaque
        if len(self.by_key) < _MOST_KEYS or key in self.by_key:
            runs, made = self.by_key.setdefault(key, []), None
            with suppress(RecursionError):
                made = PrefixRun.of(text, own, messages)
            if made is not None and len(runs) < _MOST_RUNS:
                runs.append(made)
        return text


def flatten_origin(origin: Origin | None) -> list[str | Origin | None]:
    """Return what a text was joined of: texts of the template's own, origins of others, `None` for what is unknown."""
    found, left = list[str | Origin | None](), [origin]
    while left:
        part = left.pop()
        if part is not None and part[0] == "join":
            left += reversed(part[1])
        else:
            found.append(part[1] if part is not None and part[0] == "is" else part)
    return found
