"""Convert messages from common formats to the format that chat templates expect.

| input                                                     | result                                              |
|-----------------------------------------------------------|-----------------------------------------------------|
| `from` / `value`, `speaker` / `text`, ...                 | `role` / `content`                                  |
| `human`, `gpt`, `bard`, `model`, ...                      | `user`, `assistant`                                 |
| `function_call: {name, arguments}`                        | `tool_calls` with one call                          |
| ShareGPT `from: function_call` with JSON text             | an assistant message with `tool_calls`              |
| ShareGPT `from: observation`, `function_response`         | a `tool` message                                    |
| calls without a `function` object                         | calls with `function: {name, arguments}`            |
| `tool_calls`, `tools` as JSON text                        | the parsed list                                     |
| blocks `text`, `thinking`, `tool_use`, `tool_result`      | content, `reasoning_content`, `tool_calls`, `tool`  |
| `train`, `training`, `weight`, `loss`                     | `train`                                             |

Unknown keys are kept, because a template can read them. Null values are dropped, as in transformers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from operator import is_
from typing import Any, cast

from ftdata.errors import BadRow, suggest_names
from ftdata.schemas.answer_text import THINKING_NAMES
from ftdata.schemas.training_fields import TRAIN_FIELDS, check_training_fields, describe_value, is_guarded, read_flag
from ftdata.types import IMAGE_PART, Message

ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "bing", "bard", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function_response", "tool_response"), "tool"),
}
"""Role name in data -> the role that chat templates expect."""

STANDS_FOR = {"ipython": "tool", "observation": "tool", "function": "tool", "environment": "tool"}
"""Role that only some templates support -> the role for all other templates."""

SPECIAL_ROLES = (*STANDS_FOR, "context", "documents", "latest_reminder")
"""Roles that are passed on unchanged to templates that support them."""

_THINKING_START = re.compile(rf"\s*<({THINKING_NAMES})>.*?</\1>", re.DOTALL)
_MAX_KEYS = 1000
"""Maximum number of keys of a message."""

_ROLE_KEYS = ("from", "speaker", "author", "sender")
_CONTENT_KEYS = ("value", "text", "message", "utterance", "content")
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
_BLOCK_ARGUMENT_KEYS = ("input", "arguments", "parameters", "args")
_CHAT_KEYS = {"role", "tool_calls", "function_call", "tool_call_id", "name", "reasoning_content", "thinking", "id"}
_COMMON_KEYS = {*_CHAT_KEYS, *_ROLE_KEYS, *_CONTENT_KEYS, *TRAIN_FIELDS}
_TOOL_ROLES = {"tool", *STANDS_FOR}
_ANSWER_ROLES = {name for name, role in ROLES.items() if role == "assistant"}
_PART_TYPES = {
    "text", "input_text", "output_text", "refusal", "thinking", "reasoning", "tool_use", "tool_result", "file",
    "image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio", "document",
}  # fmt: skip
"""Types of the parts of a message's content."""
_EXPECTED_ROLES = {*ROLES.values(), *SPECIAL_ROLES}


def is_message(value: Any) -> bool:
    """Return whether a value looks like a message: an object with a role, or with an author and a text."""
    return isinstance(value, Mapping) and (
        "role" in value
        or (any(isinstance(value.get(key), str) for key in _ROLE_KEYS) and _find_content_key(value) is not None)
    )


def is_single_message(row: Mapping[str, Any]) -> bool:
    """Return whether a row is a single message. A column `author` does not count, as plain text can have it."""
    return is_message({key: value for key, value in row.items() if key != "author"})


