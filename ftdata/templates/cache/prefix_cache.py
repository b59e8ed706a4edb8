"""Cache renderings of the first messages of a conversation for other conversations that begin alike.

Every turn is located with two renderings of the messages before it, and a longer conversation starts with the messages
of shorter ones. A run on watched strings is reused for messages with the same roles for which all recorded operations
have the same results: the template then takes the same path.
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
    """A recorded run of a template.

    Attributes:
        operations: the operations on texts, with their results.
        origin: the origin of the rendered text.
        segments: the segments of the rendered text: template text, or the origin and the owner of text of the row.
    """

    operations: tuple[RecordedOperation, ...]
    origin: Origin
    segments: tuple[TrackedString | tuple[Origin, int], ...]

    @classmethod
    def from_text(
        cls, text: TrackedString, log: OperationLog, messages: Sequence[Mapping[str, Any]]
    ) -> PrefixRun | None:
        """Return the run that rendered `text`, or `None` if its record is incomplete."""
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
        """Return the rendering of other messages and record its operations, or `None` if the run does not apply."""
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
    """Reads the owners of a text's characters from the beginning."""

    def __init__(self, runs: Sequence[tuple[int, int]]) -> None:
        self.remaining = list(reversed(runs))

    def read(self, count: int) -> list[tuple[int, int]]:
        """Return the owners of the next `count` characters, as runs."""
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
    """The recorded runs of a template, by key."""

    runs_by_key: dict[tuple[Any, ...], list[PrefixRun]] = field(default_factory=dict)

    def get_or_render(
        self,
        key: tuple[Any, ...],
        messages: Sequence[Mapping[str, Any]],
        log: OperationLog,
        render: Callable[[], TrackedString],
    ) -> TrackedString:
        """Return the rendering of the messages from a recorded run of the same key, or otherwise from `render`."""
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
    """Return the parts of a joined text: template text, the origins of other text, and `None` for unknown origins."""
    parts, pending = list[str | Origin | None](), [origin]
    while pending:
        part = pending.pop()
        if part is not None and part[0] == "join":
            pending += reversed(part[1])
        else:
            parts.append(part[1] if part is not None and part[0] == "text" else part)
    return parts
