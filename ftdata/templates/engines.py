"""Compare how other template engines, which inference servers use, render a chat template.

| engine | used by | needs |
|---|---|---|
| `minijinja` | text-generation-inference, mistral.rs | the package `minijinja` |
| `huggingface.js` | transformers.js, LM Studio | `node`, and the npm package `@huggingface/jinja` |
"""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, NamedTuple

from ftdata.errors import MissingDependency, TemplateRefused, count_noun, first_difference
from ftdata.templates.python_template import load_template, make_template
from ftdata.templates.template import Template
from ftdata.templates.worker.client import render_plain

_FUEL = 10_000_000
"""Maximum number of instructions that minijinja runs for a conversation."""

_NODE_SECONDS = 60

_EXCERPT = 40
"""Number of characters that a difference shows."""


class EngineCase(NamedTuple):
    """A conversation that is rendered.

    Attributes:
        name: what the conversation contains.
        messages: the messages.
        tools: the definitions of the tools.
        generation_prompt: whether the generation prompt is added.
    """

    name: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    generation_prompt: bool = False


class Difference(NamedTuple):
    """A conversation that an engine renders differently.

    Attributes:
        case: the name of the conversation.
        position: index of the first different character; -1 if the engine fails.
        expected: the text that Jinja2 renders from this position.
        rendered: the text that the engine renders from this position, or its error.
    """

    case: str
    position: int
    expected: str
    rendered: str

    def __str__(self) -> str:
        if self.position < 0:
            return f"{self.case}: fails: {self.rendered}"
        return f"{self.case}, character {self.position:,}: {self.rendered!r} instead of {self.expected!r}"


@dataclass(frozen=True)
class EngineReport:
    """The result of comparing an engine with Jinja2.

    Attributes:
        engine: name and version of the engine.
        cases: number of conversations that Jinja2 renders.
        differences: the conversations that the engine renders differently.
    """

    engine: str
    cases: int
    differences: tuple[Difference, ...]

    def as_dict(self) -> dict[str, Any]:
        """Convert the report to a JSON-serializable dictionary."""
        return {**asdict(self), "differences": [difference._asdict() for difference in self.differences]}

    def __str__(self) -> str:
        if not self.differences:
            return f"{self.engine}: renders {count_noun(self.cases, 'conversation')} as Jinja2 does"
        messages = {difference.rendered for difference in self.differences if difference.position < 0}
        if len(self.differences) == self.cases and len(messages) == 1:
            return f"{self.engine}: fails on every conversation: {messages.pop()}"
        head = f"{self.engine}: renders {len(self.differences)} of {count_noun(self.cases, 'conversation')} differently"
        return "\n".join([head, *(f"  {difference}" for difference in self.differences)])


def _message(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


_PARAMETERS = {
    "type": "object",
    "properties": {
        "key": {"type": "string", "description": "A <key> & more"},
        "limit": {"type": "number", "default": 0.5},
    },
    "required": ["key"],
}
_TOOLS = ({"type": "function", "function": {"name": "lookup", "description": "Finds", "parameters": _PARAMETERS}},)
_CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "lookup", "arguments": {"key": 'é "x"\n', "limit": 2.5, "deep": {"a": [1, None, True]}}},
}
_USER, _ANSWER = _message("user", "first question"), _message("assistant", "first answer")
_TALK = (_USER, _ANSWER, _message("user", "second question"), _message("assistant", "second answer"))

_CONVERSATIONS: tuple[tuple[str, tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]], ...] = (
    ("one turn", (_USER, _ANSWER), ()),
    ("two turns", _TALK, ()),
    ("a system message", (_message("system", "a rule"), *_TALK), ()),
    ("whitespace", (_message("user", " \n question \t"), _message("assistant", "\n answer \n")), ()),
    ("unicode and markup", (_message("user", "naïve 你好 <b> & 'x' \"y\" {{ z }}"), _message("assistant", "🙂")), ()),
    ("tools", (_USER, _ANSWER), _TOOLS),
    ("tool calls", (_USER, _message("assistant", "", tool_calls=[_CALL]),
                    _message("tool", "a result", name="lookup", tool_call_id="call00001"), _ANSWER), _TOOLS),
    ("reasoning", (_USER, {**_ANSWER, "reasoning_content": "a thought"}, *_TALK[2:]), ()),
    ("thinking tags", (_USER, _message("assistant", "<think>\na thought\n</think>\n\nfirst answer"), *_TALK[2:]), ()),
    ("text parts", (_message("user", [{"type": "text", "text": "first question"}]), _ANSWER), ()),
)  # fmt: skip

CASES = tuple(
    EngineCase(name + suffix, messages[:end], tools, bool(suffix))
    for name, messages, tools in _CONVERSATIONS
    for suffix, end in (("", None), (", next answer", -1))
)
"""The conversations, as a whole, and before the last answer with the generation prompt."""


