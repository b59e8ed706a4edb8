"""Shapes of rows, each with a way to tell it by its columns and one to make a `Conversation` of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from ftdata.errors import BadRow
from ftdata.registry import Registry
from ftdata.schemas.messages import (
    describe_value,
    is_messages,
    is_single_message,
    parse_json_field,
    read_messages,
    read_system,
    read_tools,
)
from ftdata.types import IGNORE_INDEX, Conversation, Message, RowTokens

Convert = Callable[[Mapping[str, Any]], Conversation]
"""What makes a conversation of a row; `BadRow` rejects it, and anything else that is raised is `schema_failed`."""


@dataclass(frozen=True, slots=True)
class Schema:
    """A known row shape: `matches` looks at the keys and types only, `convert` builds the conversation.

    `columns` are the canonical column names, the ones that `columns=` may map.
    """

    columns: tuple[str, ...]
    matches: Callable[[Mapping[str, Any]], bool]
    convert: Convert


schemas: Registry[Schema | Convert] = Registry("ftdata.schemas", "schema")
"""Name -> schema. Those that are a `Schema` and registered in process are found by themselves; others when named."""

ALIASES = {
    "completion": ("response",),
    "output": ("response",),
    "input": ("context",),
    "conversations": ("conversation",),
    "system": ("system_prompt",),
}
"""Other names in common use for a canonical column, taken when the canonical one is absent."""

_MASKS = ("completion_mask", "assistant_masks", "loss_mask")


def log_columns(data: Mapping[str, Any]) -> list[str]:
    """Return the columns that hold a list of messages, whatever their names."""
    return [name for name, value in data.items() if is_messages(parse_json_list(value))]


def parse_json_list(value: Any) -> Any:
    """Return the list that a text is the JSON of: in tables, where a column has one type, lists are often text."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parse_json_field(value, "")
    except BadRow:
        return value


def find_column(data: Mapping[str, Any], column: str) -> str:
    """Return the name under which a row has a canonical column, if it has it."""
    if data.get(column):
        return column
    names = [name for name in (column, *ALIASES.get(column, ())) if name in data]
    # What is null or blank is as good as absent, where another name has more to say.
    return next((name for name in names if data[name] not in (None, "")), names[0] if names else column)


def _get(data: Mapping[str, Any], column: str) -> Any:
    return data.get(find_column(data, column))


def _has(*required: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda data: all(_get(data, name) is not None for name in required)


def _has_list(column: str) -> Callable[[Mapping[str, Any]], bool]:
    def matches(data: Mapping[str, Any]) -> bool:
        value = _get(data, column)
        return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))

    return matches


def _text(data: Mapping[str, Any], column: str) -> str:
    value = _get(data, column)
    if isinstance(value, Mapping):
        if len(value) != 1:
            raise BadRow(
                "nested_cell",
                f"holds {len(value)} values, expected one",
                field=column,
                hint="one row per value, or one column-oriented object in the whole file",
            )
        value = next(iter(value.values()))
    if not isinstance(value, str):
        raise BadRow("content_type", f"is {describe_value(value)}, expected text", field=column)
    return value


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _from_fields(data: Mapping[str, Any], fields: dict[str, str], user: str, assistant: str) -> Conversation:
    before, beside = _context(data)
    messages = (*before, _message("user", user), _message("assistant", assistant))
    return Conversation(
        messages=messages, fields={**fields, **beside}, tools=read_tools(data), completion_from=len(messages) - 1
    )


def _context(data: Mapping[str, Any]) -> tuple[tuple[Message, ...], dict[str, str]]:
    """Return what stands before the question: `system`, and `history` as pairs; as messages, and as fields."""
    fields: dict[str, str] = {}
    system = _system(data)
    if system and isinstance(system[0].get("content"), str):
        fields["system"] = str(system[0].get("content"))
    history = _history(data)
    if history:
        told = parse_json_list(data["history"])
        fields["history"] = orjson.dumps(told).decode()
    return (*system, *history), fields


def _system(data: Mapping[str, Any]) -> tuple[Message, ...]:
    name = find_column(data, "system")
    return ({"role": "system", "content": read_system(data, name)},) if data.get(name) else ()


def _history(data: Mapping[str, Any]) -> tuple[Message, ...]:
    pairs = parse_json_list(data.get("history")) or []
    if is_messages(pairs):
        return read_messages(pairs, "history")
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise BadRow("history_type", "is no list of [question, answer] pairs", field="history")
    return tuple(_message(*turn) for pair in pairs for turn in zip(("user", "assistant"), pair, strict=True))


def _turns(data: Mapping[str, Any], column: str, role: str) -> tuple[Message, ...]:
    """Return a column that holds messages, or the text of one."""
    value = _get(data, column)
    return read_messages(value, column) if _is_chat(value) else (_message(role, _text(data, column)),)


