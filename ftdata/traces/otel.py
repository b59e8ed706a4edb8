"""Convert OpenTelemetry spans and logs with the semantic conventions for generative AI.

The spans are those of an OTLP exporter (`resourceSpans`), or flat objects with `attributes`. Only spans of model calls
contain the conversation. Each call repeats the messages before it, so the calls are joined (`join_calls`). The
conventions are those from version 1.37, the events of earlier versions, and the numbered attributes of OpenLLMetry.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ftdata.traces.calls import Call, conversation_key, join_calls
from ftdata.traces.rows import Session
from ftdata.traces.steps import (
    BadRecord,
    Context,
    Step,
    check_unknown,
    convert_structure_errors,
    get_mapping,
    make_call,
    make_content,
    make_result,
    number_names,
    read_call,
    to_text,
)
from ftdata.traces.tools import read_tool

CONTAINERS = {
    "resourceSpans": "scopeSpans", "resource_spans": "scope_spans", "resourceLogs": "scopeLogs",
    "resource_logs": "scope_logs", "scopeSpans": "spans", "scope_spans": "spans", "scopeLogs": "logRecords",
    "scope_logs": "log_records",
}  # fmt: skip
_ITEMS = ("spans", "logRecords", "log_records")

_VALUE_KEYS = {
    "arrayValue", "boolValue", "bytesValue", "doubleValue", "intValue", "kvlistValue", "stringValue",
}  # fmt: skip
"""Keys of an `AnyValue`, which has at most one of them."""

_INFERENCE = ("chat", "generate_content", "text_completion")
_PREFIX = "gen_ai."
_NUMBERED = re.compile(r"gen_ai\.(prompt|completion)\.(\d+)\.(.+)")
_NUMBERED_CALL = re.compile(r"tool_calls\.(\d+)\.(.+)")
_UNLOGGED_PARTS = {
    "server_tool_call": "server_calls_without_result",
    "server_tool_call_response": "server_calls_without_result",
    "compaction": "encrypted_summaries",
}
"""Types of parts that chat messages cannot represent -> the anomaly that counts them."""

_OLD_EVENTS = {
    "gen_ai.system.message": "system", "gen_ai.user.message": "user", "gen_ai.assistant.message": "assistant",
    "gen_ai.tool.message": "tool", "gen_ai.choice": "assistant",
}  # fmt: skip
_DETAILS = "gen_ai.client.inference.operation.details"
"""The event with the messages of a call, if its span does not contain them."""

_TOOL_ATTRIBUTES = ("gen_ai.tool.definitions", "gen_ai.request.tools", "gen_ai.tool_definitions")


def is_otel_record(record: Mapping[str, Any]) -> bool:
    """Return whether an object contains spans or logs of generative AI."""
    if any(isinstance(record.get(key), list) for key in CONTAINERS):
        return True
    attributes = record.get("attributes")
    names = [item.get("key") for item in attributes if isinstance(item, Mapping)] if isinstance(attributes, list) else (
        [*attributes] if isinstance(attributes, Mapping) else []
    )  # fmt: skip
    return any(str(name).startswith(_PREFIX) for name in names) or str(record.get("eventName")).startswith(_PREFIX)


def flatten_otel(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the spans and logs of a record."""
    lists = [record[key] for key in (*CONTAINERS, *_ITEMS) if isinstance(record.get(key), list)]
    if not lists:
        return [record]
    return [span for items in lists for item in items if isinstance(item, Mapping) for span in flatten_otel(item)]


class _Span(NamedTuple):
    """A span or log with plain attributes.

    Attributes:
        number: index of its record.
        ids: ids of the trace and of the span.
        start: start time, for sorting.
        attributes: the attributes, with parsed JSON texts.
        event: name of the event, for a log.
        body: body of a log.
        events: name and attributes of each event of a span.
        failed: whether the span reports an error.
    """

    number: int
    ids: tuple[str, str]
    start: tuple[float, str]
    attributes: dict[str, Any]
    event: str
    body: Any
    events: Sequence[tuple[str, dict[str, Any]]]
    failed: bool


