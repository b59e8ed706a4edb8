"""Audit checks that compare all rows, and checks of the tokenizer and the template."""

from __future__ import annotations

from collections.abc import Iterator
from operator import ne
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftdata.build import near_duplicates
from ftdata.errors import BadRow, TemplateRefused
from ftdata.inspection import text_detectors
from ftdata.inspection.checks.registry import (
    CheckedDataset,
    CheckedTemplate,
    ServedBatch,
    register_check,
    register_data_check,
    register_template_check,
)
from ftdata.inspection.serving import find_serving_differences
from ftdata.options import select_options
from ftdata.pipeline.recipe import Recipe, make_recipe
from ftdata.pipeline.render_rows import render_conversation
from ftdata.templates import Template
from ftdata.templates.worker.client import verify_template
from ftdata.types import Conversation, Source

# --- all rows together


@register_data_check(
    "duplicate",
    "warning",
    "the row is an exact duplicate of an earlier row",
    "remove duplicates: set dedup=True",
    contradicts=("no row is duplicated",),
)
def _check_duplicates(data: CheckedDataset) -> Iterator[tuple[int, str]]:
    train_rows, content = np.flatnonzero(~data.is_held_out), data.survey.numbers.content_hash
    first_rows = _first_rows(content, ~data.is_held_out)
    for row in train_rows.tolist():
        if (earlier := first_rows[int(content[row])]) != row:
            yield row, f"equal to {data.survey.source(earlier)}"


@register_data_check(
    "near_duplicate",
    "warning",
    "the row is a near-duplicate of an earlier row",
    "remove near-duplicates: set dedup=True and near_duplicate_threshold=0.8",
    enabled_by="near_duplicate_threshold",
)
def _check_near_duplicates(data: CheckedDataset) -> Iterator[tuple[int, str]]:
    assert data.near_duplicate_threshold is not None
    if data.signatures is None:
        return
    train_rows, content = np.flatnonzero(~data.is_held_out), data.survey.numbers.content_hash
    similar = near_duplicates.first_similar(data.signatures[train_rows], data.near_duplicate_threshold)
    for row, earlier in zip(train_rows.tolist(), train_rows[similar].tolist(), strict=True):
        if content[row] != content[earlier]:
            yield row, f"similar to {data.survey.source(earlier)}"


@register_data_check(
    "contradiction",
    "warning",
    "the row has the same prompt as an earlier row, but a different answer",
    "keep one of the answers, unless the prompt has several good answers",
)
def _check_contradictions(data: CheckedDataset) -> Iterator[tuple[int, str]]:
    if data.is_rated:
        return  # Data sets of rated answers have several answers to the same prompt.
    numbers, is_train = data.survey.numbers, ~data.is_held_out
    first_rows = _first_rows(numbers.prompt_hash, is_train)
    for row in np.flatnonzero(is_train & (numbers.prompt_hash != 0)).tolist():
        earlier = first_rows[int(numbers.prompt_hash[row])]
        if earlier != row and numbers.content_hash[row] != numbers.content_hash[earlier]:
            yield row, f"same prompt as {data.survey.source(earlier)}"


@register_data_check(
    "leakage",
    "error",
    "a held-out row is also in the training data (with --near-duplicate-threshold: or a near-duplicate of it)",
    "remove the row from either side; build with test_size, which keeps equal rows in the same split",
)
def _check_leakage(data: CheckedDataset) -> Iterator[tuple[int, str]]:
    reported_rows = set[int]()
    comparisons: list[tuple[str, NDArray[Any]]] = [("equal to", data.survey.numbers.content_hash)]
    if data.near_duplicate_threshold is not None and data.signatures is not None:
        groups = near_duplicates.similarity_groups(data.signatures, data.near_duplicate_threshold) + 1
        comparisons.append(("similar to", groups))
    for relation, values in comparisons:
        for row, train_row in _find_shared_values(data, values):
            if row not in reported_rows:
                reported_rows.add(row)
                yield row, f"{relation} {data.survey.source(train_row)}"


@register_data_check(
    "same_prompt",
    "warning",
    "a held-out row has the same prompt as a training row, with a different answer",
    "remove the row from either side, unless many conversations begin with this prompt",
)
def _check_same_prompt(data: CheckedDataset) -> Iterator[tuple[int, str]]:
    numbers = data.survey.numbers
    equal_rows = {row for row, _ in _find_shared_values(data, numbers.content_hash)}
    for row, train_row in _find_shared_values(data, numbers.prompt_hash):
        if row not in equal_rows:
            yield row, f"same prompt as {data.survey.source(train_row)}"


@register_data_check(
    "image_leakage",
    "warning",
    "an image of a held-out row is also in the training data",
    "remove the row from either side, if the held-out rows must have new images",
)
def _check_image_leakage(data: CheckedDataset) -> Iterator[tuple[int, str]]:
    equal_rows = {row for row, _ in _find_shared_values(data, data.survey.numbers.content_hash)}
    rows, hashes = data.images.T
    is_held_out = data.is_held_out[rows]
    train_rows = dict(zip(hashes[~is_held_out][::-1].tolist(), rows[~is_held_out][::-1].tolist(), strict=True))
    for row, hash_ in zip(rows[is_held_out].tolist(), hashes[is_held_out].tolist(), strict=True):
        if hash_ in train_rows and row not in equal_rows:
            equal_rows.add(row)
            yield row, f"same image as {data.survey.source(train_rows[hash_])}"


