"""Template: Jinja source bound to a tokenizer's special tokens, and where templates are found."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from ftdata.errors import BadRow, TemplateRefused, UsageError, suggest_names
from ftdata.registry import Registry
from ftdata.storage import disk
from ftdata.templates.attribution.spans import pieces_of, track_messages, track_value
from ftdata.templates.attribution.tracked_strings import TrackedString, concat_tracked
from ftdata.templates.attribution.watched_strings import unwatch
from ftdata.templates.cache.plans import PlanCache
from ftdata.templates.cache.prefix_cache import PrefixCache
from ftdata.templates.cache.turn_cache import TurnCache
from ftdata.templates.sandbox.constant_folding import template_variables
from ftdata.templates.sandbox.environment import compile_template, sandbox_environment
from ftdata.templates.turns import locate
from ftdata.templates.turns.stops import TurnStops
from ftdata.types import Part

templates: Registry[Path] = Registry("ftdata.templates", "template")
"""Name -> `.jinja` file."""

for _file in sorted(Path(__file__).parent.glob("*.jinja")):
    templates.register(_file.stem)(_file)

_ASKS_LENGTHS = (
    nodes.Compare,
    nodes.Operand,
    nodes.If,
    nodes.CondExpr,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.BinExpr,
    nodes.UnaryExpr,
    nodes.Output,
)

_ROLES = {"u": "user", "a": "assistant"}

DEFAULT_DATE = datetime.datetime(2026, 1, 1)  # noqa: DTZ001  (templates print wall-clock time)
"""What the clock shows where nobody said otherwise: templates with a date stay the same from day to day."""

_TRACKED_OBJECT = f"{TrackedString.__module__}.{TrackedString.__name__} object"
"""How Jinja names a tracked string."""

TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)
"""What the template's own code may raise; it is foreign code, so the list is wide."""


