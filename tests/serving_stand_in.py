"""A server on localhost with the requests of inference servers that render conversations."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

KINDS = {
    "vllm": ("/v1/chat/completions/render", "/tokenize"),
    "old vllm": ("/tokenize",),
    "llama.cpp": ("/apply-template", "/tokenize"),
    "tgi": ("/chat_tokenize",),
    "none": (),
}


def make_tokenizer(loaded):
    """Return the tokenizer of transformers for a tokenizer of ftdata."""
    backend = tokenizers.Tokenizer.from_buffer(loaded.json)
    template = loaded.chat_template
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **loaded.special_tokens)


def parse_arguments(messages):
    """Return messages whose tool calls have objects as arguments, as vLLM does."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages


@dataclass
class StandIn:
    """A server.

    Attributes:
        tokenizer: the tokenizer of transformers.
        kind: the kind of server, a key of `KINDS`.
        change: changes the body of a request.
        change_ids: changes the ids of an answer.
        fail: returns the status and the text of an error for the number of a request, or `None`.
        key: the key of the server.
        parses: whether the arguments of tool calls are objects for the template.
        requests: path and body of each request.
    """

    tokenizer: Any
    kind: str = "vllm"
    change: Callable = lambda body: body
    change_ids: Callable = lambda ids: ids
    fail: Callable = lambda number: None
    key: str | None = None
    parses: bool = True
    requests: list = field(default_factory=list)

    def render(self, body, *, tokenize):
        body = self.change(body)
        messages = parse_arguments(body["messages"]) if self.parses else body["messages"]
        options = {"tools": body.get("tools"), "add_generation_prompt": True, **body.get("chat_template_kwargs", {})}
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)
        return self.change_ids(rendered["input_ids"]) if tokenize else rendered

    def answer(self, path, body):
        if path == "/v1/chat/completions/render":
            return {"token_ids": self.render(body, tokenize=True)}
        if path == "/apply-template":
            return {"prompt": self.render(body, tokenize=False)}
        if path == "/chat_tokenize":
            return {"tokenize_response": [{"id": id_, "text": ""} for id_ in self.render(body, tokenize=True)]}
        if "content" in body:
            return {"tokens": self.change_ids(self.tokenizer(body["content"], add_special_tokens=False)["input_ids"])}
        return {"tokens": self.render(body, tokenize=True)}

    def respond(self, path, body, authorization):
        """Return the status and the content of the answer."""
        self.requests.append((path, body))
        if self.key is not None and authorization != f"Bearer {self.key}":
            return 401, {"error": "wrong key"}
        if path not in KINDS[self.kind]:
            return 404, {"error": "not found"}
        if (error := self.fail(len(self.requests))) is not None:
            return error
        try:
            return 200, self.answer(path, body)
        except Exception as error:  # noqa: BLE001  (templates raise many types)
            return 400, {"error": {"message": str(error)}}


def make_handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def send(self, status, content):
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            has_models = self.path == "/v1/models" and server.kind != "tgi"
            self.send(*((200, {"data": [{"id": "tuned"}]}) if has_models else (404, "")))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers["Content-Type"] != "application/json":
                self.send(415, {"error": "unsupported media type"})
                return
            self.send(*server.respond(self.path, body, self.headers["Authorization"]))

        def log_message(self, *_):
            pass

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True
    # The audit opens 32 connections at once. With the default of 5, the kernel drops some, and they wait for seconds.
    request_queue_size = 128


@contextmanager
def stand_in(tokenizer, kind="vllm", **options):
    """Run a server. Yield its URL and the list of its requests. For the options, see `StandIn`."""
    stand = StandIn(tokenizer, kind, **options)
    with Server(("127.0.0.1", 0), make_handler(stand)) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", stand.requests
        server.shutdown()
