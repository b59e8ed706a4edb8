"""Summarize problems of data in plain sentences: what is correct, what is wrong, and how to fix it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from ftdata.errors import count_noun
from ftdata.pipeline.flags import FLAGS, SEVERITIES

_ACTIONS = {"error": "to fix before you train", "warning": "to check", "note": "to read"}


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
        passed: Statements such as "no answer is truncated".
    """

    verdict: str
    problems: tuple[Problem, ...]
    passed: tuple[str, ...]


def describe_verdict(rows: int, severities: Iterable[str]) -> str:
    """Describe how many problems of each severity were found.

    >>> describe_verdict(78, ["note", "error", "error"])
    '78 rows: 2 errors to fix before you train, 1 note to read'
    >>> describe_verdict(1, [])
    '1 row: no problems found'
    """
    counts = Counter(severities)
    parts = [
        f"{count_noun(counts[severity], severity)} {_ACTIONS[severity]}"
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
        problems.append(Problem("error", text, "correct the rows; the section Rejected lists each row with its fix"))
    problems += [
        Problem(flag.severity, f"{count_noun(flags[code], 'example')}: {flag.sentence}", flag.fix)
        for code, flag in FLAGS.items()
        if flag.severity and flags.get(code)
    ]
    problems.sort(key=lambda problem: -SEVERITIES.index(problem.severity))
    # The statements are about rendered text. They do not apply to rows that contain tokens.
    has_rendered = examples > flags.get("pretokenized", 0)
    passed = true_statements({code: flag.contradicts for code, flag in FLAGS.items()}, flags) if has_rendered else ()
    return Summary(describe_verdict(rows, (problem.severity for problem in problems)), (*problems,), passed)


def true_statements(contradictions: Mapping[str, Iterable[str]], problem_codes: Container[str]) -> tuple[str, ...]:
    """Return the statements that no problem contradicts.

    Args:
        contradictions: For the code of each possible problem, the statements that it contradicts.
        problem_codes: The codes of the problems that were found.

    >>> contradictions = {"double_bos": ["no BOS token is doubled"], "duplicate": ["no row is duplicated"]}
    >>> true_statements(contradictions, problem_codes=["duplicate"])
    ('no BOS token is doubled',)
    """
    is_true: dict[str, bool] = {}
    for code, statements in contradictions.items():
        for statement in statements:
            is_true[statement] = is_true.get(statement, True) and code not in problem_codes
    return tuple(statement for statement in is_true if is_true[statement])