@dataclass(frozen=True)
class Template:
    """A template, bound to a tokenizer's special tokens.

    Attributes:
        name: how to speak of it: a built-in's name, a file, `"<string>"` or `"tokenizer"`.
        source: the Jinja text; empty where a tokenizer has none, which serves already formatted text only.
        strict: printing an undefined name is an error; only a tokenizer's own template may rely on silence.
        special_tokens: `bos_token`, `eos_token`, ...: what the template may print.
        control: finds control tokens in text; what a stop is looked for among.
        date: what the clock shows to templates that print a date.
        kwargs: further variables for the template (`enable_thinking`, ...).
    """

    name: str
    source: str
    strict: bool = True
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    control: re.Pattern[str] | None = None
    date: datetime.datetime = DEFAULT_DATE
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def description(self) -> str:
        """All that it is, as JSON."""
        pattern = self.control.pattern if self.control is not None else None
        own = {"name": self.name, "source": self.source, "strict": self.strict, "control": pattern}
        given = {"special_tokens": dict(self.special_tokens), "kwargs": dict(self.kwargs)}
        return json.dumps({**own, **given, "date": self.date.isoformat()}, sort_keys=True)

    @cached_property
    def key(self) -> str:
        """A hash of all that it is."""
        return disk.hash_bytes(self.description.encode())

    @classmethod
    def described(cls, description: str) -> Template:
        """Return the template of a description."""
        found = json.loads(description)
        control = re.compile(found["control"]) if found["control"] else None
        return cls(**{**found, "control": control, "date": datetime.datetime.fromisoformat(found["date"])})

    @cached_property
    def names(self) -> frozenset[str]:
        """The variables that the template reads.

        Raises:
            TemplateRefused: `template_syntax`, with the line.
        """
        with self._told():
            return template_variables(self._syntax)

    @cached_property
    def chat(self) -> bool:
        """Whether this is a chat template: it reads `messages`."""
        return "messages" in self.names

    @cached_property
    def tagged(self) -> bool:
        """Whether the template itself marks what the model must produce."""
        tokens = sandbox_environment().lex(self.source)
        return any(kind == "name" and value == "generation" for _, kind, value in tokens)

    @cached_property
    def uses_date(self) -> bool:
        """Whether the text may depend on the clock."""
        syntax = self._syntax
        asked = [test.node for test in syntax.find_all(nodes.Test) if test.name in ("defined", "undefined")]
        names = (name for name in syntax.find_all(nodes.Name) if all(name is not node for node in asked))
        return any(name.name == "strftime_now" for name in names)

    @cached_property
    def stops(self) -> TurnStops:
        """How turns end, learnt from probes."""
        return locate.learn_stops(self._probe, TurnStops(self.special_tokens.get("eos_token"), self.control))

    def _probe(self, roles: str) -> TrackedString | None:
        """Render a plain conversation, its contents as text or, for templates that want them so, as lists of parts."""
        contents = [f"{_ROLES[role]} text {number}" for number, role in enumerate(roles)]
        for as_content in (str, _as_parts):
            messages = [
                {"role": _ROLES[role], "content": as_content(content)}
                for role, content in zip(roles, contents, strict=True)
            ]
            try:
                text = self.run(make_chat_variables(track_messages(messages)))
            except BadRow:
                continue
            for found in (text, _found_again(text, contents)):
                if len(roles) == len({piece.message for piece in pieces_of(found) if piece.part is Part.CONTENT}):
                    return found
        return None

    @cached_property
    def takes_text_arguments(self) -> bool:
        """Whether the template prints the arguments of a tool call as they stand where they are given as JSON text."""
        arguments = '{"key":  "value"}'
        call = {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": arguments}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "result", "name": "look_up", "tool_call_id": "call00001"},
            {"role": "assistant", "content": "answer"},
        ]
        for count in (4, 2):
            try:
                return arguments in self.run(make_chat_variables(track_messages(messages[:count])))
            except BadRow:
                continue
        return False

    @cached_property
    def foreseeable(self) -> bool:
        """Whether all that the template may ask of texts can be noted.

        Not so where it looks for one text in another that is not written out, or formats.
        """
        syntax = self._syntax
        for compared in syntax.find_all(nodes.Compare):
            written = (compared.expr, *(operand.expr for operand in compared.ops))
            for left, operand in zip(written, compared.ops, strict=False):
                known = isinstance(left, nodes.Const) or isinstance(operand.expr, nodes.List | nodes.Tuple | nodes.Dict)
                if operand.op in ("in", "notin") and not known:
                    return False
        divided = all(isinstance(division.right, nodes.Const) for division in syntax.find_all(nodes.Mod))
        return divided and not any(_uses_length(node) for node in syntax.find_all(nodes.Node))

    @cached_property
    def memory(self) -> TurnCache:
        """Where turns begin and end, for the conversations seen so far."""
        return TurnCache()

    @cached_property
    def runs(self) -> PrefixCache:
        """What the template made of the first messages of conversations seen so far."""
        return PrefixCache()

    @cached_property
    def plans(self) -> PlanCache:
        """What the template makes of conversations that it treats as those seen so far."""
        return PlanCache()

    def run(self, variables: Mapping[str, Any]) -> TrackedString:
        """Render once. The text is exactly what transformers renders for the same variables.

        Args:
            variables: what the template is given, besides special tokens and `kwargs`.

        Raises:
            BadRow: `template_raises`, with the template's own message.
            TemplateRefused: it cannot be compiled.
        """
        return unwatch(self.rendered(variables))

    def rendered(self, variables: Mapping[str, Any], *, watch: bool = False) -> TrackedString:
        """Render once, as `run`; with `watch`, the text may be watched itself, and tells how it came about."""
        given = {**self.special_tokens, **self.kwargs, **variables}
        program = self._compile(watch=watch)
        try:
            return TrackedString.of(program.render(given))
        except TEMPLATE_FAULTS as error:
            reason = (
                str(error)
                .replace(f"'{TrackedString.__name__}'", "'str'")
                .replace(f"'{_TRACKED_OBJECT}'", "'str object'")
            )
            raise BadRow("template_raises", f"template {self.name!r} fails on this row: {reason}") from None

    @property
    def _syntax(self) -> nodes.Template:
        # Not compiled: that is for the process in which it runs.
        with self._told():
            return _parsed(self.source)

    def _compile(self, *, watch: bool) -> jinja2.Template:
        with self._told():
            return compile_template(self.source, self.date, self.strict, watch)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except jinja2.TemplateSyntaxError as error:
            message = f"template {self.name!r}, line {error.lineno}: {error.message}"
            raise TemplateRefused("template_syntax", message) from None
        except (SyntaxError, ValueError, RecursionError) as error:
            # Python compiles what Jinja makes of it, and has limits of its own: nesting, digits.
            raise TemplateRefused("template_syntax", f"template {self.name!r} cannot be compiled: {error}") from None


