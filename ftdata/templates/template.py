"""Find, inspect and render chat templates and prompt templates, which are Jinja templates."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes

from ftdata.errors import BadRow, TemplateRefused, UsageError, suggest_names, suggest_path
from ftdata.registry import Registry
from ftdata.storage import disk
from ftdata.templates.attribution.spans import pieces_of, track_messages, track_value
from ftdata.templates.attribution.tracked_strings import TrackedString, concat_tracked
from ftdata.templates.attribution.watched_strings import unwatch
from ftdata.templates.sandbox.constant_folding import template_variables
from ftdata.templates.sandbox.environment import compile_template, restart_block_numbers, sandbox_environment
from ftdata.templates.turns import locate
from ftdata.templates.turns.stops import TurnStops
from ftdata.types import Part

templates: Registry[Path] = Registry("ftdata.templates", "template")
"""The registry of built-in and plug-in templates: name -> path of a `.jinja` file."""

for _path in sorted(Path(__file__).parent.glob("*.jinja")):
    templates.register(_path.stem)(_path)

_RECORDED_LENGTH_USES = (
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
"""Syntax nodes that compare, add or print the length of a text, or whose value may be the length (`_may_be_length`)."""

_ROLES = {"u": "user", "a": "assistant"}

DEFAULT_DATE = datetime.datetime(2026, 1, 1)  # noqa: DTZ001  (templates print wall-clock time)
"""The default of `Template.date`. It is fixed, so that a template with a date prints the same text every day."""

_TRACKED_OBJECT = f"{TrackedString.__module__}.{TrackedString.__name__} object"
"""The name of a tracked string in the error messages of Jinja."""

TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)
"""Exceptions that the code of a template may raise. Templates are third-party code, so the list is long."""


def _make_text_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


@dataclass(frozen=True)
class Template:
    """A Jinja template, with the special tokens of a tokenizer and the values of template variables.

    Attributes:
        name: display name: the name of a built-in template, a path, `"<string>"` or `"tokenizer"`.
        source: Jinja source. Empty if the tokenizer has no template; then only text that is already formatted can be
            rendered.
        strict: whether printing an undefined name is an error. False only for the template of a tokenizer.
        special_tokens: special tokens that the template may print, such as `bos_token` and `eos_token`.
        control: pattern that matches the tokenizer's control tokens, among which stop tokens are searched for.
        date: date and time for templates that print the current date.
        kwargs: template variables, such as `enable_thinking`.
    """

    name: str
    source: str
    strict: bool = True
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    control: re.Pattern[str] | None = None
    date: datetime.datetime = DEFAULT_DATE
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    cpu_factor: ClassVar[int] = 1
    """Factor of the CPU limits of the worker process."""

    is_user_code: ClassVar[bool] = False
    """Whether the template is code of the user, which runs without a sandbox and can keep values in its process."""

    text_forms: ClassVar[tuple[Callable[[str], Any], ...]] = (str, _make_text_parts)
    """The forms of texts that messages of probes have."""

    @cached_property
    def description(self) -> str:
        """All attributes of the template, serialized as a JSON object."""
        pattern = self.control.pattern if self.control is not None else None
        attributes = {"name": self.name, "source": self.source, "strict": self.strict, "control": pattern}
        mappings = {"special_tokens": dict(self.special_tokens), "kwargs": dict(self.kwargs)}
        return json.dumps({**attributes, **mappings, "date": self.date.isoformat()}, sort_keys=True)

    @cached_property
    def key(self) -> str:
        """A hash of all attributes of the template, which identifies the template in caches."""
        return disk.hash_bytes(self.description.encode())

    @classmethod
    def from_description(cls, description: str) -> Template:
        """Create a template from the JSON text of `Template.description`."""
        attributes = json.loads(description)
        control = re.compile(attributes["control"]) if attributes["control"] else None
        return cls(**{**attributes, "control": control, "date": datetime.datetime.fromisoformat(attributes["date"])})

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names of the variables that the template reads.

        Raises:
            TemplateRefused: `template_syntax`, with the line number of the error.
        """
        with self._convert_syntax_errors():
            return template_variables(self._syntax)

    @cached_property
    def is_chat(self) -> bool:
        """Whether the template is a chat template, which means that it reads the variable `messages`."""
        return "messages" in self.variables

    @cached_property
    def has_generation_prompt(self) -> bool:
        """Whether the template prints the beginning of an answer after a conversation that ends with a question."""
        return "add_generation_prompt" in self.variables

    @cached_property
    def has_generation_tags(self) -> bool:
        """Whether the template marks the generated text with `{% generation %}`."""
        with self._convert_syntax_errors():
            tokens = list(sandbox_environment().lex(self.source))
        return any(kind == "name" and value == "generation" for _, kind, value in tokens)

    @cached_property
    def uses_date(self) -> bool:
        """Whether the template may print the current date."""
        syntax = self._syntax
        tested = [test.node for test in syntax.find_all(nodes.Test) if test.name in ("defined", "undefined")]
        names = (name for name in syntax.find_all(nodes.Name) if all(name is not node for node in tested))
        return any(name.name == "strftime_now" for name in names)

    @cached_property
    def stops(self) -> TurnStops:
        """The stop token and the text around it at the end of a turn. Both are detected in small conversations."""
        return locate.detect_stops(self._probe, TurnStops(self.special_tokens.get("eos_token"), self.control))

    def _probe(self, roles: str) -> TrackedString | None:
        """Render a small conversation to find out how the template renders turns.

        The contents are strings. If the template does not support strings, they are lists of text parts.

        Args:
            roles: first characters of the roles, such as `"uaua"`.

        Returns:
            The rendered text, or `None` if the template does not print every content.
        """
        contents = [f"{_ROLES[role]} text {number}" for number, role in enumerate(roles)]
        for make_content in self.text_forms:
            messages = [
                {"role": _ROLES[role], "content": make_content(content)}
                for role, content in zip(roles, contents, strict=True)
            ]
            try:
                text = self.render(make_chat_variables(track_messages(messages)))
            except BadRow:
                continue
            for tracked in (text, _track_contents(text, contents)):
                if len(roles) == len({piece.message for piece in pieces_of(tracked) if piece.part is Part.CONTENT}):
                    return tracked
        return None

    @cached_property
    def takes_text_arguments(self) -> bool:
        """Whether the template supports tool call arguments as JSON text, and prints this text unchanged."""
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
                return arguments in self.render(make_chat_variables(track_messages(messages[:count])))
            except BadRow:
                continue
        return False

    @cached_property
    def is_recordable(self) -> bool:
        """Whether `WatchedString` can record every operation that the template may perform on a text.

        This is false if the template uses `in` with two operands that are not constants, formats strings, or passes the
        length of a text on.
        """
        syntax = self._syntax
        for comparison in syntax.find_all(nodes.Compare):
            expressions = (comparison.expr, *(operand.expr for operand in comparison.ops))
            for left, operand in zip(expressions, comparison.ops, strict=False):
                is_constant = isinstance(left, nodes.Const) or isinstance(
                    operand.expr, nodes.List | nodes.Tuple | nodes.Dict
                )
                if operand.op in ("in", "notin") and not is_constant:
                    return False
        has_constant_divisors = all(isinstance(division.right, nodes.Const) for division in syntax.find_all(nodes.Mod))
        return has_constant_divisors and not any(_uses_length(node) for node in syntax.find_all(nodes.Node))

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that the template needs in the worker process."""
        return {}

    def prepare(self) -> None:
        """Prepare the template in the worker process, outside the limits of requests."""

    def token_ids(self, text: str) -> tuple[int, ...]:  # noqa: ARG002  (Jinja renders text)
        """Return the token ids of a rendered text, if the template renders token ids; otherwise an empty tuple."""
        return ()

    def render(self, variables: Mapping[str, Any]) -> TrackedString:
        """Render the template with the given variables. The text is the same as in transformers.

        Args:
            variables: template variables besides the special tokens and `kwargs`.

        Raises:
            BadRow: `template_raises`, with the template's own message.
            TemplateRefused: `template_syntax`, if the template cannot be compiled.
        """
        return unwatch(self.run(variables))

    def render_text(self, variables: Mapping[str, Any]) -> str:
        """Render the template like `render`, without the owners of the characters."""
        return str.__str__(self.render(variables))

    def run(self, variables: Mapping[str, Any], *, watch: bool = False) -> TrackedString:
        """Render the template like `render`. If `watch` is true, the result may be a `WatchedString`."""
        context = {**self.special_tokens, **self.kwargs, **variables}
        program = self._compile(watch=watch)
        restart_block_numbers()
        try:
            return TrackedString.from_str(program.render(context))
        except TEMPLATE_ERRORS as error:
            reason = (
                str(error)
                .replace(f"'{TrackedString.__name__}'", "'str'")
                .replace(f"'{_TRACKED_OBJECT}'", "'str object'")
            )
            raise BadRow("template_raises", f"template {self.name!r} fails on this row: {reason}") from None

    @property
    def _syntax(self) -> nodes.Template:
        # Only parsed: the template is compiled in the process that runs it.
        with self._convert_syntax_errors():
            return _parse(self.source)

    def _compile(self, *, watch: bool) -> jinja2.Template:
        with self._convert_syntax_errors():
            return compile_template(self.source, self.date, self.strict, watch)

    @contextmanager
    def _convert_syntax_errors(self) -> Iterator[None]:
        try:
            yield
        except jinja2.TemplateSyntaxError as error:
            problem = f"template {self.name!r} has a syntax error in line {error.lineno}: {error.message}"
            raise TemplateRefused("template_syntax", problem) from None
        except (SyntaxError, ValueError, RecursionError) as error:
            # Python compiles the code that Jinja generates, and limits its nesting and the digits of its numbers.
            raise TemplateRefused("template_syntax", f"template {self.name!r} cannot be compiled: {error}") from None


@lru_cache(maxsize=64)
def _parse(source: str) -> nodes.Template:
    return sandbox_environment().parse(source)


def find_template(spec: str | Path) -> tuple[str, str]:
    """Find a template by name or path. Return its name and its Jinja source.

    Args:
        spec: name of a built-in or plug-in template, path of a file, or Jinja source.

    Raises:
        UsageError: `unknown_template`, with the most similar names as the hint; `template_encoding`, if the file is
            not UTF-8.
    """
    text = str(spec)
    if "{{" in text or "{%" in text:
        return "<string>", text
    path = Path(templates.get(text) if text in templates else text)
    if not path.is_file():
        problem = f"{text!r} is neither the name of a template nor the path of a file"
        similar_file = suggest_path(path) if path.suffix else ""
        raise UsageError("unknown_template", problem, hint=similar_file or suggest_names(text, templates.names()))
    try:
        return text, path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("template_encoding", f"{path} is not UTF-8 text: {error}") from None


def check_can_train(template: Template) -> None:
    """Refuse a prompt template without `{% generation %}` tags, since it marks no text to train.

    Raises:
        TemplateRefused: `template_syntax`, or `nothing_marked` for a prompt template without a generation block.
    """
    if template.source and not template.is_chat and not template.has_generation_tags:
        problem = f"template {template.name!r} does not read the variable 'messages', so it must mark the text to train"
        hint = "put {% generation %} before the response and {% endgeneration %} after its stop token"
        raise TemplateRefused("nothing_marked", problem, hint=hint)


def render_scaffold(template: Template) -> str:
    """Render small conversations to obtain the text that a chat template prints before, between and after messages.

    The text is used to detect the control tokens that the template prints. Skip conversations that it rejects.
    """
    text = ""
    for roles in (
        (("user", "assistant"), ("system", "user", "assistant")) if template.source and template.is_chat else ()
    ):
        try:
            messages = [{"role": role, "content": "x"} for role in roles]
            text += template.render({"messages": messages, "tools": None, "add_generation_prompt": True})
        except BadRow:
            continue
    return text


def make_chat_variables(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, generation_prompt: bool = False
) -> dict[str, Any]:
    """Return the variables that a chat template receives, with the same names as in transformers."""
    return {
        "messages": messages,
        "tools": track_value(tools, Part.TOOLS, -1) if tools else None,
        "documents": None,
        "add_generation_prompt": generation_prompt,
    }


def render_or_none(template: Template, variables: Mapping[str, Any]) -> str | None:
    """Render a template with plain variables. Return `None` if it raises an error."""
    try:
        return str(template.run({"documents": None, **variables}))
    except BadRow:
        return None


def _uses_length(node: nodes.Node) -> bool:
    """Return whether a syntax node may use the length of a text in a way that `WatchedLength` cannot record.

    Comparing, adding and printing a length can be recorded.
    """
    if isinstance(node, nodes.Filter) and node.name == "map":
        # `map('length')` applies the filter by its name.
        names = [argument.value if isinstance(argument, nodes.Const) else "length" for argument in node.args]
        return not {"length", "count"}.isdisjoint(names)
    if isinstance(node, _RECORDED_LENGTH_USES) or (isinstance(node, nodes.Test) and node.name != "sameas"):
        return False
    return any(map(_may_be_length, node.iter_child_nodes()))


def _may_be_length(node: nodes.Node) -> bool:
    """Return whether the value of an expression may be the length of a text."""
    if isinstance(node, nodes.And | nodes.Or):
        return _may_be_length(node.left) or _may_be_length(node.right)
    if isinstance(node, nodes.CondExpr):
        return _may_be_length(node.expr1) or (node.expr2 is not None and _may_be_length(node.expr2))
    if not isinstance(node, nodes.Filter) or node.name not in ("length", "count"):
        return False
    return not (isinstance(node.node, nodes.Name) and node.node.name in ("messages", "tools"))


def _track_contents(text: TrackedString, contents: Sequence[str]) -> TrackedString:
    """Find each message content in the rendered text of a probe, and record which message it comes from."""
    parts: list[str] = re.split(f"({'|'.join(map(re.escape, contents))})", str.__str__(text))
    tracked_contents = {content: track_value(content, Part.CONTENT, index) for index, content in enumerate(contents)}
    return TrackedString.from_str(concat_tracked(tracked_contents.get(part, part) for part in parts))
