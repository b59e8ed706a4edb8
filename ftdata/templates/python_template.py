"""Chat templates that are Python functions, such as the encoders that some model vendors publish instead of a template.

    template="./encoding.py:encode"       encode(messages, tools=None, ...) -> text, or token ids

The function is a black box. To find out where the texts of a conversation are in the result, each text is replaced by a
marker that occurs nowhere else, and the function is called again. The first result must be equal to the second one with
the texts in place of the markers. If this fails for a text, its characters are changed instead (`coverage`), or the row
is rejected. The file is executed only in the template worker process.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from ftdata.errors import BadRow, TemplateRefused, UsageError, suggest_names
from ftdata.redaction import is_secret_name
from ftdata.templates.attribution.markers import (
    attribute,
    map_messages,
    map_tools,
    merge_runs,
    untrack,
)
from ftdata.templates.attribution.tracked_strings import TrackedString
from ftdata.templates.python_source import find_functions, read_source
from ftdata.templates.template import Template, find_template

_REASONING_COPIES = ("reasoning", "thinking")
"""Copies of `reasoning_content` under the other names that Jinja templates use."""


def is_python_template(name: str) -> bool:
    """Return whether the name of a template denotes a function in a Python file.

    >>> is_python_template("./encoding.py:encode"), is_python_template("chat.jinja")
    (True, False)
    """
    path, _, function = name.rpartition(":")
    return path.endswith(".py") and function.isidentifier()


def load_template(spec: str | Path) -> tuple[str, str]:
    """Return the name and the source of a template: a Jinja template, or a function in a Python file.

    Raises:
        UsageError: as in `find_template`; `file_not_found` or `no_such_name` for a Python file.
        TemplateRefused: as in `find_template`; `template_syntax` if the file is not valid Python.
    """
    if not is_python_template(str(spec)):
        return find_template(spec)
    file, _, function = str(spec).rpartition(":")
    path = Path(file).absolute()
    if not path.is_file():
        raise UsageError("file_not_found", f"the template file {path} does not exist")
    source = read_source(path)
    functions = find_functions(source, str(path))
    if function not in functions:
        problem = f"{path} does not define the function {function!r}"
        hint = suggest_names(function, [*functions]) if functions else f"define it in the file with def {function}(...)"
        raise UsageError("no_such_name", problem, hint=hint)
    return f"{path}:{function}", source


def make_template(name: str, source: str, **attributes: Any) -> Template:
    """Create a template: a `PythonTemplate` if the name denotes a function, otherwise a Jinja template.

    Raises:
        UsageError: `template_kwargs`, if the function needs another argument.
    """
    if not is_python_template(name):
        return Template(name, source, **attributes)
    template = PythonTemplate(name, source, **attributes)
    if missing := sorted(template.required_parameters - {*template.kwargs, "tools", "add_generation_prompt"}):
        problem = f"the function {name} needs the argument {missing[0]!r}"
        hint = f"set it with template_kwargs={{{missing[0]!r}: ...}}, or give it a default value in the file"
        raise UsageError("template_kwargs", problem, hint=hint)
    return template


def template_from_description(description: str) -> Template:
    """Create a template from the JSON text of `Template.description`."""
    is_python = is_python_template(json.loads(description)["name"])
    return (PythonTemplate if is_python else Template).from_description(description)


@dataclass(frozen=True)
class PythonTemplate(Template):
    """A chat template that is a function in a Python file. `name` is `path:function`, and `source` is the file."""

    cpu_factor: ClassVar[int] = 40
    """Functions of vendors are slower than templates."""

    is_user_code: ClassVar[bool] = True
    text_forms: ClassVar[tuple[Callable[[str], Any], ...]] = (str,)

    @cached_property
    def _arguments(self) -> ast.arguments:
        return find_functions(self.source, self.name)[self.name.rpartition(":")[2]]

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names of the parameters of the function. With `**kwargs`, the variables of the user belong to them."""
        arguments = self._arguments
        names = {argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)}
        extra = {"tools", "add_generation_prompt", *self.kwargs} if arguments.kwarg else set[str]()
        return frozenset(names | extra | {"messages"})

    @property
    def required_parameters(self) -> frozenset[str]:
        """The names of the parameters without a default value, except the first one, which receives the messages."""
        arguments = self._arguments
        positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        positional = positional[: len(positional) - len(arguments.defaults)]
        pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        return frozenset([*positional[1:], *(argument.arg for argument, default in pairs if default is None)])

    @property
    def environment(self) -> dict[str, str]:
        """All environment variables except secrets: libraries find their files with them."""
        return {name: value for name, value in os.environ.items() if not is_secret_name(name)}

    @cached_property
    def has_generation_prompt(self) -> bool:
        """Whether the function prints the start of an answer after a question, if no answer follows."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "qzanswer"}
        prompts = [self._probe_text([question], add_generation_prompt=value) for value in (True, False)]
        if None not in prompts and prompts[0] != prompts[1]:
            return True
        # The prompt must contain all text that the function prints before the answer.
        prompt, text = prompts[0], self._probe_text([question, answer])
        if prompt is None or text is None or not text.startswith(prompt):
            return True
        header = text[len(prompt) :].partition("qzanswer")[0]
        if not header.strip():
            return True
        # It can also be reasoning. A header is printed for other roles, too.
        two_questions = self._probe_text([question, question])
        return two_questions is not None and not two_questions.startswith(prompt)

    def _probe_text(self, messages: Sequence[Mapping[str, Any]], **values: Any) -> str | None:
        try:
            return self._render({"messages": messages, **values})[0]
        except BadRow:
            return None

    @cached_property
    def has_generation_tags(self) -> bool:
        """False: functions cannot mark the generated text."""
        return False

    @cached_property
    def uses_date(self) -> bool:
        """False: functions receive no date."""
        return False

    @cached_property
    def is_recordable(self) -> bool:
        """False: the operations of a function are not recorded."""
        return False

    @cached_property
    def _parses_arguments(self) -> bool:
        """Whether the function accepts the arguments of tool calls only as JSON text, not as objects."""
        function = {"name": "f", "arguments": {"key": "value"}}
        call = {"id": "call00001", "type": "function", "function": function}
        system, question = ({"role": role, "content": "text"} for role in ("system", "user"))
        answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "content": "r", "name": "f", "tool_call_id": "call00001"}
        conversations: list[list[dict[str, Any]]]
        conversations = [[question, answer], [system, question, answer], [question, answer, result]]
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
        for messages in conversations:
            if self._probe_text(messages, tools=tools) is not None:
                return False
            if self._probe_text([*map(_dump_arguments, messages)], tools=tools) is not None:
                return True
        return False

    @cached_property
    def _last_ids(self) -> dict[str, tuple[int, ...]]:
        """The last rendered text -> its token ids."""
        return {}

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids that the function returned for a text; empty if it returns texts."""
        return self._last_ids.get(text, ())

    def run(self, variables: Mapping[str, Any], *, watch: bool = False) -> TrackedString:  # noqa: ARG002  (functions are not recorded)
        """Call the function, and attribute its result to the texts of the messages and of the tools.

        Raises:
            BadRow: `template_raises`, with the error of the function.
            TemplateRefused: `template_failed`, if the file cannot be executed or the result has a wrong type.
        """
        text, ids = self._render(self._plain_values(variables))

        def render(name: str, value: Any) -> str | None:
            try:
                return self.render_text({**variables, name: value})
            except BadRow:
                return None

        messages = attribute(text, variables["messages"], map_messages, partial(render, "messages"))
        tools = variables.get("tools")
        tool_runs = attribute(text, tools, map_tools, partial(render, "tools")) if tools else []
        self._last_ids.clear()
        self._last_ids[text] = ids
        return TrackedString(text, merge_runs(messages, tool_runs) or None)

    def render_text(self, variables: Mapping[str, Any]) -> str:
        """Call the function without attribution.

        Raises:
            BadRow, TemplateRefused: as in `run`.
        """
        return self._render(self._plain_values(variables))[0]

    def _plain_values(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = untrack(variables)
        if self._parses_arguments:
            values["messages"] = [*map(_dump_arguments, values["messages"])]
        return values

    def _render(self, variables: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
        """Call the function with plain values. Return the text, and the token ids if the function returns them."""
        values = {**self.kwargs, **variables}
        messages = [_drop_copies(message) for message in values.pop("messages")]
        arguments = {name: value for name, value in values.items() if name in self.variables}
        if not arguments.get("tools"):
            arguments.pop("tools", None)
            arguments |= {"tools": None} if "tools" in self.required_parameters else {}
        return self._read_result(self._run_code(self._function, messages, **arguments))

    def _run_code(self, function: Callable[..., Any], *values: Any, **arguments: Any) -> Any:
        try:
            return function(*values, **arguments)
        except (MemoryError, RecursionError):
            raise
        except BaseException as error:  # noqa: BLE001  (the code of the user can raise anything, or exit)
            reason = f"{type(error).__name__}: {error}"
            raise BadRow("template_raises", f"template {self.name!r} fails on this row: {reason}") from None

    def _read_result(self, result: Any) -> tuple[str, tuple[int, ...]]:
        if isinstance(result, str):
            return str.__str__(result), ()
        ids = _read_ids(result)
        decode = self._module.__dict__.get("decode")
        if ids is None:
            problem = f"the function {self.name} returned a {type(result).__name__}, expected a text or token ids"
            raise TemplateRefused("template_failed", problem, hint="return a str, or a list of int")
        if decode is None:
            problem = f"the function {self.name} returns token ids, but the file has no function 'decode'"
            raise TemplateRefused("template_failed", problem, hint="define decode(ids), which returns the text of ids")
        text = self._run_code(decode, ids)
        if not isinstance(text, str):
            problem = f"the function 'decode' of {self.name} returned a {type(text).__name__}, expected a text"
            raise TemplateRefused("template_failed", problem, hint="return a str")
        return str.__str__(text), tuple(ids)

    @cached_property
    def _function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = self._module.__dict__[self.name.rpartition(":")[2]]
        return function

    @cached_property
    def _module(self) -> ModuleType:
        """The module of the file. Its code runs when this property is read first."""
        path = Path(self.name.rpartition(":")[0])
        if read_source(path) != self.source:
            problem = f"the template file {path} or a module that it imports has changed while it was used"
            raise TemplateRefused("template_failed", problem, hint="run the command again")
        spec = importlib.util.spec_from_file_location(f"ftdata_template_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Classes look up their module by its name. The folder stays in the path for imports inside of functions.
        sys.modules[spec.name] = module
        sys.path.insert(0, str(path.parent))
        # A compiled file is used again if the size and the second of the last change are equal.
        sys.dont_write_bytecode = True
        try:
            spec.loader.exec_module(module)
        except BaseException as error:  # noqa: BLE001  (the code of the user can raise anything, or exit)
            problem = f"the template file {path} cannot be executed: {type(error).__name__}: {error}"
            hint = "correct the file, or install its packages"
            raise TemplateRefused("template_failed", problem, hint=hint) from None
        return module

    def prepare(self) -> None:
        """Execute the file. An error is raised again when the function is called."""
        try:
            _ = self._module
        except TemplateRefused:
            return


def _read_ids(result: Any) -> list[int] | None:
    """Return the token ids of a result: of a list or an array, or of an object of a tokenizer library."""
    result = result.get("input_ids") if isinstance(result, Mapping) else result
    result = getattr(result, "ids", getattr(result, "tokens", result))
    ids = result.tolist() if hasattr(result, "tolist") else result
    is_list = isinstance(ids, list | tuple) and all(isinstance(number, Integral) for number in ids)
    return [int(number) for number in ids] if is_list else None


def _drop_copies(message: Mapping[str, Any]) -> dict[str, Any]:
    names = _REASONING_COPIES if "reasoning_content" in message else ()
    return {key: value for key, value in message.items() if key not in names}


def _dump_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Convert the arguments of the tool calls of a message to JSON texts."""
    calls = [dict(call) for call in message.get("tool_calls") or ()]
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and not isinstance(function.get("arguments"), str):
            call["function"] = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
    return {**message, "tool_calls": calls} if calls else message
