"""Replace the records of agent sessions by one row per context that the model saw."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from ftdata.errors import BadRow, InputRefused
from ftdata.traces.formats import (
    DocumentFormat,
    SessionFormat,
    convert_document,
    convert_session,
    find_document_format,
    find_session_format,
    is_row,
)
from ftdata.traces.rows import TraceRow, trace_notes
from ftdata.traces.steps import BadRecord
from ftdata.types import Reject, Row, Source

MAX_SESSION_BYTES = 512 << 20
"""Maximum size in bytes of a session file, whose records are in memory together."""

MAX_DETECTION_RECORDS = 50
"""Maximum number of records that are examined to recognize a session, which can begin with unknown records."""

_RAW_CHARACTERS = 4096
"""Number of characters of a rejected row that are stored."""

Rows = Generator[Row | Reject, None, int | None]


def read_traces(
    rows: Iterable[Row | Reject], ignored: frozenset[str] = frozenset(), *, may_be_session: bool = True
) -> Rows:
    """Yield the rows of a source. If the source is a session, or a row contains one, yield the rows of the session.

    The generator returns the value that `rows` returns.

    Args:
        rows: the rows that a reader yields.
        ignored: names of unknown types of records to ignore.
        may_be_session: whether the rows can be the records of a session: false for a part of a file.

    Raises:
        InputRefused: `session_too_large`.
    """
    iterator, first_rows = iter(rows), list[Row | Reject]()
    lines: int | None = None
    while len(first_rows) < MAX_DETECTION_RECORDS:
        try:
            row = next(iterator)
        except StopIteration as end:
            lines = end.value
            break
        first_rows.append(row)
        if not may_be_session or not isinstance(row, Row) or row.flat or is_row(row.data):
            break
        if (session_format := find_session_format(row.data)) is not None:
            yield from _read_session(session_format, chain(first_rows, iterator), ignored)
            return None
    lines_read = yield from _expand_documents(first_rows, iterator, ignored)
    return lines_read if lines is None else lines


def _expand_documents(first_rows: list[Row | Reject], rows: Iterator[Row | Reject], ignored: frozenset[str]) -> Rows:
    lines: int | None = None
    added = 0

    def all_rows() -> Iterator[Row | Reject]:
        nonlocal lines
        yield from first_rows
        if isinstance(rows, Generator):
            lines = yield from rows
        else:
            yield from rows

    for row in all_rows():
        if isinstance(row, Row) and type(row.data) is dict and (document_format := find_document_format(row.data)):
            items = _convert_document(document_format, row, ignored)
            # Row numbers are unique, so the rows after a document are counted from its last row.
            yield from (_shift_row_number(item, added + number) for number, item in enumerate(items))
            added += len(items) - 1
        else:
            yield _shift_row_number(row, added) if added else row
    return lines


def _shift_row_number(row: Row | Reject, added: int) -> Row | Reject:
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
    for number, row in enumerate(rows):
        if number == 0:
            first = row.source
        if isinstance(row, Reject):
            rejects.append(row)
        elif not isinstance(row.data, Mapping):
            reason = "is not an object, expected a record of the session"
            rejects.append(Reject(row.source, "record_type", "", reason, "remove the line"))
        else:
            items = session_format.flatten(row.data) if session_format.flatten else [row.data]
            records += items
            sources += [row.source] * len(items)
            _check_size(first, row.source)
    if rejects:
        yield from rejects
        return
    try:
        converted = convert_session(session_format, records, ignored)
    except BadRow as error:
        number = error.record if isinstance(error, BadRecord) else 0
        is_known = number < len(records)
        source = sources[number] if is_known else first
        yield _make_reject(error, source._replace(row=0), records[number] if is_known else {})
        return
    for index, item in enumerate(converted):
        yield _make_row(item, sources[item.record]._replace(row=index))


def _check_size(first: Source, last: Source) -> None:
    if first.offset is not None and last.offset is not None and last.offset - first.offset > MAX_SESSION_BYTES:
        problem = f"the session has more than {MAX_SESSION_BYTES >> 20:,} MiB, and all its records must be in memory"
        hint = "split the file into one file for each session"
        raise InputRefused("session_too_large", problem, where=first.path, hint=hint)


def is_session_head(head: bytes) -> bool:
    """Return whether the beginning of a file can belong to a session, which cannot be divided into parts.

    Args:
        head: the first lines of the file; the last line can be incomplete.
    """
    lines = head.split(b"\n")
    if len(lines) == 1:
        return True
    for line in lines[:-1][:MAX_DETECTION_RECORDS]:
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            return False
        if record is not None and is_row(record):
            return False
        if find_session_format(record) is not None:
            return True
    return False
