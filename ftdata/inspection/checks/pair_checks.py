"""Audit checks that compare the two sides of preference pairs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ftdata.inspection import text_detectors
from ftdata.inspection.checks.registry import CheckedDataset, CheckedRow, register_data_check, register_row_check
from ftdata.inspection.row_views import content_texts
from ftdata.types import SIDES, Conversation


@register_row_check(
    "stop_on_one_side",
    "error",
    "only one side of the pair ends with a trained stop token, so the model learns a preference about stopping",
    "raise max_length, or remove pairs with an incomplete answer",
    compares_sides=True,
)
def _check_stop(row: CheckedRow) -> Iterator[str]:
    stops = [
        bool(row.recipe.control.is_control(example.input_ids[example.trained][-1:]).any()) for example in row.examples
    ]
    if stops[0] != stops[1]:
        yield f"only the {SIDES[stops.index(True)]} side has a stop token"


@register_row_check(
    "refusal_on_one_side",
    "note",
    "only one answer of the pair is a refusal",
    "check that the model should learn to refuse, or to answer, in these rows",
    needs_messages=True,
    compares_sides=True,
)
def _check_refusal(row: CheckedRow) -> Iterator[str]:
    refusals = [text_detectors.is_refusal(_last_text(side)) for side in row.conversation.sides]
    if refusals[0] != refusals[1]:
        yield f"the {SIDES[refusals.index(True)]} answer is a refusal"


def _last_text(side: Conversation) -> str:
    answers = [message for message in side.messages if message["role"] == "assistant"]
    return next(content_texts(answers[-1].get("content")), "")


_BIASED_SHARE, _MIN_PAIRS = 0.65, 50


@register_data_check(
    "length_bias",
    "warning",
    "most chosen answers are longer than the rejected answers, or most are shorter, so the model learns a length",
    "balance the lengths; or train with a loss that is normalized by the length, such as loss_type: [sigmoid_norm]",
)
def _check_length_bias(data: CheckedDataset) -> Iterator[tuple[None, str]]:
    """Compare the numbers of trained tokens. Pairs of equal length are not counted."""
    numbers = data.survey.numbers
    if not data.has_pairs:
        return
    chosen = numbers.first[~data.is_held_out]
    differences = numbers.trained[chosen] - numbers.trained[chosen + 1]
    differing = differences[differences != 0]
    if len(differing) < _MIN_PAIRS:
        return
    share = np.count_nonzero(differing > 0) / len(differing)
    kind, share = ("longer", share) if share >= 1 / 2 else ("shorter", 1 - share)
    if share >= _BIASED_SHARE:
        median = abs(int(np.median(differences)))
        yield None, f"{share:.0%} are {kind}; median difference: {median:,} tokens"
