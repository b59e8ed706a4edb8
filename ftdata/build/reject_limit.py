"""Tolerance: how many bad rows a run may have before it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ftdata.build.ledger import Ledger
from ftdata.errors import BadRows, InputRefused, TooManyRejects, UsageError, check_choice
from ftdata.types import Reject

BY_CHOICE = frozenset({"overlong"})
"""Reasons of rejection that the user's own limits cause: counted and listed, but no fault of the data."""


@dataclass(frozen=True)
class RejectLimit:
    """What is done about bad rows; checked when made.

    Attributes:
        on_bad_rows: `"error"`: any is too many, and all are shown; `"quarantine"`: go on without them.
        max_rejects: with `"quarantine"`, how many there may be: a number, a share below 1, or one such as `"1%"`.
    """

    on_bad_rows: str = "error"
    max_rejects: float | str | None = None

    def __post_init__(self) -> None:
        check_choice("on_bad_rows", self.on_bad_rows, ("error", "quarantine"))
        if self.on_bad_rows == "error":
            if self.max_rejects is not None:
                raise UsageError("max_rejects", "max_rejects goes with on_bad_rows='quarantine'")
        elif self.max_rejects is None:
            raise UsageError(
                "max_rejects",
                "on_bad_rows='quarantine' needs max_rejects: how much loss is acceptable?",
                hint="max_rejects=100 or max_rejects='1%'",
            )
        else:
            self.allowed(0)

    def allowed(self, rows: int) -> float:
        """Return how many of so many rows may be bad.

        Raises:
            UsageError: `max_rejects` does not say.
        """
        if self.max_rejects is None:
            return 0
        text = str(self.max_rejects)
        try:
            value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            value = -1
        if not 0 <= value < float("inf"):
            expected = "expected a number of rows, or a share like '1%' or 0.01"
            raise UsageError("max_rejects", f"max_rejects is {self.max_rejects!r}, {expected}")
        return value * rows if text.endswith("%") or 0 < value < 1 else value

    def judge(self, ledgers: Sequence[Ledger], rejects: Callable[[], Iterable[Reject]]) -> None:
        """Refuse a run with more bad rows than are allowed, or nothing else.

        Raises:
            BadRows, TooManyRejects, InputRefused: as `build_sft_dataset`.
        """
        bad = sum(ledger.rejected.total() - sum(ledger.rejected[code] for code in BY_CHOICE) for ledger in ledgers)
        rows = sum(ledger.read - ledger.filtered for ledger in ledgers)
        if bad and self.on_bad_rows == "error":
            hint = "mend the rows, or go on without them: on_bad_rows='quarantine', max_rejects=..."
            raise BadRows(bad, map(str, _first(rejects(), 20)), hint=hint)
        if bad > self.allowed(rows):
            listed = "\n  ".join(map(str, _first(rejects(), 5)))
            raise TooManyRejects(
                "max_rejects",
                f"{bad} of {rows} rows are refused, max_rejects allows {int(self.allowed(rows))}:\n  {listed}\n",
                hint="mend the rows, or raise max_rejects",
            )
        if not any(ledger.built for ledger in ledgers):
            passed = sum(ledger.filtered for ledger in ledgers)
            none = f"where= passes over all {passed:,} rows" if passed else "the sources hold no rows"
            reasons = "; ".join(map(str, islice(rejects(), 3))) or none
            raise InputRefused("no_rows_built", f"no row was left to build: {reasons}")


def _first(rejects: Iterable[Reject], count: int) -> Iterator[Reject]:
    return islice((reject for reject in rejects if reject.code not in BY_CHOICE), count)
