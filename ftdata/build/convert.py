"""Convert rows of any known schema to messages, prompt/completion pairs, or rendered text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jsonlines
import pyarrow as pa
import pyarrow.parquet as pq

from ftdata.build import store
from ftdata.build.ledger import Ledger, reading_notes
from ftdata.build.reject_limit import RejectLimit
from ftdata.errors import BadRow, UsageError, check_choice
from ftdata.pipeline.recipe import Options, Recipe, make_recipe
from ftdata.pipeline.render_rows import RejectedRows, check_answers, has_rejected_side, make_reject
from ftdata.readers import FileSource, MemorySource, resolve_sources
from ftdata.readers.row_filter import RowFilter
from ftdata.schemas import last_answer_index, normalize
from ftdata.storage import atomic, disk
from ftdata.templates import render_in_worker
from ftdata.types import WHOLE, Conversation, Reject, Rendered, Row

FORMS = ("messages", "prompt_completion", "text")
_MAX_ROWS, _MAX_CHARACTERS = 1024, 1 << 20
"""Limits of a batch that is written together: rows, and characters."""

_CALL = pa.struct(
    [
        ("id", pa.string()),
        ("type", pa.string()),
        ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
    ]
)
_MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("reasoning_content", pa.string()),
        ("name", pa.string()),
        ("tool_call_id", pa.string()),
        ("tool_calls", pa.list_(_CALL)),
        ("train", pa.bool_()),
        ("is_error", pa.bool_()),
    ]
)
_EXTRA_COLUMNS = [("tools", pa.string()), ("chat_template_kwargs", pa.string())]
_ARROW_SCHEMAS = {
    "messages": pa.schema([("messages", pa.list_(_MESSAGE)), *_EXTRA_COLUMNS]),
    "prompt_completion": pa.schema(
        [("prompt", pa.list_(_MESSAGE)), ("completion", pa.list_(_MESSAGE)), *_EXTRA_COLUMNS]
    ),
    "text": pa.schema([("text", pa.string())]),
}


Outcome = tuple[Conversation, list[dict[str, Any]]] | Reject


@dataclass(frozen=True)
class ConvertReport:
    """The result of `convert`: the output file, the counts of each source, and the rejected rows.

    Attributes:
        output: the output file.
        sources: one ledger per source with the numbers of read, built (written), filtered and rejected rows.
        rejects: the rejected rows.
    """

    output: Path
    sources: tuple[Ledger, ...]
    rejects: tuple[Reject, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user about how the rows were read, such as a list of ignored columns."""
        return tuple(reading_notes(self.sources))

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, the notes and the first 20 rejected rows as a JSON object."""
        sources = [
            {
                "source": ledger.source,
                "read": ledger.read,
                "written": ledger.built,
                "filtered": ledger.filtered,
                "rejected": dict(ledger.rejected),
            }
            for ledger in self.sources
        ]
        rejects = [str(reject) for reject in self.rejects[:20]]
        return {"output": str(self.output), "sources": sources, "notes": list(self.notes), "rejects": rejects}

    def __str__(self) -> str:
        read, written, filtered = (
            sum(getattr(ledger, name) for ledger in self.sources) for name in ("read", "built", "filtered")
        )
        lines = [
            f"rows     {read:,} read = {written:,} written to {self.output} + {len(self.rejects):,} rejected"
            + (f" + {filtered:,} filtered out (where)" if filtered else "")
        ]
        lines += [f"note     {note}" for note in self.notes]
        return "\n".join([*lines, *(f"reject   {reject}" for reject in self.rejects[:20])])


def convert(
    data: Any,
    output: str | Path,
    to: str = "messages",
    *,
    tokenizer: Any = None,
    template: str | Path | None = None,
    schema: str = "auto",
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    limit: int | None = None,
    on_bad_rows: str = "error",
    max_rejects: float | str | None = None,
) -> ConvertReport:
    """Convert rows of any known schema to a single schema.

    The conversation of each row stays the same. The report lists what the output does not contain: unread columns and
    the rejected answers of preference pairs.

    Args:
        data: the data, as in `build_sft_dataset`.
        output: a `.jsonl` or `.parquet` file, written atomically. In Parquet, tools and the arguments of tool calls
            are JSON text.
        to: `"messages"`, `"prompt_completion"` (two lists of messages), or `"text"` (the rendered text).
        tokenizer: the tokenizer that defines the special tokens; required for `"text"`.
        template: the template for `"text"`; `None` for the tokenizer's chat template.
        schema: the name of a schema, or `"auto"`.
        columns: map of canonical columns to columns of the data.
        where: a Jinja expression over the columns of a row; rows that do not match are filtered out.
        limit: the maximum number of rows to read from each item of `data`.
        on_bad_rows: `"error"`, or `"quarantine"` to write rejected rows to `NAME.rejects.jsonl` in the same folder.
        max_rejects: the maximum number of rejected rows, or a share such as `"1%"`; needs `"quarantine"`.

    Returns:
        The counts and the rejected rows.

    Raises:
        UsageError: an option is invalid, or `NAME.rejects.jsonl` exists and does not contain rejected rows.
        BadRows: rows are rejected (`on_bad_rows="error"`).
        TooManyRejects: more than `max_rejects` rows are rejected.
        InputRefused: a source cannot be read, or no row is left to write.
        TemplateRefused: the template cannot be used for any row, with `to="text"`.
        StorageError: writing failed.
        HubError: the Hub or another server fails repeatedly.

    >>> import tempfile
    >>> target = f"{tempfile.mkdtemp()}/chats.jsonl"
    >>> report = convert([{"question": "Add 1. 2", "answer": "3"}], target)
    >>> report.sources[0].built
    1
    >>> print(Path(target).read_text(encoding="utf-8"), end="")
    {"messages":[{"role":"user","content":"Add 1. 2"},{"role":"assistant","content":"3"}]}
    """
    check_choice("to", to, FORMS)
    if (to == "text") != (tokenizer is not None):
        raise UsageError("to", "to='text' requires a tokenizer; the other output formats do not accept a tokenizer")
    reject_limit = RejectLimit(on_bad_rows, max_rejects)
    options = Options(schema=schema, columns=columns)
    recipe = make_recipe(tokenizer, template, schema=schema, columns=columns) if tokenizer is not None else None
    ledgers: list[Ledger] = []
    rejects: list[Reject] = []
    sources = _check_sources(resolve_sources(data), output)
    store.check_rejects_file(_rejects_path(output))
    with _open_writer(Path(output), to) as writer:
        for place in sorted({source.item_index for source in sources}):
            row_filter = RowFilter(where, limit)
            for source in (source for source in sources if source.item_index == place):
                ledgers.append(ledger := Ledger(source.path))
                filtered_before, rejected_rows = row_filter.filtered, RejectedRows()
                outcomes = (
                    _convert_row(row, to, options, recipe, writer.check)
                    for row in row_filter.filter_rows(source.rows())
                )
                while batch := _take_batch(outcomes):
                    for outcome in batch:
                        rejected_rows.check(outcome)
                        _count(outcome, ledger, rejects)
                    writer.batch([record for item in batch if not isinstance(item, Reject) for record in item[1]])
                ledger.add_filtered(row_filter.filtered - filtered_before)
        reject_limit.check(ledgers, lambda: rejects)
    rejects_path = _rejects_path(output)
    if rejects:
        store.write_rejects(rejects_path, rejects)
    else:
        rejects_path.unlink(missing_ok=True)
    return ConvertReport(Path(output), tuple(ledgers), tuple(rejects))


def _take_batch(outcomes: Iterator[Outcome]) -> list[Outcome]:
    """Return the next batch of results. It has at most `_MAX_ROWS` rows, and fewer rows if their messages are long."""
    batch, characters = list[Outcome](), 0
    for outcome in outcomes:
        batch.append(outcome)
        if not isinstance(outcome, Reject):
            characters += sum(len(message.get("content") or "") for message in outcome[0].messages)
        if len(batch) == _MAX_ROWS or characters > _MAX_CHARACTERS:
            break
    return batch


def _check_sources(
    sources: Sequence[FileSource | MemorySource], output: str | Path
) -> Sequence[FileSource | MemorySource]:
    """Check that the data fits in one output file, and that the output does not overwrite a source."""
    splits = list(dict.fromkeys(source.split or "train" for source in sources))
    if len(splits) > 1:
        hint = "convert each split separately with split"
        message = f"convert writes one file, but the data has several splits: {', '.join(splits)}"
        raise UsageError("several_splits", message, hint=hint)
    if any(source.share != WHOLE for source in sources):
        raise UsageError(
            "share", "convert does not support the options weight, rows and tokens, because it writes each row once"
        )
    for written in (Path(output), _rejects_path(output)):
        for source in sources:
            if Path(source.path).exists() and written.exists() and Path(source.path).samefile(written):
                raise UsageError(
                    "output", f"convert would overwrite {written}, which is one of the sources", hint="use another file"
                )
    return sources


def _rejects_path(output: str | Path) -> Path:
    return Path(output).with_suffix(".rejects.jsonl")


class _Writer(Protocol):
    def check(self, record: Mapping[str, Any]) -> None:
        """Raise `BadRow` if the output format cannot represent a record."""

    def batch(self, records: list[dict[str, Any]]) -> None:
        """Write a batch of records."""


def _convert_row(
    row: Row | Reject, to: str, options: Options, recipe: Recipe | None, check: Callable[[Mapping[str, Any]], None]
) -> Outcome:
    if isinstance(row, Reject):
        return row
    try:
        conversation = normalize(row, options.schema, options.columns)
        check_answers(conversation)
        records = _make_records(conversation, to, recipe)
        for record in records:
            check(record)
    except BadRow as error:
        return make_reject(row, error)
    except RecursionError:
        return make_reject(row, BadRow("too_deep", "the row is nested too deeply to be read"))
    if to == "messages" and conversation.completion_from != last_answer_index(conversation.messages):
        conversation = replace(conversation, notes=conversation.notes | {"completion"})
    if has_rejected_side(conversation):
        conversation = replace(conversation, notes=conversation.notes | {"rejected side"})
    return conversation, records


def _count(outcome: Outcome, ledger: Ledger, rejects: list[Reject]) -> None:
    if isinstance(outcome, Reject):
        ledger.add_rejects([outcome])
        rejects.append(outcome)
    else:
        ledger.add_built([outcome[0]])


def _make_records(conversation: Conversation, to: str, recipe: Recipe | None) -> list[dict[str, Any]]:
    if conversation.tokens is not None or (to != "text" and not conversation.messages):
        problem = f"rows with the schema {conversation.schema} cannot be converted to {to.replace('_', ' and ')}"
        raise BadRow("no_messages", problem)
    if recipe is not None:
        if any(message.get("train") is False for message in conversation.messages):
            raise BadRow(
                "untrained_message", "the row contains an untrained message, which plain text cannot represent"
            )
        recipe = recipe.with_kwargs(conversation.kwargs)
        return [{"text": _check_text(text, recipe)} for text in render_in_worker(conversation, recipe.template)]
    extra: dict[str, Any] = {"tools": list(conversation.tools)} if conversation.tools else {}
    extra |= {"chat_template_kwargs": dict(conversation.kwargs)} if conversation.kwargs else {}
    messages, start = list(conversation.messages), conversation.completion_from
    if to == "messages":
        record = {"messages": messages, **extra}
    elif start == 0:
        raise BadRow(
            "no_prompt", "the conversation begins with an assistant message, so there is no prompt", field="messages[0]"
        )
    else:
        record = {"prompt": messages[:start], "completion": messages[start:], **extra}
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise BadRow("not_json", f"the row contains a value that cannot be encoded as JSON: {error}") from None
    return [record]


def _check_text(rendered: Rendered, recipe: Recipe) -> str:
    """Return the rendered text. Reject a row whose data would add control tokens to the text."""
    if not rendered.keep_control and recipe.control.find_matches(rendered)[1]:
        problem = "the row contains the text of a control token, which would be a real control token in the output"
        raise BadRow("control_tokens", problem)
    return rendered.text


@contextmanager
def _open_writer(output: Path, to: str) -> Iterator[_Writer]:
    kind = output.suffix.lower()
    if kind not in (".jsonl", ".parquet"):
        raise UsageError("output", f"output is {str(output)!r}, expected the path of a .jsonl or .parquet file")
    with atomic.replace_file(output) as temporary:
        if kind == ".parquet":
            with disk.create(temporary) as file, pq.ParquetWriter(file, _ARROW_SCHEMAS[to]) as table:
                yield _ParquetWriter(table, _ARROW_SCHEMAS[to])
        else:
            text = io.TextIOWrapper(disk.create(temporary), encoding="utf-8", newline="\n")
            with text, jsonlines.Writer(text, compact=True) as lines:
                yield _LinesWriter(lines)


@dataclass(frozen=True)
class _LinesWriter:
    lines: jsonlines.Writer

    def check(self, record: Mapping[str, Any]) -> None:
        """Accept every record, because JSON Lines can represent any message."""

    def batch(self, records: list[dict[str, Any]]) -> None:
        self.lines.write_all(records)


@dataclass(frozen=True)
class _ParquetWriter:
    table: pq.ParquetWriter
    schema: pa.Schema

    def check(self, record: Mapping[str, Any]) -> None:
        for name in ("messages", "prompt", "completion"):
            for index, message in enumerate(record.get(name, ())):
                unsupported = [key for key, value in message.items() if not _fits_schema(key, value)]
                if unsupported:
                    problem = f"the Parquet columns cannot represent keys of the message: {', '.join(unsupported)}"
                    raise BadRow("no_column", problem, field=f"{name}[{index}]", hint="write a .jsonl file")

    def batch(self, records: list[dict[str, Any]]) -> None:
        self.table.write_batch(pa.RecordBatch.from_pylist([_encode_objects(record) for record in records], self.schema))


def _fits_schema(key: str, value: Any) -> bool:
    """Return whether the Parquet columns can store the value that a message has for the key `key`."""
    if key == "tool_calls":
        return all(
            set(call) <= {"id", "type", "function"}
            and isinstance(call.get("id", ""), str)
            and isinstance(call.get("type", ""), str)
            and isinstance(call.get("function"), Mapping)
            and {"name"} <= set(call["function"]) <= {"name", "arguments"}
            and isinstance(call["function"]["name"], str)
            for call in value
        )
    expected_type = bool if key in ("train", "is_error") else str
    return isinstance(value, expected_type) and key in {item.name for item in _MESSAGE}


def _encode_objects(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the record in which tools, template variables and tool call arguments are JSON text."""
    encoded = dict(record)
    for name in ("tools", "chat_template_kwargs"):
        if name in encoded:
            encoded[name] = json.dumps(encoded[name], ensure_ascii=False)
    for name in {"messages", "prompt", "completion"} & set(encoded):
        encoded[name] = [_encode_arguments(message) for message in encoded[name]]
    return encoded


def _encode_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [dict(call) for call in message.get("tool_calls") or ()]
    for call in calls:
        arguments = call["function"].get("arguments")
        if arguments is not None and not isinstance(arguments, str):
            call["function"] = {**call["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {**message, **({"tool_calls": calls} if calls else {})}
