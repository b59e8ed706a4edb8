"""Replace the records of agent sessions by one row per context that the model saw."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, cast

from ftdata.errors import BadRow, InputRefused
from ftdata.traces.formats import (
    DocumentFormat,
    SessionFormat,
    convert_document,
    convert_session,
    find_document_format,
    find_session_format,
)
from ftdata.traces.rows import TraceRow, trace_notes
from ftdata.traces.steps import BadRecord
from ftdata.types import Reject, Row, Source

MAX_SESSION = 512 << 20
"""Maximum size in bytes of a session file, whose records are in memory together."""

_RAW_CHARACTERS = 4096
"""Number of characters of a rejected row that are stored."""

Rows = Generator[Row | Reject, None, int | None]


def read_traces(rows: Iterable[Row | Reject], ignored: frozenset[str] = frozenset()) -> Rows:
    """Yield the rows of a source. If the source is a session, or a row contains one, yield the rows of the session.

    The generator returns the value that `rows` returns.

    Args:
        rows: the rows that a reader yields.
        ignored: names of unknown types of records to ignore.

    Raises:
        InputRefused: `session_too_large`.
    """
    rows = iter(rows)
    try:
        first = next(rows)
    except StopIteration as end:
        return cast("int | None", end.value)
    is_row = isinstance(first, Row) and not first.flat
    session_format = find_session_format(first.data) if is_row and isinstance(first, Row) else None
    if session_format is not None:
        yield from _read_session(session_format, chain([first], rows), ignored)
        return None
    return (yield from _expand_documents(first, rows, ignored))


def _expand_documents(first: Row | Reject, rows: Iterator[Row | Reject], ignored: frozenset[str]) -> Rows:
    lines: int | None = None
    added = 0

    def all_rows() -> Iterator[Row | Reject]:
        nonlocal lines
        yield first
        if isinstance(rows, Generator):
            lines = yield from rows
        else:
            yield from rows

    for row in all_rows():
        data = row.data if isinstance(row, Row) else None
        document_format = find_document_format(data) if type(data) is dict else None
        if document_format is not None and isinstance(row, Row):
            items = _convert_document(document_format, row, ignored)
            # Row numbers are unique, so the rows after a document are counted from its last row.
            yield from (_move(item, added + number) for number, item in enumerate(items))
            added += len(items) - 1
        else:
            yield _move(row, added) if added else row
    return lines


def _move(row: Row | Reject, added: int) -> Row | Reject:
    source = row.source._replace(row=row.source.row + added)
    if isinstance(row, Row):
        return row._replace(source=source)
    return Reject(source, row.code, row.field, row.reason, row.fix, row.raw, row.lengths)


def _convert_document(document_format: DocumentFormat, row: Row, ignored: frozenset[str]) -> list[Row | Reject]:
    try:
        return [_make_row(item, row.source) for item in convert_document(document_format, row.data, ignored)]
    except BadRow as error:
        return [_make_reject(error, row.source, row.data)]


def _make_row(row: TraceRow, source: Source) -> Row:
    return Row(row.data, source, notes=trace_notes(row.data))


def _make_reject(error: BadRow, source: Source, data: Any) -> Reject:
    raw = json.dumps(data, ensure_ascii=False, default=str)[:_RAW_CHARACTERS]
    return Reject(source, error.code, error.field, error.message, error.hint, raw)


def _read_session(
    session_format: SessionFormat, rows: Iterator[Row | Reject], ignored: frozenset[str]
) -> Iterator[Row | Reject]:
    """Yield the rows of a session. If a record is invalid, reject the whole session, because its order is lost."""
    records, sources, rejects = list[Mapping[str, Any]](), list[Source](), list[Reject]()
    for row in rows:
        if isinstance(row, Reject):
            rejects.append(row)
        elif not isinstance(row.data, Mapping):
            reason = "is not an object, but the file is a session of records"
            rejects.append(Reject(row.source, "record_type", "", reason, "remove the line"))
        else:
            items = session_format.flatten(row.data) if session_format.flatten else [row.data]
            records += items
            sources += [row.source] * len(items)
            _check_size(sources)
    if rejects:
        yield from rejects
        return
    try:
        converted = convert_session(session_format, records, ignored)
    except BadRow as error:
        number = min(error.record if isinstance(error, BadRecord) else 0, len(records) - 1)
        yield _make_reject(error, sources[number]._replace(row=0), records[number])
        return
    for index, item in enumerate(converted):
        yield _make_row(item, sources[item.record]._replace(row=index))


def _check_size(sources: list[Source]) -> None:
    first, last = sources[0], sources[-1]
    if first.offset is not None and last.offset is not None and last.offset - first.offset > MAX_SESSION:
        problem = f"the session has more than {MAX_SESSION >> 20:,} MB, and all its records must be in memory"
        hint = "divide the file by sessions or traces"
        raise InputRefused("session_too_large", problem, where=first.path, hint=hint)


def is_session_line(line: bytes) -> bool:
    """Return whether a line is the first record of a session file, which cannot be divided into parts."""
    try:
        return find_session_format(json.loads(line)) is not None
    except ValueError:
        return False
