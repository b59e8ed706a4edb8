"""The options `on_bad_rows` and `max_rejects`, which limit the number of rejected rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ftdata.build.ledger import Ledger
from ftdata.errors import (
    BadRows,
    InputRefused,
    TooManyRejects,
    UsageError,
    check_choice,
    count_noun,
    escape_line_breaks,
)
from ftdata.types import Reject

BY_CHOICE = frozenset({"overlong"})
"""Reject codes that the user's options cause. These rejects are counted and listed, but do not count as bad rows."""

_MAX_GROUPS, _MAX_PLACES = 20, 3
"""Maximum number of reasons in an error message, and of rows with the same reason."""


@dataclass(frozen=True)
class RejectLimit:
    """The options that limit the number of bad rows. They are validated on construction.

    Attributes:
        on_bad_rows: `"error"` to fail if any row is bad, or `"quarantine"` to leave bad rows out and continue.
        max_rejects: maximum number of bad rows with `"quarantine"`: a number, a share below 1, or e.g. `"1%"`.
    """

    on_bad_rows: str = "error"
    max_rejects: float | str | None = None

    def __post_init__(self) -> None:
        check_choice("on_bad_rows", self.on_bad_rows, ("error", "quarantine"))
        if self.on_bad_rows == "error":
            if self.max_rejects is not None:
                problem = "max_rejects has no effect with on_bad_rows='error'"
                raise UsageError("max_rejects", problem, hint="set on_bad_rows='quarantine', or remove max_rejects")
        elif self.max_rejects is None:
            message = "on_bad_rows='quarantine' needs max_rejects, the maximum number of rejected rows"
            raise UsageError("max_rejects", message, hint="set e.g. max_rejects=100 or max_rejects='1%'")
        else:
            self.max_bad_rows(0)

    def max_bad_rows(self, rows: int) -> float:
        """Return how many bad rows are allowed in data with `rows` rows.

        Raises:
            UsageError: `max_rejects` is invalid.
        """
        if self.max_rejects is None:
            return 0
        text = str(self.max_rejects)
        try:
            value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            value = -1
        is_count = not text.endswith("%") and value >= 1
        if not 0 <= value < float("inf") or (is_count and value != int(value)):
            expected = "expected a number of rows, or a share such as '1%' or 0.01"
            raise UsageError("max_rejects", f"max_rejects is {self.max_rejects!r}, {expected}")
        return value * rows if text.endswith("%") or 0 < value < 1 else value

    def check(
        self, ledgers: Sequence[Ledger], rejects: Callable[[], Iterable[Reject]], missing_column: Callable[[], str]
    ) -> None:
        """Check that the number of bad rows in a build is within the limit.

        Args:
            ledgers: the counts of each source.
            rejects: returns all rejected rows.
            missing_column: describes a missing column in the filter expression, if no row is left.

        Raises:
            BadRows: `on_bad_rows` is `"error"` and there are bad rows.
            TooManyRejects: there are more bad rows than `max_rejects`.
            InputRefused: no row is left to build.
        """
        note = "" if any(ledger.built for ledger in ledgers) else missing_column()
        where_note = f"where= excludes all valid rows: {note}\n" if note else ""
        bad = sum(ledger.rejected.total() - sum(ledger.rejected[code] for code in BY_CHOICE) for ledger in ledgers)
        rows = sum(ledger.read - ledger.filtered for ledger in ledgers)
        if bad and self.on_bad_rows == "error":
            hint = "fix the rows"
            if bad < rows:
                hint += f", or leave them out: on_bad_rows='quarantine', max_rejects={bad}"
            raise BadRows(bad, group_rejects(rejects()), hint=hint)
        if bad > self.max_bad_rows(rows):
            listed = "\n  ".join(group_rejects(rejects()))
            allowed = int(self.max_bad_rows(rows))
            message = (
                f"{bad} of {rows} rows are rejected, but max_rejects allows only {allowed}:\n  {listed}\n{where_note}"
            )
            raise TooManyRejects("max_rejects", message, hint="fix the rows, or raise max_rejects")
        if not any(ledger.built for ledger in ledgers):
            filtered = sum(ledger.filtered for ledger in ledgers)
            reason = (
                f"where= filters out all {count_noun(filtered, 'row')}" if filtered else "the sources contain no rows"
            )
            reasons = list(map(str, islice(rejects(), 3))) or [reason]
            listing = "; ".join(filter(None, [*reasons, note]))
            raise InputRefused("no_rows_built", f"no row is left to build: {listing}")


def group_rejects(rejects: Iterable[Reject]) -> Iterator[str]:
    """Yield a line for each reason, with the first rows that have it. The fix follows where it first applies."""
    groups, counts = dict[tuple[str, str, str], list[str]](), Counter[tuple[str, str, str]]()
    unlisted = 0
    for reject in rejects:
        key = reject.code, reject.reason, reject.fix
        if reject.code in BY_CHOICE:
            continue
        if key not in groups and len(groups) == _MAX_GROUPS:
            unlisted += 1
            continue
        counts[key] += 1
        places = groups.setdefault(key, [])
        if len(places) < _MAX_PLACES:
            places.append(escape_line_breaks(f"{reject.source} {reject.field}".rstrip()))
    fixes = set[str]()
    for (code, reason, fix), places in groups.items():
        count = counts[code, reason, fix]
        if count == 1:
            line = f"[{code}] {places[0]}: {reason}"
        else:
            more = ", ..." if count > len(places) else ""
            line = f"[{code}] {count:,} rows: {reason} ({', '.join(places)}{more})"
        yield f"{line}. Fix: {fix}" if fix and fix not in fixes else line
        fixes.add(fix)
    if unlisted:
        yield f"... and {count_noun(unlisted, 'row')} with other reasons"
