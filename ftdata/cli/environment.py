"""What a bug report needs to know of the machine: versions, and settings of the environment; nothing that is secret."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from ftdata._version import __version__
from ftdata.redaction import redact_text

_SHOWN = ("FTDATA_CACHE", "FTDATA_DEBUG", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "NO_COLOR",
          "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "XDG_CACHE_HOME")  # fmt: skip
_NAMED = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
"""Settings that matter, and may hold passwords in any form: that they are set is told, and no more."""


@dataclass(frozen=True, slots=True)
class EnvironmentReport:
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


def describe_environment() -> EnvironmentReport:
    """Return what a bug report needs to know of the machine. Imports none of the packages that it names.

    >>> describe_environment().packages["numpy"] is not None
    True
    """
    return EnvironmentReport(
        ftdata=__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.machine()}, {platform.platform()}",
        processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        packages={name: _version(name) for name in _needed()},
        settings=dict(_settings()),
    )


def _settings() -> Iterator[tuple[str, str]]:
    for name, value in sorted(os.environ.items()):
        if name.upper() in _NAMED:
            yield name, "(set)"
        elif name in _SHOWN:
            # Of a URL no more than the host, and not that where anything in it may be somebody's key.
            plain = re.fullmatch(r"(\w+://[\w.:-]+)(/[\w./-]*)?", value)
            hidden = f"{value.partition('://')[0]}://..." if "://" in value else "(set)" if "@" in value else value
            yield name, redact_text(plain[1] if plain else hidden)


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