def is_messages(value: Any) -> bool:
    """Return whether a value looks like a conversation: a list of messages."""
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def read_messages(value: Any, field: str) -> tuple[Message, ...]:
    """Convert the messages of a row to the standard format.

    Args:
        value: a list of messages, or its JSON text.
        field: path of the value in the row.

    Raises:
        BadRow: a message is invalid; `field` is the path of the value.
    """
    if isinstance(value, str):
        value = parse_json(value, field)
    if not isinstance(value, list):
        raise BadRow("messages_type", f"is {describe_value(value)}, expected a list of messages", field=field)
    if not value:
        problem = "the list is empty, expected at least one message"
        raise BadRow("no_messages", problem, field=field, hint="add messages, or remove the row")
    messages: list[Message] = []
    for index, item in enumerate(value):
        if plain := plain_message(item):
            messages.append(plain)
        else:
            messages += _read_message(item, f"{field}[{index}]")
    return tuple(messages)


def plain_message(item: Any) -> Message | None:
    """Convert a message with only a known role and a text to the standard format. Return `None` for any other message.

    A message that is already in the standard format is returned without a copy.
    """
    if type(item) is not dict or len(item) != 2:
        return None
    role, content = item.get("role"), item.get("content")
    if type(content) is not str or type(role) is not str or role not in ROLES:
        return None
    standard_role = ROLES[role]
    if standard_role == role and next(iter(item)) == "role":
        return cast("Message", item)
    return {"role": standard_role, "content": content}


def is_canonical(value: Any, messages: tuple[Message, ...]) -> bool:
    """Return whether the messages of a row are already in the standard format, with only `role` and `content`."""
    return (
        isinstance(value, list)
        and len(value) == len(messages)
        and (all(map(is_, value, messages)) or (value == [*messages] and set(map(len, value)) == {2}))
    )


def read_role_name(message: Mapping[str, Any]) -> Any:
    """Return the role of a message as the data contains it, under any of its keys; `None` if there is none."""
    return message.get("role", next((message[key] for key in _ROLE_KEYS if key in message), None))


def message_notes(value: Any) -> Iterator[str]:
    """Yield notes for the report about uncommon role names, and about message keys that only some templates read."""
    for item in value if isinstance(value, list) else ():
        if isinstance(item, Mapping) and plain_message(item) is not item:
            yield from (f"message key {key}" for key in item if key not in _COMMON_KEYS)
            role = read_role_name(item)
            if role not in _ANSWER_ROLES and any(item.get(key) in (1, "true") for key in TRAIN_FIELDS):
                yield f"trained {role}"
            if isinstance(role, str) and role not in _EXPECTED_ROLES:
                yield f"role {role} as {ROLES.get(role.strip().lower(), 'assistant')}"