def compare_engines(
    template: Template, engines: Sequence[str] | None = None, functions: Sequence[str] = ()
) -> list[EngineReport]:
    """Render conversations with other engines, and compare the texts with those of Jinja2.

    Args:
        template: the chat template. The date is the current date, because some engines print no other date.
        engines: names of engines; `None` for all that are installed.
        functions: Python functions that render conversations, e.g. with `mistral-common`, as `file.py:function`.

    Raises:
        MissingDependency: `no_engine`, if an engine is not installed, or none is.
        UsageError: a function does not exist.
        TemplateRefused: the template does not compile, it exceeds the limits, or a function cannot be loaded.
    """
    template = replace(template, date=datetime.datetime.now().astimezone().replace(tzinfo=None))
    expected = render_plain(template, [_make_variables(case) for case in CASES])
    cases = [(case, text) for case, text in zip(CASES, expected, strict=True) if text is not None]
    reports = list[EngineReport]()
    variables = [_make_variables(case) for case, _ in cases]
    for name in ENGINES if engines is None else engines:
        try:
            reports.append(_make_report(cases, *ENGINES[name](template, variables)))
        except MissingDependency:
            if engines is not None:
                raise
    reports += [_make_report(cases, name, _render_function(name, template, variables)) for name in functions]
    if not reports:
        problem = "no other template engine is installed"
        raise MissingDependency(
            "no_engine", problem, hint="pip install 'ftdata[engines]', or npm install @huggingface/jinja"
        )
    return reports


def _make_report(cases: Sequence[tuple[EngineCase, str]], engine: str, outcomes: Sequence[Outcome]) -> EngineReport:
    pairs = zip(cases, outcomes, strict=True)
    differences = (_compare(case, text, outcome) for (case, text), outcome in pairs)
    return EngineReport(engine, len(cases), tuple(item for item in differences if item is not None))


def _render_function(name: str, template: Template, cases: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    function = make_template(*load_template(name), special_tokens=template.special_tokens)
    texts = render_plain(function, cases)
    return [("the function raises an error", True) if text is None else (text, False) for text in texts]


def _make_variables(case: EngineCase) -> dict[str, Any]:
    tools = list(case.tools) or None
    return {"messages": list(case.messages), "tools": tools, "add_generation_prompt": case.generation_prompt}


Outcome = tuple[str, bool]
"""The text that an engine renders, or its error, and whether it fails."""


def _compare(case: EngineCase, expected: str, outcome: Outcome) -> Difference | None:
    rendered, fails = outcome
    if fails:
        return Difference(case.name, -1, "", " ".join(rendered.split())[:200])
    if rendered == expected:
        return None
    position = first_difference(expected, rendered)
    end = position + _EXCERPT
    return Difference(case.name, position, expected[position:end], rendered[position:end])


def _render_minijinja(template: Template, cases: Sequence[Mapping[str, Any]]) -> tuple[str, list[Outcome]]:
    try:
        import minijinja
    except ImportError:
        raise _missing("minijinja", "pip install 'ftdata[engines]'") from None

    def fail(message: str) -> None:
        raise ValueError(message)

    environment: Any = minijinja.Environment(trim_blocks=True, lstrip_blocks=True, pycompat=True)
    environment.fuel = _FUEL
    environment.add_function("raise_exception", fail)
    environment.add_function("strftime_now", template.date.strftime)
    outcomes = list[Outcome]()
    for variables in cases:
        values = {**template.special_tokens, **template.kwargs, **variables}
        try:
            outcomes.append((environment.render_str(template.source, "template", **values), False))
        except Exception as error:  # noqa: BLE001  (the engine raises its own type, and those of functions)
            outcomes.append((str(error), True))
    return f"minijinja {version('minijinja')}", outcomes


_SCRIPT = """
const {Template} = require("@huggingface/jinja");
const path = require("path");
const folder = path.dirname(path.dirname(require.resolve("@huggingface/jinja")));
const {version} = JSON.parse(require("fs").readFileSync(path.join(folder, "package.json"), "utf8"));
const {source, cases} = JSON.parse(require("fs").readFileSync(0, "utf8"));
const outcomes = cases.map((variables) => {
  try {
    return [new Template(source).render(variables), false];
  } catch (error) {
    return [String(error.message ?? error), true];
  }
});
process.stdout.write(JSON.stringify({version, outcomes}));
"""


def _render_javascript(template: Template, cases: Sequence[Mapping[str, Any]]) -> tuple[str, list[Outcome]]:
    hint = "install Node.js, and run npm install @huggingface/jinja in the current folder"
    node = shutil.which("node")
    if node is None:
        raise _missing("node", hint)
    values = [{**template.special_tokens, **template.kwargs, **variables} for variables in cases]
    request = json.dumps({"source": template.source, "cases": values})
    try:
        done = subprocess.run(  # noqa: S603  (the script is constant, and the template is data)
            [node, "-e", _SCRIPT], input=request.encode(), capture_output=True, timeout=_NODE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        problem = f"template {template.name!r} needs more than {_NODE_SECONDS} s in @huggingface/jinja"
        raise TemplateRefused("template_limits", problem, hint="use another template") from None
    if done.returncode:
        if b"Cannot find module" in done.stderr:
            raise _missing("@huggingface/jinja", hint)
        message = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        return "huggingface.js", [(message, True)] * len(cases)
    answer = json.loads(done.stdout)
    return f"huggingface.js {answer['version']}", [(text, fails) for text, fails in answer["outcomes"]]


def _missing(name: str, hint: str) -> MissingDependency:
    return MissingDependency("no_engine", f"the template engine needs {name}, which is not installed", hint=hint)


ENGINES: dict[str, Callable[[Template, Sequence[Mapping[str, Any]]], tuple[str, list[Outcome]]]] = {
    "minijinja": _render_minijinja,
    "huggingface.js": _render_javascript,
}
"""Name of an engine -> a function that renders conversations. It returns the name with the version, and the texts."""
