"""Convert the contexts of a session to rows, and count each record of the session by category."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftdata.traces.steps import (
    BadRecord,
    Context,
    Step,
    assemble_messages,
    count_split_responses,
    count_unpaired,
)

CATEGORIES = {
    "messages": "records with messages of the row",
    "repeated": "records with messages of an earlier row, which are context in this row and are not trained again",
    "metadata": "records without content of the conversation",
    "duplicates": "copies of other records of the session",
    "errors": "failed requests, and messages about them that the model did not write",
    "retracted": "messages that were removed from the conversation before the model answered again",
    "missing_content": "records of content that the model saw or wrote, but whose text the log does not contain",
    "unanswered": "messages of contexts in which the model wrote no answer",
    "ignored": "records of unknown types that the user chose to ignore",
}
"""Category of a record -> description. Except `repeated`, each record belongs to one category of one row."""


@dataclass(frozen=True, slots=True)
class Session:
    """The contexts of a session, and the categories of the records that are in no context.

    Attributes:
        format: name of the log format.
        size: number of records.
        contexts: the contexts, in the order of their last records.
        categories: category of each record that is in no context, by index.
        metadata: values of the session that users can filter by, such as its id and version.
        anomalies: counts of other irregularities.
    """

    format: str
    size: int
    contexts: Sequence[Context]
    categories: Mapping[int, str]
    metadata: Mapping[str, Any]
    anomalies: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TraceRow:
    """A row of a session.

    Attributes:
        data: the columns of the row: `messages`, `tools` if the log contains tool definitions, and `trace`.
        record: index of the first record that belongs to no earlier row.
    """

    data: dict[str, Any]
    record: int


def make_rows(session: Session) -> list[TraceRow]:
    """Convert the contexts of a session to rows. Each response of the model is trained in exactly one row.

    A context without a new response of the model does not become a row, and its records are counted as `unanswered`.
    Abandoned contexts come last, so that users can filter them out without losing the responses that they share.

    Raises:
        BadRecord: `no_answer`, if no context has a complete response of the model.
    """
    covered, skipped, rows = set[int](), set[int](), list[TraceRow]()
    for context in sorted(session.contexts, key=lambda context: context.abandoned):
        steps = [step._replace(trained=step.trained and step.record not in covered) for step in context.steps]
        if not any(step.trained and step.kind in ("text", "call") for step in steps):
            skipped.update(step.record for step in steps)
            continue
        records = dict.fromkeys(step.record for step in steps)
        new = [record for record in records if record not in covered]
        counts = {"messages": len(new), "repeated": len(records) - len(new)}
        rows.append(_make_row(session, context, steps, counts, min(new)))
        covered.update(new)
    if not rows:
        raise BadRecord(0, "no_answer", "the session contains no complete answer of the model")
    remaining = Counter[str]()
    for record in range(session.size):
        if record not in covered:
            category = session.categories.get(record, "unanswered" if record in skipped else "")
            if not category:
                raise BadRecord(record, "trace_structure", "the record belongs to no conversation")
            remaining[category] += 1
    trace = rows[0].data["trace"]
    trace["records"] = {name: count for name in CATEGORIES if (count := trace["records"].get(name, remaining[name]))}
    return rows


def _make_row(
    session: Session, context: Context, steps: Sequence[Step], counts: Mapping[str, int], first: int
) -> TraceRow:
    anomalies = Counter(session.anomalies) + count_unpaired(steps)
    anomalies += Counter(split_responses=count_split_responses(steps))
    trace = {
        "format": session.format,
        **session.metadata,
        **context.metadata,
        "context": context.name,
        "abandoned": context.abandoned,
        "records": {name: count for name, count in counts.items() if count},
        **({"anomalies": dict(anomalies)} if anomalies else {}),
    }
    tools = {"tools": list(context.tools)} if context.tools else {}
    return TraceRow({"messages": assemble_messages(steps), **tools, "trace": trace}, first)


def trace_notes(data: Mapping[str, Any]) -> frozenset[str]:
    """Return notes for the report: the categories and anomalies of a row that a user should know about."""
    trace = data["trace"]
    hidden = ("messages", "metadata")
    names = (*(name for name in trace["records"] if name not in hidden), *trace.get("anomalies", ()))
    return frozenset({"trace", *(f"trace {name}" for name in names)})