def read_otel_session(records: Sequence[Mapping[str, Any]], ignored: frozenset[str] = frozenset()) -> Session:
    """Convert spans and logs.

    Raises:
        BadRecord: `unknown_record_type`, for a message part of an unknown type; `missing_context`, if a call contains
            only the messages since the call before.
    """
    reader = _Reader(ignored)
    spans = [_read_span(number, record) for number, record in enumerate(records)]
    groups = defaultdict[str, list[Call]](list)
    models, seen = dict[str, None](), set[tuple[str, int]]()
    for span, logs in reader.merge_logs(spans):
        with convert_structure_errors(span.number):
            call = reader.read_call(span, logs)
        if call is not None and (key := (span.ids[0], conversation_key(call))) in seen:
            # Several instrumentations logged the same call.
            reader.categories[span.number] = "duplicates"
        elif call is not None:
            seen.add(key)
            groups[str(span.attributes.get("gen_ai.conversation.id") or span.ids[0])].append(call)
            for name in ("gen_ai.response.model", "gen_ai.request.model"):
                models |= {span.attributes[name]: None} if isinstance(span.attributes.get(name), str) else {}
    results = _tool_results(spans)
    contexts = [
        context for name, calls in groups.items() for context in _make_contexts(name, calls, results, reader.anomalies)
    ]
    for step in (step for context in contexts for step in context.steps):
        reader.categories.pop(step.record, None)
    contexts.sort(key=lambda context: max(step.record for step in context.steps))
    return Session("otel", len(records), contexts, reader.categories, {"models": [*models]}, reader.anomalies)


def _make_contexts(
    name: str, calls: Sequence[Call], results: Mapping[str, Step], anomalies: Counter[str]
) -> Iterator[Context]:
    conversations = [*join_calls(calls, anomalies)]
    labels = number_names(name, len(conversations))
    for label, conversation in zip(labels, conversations, strict=True):
        last_calls = {call["id"] for message in conversation.output for call in message.get("tool_calls", ())}
        # No later call of the model repeats these results.
        last_results = [step for call_id, step in results.items() if call_id in last_calls]
        yield Context(label, [*conversation.steps, *last_results], conversation.tools)


def _tool_results(spans: Sequence[_Span]) -> dict[str, Step]:
    """Return the results in the spans of tool calls by the id of the call, in the order of their start."""
    results = dict[str, Step]()
    for span in sorted(spans, key=lambda span: span.start):
        call_id, value = (span.attributes.get(f"gen_ai.tool.call.{name}") for name in ("id", "result"))
        if isinstance(call_id, str) and value is not None:
            text = to_text(value)
            results[call_id] = Step("result", make_result(call_id, text), span.number)
    return results


