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
import re
import sys
from bisect import bisect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, count
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

from ftdata.errors import BadRow, TemplateRefused, UsageError, suggest_names
from ftdata.redaction import is_secret_name
from ftdata.templates.attribution.tracked_strings import TrackedString
from ftdata.templates.template import Template, find_template

_MAX_CACHED_IDS = 64
"""Number of results whose token ids are kept until the text is attributed."""

_MARKER = re.compile(r"qzx(\d{6})xzq")

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
    path = Path(file)
    if not path.is_file():
        raise UsageError("file_not_found", f"the template file {path} does not exist")
    source = path.read_bytes().decode("utf-8", "replace")
    functions = _find_functions(source, str(path))
    if function not in functions:
        problem = f"{path} does not define the function {function!r}"
        hint = suggest_names(function, [*functions]) if functions else f"define it in the file with def {function}(...)"
        raise UsageError("no_such_name", problem, hint=hint)
    return str(spec), source


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


def _find_functions(source: str, path: str) -> dict[str, ast.arguments]:
    """Return the arguments of the functions at the top level of a Python file, without running it.

    Raises:
        TemplateRefused: `template_syntax`.
    """
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        raise TemplateRefused("template_syntax", f"{path} is not valid Python: {error}") from None
    return {statement.name: statement.args for statement in statements if isinstance(statement, ast.FunctionDef)}


