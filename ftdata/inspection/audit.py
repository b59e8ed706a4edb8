"""Check data or a build for problems, and report the findings as text, JSON, SARIF or GitHub annotations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from ftdata._version import __version__
from ftdata.build import near_duplicates
from ftdata.build.splits import check_similarity_threshold
from ftdata.errors import InputRefused, UsageError, check_choice
from ftdata.inspection import text_detectors
from ftdata.inspection.checks import Check, CheckedDataset, CheckedRow, CheckedTemplate, ServedBatch, checks
from ftdata.inspection.findings import (
    INDENT,
    PRINTED_LOCATIONS,
    Finding,
    FindingLocation,
    describe_location,
    escape_command,
    make_sarif_location,
)
from ftdata.inspection.serving import Server, can_be_compared, connect
from ftdata.inspection.summary import confirm_statements, describe_verdict
from ftdata.inspection.survey import RowNumbers, Survey, number_source_rows, survey_rows
from ftdata.inspection.target import Target, make_source_target, make_target
from ftdata.pipeline.batch import Batch
from ftdata.pipeline.flags import SEVERITIES
from ftdata.pipeline.recipe import Recipe
from ftdata.progress import Progress
from ftdata.readers.streams import STDIN
from ftdata.spelling import spell_options
from ftdata.templates.worker.client import verify_template
from ftdata.types import SIDES, Conversation, Example, Reject, Source

_STYLES = {
    "error": "bold red",
    "warning": "bold yellow",
    "note": "bold cyan",
    "Correct:": "bold green",
    "Fix:": "bold green",
}
"""Map the first word of a line to its style."""

FAIL_ON = (*SEVERITIES, "never")
_MAX_SAMPLES = 100
_MAX_FIXES = 5
"""The number of findings for rejects with the same code and different fixes."""


@dataclass(frozen=True)
class AuditReport:
    """The findings of an audit, most severe first. A report without findings is falsy.

    Attributes:
        rows: The number of audited rows.
        findings: The findings.
        skipped: The codes of the checks that did not run, with the option that enables each, or the reason.
        confirmed: Statements that the checks confirmed, such as "no answer is truncated".
    """

    rows: int
    findings: tuple[Finding, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    confirmed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.findings)

    def fails(self, severity: str) -> bool:
        """Return whether any finding has this severity or a higher one. Always false for `"never"`."""
        check_choice("fail_on", severity, FAIL_ON)
        levels = [SEVERITIES.index(finding.severity) for finding in self.findings]
        return severity != "never" and any(level >= SEVERITIES.index(severity) for level in levels)

    def as_dict(self) -> dict[str, Any]:
        """Convert the report to a JSON-serializable dictionary."""
        findings = [finding.as_dict() for finding in self.findings]
        return {
            "ftdata": __version__,
            "rows": self.rows,
            "findings": findings,
            "confirmed": list(self.confirmed),
            "skipped": self.skipped,
        }

    def _repr_html_(self) -> str:
        """Return the findings as a table for a notebook."""
        colors = {"error": "#cf222e", "warning": "#9a6700", "note": "#0969da"}
        places = {
            finding.code: "<br>".join(escape(str(place.source)) for place in finding.locations[:PRINTED_LOCATIONS])
            for finding in self.findings
        }
        rows = "".join(
            f'<tr><td style="color:{colors[finding.severity]}">{finding.severity}</td><td>{finding.code}</td>'
            f"<td>{finding.count:,}</td><td>{escape(finding.message)}</td><td>{escape(spell_options(finding.fix))}</td>"
            f"<td>{places[finding.code]}</td></tr>"
            for finding in self.findings
        )
        head = "".join(f"<th>{name}</th>" for name in ("severity", "check", "count", "problem", "fix", "rows"))
        summary = "".join(f"<p>{escape(line)}</p>" for line in self._summary())
        return f"{summary}<table><tr>{head}</tr>{rows}</table>" if rows else summary

    def _summary(self) -> list[str]:
        """Return the summary of the report: the number of findings, and the confirmed statements."""
        verdict = describe_verdict(self.rows, (finding.severity for finding in self.findings))
        return [verdict, *([f"Correct: {'; '.join(self.confirmed)}"] if self.confirmed else [])]

    def __str__(self) -> str:
        codes_by_reason: dict[str, list[str]] = {}
        for code, reason in self.skipped.items():
            codes_by_reason.setdefault(reason, []).append(code)
        skipped = "; ".join(f"{', '.join(codes)} ({reason})" for reason, codes in codes_by_reason.items())
        lines = [*self._summary(), *map(str, self.findings), *([f"Skipped checks: {skipped}"] if skipped else [])]
        return "\n".join(lines)

    def print(self, console: Console) -> None:
        """Print the report to a rich console. On a terminal, long lines are wrapped and indented."""
        for number, line in enumerate(str(self).splitlines()):
            if not console.is_terminal:
                console.print(line, highlight=False, markup=False, soft_wrap=True)
                continue
            is_indented = line.startswith(INDENT)
            first, separator, rest = line.strip().partition(" ")
            style = _STYLES.get(first, "") if (first == "Fix:") == is_indented else ""
            text = Text.assemble((first, style), separator, rest, style="bold" if number == 0 else "")
            console.print(Padding(text, (0, 0, 0, len(INDENT))) if is_indented else text)

    def as_sarif(self) -> dict[str, Any]:
        """Convert the report to SARIF 2.1.0 (OASIS), a format that code hosts and editors can display."""
        rules: dict[str, Any] = {}
        for finding in self.findings:
            help_texts = {"shortDescription": {"text": finding.message}, "help": {"text": finding.fix}}
            rule = {"id": finding.code, **help_texts, "defaultConfiguration": {"level": finding.severity}}
            # A check and rejected rows can share a code. The most severe finding comes first and defines the rule.
            rules.setdefault(finding.code, rule)
        driver = {"name": "ftdata", "version": __version__, "rules": list(rules.values())}
        results = [
            {
                "ruleId": finding.code,
                "level": finding.severity,
                "message": {"text": describe_location(finding, location)},
                "locations": [make_sarif_location(location.source)] if _has_file(location) else [],
            }
            for finding in self.findings
            for location in finding.locations or (None,)
        ]
        schema = "https://json.schemastore.org/sarif-2.1.0.json"
        return {"$schema": schema, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}

    def as_github(self) -> str:
        """Convert the report to GitHub workflow commands, which GitHub displays as annotations."""
        lines = []
        for finding in self.findings:
            kind = "notice" if finding.severity == "note" else finding.severity
            for location in finding.locations or (None,):
                position = ""
                if _has_file(location):
                    line = f"line={location.source.line}," if location.source.line else ""
                    position = f"file={escape_command(location.source.path, ':,')},{line}"
                title, text = escape_command(finding.code, ":,"), escape_command(describe_location(finding, location))
                lines.append(f"::{kind} {position}title={title}::{text}")
        return "\n".join(lines)


def _has_file(location: FindingLocation | None) -> TypeGuard[FindingLocation]:
    return location is not None and location.source.path != STDIN


def audit(
    data: Any,
    tokenizer: Any = None,
    template: str | Path | None = None,
    *,
    against: Any = None,
    ignore: Sequence[str] = (),
    near_duplicate_threshold: float | None = None,
    pii: bool = False,
    serve: str | None = None,
    where: str | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> AuditReport:
    """Check training data, or a finished build, for problems.

    docs/reference/checks.md lists all checks. If the data has several splits, the rows of all splits except the
    training split are held out.

    Args:
        data: As for `build_sft_dataset`, or the folder of a build. The stored tokens and labels of a build are checked.
        tokenizer: As for `build_sft_dataset`. The default for a build is the tokenizer that it was built with.
        template: As for `build_sft_dataset`.
        against: Held-out data, such as a test set. No row of the held-out data may be in `data`.
        ignore: Codes of checks to skip.
        near_duplicate_threshold: Similarity (0.5 to 1) above which rows are near-duplicates. `None` skips the search.
        pii: Whether to search for personal data.
        serve: The URL of an inference server. The tokens before each trained turn are compared with those that the
            server renders. The environment variable `FTDATA_SERVE_KEY` contains its key. For a build, the data that it
            was made from is read again.
        where: As for `build_sft_dataset`: a filter expression for the rows to check.
        limit: Maximum number of rows to check per source. All rows of `against` are read.
        progress: Called with a `ProgressUpdate` after each batch of rows.
        options: Further options of `build_sft_dataset` that are part of the recipe: `columns`, `train_on`,
            `max_length`, `overlong`, ...

    Returns:
        The findings, most severe first. The report converts to JSON, SARIF and GitHub annotations.

    Raises:
        UsageError: An option is invalid.
        InputRefused: A source cannot be read, or a folder is not a build.
        TemplateRefused: The template or the tokenizer cannot be used for any row.
        MissingDependency: `near_duplicate_threshold` needs `ftdata[dedup]`.
        HubError: The network, the hub or the server fails.

    >>> from ftdata.testing import byte_tokenizer
    >>> rows = [{"question": "Open?", "answer": "Yes."}, {"question": "Late?", "answer": ""}]
    >>> [(finding.code, finding.count) for finding in audit(rows, byte_tokenizer(), "chatml").findings]
    [('empty_answer', 1)]
    """
    if isinstance(ignore, str) or not isinstance(ignore, Iterable):
        raise UsageError("ignore", f"ignore is {ignore!r}, expected a list of check codes")
    for code in ignore:
        # Error codes of rejected rows can be ignored too. There is no list of them, so unknown codes are accepted.
        if code not in checks and (matches := get_close_matches(str(code), checks, n=1, cutoff=0.85)):
            problem = f"ignore contains the unknown check code {code!r}"
            raise UsageError("unknown_ignore", problem, hint=f"did you mean {matches[0]!r}?")
    if near_duplicate_threshold is not None:
        check_similarity_threshold(near_duplicate_threshold)
        near_duplicates.require_rensa()
    target = make_target(data, tokenizer, template, against=against, where=where, limit=limit, **options)
    if serve is not None and target.folder is not None:
        # A build contains no messages that a server could render.
        target = make_source_target(target.folder, tokenizer)
    server = None if serve is None else connect(serve)
    enabled = {
        "": True,
        "pii": pii,
        "serve": server is not None,
        "near_duplicate_threshold": near_duplicate_threshold is not None,
    }
    skipped = {
        code: f"--{check.enabled_by.replace('_', '-')}"
        for code, check in checks.items()
        if not enabled[check.enabled_by]
    }
    if target.folder is not None:
        skipped |= {code: "a build contains no messages" for code, check in checks.items() if check.needs_messages}
    auditor = Auditor(target.recipe, frozenset((*ignore, *skipped)), near_duplicate_threshold, server)
    survey = survey_rows(target.steps(), target.names, auditor, progress)
    if not survey.rows:
        missing_column = target.describe_missing_column()
        problem = "the data contains no rows to audit" + (f": {missing_column}" if missing_column else "")
        raise InputRefused("no_rows", problem, hint="check the data and the options where and limit")
    if auditor.uncompared:
        rows = f"{auditor.uncompared:,} of {survey.rows:,} rows were not compared: text, tokens or images"
        skipped["serving"] = rows
        auditor.skipped_codes |= {"serving"}
    return replace(auditor.report(target, survey), skipped=skipped)


class Auditor:
    """Run all audit checks: checks of single rows on each batch, and checks of the whole data after the last batch.

    Attributes:
        recipe: The options, tokenizer and template.
        skipped_codes: The codes of checks and rejects that are not reported.
        near_duplicate_threshold: The similarity above which rows are near-duplicates, or `None`.
        server: The server whose tokens are compared, or `None`.
    """

    def __init__(
        self,
        recipe: Recipe,
        skipped_codes: frozenset[str],
        near_duplicate_threshold: float | None,
        server: Server | None = None,
    ) -> None:
        self.server, self.uncompared = server, 0
        self.recipe, self.near_duplicate_threshold = recipe, near_duplicate_threshold
        self.skipped_codes = skipped_codes
        self.checks = [check for code, check in checks.items() if code not in skipped_codes]
        is_chat_template = recipe.template.source and recipe.template.is_chat
        self.added_text = verify_template(recipe.template).adds.strip() if is_chat_template else ""
        self.flag_checks = {check.code: check for check in self.checks if check.scope == "flag"}
        self.server_checks = [check for check in self.checks if check.scope == "server"]
        self.row_checks = [check for check in self.checks if check.scope == "row"]
        self.findings: dict[tuple[str, str], Finding] = {}
        self.scripts: list[int] = []
        self.images: list[tuple[int, int]] = []
        self.signatures: list[np.ndarray] = []
        self.stops: set[int] = set()
        self.samples: list[Conversation] = []

    def __call__(self, batch: Batch, numbers: RowNumbers) -> None:
        """Run the flag checks and the row checks on a batch."""
        for number in range(len(numbers)):
            built = batch.built(number)
            row = CheckedRow(built.conversation, built.examples, self.recipe, self.added_text)
            source = built.conversation.source
            for flag in sorted(frozenset[str]().union(*(example.flags for example in built.examples))):
                if flag in self.flag_checks:
                    self._add_finding(self.flag_checks[flag], source)
            for check in self.row_checks:
                for detail in islice(_run_row_check(check, row), 1):
                    self._add_finding(check, source, detail)
            hashes = {image.hash for example in built.examples for image in example.images}
            self.images += [(len(self.scripts), int(hash_[:15], 16)) for hash_ in sorted(hashes)]
            self.scripts.append(self._detect_scripts(built.examples))
            if len(self.samples) < _MAX_SAMPLES and built.conversation.messages:
                self.samples.append(built.conversation)
        self._compare_with_server(batch)
        for reject in batch.rejects:
            self._add_reject(reject)
        if self.near_duplicate_threshold is not None and len(numbers):
            self.signatures.append(near_duplicates.minhash_signatures(batch.conversations))

    def _compare_with_server(self, batch: Batch) -> None:
        if self.server is None:
            return
        self.uncompared += sum(not can_be_compared(conversation) for conversation in batch.conversations)
        for check in self.server_checks:
            for source, detail in check.run(ServedBatch(self.server, batch, self.recipe)):
                self._add_finding(check, source, detail)

    def report(self, target: Target, survey: Survey) -> AuditReport:
        """Run the checks of the whole data and of the template. Return a report that also covers the row checks."""
        scripts = np.asarray(self.scripts, np.int64)
        signatures = np.concatenate(self.signatures) if self.signatures else None
        images = np.asarray(self.images, np.int64).reshape(-1, 2)
        if target.folder is not None:
            # Packing can separate the examples of a row. Data checks compare rows, so the examples are merged here.
            groups = number_source_rows(survey.numbers)
            first = np.unique(groups, return_index=True)[1]
            row_scripts = np.zeros(len(first), np.int64)
            np.bitwise_or.at(row_scripts, groups, scripts)
            scripts, signatures = row_scripts, None if signatures is None else signatures[first]
            images[:, 0] = groups[images[:, 0]]
            survey = target.complete_survey(survey)
        data = CheckedDataset(
            survey,
            scripts,
            target.held_out,
            target.recipe.task != "sft",
            target.recipe.task == "preference",
            self.near_duplicate_threshold,
            signatures,
            images,
        )
        for check in self.checks:
            if check.scope == "data":
                for row, detail in check.run(data):
                    self._add_finding(check, None if row is None else survey.source(row), detail)
            elif check.scope == "template":
                for detail in check.run(CheckedTemplate(self.recipe, frozenset(self.stops), self.samples)):
                    self._add_finding(check, None, detail)
        order = {code: number for number, code in enumerate(checks)}

        def rank(finding: Finding) -> tuple[int, int]:
            return -SEVERITIES.index(finding.severity), order.get(finding.code, -1)

        # A check that did not run could contradict a statement.
        codes = {*(finding.code for finding in self.findings.values()), *self.skipped_codes}
        contradictions = {code: check.contradicts for code, check in checks.items()}
        has_rendered_text = len(survey.numbers.tokens) > survey.flags.get("pretokenized", 0)
        confirmed = confirm_statements(contradictions, codes, has_rendered_text=has_rendered_text)
        return AuditReport(survey.rows, tuple(sorted(self.findings.values(), key=rank)), confirmed=confirmed)

    def _add_finding(self, check: Check, source: Source | None, detail: str = "") -> None:
        if (check.code, "") not in self.findings:
            message = f"{check.message}: {detail}" if source is None else check.message
            self.findings[check.code, ""] = Finding(check.code, check.severity, message, check.fix)
        self.findings[check.code, ""].add(source, detail)

    def _add_reject(self, reject: Reject) -> None:
        if reject.code in self.skipped_codes:
            return
        fix = reject.fix or "correct the row"
        # Rejects with the same code can have different fixes, and a check of built rows can have the same code.
        if (reject.code, fix) not in self.findings:
            fixes = sum(code == reject.code for code, _ in self.findings)
            fix = fix if fixes < _MAX_FIXES else "correct the rows"
        key = (reject.code, fix)
        finding = self.findings.setdefault(key, Finding(reject.code, "error", "the row is rejected", fix))
        finding.add(reject.source, f"{reject.field} {reject.reason}".strip())

    def _detect_scripts(self, examples: Sequence[Example]) -> int:
        """Return the writing systems of the answers, such as Latin. Also collect the stop tokens that end the answers.

        Bit `i` of the result is set if an answer is written in script `text_detectors.SCRIPTS[i]`.
        """
        script_bits = 0
        for example in examples:
            ids, trained, offsets = example.input_ids, example.trained, example.offsets
            ends = np.flatnonzero(trained & ~np.append(trained[1:], False))
            self.stops.update(ids[ends][self.recipe.control.is_control(ids[ends])].tolist())
            # Template text and control tokens have no natural language.
            is_answer = trained & ~self.recipe.control.is_control(ids) & ~_is_template_text(example)
            starts, ends = np.flatnonzero(np.diff(is_answer, prepend=False, append=False)).reshape(-1, 2).T
            ranges = zip(offsets[starts, 0].tolist(), offsets[ends - 1, 1].tolist(), strict=True)
            for script in (text_detectors.detect_script(example.text[start:end]) for start, end in ranges):
                script_bits |= 1 << script if script >= 0 else 0
        return script_bits


def _run_row_check(check: Check, row: CheckedRow) -> Iterator[str]:
    """Run a row check. On a preference pair, it runs on each side, unless it compares the sides."""
    sides = row.conversation.sides
    if check.compares_sides == bool(sides):
        yield from check.run(row)
    if check.compares_sides or not sides:
        return
    for name, side, example in zip(SIDES, sides, row.examples, strict=True):
        for detail in check.run(row._replace(conversation=side, examples=(example,))):
            yield f"{name} side: {detail}"


def _is_template_text(example: Example) -> NDArray[np.bool_]:
    """Return a mask of the tokens whose first character comes from the template, not from the row (bool `[n]`)."""
    is_template = np.asarray([*(not span.part.is_data for span in example.spans), True])
    span_ends = [span.end for span in example.spans]
    return np.asarray(is_template[np.searchsorted(span_ends, example.offsets[:, 0], side="right")])
