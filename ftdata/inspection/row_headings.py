"""Headings and one-line descriptions of rows and examples, for the terminal and the page."""

from __future__ import annotations

from ftdata.errors import count_noun
from ftdata.inspection.row_views import ExampleView, RowView, to_single_line
from ftdata.types import SIDES


def row_heading(row: RowView) -> str:
    """Return the heading of a row: its number, source, schema and packed sequence."""
    pack = "" if row.pack is None else f" · pack {row.pack}"
    label = f" · {row.label}" if row.label else ""
    return to_single_line(f"{row_name(row)} · {row.source} · {row.schema or 'rejected'}{pack}{label}")


def row_name(row: RowView) -> str:
    """Return the name of a row, such as `row 3`; in a build, the name of the example or pair."""
    if row.number is None:
        return f"row {row.source.row}"
    return f"{'pair' if row.is_pair else 'example'} {row.number}"


def describe_example(row: RowView, number: int) -> str:
    """Return the heading of an example of a row; an empty string if the row has only one example.

    A ranked list of answers has several pairs.
    """
    if row.is_pair:
        pair, side = divmod(number, len(SIDES))
        pairs = len(row.examples) // len(SIDES)
        return SIDES[side] if pairs <= 1 else f"pair {pair + 1} of {pairs}, {SIDES[side]}"
    return f"example {number + 1} of {len(row.examples)}" if len(row.examples) > 1 else ""


def describe_trained_share(view: ExampleView) -> str:
    """Describe how many tokens of an example are trained."""
    trained, total = view.counts
    if view.ids is None:
        return f"{trained:,} of {total:,} characters trained"
    return f"{trained:,} of {total:,} tokens trained ({trained / max(total, 1):.0%})"


def describe_dropped(row: RowView) -> str:
    """Describe the examples of a row that were removed because they are too long."""
    examples, tokens = count_noun(len(row.dropped), "example"), count_noun(sum(row.dropped), "token")
    return f"✂ {examples} dropped: {tokens} beyond max_length"
