"""Normalise: a row of any known shape -> `Conversation`. The shape is found per row, never assumed from the first.

| schema              | a row has                                            | becomes                           |
|---------------------|------------------------------------------------------|-----------------------------------|
| `messages`          | `messages` (or the row is a list): role/content      | itself                            |
| `sharegpt`          | `conversations`: from/value                          | roles mapped                      |
| `prompt_completion` | `prompt`, `completion`: strings or message lists     | user, assistant                   |
| `alpaca`            | `instruction`, `output`, maybe `input`               | user (instruction + input), assistant |
| `question_answer`   | `question`, `answer`                                 | user, assistant                   |
| `text`              | `text`                                               | already formatted, all trained    |

A cell may itself be an object with one value (`{"question": {"0": "How ..."}}`): the value is taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import orjson

from ftdata.errors import BadRow, UsageError, nearest
from ftdata.registry import Registry
from ftdata.types import Conversation, Message, Row

Convert = Callable[[Mapping[str, Any]], Conversation]


@dataclass(frozen=True, slots=True)
class Schema:
    """A known row shape: `matches` looks at the keys and types only, `convert` builds the conversation.

    `columns` are the canonical column names, the ones that `columns=` may map.
    """

    columns: tuple[str, ...]
    matches: Callable[[Mapping[str, Any]], bool]
    convert: Convert


schemas: Registry[Schema | Convert] = Registry("ftdata.schemas", "schema")

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
"""Role spellings in use (compared in lower case) -> the role that chat templates know."""

STANDS_FOR = {"ipython": "tool", "observation": "tool", "function": "tool", "environment": "tool"}
"""Roles that only some templates know -> what they stand for elsewhere."""

SPECIAL_ROLES = (*STANDS_FOR, "context", "documents", "latest_reminder")
"""Roles that go through to templates that name them."""

ALIASES = {"completion": ("response",), "output": ("response",), "conversations": ("conversation",)}
"""Other names in common use for a canonical column, taken when the canonical one is absent."""

_MESSAGE_KEYS = frozenset(
    {"role", "content", "reasoning_content", "thinking", "reasoning", "tool_calls", "tool_call_id", "name"}
)
_SHAREGPT_KEYS = {"from": "role", "value": "content"}
_TRAIN_KEYS = ("train", "training", "weight", "loss")


def normalise(row: Row, schema: str = "auto", columns: Mapping[str, str] | None = None) -> Conversation:
    """Turn one row into a conversation.

    Args:
        row: the row as read.
        schema: `"auto"`, or the name of the schema that every row must have: a known one, or `./file.py:function`
            of one that turns a row into a `Conversation`.
        columns: canonical column name -> the name in the data, e.g. `{"instruction": "q", "output": "a"}`.

    Raises:
        BadRow: the shape is unknown or ambiguous, or a value is not what its column needs; names the field.
        UsageError: no schema has this name.

    >>> from ftdata.types import Source
    >>> row = Row({"question": "2+2?", "answer": "4"}, Source("data.jsonl", 0, 1))
    >>> normalise(row).messages
    ({'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'})
    """
    try:
        data = _mapped(row.data, columns)
        name = _detect(data) if schema == "auto" else schema
        chosen = schemas.get(name)
        conversation = chosen.convert(data) if isinstance(chosen, Schema) else chosen(data)
    except BadRow as error:
        where = f"{row.source} {error.field}".rstrip()
        raise BadRow(error.code, error.message, where=where, hint=error.hint, field=error.field) from None
    return Conversation(
        messages=conversation.messages,
        fields=conversation.fields,
        tools=conversation.tools,
        text=conversation.text,
        completion_from=conversation.completion_from,
        schema=name,
        source=row.source,
    )


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Refuse a `columns=` mapping whose keys are no canonical column of any schema.

    Raises:
        UsageError: with the nearest canonical name.
    """
    known = {name for schema in _known().values() for name in schema.columns}
    for name in columns or {}:
        if name not in known:
            raise UsageError(
                "unknown_column", f"columns= maps {name!r}, which no schema has", hint=nearest(name, known)
            )


def _known() -> dict[str, Schema]:
    return {name: schema for name, schema in schemas.own().items() if isinstance(schema, Schema)}


