"""The registry of audit checks, and the classes that contain the inputs of checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftdata.inspection.serving import Server
from ftdata.inspection.survey import Ints, Survey
from ftdata.pipeline.batch import Batch
from ftdata.pipeline.recipe import Recipe
from ftdata.types import Conversation, Example


@dataclass(frozen=True)
class Check:
    """An audit check: its code, severity, message, fix and function.

    Attributes:
        code: The stable name of the check.
        severity: `"error"` (the training data is wrong), `"warning"` (it is probably wrong) or `"note"` (information).
        scope: The object that is checked: `"flag"`, `"row"`, `"data"`, `"template"` or `"server"`.
        message: A description of the problem.
        fix: The fix, in the imperative.
        run: The function that runs the check. A row check takes a `CheckedRow` and yields details. A data check takes a
            `CheckedDataset` and yields pairs of row number and detail; the number is `None` for a finding about the
            whole data. A template check takes a `CheckedTemplate` and
            yields details. A server check takes a `ServedBatch` and yields pairs of source and detail.
        enabled_by: The option that enables the check; empty if the check always runs.
        needs_messages: Whether the check needs messages, or options that are fixed when a build is made. Such checks do
            not run on builds.
        compares_sides: Whether a row check compares the sides of a preference pair. It runs only on pairs; the other
            row checks run on each side.
        contradicts: Statements about the data that are false if the check finds a problem.
    """

    code: str
    severity: str
    scope: str
    message: str
    fix: str
    run: Callable[[Any], Iterator[Any]] = field(repr=False)
    enabled_by: str = ""
    needs_messages: bool = False
    compares_sides: bool = False
    contradicts: tuple[str, ...] = ()


class CheckedRow(NamedTuple):
    """The input of a check that inspects a single row.

    Attributes:
        conversation: The normalized row.
        examples: The examples of the row.
        recipe: The options, tokenizer and template.
        added_text: The text that the template inserts before a conversation without a system message.
    """

    conversation: Conversation
    examples: tuple[Example, ...]
    recipe: Recipe
    added_text: str


@dataclass(frozen=True)
class CheckedDataset:
    """The input of a check that compares all rows.

    Attributes:
        survey: The numbers of all rows.
        scripts: int64 `[rows]`, one bit for each script of `text_detectors.SCRIPTS` that the answers are written in.
        held_out_sources: For each source number, whether the rows of the source are held out.
        is_rated: Whether the rows are rated answers: preference pairs, or answers for KTO.
        has_pairs: Whether the rows are preference pairs.
        near_duplicate_threshold: The similarity above which rows are near-duplicates; `None` to find exact duplicates
            only.
        signatures: The MinHash signatures of the rows, if there is a `near_duplicate_threshold`.
        images: int64 `[images, 2]`, the row of each image, and a hash of the image.
    """

    survey: Survey
    scripts: Ints
    held_out_sources: Sequence[bool]
    is_rated: bool = False
    has_pairs: bool = False
    near_duplicate_threshold: float | None = None
    signatures: NDArray[np.uint32] | None = None
    images: Ints = field(default_factory=lambda: np.empty((0, 2), np.int64))

    @cached_property
    def is_held_out(self) -> NDArray[np.bool_]:
        """A mask of the held-out rows (bool `[rows]`)."""
        return np.asarray(self.held_out_sources, np.bool_)[self.survey.numbers.source]


class CheckedTemplate(NamedTuple):
    """The input of a check that inspects the tokenizer and the template.

    Attributes:
        recipe: The options, tokenizer and template.
        stops: The ids of the stop tokens at the end of the answers.
        conversations: Sample conversations.
    """

    recipe: Recipe
    stops: frozenset[int]
    conversations: Sequence[Conversation]


class ServedBatch(NamedTuple):
    """The input of a check that compares rows with an inference server.

    Attributes:
        server: The server.
        batch: The rows.
        recipe: The options, tokenizer and template.
    """

    server: Server
    batch: Batch
    recipe: Recipe


checks: dict[str, Check] = {}
"""All checks by code, in the order in which findings of equal severity are printed."""

CheckFunction = Callable[[Any], Iterator[Any]]


def register_check(
    scope: str, code: str, severity: str, message: str, fix: str, **options: Any
) -> Callable[[CheckFunction], CheckFunction]:
    """Return a decorator that registers a function as a check.

    Args:
        scope: `"flag"`, `"row"`, `"data"`, `"template"` or `"server"`.
        code: The stable name of the check.
        severity: `"error"`, `"warning"` or `"note"`.
        message: A description of the problem.
        fix: The fix, in the imperative.
        options: Further fields of `Check`: `enabled_by`, `needs_messages`, `compares_sides`, `contradicts`.
    """

    def register(function: CheckFunction) -> CheckFunction:
        checks[code] = Check(code, severity, scope, message, fix, function, **options)
        return function

    return register


register_row_check = partial(register_check, "row")
register_data_check = partial(register_check, "data")
register_template_check = partial(register_check, "template")
