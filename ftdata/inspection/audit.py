"""Audit: what is wrong with data, or with a build, found by `checks`, and told to people and to machines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from ftdata._version import __version__
from ftdata.build import near_duplicates
from ftdata.build.splits import check_similarity_threshold
from ftdata.errors import InputRefused, UsageError, check_choice, escape_unprintable
from ftdata.inspection import text_detectors
from ftdata.inspection.checks import SEVERITIES, Check, CheckedDataset, CheckedRow, CheckedTemplate, checks
from ftdata.inspection.row_views import to_single_line
from ftdata.inspection.survey import Progress, RowNumbers, Survey, rows_of_examples, survey_rows
from ftdata.inspection.target import Target, make_target
from ftdata.pipeline.examples import Batch
from ftdata.pipeline.recipe import Recipe
from ftdata.readers.streams import STDIN
from ftdata.templates.worker.client import verify_template
from ftdata.types import Conversation, Example, Part, Reject, Source

SHOWN = 10
"""Rows of each finding that are named."""

_TOLD, _INDENT = 5, "    "
_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}

FAIL_ON = (*SEVERITIES, "never")
_COMPARED = 100


class FindingLocation(NamedTuple):
    """A row with a finding, and what exactly was found there."""

    source: Source
    says: str = ""


@dataclass
class Finding:
    """What one check found: in how many rows, and where first.

    Attributes:
        code: of the check, or of the rejected rows.
        severity: `"error"`, `"warning"` or `"note"`.
        says: what is wrong.
        fix: what to do.
        count: in how many rows.
        places: the first ten of them, each with what was found there.
    """

    code: str
    severity: str
    says: str
    fix: str
    count: int = 0
    places: list[FindingLocation] = field(default_factory=list)

    def add(self, source: Source | None, says: str = "") -> None:
        """Count one more; without a source it is about no row."""
        self.count += 1
        if len(self.places) < SHOWN and source is not None:
            self.places.append(FindingLocation(source, says))

    @property
    def where(self) -> list[str]:
        """The first rows, as file and line."""
        return [str(place.source) for place in self.places]

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as JSON."""
        own = {name: getattr(self, name) for name in ("code", "severity", "says", "fix", "count", "where")}
        return {**own, "places": [{**one.source._asdict(), "says": one.says} for one in self.places]}

    def __str__(self) -> str:
        rows = f"{self.count:,} × " if self.places else ""
        lines = [f"{rows}{self.says}"]
        lines += [
            to_single_line(f"{place.source}{f': {place.says}' if place.says else ''}") for place in self.places[:_TOLD]
        ]
        if self.places and self.count > _TOLD:
            lines.append(f"and {self.count - _TOLD:,} more")
        lines.append(f"Fix: {self.fix}")
        return "\n".join([f"{self.severity} {self.code}", *(f"{_INDENT}{one}" for one in lines)])


