"""The supported trace formats, and their detection.

| format        | traces                                                             | is                          |
|---------------|--------------------------------------------------------------------|-----------------------------|
| `claude_code` | Claude Code: session files, and the output in the format stream-json | a file of records         |
| `codex`       | Codex: rollout files                                               | a file of records           |
| `pi`          | pi and OpenClaw: session files, and the output of `--mode json`    | a file of records           |
| `droid`       | Factory droid: session files                                       | a file of records           |
| `hermes`      | Hermes Agent: gateway logs                                         | a file of records           |
|               | Hermes Agent: exports, session files and trajectories              | a row                       |
| `otel`        | OpenTelemetry: spans and logs of generative AI                     | a file of records           |
| `atif`        | Harbor: trajectories (ATIF)                                        | a row                       |
| `responses`   | OpenAI Responses API: requests with responses                      | a row                       |
| `verifiers`   | verifiers: rollouts, traces and episodes                           | a row                       |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ftdata.errors import BadRow
from ftdata.traces import atif, claude_code, codex, droid, hermes, otel, pi, responses, verifiers
from ftdata.traces.rows import Session, TraceRow, make_rows
from ftdata.traces.steps import BadRecord, convert_structure_errors


class SessionFormat(NamedTuple):
    """A format of files of records.

    Attributes:
        is_record: whether an object is the first record of a session.
        read: converts the records of a session.
        flatten: divides an object into records.
    """

    is_record: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Sequence[Mapping[str, Any]], frozenset[str]], Session]
    flatten: Callable[[Mapping[str, Any]], list[Mapping[str, Any]]] | None = None


class DocumentFormat(NamedTuple):
    """A format of rows that contain a whole session.

    Attributes:
        keys: columns; each document has at least one of them.
        is_document: whether a row is a document.
        read: yields the sessions of a document.
    """

    keys: frozenset[str]
    is_document: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], frozenset[str]], Iterator[Session]]


_SESSIONS = {
    "pi": SessionFormat(pi.is_pi_record, pi.read_pi_session),
    "droid": SessionFormat(droid.is_droid_record, droid.read_droid_session),
    "hermes": SessionFormat(hermes.is_hermes_record, hermes.read_hermes_session),
    "claude_code": SessionFormat(claude_code.is_claude_code_record, claude_code.read_claude_code_session),
    "codex": SessionFormat(codex.is_codex_record, codex.read_codex_session),
    "otel": SessionFormat(otel.is_otel_record, otel.read_otel_session, otel.flatten_otel),
}

_DOCUMENTS = {
    "atif": DocumentFormat(frozenset({"schema_version"}), atif.is_atif_document, atif.read_atif_document),
    "responses": DocumentFormat(
        frozenset({"output", "response"}), responses.is_responses_document, responses.read_responses_document
    ),
    "verifiers": DocumentFormat(
        frozenset({"reward", "nodes", "traces", "trajectory"}),
        verifiers.is_verifiers_document,
        verifiers.read_verifiers_document,
    ),
    "hermes": DocumentFormat(
        frozenset({"session_start", "started_at", "completed"}), hermes.is_hermes_document, hermes.read_hermes_document
    ),
}


_ROW_COLUMNS = {
    "messages", "conversations", "conversation", "prompt", "completion", "text", "question", "instruction", "chosen",
    "input_ids", "prompt_token_ids",
}  # fmt: skip
"""Columns of data sets, which no record of a session has."""


_RECORD_KEYS = {"attributes", "eventName", "event_name", "role", "timestamp"}
"""Keys of records without a type."""


def is_row(data: Any) -> bool:
    """Return whether an object is certainly a row of a data set, and not a record of a session."""
    if not isinstance(data, Mapping) or not _ROW_COLUMNS.isdisjoint(data):
        return True
    if isinstance(data.get("type"), str) or not _RECORD_KEYS.isdisjoint(data):
        return False
    return not any(isinstance(data.get(key), list) for key in otel.CONTAINERS)


def find_session_format(record: Any) -> SessionFormat | None:
    """Return the format of a session file that contains a record. Return `None` for any other object."""
    if is_row(record):
        return None
    return next((item for item in _SESSIONS.values() if item.is_record(record)), None)


def convert_session(
    session_format: SessionFormat, records: Sequence[Mapping[str, Any]], ignored: frozenset[str] = frozenset()
) -> list[TraceRow]:
    """Convert the records of a session file to rows.

    Args:
        session_format: the format.
        records: the records; if the format can divide objects into records, after `flatten`.
        ignored: names of unknown types of records to ignore.

    Raises:
        BadRecord: a record is invalid or unknown, or the session contains no answer.
    """
    with convert_structure_errors(0):
        return make_rows(session_format.read(records, ignored))


_DOCUMENT_KEYS = frozenset[str]().union(*(item.keys for item in _DOCUMENTS.values()))


def find_document_format(data: Mapping[str, Any]) -> DocumentFormat | None:
    """Return the format of a row that contains a whole session. Return `None` for any other row.

    >>> find_document_format({"messages": []}) is None
    True
    """
    # Most rows have none of these columns, and this function is called for every row.
    if _DOCUMENT_KEYS.isdisjoint(data):
        return None
    formats = (item for item in _DOCUMENTS.values() if not item.keys.isdisjoint(data))
    return next((item for item in formats if item.is_document(data)), None)


def convert_document(
    document_format: DocumentFormat, data: Mapping[str, Any], ignored: frozenset[str] = frozenset()
) -> list[TraceRow]:
    """Convert a row that contains a whole session to rows with messages.

    Raises:
        BadRow: a part of the session is invalid or unknown, or the session contains no answer.
    """
    rows, unanswered, error = list[TraceRow](), 0, None
    with convert_structure_errors(0):
        for session in document_format.read(data, ignored):
            try:
                rows += make_rows(session)
            except BadRecord as failure:
                if failure.code != "no_answer":
                    raise
                unanswered, error = unanswered + session.size, failure
    if not rows:
        raise error or BadRow("no_answer", "the row contains no conversation")
    if unanswered:
        records = rows[0].data["trace"]["records"]
        records["unanswered"] = records.get("unanswered", 0) + unanswered
    return rows


def has_trace_columns(keys: Iterable[str]) -> bool:
    """Return whether an object with these keys may be a document, so its lists are not lists of rows."""
    names = set(keys)
    required = ({"schema_version", "steps"}, {"session_id", "session_start"}, {"nodes", "task"}, {"traces", "env"})
    return any(columns <= names for columns in required)
