"""Cache renderings of the first messages, to reuse them for conversations that begin with the same roles.

To locate a turn, the messages before the turn are rendered twice. Two conversations often begin with the same roles.
A recorded run is reused for messages with the same roles if all recorded operations have the same results, because
the template then takes the same path.
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

_MAX_KEYS, _MAX_RUNS = 1024, 4


@dataclass(frozen=True, slots=True)
class PrefixRun:
    """A recorded run of a template. It can be replayed for other messages without running the template.

    Attributes:
        operations: the operations on texts, with their results.
        origin: the expression that computes the rendered text.
        segments: the segments of the rendered text: template text, or (expression, owner) for text of the row.
    """

    operations: tuple[RecordedOperation, ...]
    origin: Origin
    segments: tuple[TrackedString | tuple[Origin, int], ...]

    @classmethod
    def from_text(
        cls, text: TrackedString, log: OperationLog, messages: Sequence[Mapping[str, Any]]
    ) -> PrefixRun | None:
        """Create a `PrefixRun` from a rendered text and its log. Return `None` if the log is incomplete."""
        if log.opaque or not isinstance(text, WatchedString) or text.origin is None:
            return None
        segments = list[TrackedString | tuple[Origin, int]]()
        reader = _RunReader(text.runs)
        for part in flatten_origin(text.origin):
            if part is None:
                return None
            segment: str = part if isinstance(part, str) else evaluate_origin(part, messages)
            runs = reader.read(len(segment))
            if isinstance(part, str):
                segments.append(TrackedString(segment, runs))
            elif len(runs) == 1:
                segments.append((part, runs[0][1]))
            else:
                return None
        return None if reader.remaining else cls(tuple(log.operations), text.origin, tuple(segments))

    def replay(self, messages: Sequence[Mapping[str, Any]], log: OperationLog) -> WatchedString | None:
        """Replay the recorded run for other messages without running the template. Add its operations to `log`.

        Return `None` if the template would take a different path for these messages.
        """
        texts, operations = list[TrackedString](), list[RecordedOperation]()
        try:
            for operation in self.operations:
                # The template cannot observe whether a method changed a text, so this result may differ.
                if operation.expression[0] == "unchanged":
                    operations.append(
                        RecordedOperation(operation.expression, evaluate_origin(operation.expression, messages))
                    )
                elif operation.has_same_result(messages):
                    operations.append(operation)
                else:
                    return None
            for segment in self.segments:
                if isinstance(segment, TrackedString):
                    texts.append(segment)
                    continue
                origin, owner = segment
                text = evaluate_origin(origin, messages)
                if not text:
                    return None
                texts.append(TrackedString(text, ((len(text), owner),)))
        except (ValueError, LookupError, RecursionError):
            return None
        log.operations += operations
        return WatchedString.from_origin(concat_tracked(texts), self.origin)


class _RunReader:
    """A reader for the `runs` of a `TrackedString`. It reads a given number of characters at a time."""

    def __init__(self, runs: Sequence[tuple[int, int]]) -> None:
        self.remaining = list(reversed(runs))

    def read(self, count: int) -> list[tuple[int, int]]:
        """Return the part of the `runs` that describes the next `count` characters."""
        runs = list[tuple[int, int]]()
        while count and self.remaining:
            length, owner = self.remaining.pop()
            if length > count:
                self.remaining.append((length - count, owner))
                length = count
            runs.append((length, owner))
            count -= length
        return runs


@dataclass
class PrefixCache:
    """A cache of recorded template runs. The key contains the roles, and whether the generation prompt is added."""

    runs_by_key: dict[tuple[Any, ...], list[PrefixRun]] = field(default_factory=dict)

    def get_or_render(
        self,
        key: tuple[Any, ...],
        messages: Sequence[Mapping[str, Any]],
        log: OperationLog,
        render: Callable[[], TrackedString],
    ) -> TrackedString:
        """Render messages by replaying a cached run. If no cached run applies, call `render` and cache the new run."""
        for run in self.runs_by_key.get(key, ()):
            if (cached := run.replay(messages, log)) is not None:
                return cached
        with record_operations() as run_log:
            try:
                text = render()
            finally:
                log.operations += run_log.operations
                log.opaque |= run_log.opaque
        if len(self.runs_by_key) < _MAX_KEYS or key in self.runs_by_key:
            runs, new_run = self.runs_by_key.setdefault(key, []), None
            with suppress(RecursionError):
                new_run = PrefixRun.from_text(text, run_log, messages)
            if new_run is not None and len(runs) < _MAX_RUNS:
                runs.append(new_run)
        return text


def flatten_origin(origin: Origin | None) -> list[str | Origin | None]:
    """List the parts of a concatenation: a `str` for constant text, an expression for other text, `None` if unknown."""
    parts, pending = list[str | Origin | None](), [origin]
    while pending:
        part = pending.pop()
        if part is not None and part[0] == "join":
            pending += reversed(part[1])
        else:
            parts.append(part[1] if part is not None and part[0] == "text" else part)
    return parts