def read_tools(data: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Read the tool definitions of a row from the column `tools`, or from the column `functions` in older data.

    The column contains a list or its JSON text.
    """
    name = "tools" if data.get("tools") else "functions"
    tools = data.get(name)
    if isinstance(tools, str):
        tools = parse_json(tools, name) if tools.strip() else None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools_type", f"is {describe_value(tools)}, expected a list of JSON schemas", field=name)
    return tuple({"type": "function", "function": tool} if name == "functions" else tool for tool in tools)


def read_system(data: Mapping[str, Any], name: str) -> str | list[dict[str, Any]]:
    """Return the system message of a row: a text, or a list of text parts (Anthropic's format).

    Raises:
        BadRow: the value has another type.
    """
    content = data[name]
    return content if isinstance(content, str) else _read_parts(content, name)


def parse_json(text: str, field: str) -> Any:
    """Parse the JSON text in a field of a row.

    Raises:
        BadRow: the text is not valid JSON.
    """

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise BadRow("duplicate_key", f"an object contains the duplicate key {repeated!r}", field=field)
        return keys

    try:
        # Python's parser supports integers of any size.
        return json.loads(text, object_pairs_hook=unique_keys)
    except BadRow:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRow("json_text", f"the text is not valid JSON: {error}", field=field) from None


def _find_content_key(item: Mapping[str, Any]) -> str | None:
    return next((key for key in _CONTENT_KEYS if key in item), None)


def _read_message(item: Any, field: str) -> Iterator[Message]:
    if not isinstance(item, Mapping):
        problem = f"is {describe_value(item)}, expected an object with role and content"
        hint = 'write each message as {"role": ..., "content": ...}'
        raise BadRow("message_type", problem, field=field, hint=hint)
    if len(item) > _MAX_KEYS:
        raise BadRow("message_type", f"the message has {len(item):,} keys, expected at most {_MAX_KEYS:,}", field=field)
    role, item = _split_role(item, field)
    check_training_fields(item, [key for key in item if key not in TRAIN_FIELDS and is_guarded(str(key))], field)
    message = {key: value for key, value in item.items() if key not in TRAIN_FIELDS and value is not None}
    message = {"role": role, **message}
    trained = [_read_required_flag(item[key], f"{field}.{key}") for key in TRAIN_FIELDS if item.get(key) is not None]
    if trained:
        message["train"] = all(trained)
    if message.get("reasoning_content") and _starts_with_thinking(message.get("content")):
        problem = "the message has reasoning_content, and its content also begins with a thinking block"
        raise BadRow("two_reasonings", problem, field=field, hint="keep only one of them")
    if isinstance(content := message.get("content"), list) and _has_blocks(content):
        yield from cast(Iterator[Message], _split_blocks(message, field))
        return
    message.update(_read_tool_calls(message, field))
    if not isinstance(content, str) and not (role in _TOOL_ROLES and is_tool_result(content)):
        message.update(_check_content(content, has_calls=bool(message.get("tool_calls")), field=f"{field}.content"))
    yield cast(Message, message)


def _starts_with_thinking(content: Any) -> bool:
    return isinstance(content, str) and _THINKING_START.match(content) is not None


def _split_role(item: Mapping[str, Any], field: str) -> tuple[str, Mapping[str, Any]]:
    """Separate the role of a message from its other fields. A text under a key such as `value` becomes `content`."""
    if "role" in item:
        return _read_role(item["role"], f"{field}.role"), {key: value for key, value in item.items() if key != "role"}
    speaker = next((key for key in _ROLE_KEYS if key in item), None)
    if speaker is None:
        problem = f"the role is missing; the message has the keys {', '.join(map(repr, item)) or 'none'}"
        hint = "rename the keys to role and content, or convert rows with a function: schema='./mine.py:convert'"
        raise BadRow("unknown_role", problem, field=f"{field}.role", hint=hint)
    name, text = item[speaker], _find_content_key(item)
    fields = {key: value for key, value in item.items() if key not in (speaker, text)}
    other = next((key for key in _CONTENT_KEYS if isinstance(fields.get(key), str) and fields[key]), None)
    if other is not None and text is not None and fields[other] != item[text]:
        problem = f"the message has both {text} and {other}, and they contain different texts"
        raise BadRow("content_type", problem, field=f"{field}.{other}", hint="remove one of them")
    if name == "function_call":
        calls = parse_json(item[text], f"{field}.{text}") if text and isinstance(item[text], str) else None
        if not isinstance(calls, dict | list):
            message = "the text must contain a tool call, or a list of tool calls, as JSON"
            raise BadRow("tool_calls_type", message, field=f"{field}.{text}")
        return "assistant", {**fields, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    # Speaker names are written by people, so case and whitespace are ignored, unlike in `role`.
    role = _read_role(name.strip().lower() if isinstance(name, str) else name, f"{field}.{speaker}")
    return role, {**fields, "content": item[text]} if text is not None else fields


def _read_role(value: Any, field: str) -> str:
    role = value if value in SPECIAL_ROLES else ROLES.get(value) if isinstance(value, str) else None
    if role is None:
        problem = f"is {describe_value(value)}, expected a role"
        suggestion, _, known = suggest_names(str(value), (*ROLES, *SPECIAL_ROLES)).partition("known: ")
        hint = f"{suggestion}rename it, or convert rows with a function that returns a Conversation: "
        hint += f"schema='./mine.py:convert'; known: {known}"
        raise BadRow("unknown_role", problem, field=field, hint=hint)
    return str(role)


def _read_tool_calls(message: dict[str, Any], field: str) -> dict[str, Any]:
    """Convert the tool calls of a message to the standard format. Arguments can be an object, JSON text or empty."""
    calls, field = message.get("tool_calls"), f"{field}.tool_calls"
    if message.get("function_call"):
        if calls:
            problem = "the message has both tool_calls and function_call, expected only one of them"
            raise BadRow("two_calls", problem, field=field)
        call, field = message.pop("function_call"), field.replace("tool_calls", "function_call")
        calls = [parse_json(call, field) if isinstance(call, str) else call]
    if isinstance(calls, str):
        calls = parse_json(calls, field) if calls.strip() else []
    if calls is None:
        message.pop("tool_calls", None)
        return {}
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRow("tool_calls_type", f"is {describe_value(calls)}, expected a list of objects", field=field)
    return {"tool_calls": [_read_tool_call(call, f"{field}[{index}]") for index, call in enumerate(calls)]}


def _read_tool_call(call: Mapping[str, Any], field: str) -> dict[str, Any]:
    call = {key: value for key, value in call.items() if value is not None}
    if "arguments" in call or "function" in call:
        _check_part({key: value for key, value in call.items() if key not in _ARGUMENT_KEYS}, field)
    function = call.get("function")
    if function is None and isinstance(call.get("name"), str):
        arguments_key, arguments = _find_arguments(call)
        function = {"name": call["name"], "arguments": arguments}
        fields = {key: value for key, value in call.items() if key not in ("name", arguments_key)}
        call = {"type": "function", **fields, "function": function}
    elif isinstance(function, Mapping) and "arguments" not in function:
        owner = function if any(key in function for key in _ARGUMENT_KEYS) else call
        arguments_key, arguments = _find_arguments(owner)
        fields = {key: value for key, value in function.items() if key != arguments_key}
        function = {**fields, "arguments": arguments}
        call = {key: value for key, value in call.items() if key != arguments_key} | {"function": function}
    if isinstance(function, Mapping):
        _check_part({key: value for key, value in function.items() if key != "arguments"}, f"{field}.function")
    text = function.get("arguments") if isinstance(function, Mapping) else None
    if isinstance(text, str) and text.strip():
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = f"the arguments are not valid JSON: {error}"
            raise BadRow("tool_arguments", problem, field=f"{field}.function.arguments") from None
    return dict(call)


def _find_arguments(call: Mapping[str, Any], keys: Sequence[str] = _ARGUMENT_KEYS) -> tuple[str | None, Any]:
    """Return the key and the value of a tool call's arguments. Absent arguments are an empty object."""
    key = next((key for key in keys if key in call), None)
    return key, {} if key is None else call[key]


def _check_content(content: Any, *, has_calls: bool, field: str) -> dict[str, Any]:
    if content is None and has_calls:
        return {}
    if isinstance(content, list) and content and all(part is IMAGE_PART or _is_part(part, "text") for part in content):
        if not all(part is IMAGE_PART or isinstance(part.get("text"), str) for part in content):
            raise BadRow(
                "content_type", "the content part has type 'text', but its field 'text' is not a string", field=field
            )
        for number, part in enumerate(content):
            _check_part(part, f"{field}[{number}]")
        return {"content": [dict(part) for part in content]}
    if isinstance(content, list) and any(isinstance(part, Mapping) and part.get("type") != "text" for part in content):
        others = [part for part in content if part is not IMAGE_PART]
        types = {str(part.get("type")) if isinstance(part, Mapping) else describe_value(part) for part in others}
        kinds = sorted(types - {"text"})
        hint = "remove the parts, or leave out the row; only text, and images for vision-language models, are supported"
        problem = f"the content has parts of unsupported types: {', '.join(kinds)}"
        raise BadRow("content_type", problem, field=field, hint=hint)
    problem = f"is {describe_value(content)}, expected text or a list of text parts"
    hint = "add the text, or remove the message or the row" if content is None else "convert the value to text"
    raise BadRow("content_type", problem, field=field, hint=hint)


def _check_part(part: Mapping[str, Any], field: str) -> None:
    """Reject a content part that is marked as excluded from training. Only whole messages can be excluded."""
    guarded = [key for key in part if key in TRAIN_FIELDS or is_guarded(str(key))]
    for key in guarded:
        if key in TRAIN_FIELDS and part[key] is not None and read_flag(part[key], f"{field}.{key}") is False:
            problem = "a part of a message is excluded from training, but only whole messages can be excluded"
            raise BadRow("part_mask", problem, field=f"{field}.{key}", hint="split it into several messages")
    check_training_fields(part, [key for key in guarded if key not in TRAIN_FIELDS], field)


def is_tool_result(content: Any) -> bool:
    """Return whether the content of a message is a JSON tool result.

    A tool result is an object, or a list of objects that are not content parts.
    """
    if isinstance(content, Mapping):
        return True
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(item, Mapping) and item.get("type") not in _PART_TYPES for item in content)
    )