@lru_cache(maxsize=64)
def _parsed(source: str) -> nodes.Template:
    return sandbox_environment().parse(source)


def find_template(spec: str | Path) -> tuple[str, str]:
    """Return the name and the Jinja text of a template: a built-in or plug-in name, a file, or Jinja itself.

    Raises:
        UsageError: there is no such template; the hint holds the nearest names.
    """
    text = str(spec)
    if "{{" in text or "{%" in text:
        return "<string>", text
    path = Path(templates.get(text) if text in templates else text)
    if not path.is_file():
        raise UsageError(
            "unknown_template",
            f"no template named {text!r}, and no file of that name",
            hint=suggest_names(text, templates.names()),
        )
    try:
        return text, path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("template_encoding", f"{path} is not UTF-8 text: {error}") from None


def check_can_train(template: Template) -> None:
    """Refuse a template that could never train anything, before any row is read.

    Raises:
        TemplateRefused: `template_syntax`, or `nothing_marked` for a prompt template without a generation block.
    """
    if template.source and not template.chat and not template.tagged:
        raise TemplateRefused(
            "nothing_marked",
            f"template {template.name!r} reads no messages and marks nothing as trained",
            hint="put {% generation %} before the response and {% endgeneration %} after its stop token",
        )


def render_scaffold(template: Template) -> str:
    """Return what a chat template prints around messages, whatever they say: where it glues control tokens together.

    Templates that refuse a probe are silent here, and judged by the rows.
    """
    found = ""
    for roles in (("user", "assistant"), ("system", "user", "assistant")) if template.source and template.chat else ():
        try:
            messages = [{"role": role, "content": "x"} for role in roles]
            found += template.run({"messages": messages, "tools": None, "add_generation_prompt": True})
        except BadRow:
            continue
    return found


def make_chat_variables(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, generation_prompt: bool = False
) -> dict[str, Any]:
    """Return what a chat template is given, as transformers gives it."""
    return {
        "messages": messages,
        "tools": track_value(tools, Part.TOOLS, -1) if tools else None,
        "documents": None,
        "add_generation_prompt": generation_prompt,
    }


def _uses_length(node: nodes.Node) -> bool:
    """Whether a node takes the length of what may be a text, and does more with it than to compare, add or print it."""
    if isinstance(node, _ASKS_LENGTHS) or (isinstance(node, nodes.Test) and node.name != "sameas"):
        return False
    lengths = [
        one.node for one in node.iter_child_nodes() if isinstance(one, nodes.Filter) and one.name in ("length", "count")
    ]
    return not all(isinstance(one, nodes.Name) and one.name in ("messages", "tools") for one in lengths)


def _found_again(text: TrackedString, contents: Sequence[str]) -> TrackedString:
    """Return a text with these contents tracked where they stand, for templates that format them."""
    parts: list[str] = re.split(f"({'|'.join(map(re.escape, contents))})", str.__str__(text))
    owners = {content: track_value(content, Part.CONTENT, index) for index, content in enumerate(contents)}
    return TrackedString.of(concat_tracked(owners.get(part, part) for part in parts))


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