@dataclass(frozen=True)
class AuditReport:
    """All findings, the worst first; falsy when there are none.

    Attributes:
        rows: how many rows were looked at.
        findings: what was found.
        skipped: the checks that were not made, and what asks for them.
    """

    rows: int
    findings: tuple[Finding, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.findings)

    def fails(self, severity: str) -> bool:
        """Whether there is a finding of this severity or a worse one; `"never"` is none."""
        check_choice("fail_on", severity, FAIL_ON)
        worst = [SEVERITIES.index(finding.severity) for finding in self.findings]
        return severity != "never" and any(one >= SEVERITIES.index(severity) for one in worst)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        findings = [finding.as_dict() for finding in self.findings]
        return {"ftdata": __version__, "rows": self.rows, "findings": findings, "skipped": self.skipped}

    def __str__(self) -> str:
        head = f"{self.rows:,} rows, {len(self.findings)} findings"
        reasons = dict.fromkeys(self.skipped.values())
        whose = {how: ", ".join(code for code, own in self.skipped.items() if own == how) for how in reasons}
        asked = "; ".join(f"{codes} ({how})" for how, codes in whose.items())
        return "\n".join([*map(str, self.findings), head, *([f"not looked for: {asked}"] if asked else [])])

    def print(self, console: Console) -> None:
        """Print to a rich console; what is longer than a line of a terminal goes on below itself."""
        for told in str(self).splitlines():
            head, blank, code = told.partition(" ")
            style = _STYLES.get(head, "")
            if not console.is_terminal:
                console.print(told, highlight=False, markup=False, soft_wrap=True)
            elif told.startswith(_INDENT):
                console.print(Padding(Text(told.strip()), (0, 0, 0, len(_INDENT))))
            else:
                console.print(Text.assemble((head, style), blank, code))

    def as_sarif(self) -> dict[str, Any]:
        """Return the report as SARIF 2.1.0 (OASIS), which code hosts and editors show beside the lines."""
        rules = [
            {
                "id": one.code,
                "shortDescription": {"text": one.says},
                "help": {"text": one.fix},
                "defaultConfiguration": {"level": one.severity},
            }
            for one in self.findings
        ]
        # A code may be that of a check and of rows that are rejected: the worst comes first, and is the rule.
        only = list({rule["id"]: rule for rule in reversed(rules)}.values())[::-1]
        driver = {"name": "ftdata", "version": __version__, "rules": only}
        results = [
            {
                "ruleId": finding.code,
                "level": finding.severity,
                "message": {"text": _told(finding, place)},
                "locations": [_location(place.source)] if place and place.source.path != STDIN else [],
            }
            for finding in self.findings
            for place in _places(finding)
        ]
        schema = "https://json.schemastore.org/sarif-2.1.0.json"
        return {"$schema": schema, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}

    def as_github(self) -> str:
        """Return the report as workflow commands, which GitHub shows as annotations."""
        lines = []
        for finding in self.findings:
            kind = "notice" if finding.severity == "note" else finding.severity
            for place in _places(finding):
                at = ""
                if place and place.source.path != STDIN:
                    where = f"line={place.source.line}," if place.source.line else ""
                    at = f"file={_escaped(place.source.path, ':,')},{where}"
                lines.append(f"::{kind} {at}title={_escaped(finding.code, ':,')}::{_escaped(_told(finding, place))}")
        return "\n".join(lines)


def _places(finding: Finding) -> Sequence[FindingLocation | None]:
    return finding.places or [None]


def _told(finding: Finding, place: FindingLocation | None) -> str:
    more = f" ({finding.count:,} rows)" if finding.count > 1 else ""
    row = f"row {place.source.row}" if place and place.source.line is None else ""
    said = ", ".join(filter(None, (row, place.says if place else "")))
    return f"{finding.says}{more}{f': {said}' if said else ''}. Fix: {finding.fix}"


def _location(source: Source) -> dict[str, Any]:
    uri = quote(source.path.replace("\\", "/"), safe="/:", errors="surrogateescape")
    place: dict[str, Any] = {"artifactLocation": {"uri": uri}}
    if source.line is not None:
        place["region"] = {"startLine": source.line}
    return {"physicalLocation": place}


def _escaped(text: str, more: str = "") -> str:
    text = escape_unprintable(text)
    for sign in ("%", "\r", "\n", *more):
        text = text.replace(sign, f"%{ord(sign):02X}")
    return text


