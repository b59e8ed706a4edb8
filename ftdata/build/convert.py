"""Convert rows of any known schema to messages, prompt/completion pairs, or rendered text."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import jsonlines
import pyarrow as pa
import pyarrow.parquet as pq

from ftdata.build import store
from ftdata.build.ledger import Ledger, reading_notes
from ftdata.build.reject_limit import RejectLimit, group_rejects
from ftdata.errors import BadRow, UsageError, check_choice
from ftdata.pipeline.read_rows import check_answers, drops_rejected_side
from ftdata.pipeline.recipe import Options, Recipe, make_recipe
from ftdata.pipeline.render_rows import RejectedRows, make_reject
from ftdata.progress import Progress, ProgressUpdate
from ftdata.readers import FileSource, MemorySource, reread_rows, resolve_sources
from ftdata.readers.row_filter import RowFilter, find_missing_column
from ftdata.schemas import STANDS_FOR, last_answer_index, normalize
from ftdata.spelling import spell_options
from ftdata.storage import atomic, disk
from ftdata.templates import render_in_worker
from ftdata.types import WHOLE, Conversation, Message, Reject, Rendered, Row

FORMS = ("messages", "prompt_completion", "text")
_MAX_ROWS, _MAX_CHARACTERS = 1024, 1 << 20
"""Limits of a batch that is written together: rows, and characters."""

_FUNCTION = pa.struct({"name": pa.string(), "arguments": pa.string()})
_CALL = pa.struct({"id": pa.string(), "type": pa.string(), "function": _FUNCTION})
_TEXTS = dict.fromkeys(("role", "content", "reasoning_content", "name", "tool_call_id"), pa.string())
_FLAGS = dict.fromkeys(("train", "is_error"), pa.bool_())
_MESSAGE = pa.struct({**_TEXTS, "tool_calls": pa.list_(_CALL), **_FLAGS})
_OBJECTS = dict.fromkeys(("tools", "chat_template_kwargs"), pa.string())
"""Columns that contain objects as JSON text."""

_ARROW_SCHEMAS = {
    "messages": pa.schema({"messages": pa.list_(_MESSAGE), **_OBJECTS}),
    "prompt_completion": pa.schema({"prompt": pa.list_(_MESSAGE), "completion": pa.list_(_MESSAGE), **_OBJECTS}),
    "text": pa.schema({"text": pa.string()}),
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
        filtered_rows = f" + {filtered:,} filtered out (where)" if filtered else ""
        counts = f"{read:,} read = {written:,} written to {self.output} + {len(self.rejects):,} rejected{filtered_rows}"
        lines = [f"rows     {counts}", *(f"note     {spell_options(note)}" for note in self.notes)]
        if self.rejects:
            lines.append(f"rejects  {_rejects_path(self.output)}")
        return "\n".join([*lines, *(f"reject   {spell_options(line)}" for line in group_rejects(self.rejects))])


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
    overwrite: bool = False,
    progress: Progress | None = None,
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
        overwrite: whether to replace an existing output file.
        progress: called with a `ProgressUpdate` after each batch of rows.

    Returns:
        The counts and the rejected rows.

    Raises:
        UsageError: an option is invalid, the output file exists, or `NAME.rejects.jsonl` exists and does not contain
            rejected rows.
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
    if Path(output).is_file() and not overwrite:
        raise UsageError("target_exists", f"{output} already exists", hint="set overwrite=True to replace it")
    store.check_rejects_file(_rejects_path(output))
    row_filters, rows = defaultdict[int, RowFilter](lambda: RowFilter(where, limit)), 0
    sources = sorted(sources, key=lambda source: source.item_index)
    size, total_size = 0, sum(source.size for source in sources)
    with _open_writer(Path(output), to) as write:
        for source in sources:
            row_filter = row_filters[source.item_index]
            ledgers.append(ledger := Ledger(source.path))
            filtered_before, rejected_rows = row_filter.filtered, RejectedRows()
            outcomes = (_convert_row(row, to, options, recipe, output) for row in row_filter.filter_rows(source.rows()))
            while batch := _take_batch(outcomes):
                for outcome in batch:
                    rejected_rows.check(outcome)
                    _count(outcome, ledger, rejects)
                write([record for item in batch if not isinstance(item, Reject) for record in item[1]])
                rows += len(batch)
                if progress:
                    last = batch[-1]
                    share = source.share_before(last.source if isinstance(last, Reject) else last[0].source)
                    done = None if share is None or not total_size else (size + share * source.size) / total_size
                    progress(ProgressUpdate("convert", rows, share=done))
            ledger.add_filtered(row_filter.filtered - filtered_before)
            size += source.size
        reject_limit.check(ledgers, lambda: rejects, lambda: find_missing_column(where, reread_rows(sources)))
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
        problem = "convert does not support the options weight, rows and tokens, because it writes each row once"
        raise UsageError("share", problem)
    for written, source in product((Path(output), _rejects_path(output)), sources):
        if Path(source.path).exists() and written.exists() and Path(source.path).samefile(written):
            problem = f"convert would overwrite {written}, which is one of the sources"
            raise UsageError("output", problem, hint="use another file")
    return sources


def _rejects_path(output: str | Path) -> Path:
    return Path(output).with_suffix(".rejects.jsonl")


def _convert_row(row: Row | Reject, to: str, options: Options, recipe: Recipe | None, output: str | Path) -> Outcome:
    if isinstance(row, Reject):
        return row
    try:
        conversation = normalize(row, options.schema, options.columns)
        check_answers(conversation)
        conversation = _use_standard_roles(conversation)
        records = _make_records(conversation, to, recipe)
        for record in records if _is_parquet(output) else ():
            _check_columns(record)
    except BadRow as error:
        return make_reject(row, error)
    except RecursionError:
        return make_reject(row, BadRow("too_deep", "the row is nested too deeply to be read"))
    if to == "messages" and conversation.completion_from != last_answer_index(conversation.messages):
        conversation = replace(conversation, notes=conversation.notes | {"completion"})
    if len(records) > 1:
        conversation = replace(conversation, notes=conversation.notes | {"split"})
    if drops_rejected_side(conversation):
        conversation = replace(conversation, notes=conversation.notes | {"rejected side"})
    return conversation, records


def _use_standard_roles(conversation: Conversation) -> Conversation:
    """Replace roles that only some templates support, such as `observation`, by the role `tool`.

    Other tools would lose these messages, because most templates ignore unknown roles.
    """
    special = {message["role"] for message in conversation.messages} & STANDS_FOR.keys()
    if not special:
        return conversation
    messages = tuple(
        cast("Message", {**message, "role": STANDS_FOR.get(message["role"], message["role"])})
        for message in conversation.messages
    )
    notes = {f"role {role} as {STANDS_FOR[role]}" for role in special}
    return replace(conversation, messages=messages, notes=conversation.notes | notes)


def _count(outcome: Outcome, ledger: Ledger, rejects: list[Reject]) -> None:
    if isinstance(outcome, Reject):
        ledger.add_rejects([outcome])
        rejects.append(outcome)
    else:
        ledger.add_built([outcome[0]])


def _make_records(conversation: Conversation, to: str, recipe: Recipe | None) -> list[dict[str, Any]]:
    if conversation.tokens is not None or (to != "text" and not conversation.messages):
        problem = f"rows with the schema {conversation.schema} cannot be converted to {to.replace('_', ' and ')}"
        raise BadRow("no_messages", problem, hint="convert only rows with messages, or remove the row")
    if recipe is not None:
        if any(message.get("train") is False for message in conversation.messages):
            problem = "the row contains an untrained message, which plain text cannot represent"
            raise BadRow("untrained_message", problem)
        recipe = recipe.with_kwargs(conversation.kwargs)
        return [{"text": _check_text(text, recipe)} for text in render_in_worker(conversation, recipe.template)]
    extra: dict[str, Any] = {"tools": list(conversation.tools)} if conversation.tools else {}
    extra |= {"chat_template_kwargs": dict(conversation.kwargs)} if conversation.kwargs else {}
    messages, start = list(conversation.messages), conversation.completion_from
    if to == "messages":
        record = {"messages": messages, **extra}
    elif start == 0:
        problem = "the conversation begins with an assistant message, so there is no prompt"
        raise BadRow("no_prompt", problem, field="messages[0]", hint="convert to messages, or add a user message")
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


def _is_parquet(output: str | Path) -> bool:
    return Path(output).suffix.lower() == ".parquet"


@contextmanager
def _open_writer(output: Path, to: str) -> Iterator[Callable[[list[dict[str, Any]]], object]]:
    """Yield a function that writes a batch of records to the output file."""
    if output.suffix.lower() not in (".jsonl", ".parquet"):
        raise UsageError("output", f"output is {str(output)!r}, expected the path of a .jsonl or .parquet file")
    with atomic.replace_file(output) as temporary:
        if _is_parquet(output):
            schema = _ARROW_SCHEMAS[to]
            with disk.create(temporary) as file, pq.ParquetWriter(file, schema) as table:
                yield lambda records: table.write_batch(
                    pa.RecordBatch.from_pylist([_encode_objects(record) for record in records], schema)
                )
        else:
            text = io.TextIOWrapper(disk.create(temporary), encoding="utf-8", newline="\n")
            with text, jsonlines.Writer(text, compact=True) as lines:
                yield lines.write_all


def _check_columns(record: Mapping[str, Any]) -> None:
    """Reject a record if the Parquet columns cannot represent it. JSON Lines can represent any record."""
    for name in ("messages", "prompt", "completion"):
        for index, message in enumerate(record.get(name, ())):
            if unsupported := [key for key, value in message.items() if not _fits_schema(key, value)]:
                problem = f"the Parquet columns cannot represent keys of the message: {', '.join(unsupported)}"
                raise BadRow("no_column", problem, field=f"{name}[{index}]", hint="write a .jsonl file")


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
    return isinstance(value, bool) if key in _FLAGS else key in _TEXTS and isinstance(value, str)


def _encode_objects(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the record in which tools, template variables and tool call arguments are JSON text."""
    encoded = dict(record)
    for name in _OBJECTS.keys() & encoded.keys():
        encoded[name] = json.dumps(encoded[name], ensure_ascii=False)
    for name in {"messages", "prompt", "completion"} & encoded.keys():
        encoded[name] = [_encode_arguments(message) for message in encoded[name]]
    return encoded


def _encode_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [dict(call) for call in message.get("tool_calls") or ()]
    for call in calls:
        arguments = call["function"].get("arguments")
        if arguments is not None and not isinstance(arguments, str):
            call["function"] = {**call["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {**message, **({"tool_calls": calls} if calls else {})}
