"""Compare the tokens before each trained turn with the tokens that an inference server renders.

| server | request | tokens in the answer |
|---|---|---|
| vLLM | `POST /v1/chat/completions/render` | `token_ids` |
| llama.cpp | `POST /apply-template`, then `POST /tokenize` | `tokens` |
| text-generation-inference | `POST /chat_tokenize` | `tokenize_response` |
| vLLM before the first request existed | `POST /tokenize` with messages | `tokens` |
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np

from ftdata.errors import HubError, UsageError, first_difference
from ftdata.pipeline.batch import Batch, BuiltRow
from ftdata.pipeline.drift import describe_tokens
from ftdata.pipeline.recipe import Recipe
from ftdata.redaction import redact_text
from ftdata.types import Conversation, Example, Message, Part, Source

_CONCURRENT = 32
"""Number of requests that run at the same time."""

_TRIES, _PAUSE = 4, 0.2
"""Number of tries of a request, and the pause in seconds after the first failure, which doubles."""

_BUSY = (429, 500, 502, 503, 504)
"""Statuses of answers after which a request is repeated."""

_TIMEOUT = 60
"""Maximum number of seconds for a request."""

KEY_VARIABLE = "FTDATA_SERVE_KEY"
"""Environment variable with the key of the server (vLLM: `--api-key`)."""

_Result = TypeVar("_Result")

_PROBE: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


class TrainedTurn(NamedTuple):
    """A trained turn of a row.

    Attributes:
        source: the row.
        conversation: the conversation.
        message: index of the first message of the turn.
        example: the example that contains the turn.
        end: number of tokens before the turn.
    """

    source: Source
    conversation: Conversation
    message: int
    example: Example
    end: int


class _Refused(Exception):
    """The server answers a request with an error of the request, e.g. because its template raises one."""


@dataclass(frozen=True)
class Server:
    """An inference server that renders conversations.

    Attributes:
        url: its address.
        render: name of the request with which it renders conversations, a key of `_RENDERERS`.
        model: name of the model; `None` if the server does not name its models.
    """

    url: str
    render: str
    model: str | None


def connect(url: str) -> Server:
    """Find out how a server renders conversations.

    Raises:
        UsageError: `serve`, if the URL is invalid, or the server supports none of the requests.
        HubError: `server`, if the server does not answer.
    """
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        is_valid = is_valid and not parts.query and not any(character.isspace() for character in url)
    except ValueError:
        is_valid = False
    if not is_valid:
        problem = f"serve is {redact_text(url)!r}, expected the URL of a server"
        raise UsageError("serve", problem, hint="pass e.g. serve='http://localhost:8000'")
    url = url.rstrip("/").removesuffix("/v1")
    return _run(_connect(url))


def _run(task: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine in a thread, because a notebook already runs an event loop in the main thread."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, task).result()


async def _connect(url: str) -> Server:
    async with _open_session() as session:
        model = await _find_model(session, url)
        refusal = ""
        for name, render in _RENDERERS.items():
            try:
                await render(_Connection(session, Server(url, name, model)), _PROBE)
            except (LookupError, TypeError):
                continue
            except _Refused as error:
                refusal = refusal or str(error)
                continue
            return Server(url, name, model)
    refused = f": it refuses a conversation with one message: {refusal}" if refusal else ""
    problem = f"the server {redact_text(url)} has no request that renders a conversation as tokens{refused}"
    hint = "use vLLM, llama.cpp (llama-server --jinja) or text-generation-inference"
    raise UsageError("serve", problem, hint=hint)


async def _find_model(session: Any, url: str) -> str | None:
    status, answer = await _request(session, "GET", f"{url}/v1/models", None)
    models = answer.get("data") if status == 200 and isinstance(answer, Mapping) else None
    first = models[0] if isinstance(models, list) and models else None
    return str(first["id"]) if isinstance(first, Mapping) and "id" in first else None


def _open_session() -> Any:
    import aiohttp

    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isprintable():
        raise UsageError(
            "serve", f"{KEY_VARIABLE} contains a control character", hint="set it to the key of the server"
        )
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    connector = aiohttp.TCPConnector(limit=_CONCURRENT)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT)
    return aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout)


async def _request(session: Any, method: str, url: str, body: Any) -> tuple[int, Any]:
    """Send a request, and repeat it if the connection fails or the server is busy. Return the status and the JSON.

    Raises:
        HubError: `server`.
    """
    import aiohttp

    reason, data = "", None if body is None else json.dumps(body, default=str).encode()
    for number in range(_TRIES):
        if number:
            await asyncio.sleep(_PAUSE * 2 ** (number - 1))
        try:
            async with session.request(method, url, data=data) as response:
                text = (await response.read()).decode(errors="replace")
                # llama.cpp answers with status 500 if its template raises an error.
                is_last_error = response.status == 500 and number == _TRIES - 1
                if response.status not in _BUSY or is_last_error:
                    return response.status, _parse(text)
                reason = f"status {response.status}: {' '.join(text.split())[:200]}"
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise _make_error(url, reason)


def _make_error(url: str, reason: str) -> HubError:
    hint = f"check the URL and the server; set {KEY_VARIABLE} if the server needs a key"
    return HubError("server", f"the server does not answer {redact_text(url)}: {reason}", hint=hint)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@dataclass(frozen=True)
class _Connection:
    """An open session with a server."""

    session: Any
    server: Server

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send a request, and return the JSON of the answer.

        Raises:
            LookupError: the server does not know the request.
            _Refused: the server refuses the request.
        """
        status, answer = await _request(self.session, "POST", self.server.url + path, body)
        if status in (404, 405, 501):
            raise LookupError(path)
        if status in (401, 403):
            hint = f"set {KEY_VARIABLE} to the key of the server"
            url = redact_text(self.server.url)
            raise UsageError("serve", f"the server {url} refuses access (status {status})", hint=hint)
        if status != 200:
            raise _Refused(_find_message(answer))
        return answer

    @property
    def model(self) -> dict[str, str]:
        """The field `model` of a request."""
        return {"model": self.server.model} if self.server.model is not None else {}