@dataclass(frozen=True)
class PythonTemplate(Template):
    """A chat template that is a function in a Python file. `name` is `path:function`, and `source` is the file."""

    cpu_factor: ClassVar[int] = 40
    """Functions of vendors are slower than templates."""

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names of the parameters of the function. With `**kwargs`, the variables of the user belong to them."""
        arguments = _find_functions(self.source, self.name)[self.name.rpartition(":")[2]]
        names = {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        extra = {"tools", "add_generation_prompt", *self.kwargs} if arguments.kwarg else set[str]()
        return frozenset(names | extra | {"messages"})

    @property
    def required_parameters(self) -> frozenset[str]:
        """The names of the parameters without a default value, except the first one, which receives the messages."""
        arguments = _find_functions(self.source, self.name)[self.name.rpartition(":")[2]]
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
        """Whether the function prints more after a question if no other message follows."""
        if "add_generation_prompt" in self.variables:
            return True
        question = {"role": "user", "content": "question"}
        try:
            texts = [self._render({"messages": [question] * number}) for number in (1, 2)]
        except BadRow:
            return True
        return not texts[1].startswith(texts[0])

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
        """Whether the function fails if the arguments of a tool call are an object: it parses their JSON text."""
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"key": "value"}}}
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            self._render({"messages": messages})
        except BadRow:
            return True
        return False

    @cached_property
    def _ids_by_text(self) -> dict[str, list[int]]:
        return {}

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids that the function returned for a text; empty if it returns texts."""
        return tuple(self._ids_by_text.get(text, ()))

    def run(self, variables: Mapping[str, Any], *, watch: bool = False) -> TrackedString:  # noqa: ARG002  (functions are not recorded)
        """Call the function, and attribute its result to the texts of the messages and of the tools.

        Raises:
            BadRow: `template_raises`, with the error of the function.
            TemplateRefused: `template_failed`, if the file cannot be executed or the result has a wrong type.
        """
        text = self.render_plain(variables)
        messages = _attribute(text, self._marked_renderer(variables, "messages", _map_texts))
        tools = (
            _attribute(text, self._marked_renderer(variables, "tools", _map_tools)) if variables.get("tools") else []
        )
        return TrackedString(text, _merge_runs(messages, tools) or None)

    def render_plain(self, variables: Mapping[str, Any]) -> str:
        """Call the function without attribution.

        Raises:
            BadRow, TemplateRefused: as in `run`.
        """
        values = _untrack(variables)
        if self._parses_arguments:
            values["messages"] = [*map(_dump_arguments, values["messages"])]
        return self._render(values)

    def _marked_renderer(self, variables: Mapping[str, Any], name: str, map_texts: _MapTexts) -> _MarkerRenderer:
        """Return the texts of a variable, and a function that renders with markers in place of some of them."""
        texts = list[TrackedString]()

        def collect(text: TrackedString) -> str:
            texts.append(text)
            return f"{len(texts)}"

        def render(numbers: Container[int]) -> str | None:
            counter = count()

            def mark(text: TrackedString) -> str:
                number = next(counter)
                return f"qzx{number:06}xzq" if number in numbers else str.__str__(text)

            try:
                return self.render_plain({**variables, name: map_texts(variables[name], mark)})
            except BadRow:
                return None

        map_texts(variables[name], collect)
        return _MarkerRenderer(texts, render)

    def _render(self, variables: Mapping[str, Any]) -> str:
        """Call the function with plain values."""
        values = {**self.kwargs, **variables}
        messages = [_drop_copies(message) for message in values.pop("messages")]
        arguments = {name: value for name, value in values.items() if name in self.variables}
        if not arguments.get("tools"):
            arguments.pop("tools", None)
        function = self._function
        try:
            result = function(messages, **arguments)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # noqa: BLE001  (the code of the user can raise anything)
            reason = f"{type(error).__name__}: {error}"
            raise BadRow("template_raises", f"template {self.name!r} fails on this row: {reason}") from None
        return self._read_result(result)

    def _read_result(self, result: Any) -> str:
        if isinstance(result, str):
            return str.__str__(result)
        ids = getattr(result, "tokens", result)
        decode = self._module.__dict__.get("decode")
        if not isinstance(ids, list) or not all(isinstance(id_, int) for id_ in ids):
            problem = f"the function {self.name} returned a {type(result).__name__}, expected a text or token ids"
            raise TemplateRefused("template_failed", problem, hint="return a str, or a list of int")
        if decode is None:
            problem = f"the function {self.name} returns token ids, but the file has no function 'decode'"
            raise TemplateRefused("template_failed", problem, hint="define decode(ids), which returns the text of ids")
        text = str(decode(ids))
        if len(self._ids_by_text) >= _MAX_CACHED_IDS:
            self._ids_by_text.clear()
        self._ids_by_text[text] = ids
        return text

    @cached_property
    def _function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = self._module.__dict__[self.name.rpartition(":")[2]]
        return function

    @cached_property
    def _module(self) -> ModuleType:
        """The module of the file. Its code runs when this property is read first."""
        path = Path(self.name.rpartition(":")[0])
        if path.read_bytes().decode("utf-8", "replace") != self.source:
            problem = f"the template file {path} has changed while it was used"
            raise TemplateRefused("template_failed", problem, hint="run the command again")
        spec = importlib.util.spec_from_file_location(f"ftdata_template_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.parent))
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # noqa: BLE001  (the code of the user can raise anything)
            problem = f"the template file {path} cannot be executed: {type(error).__name__}: {error}"
            hint = "correct the file, or install its packages"
            raise TemplateRefused("template_failed", problem, hint=hint) from None
        finally:
            sys.path.remove(str(path.parent))
        return module

    def prepare(self) -> None:
        """Execute the file. An error is raised again when the function is called."""
        try:
            _ = self._module
        except TemplateRefused:
            return


def _drop_copies(message: Mapping[str, Any]) -> dict[str, Any]:
    names = _REASONING_COPIES if "reasoning_content" in message else ()
    return {key: value for key, value in message.items() if key not in names}


def _untrack(value: Any) -> Any:
    """Copy a value, with plain strings in place of tracked strings."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_untrack(key): _untrack(item) for key, item in value.items()}
    return [_untrack(item) for item in value] if isinstance(value, list | tuple) else value


def _dump_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Convert the arguments of the tool calls of a message to JSON texts."""
    calls = [dict(call) for call in message.get("tool_calls") or ()]
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and not isinstance(function.get("arguments"), str):
            call["function"] = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
    return {**message, "tool_calls": calls} if calls else message


_FIXED_KEYS = {"id", "role", "tool_call_id", "type"}
"""Keys whose values functions check."""


def _map_texts(value: Any, change: Callable[[TrackedString], str], *, is_data: bool = False) -> Any:
    """Copy a value, with the result of `change` in place of each text that a marker can replace.

    Args:
        value: messages, or a part of them.
        change: called with each text, always in the same order.
        is_data: whether the keys of objects are texts, as in the arguments of tool calls.
    """
    if isinstance(value, TrackedString):
        # Functions test texts for truth, and often omit blank texts.
        return change(value) if str.strip(value) else str.__str__(value)
    if isinstance(value, Mapping):
        copy = dict[Any, Any]()
        for key, item in value.items():
            name = _map_texts(key, change, is_data=True) if is_data else _untrack(key)
            is_fixed = not is_data and key in _FIXED_KEYS
            is_inner_data = is_data or key == "arguments"
            copy[name] = _untrack(item) if is_fixed else _map_texts(item, change, is_data=is_inner_data)
        return copy
    return [_map_texts(item, change, is_data=is_data) for item in value] if isinstance(value, list | tuple) else value


_TOOL_TEXTS = {"description", "enum", "name", "required", "title"}
"""Keys of tool definitions whose texts belong to the data. The keys of `properties` do, too."""


def _map_tools(tools: Any, change: Callable[[TrackedString], str]) -> Any:
    """Copy tool definitions like `_map_texts`. Equal texts get equal results, because schemas refer to names."""
    results = dict[str, str]()

    def change_once(value: Any) -> Any:
        if isinstance(value, list):
            return [change_once(item) for item in value]
        if not isinstance(value, str) or not str.strip(value):
            return _untrack(value)
        if value not in results:
            results[str.__str__(value)] = change(TrackedString.from_str(value))
        return results[value]

    def walk(value: Any, *, has_names: bool = False) -> Any:
        if isinstance(value, Mapping):
            return {
                (change_once(key) if has_names else _untrack(key)): change_once(item)
                if key in _TOOL_TEXTS and not has_names and not isinstance(item, Mapping)
                else walk(item, has_names=key == "properties" and not has_names)
                for key, item in value.items()
            }
        return [walk(item) for item in value] if isinstance(value, list | tuple) else _untrack(value)

    return walk(tools)


class _MarkerRenderer(NamedTuple):
    """The texts of a variable, and a function that renders the conversation with markers in place of some texts.

    Attributes:
        texts: the texts, by number.
        render: numbers -> rendered text, or `None` if the function fails.
    """

    texts: Sequence[TrackedString]
    render: Callable[[Container[int]], str | None]


_MapTexts = Callable[[Any, Callable[[TrackedString], str]], Any]


def _attribute(text: str, marked: _MarkerRenderer) -> list[tuple[int, int]]:
    """Return the length and the owner of each range of a text; an empty list if no text can be attributed."""

    def align(numbers: Container[int]) -> list[tuple[int, int]] | None:
        rendered = marked.render(numbers)
        return None if rendered is None else _align(text, marked.texts, rendered)

    if not marked.texts:
        return []
    if (runs := align(range(len(marked.texts)))) is not None:
        return runs
    # The function reads some of the texts. The other texts are those that can be marked alone.
    return align({number for number in range(len(marked.texts)) if align({number}) is not None}) or []


def _merge_runs(first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge two attributions of a text. The first one has precedence.

    >>> _merge_runs([(4, 0), (2, 8)], [(2, 5), (4, 0)])
    [(2, 5), (2, 0), (2, 8)]
    """
    if not first or not second:
        return [*(first or second)]
    ends = [[*accumulate(size for size, _ in runs)] for runs in (first, second)]
    merged, start = list[tuple[int, int]](), 0
    for end in sorted({*ends[0], *ends[1]}):
        owners = [runs[bisect(edges, start)][1] for runs, edges in zip((first, second), ends, strict=True)]
        merged.append((end - start, owners[0] or owners[1]))
        start = end
    return merged


def _align(text: str, texts: Sequence[TrackedString], marked: str) -> list[tuple[int, int]] | None:
    """Return the length and the owner of each range of a text, or `None` if the marked text has another structure.

    >>> _align("<u>Hi</u>", [TrackedString("Hi ", [(3, 8)])], "<u>qzx000000xzq</u>")
    [(3, 0), (2, 8), (4, 0)]
    """
    pieces = _MARKER.split(marked)
    numbers = [int(number) for number in pieces[1::2]]
    if any(number >= len(texts) for number in numbers) or not text.startswith(pieces[0]):
        return None
    ends = _find_ends(text, texts, numbers, pieces[2::2], len(pieces[0]))
    if ends is None:
        return None
    runs, position = [(len(pieces[0]), 0)], len(pieces[0])
    for number, gap, end in zip(numbers, pieces[2::2], ends, strict=True):
        owner = texts[number].runs[0][1] if texts[number].runs else 0
        runs += [(end - position, owner), (len(gap), 0)]
        position = end + len(gap)
    return [run for run in runs if run[0]]


def _find_ends(
    text: str, texts: Sequence[str], numbers: Sequence[int], gaps: Sequence[str], start: int
) -> list[int] | None:
    """Return the end of each text, so that the gaps between the texts fit, too; `None` if no ends fit.

    The search goes from text to text, and back to the previous one if no form of the next one fits.
    """
    ends = list[int]()
    choices = list[Iterator[int]]()
    position = start
    while True:
        if len(choices) == len(ends):
            if len(ends) == len(numbers):
                if position == len(text):
                    return ends
            else:
                number = len(choices)
                choices.append(_possible_ends(text, position, texts[numbers[number]], gaps[number]))
        end = next(choices[-1], None) if len(choices) > len(ends) else None
        if end is not None:
            ends.append(end)
            position = end + len(gaps[len(ends) - 1])
            continue
        if len(choices) > len(ends):
            choices.pop()
        if not ends:
            return None
        ends.pop()


def _possible_ends(text: str, position: int, value: str, gap: str) -> Iterator[int]:
    """Yield the ends of a text at a position, in all forms in which a function can print it, before a gap."""
    for form in dict.fromkeys(_printed_forms(str.__str__(value))):
        end = position + len(form)
        if text.startswith(form, position) and text.startswith(gap, end):
            yield end


def _printed_forms(value: str) -> Iterable[str]:
    """Yield the forms of a text: unchanged, without whitespace around it, and inside a JSON string."""
    for form in (value, value.strip(), value.rstrip(), value.lstrip()):
        yield form
        yield json.dumps(form, ensure_ascii=False)[1:-1]
        yield json.dumps(form)[1:-1]
