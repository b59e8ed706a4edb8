"""Display the sides of preference pairs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ftdata.inspection.row_headings import describe_example
from ftdata.inspection.row_views import ExampleView, RowView
from ftdata.types import SIDES


def find_differing_token(row: RowView) -> int | None:
    """Return the index of the first token in which the sides of a preference pair differ; `None` for any other row.

    Without a tokenizer, the index counts ranges of characters.
    """
    if not row.is_pair or len(row.examples) != len(SIDES):
        return None
    chosen, rejected = (view.pieces for view in row.examples)
    pairs = zip(chosen, rejected, strict=False)
    shorter = min(len(chosen), len(rejected))
    return next((index for index, (left, right) in enumerate(pairs) if left != right), shorter)


def split_pair(row: RowView) -> Iterator[tuple[str, ExampleView, ExampleView | None]]:
    """Yield the headings and views to display for a row, and the example that each view completes, if any.

    The prompt of a preference pair is displayed once, before both sides. Other rows are displayed as they are.
    """
    first = find_differing_token(row)
    if first is not None:
        first = min(first, *(int(np.flatnonzero(view.trained)[0]) for view in row.examples if view.trained.any()))
        yield "prompt of both sides", row.examples[0].part(0, first), None
    for number, view in enumerate(row.examples):
        yield describe_example(row, number), view if first is None else view.part(first, len(view)), view