def _find_message(answer: Any) -> str:
    """Return the message of an error."""
    while isinstance(answer, Mapping):
        answer = next((answer[key] for key in ("error", "message", "detail") if key in answer), json.dumps(answer))
    return " ".join(str(answer).split())[:300]


async def _render_vllm(connection: _Connection, request: Mapping[str, Any]) -> list[int]:
    answer = await connection.post("/v1/chat/completions/render", {**connection.model, **request})
    return _read_ids(answer["token_ids"])


async def _render_llama_cpp(connection: _Connection, request: Mapping[str, Any]) -> list[int]:
    prompt = (await connection.post("/apply-template", request))["prompt"]
    body = {"content": prompt, "add_special": True, "parse_special": True}
    return _read_ids((await connection.post("/tokenize", body))["tokens"])


async def _render_tgi(connection: _Connection, request: Mapping[str, Any]) -> list[int]:
    answer = await connection.post("/chat_tokenize", {**connection.model, **request})
    return _read_ids([token["id"] for token in answer["tokenize_response"]])


async def _tokenize_vllm(connection: _Connection, request: Mapping[str, Any]) -> list[int]:
    body = {**connection.model, "add_generation_prompt": True, **request}
    return _read_ids((await connection.post("/tokenize", body))["tokens"])


def _read_ids(ids: Any) -> list[int]:
    if not isinstance(ids, list) or not all(type(id_) is int and 0 <= id_ < 1 << 31 for id_ in ids):
        raise TypeError("the server returned no token ids")
    return ids


_RENDERERS: dict[str, Callable[[_Connection, Mapping[str, Any]], Awaitable[list[int]]]] = {
    "/v1/chat/completions/render": _render_vllm,
    "/apply-template": _render_llama_cpp,
    "/chat_tokenize": _render_tgi,
    "/tokenize": _tokenize_vllm,
}


def find_serving_differences(server: Server, batch: Batch, recipe: Recipe) -> Iterator[tuple[Source, str]]:
    """Yield the rows of a batch for which the server renders other tokens before a trained turn, with a description.

    Rows without messages, and rows with images, are not compared.

    Raises:
        HubError: `server`, if the server stops answering.
    """
    rows = (batch.built(number) for number in range(len(batch.conversations)))
    turns = [turn for row in rows for turn in find_trained_turns(row)]
    for turn, served in zip(turns, _run(_render_turns(server, turns, recipe)), strict=True):
        if (difference := _describe_difference(turn, served, recipe)) is not None:
            yield turn.source, difference