def audit(
    data: Any,
    tokenizer: Any = None,
    template: str | Path | None = None,
    *,
    against: Any = None,
    ignore: Sequence[str] = (),
    near_duplicate_threshold: float | None = None,
    pii: bool = False,
    where: str | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> AuditReport:
    """Look for what would go wrong in training on `data`, without building it; or at a build.

    The checks are described in docs/reference/checks.md. Of data with several splits, rows of those that are not for
    training count as held out.

    Args:
        data: as for `build_sft_dataset`; or the folder of a build, whose tokens and labels are looked at.
        tokenizer: as for `build_sft_dataset`; a build knows its own.
        template: as for `build_sft_dataset`.
        against: more data, which is held out: a test set, of which no row may be trained on.
        ignore: codes of checks that are not to be made.
        near_duplicate_threshold: how similar rows must be (0.5 to 1) to count as almost equal; `None`: this is not looked at.
        pii: look for what belongs to a person, too.
        where: rows to look at, as for `build_sft_dataset`.
        limit: how many rows to look at of each place; all of `against` is looked at.
        progress: called with the rows and tokens done so far, and which share of the data that is.
        options: further options of `build_sft_dataset` that decide what a row becomes: `columns`, `train_on`,
            `max_length`, `overlong`, ...

    Returns:
        The findings, the worst first; as JSON, SARIF or annotations, too.

    Raises:
        UsageError: an option is invalid.
        InputRefused: a source cannot be read, or is no build.
        TemplateRefused: the template, or the tokenizer, cannot be used for any row.
        MissingDependency: `near_duplicate_threshold` needs `ftdata[dedup]`.
        HubError: the network or the hub fails.

    >>> from ftdata.testing import byte_tokenizer
    >>> rows = [{"question": "Open?", "answer": "Yes."}, {"question": "Late?", "answer": ""}]
    >>> [(found.code, found.count) for found in audit(rows, byte_tokenizer(), "chatml").findings]
    [('empty_answer', 1)]
    """
    if isinstance(ignore, str) or not isinstance(ignore, Iterable):
        raise UsageError("ignore", f"ignore is {ignore!r}, expected a list of codes")
    for code in ignore:
        # Codes of rejected rows can be ignored, too; nobody has a list of these.
        if code not in checks and (close := get_close_matches(str(code), checks, n=1, cutoff=0.85)):
            raise UsageError("unknown_ignore", f"ignore names {code!r}", hint=f"did you mean {close[0]!r}?")
    if near_duplicate_threshold is not None:
        check_similarity_threshold(near_duplicate_threshold)
        near_duplicates.require_rensa()
    side = make_target(data, tokenizer, template, against=against, where=where, limit=limit, **options)
    wanted = {"": True, "pii": pii, "near_duplicate_threshold": near_duplicate_threshold is not None}
    skipped = {code: f"--{one.asked.replace('_', '-')}" for code, one in checks.items() if not wanted[one.asked]}
    if side.folder is not None:
        skipped |= {code: "a build holds no messages" for code, one in checks.items() if one.of_messages}
    auditor = Auditor(side.recipe, frozenset((*ignore, *skipped)), near_duplicate_threshold)
    seen = survey_rows(side.steps(), side.names, auditor, progress)
    if not seen.rows:
        raise InputRefused("no_rows", "there are no rows to look at", hint="where, or limit, leaves none")
    return replace(auditor.report(side, seen), skipped=skipped)


class Auditor:
    """Makes checks on batches as they come, and on all rows in the end."""

    def __init__(self, recipe: Recipe, left: frozenset[str], near_duplicate_threshold: float | None) -> None:
        self.recipe, self.left, self.near_duplicate_threshold = recipe, left, near_duplicate_threshold
        self.made = made = [one for code, one in checks.items() if code not in left]
        chat = recipe.template.source and recipe.template.chat
        self.adds = verify_template(recipe.template).adds.strip() if chat else ""
        self.by_flag = {one.code: one for one in made if one.of == "flag"}
        self.on_rows = [one for one in made if one.of == "row"]
        self.findings: dict[tuple[str, bool], Finding] = {}
        self.scripts: list[int] = []
        self.signatures: list[np.ndarray] = []
        self.stops: set[int] = set()
        self.said: list[Conversation] = []

    def __call__(self, batch: Batch, numbers: RowNumbers) -> None:
        """Look at a batch."""
        for number in range(len(numbers)):
            one = batch.built(number)
            row = CheckedRow(one.conversation, one.examples, self.recipe, self.adds)
            source = one.conversation.source
            for flag in sorted(frozenset[str]().union(*(example.flags for example in one.examples))):
                if flag in self.by_flag:
                    self._found(self.by_flag[flag], source)
            for check in self.on_rows:
                for says in islice(check.finds(row), 1):
                    self._found(check, source, says)
            self.scripts.append(self._scripts(one.examples))
            if len(self.said) < _COMPARED and one.conversation.messages:
                self.said.append(one.conversation)
        for reject in batch.rejects:
            self._rejected(reject)
        if self.near_duplicate_threshold is not None and len(numbers):
            self.signatures.append(near_duplicates.minhash_signatures(batch.conversations))

    def report(self, side: Target, seen: Survey) -> AuditReport:
        """Make the checks on all rows together, and report."""
        scripts = np.asarray(self.scripts, np.int64)
        signatures = np.concatenate(self.signatures) if self.signatures else None
        if side.folder is not None:
            # Examples of one row, which packs hold apart, are looked at together.
            groups = rows_of_examples(seen.numbers)
            first = np.unique(groups, return_index=True)[1]
            together = np.zeros(len(first), np.int64)
            np.bitwise_or.at(together, groups, scripts)
            scripts, signatures = together, None if signatures is None else signatures[first]
            seen = side.finished(seen)
        data = CheckedDataset(seen, scripts, side.held_out, self.near_duplicate_threshold, signatures)
        for check in self.made:
            if check.of == "data":
                for row, says in check.finds(data):
                    self._found(check, seen.source(row), says)
            elif check.of == "template":
                for says in check.finds(CheckedTemplate(self.recipe, frozenset(self.stops), self.said)):
                    self._found(check, None, says)
        order = {code: number for number, code in enumerate(checks)}

        def rank(one: Finding) -> tuple[int, int]:
            return -SEVERITIES.index(one.severity), order.get(one.code, -1)

        return AuditReport(seen.rows, tuple(sorted(self.findings.values(), key=rank)))

    def _found(self, check: Check, source: Source | None, says: str = "") -> None:
        if (check.code, False) not in self.findings:
            told = f"{check.says}: {says}" if source is None else check.says
            self.findings[check.code, False] = Finding(check.code, check.severity, told, check.fix)
        self.findings[check.code, False].add(source, says)

    def _rejected(self, reject: Reject) -> None:
        if reject.code in self.left:
            return
        fix = reject.fix or "mend the row"
        # Some codes are those of checks, too, where a row is built all the same.
        found = self.findings.setdefault((reject.code, True), Finding(reject.code, "error", "the row is rejected", fix))
        found.add(reject.source, f"{reject.field} {reject.reason}".strip())

    def _scripts(self, examples: Sequence[Example]) -> int:
        """Return in which scripts answers are written, a bit for each, and note the stops with which they end."""
        found = 0
        for example in examples:
            ids, trained, offsets = example.input_ids, example.trained, example.offsets
            ends = np.flatnonzero(trained & ~np.append(trained[1:], False))
            self.stops.update(ids[ends][self.recipe.control.among(ids[ends])].tolist())
            # What a template writes, tokens that have names among it, is in no language.
            said = trained & ~self.recipe.control.among(ids) & ~_scaffold(example)
            begins, ends = np.flatnonzero(np.diff(said, prepend=False, append=False)).reshape(-1, 2).T
            places = zip(offsets[begins, 0].tolist(), offsets[ends - 1, 1].tolist(), strict=True)
            for script in (text_detectors.detect_script(example.text[start:end]) for start, end in places):
                found |= 1 << script if script >= 0 else 0
        return found


def _scaffold(example: Example) -> NDArray[np.bool_]:
    """Return which tokens begin in the template's own text (bool `[n]`)."""
    own = np.asarray([*(span.part is Part.SCAFFOLD for span in example.spans), True])
    return np.asarray(own[np.searchsorted([span.end for span in example.spans], example.offsets[:, 0], side="right")])
