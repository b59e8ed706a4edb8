"""Collect versions and environment settings for a bug report, without secrets."""

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

_REPORTED_VARIABLES = (
    "FTDATA_CACHE", "FTDATA_DEBUG", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "NO_COLOR",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "XDG_CACHE_HOME",
)  # fmt: skip
_REDACTED_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
"""Variables that may contain passwords: only their presence is reported."""


@dataclass(frozen=True, slots=True)
class EnvironmentReport:
    """Versions and settings of the environment, for a bug report.

    Attributes:
        ftdata: version of ftdata.
        python: implementation and version of Python.
        system: architecture and operating system.
        processors: number of processors available to this process.
        packages: package -> version, or `None` if it is not installed, for the dependencies of ftdata and its extras.
        settings: environment variables that affect ftdata.
    """

    ftdata: str
    python: str
    system: str
    processors: int
    packages: dict[str, str | None]
    settings: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Convert the report to a JSON-serializable dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        width = max(map(len, self.packages), default=8)
        lines = [f"{name:<{width}}  {value or '-'}" for name, value in self.packages.items()]
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        machine = f"{self.python} on {self.system}, {self.processors} processors"
        return "\n".join((f"ftdata {self.ftdata}, {machine}", *settings, "", *lines))


def describe_environment() -> EnvironmentReport:
    """Collect package versions and settings for a bug report, without importing the packages.

    >>> describe_environment().packages["numpy"] is not None
    True
    """
    return EnvironmentReport(
        ftdata=__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.machine()}, {platform.platform()}",
        processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        packages={name: _find_version(name) for name in _list_packages()},
        settings=dict(_iter_settings()),
    )


def _iter_settings() -> Iterator[tuple[str, str]]:
    for name, value in sorted(os.environ.items()):
        if name.upper() in _REDACTED_VARIABLES:
            yield name, "(set)"
        elif name in _REPORTED_VARIABLES:
            # A URL is reported without credentials and query; any other URL form is hidden, since it may contain a key.
            plain_url = re.fullmatch(r"(\w+://[\w.:-]+)(/[\w./-]*)?", value)
            hidden = f"{value.partition('://')[0]}://..." if "://" in value else "(set)" if "@" in value else value
            yield name, redact_text(plain_url[1] if plain_url else hidden)


def _list_packages() -> list[str]:
    """Return the names of the packages that ftdata and its optional extras need at run time.

    The extras `test`, `dev` and `docs` are left out.
    """
    requirements = requires("ftdata") or []
    runtime = [line for line in requirements if not re.search(r"extra == ['\"](?:test|dev|docs)['\"]", line)]
    return list(dict.fromkeys(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in runtime))


def _find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
