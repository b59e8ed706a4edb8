"""Checks of all rows together, and of tokenizer and template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftdata.build import near_duplicates
from ftdata.errors import BadRow, TemplateRefused
from ftdata.inspection import text_detectors
from ftdata.inspection.checks.registry import CheckedDataset, CheckedTemplate, register_check
from ftdata.pipeline.recipe import Recipe, make_recipe
from ftdata.pipeline.render_rows import render_conversation
from ftdata.templates.worker.client import verify_template
from ftdata.types import Conversation

# --- all rows together


@register_check(
    "duplicate",
    "warning",
    "data",
    "the row is an exact duplicate of an earlier one",
    "keep one of them: build with dedup",
)
def _duplicate(data: CheckedDataset) -> Iterator[tuple[int, str]]:
    trained, content = np.flatnonzero(~data.out), data.seen.numbers.content
    first = _first_of(content, ~data.out)
    for row in trained.tolist():
        if (earlier := first[int(content[row])]) != row:
            yield row, f"equal to {data.seen.source(earlier)}"


@register_check(
    "near_duplicate",
    "warning",
    "data",
    "the row says almost the same as an earlier one",
    "keep one of them: build with dedup and near_duplicate_threshold",
    asked="near_duplicate_threshold",
)
def _near_duplicate(data: CheckedDataset) -> Iterator[tuple[int, str]]:
    assert data.near_duplicate_threshold is not None
    if data.signatures is None:
        return
    trained, content = np.flatnonzero(~data.out), data.seen.numbers.content
    first = trained[near_duplicates.first_similar(data.signatures[trained], data.near_duplicate_threshold)]
    for row, earlier in zip(trained.tolist(), first.tolist(), strict=True):
        if content[row] != content[earlier]:
            yield row, f"almost {data.seen.source(earlier)}"


@register_check(
    "leakage",
    "error",
    "data",
    "a row that is held out is trained on: an equal one, or, with --near-duplicate-threshold, one that says almost the same",
    "take it out of one of them; build with test_size, which keeps equal rows together",
)
def _leakage(data: CheckedDataset) -> Iterator[tuple[int, str]]:
    told = set[int]()
    ways: list[tuple[str, NDArray[Any]]] = [("equal to", data.seen.numbers.content)]
    if data.near_duplicate_threshold is not None and data.signatures is not None:
        ways.append(("almost", near_duplicates.similarity_groups(data.signatures, data.near_duplicate_threshold) + 1))
    for says, values in ways:
        for row, earlier in _shared(data, values):
            if row not in told:
                told.add(row)
                yield row, f"{says} {data.seen.source(earlier)}"


@register_check(
    "same_prompt",
    "warning",
    "data",
    "a row that is held out asks, word for word, what is trained to be answered otherwise",
    "take it out of one of them, unless the question is one that everybody asks",
)
def _same_prompt(data: CheckedDataset) -> Iterator[tuple[int, str]]:
    numbers = data.seen.numbers
    equal = {row for row, _ in _shared(data, numbers.content)}
    for row, earlier in _shared(data, numbers.asked):
        if row not in equal:
            yield row, f"asks the same as {data.seen.source(earlier)}"


def _shared(data: CheckedDataset, values: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield rows that are held out whose value is that of one that is trained on, and which; 0: nobody knows."""
    known = _first_of(values, ~data.out)
    for row in np.flatnonzero(data.out).tolist():
        if (value := int(values[row])) and value in known:
            yield row, known[value]


def _first_of(values: NDArray[Any], among: NDArray[np.bool_]) -> dict[int, int]:
    """Return the first row of each value."""
    rows = np.flatnonzero(among)
    distinct, first = np.unique(values[rows], return_index=True)
    return dict(zip(distinct.tolist(), rows[first].tolist(), strict=True))


_FEW, _MOST, _ENOUGH = 0.01, 0.8, 200


@register_check(
    "script",
    "note",
    "data",
    "what is trained is written in another script than nearly all else",
    "see whether these rows are meant to be there",
)
def _script(data: CheckedDataset) -> Iterator[tuple[int, str]]:
    written = np.count_nonzero(data.scripts)
    if written < _ENOUGH:
        return
    shares = [np.count_nonzero(data.scripts >> number & 1) / written for number in range(len(text_detectors.SCRIPTS))]
    usual = max(range(len(shares)), key=shares.__getitem__)
    # Where Kana are usual, words in Han alone are, too.
    beside = {"Kana": "Han"}.get(text_detectors.SCRIPTS[usual])
    rare = [number for number, share in enumerate(shares) if share < _FEW and text_detectors.SCRIPTS[number] != beside]
    for row in (
        np.flatnonzero(data.scripts & sum(1 << number for number in rare)).tolist() if shares[usual] >= _MOST else ()
    ):
        own = next(number for number in rare if data.scripts[row] >> number & 1)
        yield row, f"{text_detectors.SCRIPTS[own]}, where others are {text_detectors.SCRIPTS[usual]}"


# --- tokenizer and template


@register_check(
    "pad_is_stop",
    "warning",
    "template",
    "the pad token ends turns, or there is none",
    "name another one: collators that mask it by its id hide the stop from the model (ftdata's labels are safe)",
)
def _pad_is_stop(given: CheckedTemplate) -> Iterator[str]:
    tokenizer = given.recipe.tokenizer
    specials = tokenizer.special_tokens
    pad, eos = (tokenizer.id_of(specials.get(name)) for name in ("pad_token", "eos_token"))
    if pad is not None and pad in given.stops:
        yield f"{specials['pad_token']} is the pad token, and a stop"
    elif pad is None and eos in given.stops:
        yield f"there is no pad token, for which many trainers then take {specials['eos_token']}, which is a stop"


@register_check(
    "date_inserted",
    "note",
    "template",
    "the template prints a date",
    "set it with date=, and print the same at inference",
    of_messages=True,
)
def _date_inserted(given: CheckedTemplate) -> Iterator[str]:
    template = given.recipe.template
    if template.source and template.chat and verify_template(template).uses_date:
        yield f"shown as {template.date:%Y-%m-%d}"


@register_check(
    "template_drift",
    "warning",
    "template",
    "the tokenizer's own chat template, which inference may use, prints the rows otherwise",
    "keep the template that you train with beside the model, as `ftdata train` does, or train with the tokenizer's",
    of_messages=True,
)
def _template_drift(given: CheckedTemplate) -> Iterator[str]:
    recipe = given.recipe
    if recipe.tokenizer.chat_template in (None, recipe.template.source):
        return
    try:
        own = make_recipe(
            recipe.tokenizer,
            date=recipe.template.date,
            template_kwargs=recipe.template.kwargs,
            **{name: getattr(recipe, name) for name in ("turns", "on_dropped_message", "on_missing_stop")},
        )
    except TemplateRefused as error:
        yield f"it is refused: {error}"
        return
    differ = sum(_text(recipe, one) != _text(own, one) for one in given.said)
    if differ:
        yield f"{differ:,} of {len(given.said):,} rows that were compared"


def _text(recipe: Recipe, said: Conversation) -> str | None:
    try:
        return "\n".join(one.text for one in render_conversation(recipe, said))
    except (BadRow, TemplateRefused):
        return None
