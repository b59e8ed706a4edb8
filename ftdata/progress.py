"""The progress of long operations, as a function receives it that a user passes as `progress`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class ProgressUpdate(NamedTuple):
    """The progress of an operation.

    Attributes:
        phase: the current phase, such as `"plan"`, `"start"` (of the workers), `"tokenize"`, `"pack"` or `"write"`.
        rows: the number of processed rows.
        tokens: the number of processed tokens.
        share: the processed share of the data, from 0 to 1; `None` if it is unknown.
    """

    phase: str
    rows: int = 0
    tokens: int = 0
    share: float | None = None


Progress = Callable[[ProgressUpdate], None]
