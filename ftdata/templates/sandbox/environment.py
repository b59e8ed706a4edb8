"""The Jinja2 sandbox that runs all templates, with the same settings as in transformers.

Templates are untrusted code. They can access plain JSON values and strings, but no files, modules or Python types.
Two properties differ from transformers: strings record the owners of their characters (`TrackedString`), and the clock
is fixed at a date that the build records.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import count
from types import CodeType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ftdata.templates.attribution.tracked_strings import TrackedString, concat_tracked, dump_tracked_json, mark_safe
from ftdata.templates.attribution.watched_strings import (
    WatchedLength,
    WatchedString,
    join_watched,
    mark_opaque,
    watch_method,
    watch_result,
    watch_unknown_call,
    watched_length,
)
from ftdata.templates.sandbox.constant_folding import UnfoldedCodeGenerator


class RaisingUndefined(jinja2.Undefined):
    """An undefined template variable that raises an error when it is printed, but not when it is tested.

    A misspelled name is therefore an error, while `{% if tools %}` is valid without tools. Undefined special tokens
    print an empty string, since not every tokenizer defines all special tokens.
    """

    __iter__ = __len__ = jinja2.Undefined._fail_with_undefined_error

    def __str__(self) -> str:
        if self._undefined_obj is jinja2.utils.missing and str(self._undefined_name).endswith("_token"):
            return ""
        return str(self._fail_with_undefined_error())


class GenerationTag(Extension):
    """A Jinja extension for the tag `{% generation %}`, which marks the text that the model must generate.

    The owners in the output of a block contain the number of the block (`tracked_strings.BLOCK`), which is unique in
    the rendered text.
    """

    tags = {"generation"}  # noqa: RUF012  (Jinja requires this attribute)
    blocks = count(1)

    def parse(self, parser: Parser) -> nodes.Node:
        """Convert the `{% generation %}` block to a call that marks the output of the block as generated."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return TrackedString.from_str(caller()).in_block(next(self.blocks))


class SandboxEnvironment(ImmutableSandboxedEnvironment):
    """A Jinja sandbox in which strings record where each character comes from (see `TrackedString`)."""

    code_generator_class = UnfoldedCodeGenerator

    watch = False
    # Jinja calls this function with an iterable of strings to join the output.
    concat = staticmethod(concat_tracked)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look up an attribute for a template. For strings, allow only the public methods of `str`."""
        if not isinstance(obj, str):
            return super().getattr(obj, attribute)
        if attribute.startswith("_"):
            return self.unsafe_undefined(obj, attribute)
        if not hasattr(str, attribute):
            return self.undefined(obj=obj, name=attribute)
        if attribute in ("format", "format_map"):
            # Format strings can access attributes of the arguments. Jinja's versions check each access.
            if self.watch:
                mark_opaque()
            return self.wrap_str_format(getattr(str.__str__(obj), attribute))
        if self.watch and not isinstance(obj, WatchedString):
            return watch_method(obj, attribute)
        return getattr(TrackedString.from_str(obj), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Look up an item, such as `message["role"]`, for a template. The restrictions of `getattr` also apply here."""
        if not isinstance(obj, str):
            return super().getitem(obj, argument)
        return (
            self.getattr(obj, argument)
            if isinstance(argument, str)
            else super().getitem(TrackedString.from_str(obj), argument)
        )


class TemplateDict:
    """A replacement for `dict` in templates. The type `dict` would expose its internal attributes to templates."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Create a `dict`. The arguments are the same as for the built-in type."""
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """Create a `dict` from keys and one value, like `dict.fromkeys`."""
        return dict.fromkeys(keys, value)


class TemplateNamespace(Namespace):
    """A Jinja `namespace` object that rejects names with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot contain the private name {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    def dump(item: Any) -> str:
        return json.dumps(item, ensure_ascii=ensure_ascii, indent=indent, separators=separators)

    return dump_tracked_json(value, dump, sort_keys=sort_keys)


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment, value: Iterable[Any], separator: str = "", attribute: str | None = None
) -> str:
    if attribute is not None:
        value = (environment.getattr(item, attribute) for item in value)
    return TrackedString.from_str(str(separator)).join(list(map(str, value)))


@jinja2.pass_environment
def _watched_join(
    environment: jinja2.Environment, value: Iterable[Any], separator: str = "", attribute: str | None = None
) -> str:
    items = value if attribute is None else (environment.getattr(item, attribute) for item in value)
    return join_watched([part for item in items for part in (str(separator), str(item))][1:])


def _watched_str_join(pieces: Iterable[Any]) -> str:
    return join_watched(map(str, pieces))


def _watch_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a built-in function, which reads its arguments without calling their methods."""

    def call(*arguments: Any) -> Any:
        if any(isinstance(argument, WatchedString | WatchedLength) for argument in arguments):
            mark_opaque()
        return function(*arguments)

    return call