def _find_shared_values(data: CheckedDataset, values: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield each held-out row whose value also occurs in training rows, with the first such training row.

    The value 0 means unknown and never matches.
    """
    train_rows = _first_rows(values, ~data.is_held_out)
    for row in np.flatnonzero(data.is_held_out).tolist():
        if (value := int(values[row])) and value in train_rows:
            yield row, train_rows[value]


def _first_rows(values: NDArray[Any], selected: NDArray[np.bool_]) -> dict[int, int]:
    """Return a dictionary from each distinct value to the first selected row that has the value."""
    rows = np.flatnonzero(selected)
    distinct, first = np.unique(values[rows], return_index=True)
    return dict(zip(distinct.tolist(), rows[first].tolist(), strict=True))


_RARE_SHARE, _DOMINANT_SHARE, _MIN_ANSWERS = 0.01, 0.8, 200


@register_data_check(
    "script",
    "note",
    "an answer is written in a different script than almost all other answers",
    "check that these rows belong in the data",
)
def _check_scripts(data: CheckedDataset) -> Iterator[tuple[int, str]]:
    answer_count = np.count_nonzero(data.scripts)
    if answer_count < _MIN_ANSWERS:
        return
    names = text_detectors.SCRIPTS
    shares = [np.count_nonzero(data.scripts >> number & 1) / answer_count for number in range(len(names))]
    dominant = max(range(len(shares)), key=shares.__getitem__)
    # Japanese answers can consist of Han characters only.
    compatible = {"Kana": "Han"}.get(names[dominant])
    rare = [number for number, share in enumerate(shares) if share < _RARE_SHARE and names[number] != compatible]
    rare_bits = sum(1 << number for number in rare)
    rows = np.flatnonzero(data.scripts & rare_bits).tolist() if shares[dominant] >= _DOMINANT_SHARE else ()
    for row in rows:
        script = next(number for number in rare if data.scripts[row] >> number & 1)
        yield row, f"{names[script]}, most answers are {names[dominant]}"


# --- tokenizer and template


@register_template_check(
    "pad_is_stop",
    "warning",
    "the pad token is a stop token, or is not defined",
    "set a different pad token: collators that mask padding by its id also mask the stop token "
    "(the labels of ftdata are not affected)",
)
def _check_pad_is_stop(data: CheckedTemplate) -> Iterator[str]:
    tokenizer = data.recipe.tokenizer
    special_tokens = tokenizer.special_tokens
    pad, eos = (tokenizer.token_to_id(special_tokens.get(name)) for name in ("pad_token", "eos_token"))
    if pad is not None and pad in data.stops:
        yield f"{special_tokens['pad_token']} is both the pad token and a stop token"
    elif pad is None and eos in data.stops:
        yield f"no pad token is defined; many trainers then use {special_tokens['eos_token']}, which is a stop token"


@register_template_check(
    "date_inserted",
    "note",
    "the template prints the current date",
    "set date=, and use the same date at inference",
    needs_messages=True,
)
def _check_date_inserted(data: CheckedTemplate) -> Iterator[str]:
    template = data.recipe.template
    if template.source and template.is_chat and verify_template(template).uses_date:
        yield f"printed as {template.date:%Y-%m-%d}"


@register_template_check(
    "template_drift",
    "warning",
    "the tokenizer's chat template, which inference may use, renders the rows differently",
    "save the training template with the model, as `ftdata train` does, or train with the tokenizer's template",
    needs_messages=True,
)
def _check_template_drift(data: CheckedTemplate) -> Iterator[str]:
    recipe = data.recipe
    if recipe.tokenizer.chat_template in (None, recipe.template.source):
        return
    try:
        variables = Template("tokenizer", recipe.tokenizer.chat_template).variables
        kwargs = {name: value for name, value in recipe.template.kwargs.items() if name in variables}
        rendering: dict[str, Any] = {"date": recipe.template.date, "template_kwargs": kwargs}
        tokenizer_recipe = make_recipe(recipe.tokenizer, **rendering, **select_options(vars(recipe), "task", "rows"))
    except TemplateRefused as error:
        yield f"the tokenizer's chat template cannot be used: {error}"
        return
    sides, conversations = (recipe, tokenizer_recipe), data.conversations
    texts = [[_render_text(side, conversation) for conversation in conversations] for side in sides]
    if different := sum(map(ne, *texts)):
        yield f"{different:,} of {len(conversations):,} compared rows differ"


def _render_text(recipe: Recipe, conversation: Conversation) -> str | None:
    """Return the rendered text of a conversation, or `None` if it cannot be rendered."""
    try:
        return "\n".join(rendered.text for rendered in render_conversation(recipe, conversation))
    except (BadRow, TemplateRefused):
        return None


# --- an inference server


@register_check(
    "server",
    "serving",
    "error",
    "the server renders other tokens before a trained turn than the training",
    "start the server with the template, the template variables and the tokenizer of the training",
    enabled_by="serve",
    contradicts=("the server renders the tokens of the training before every trained turn",),
)
def _check_serving(served: ServedBatch) -> Iterator[tuple[Source, str]]:
    yield from find_serving_differences(*served)