_BLOCK_ORDER_HINT = "order the blocks as tool_result, thinking, text, tool_use, or split them into several messages"
_BLOCK_TYPES = ("thinking", "tool_use", "tool_result")


def _is_part(part: Any, kind: str) -> bool:
    return isinstance(part, Mapping) and part.get("type") == kind


def _has_blocks(content: list[Any]) -> bool:
    return any(_is_part(part, kind) for part in content for kind in _BLOCK_TYPES)


def _split_blocks(message: dict[str, Any], field: str) -> Iterator[dict[str, Any]]:
    """Convert a message in Anthropic's block format to one or more messages. Messages with tool results come first."""
    if duplicates := [key for key in ("tool_calls", "reasoning_content") if message.get(key)]:
        problem = f"the message has both content blocks and {duplicates[0]}, expected only one of them"
        raise BadRow("block_type", problem, field=f"{field}.content")
    texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for index, block in enumerate(message["content"]):
        block_field = f"{field}.content[{index}]"
        if isinstance(block, Mapping):
            _check_part(block, block_field)
        if _is_part(block, "text") and isinstance(block.get("text"), str):
            if calls:
                problem = "the text follows a tool_use block, and no template renders this order"
                raise BadRow("block_order", problem, field=block_field)
            texts.append(block["text"])
        elif _is_part(block, "thinking") and isinstance(block.get("thinking"), str) and not texts and not calls:
            thoughts.append(block["thinking"])
        elif _is_part(block, "tool_use") and isinstance(block.get("name"), str):
            _, arguments = _find_arguments(block, _BLOCK_ARGUMENT_KEYS)
            function = {"name": block["name"], "arguments": arguments}
            call = {"type": "function", "id": block.get("id", ""), "function": function}
            calls.append(_read_tool_call(call, block_field))
        elif _is_part(block, "tool_result") and not texts and not calls:
            content, call_id = _read_tool_result(block, block_field), block.get("tool_use_id", "")
            flags = {"is_error": True} if block.get("is_error") else {}
            flags |= {"train": message["train"]} if "train" in message else {}
            yield {"role": "tool", "content": content, "tool_call_id": call_id, **flags}
        else:
            problem = f"is {describe_value(block)}, which is not a supported block at this position"
            raise BadRow("block_type", problem, field=block_field, hint=_BLOCK_ORDER_HINT)
    if texts or thoughts or calls:
        content = texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts] or ""
        reasoning = {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
        yield {**message, "content": content, **reasoning, **({"tool_calls": calls} if calls else {})}


def _read_tool_result(block: Mapping[str, Any], field: str) -> str | list[dict[str, Any]]:
    content = block.get("content", "")
    if isinstance(content, list) and len(content) == 1 and _is_part(content[0], "text"):
        _check_part(content[0], f"{field}.content[0]")
        content = content[0].get("text")
    return content if isinstance(content, str) else _read_parts(content, f"{field}.content")


def _read_parts(content: Any, field: str) -> list[dict[str, Any]]:
    return list(_check_content(content, has_calls=False, field=field)["content"])


def _read_required_flag(value: Any, field: str) -> bool:
    flag = read_flag(value, field)
    if flag is None:
        raise BadRow("weight_value", f"is {describe_value(value)}, expected 0 or 1", field=field)
    return flag
