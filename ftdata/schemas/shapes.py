"""The built-in schemas. A schema recognizes rows by their columns, and converts the rows to conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from ftdata.errors import BadRow
from ftdata.registry import Registry
from ftdata.schemas.messages import is_messages, is_single_message, parse_json, read_messages, read_system, read_tools
from ftdata.schemas.training_fields import describe_value
from ftdata.types import Conversation, Message

Convert = Callable[[Mapping[str, Any]], Conversation]
"""Converts a row to a conversation. `BadRow` rejects the row; any other exception becomes `schema_failed`."""


@dataclass(frozen=True, slots=True)
class Schema:
    """A row format: its columns, a predicate that recognizes rows, and a function that converts rows.

    Attributes:
        columns: the canonical column names, which `columns=` can map.
        matches: whether a row has this schema; must depend on column names and types only.
        convert: converts a row to a conversation.
    """

    columns: tuple[str, ...]
    matches: Callable[[Mapping[str, Any]], bool]
    convert: Convert


schemas: Registry[Schema | Convert] = Registry("ftdata.schemas", "schema")
"""Name -> schema. `schema="auto"` considers only `Schema` objects that were registered in this process."""

ALIASES = {
    "completion": ("response",),
    "output": ("response",),
    "input": ("context",),
    "conversations": ("conversation",),
    "system": ("system_prompt",),
}
"""Common alternative names of a canonical column, used if the canonical column is absent."""

MASK_COLUMNS = ("completion_mask", "assistant_masks", "loss_mask")
"""Columns of pretokenized rows that contain a mask of the trained tokens."""

SERVED_COLUMNS = ("prompt_token_ids", "completion_token_ids", "logprobs")
"""Columns of rows with the tokens that a server received and generated."""

LENGTH_COLUMNS = ("seq_lengths", "sequence_lengths")
"""Columns of pretokenized rows that contain the lengths of the packed documents."""


def log_columns(data: Mapping[str, Any]) -> list[str]:
    """Return the names of all columns that contain a list of messages."""
    return [name for name, value in data.items() if is_messages(parse_json_list(value))]


def parse_json_list(value: Any) -> Any:
    """Parse the JSON text of a list. Return any other value unchanged. Tables often store lists as JSON text."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parse_json(value, "")
    except BadRow:
        return value


def find_column(data: Mapping[str, Any], column: str) -> str:
    """Return the name that a schema's column has in a row: either `column` itself or an alias such as `response`.

    If the row does not have the column, return `column`.
    """
    if data.get(column):
        return column
    names = [name for name in (column, *ALIASES.get(column, ())) if name in data]
    # A null or empty column is used only if no alternative column has a value.
    return next((name for name in names if data[name] not in (None, "")), names[0] if names else column)


def _get_column(data: Mapping[str, Any], column: str) -> Any:
    return data.get(find_column(data, column))