def _watched_in(value: Any, container: Any) -> bool:
    if isinstance(value, WatchedString):
        # Python searches one text in the other without calling their methods, so nothing would be recorded.
        mark_opaque()
    return value in container


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    arguments = (str(old), str(new), -1 if count is None else count)
    text = TrackedString.from_str(str(value))
    if isinstance(text, WatchedString) or not any(isinstance(argument, WatchedString) for argument in arguments):
        return text.replace(*arguments)
    return str(watch_method(text, "replace")(*arguments))


def _str_join(pieces: Iterable[Any]) -> str:
    return concat_tracked(map(str, pieces))


def restart_block_numbers() -> None:
    """Number the `{% generation %}` blocks of the next rendered text from 1."""
    GenerationTag.blocks = count(1)


def _make_clock(date: datetime.datetime) -> Callable[[str], str]:
    return date.strftime


_RECORDED_FILTERS = {
    "capitalize", "d", "default", "dictsort", "first", "items", "last", "length", "list", "lower", "map", "reject",
    "rejectattr", "replace", "select", "selectattr", "string", "trim", "upper",
}  # fmt: skip
"""Filters that call only methods of `str` on strings, which are recorded."""


def _watch_environment(environment: SandboxEnvironment) -> None:
    filters = environment.filters
    for name, function in list(filters.items()):
        if name == "tojson":
            filters[name] = watch_result(function)
        elif name not in _RECORDED_FILTERS:
            filters[name] = watch_unknown_call(function)
    filters |= {"join": _watched_join, "length": watched_length, "count": watched_length}
    environment.tests["in"] = _watched_in
    for name in ("range", "strftime_now"):
        built_in: Any = environment.globals[name]
        environment.globals[name] = _watch_arguments(built_in)
    for name in ("iterable", "sequence"):
        test = environment.tests[name]
        environment.tests[name] = lambda value, test=test: isinstance(value, str) or test(value)
    environment.concat = join_watched
    environment.watch = True


def _make_environment(date: datetime.datetime, strict: bool) -> SandboxEnvironment:
    environment = SandboxEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, loopcontrols],
        undefined=RaisingUndefined if strict else jinja2.Undefined,
    )
    environment.filters |= {"tojson": _tojson, "join": _join, "replace": _replace, "safe": mark_safe}
    # These two are random, and the text must be reproducible.
    del environment.globals["lipsum"], environment.filters["random"]
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _make_clock(date),
        "dict": TemplateDict(),
        "namespace": TemplateNamespace,
    }
    return environment


@lru_cache(maxsize=1)
def sandbox_environment() -> SandboxEnvironment:
    """Return the shared Jinja environment that parses and compiles templates.

    The compiled code does not depend on the options `strict` and `watch` of a template.
    """
    return _make_environment(datetime.datetime.fromtimestamp(0, datetime.UTC), strict=False)


@lru_cache(maxsize=64)
def _compile_source(source: str) -> CodeType:
    return sandbox_environment().compile(source)


@lru_cache(maxsize=64)
def compile_template(source: str, date: datetime.datetime, strict: bool, watch: bool = False) -> jinja2.Template:
    """Compile a template so that its output is a `TrackedString`.

    Args:
        source: Jinja source.
        date: date that `strftime_now` formats.
        strict: whether printing an undefined name is an error.
        watch: whether to record all operations on watched strings.

    Raises:
        jinja2.TemplateSyntaxError: the source is invalid. The error contains the line number.
    """
    environment = _make_environment(date, strict)
    if watch:
        _watch_environment(environment)
    # `a ~ b` compiles to a call of `str_join`, which is looked up in the namespace of the template.
    namespace: dict[str, Any] = {"environment": environment, "__file__": "<template>"}
    exec(_compile_source(source), namespace)  # noqa: S102  (Jinja runs its generated code in the same way)
    namespace["str_join"] = _watched_str_join if watch else _str_join
    return jinja2.Template._from_namespace(environment, namespace, environment.make_globals(None))
