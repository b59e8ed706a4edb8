"""Examine templates in a process of their own: they are code from strangers, and may loop, or fill the memory.

The verdict is kept by content: the same template with the same tokens and options is examined once.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from ftdata._version import __version__
from ftdata.errors import TemplateRefused
from ftdata.templates.template import Template
from ftdata.templates.verify import TemplateReport, examine

SECONDS = 5
MEGABYTES = 512


def verify(template: Template) -> TemplateReport:
    """Examine a template in a child process of at most 5 s and 512 MB, or remember what was found.

    Verdicts are kept in `$XDG_CACHE_HOME/ftdata` (`~/.cache/ftdata`), where that can be written.

    Raises:
        TemplateRefused: it cannot be compiled; `template_limits`: it takes more time or memory than any template
            needs.
    """
    return _examined(json.dumps(_description(template), sort_keys=True))


def trusted(template: Template) -> Template:
    """Return the template, examined and not contradicted.

    Raises:
        TemplateRefused: as `verify`, or `template_unproved`: two ways of finding what is trained disagree about it.
    """
    if template.source and (against := verify(template).contradictions):
        raise TemplateRefused(
            "template_unproved",
            f"two ways of finding what template {template.name!r} has the model produce disagree: {against[0]}",
            hint="mark what is trained with {% generation %} in a template file of your own",
        )
    return template


def _description(template: Template) -> dict[str, Any]:
    return {
        "name": template.name,
        "source": template.source,
        "strict": template.strict,
        "special_tokens": dict(template.special_tokens),
        "control": template.control.pattern if template.control is not None else None,
        "date": template.date.isoformat(),
        "kwargs": dict(template.kwargs),
    }


@lru_cache(maxsize=1024)
def _examined(description: str) -> TemplateReport:
    key = xxhash.xxh3_128_hexdigest(f"{__version__} {_own_code()} {description}".encode())
    file = _cache() / f"{key}.json"
    with suppress(OSError, ValueError, TypeError):
        return _report(json.loads(file.read_text(encoding="utf-8")))
    answer = _ask(description)
    if "refused" in answer:
        raise TemplateRefused(**answer["refused"])
    with suppress(OSError):
        _keep(file, json.dumps(answer["report"]))
    return _report(answer["report"])


def _report(found: Mapping[str, Any]) -> TemplateReport:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return TemplateReport(**fields)


@lru_cache(maxsize=1)
def _own_code() -> str:
    """Return a hash of the modules that reach a verdict: an editable install changes without a new version."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return xxhash.xxh3_64_hexdigest(b"".join(file.read_bytes() for file in files))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftdata" / "verdicts"


def _keep(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as temporary:
        temporary.write(text)
    Path(temporary.name).replace(file)


def _ask(description: str) -> dict[str, Any]:
    name = json.loads(description)["name"]
    command = [sys.executable, "-P", "-m", "ftdata.templates.child"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "0"}
    try:
        ran = subprocess.run(  # noqa: S603  (our own module, in our own interpreter)
            command,
            input=description,
            capture_output=True,
            text=True,
            timeout=2 * SECONDS,
            env=environment,
            check=False,
        )
        return dict(json.loads(ran.stdout))
    except (subprocess.TimeoutExpired, ValueError):
        raise TemplateRefused(
            "template_limits",
            f"template {name!r} needs more than {SECONDS} s or {MEGABYTES} MB for a few small conversations",
            hint="use another template: this one loops, or is an attack",
        ) from None


def _limit() -> None:
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Read a template's description from stdin, and print the report, or the refusal, as JSON."""
    _limit()
    found = json.loads(sys.stdin.read())
    control = re.compile(found.pop("control")) if found["control"] else found.pop("control")
    date = datetime.datetime.fromisoformat(found.pop("date"))
    try:
        answer = {"report": examine(Template(**found, control=control, date=date)).as_dict()}
    except TemplateRefused as error:
        answer = {"refused": {"code": error.code, "message": error.message, "hint": error.hint}}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