def _is_chat(value: Any) -> bool:
    # What is a text in the data is a text, whatever it spells.
    return isinstance(value, list)


def _prompt_completion(data: Mapping[str, Any]) -> Conversation:
    if _is_chat(_get(data, "prompt")) or _is_chat(_get(data, "completion")):
        before = _opened(data, _turns(data, "prompt", "user"), _history(data))
        after = _turns(data, "completion", "assistant")
        return Conversation(messages=before + after, tools=read_tools(data), completion_from=len(before))
    fields = {"prompt": _text(data, "prompt"), "completion": _text(data, "completion")}
    return _from_fields(data, fields, fields["prompt"], fields["completion"])


def _preference(data: Mapping[str, Any]) -> Conversation:
    """Make the conversation with the answer that was preferred; the other one is left out."""
    chosen, asked = _turns(data, "chosen", "assistant"), _get(data, "prompt")
    whole = _parted(chosen)[1][:1] != () and _parted(chosen)[1][0]["role"] != "assistant"
    if asked is None or (isinstance(asked, str) and not asked.strip()):
        if not whole:
            raise BadRow("no_prompt", "answers nothing: no question is in it, nor in a prompt column", field="chosen")
        messages = chosen
    elif whole:
        # Some data sets repeat the question in both answers.
        messages = _repeated(_turns(data, "prompt", "user"), chosen)
    else:
        messages = _turns(data, "prompt", "user") + chosen
    messages = _opened(data, messages, _history(data))
    return Conversation(messages=messages, tools=read_tools(data), completion_from=last_answer_index(messages))