class _Reader:
    def __init__(self, ignored: frozenset[str]) -> None:
        self.ignored = ignored
        self.categories = dict[int, str]()
        self.anomalies = Counter[str]()

    def merge_logs(self, spans: Sequence[_Span]) -> Iterator[tuple[_Span, Sequence[_Span]]]:
        """Yield each span, in the order of start times, with the logs that belong to it."""
        logs = defaultdict[tuple[str, str], list[_Span]](list)
        seen = set[tuple[str, str]]()
        unique = list[_Span]()
        details = {span.ids: span for span in spans if span.event == _DETAILS and span.ids[1]}
        with_span = {span.ids for span in spans if not span.event}
        for original in spans:
            span = original
            if span.event in _OLD_EVENTS:
                logs[span.ids].append(span)
            elif span.event == _DETAILS and span.ids in with_span:
                self.categories[span.number] = "metadata"
            elif not span.event and span.ids in details:
                attributes = {**details[span.ids].attributes, **span.attributes}
                unique.append(span._replace(attributes=attributes))
                seen |= {span.ids}
            elif span.ids[1] and span.ids in seen:
                self.categories[span.number] = "duplicates"
            else:
                unique.append(span)
                seen |= {span.ids}
        for span in sorted(unique, key=lambda span: span.start):
            yield span, sorted(logs.pop(span.ids, ()), key=lambda log: log.start)
        for ids, items in logs.items():
            if ids[1] or ids[0]:
                items.sort(key=lambda log: log.start)
                yield items[0]._replace(event="", attributes={"gen_ai.operation.name": "chat"}), items

    def read_call(self, span: _Span, logs: Sequence[_Span]) -> Call | None:
        """Convert a span of a model call. Record the category of any other span."""
        self.categories.setdefault(span.number, "metadata")
        operation = span.attributes.get("gen_ai.operation.name")
        sent = span.attributes.get("gen_ai.input.messages")
        generated = span.attributes.get("gen_ai.output.messages")
        if operation not in _INFERENCE and not (operation is None and (generated or _is_numbered(span.attributes))):
            return None
        inputs = self._read_messages(sent, span.number)
        outputs = self._read_messages(generated, span.number)
        for name, values in (*((log.event, _log_body(log)) for log in logs), *span.events):
            if name in _OLD_EVENTS:
                (outputs if name == "gen_ai.choice" else inputs).append(_read_old_event(name, values, span.number))
        inputs += _read_numbered(span.attributes, "prompt", span.number)
        outputs += _read_numbered(span.attributes, "completion", span.number)
        for log in logs:
            self.categories[log.number] = "duplicates" if log.number != span.number else "metadata"
        outputs = [message for message in outputs if message["content"] or message.get("tool_calls")]
        if not outputs or not inputs or span.failed:
            self.categories[span.number] = "errors" if span.failed else "missing_content"
            return None
        if inputs[0]["role"] == "tool":
            problem = "the call contains only the messages since an earlier call, so its context is unknown"
            raise BadRecord(span.number, "missing_context", problem, hint="log the whole input of each call")
        system = span.attributes.get("gen_ai.system_instructions")
        text = system if isinstance(system, str) else make_content([part.get("content", "") for part in system or ()])
        tools = next((span.attributes[name] for name in _TOOL_ATTRIBUTES if span.attributes.get(name)), None)
        tools = _read_numbered_tools(span.attributes) if tools is None else tools
        del self.categories[span.number]
        definitions = [read_tool(tool) for tool in tools if isinstance(tool, Mapping)]
        instructions = text if isinstance(text, str) else "\n".join(map(str, text))
        return Call(span.number, instructions, inputs, [[message] for message in outputs], definitions)

    def _read_messages(self, messages: Any, number: int) -> list[dict[str, Any]]:
        return [
            standard
            for message in messages or ()
            if isinstance(message, Mapping)
            for standard in self._read_message(message, number)
        ]

    def _read_message(self, message: Mapping[str, Any], number: int) -> Iterator[dict[str, Any]]:
        """Convert a message with parts. Its results of tool calls become messages before it."""
        parts = message.get("parts")
        ordered = list[tuple[str, Any]]()
        for part in parts if isinstance(parts, list) else [{"type": "text", "content": message.get("content") or ""}]:
            kind = str(part.get("type"))
            if kind == "text":
                ordered.append(("text", str(part.get("content", ""))))
            elif kind == "reasoning":
                ordered.append(("reasoning", str(part.get("content", ""))))
            elif kind == "tool_call":
                arguments = part.get("arguments")
                call_id = str(part.get("id") or f"call_{number}_{len(ordered)}")
                call = make_call(str(part.get("name")), {} if arguments is None else arguments, call_id)
                ordered.append(("call", call))
            elif kind == "tool_call_response":
                value = part.get("response", part.get("result"))
                text = to_text(value)
                yield {"role": "tool", "tool_call_id": str(part.get("id") or ""), "content": text}
            elif kind in ("blob", "uri") and part.get("modality") == "image":
                url = part.get("uri") or f"data:{part.get('mime_type')};base64,{part.get('content')}"
                ordered.append(("text", {"type": "image_url", "image_url": {"url": url}}))
            elif kind in _UNLOGGED_PARTS:
                self.anomalies[_UNLOGGED_PARTS[kind]] += 1
            else:
                check_unknown(number, "content type", kind, "OpenTelemetry", self.ignored)
        if ordered:
            texts = [value for kind, value in ordered if kind == "text"]
            calls = [value for kind, value in ordered if kind == "call"]
            standard = {"role": str(message.get("role", "user")), "content": make_content(texts)}
            yield standard | ({"tool_calls": calls} if calls else {}) | {"parts": ordered}


def _read_span(number: int, record: Mapping[str, Any]) -> _Span:
    context = get_mapping(record, "context") or record
    ids = tuple(str(_first(context, *names) or "") for names in (("traceId", "trace_id"), ("spanId", "span_id")))
    start = _first(record, "startTimeUnixNano", "start_time_unix_nano", "timeUnixNano", "start_time", "timestamp") or 0
    try:
        order = float(start), ""
    except (TypeError, ValueError):
        order = 0.0, str(start)
    attributes = _read_attributes(record.get("attributes"))
    event = record.get("eventName") or record.get("event_name") or attributes.get("event.name") or ""
    status = get_mapping(record, "status")
    failed = bool(attributes.get("error.type")) or _first(status, "code", "status_code") in (
        2, "ERROR", "STATUS_CODE_ERROR",
    )  # fmt: skip
    events = [(str(item.get("name")), _read_attributes(item.get("attributes"))) for item in record.get("events") or ()]
    return _Span(number, (ids[0], ids[1]), order, attributes, str(event), record.get("body"), events, failed)


