"""Write back: rows of any shape as messages, as prompt and completion, or as the text that a template makes of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
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
from ftdata.pipeline.render_rows import RejectedRows, check_answers, make_reject
from ftdata.readers import FileSource, MemorySource, resolve_sources
from ftdata.readers.row_filter import RowFilter
from ftdata.schemas import last_answer_index, normalize
from ftdata.storage import atomic, disk
from ftdata.templates import render_in_worker
from ftdata.types import WHOLE, Conversation, Reject, Rendered, Row

FORMS = ("messages", "prompt_completion", "text")
_BATCH = 1024

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
_BESIDE = [("tools", pa.string()), ("chat_template_kwargs", pa.string())]
_TABLES = {
    "messages": pa.schema([("messages", pa.list_(_MESSAGE)), *_BESIDE]),
    "prompt_completion": pa.schema([("prompt", pa.list_(_MESSAGE)), ("completion", pa.list_(_MESSAGE)), *_BESIDE]),
    "text": pa.schema([("text", pa.string())]),
}


@dataclass(frozen=True)
class ConvertReport:
    """What became of the rows of each source, and where they were written.

    Attributes:
        output: the file.
        sources: what became of the rows of each source: read, built (written), passed over, rejected by code.
        rejects: the rows that were left out, each with its reason.
    """

    output: Path
    sources: tuple[Ledger, ...]
    rejects: tuple[Reject, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a careful reader should know, in sentences."""
        return tuple(reading_notes(self.sources))

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON."""
        each = [
            {
                "source": one.source,
                "read": one.read,
                "written": one.built,
                "filtered": one.filtered,
                "rejected": dict(one.rejected),
            }
            for one in self.sources
        ]
        rejects = [str(reject) for reject in self.rejects[:20]]
        return {"output": str(self.output), "sources": each, "notes": list(self.notes), "rejects": rejects}

    def __str__(self) -> str:
        read, written, passed = (
            sum(getattr(one, name) for one in self.sources) for name in ("read", "built", "filtered")
        )
        lines = [
            f"rows     {read:,} read = {written:,} written to {self.output} + {len(self.rejects):,} rejected"
            + (f" + {passed:,} filtered out (where)" if passed else "")
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
    """Write rows of any known shape in one shape, exactly.

    Args:
        data: as for `build_sft_dataset`.
        output: a `.jsonl` or `.parquet` file; it appears whole or not at all. In Parquet the arguments of calls, and
            the tools, are JSON text.
        to: `"messages"`, `"prompt_completion"` (both lists of messages), or `"text"`: what the template prints.
        tokenizer: for `"text"`: whose special tokens are printed.
        template: for `"text"`: `None` for the tokenizer's own.
        schema: as for `build_sft_dataset`, and so the others.
        columns: the names of columns.
        where: an expression over columns; other rows are left out.
        limit: rows to read of each thing that `data` names.
        on_bad_rows: `"error"` or `"quarantine"`: rejects are written beside the output, to `NAME.rejects.jsonl`.
        max_rejects: with `"quarantine"`: how many rows, or which share (`"1%"`), may be left out.

    Returns:
        The counts, and the rejects.

    Raises:
        UsageError: an option is invalid.
        BadRows: rows are refused (`on_bad_rows="error"`).
        TooManyRejects: more than `max_rejects`.
        InputRefused: a source cannot be read, or one file cannot say what it holds.
        TemplateRefused: with `to="text"`, as for `build_sft_dataset`.
        StorageError: the disk refuses.
        HubError: the network or the hub fails.

    >>> import tempfile
    >>> target = f"{tempfile.mkdtemp()}/chats.jsonl"
    >>> done = convert([{"question": "Add 1. 2", "answer": "3"}], target)
    >>> done.sources[0].built
    1
    >>> print(Path(target).read_text(encoding="utf-8"), end="")
    {"messages":[{"role":"user","content":"Add 1. 2"},{"role":"assistant","content":"3"}]}
    """
    check_choice("to", to, FORMS)
    if (to == "text") != (tokenizer is not None):
        raise UsageError("to", "a tokenizer goes with to='text', and only there: its special tokens are printed")
    tolerance = RejectLimit(on_bad_rows, max_rejects)
    options = Options(schema=schema, columns=columns)
    recipe = make_recipe(tokenizer, template, schema=schema, columns=columns) if tokenizer is not None else None
    ledgers: list[Ledger] = []
    rejects: list[Reject] = []
    found = _one_split(resolve_sources(data), output)
    with _writer(Path(output), to) as write:
        for place in sorted({source.place for source in found}):
            selection = RowFilter(where, limit)
            for source in (one for one in found if one.place == place):
                ledgers.append(ledger := Ledger(source.path))
                before, rejected_rows = selection.filtered, RejectedRows()
                outcomes = (_record(row, to, options, recipe, write.check) for row in selection.of(source.rows()))
                while batch := list(islice(outcomes, _BATCH)):
                    for outcome in batch:
                        rejected_rows.check(outcome)
                        _count(outcome, ledger, rejects)
                    write.batch([record for one in batch if not isinstance(one, Reject) for record in one[1]])
                ledger.add_filtered(selection.filtered - before)
        tolerance.judge(ledgers, lambda: rejects)
    beside = _rejects_beside(output)
    beside.unlink(missing_ok=True)
    if rejects:
        store.write_rejects(beside, rejects)
    return ConvertReport(Path(output), tuple(ledgers), tuple(rejects))


def _one_split(found: Sequence[FileSource | MemorySource], output: str | Path) -> Sequence[FileSource | MemorySource]:
    """Refuse what one file cannot say: several splits, rows of some sources oftener than of others."""
    splits = list(dict.fromkeys(one.split or "train" for one in found))
    if len(splits) > 1:
        hint = "one by one, with split: each to a file of its own"
        raise UsageError("several_splits", f"holds {', '.join(splits)}, which one file would mix", hint=hint)
    if any(one.share != WHOLE for one in found):
        raise UsageError("share", "weight, rows and tokens are decided in a build: a file has each row once")
    for written in (Path(output), _rejects_beside(output)):
        for one in found:
            if Path(one.path).exists() and written.exists() and Path(one.path).samefile(written):
                raise UsageError("output", f"{written} is read, and cannot be written over")
    return found


def _rejects_beside(output: str | Path) -> Path:
    return Path(output).with_suffix(".rejects.jsonl")


class _Writer(Protocol):
    def check(self, record: Mapping[str, Any]) -> None:
        """Refuse a record that has no place there."""

    def batch(self, records: list[dict[str, Any]]) -> None:
        """Write records."""


Outcome = tuple[Conversation, list[dict[str, Any]]] | Reject


def _record(
    row: Row | Reject, to: str, options: Options, recipe: Recipe | None, check: Callable[[Mapping[str, Any]], None]
) -> Outcome:
    if isinstance(row, Reject):
        return row
    try:
        conversation = normalize(row, options.schema, options.columns)
        check_answers(conversation)
        records = _shaped(conversation, to, recipe)
        for record in records:
            check(record)
    except BadRow as error:
        return make_reject(row, error)
    except RecursionError:
        return make_reject(row, BadRow("too_deep", "is nested too deep to be read"))
    if to == "messages" and conversation.completion_from != last_answer_index(conversation.messages):
        conversation = replace(conversation, notes=conversation.notes | {"completion"})
    return conversation, records


def _count(outcome: Outcome, ledger: Ledger, rejects: list[Reject]) -> None:
    if isinstance(outcome, Reject):
        ledger.reject([outcome])
        rejects.append(outcome)
    else:
        ledger.read_as([outcome[0]])


def _shaped(conversation: Conversation, to: str, recipe: Recipe | None) -> list[dict[str, Any]]:
    if conversation.tokens is not None or (to != "text" and not conversation.messages):
        raise BadRow("no_messages", f"holds {conversation.schema}, of which no {to.replace('_', ' and ')} can be made")
    if recipe is not None:
        if any(message.get("train") is False for message in conversation.messages):
            raise BadRow("untrained_message", "holds a message that is not trained, which a text does not tell")
        recipe = recipe.with_kwargs(conversation.kwargs)
        return [{"text": _checked(one, recipe)} for one in render_in_worker(conversation, recipe.template)]
    beside: dict[str, Any] = {"tools": list(conversation.tools)} if conversation.tools else {}
    beside |= {"chat_template_kwargs": dict(conversation.kwargs)} if conversation.kwargs else {}
    messages, at = list(conversation.messages), conversation.completion_from
    if to == "messages":
        record = {"messages": messages, **beside}
    elif at == 0:
        raise BadRow("no_prompt", "begins with its answer, so there is no prompt", field="messages[0]")
    else:
        record = {"prompt": messages[:at], "completion": messages[at:], **beside}
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise BadRow("not_json", f"holds what JSON does not: {error}") from None
    return [record]


def _checked(rendered: Rendered, recipe: Recipe) -> str:
    """Return the text, unless its reader would take what the row spells for control tokens of the template."""
    if not rendered.keep_control and recipe.control.matches(rendered)[1]:
        raise BadRow("control_tokens", "spells a control token, which in templated text would be a real one")
    return rendered.text


@contextmanager
def _writer(output: Path, to: str) -> Iterator[_Writer]:
    kind = output.suffix.lower()
    if kind not in (".jsonl", ".parquet"):
        raise UsageError("output", f"{output} is neither .jsonl nor .parquet")
    with atomic.replace_file(output) as temporary:
        if kind == ".parquet":
            with disk.create(temporary) as file, pq.ParquetWriter(file, _TABLES[to]) as table:
                yield _Parquet(table, _TABLES[to])
        else:
            text = io.TextIOWrapper(disk.create(temporary), encoding="utf-8", newline="\n")
            with text, jsonlines.Writer(text, compact=True) as lines:
                yield _Lines(lines)


@dataclass(frozen=True)
class _Lines:
    lines: jsonlines.Writer

    def check(self, record: Mapping[str, Any]) -> None:
        """Lines take every record."""

    def batch(self, records: list[dict[str, Any]]) -> None:
        self.lines.write_all(records)


@dataclass(frozen=True)
class _Parquet:
    table: pq.ParquetWriter
    schema: pa.Schema

    def check(self, record: Mapping[str, Any]) -> None:
        for name in ("messages", "prompt", "completion"):
            for index, message in enumerate(record.get(name, ())):
                odd = [key for key, value in message.items() if not _fits(key, value)]
                if odd:
                    found = f"has {', '.join(odd)}, for which Parquet has no column here"
                    raise BadRow("no_column", found, field=f"{name}[{index}]", hint="write .jsonl")

    def batch(self, records: list[dict[str, Any]]) -> None:
        self.table.write_batch(pa.RecordBatch.from_pylist([_as_text(record) for record in records], self.schema))


def _fits(key: str, value: Any) -> bool:
    """Whether a value of a message has a place in the columns of Parquet."""
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
    return isinstance(value, bool if key in ("train", "is_error") else str) and key in {each.name for each in _MESSAGE}


def _as_text(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with JSON text for all that has no one type."""
    found = dict(record)
    for name in ("tools", "chat_template_kwargs"):
        if name in found:
            found[name] = json.dumps(found[name], ensure_ascii=False)
    for name in {"messages", "prompt", "completion"} & set(found):
        found[name] = [_with_text_arguments(message) for message in found[name]]
    return found


def _with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [dict(call) for call in message.get("tool_calls") or ()]
    for call in calls:
        arguments = call["function"].get("arguments")
        if arguments is not None and not isinstance(arguments, str):
            call["function"] = {**call["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {**message, **({"tool_calls": calls} if calls else {})}
