"""Summarize problems of data in plain sentences: what is correct, what is wrong, and how to fix it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from ftdata.errors import count_noun
from ftdata.pipeline.flags import FLAGS, SEVERITIES

_ACTIONS = {"error": " to fix before you train", "warning": " to check", "note": ""}


@dataclass(frozen=True)
class Problem:
    """A kind of problem, with the number of examples or rows that have it.

    Attributes:
        severity: `"error"`, `"warning"` or `"note"`.
        description: The number of affected examples or rows, and the problem.
        fix: The fix, in the imperative.
    """

    severity: str
    description: str
    fix: str


@dataclass(frozen=True)
class Summary:
    """The problems of data, most severe first, and the statements about the data that are true.

    Attributes:
        verdict: The number of rows, and the number of problems of each severity.
        problems: The problems.
        confirmed: Statements such as "no answer is truncated".
    """

    verdict: str
    problems: tuple[Problem, ...]
    confirmed: tuple[str, ...]


def describe_verdict(rows: int, severities: Iterable[str]) -> str:
    """Describe how many problems of each severity were found.

    >>> describe_verdict(78, ["note", "error", "error"])
    '78 rows: 2 errors to fix before you train, 1 note'
    >>> describe_verdict(1, [])
    '1 row: no problems found'
    """
    counts = Counter(severities)
    parts = [
        f"{count_noun(counts[severity], severity)}{_ACTIONS[severity]}"
        for severity in reversed(SEVERITIES)
        if counts[severity]
    ]
    return f"{count_noun(rows, 'row')}: {', '.join(parts) or 'no problems found'}"


def summarize_flags(rows: int, examples: int, flags: Mapping[str, int], rejected: Mapping[str, int]) -> Summary:
    """Summarize flags and rejected rows.

    Args:
        rows: The number of rows, whether built or rejected.
        examples: The number of examples.
        flags: The number of examples with each flag.
        rejected: The number of rejected rows by code.
    """
    problems = []
    if rejected:
        codes = ", ".join(f"{code} ({count:,})" for code, count in rejected.items())
        text = f"{count_noun(sum(rejected.values()), 'row')} rejected: {codes}"
        problems.append(
            Problem("error", text, "correct the rows; the section Rejected lists the first rows with their fixes")
        )
    problems += [
        Problem(flag.severity, f"{count_noun(flags[code], 'example')}: {flag.sentence}", flag.fix)
        for code, flag in FLAGS.items()
        if flag.severity and flags.get(code)
    ]
    problems.sort(key=lambda problem: -SEVERITIES.index(problem.severity))
    contradictions = {code: flag.contradicts for code, flag in FLAGS.items()}
    confirmed = confirm_statements(contradictions, flags, has_rendered_text=examples > flags.get("pretokenized", 0))
    return Summary(describe_verdict(rows, (problem.severity for problem in problems)), (*problems,), confirmed)


def confirm_statements(
    contradictions: Mapping[str, Iterable[str]], problem_codes: Collection[str], *, has_rendered_text: bool
) -> tuple[str, ...]:
    """Return the statements that no problem contradicts.

    Args:
        contradictions: For the code of each possible problem, the statements that it contradicts.
        problem_codes: The codes of the problems that were found, and of the checks that did not run.
        has_rendered_text: Whether any row was rendered. The statements do not apply to rows that contain tokens.

    >>> contradictions = {"double_bos": ["no BOS token is doubled"], "duplicate": ["no row is duplicated"]}
    >>> confirm_statements(contradictions, ["duplicate"], has_rendered_text=True)
    ('no BOS token is doubled',)
    """
    if not has_rendered_text:
        return ()
    contradicted = {statement for code in problem_codes for statement in contradictions.get(code, ())}
    return tuple(
        item for item in dict.fromkeys(chain.from_iterable(contradictions.values())) if item not in contradicted
    )
