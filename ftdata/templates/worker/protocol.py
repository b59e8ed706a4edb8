"""Messages between this process and the template worker: JSON values only, which cannot run code when they are decoded.

The first byte is `M` for MessagePack, or `J` for JSON (integers and strings that MessagePack cannot represent). A frame
to the worker is a list of `[action, template key, encoded arguments, CPU seconds]`; a frame from it is a list of
answers, one for each request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from ftdata.errors import BadRow
from ftdata.templates.attribution.watched_strings import RecordedOperation
from ftdata.templates.cache.plans import ContentLeaf, RenderPlan
from ftdata.templates.cache.turn_cache import Anchor
from ftdata.types import Conversation, Part, Rendered, SpanKinds, Spans


def encode_values(value: Any) -> bytes:
    """Return plain values as they are sent.

    Raises:
        BadRow: `not_json`: there are values of other types among them.
        RecursionError: they are nested too deep.
    """
    try:
        return b"M" + msgspec.msgpack.encode(value)
    except (TypeError, ValueError, OverflowError, NotImplementedError):
        try:
            return b"J" + json.dumps(value).encode()
        except (TypeError, ValueError) as error:
            raise BadRow("not_json", f"holds what JSON does not: {error}") from None


def decode_values(body: bytes) -> Any:
    """Return the values that `encode_values` encoded.

    Raises:
        ValueError: the bytes are not such values.
    """
    return json.loads(body[1:]) if body[:1] == b"J" else msgspec.msgpack.decode(memoryview(body)[1:])


def encode_conversation(conversation: Conversation) -> dict[str, Any]:
    """Return what of a conversation is rendered."""
    return {
        "messages": conversation.messages,
        "fields": conversation.fields,
        "tools": conversation.tools,
        "text": conversation.text,
        "completion_from": conversation.completion_from,
    }


def decode_conversation(known: Mapping[str, Any]) -> Conversation:
    """Return a conversation."""
    messages, tools = tuple(known["messages"]), tuple(known["tools"])
    return Conversation(messages, known["fields"], tools, known["text"], known["completion_from"])


def encode_rendered_row(one: Rendered) -> dict[str, Any]:
    """Return a rendered text."""
    spans = Spans.of(one.spans)
    return {
        "text": one.text,
        "sizes": spans.sizes,
        "kinds": _of_kinds(spans.kinds),
        "flags": sorted(one.flags),
        "rest": (one.messages, one.add_bos, one.keep_control),
    }


def decode_rendered_row(known: Mapping[str, Any]) -> Rendered:
    """Return a rendered text."""
    spans = Spans(known["sizes"], _kinds(known["kinds"]))
    return Rendered(known["text"], spans, frozenset(known["flags"]), *known["rest"])


def _of_kinds(kinds: SpanKinds) -> list[Any]:
    return [list(map(_NUMBERS.__getitem__, kinds.parts)), kinds.messages, kinds.generated, kinds.followed]


def _kinds(known: Any) -> SpanKinds:
    parts, messages, generated, followed = known
    return SpanKinds(tuple(map(_PARTS.__getitem__, parts)), tuple(messages), tuple(generated), followed)


_PARTS = tuple(Part)
_NUMBERS = {part: number for number, part in enumerate(_PARTS)}


def encode_plan(plan: RenderPlan) -> list[Any]:
    """Return a plan."""
    leaves = [(at, (leaf.message, leaf.changes, leaf.manner)) for at, leaf in plan.leaves]
    questions = [(one.asked, one.answer) for one in plan.questions]
    return [plan.texts, _packed(leaves), _of_kinds(plan.kinds), sorted(plan.flags), _packed(questions), plan.unlike]


def decode_plan(known: Any) -> RenderPlan:
    """Return a plan."""
    texts, leaves, kinds, flags, questions, unlike = known
    return RenderPlan(
        tuple(texts),
        tuple((at, ContentLeaf(*leaf)) for at, leaf in _unpacked(leaves)),
        _kinds(kinds),
        frozenset(flags),
        tuple(RecordedOperation(*one) for one in _unpacked(questions)),
        tuple((_anchor(place), other) for place, other in unlike),
    )


def _anchor(place: Any) -> Anchor:
    index, offset = place
    return index, offset


def _packed(value: Any) -> Any:
    """Return a value with slices marked; lists and tuples are both lists."""
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    return [_packed(one) for one in value] if isinstance(value, list | tuple) else value


def _unpacked(value: Any) -> Any:
    """Return a value with tuples for lists."""
    if isinstance(value, dict):
        return slice(*value["slice"])
    return tuple(map(_unpacked, value)) if isinstance(value, list) else value
