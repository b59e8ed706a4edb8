"""What a check is, what it is shown, and the list of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftdata.inspection.survey import Ints, Survey
from ftdata.pipeline.recipe import Recipe
from ftdata.types import Conversation, Example

SEVERITIES = ("note", "warning", "error")


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        code: its name, which stays.
        severity: `"error"` (what is trained is wrong), `"warning"` (it likely is) or `"note"` (good to know).
        of: `"flag"`, `"row"`, `"data"` or `"template"`.
        says: what is wrong.
        fix: what to do.
        finds: a row check yields what it found in a `CheckedRow`; a data check, in `CheckedDataset`, the numbers of rows and what it
            found there; a template check what it found in a `CheckedTemplate`.
        asked: the option that asks for it, where it is not made otherwise.
        of_messages: whether it looks at messages, or at what was decided when a build was made: of a build, neither
            is there.
    """

    code: str
    severity: str
    of: str
    says: str
    fix: str
    finds: Callable[[Any], Iterator[Any]] = field(repr=False)
    asked: str = ""
    of_messages: bool = False


class CheckedRow(NamedTuple):
    """One row that was built, as row checks see it; `adds` is what the template prints before it by itself."""

    said: Conversation
    examples: tuple[Example, ...]
    recipe: Recipe
    adds: str


@dataclass(frozen=True)
class CheckedDataset:
    """All rows, as data checks see them.

    Attributes:
        seen: numbers of the rows.
        scripts: int64 `[rows]`, a bit for each script, of `detect.SCRIPTS`, in which an answer is written.
        held_out: by number of the source, whether its rows must not be trained on.
        near_duplicate_threshold: how similar rows must be to count as equal; `None`: as the same.
        signatures: MinHashes of the rows, where there is `near_duplicate_threshold`.
    """

    seen: Survey
    scripts: Ints
    held_out: Sequence[bool]
    near_duplicate_threshold: float | None = None
    signatures: NDArray[np.uint32] | None = None

    @cached_property
    def out(self) -> NDArray[np.bool_]:
        """Which rows must not be trained on (bool `[rows]`)."""
        return np.asarray(self.held_out, np.bool_)[self.seen.numbers.source]


class CheckedTemplate(NamedTuple):
    """Tokenizer and template, with which stops answers end, and some conversations, as template checks see them."""

    recipe: Recipe
    stops: frozenset[int]
    said: Sequence[Conversation]


checks: dict[str, Check] = {}
"""Code -> check, in the order in which findings of one severity are told."""

Finds = Callable[[Any], Iterator[Any]]


def register_check(code: str, severity: str, of: str, says: str, fix: str, **more: Any) -> Callable[[Finds], Finds]:
    """Add a function to the checks."""

    def add(finds: Finds) -> Finds:
        checks[code] = Check(code, severity, of, says, fix, finds, **more)
        return finds

    return add


def register_flag_check(code: str, severity: str, says: str, fix: str) -> None:
    """Add a flag of examples to the checks."""
    register_check(code, severity, "flag", says, fix)(lambda _: iter(()))
