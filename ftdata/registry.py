"""Plug-in points: four maps from a name to a function (templates: a file), filled by decorator, entry point or file.

    @schemas.register("mine")                                   in process
    [project.entry-points."ftdata.schemas"] mine = "pkg:fn"     installed
    ./my_schemas.py:mine                                        by name, wherever a name is asked for

A plug-in is imported when its name is asked for, not before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from ftdata.errors import UsageError, suggest_names

T = TypeVar("T")


class Plugin(NamedTuple):
    """A name of a registry, and the package that it comes from; no package: it was registered in this process."""

    name: str
    package: str
    version: str

    def __str__(self) -> str:
        return self.name if self.package in ("ftdata", "") else f"{self.name} ({self.package} {self.version})"


class Registry(Generic[T]):
    """A name -> value map for one plug-in point; `group` names its entry points, `version` counts what was registered.

    >>> shapes = Registry[int]("ftdata.doctest", "shape")
    >>> _ = shapes.register("square")(4)
    >>> shapes.get("square")
    4
    >>> shapes.get("sqare")
    Traceback (most recent call last):
    ftdata.errors.UsageError: [unknown_shape] no shape named 'sqare'. Fix: did you mean 'square'? known: square
    """

    def __init__(self, group: str, noun: str) -> None:
        self.group = group
        self.noun = noun
        self.version = 0
        self._own: dict[str, T] = {}
        self._files: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument under `name`."""

        def add(value: T) -> T:
            self._own[name] = value
            self.version += 1
            return value

        return add

    def get(self, name: str) -> T:
        """Return what is registered under `name`, or what `path/to/file.py:name` defines.

        Raises:
            UsageError: nothing has this name (the hint holds the nearest ones), or what has cannot be loaded.
        """
        if name in self._own:
            return self._own[name]
        for point in entry_points(group=self.group, name=name):
            value: T = self._loaded(point.load, f"plug-in {name!r} of {point.value}")
            return value
        path, _, attribute = name.rpartition(":")
        if path.endswith(".py"):
            if name not in self._files:
                self._files[name] = self._from_file(Path(path), attribute)
            return self._files[name]
        code = f"unknown_{self.noun}"
        raise UsageError(code, f"no {self.noun} named {name!r}", hint=suggest_names(name, self.names()))

    def registered(self) -> dict[str, T]:
        """Return the values registered in process, in order of registration."""
        return dict(self._own)

    def __contains__(self, name: str) -> bool:
        # To ask what is installed takes longer than to build a small data set.
        return name in self._own or name in self.names()

    def names(self) -> list[str]:
        """Return all known names: registered first, then installed plug-ins."""
        return [*self._own, *(point.name for point in entry_points(group=self.group))]

    def plugins(self) -> list[Plugin]:
        """Return all that is known, each with the package that it comes from: registered first, then installed."""
        own = [Plugin(name, "ftdata" if is_built_in(value) else "", "") for name, value in self._own.items()]
        points = entry_points(group=self.group)
        return own + [
            Plugin(one.name, one.dist.name if one.dist else "", one.dist.version if one.dist else "") for one in points
        ]

    def _loaded(self, load: Callable[[], Any], what: str) -> Any:
        try:
            return load()
        except Exception as error:
            raise UsageError("plugin_failed", f"{what} cannot be loaded: {type(error).__name__}: {error}") from error

    def _from_file(self, path: Path, attribute: str) -> T:
        if not path.is_file():
            raise UsageError("file_not_found", f"no file {path} to load a {self.noun} from")
        spec = importlib.util.spec_from_file_location(f"ftdata_plugin_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        loader = spec.loader
        self._loaded(lambda: loader.exec_module(module), str(path))
        if not hasattr(module, attribute):
            public = [n for n in vars(module) if not n.startswith("_")]
            raise UsageError("no_such_name", f"{path} defines no {attribute!r}", hint=suggest_names(attribute, public))
        value: T = getattr(module, attribute)
        return value


def is_built_in(value: object) -> bool:
    """Whether a schema, policy or reader is one of this package: of others nobody knows what they do next time."""
    return str(getattr(getattr(value, "convert", value), "__module__", "")).startswith("ftdata.")