def has_columns(*required: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return a predicate for rows that have all required columns, with values other than null."""
    return lambda data: all(_get_column(data, name) is not None for name in required)


def _has_list(column: str) -> Callable[[Mapping[str, Any]], bool]:
    def matches(data: Mapping[str, Any]) -> bool:
        value = _get_column(data, column)
        return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))

    return matches


def _read_text(data: Mapping[str, Any], column: str) -> str:
    value = _get_column(data, column)
    if isinstance(value, Mapping):
        if len(value) != 1:
            message = f"the cell contains {len(value)} values, expected a single value"
            hint = "write one row per value, or the whole file as a single object with a list per column"
            raise BadRow("nested_cell", message, field=column, hint=hint)
        value = next(iter(value.values()))
    if not isinstance(value, str):
        problem = f"is {describe_value(value)}, expected text"
        raise BadRow("content_type", problem, field=column, hint="convert the value to text")
    return value


def _make_message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _make_conversation(data: Mapping[str, Any], fields: dict[str, str], user: str, assistant: str) -> Conversation:
    context, context_fields = _read_context(data)
    messages = (*context, _make_message("user", user), _make_message("assistant", assistant))
    return Conversation(
        messages=messages,
        fields={**fields, **context_fields},
        tools=read_tools(data),
        completion_from=len(messages) - 1,
    )


def _read_context(data: Mapping[str, Any]) -> tuple[tuple[Message, ...], dict[str, str]]:
    """Read the system message and the history (earlier questions and answers) of a row.

    Returns:
        The messages before the question, and the fields for prompt templates.
    """
    fields: dict[str, str] = {}
    system = _read_row_system(data)
    if system and isinstance(system[0].get("content"), str):
        fields["system"] = str(system[0].get("content"))
    history = _read_history(data)
    if history:
        fields["history"] = orjson.dumps(parse_json_list(data["history"])).decode()
    return (*system, *history), fields


def _read_row_system(data: Mapping[str, Any]) -> tuple[Message, ...]:
    name = find_column(data, "system")
    return ({"role": "system", "content": read_system(data, name)},) if data.get(name) else ()


def _read_history(data: Mapping[str, Any]) -> tuple[Message, ...]:
    pairs = parse_json_list(data.get("history")) or []
    if is_messages(pairs):
        return read_messages(pairs, "history")
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise BadRow("history_type", "the history is not a list of [question, answer] pairs", field="history")
    return tuple(_make_message(*turn) for pair in pairs for turn in zip(("user", "assistant"), pair, strict=True))


def _read_chat_column(data: Mapping[str, Any], column: str, role: str) -> tuple[Message, ...]:
    """Read a column that contains messages or a text. A text becomes a single message with the role `role`."""
    value = _get_column(data, column)
    return read_messages(value, column) if _is_chat(value) else (_make_message(role, _read_text(data, column)),)


def _is_chat(value: Any) -> bool:
    # A string is text, even if it contains the JSON of a list of messages.
    return isinstance(value, list)


def _prompt_completion(data: Mapping[str, Any]) -> Conversation:
    if _is_chat(_get_column(data, "prompt")) or _is_chat(_get_column(data, "completion")):
        before = _add_context(data, _read_chat_column(data, "prompt", "user"), _read_history(data))
        after = _read_chat_column(data, "completion", "assistant")
        return Conversation(messages=before + after, tools=read_tools(data), completion_from=len(before))
    fields = {"prompt": _read_text(data, "prompt"), "completion": _read_text(data, "completion")}
    return _make_conversation(data, fields, fields["prompt"], fields["completion"])


def _preference(data: Mapping[str, Any]) -> Conversation:
    """Convert a preference pair to a conversation with the chosen answer. The rejected answer is ignored."""
    (conversation,) = read_sides(data, ["chosen"])
    return conversation


def read_sides(data: Mapping[str, Any], columns: Sequence[str]) -> list[Conversation]:
    """Convert the sides of a preference pair to conversations, which share the message objects of the prompt.

    Args:
        data: the row.
        columns: the columns with the answers, `chosen` or `rejected`. Each contains a text, or messages, which may
            include the prompt.
    """
    prompt, tools, history = _get_column(data, "prompt"), read_tools(data), _read_history(data)
    has_prompt = prompt is not None and not (isinstance(prompt, str) and not prompt.strip())
    prompt_messages = _read_chat_column(data, "prompt", "user") if has_prompt else ()
    sides = list[Conversation]()
    for column in columns:
        messages = _add_prompt(prompt_messages, _read_chat_column(data, column, "assistant"), column)
        messages = _add_context(data, messages, history)
        sides.append(Conversation(messages=messages, tools=tools, completion_from=last_answer_index(messages)))
    return sides


def _add_prompt(prompt: tuple[Message, ...], answer: tuple[Message, ...], column: str) -> tuple[Message, ...]:
    """Return the messages of a prompt, which can be empty, and of an answer, which can repeat the prompt."""
    after_system = _split_system(answer)[1]
    has_question = after_system[:1] != () and after_system[0]["role"] != "assistant"
    if prompt:
        return _merge_prompt(prompt, answer, column) if has_question else prompt + answer
    if not has_question:
        message = "the conversation has no question, and the row has no prompt"
        hint = "add the prompt to the column prompt, or name its column with columns={'prompt': ...}"
        raise BadRow("no_prompt", message, field=column, hint=hint)
    return answer


def _merge_prompt(prompt: tuple[Message, ...], conversation: tuple[Message, ...], column: str) -> tuple[Message, ...]:
    """Merge a prompt with a conversation that repeats the prompt.

    The result contains the system message of the conversation, or else of the prompt.

    Raises:
        BadRow: the conversation does not contain the prompt, or has a different system message.
    """
    (prompt_system, question), (system, dialog) = _split_system(prompt), _split_system(conversation)
    texts, question_texts = [
        [(message["role"], str(message.get("content")).strip()) for message in messages]
        for messages in (dialog, question)
    ]
    # Searching in one string takes linear time.
    joined, joined_question = ("".join(f"\0{text!r}\0" for text in group) for group in (texts, question_texts))
    if joined_question not in joined:
        problem = f"the conversation in {column} does not contain the messages of the prompt column"
        hint = f"remove the prompt column, or remove the prompt messages from {column}"
        raise BadRow("prompt_differs", problem, field=column, hint=hint)
    if prompt_system and system and prompt_system[0].get("content") != system[0].get("content"):
        raise BadRow("two_systems", "the system message differs from the system message of the prompt", field=column)
    return (system or prompt_system) + dialog


def _split_system(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Separate the system message at the beginning, if any, from the other messages."""
    count = int(bool(messages) and messages[0]["role"] == "system")
    return messages[:count], messages[count:]


def join_instruction(instruction: str, text: str) -> str:
    """Join an instruction and its input, which can be empty, to a user message."""
    return "\n\n".join(filter(None, (instruction, text)))


def _alpaca(data: Mapping[str, Any]) -> Conversation:
    fields = {"instruction": _read_text(data, "instruction"), "output": _read_text(data, "output")}
    fields["input"] = _read_text(data, "input") if _get_column(data, "input") is not None else ""
    user = join_instruction(fields["instruction"], fields["input"])
    return _make_conversation(data, fields, user, fields["output"])


def _question_answer(data: Mapping[str, Any]) -> Conversation:
    fields = {"question": _read_text(data, "question"), "answer": _read_text(data, "answer")}
    return _make_conversation(data, fields, fields["question"], fields["answer"])


def _plain_text(data: Mapping[str, Any]) -> Conversation:
    text = _read_text(data, "text")
    return Conversation(messages=(), fields={"text": text}, text=text)


_SYSTEM_COLUMNS = {"system", *ALIASES["system"]}


def _add_context(
    data: Mapping[str, Any], messages: tuple[Message, ...], history: tuple[Message, ...] = ()
) -> tuple[Message, ...]:
    """Insert the system message and the history (earlier turns) of a row before the other messages of the row.

    Raises:
        BadRow: the messages begin with a different system message.
    """
    if not history and _SYSTEM_COLUMNS.isdisjoint(data):
        return messages
    row_system, (system, dialog) = _read_row_system(data), _split_system(messages)
    if row_system and system and system[0].get("content") != row_system[0].get("content"):
        raise BadRow("two_systems", "the text differs from the system message of the conversation", field="system")
    return (*(system or row_system), *history, *dialog)


def _convert_messages(column: str) -> Convert:
    def convert(data: Mapping[str, Any]) -> Conversation:
        messages = _add_context(data, read_messages(data.get(column) or _get_column(data, column), column))
        return Conversation(messages=messages, tools=read_tools(data), completion_from=last_answer_index(messages))

    return convert


def _chat_log(data: Mapping[str, Any]) -> Conversation:
    columns = log_columns(data)
    if len(columns) != 1:
        problem = f"the row has {len(columns)} columns with a list of messages, expected 1"
        raise BadRow("no_messages", problem, hint="name the column with columns={'messages': ...}, or remove the row")
    return _convert_messages(columns[0])(data)


def last_answer_index(messages: Sequence[Message]) -> int:
    """Return the index of the last assistant message. Return 0 if no assistant message follows the first message."""
    for index in range(len(messages) - 1, 0, -1):
        if messages[index]["role"] == "assistant":
            return index
    return 0


def _read_token_row(data: Mapping[str, Any]) -> Conversation:
    # The template worker never reads such rows, and starts twice as fast without numpy.
    from ftdata.schemas.pretokenized import read_token_row

    return read_token_row(data)


def _read_served_row(data: Mapping[str, Any]) -> Conversation:
    from ftdata.schemas.served_tokens import read_served_row

    origin = None
    if data.get("messages"):
        origin = _convert_messages("messages")(data)
    elif _is_prompt_completion(data):
        origin = _prompt_completion(data)
    return read_served_row(data, origin)


def _is_prompt_completion(data: Mapping[str, Any]) -> bool:
    # `instruction` and `response` are columns of Alpaca data, not of prompt and completion.
    return "instruction" not in data and has_columns("prompt", "completion")(data)


def _is_plain_text(data: Mapping[str, Any]) -> bool:
    return isinstance(data.get("text"), str | Mapping) and not is_single_message(data)


SERVED_SCHEMA = "served_tokens"
"""The schema of rows with served tokens. They can contain the messages, too, so it takes precedence."""

COMMON_COLUMNS = ("system", "tools", "functions")
"""Optional columns of most schemas."""

for _name, _columns, _matches, _convert in (
    ("messages", ("messages",), _has_list("messages"), _convert_messages("messages")),
    ("sharegpt", ("conversations",), _has_list("conversations"), _convert_messages("conversations")),
    ("prompt_completion", ("prompt", "completion", "history"), _is_prompt_completion, _prompt_completion),
    ("preference", ("prompt", "chosen", "rejected", "history"), has_columns("chosen", "rejected"), _preference),
    ("alpaca", ("instruction", "output", "input", "history"), has_columns("instruction", "output"), _alpaca),
    ("question_answer", ("question", "answer", "history"), has_columns("question", "answer"), _question_answer),
):
    schemas.register(_name)(Schema((*_columns, *COMMON_COLUMNS), _matches, _convert))
schemas.register("text")(Schema(("text",), _is_plain_text, _plain_text))
_token_columns = ("input_ids", "labels", *MASK_COLUMNS, "attention_mask", "position_ids", "cu_seqlens", *LENGTH_COLUMNS)
schemas.register("tokens")(Schema(_token_columns, _has_list("input_ids"), _read_token_row))
schemas.register(SERVED_SCHEMA)(
    Schema(
        (*SERVED_COLUMNS, "messages", "prompt", "completion", *COMMON_COLUMNS),
        has_columns(*SERVED_COLUMNS[:2]),
        _read_served_row,
    )
)
schemas.register("chat_log")(Schema(COMMON_COLUMNS, lambda _: False, _chat_log))
