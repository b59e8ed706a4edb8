"""Display the sides of preference pairs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ftdata.inspection.row_headings import describe_example
from ftdata.inspection.row_views import ExampleView, RowView, make_visible
from ftdata.types import SIDES


def find_differing_token(row: RowView) -> int | None:
    """Return the index of the first token in which the sides of a preference pair differ; `None` for any other row.

    Without a tokenizer, the pieces are ranges of characters, and the index refers to them.
    """
    if not row.is_pair or len(row.examples) != len(SIDES):
        return None
    chosen, rejected = (view.pieces for view in row.examples)
    pairs = zip(chosen, rejected, strict=False)
    shorter = min(len(chosen), len(rejected))
    return next((index for index, (left, right) in enumerate(pairs) if left != right), shorter)


_EXCERPT = 20
"""The number of characters of each side to show from the first difference on."""


def describe_difference(row: RowView) -> str:
    """Describe where the displayed sides of a preference pair begin to differ.

    The format is `chosen: <text> / rejected: <text>`, with the text from the first different character on. Return an
    empty string if they differ in their first character, and for any other row.
    """
    first = _first_displayed_token(row)
    if first is None:
        return ""
    texts = [view.text[int(view.ends[first - 1]) if first else 0 :] for view in row.examples]
    pairs = zip(*texts, strict=False)
    start = next((index for index, (left, right) in enumerate(pairs) if left != right), min(map(len, texts)))
    excerpts = [make_visible(text[start : start + _EXCERPT]).replace("\n", "") or "(end)" for text in texts]
    sides = zip(SIDES, excerpts, strict=True)
    return " / ".join(f"{side}: {excerpt}" for side, excerpt in sides) if start else ""


def _first_displayed_token(row: RowView) -> int | None:
    """Return the first token of the displayed sides: the first trained or differing token; `None` for other rows."""
    first = find_differing_token(row)
    if first is None:
        return None
    return min(first, *(int(np.flatnonzero(view.trained)[0]) for view in row.examples if view.trained.any()))


def split_pair(row: RowView) -> Iterator[tuple[str, ExampleView, ExampleView | None]]:
    """Yield the headings and views to display for a row, and the example that each view completes, if any.

    The prompt of a preference pair is displayed once, before both sides. Other rows are displayed as they are.
    """
    first = _first_displayed_token(row)
    if first is not None:
        yield "prompt of both sides", row.examples[0].part(0, first), None
    for number, view in enumerate(row.examples):
        yield describe_example(row, number), view if first is None else view.part(first, len(view)), view