def _first(values: Mapping[str, Any], *names: str) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _read_attributes(attributes: Any) -> dict[str, Any]:
    """Return attributes as a dict, from a list of keys and values or from an object."""
    if isinstance(attributes, Mapping):
        return {key: _parse_text(key, value) for key, value in attributes.items()}
    pairs = [item for item in attributes or () if isinstance(item, Mapping)]
    return {item["key"]: _parse_text(item["key"], _plain_value(item.get("value"))) for item in pairs}


def _plain_value(value: Any) -> Any:
    """Convert an `AnyValue` of OTLP to a plain value."""
    if not isinstance(value, Mapping) or not value.keys() <= _VALUE_KEYS:
        return value
    if "arrayValue" in value:
        return [_plain_value(item) for item in (value["arrayValue"] or {}).get("values") or ()]
    if "kvlistValue" in value:
        pairs = (value["kvlistValue"] or {}).get("values") or ()
        return {item["key"]: _plain_value(item.get("value")) for item in pairs}
    return next(iter(value.values()), None)


def _parse_text(name: str, value: Any) -> Any:
    """Parse the JSON text of an attribute with messages or tools."""
    if not isinstance(value, str) or not name.endswith(("messages", "instructions", "definitions", "tools")):
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        return value
    return parsed if isinstance(parsed, list | dict) else value


def _log_body(log: _Span) -> dict[str, Any]:
    body = _plain_value(log.body)
    return {**log.attributes, **body} if isinstance(body, Mapping) else log.attributes


def _read_old_event(name: str, values: Mapping[str, Any], number: int) -> dict[str, Any]:
    message = values["message"] if isinstance(values.get("message"), Mapping) else values
    calls = message.get("tool_calls") or values.get("tool_calls") or ()
    calls = json.loads(calls) if isinstance(calls, str) else calls
    content = message.get("content") or ""
    standard: dict[str, Any] = {
        "role": str(message.get("role") or _OLD_EVENTS[name]),
        "content": to_text(content),
    }
    if calls:
        standard["tool_calls"] = [read_call(call, f"call_{number}_{position}") for position, call in enumerate(calls)]
    if name == "gen_ai.tool.message":
        standard["tool_call_id"] = str(message.get("id") or "")
    return standard


_NUMBERED_TOOL = re.compile(r"llm\.request\.functions\.(\d+)\.(name|description|parameters)")


def _read_numbered_tools(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the tools in the numbered attributes of OpenLLMetry."""
    tools = defaultdict[int, dict[str, Any]](dict)
    for name, value in attributes.items():
        if match := _NUMBERED_TOOL.fullmatch(name):
            is_schema = match[2] == "parameters" and isinstance(value, str)
            tools[int(match[1])][match[2]] = json.loads(value) if is_schema else value
    return [tool for _, tool in sorted(tools.items())]


def _is_numbered(attributes: Mapping[str, Any]) -> bool:
    return any(_NUMBERED.match(name) for name in attributes)


def _read_numbered(attributes: Mapping[str, Any], side: str, number: int) -> list[dict[str, Any]]:
    """Read the messages in the numbered attributes of OpenLLMetry, such as `gen_ai.prompt.0.content`."""
    messages = defaultdict[int, dict[str, Any]](dict)
    calls = defaultdict[int, dict[int, dict[str, Any]]](lambda: defaultdict(dict))
    for name, value in attributes.items():
        match = _NUMBERED.match(name)
        if match and match[1] == side:
            if call := _NUMBERED_CALL.fullmatch(match[3]):
                calls[int(match[2])][int(call[1])][call[2]] = value
            else:
                messages[int(match[2])][match[3]] = value
    standard = list[dict[str, Any]]()
    for position in sorted({*messages, *calls}):
        fields = messages[position]
        message = {
            "role": str(fields.get("role", "assistant" if side == "completion" else "user")),
            "content": fields.get("content") or "",
        }
        message |= {key: fields[key] for key in ("tool_call_id",) if fields.get(key)}
        message |= {"reasoning_content": fields["reasoning"]} if fields.get("reasoning") else {}
        if items := calls.get(position):
            message["tool_calls"] = [read_call(call, f"call_{number}_{index}") for index, call in sorted(items.items())]
        standard.append(message)
    return standard