def _repeated(prompt: tuple[Message, ...], chosen: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return a whole conversation, which must hold its prompt, with the prompt's system message if it has none."""
    (system, asked), (own, told) = _parted(prompt), _parted(chosen)
    said, wanted = [[(one["role"], str(one.get("content")).strip()) for one in part] for part in (told, asked)]
    if not any(said[at : at + len(wanted)] == wanted for at in range(len(said))):
        found = "is a whole conversation, in which the prompt is not"
        raise BadRow("prompt_differs", found, field="chosen", hint="which of the two is asked? take the other out")
    if system and own and system[0].get("content") != own[0].get("content"):
        raise BadRow("two_systems", "begins with another system message than the prompt", field="chosen")
    return (own or system) + told


def _parted(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return the system message that messages begin with, if they do, and the others."""
    at = int(bool(messages) and messages[0]["role"] == "system")
    return messages[:at], messages[at:]


def _alpaca(data: Mapping[str, Any]) -> Conversation:
    fields = {"instruction": _text(data, "instruction"), "output": _text(data, "output")}
    fields["input"] = _text(data, "input") if _get(data, "input") is not None else ""
    user = "\n\n".join(filter(None, (fields["instruction"], fields["input"])))
    return _from_fields(data, fields, user, fields["output"])


def _question_answer(data: Mapping[str, Any]) -> Conversation:
    fields = {"question": _text(data, "question"), "answer": _text(data, "answer")}
    return _from_fields(data, fields, fields["question"], fields["answer"])


def _plain_text(data: Mapping[str, Any]) -> Conversation:
    text = _text(data, "text")
    return Conversation(messages=(), fields={"text": text}, text=text)


_SYSTEMS = {"system", *ALIASES["system"]}


def _opened(
    data: Mapping[str, Any], messages: tuple[Message, ...], history: tuple[Message, ...] = ()
) -> tuple[Message, ...]:
    """Return the messages with the row's own system message and history before them; they may begin with the first."""
    if not history and _SYSTEMS.isdisjoint(data):
        return messages
    system, own = _system(data), _parted(messages)
    if system and own[0] and own[0][0].get("content") != system[0].get("content"):
        raise BadRow("two_systems", "differs from the conversation's own system message", field="system")
    return (*(own[0] or system), *history, *own[1])


def _chat(column: str) -> Convert:
    def convert(data: Mapping[str, Any]) -> Conversation:
        messages = _opened(data, read_messages(data.get(column) or _get(data, column), column))
        return Conversation(messages=messages, tools=read_tools(data), completion_from=last_answer_index(messages))

    return convert


def _log(data: Mapping[str, Any]) -> Conversation:
    columns = log_columns(data)
    if len(columns) != 1:
        raise BadRow("no_messages", "has no column, or several, that hold a list of messages")
    return _chat(columns[0])(data)


def last_answer_index(messages: Sequence[Message]) -> int:
    """Return the index of the last message of the assistant."""
    for index in range(len(messages) - 1, 0, -1):
        if messages[index]["role"] == "assistant":
            return index
    return 0


def _pretokenised(data: Mapping[str, Any]) -> Conversation:
    """Check tokens that were made elsewhere: as many labels, each the id itself or -100, and nothing padded."""
    ids = _whole_numbers(data, "input_ids")
    if not len(ids):
        raise BadRow("no_tokens", "is an empty list, expected ids", field="input_ids")
    for name, whole in (("attention_mask", [1] * len(ids)), ("seq_lengths", [len(ids)])):
        if data.get(name) is not None and _whole_numbers(data, name).tolist() != whole:
            raise BadRow("tokens_shape", "is not that of one unpadded example", field=name, hint="one row per example")
    masks = {name: _mask(data, name, len(ids)) for name in _MASKS if data.get(name) is not None}
    if data.get("labels") is not None:
        labels = _whole_numbers(data, "labels")
        if len(labels) != len(ids):
            raise BadRow("tokens_shape", f"holds {len(labels)} labels for {len(ids)} ids", field="labels")
        trained = labels != IGNORE_INDEX
        if (wrong := np.flatnonzero(trained & (labels != ids))).size:
            at = int(wrong[0])
            found = f"is {labels[at]}, expected the id {ids[at]} itself or {IGNORE_INDEX} (labels are not shifted)"
            raise BadRow("label_value", found, field=f"labels[{at}]")
    elif masks:
        trained = next(iter(masks.values()))
    else:
        hint = f"give labels, or one of {', '.join(_MASKS)}"
        raise BadRow("no_labels", "come without labels: which of them are to be learnt?", field="input_ids", hint=hint)
    for name, mask in masks.items():
        if not np.array_equal(mask, trained):
            at = int(np.flatnonzero(mask != trained)[0])
            other = "labels" if data.get("labels") is not None else next(iter(masks))
            here, there = ("trained", "not trained")[:: 1 if mask[at] else -1]
            found = f"differs from {other}: token {at} is {here} here, and {there} there"
            raise BadRow("two_masks", found, field=f"{name}[{at}]", hint="keep only one of the two")
    return Conversation(messages=(), tokens=RowTokens(ids.astype(np.int32), trained))


def _mask(data: Mapping[str, Any], name: str, length: int) -> Any:
    """Return a column of 0 and 1 as bool `[length]`."""
    values = _whole_numbers(data, name)
    if len(values) != length or not np.isin(values, (0, 1)).all():
        raise BadRow("tokens_shape", f"is no 0 or 1 for each of {length} ids", field=name)
    return values == 1


def _whole_numbers(data: Mapping[str, Any], column: str) -> Any:
    if column not in data:
        raise BadRow("missing_column", "is not there, and this schema needs it", field=column)
    value = parse_json_list(data[column])
    if not isinstance(value, list) or not all(type(one) is int or type(one) is bool for one in value):
        raise BadRow("tokens_type", f"is {describe_value(value)}, expected a list of whole numbers", field=column)
    if any(abs(one) >= 1 << 31 for one in value):
        raise BadRow("tokens_type", "holds numbers that no token has", field=column)
    return np.asarray(value, dtype=np.int64)


def _is_text_pair(first: str, second: str) -> Callable[[Mapping[str, Any]], bool]:
    present = _has(first, second)
    # `instruction` + `response` is Alpaca's shape, not a prompt and its completion.
    return lambda data: present(data) and (first != "prompt" or "instruction" not in data)


def _is_plain_text(data: Mapping[str, Any]) -> bool:
    return isinstance(data.get("text"), str | Mapping) and not is_single_message(data)


BESIDE = ("system", "tools", "functions")
"""Columns that stand beside those of most shapes."""

for _name, _schema in {
    "messages": Schema(("messages", *BESIDE), _has_list("messages"), _chat("messages")),
    "sharegpt": Schema(("conversations", *BESIDE), _has_list("conversations"), _chat("conversations")),
    "prompt_completion": Schema(
        ("prompt", "completion", "history", *BESIDE), _is_text_pair("prompt", "completion"), _prompt_completion
    ),
    "preference": Schema(("prompt", "chosen", "rejected", "history", *BESIDE), _has("chosen", "rejected"), _preference),
    "alpaca": Schema(("instruction", "output", "input", "history", *BESIDE), _has("instruction", "output"), _alpaca),
    "question_answer": Schema(("question", "answer", "history", *BESIDE), _has("question", "answer"), _question_answer),
    "text": Schema(("text",), _is_plain_text, _plain_text),
    "tokens": Schema(
        ("input_ids", "labels", *_MASKS, "attention_mask", "seq_lengths"), _has_list("input_ids"), _pretokenised
    ),
    "chat_log": Schema(BESIDE, lambda _: False, _log),
}.items():
    schemas.register(_name)(_schema)