def _mapped(data: Any, columns: Mapping[str, str] | None) -> Mapping[str, Any]:
    if isinstance(data, list):
        return {"messages": data}
    if isinstance(data, Mapping) and data.get("chat_template_kwargs"):
        raise BadRow(
            "row_options",
            "sets template options for this row alone, which is not supported",
            field="chat_template_kwargs",
            hint="take the column out, and pass template_kwargs= for the whole build",
        )
    if not isinstance(data, Mapping):
        raise BadRow("not_a_row", f"is a {type(data).__name__}, expected an object or a list of messages")
    if not columns:
        return data
    mapped = {key: value for key, value in data.items() if key not in columns.values()}
    for canonical, actual in columns.items():
        if actual not in data:
            raise BadRow(
                "missing_column",
                f"has no column {actual!r}, which columns= names for {canonical!r}",
                field=actual,
                hint=nearest(actual, map(str, data)),
            )
        mapped[canonical] = data[actual]
    return mapped


def _detect(data: Mapping[str, Any]) -> str:
    found = [name for name, schema in _known().items() if schema.matches(data)]
    if len(found) == 1:
        return found[0]
    present = ", ".join(map(repr, data)) or "none"
    if found:
        raise BadRow(
            "ambiguous_schema",
            f"fits several schemas ({', '.join(found)}); its columns: {present}",
            hint=f"say which with schema={found[0]!r}",
        )
    if _MESSAGE_KEYS >= set(data) >= {"role"}:
        raise BadRow(
            "one_message",
            "is a single message; a row is a whole conversation",
            hint="put each conversation's messages in a list of their own",
        )
    candidates = "; ".join(f"{name}: {', '.join(s.columns)}" for name, s in _known().items())
    raise BadRow(
        "unknown_schema",
        f"has no known shape; its columns: {present}",
        hint=f"map its columns with columns=, e.g. columns={{'prompt': ..., 'completion': ...}}. "
        f"Known shapes: {candidates}",
    )


def _get(data: Mapping[str, Any], column: str) -> Any:
    for name in (column, *ALIASES.get(column, ())):
        if name in data:
            return data[name]
    return None


