"""Plugin registries for readers, schemas, templates, mask policies and export formats.

There are three ways to add a plugin:

    @schemas.register("mine")                                   in this process
    [project.entry-points."ftdata.schemas"] mine = "pkg:fn"     in an installed package
    ./my_schemas.py:mine                                        in a file, in place of a name

A plugin is imported when it is first used.
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
    """The name of a plugin, with the name and version of the package that provides it.

    The package is empty if the plugin was registered in this process.
    """

    name: str
    package: str
    version: str

    def __str__(self) -> str:
        return self.name if self.package in ("ftdata", "") else f"{self.name} ({self.package} {self.version})"


class Registry(Generic[T]):
    """A registry that maps names to plugins of one kind, such as readers.

    Attributes:
        group: name of the entry point group.
        noun: the kind of plugin, for error messages.
        version: number of registrations, which caches use as a key.

    >>> shapes = Registry[int]("ftdata.doctest", "shape")
    >>> _ = shapes.register("square")(4)
    >>> shapes.get("square")
    4
    >>> shapes.get("sqare")
    Traceback (most recent call last):
    ftdata.errors.UsageError: [unknown_shape] the shape 'sqare' does not exist. Fix: did you mean 'square'? ...
    """

    def __init__(self, group: str, noun: str) -> None:
        self.group = group
        self.noun = noun
        self.version = 0
        self._registered: dict[str, T] = {}
        self._loaders: dict[str, Callable[[], T]] = {}
        self._files: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument under `name`."""

        def add(value: T) -> T:
            self._registered[name] = value
            self.version += 1
            return value

        return add

    def register_lazily(self, name: str, load: Callable[[], T]) -> None:
        """Register a built-in plugin, which the function `load` returns when the plugin is first used."""
        self._loaders[name] = load

    def get(self, name: str) -> T:
        """Return the plugin with this name. A name of the form `path/to/file.py:name` loads an object from a file.

        Raises:
            UsageError: no plugin has this name (the hint suggests a name), or the plugin cannot be loaded.
        """
        if name in self._registered:
            return self._registered[name]
        if name in self._loaders:
            return self._loaders[name]()
        for point in entry_points(group=self.group, name=name):
            value: T = self._load(point.load, f"plugin {name!r} of {point.value}")
            return value
        path, _, attribute = name.rpartition(":")
        if path.endswith(".py"):
            if name not in self._files:
                self._files[name] = self._load_file(Path(path), attribute)
            return self._files[name]
        code = f"unknown_{self.noun.replace(' ', '_')}"
        raise UsageError(code, f"the {self.noun} {name!r} does not exist", hint=suggest_names(name, self.names()))

    def registered(self) -> dict[str, T]:
        """Return the plugins that were registered in this process, in order of registration."""
        return {name: load() for name, load in self._loaders.items()} | self._registered

    def __contains__(self, name: str) -> bool:
        # Listing entry points takes longer than building a small data set, so they are checked last.
        return name in self._registered or name in self._loaders or name in self.names()

    def names(self) -> list[str]:
        """Return the names of all plugins: first the plugins registered in this process, then the installed plugins."""
        built_in = dict.fromkeys([*self._loaders, *self._registered])
        return [*built_in, *(point.name for point in entry_points(group=self.group))]

    def plugins(self) -> list[Plugin]:
        """Return all plugins with their packages. Plugins registered in this process come before installed plugins."""
        packages = dict.fromkeys(self._loaders, "ftdata")
        packages |= {name: "ftdata" if is_built_in(value) else "" for name, value in self._registered.items()}
        registered = [Plugin(name, package, "") for name, package in packages.items()]
        points = entry_points(group=self.group)
        return registered + [
            Plugin(point.name, point.dist.name if point.dist else "", point.dist.version if point.dist else "")
            for point in points
        ]

    def _load(self, load: Callable[[], Any], description: str) -> Any:
        try:
            return load()
        except Exception as error:
            problem = f"{description} cannot be loaded: {type(error).__name__}: {error}"
            raise UsageError("plugin_failed", problem) from error

    def _load_file(self, path: Path, attribute: str) -> T:
        if not path.is_file():
            raise UsageError("file_not_found", f"the {self.noun} file {path} does not exist")
        spec = importlib.util.spec_from_file_location(f"ftdata_plugin_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        loader = spec.loader
        self._load(lambda: loader.exec_module(module), str(path))
        if not hasattr(module, attribute):
            # Imported names are skipped: another module defines them.
            public = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == spec.name]
            problem = f"{path} does not define {attribute!r}"
            raise UsageError("no_such_name", problem, hint=suggest_names(attribute, public))
        value: T = getattr(module, attribute)
        return value


def is_built_in(value: object) -> bool:
    """Return whether a plugin is part of ftdata.

    The results of other plugins are not cached, because their code can change.
    """
    return str(getattr(getattr(value, "convert", value), "__module__", "")).startswith("ftdata.")
