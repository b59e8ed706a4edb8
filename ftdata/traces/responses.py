"""Convert logs of OpenAI's Responses API: a request with its response, or the items of both in one object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ftdata.errors import BadRow
from ftdata.traces.response_items import ITEM_TYPES, ItemReader
from ftdata.traces.rows import Session
from ftdata.traces.steps import BadRecord, Context, Step, check_unknown, get_mapping


def is_responses_document(data: Mapping[str, Any]) -> bool:
    """Return whether an object is a logged response, or a request with its response."""
    response = _response_of(data)
    output = response.get("output")
    if not isinstance(output, list) or not all(isinstance(item, Mapping) for item in output):
        return False
    if response.get("object") == "response" or str(response.get("id")).startswith("resp_"):
        return True
    has_items = bool(output) and all(str(item.get("type")) in ITEM_TYPES for item in output)
    return has_items and ("input" in data or bool(_request_of(data)))


def _request_of(data: Mapping[str, Any]) -> Mapping[str, Any]:
    return get_mapping(data, "request") or get_mapping(data, "body")


def read_responses_document(data: Mapping[str, Any], ignored: frozenset[str] = frozenset()) -> Iterator[Session]:
    """Yield the session of a logged response. Items of the types in `ignored` are left out.

    Raises:
        BadRow: `missing_context`, if the log does not contain the input; `unknown_record_type`.
    """
    response = _response_of(data)
    request = _request_of(data) or data
    values = {**response, **{key: value for key, value in request.items() if value is not None}}
    if values.get("previous_response_id") or values.get("conversation"):
        problem = "the request continues a conversation that the server stored, and the log contains only its last part"
        raise BadRow("missing_context", problem, field="previous_response_id", hint="log the whole input instead")
    if request.get("input") is None:
        problem = "the log contains the response, but not the input"
        raise BadRow("missing_context", problem, field="input", hint="add the input of the request")
    if response.get("status") in ("failed", "cancelled"):
        raise BadRow("no_answer", f"the request has the status {response['status']}")
    steps, reader, categories = _read_items(values["input"], response["output"], ignored)
    if response.get("status") == "incomplete":
        reader.anomalies["truncated_responses"] += 1
        steps = [step._replace(trained=False) for step in steps]
    reader.add_tools(values.get("tools"))
    system = _read_instructions(values.get("instructions"))
    metadata = {"session": str(response.get("id", "")), "models": [values["model"]] if values.get("model") else []}
    context = Context("main", [*system, *steps], reader.tools)
    size = (1 if isinstance(values["input"], str) else len(values["input"])) + len(response["output"])
    yield Session("responses", size, [context], categories, metadata, reader.anomalies)


def _response_of(data: Mapping[str, Any]) -> Mapping[str, Any]:
    response = data.get("response")
    return response if isinstance(response, Mapping) else data


def _read_instructions(instructions: Any) -> list[Step]:
    # The steps have the record of the first item: instructions are not an item.
    if isinstance(instructions, str) and instructions:
        return [Step("message", {"role": "system", "content": instructions}, 0)]
    if isinstance(instructions, list):
        reader = ItemReader()
        return [step for item in instructions for step in reader.read(item, 0) or () if isinstance(step, Step)]
    return []


def _read_items(
    request_input: Any, output: list[Any], ignored: frozenset[str]
) -> tuple[list[Step], ItemReader, dict[int, str]]:
    items = [{"role": "user", "content": request_input}] if isinstance(request_input, str) else request_input
    if not isinstance(items, list):
        raise BadRow("record_type", "is not a text or a list of items", field="input")
    reader, categories, steps = ItemReader(), dict[int, str](), list[Step]()
    objects = [item for item in items if isinstance(item, Mapping) and item.get("type") not in (None, "item_reference")]
    by_id = {item["id"]: item for item in objects if item.get("id")}
    for number, original in enumerate([*items, *output]):
        field = f"input[{number}]" if number < len(items) else f"output[{number - len(items)}]"
        if not isinstance(original, Mapping):
            raise BadRecord(number, "record_type", "is not an object", field=field)
        if number == len(items):
            reader.end_response()
        item = original
        if item.get("type") in (None, "item_reference") and "role" not in item:
            if item.get("id") not in by_id:
                problem = f"refers to the item {item.get('id')!r}, which the log does not contain"
                raise BadRecord(number, "missing_context", problem, field=field, hint="log the whole input instead")
            item = by_id[item["id"]]
        result = reader.read(item, number)
        if result is None:
            is_message = item.get("type") in (None, "message")
            kind, name = ("role", item.get("role")) if is_message else ("record type", item.get("type"))
            result = check_unknown(number, kind, str(name), f"the Responses API in {field}", ignored)
        if isinstance(result, str):
            categories[number] = result
            continue
        # The responses in the input are context: the rows of their own requests train them.
        steps += [step._replace(trained=number >= len(items)) for step in result]
    return steps, reader, categories