def _has(*required: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda data: all(_get(data, name) is not None for name in required)


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
        raise BadRow("content_type", f"is {_describe(value)}, expected text", field=column)
    return value


def _describe(value: Any) -> str:
    if value is None:
        return "null or absent"
    return f"{type(value).__name__} {str(value)[:60]!r}"


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _from_fields(data: Mapping[str, Any], fields: dict[str, str], user: str, assistant: str) -> Conversation:
    before, beside = _context(data)
    messages = (*before, _message("user", user), _message("assistant", assistant))
    return Conversation(messages=messages, fields={**fields, **beside}, completion_from=len(messages) - 1)


def _context(data: Mapping[str, Any]) -> tuple[tuple[Message, ...], dict[str, str]]:
    """Return what stands before the question: `system`, and `history` as pairs; as messages, and as fields."""
    messages: list[Message] = []
    fields: dict[str, str] = {}
    if data.get("system"):
        fields["system"] = _text(data, "system")
        messages.append(_message("system", fields["system"]))
    history = data.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise BadRow("history_type", "is no list of [question, answer] pairs", field="history")
    for question, answer in history:
        messages += _message("user", question), _message("assistant", answer)
    if history:
        fields["history"] = orjson.dumps(history).decode()
    return tuple(messages), fields


def _prompt_completion(data: Mapping[str, Any]) -> Conversation:
    prompt, completion = _get(data, "prompt"), _get(data, "completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        before = _messages(prompt, "prompt") if isinstance(prompt, list) else (_message("user", _text(data, "prompt")),)
        after = (
            _messages(completion, "completion")
            if isinstance(completion, list)
            else (_message("assistant", _text(data, "completion")),)
        )
        return Conversation(messages=before + after, tools=_tools(data), completion_from=len(before))
    fields = {"prompt": _text(data, "prompt"), "completion": _text(data, "completion")}
    return _from_fields(data, fields, fields["prompt"], fields["completion"])


def _alpaca(data: Mapping[str, Any]) -> Conversation:
    fields = {"instruction": _text(data, "instruction"), "output": _text(data, "output")}
    fields["input"] = _text(data, "input") if data.get("input") is not None else ""
    user = f"{fields['instruction']}\n\n{fields['input']}" if fields["input"] else fields["instruction"]
    return _from_fields(data, fields, user, fields["output"])


def _question_answer(data: Mapping[str, Any]) -> Conversation:
    fields = {"question": _text(data, "question"), "answer": _text(data, "answer")}
    return _from_fields(data, fields, fields["question"], fields["answer"])


def _plain_text(data: Mapping[str, Any]) -> Conversation:
    text = _text(data, "text")
    return Conversation(messages=(), fields={"text": text}, text=text)


def _chat(column: str) -> Convert:
    def convert(data: Mapping[str, Any]) -> Conversation:
        messages = _messages(_get(data, column), column)
        if data.get("system"):
            system = _message("system", _text(data, "system"))
            if messages[0]["role"] != "system":
                messages = (system, *messages)
            elif messages[0].get("content") != system["content"]:
                raise BadRow("two_systems", "differs from the conversation's own system message", field="system")
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
        return Conversation(messages=messages, tools=_tools(data), completion_from=last)

    return convert


def _tools(data: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = data.get("tools")
    if isinstance(tools, str):
        # TRL takes a JSON string too, for columns that must have one type.
        try:
            tools = orjson.loads(tools) if tools.strip() else None
        except orjson.JSONDecodeError as error:
            raise BadRow("tools_type", f"is text that is not JSON: {error}", field="tools") from None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools_type", f"is {_describe(tools)}, expected a list of JSON schemas", field="tools")
    return tuple(tools)


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise BadRow("messages_type", f"is {_describe(value)}, expected a list of messages", field=column)
    if not value:
        raise BadRow("no_messages", "is an empty list, expected messages", field=column)
    return tuple(_one_message(item, f"{column}[{index}]") for index, item in enumerate(value))


def _one_message(item: Any, field: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow("message_type", f"is {_describe(item)}, expected an object with role and content", field=field)
    if "role" not in item and "from" in item:
        item = {_SHAREGPT_KEYS.get(key, key): value for key, value in item.items()}
    # Keys that we do not know are kept: a template may read them. Nulls are absent, as transformers has it.
    message = {key: value for key, value in item.items() if key not in _TRAIN_KEYS and value is not None}
    message["role"] = _role(message.get("role"), f"{field}.role")
    if not isinstance(content := message.get("content"), str):
        message.update(_structured_content(content, bool(message.get("tool_calls")), f"{field}.content"))
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{field}.tool_calls")
    trained = [_flag(item[key], f"{field}.{key}") for key in _TRAIN_KEYS if item.get(key) is not None]
    if trained:
        message["train"] = all(trained)
    return cast(Message, message)


def _tool_calls(calls: Any, field: str) -> list[dict[str, Any]]:
    """Return the calls as given; arguments that are text must be JSON, as OpenAI writes them, or nothing."""
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRow("tool_calls_type", f"is {_describe(calls)}, expected a list of objects", field=field)
    for index, call in enumerate(calls):
        function = call.get("function")
        text = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(text, str) and text.strip():
            try:
                json.loads(text)
            except (ValueError, RecursionError) as error:
                place = f"{field}[{index}].function.arguments"
                raise BadRow("tool_arguments", f"is text that is not JSON: {error}", field=place) from None
    return [dict(call) for call in calls]


def _role(value: Any, field: str) -> str:
    if value in SPECIAL_ROLES:
        return str(value)
    known = ROLES.get(value.strip().lower()) if isinstance(value, str) else None
    if known is None:
        found = f"is {_describe(value)}, no role"
        raise BadRow("unknown_role", found, field=field, hint=nearest(str(value), (*ROLES, *SPECIAL_ROLES)))
    return known


def _structured_content(content: Any, has_calls: bool, field: str) -> dict[str, Any]:
    if content is None and has_calls:
        return {}
    if (
        isinstance(content, list)
        and content
        and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content)
    ):
        if not all(isinstance(part.get("text"), str) for part in content):
            raise BadRow("content_type", "has a text part without text", field=field)
        return {"content": [dict(part) for part in content]}
    raise BadRow("content_type", f"is {_describe(content)}, expected text or a list of text parts", field=field)


def _flag(value: Any, field: str) -> bool:
    if value in (0, 1):
        return bool(value)
    raise BadRow(
        "weight_value", f"is {_describe(value)}, expected 0 or 1 (a token is trained or it is not)", field=field
    )


def _is_text_pair(first: str, second: str) -> Callable[[Mapping[str, Any]], bool]:
    present = _has(first, second)
    # `instruction` + `response` is Alpaca's shape, not a prompt and its completion.
    return lambda data: present(data) and (first != "prompt" or "instruction" not in data)


schemas.register("messages")(
    Schema(("messages", "tools"), lambda d: isinstance(d.get("messages"), list), _chat("messages"))
)
schemas.register("sharegpt")(
    Schema(
        ("conversations", "system", "tools"),
        lambda d: isinstance(_get(d, "conversations"), list),
        _chat("conversations"),
    )
)
schemas.register("prompt_completion")(
    Schema(("prompt", "completion"), _is_text_pair("prompt", "completion"), _prompt_completion)
)
schemas.register("alpaca")(Schema(("instruction", "output", "input"), _has("instruction", "output"), _alpaca))
schemas.register("question_answer")(Schema(("question", "answer"), _has("question", "answer"), _question_answer))
schemas.register("text")(Schema(("text",), lambda d: isinstance(d.get("text"), str | Mapping), _plain_text))
