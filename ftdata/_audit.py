"""Audit: what is wrong with data or a template, with stable codes, counts, examples and a fix each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tokenizers
import xxhash

from ftdata.examples import Built, build_rows
from ftdata.readers import sources
from ftdata.recipe import make_recipe
from ftdata.templates import Template, find, templates
from ftdata.templates.child import verify
from ftdata.templates.verify import TemplateReport
from ftdata.tokenize import Tokenizer
from ftdata.types import Example, Reject


@dataclass(frozen=True, slots=True)
class Check:
    """One check over built examples: `finds` looks at each."""

    code: str
    severity: str
    says: str
    fix: str
    finds: Callable[[Example], bool]


def _flagged(flag: str) -> Callable[[Example], bool]:
    return lambda example: flag in example.flags


_MOJIBAKE = re.compile("â€[™œ\x9d“”¢¦]|Ã[©¨¤¶¼±³¡]|Â[ £°»«]|ï»¿")

CHECKS = (
    Check(
        "no_stop",
        "error",
        "a trained turn does not end in a trained control token",
        "use a template that ends turns with one, and a mask that trains it",
        _flagged("no_stop"),
    ),
    Check(
        "content_cut",
        "warning",
        "the template prints only part of a message",
        "see what is lost with `ftdata preview --row`",
        _flagged("content_cut"),
    ),
    Check(
        "reasoning_dropped",
        "warning",
        "the template does not print reasoning",
        "use a template that does, or take the reasoning out",
        _flagged("reasoning_dropped"),
    ),
    Check(
        "control_tokens",
        "warning",
        "control tokens are spelled in the data",
        "they are tokenised as plain text; clean the data if they are left-overs of a template",
        _flagged("control_tokens"),
    ),
    Check(
        "trailing_turns",
        "warning",
        "the conversation ends with messages that nothing answers",
        "drop them from the data",
        _flagged("trailing_turns"),
    ),
    Check(
        "mojibake",
        "warning",
        "the text was decoded with a wrong encoding once",
        "repair it where it was made, for example with ftfy",
        lambda example: bool(_MOJIBAKE.search(example.text)),
    ),
)


@dataclass
class Finding:
    """What one check found: how often, and where first."""

    code: str
    severity: str
    says: str
    fix: str
    count: int = 0
    where: list[str] = field(default_factory=list)

    def add(self, place: object) -> None:
        """Count one more."""
        self.count += 1
        if len(self.where) < 5:
            self.where.append(str(place))

    def __str__(self) -> str:
        places = ", ".join(self.where) + (", ..." if self.count > len(self.where) else "")
        return f"{self.severity:8} [{self.code}] {self.count:,} × {self.says}: {places}. Fix: {self.fix}"


@dataclass(frozen=True)
class AuditReport:
    """All findings; falsy when there are none."""

    rows: int
    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return bool(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {"rows": self.rows, "findings": [asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        return "\n".join([f"{self.rows:,} rows, {len(self.findings)} findings", *map(str, self.findings)])


def audit(data: Any, tokenizer: Any, template: str | Path | None = None, **options: Any) -> AuditReport:
    """Look for what would go wrong in training on `data`, without building it.

    Args:
        data: as for `build_sft_dataset`.
        tokenizer: as for `build_sft_dataset`.
        template: as for `build_sft_dataset`.
        options: further options of `build_sft_dataset` that decide what a row becomes.

    Raises:
        UsageError: an option cannot be meant.
        InputRefused: a source cannot be read.
    """
    recipe = make_recipe(tokenizer, template, **options)
    findings: dict[str, Finding] = {}
    seen: set[int] = set()
    rows = 0
    for source in sources(data):
        for outcome in build_rows(recipe, source.rows()):
            rows += 1
            _inspect(outcome, findings, seen)
    return AuditReport(rows, tuple(findings.values()))


def _inspect(outcome: Built | Reject, findings: dict[str, Finding], seen: set[int]) -> None:
    if isinstance(outcome, Reject):
        found = Finding(outcome.code, "error", outcome.reason, outcome.fix or "mend the row")
        findings.setdefault(outcome.code, found).add(outcome.source)
        return
    for check in CHECKS:
        if any(check.finds(example) for example in outcome.examples):
            findings.setdefault(check.code, Finding(check.code, check.severity, check.says, check.fix)).add(
                outcome.examples[0].source
            )
    key = xxhash.xxh3_64_intdigest(
        "\0".join(example.text for example in outcome.examples).encode("utf-8", "surrogatepass")
    )
    if key in seen:
        says, fix = "the row is an exact duplicate of an earlier one", "keep one of them"
        findings.setdefault("duplicate", Finding("duplicate", "warning", says, fix)).add(outcome.examples[0].source)
    seen.add(key)


def check_template(template_or_tokenizer: Any) -> TemplateReport:
    """Say what a template does: its stop, whether it rewrites earlier turns, what it drops.

    Args:
        template_or_tokenizer: a built-in name, a `.jinja` file, a Jinja string, or a tokenizer (folder, hub id or
            object), whose chat template is checked.

    Raises:
        UsageError: it is none of these.
        TemplateRefused: the template cannot be compiled, or the tokenizer has none.

    >>> check_template("chatml").verdict
    'exact'
    """
    return verify(_bound(template_or_tokenizer))


def _bound(given: Any) -> Template:
    is_text = isinstance(given, str | Path)
    if is_text and (str(given) in templates or "{" in str(given) or Path(given).is_file()):
        name, source = find(given)
        specials = {"bos_token": "<bos>", "eos_token": "<eos>"}
        return Template(name, source, special_tokens=specials, control=re.compile(r"<\|[^|<>]*\|>|</?[a-z_]+>"))
    if (
        is_text
        and "/" not in str(given)
        and not Path(given).is_dir()
        and get_close_matches(str(given), templates.names())
    ):
        find(given)  # a misspelt name: say so instead of asking the hub
    if (
        not is_text
        and not isinstance(given, Tokenizer | tokenizers.Tokenizer)
        and not hasattr(given, "backend_tokenizer")
    ):
        given = str(given)
    return make_recipe(given).template
