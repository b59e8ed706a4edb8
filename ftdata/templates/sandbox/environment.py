"""The one place where templates run: Jinja2's immutable sandbox, set up as transformers sets it up.

Templates are code from strangers. They see plain JSON values and strings, never files, modules or Python
types. Two things differ from transformers on purpose: strings remember who wrote them (`tracked.Tracked`), and
the clock stands still, at a date that the build records.
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
    """An undefined name may be tested (`{% if tools %}`) but never printed: a misspelt field is an error.

    But for special tokens, which not every tokenizer has.
    """

    __iter__ = __len__ = jinja2.Undefined._fail_with_undefined_error

    def __str__(self) -> str:
        if self._undefined_obj is jinja2.utils.missing and str(self._undefined_name).endswith("_token"):
            return ""
        return str(self._fail_with_undefined_error())


class GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`: what stands inside is what the model must produce.

    Each block's output carries a number of its own in its owners (`tracked.BLOCK`).
    """

    tags = {"generation"}  # noqa: RUF012  (Jinja's own contract)
    blocks = count(1)

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn the block into a call that marks its output."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return TrackedString.of(caller()).in_block(next(self.blocks))


class SandboxEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with string operations that keep the memory of who wrote what."""

    code_generator_class = UnfoldedCodeGenerator

    watch = False
    # Jinja calls it with an iterable of strings wherever it joins output.
    concat = staticmethod(concat_tracked)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look an attribute up; a string has the public methods of `str` and no others, with tracked results."""
        if not isinstance(obj, str):
            return super().getattr(obj, attribute)
        if attribute.startswith("_"):
            return self.unsafe_undefined(obj, attribute)
        if not hasattr(str, attribute):
            return self.undefined(obj=obj, name=attribute)
        if attribute in ("format", "format_map"):
            # They reach into what they are given: Jinja's own look at each attribute as it does.
            if self.watch:
                mark_opaque()
            return self.wrap_str_format(getattr(str.__str__(obj), attribute))
        if self.watch and not isinstance(obj, WatchedString):
            return watch_method(obj, attribute)
        return getattr(TrackedString.of(obj), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Look an item up, as `getattr` does."""
        if not isinstance(obj, str):
            return super().getitem(obj, argument)
        return (
            self.getattr(obj, argument)
            if isinstance(argument, str)
            else super().getitem(TrackedString.of(obj), argument)
        )


class TemplateDict:
    """The `dict` that templates may call; the type itself would open the way to its methods' internals."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Make a dict."""
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(keys, value)


class TemplateNamespace(Namespace):
    """A namespace that stores no underscore names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        message = f"a namespace cannot hold the private name {name!r}"
        raise jinja2.exceptions.SecurityError(message)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    def plain(x: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators)

    return dump_tracked_json(value, plain, sort_keys=sort_keys)


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment, value: Iterable[Any], separator: str = "", attribute: str | None = None
) -> str:
    if attribute is not None:
        value = (environment.getattr(item, attribute) for item in value)
    return TrackedString.of(str(separator)).join(list(map(str, value)))


@jinja2.pass_environment
def _watched_join(
    environment: jinja2.Environment, value: Iterable[Any], separator: str = "", attribute: str | None = None
) -> str:
    items = value if attribute is None else (environment.getattr(item, attribute) for item in value)
    return join_watched([part for item in items for part in (str(separator), str(item))][1:])


def _watched_str_join(pieces: Iterable[Any]) -> str:
    return join_watched(map(str, pieces))


def _watched_in(value: Any, container: Any) -> bool:
    if isinstance(value, WatchedString):
        # Python looks for one text in another without asking either.
        mark_opaque()
    return value in container


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    arguments = (str(old), str(new), -1 if count is None else count)
    text = TrackedString.of(str(value))
    if isinstance(text, WatchedString) or not any(isinstance(one, WatchedString) for one in arguments):
        return text.replace(*arguments)
    return str(watch_method(text, "replace")(*arguments))


def _str_join(pieces: Iterable[Any]) -> str:
    return concat_tracked(map(str, pieces))


def _clock(date: datetime.datetime) -> Callable[[str], str]:
    return date.strftime


_TRANSPARENT = {"default", "d", "dictsort", "first", "items", "last", "length", "list", "map", "reject", "rejectattr"}
_TRANSPARENT |= {"capitalize", "lower", "replace", "select", "selectattr", "string", "trim", "upper"}
"""Filters that learn about strings only through the methods of `str`."""


def _watch(environment: SandboxEnvironment) -> None:
    filters = environment.filters
    for name, function in list(filters.items()):
        if name == "tojson":
            filters[name] = watch_result(function)
        elif name not in _TRANSPARENT:
            filters[name] = watch_unknown_call(function)
    filters |= {"join": _watched_join, "length": watched_length, "count": watched_length}
    environment.tests["in"] = _watched_in
    for name in ("iterable", "sequence"):
        test = environment.tests[name]
        environment.tests[name] = lambda value, test=test: isinstance(value, str) or test(value)
    environment.concat = join_watched
    environment.watch = True


def _environment(date: datetime.datetime, strict: bool) -> SandboxEnvironment:
    environment = SandboxEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, loopcontrols],
        undefined=RaisingUndefined if strict else jinja2.Undefined,
    )
    environment.filters |= {"tojson": _tojson, "join": _join, "replace": _replace, "safe": mark_safe}
    # It prints another text each time.
    del environment.globals["lipsum"], environment.filters["random"]
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _clock(date),
        "dict": TemplateDict(),
        "namespace": TemplateNamespace,
    }
    return environment


@lru_cache(maxsize=1)
def sandbox_environment() -> SandboxEnvironment:
    """Return the environment in which templates are read and compiled.

    What they compile to does not depend on how they are run: strict, watched.
    """
    return _environment(datetime.datetime.fromtimestamp(0, datetime.UTC), strict=False)


@lru_cache(maxsize=64)
def _code(source: str) -> CodeType:
    return sandbox_environment().compile(source)


@lru_cache(maxsize=64)
def compile_template(source: str, date: datetime.datetime, strict: bool, watch: bool = False) -> jinja2.Template:
    """Compile a template for tracked rendering.

    Args:
        source: the Jinja text.
        date: what `strftime_now` prints.
        strict: an undefined name that is printed is an error, instead of nothing.
        watch: let nothing that is asked of watched strings go by unnoticed.

    Raises:
        jinja2.TemplateSyntaxError: with the template line.
    """
    environment = _environment(date, strict)
    if watch:
        _watch(environment)
    # `a ~ b` compiles to a call of the module-level `str_join`, which is looked up in the template's namespace.
    namespace: dict[str, Any] = {"environment": environment, "__file__": "<template>"}
    exec(_code(source), namespace)  # noqa: S102  (how Jinja itself runs its own generated code)
    namespace["str_join"] = _watched_str_join if watch else _str_join
    return jinja2.Template._from_namespace(environment, namespace, environment.make_globals(None))