def find_trained_turns(row: BuiltRow) -> Iterator[TrainedTurn]:
    """Yield the trained turns of a row."""
    conversation = row.conversation
    if not can_be_compared(conversation):
        return
    for number, example in enumerate(row.examples):
        part, ends = conversation.part(number), example.offsets[:, 1]
        for is_generated, run in groupby(example.spans, key=attrgetter("generated")):
            spans = list(run)
            if not is_generated:
                continue
            start, end = np.searchsorted(ends, (spans[0].start, spans[-1].end - 1), side="right").tolist()
            messages = [span.message for span in spans if span.message >= 0]
            if messages and example.trained[start : end + 1].any():
                yield TrainedTurn(conversation.source, part, min(messages), example, start)


def can_be_compared(conversation: Conversation) -> bool:
    """Return whether a server can render the messages of a row."""
    return all(part.messages for part in conversation.parts) and not conversation.tokens and not conversation.images


async def _render_turns(server: Server, turns: Sequence[TrainedTurn], recipe: Recipe) -> list[list[int] | str]:
    """Return the tokens that the server renders before each turn, or its error."""
    async with _open_session() as session:
        connection, slots = _Connection(session, server), asyncio.Semaphore(_CONCURRENT)

        async def render(turn: TrainedTurn) -> list[int] | str:
            request = make_request(turn, recipe)
            async with slots:
                try:
                    return await _RENDERERS[server.render](connection, request)
                except _Refused as error:
                    return str(error)
                except (LookupError, TypeError) as error:
                    raise _make_error(server.url + server.render, f"it has an unknown form: {error}") from None

        return list(await asyncio.gather(*map(render, turns)))


def make_request(turn: TrainedTurn, recipe: Recipe) -> dict[str, Any]:
    """Return the body of a request in the format of OpenAI for the messages before a turn."""
    messages = [_convert_message(message) for message in turn.conversation.messages[: turn.message]]
    kwargs = {**recipe.template.kwargs, **turn.conversation.kwargs}
    return {
        "messages": messages,
        **({"tools": list(turn.conversation.tools)} if turn.conversation.tools else {}),
        **({"chat_template_kwargs": kwargs} if kwargs else {}),
    }


def _convert_message(message: Message) -> dict[str, Any]:
    """Convert a message to the format of OpenAI, in which the arguments of tool calls are JSON text."""
    converted: dict[str, Any] = {name: value for name, value in message.items() if name != "train"}
    if calls := message.get("tool_calls"):
        converted["tool_calls"] = [_convert_call(call, number) for number, call in enumerate(calls)]
        converted.setdefault("content", None)
    return converted


def _convert_call(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    function = dict(call["function"])
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {"id": f"call_{number}", "type": "function", **call, "function": function}


def _describe_difference(turn: TrainedTurn, served: list[int] | str, recipe: Recipe) -> str | None:
    """Describe the first difference of the tokens before a turn; return `None` if there is none."""
    place = f"before messages[{turn.message}]"
    if isinstance(served, str):
        return f"{place}: the server refuses the conversation: {served}"
    trained = turn.example.input_ids[: turn.end].tolist()
    if trained == served:
        return None
    position = first_difference(trained, served)
    trained_text, served_text = (describe_tokens(ids[position:], recipe) for ids in (trained, served))
    owner = _describe_owner(turn, position) if position < len(trained) else ""
    return f"{place}, token {position}{owner}: the training has {trained_text}, and the server renders {served_text}"


def _describe_owner(turn: TrainedTurn, position: int) -> str:
    """Describe where a token of the training comes from."""
    start = int(turn.example.offsets[position, 0])
    spans: Iterable[Any] = (span for span in turn.example.spans if span.start <= start < span.end)
    span = next(iter(spans), None)
    if span is None or span.message < 0 or span.part is Part.SCAFFOLD:
        return " (template)"
    return f" (messages[{span.message}], {span.part})"
