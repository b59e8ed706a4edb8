"""Encode and decode the values that the main process and the template worker exchange.

All values are JSON values, because decoding them cannot run code.

The first byte is `M` for MessagePack, or `J` for JSON (integers and strings that MessagePack cannot represent). A frame
to the worker is a list of `[action, template key, encoded arguments, CPU seconds]`. A frame from the worker is a list
of answers, one per request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from ftdata.errors import BadRow
from ftdata.templates.attribution.watched_strings import REPLAYED_METHODS
from ftdata.templates.recorded_runs import Expressions
from ftdata.templates.render_cache import LayoutKey, Slot, TextLayout
from ftdata.types import Conversation, Part, Rendered, SpanKinds, Spans


def encode_values(value: Any) -> bytes:
    """Encode a JSON value as MessagePack, or as JSON text if MessagePack does not support the value.

    Raises:
        BadRow: `not_json`, if the value contains a type that JSON does not support.
        RecursionError: the value is nested too deep.
    """
    try:
        return b"M" + msgspec.msgpack.encode(value)
    except (TypeError, ValueError, OverflowError, NotImplementedError):
        try:
            return b"J" + json.dumps(value).encode()
        except (TypeError, ValueError) as error:
            raise BadRow("not_json", f"the row contains a value that JSON does not support: {error}") from None


def decode_values(body: bytes) -> Any:
    """Decode a JSON value from the bytes that `encode_values` returned.

    Raises:
        ValueError: the bytes are invalid.
    """
    return json.loads(body[1:]) if body[:1] == b"J" else msgspec.msgpack.decode(memoryview(body)[1:])


def encode_conversation(conversation: Conversation) -> dict[str, Any]:
    """Convert a conversation to JSON values. Include only the attributes that `render_chat` uses."""
    return {
        "messages": conversation.messages,
        "fields": conversation.fields,
        "tools": conversation.tools,
        "text": conversation.text,
        "completion_from": conversation.completion_from,
    }


def decode_conversation(values: Mapping[str, Any]) -> Conversation:
    """Create a conversation from the result of `encode_conversation`."""
    messages, tools = tuple(values["messages"]), tuple(values["tools"])
    return Conversation(messages, values["fields"], tools, values["text"], values["completion_from"])


def encode_rendered_row(rendered: Rendered) -> dict[str, Any]:
    """Convert a rendered row to JSON values."""
    spans = Spans.from_spans(rendered.spans)
    return {
        "text": rendered.text,
        "sizes": spans.sizes,
        "kinds": _encode_kinds(spans.kinds),
        "flags": sorted(rendered.flags),
        "options": (rendered.messages, rendered.add_bos, rendered.keep_control),
        **({"ids": rendered.ids} if rendered.ids else {}),
    }


def decode_rendered_row(values: Mapping[str, Any]) -> Rendered:
    """Create a rendered row from the result of `encode_rendered_row`."""
    spans = Spans(values["sizes"], _decode_kinds(values["kinds"]))
    ids = tuple(values.get("ids", ()))
    return Rendered(values["text"], spans, frozenset(values["flags"]), *values["options"])._replace(ids=ids)


def _encode_kinds(kinds: SpanKinds) -> list[Any]:
    return [
        list(map(_NUMBERS.__getitem__, kinds.parts)),
        kinds.messages,
        kinds.generated,
        kinds.has_constant_template_text,
    ]


def _decode_kinds(values: Any) -> SpanKinds:
    parts, messages, generated, has_constant_text = values
    return SpanKinds(tuple(map(_PARTS.__getitem__, parts)), tuple(messages), tuple(generated), has_constant_text)


_PARTS = tuple(Part)
_NUMBERS = {part: number for number, part in enumerate(_PARTS)}


def encode_layout(key: LayoutKey, layout: TextLayout) -> list[Any]:
    """Convert a layout and its key to JSON values."""
    expressions = layout.expressions
    return [
        key,
        [expressions.size, _encode_slices(expressions.calls), expressions.results],
        layout.texts,
        layout.slots,
        layout.equal_values,
        layout.excluded_starts,
        _encode_kinds(layout.kinds),
        sorted(layout.flags),
    ]


def decode_layout(values: Any) -> tuple[LayoutKey, TextLayout]:
    """Create a layout and its key from the result of `encode_layout`.

    Raises:
        ValueError: the layout calls a method that no recorded run calls.
    """
    (messages, turns), (size, calls, results), texts, slots, equal_values, excluded_starts, kinds, flags = values
    expressions = Expressions(size, _decode_slices(calls), _decode_slices(results))
    if unknown := {method for _, method, _ in expressions.calls} - REPLAYED_METHODS:
        raise ValueError(f"the methods {', '.join(sorted(unknown))} cannot be replayed")
    if not expressions.is_bounded or any(
        not (0 <= span < len(texts) and 0 <= value < size + len(calls) and 0 <= text < size)
        for span, value, text in slots
    ):
        raise ValueError("the layout exceeds the limits of recorded runs")
    return (tuple(messages), tuple(turns)), TextLayout(
        expressions,
        tuple(texts),
        tuple(Slot(*slot) for slot in slots),
        _decode_slices(equal_values),
        _decode_slices(excluded_starts),
        _decode_kinds(kinds),
        frozenset(flags),
        len(messages),
    )


def _encode_slices(value: Any) -> Any:
    """Convert all slices in a value to JSON objects, and all tuples to lists."""
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    return [_encode_slices(item) for item in value] if isinstance(value, list | tuple) else value


def _decode_slices(value: Any) -> Any:
    """Reverse `_encode_slices`: convert JSON objects to slices, and lists to tuples."""
    if isinstance(value, dict):
        return slice(*value["slice"])
    return tuple(map(_decode_slices, value)) if isinstance(value, list) else value
