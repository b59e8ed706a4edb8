"""What a bug report needs to know of the machine: versions, and settings of the environment; nothing that is secret."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from ftdata._version import __version__

_SETTINGS = re.compile(
    r"FTDATA_\w+|HF_(?:HOME|ENDPOINT|HUB_\w+)|HTTPS?_PROXY|NO_COLOR|CUDA_VISIBLE_DEVICES", re.IGNORECASE
)
_SECRET = re.compile(r"//[^/@]*@")


@dataclass(frozen=True, slots=True)
class Environment:
    """Where ftdata runs.

    Attributes:
        ftdata: its version.
        python: version and implementation.
        system: of the machine.
        processors: how many this process may use.
        packages: package -> version, `None` where it is not installed; of ftdata and of its extras.
        settings: variables of the environment that change what it does.
    """

    ftdata: str
    python: str
    system: str
    processors: int
    packages: dict[str, str | None]
    settings: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)

    def __str__(self) -> str:
        width = max(map(len, self.packages), default=8)
        lines = [f"{name:<{width}}  {value or '-'}" for name, value in self.packages.items()]
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        machine = f"{self.python} on {self.system}, {self.processors} processors"
        return "\n".join((f"ftdata {self.ftdata}, {machine}", *settings, "", *lines))


def environment() -> Environment:
    """Return what a bug report needs to know of the machine. Imports none of the packages that it names.

    >>> environment().packages["numpy"] is not None
    True
    """
    return Environment(
        ftdata=__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.machine()}, {platform.platform()}",
        processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        packages={name: _version(name) for name in _needed()},
        settings={
            name: _SECRET.sub("//***@", value)
            for name, value in sorted(os.environ.items())
            if _SETTINGS.fullmatch(name)
        },
    )


def _needed() -> list[str]:
    """Return the packages that ftdata names, its own first; those that only its tests need are left out."""
    lines = requires("ftdata") or []
    own = [line for line in lines if not re.search(r"extra == ['\"](?:test|dev|docs)['\"]", line)]
    return list(dict.fromkeys(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in own))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
