"""Convert rows to examples: normalize, render, tokenize, mask and truncate each batch of rows.

Row ──normalize──> Conversation ──render──> Rendered ──tokenize──> Encodings ──mask, truncate──> Batch of examples
 └───────────────────────── or, at any stage, Reject: where, why, and the fix
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import BadRow, UsageError, count_noun
from ftdata.options import select_options
from ftdata.pipeline.batch import Batch, BuiltRow, check_row_tokens, compare_template_ids
from ftdata.pipeline.flags import FLAGS
from ftdata.pipeline.mask import Policy, drop_untrained_flags, trained_tokens
from ftdata.pipeline.recipe import Recipe, make_recipe, policy_name
from ftdata.pipeline.render_rows import RowAndOutcome, apply_policy, make_reject, render_conversation, render_rows
from ftdata.pipeline.truncate import truncate, turn_ends
from ftdata.schemas import normalize
from ftdata.tokenizing.batches import EncodedText, Encodings, RenderedBatch
from ftdata.tokenizing.load import load_tokenizer
from ftdata.tokenizing.tokenizer import encode_rendered
from ftdata.types import SIDES, Conversation, Example, Message, Reject, RenderedRow, Row, RowTokens, Source


def build_rows(recipe: Recipe, rows: Iterable[Row | Reject]) -> Iterator[BuiltRow | Reject]:
    """Convert rows to examples. Yield, in order, a `BuiltRow` for each valid row and a `Reject` for each bad row."""
    return chain.from_iterable(build_batches(recipe, rows))


def build_batches(recipe: Recipe, rows: Iterable[Row | Reject]) -> Iterator[Batch]:
    """Convert rows to examples as `build_rows` does, but yield the results in batches."""
    for rendered in render_rows(recipe, rows):
        batch, errors = _mask_rows(recipe, [outcome for _, outcome in rendered])
        yield _finish_rows(recipe, rendered, batch, errors)


def _finish_rows(
    recipe: Recipe, rendered: Sequence[RowAndOutcome], batch: Batch, errors: Mapping[int, BadRow]
) -> Batch:
    """Truncate the tokenized texts of each row and check their flags. A row with one short text is not changed."""
    is_final = batch.trained_counts > 0
    if recipe.max_length is not None:
        is_final &= batch.lengths <= recipe.max_length
    is_final[list(errors)] = False
    if recipe.reject_flags:
        is_final &= np.fromiter((flags.isdisjoint(recipe.reject_flags) for flags in batch.flags), np.bool_)
    final_rows = _find_final_rows(batch, [outcome for _, outcome in rendered], is_final)
    if all(final_rows):
        return batch
    next_text = 0
    outcomes, rows = list[Conversation | Reject](), list[Sequence[int]]()
    changed, dropped = dict[int, Example](), dict[int, tuple[int, ...]]()
    for (row, outcome), is_final_row in zip(rendered, final_rows, strict=True):
        if isinstance(outcome, Reject):
            outcomes.append(outcome)
            continue
        numbers: Sequence[int] = range(next_text, next_text + len(outcome.texts))
        next_text += len(outcome.texts)
        if not is_final_row:
            encoded = {number: errors.get(number) or batch.example(number) for number in numbers}
            truncated = _truncate_row(recipe, row, outcome.conversation, encoded)
            if isinstance(truncated, Reject):
                outcomes.append(truncated)
                continue
            examples, dropped_lengths = truncated
            changed |= examples
            numbers = [*examples]
            if dropped_lengths:
                dropped[len(rows)] = dropped_lengths
        outcomes.append(outcome.conversation)
        rows.append(numbers)
    return batch.select(outcomes, rows, changed, dropped)


def _find_final_rows(batch: Batch, outcomes: Sequence[RenderedRow | Reject], is_final: NDArray[np.bool_]) -> list[bool]:
    """Return for each outcome whether it needs no further check: a rejected row, or a row with final examples.

    Args:
        batch: the batch.
        outcomes: the rendered rows and the rejected rows.
        is_final: bool `[examples]`, whether the example is trained, not too long, and without flags that reject it.
    """
    bounds, ids, trained = batch.tokens.token_bounds.tolist(), batch.tokens.ids, batch.trained
    final_examples, final_rows, number = is_final.tolist(), list[bool](), 0
    for outcome in outcomes:
        if isinstance(outcome, Reject):
            final_rows.append(True)
            continue
        is_final_row = outcome.ends_with_answers and all(final_examples[number : number + len(outcome.texts)])
        if is_final_row and outcome.conversation.sides:
            chosen, rejected = (slice(*bounds[side : side + 2]) for side in (number, number + 1))
            is_final_row = not _are_identical((ids[chosen], trained[chosen]), (ids[rejected], trained[rejected]))
        final_rows.append(is_final_row)
        number += len(outcome.texts)
    return final_rows


def _truncate_row(
    recipe: Recipe, row: Row | Reject, conversation: Conversation, encoded: Mapping[int, Example | BadRow]
) -> tuple[dict[int, Example], tuple[int, ...]] | Reject:
    """Truncate the examples of one row and check their flags. Return them, and the lengths of dropped examples."""
    try:
        examples = _trained_examples(recipe, conversation, encoded)
    except BadRow as error:
        return make_reject(row, error)
    lengths = tuple(map(len, examples.values()))
    fitting, dropped, length_error = dict[int, Example](), list[int](), None
    for position, (number, example) in enumerate(examples.items()):
        try:
            is_side = bool(conversation.sides)
            fitting[number] = truncate(example, recipe.max_length, recipe.overlong, keep_ending=is_side)
        except BadRow as error:
            length_error = error
            length_error.field = SIDES[position] if conversation.sides else ""
            dropped.append(len(example))
    try:
        # In a split conversation, each example is a group of whole turns, so some of the examples may be dropped.
        # Both sides of a preference pair are kept or rejected.
        can_drop = recipe.overlong != "reject" and not conversation.sides
        if length_error is not None and not (can_drop and fitting):
            if fitting:
                problem, hint = length_error.message, length_error.hint
                if not conversation.sides:
                    problem += f"; {len(fitting)} of the {len(examples)} examples of this conversation fit"
                    hint = "raise max_length, or set overlong='drop_turns' to keep only these examples"
                raise BadRow(length_error.code, problem, field=length_error.field, hint=hint)
            raise length_error
        if conversation.sides:
            _check_sides_differ(fitting)
        _check_flags(recipe, fitting.values())
    except BadRow as error:
        return replace(make_reject(row, error), lengths=lengths)
    return fitting, tuple(dropped)


def _check_sides_differ(examples: Mapping[int, Example]) -> None:
    """Reject a preference pair if the trained tokens of both sides and the tokens before them are identical.

    Raises:
        BadRow: `identical_sides`.
    """
    chosen, rejected = examples.values()
    if not _are_identical((chosen.input_ids, chosen.trained), (rejected.input_ids, rejected.trained)):
        return
    if np.array_equal(chosen.input_ids, rejected.input_ids):
        reason = "after the truncation" if chosen.cut or rejected.cut else "because the template omits the difference"
    else:
        reason = "up to the last trained token"
    problem = f"the tokens of the chosen and the rejected side are identical {reason}"
    hint = "raise max_length, or remove the row" if chosen.cut or rejected.cut else "remove the row"
    raise BadRow("identical_sides", problem, field=SIDES[1], hint=hint)


_Tokens = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""The token ids of a text, and the mask of its trained tokens."""


def _are_identical(chosen: _Tokens, rejected: _Tokens) -> bool:
    """Return whether the trained tokens of both sides of a pair and the tokens before them are identical."""
    ends = [len(trained) - int(trained[::-1].argmax()) for _, trained in (chosen, rejected)]
    return ends[0] == ends[1] and all(
        np.array_equal(left[: ends[0]], right[: ends[0]]) for left, right in zip(chosen, rejected, strict=True)
    )


def _check_flags(recipe: Recipe, examples: Iterable[Example]) -> None:
    """Reject a row if one of its examples has a flag that is listed in `reject_flags`."""
    if not recipe.reject_flags:
        return
    flags = frozenset[str]().union(*(example.flags for example in examples)).intersection(recipe.reject_flags)
    for flag in sorted(flags):
        problem = f"the row has the flag {flag}, which is listed in reject_flags ({FLAGS[flag].sentence})"
        hint = f"correct the row; or remove {flag} from reject_flags to keep rows with this flag"
        raise BadRow(flag, problem, hint=hint)


def _trained_examples(
    recipe: Recipe, conversation: Conversation, encoded: Mapping[int, Example | BadRow]
) -> dict[int, Example]:
    """Return the examples of one conversation. If it is split into several texts, omit texts without trained tokens."""
    trained = dict[int, Example]()
    extra_flags = frozenset[str]()
    for number, example in encoded.items():
        if isinstance(example, BadRow):
            raise example
        if example.trained.any():
            trained[number] = example
        elif conversation.sides:
            side = SIDES[[*encoded].index(number)]
            problem = f"the {side} side has no trained token with {_describe_mask(recipe)}"
            raise BadRow("nothing_trained", problem, field=side, hint="remove the row, or choose other values")
        elif not any(span.generated for span in example.spans):
            # A split turn that is empty and has no stop token becomes no example, so another example has its flags.
            extra_flags |= example.flags & {"no_trained_stop", "missing_final_stop"}
    if not trained:
        answers = [message for message in conversation.messages if message["role"] == "assistant"]
        if answers and not any(message.get("train", True) for message in answers):
            problem = "all answers of the row are excluded from training with train: false"
            raise BadRow("nothing_trained", problem, hint="remove the row, or train one of the answers")
        problem = f"the row has no trained token with {_describe_mask(recipe)}"
        raise BadRow("nothing_trained", problem, hint="remove the row, or choose other values")
    if conversation.messages and conversation.messages[-1]["role"] != "assistant":
        extra_flags |= {"trailing_messages"}
    if extra_flags:
        last = [*trained][-1]
        trained[last] = replace(trained[last], flags=trained[last].flags | extra_flags)
    return trained


def _describe_mask(recipe: Recipe) -> str:
    parts = "" if recipe.train_parts is None else f" and train_parts={','.join(recipe.train_parts)!r}"
    return f"train_on={policy_name(recipe.train_on)!r}{parts}"


def _copy_as_json(row: Any, *, images: bool) -> Any:
    """Copy a row through JSON, which rejects values that no template and no file could contain.

    Args:
        row: the row.
        images: whether paths, bytes and Pillow images are kept.

    Raises:
        TypeError, ValueError, RecursionError: a value is not JSON.
    """
    values = list[Any]()

    def replace_image(value: Any) -> Any:
        if images and isinstance(value, os.PathLike):
            return os.fspath(value)
        if not images or not (isinstance(value, bytes) or type(value).__module__.partition(".")[0] == "PIL"):
            raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
        values.append(value)
        return {_IMAGE_KEY: len(values) - 1}

    def restore_image(item: dict[str, Any]) -> Any:
        return values[item[_IMAGE_KEY]] if values and item.keys() == {_IMAGE_KEY} else item

    return json.loads(json.dumps(row, default=replace_image), object_hook=restore_image)


_IMAGE_KEY = "\0image"
"""Key of an object that takes the place of an image."""


def _mask_rows(recipe: Recipe, rows: Sequence[RenderedRow | Reject]) -> tuple[Batch, dict[int, BadRow]]:
    """Tokenize the rendered texts of all rows, and select the trained tokens.

    Returns:
        A batch in which each text is an example, and the errors of texts: number of the text -> error.
    """
    built = [row for row in rows if isinstance(row, RenderedRow)]
    batch = RenderedBatch([text for row in built for text in row.texts])
    tokens, errors = encode_rendered(recipe.tokenizer, batch, recipe.control, recipe.control_tokens)
    errors |= dict(compare_template_ids(batch, tokens))
    tokens = _repeat_image_tokens(recipe, batch, _add_bos(recipe, batch, tokens), errors)
    trained_spans = [*_trained_spans(recipe, built, errors)]
    trained, crosses_boundary = trained_tokens(tokens, batch, trained_spans)
    flags = [drop_untrained_flags(text, mask) for text, mask in zip(batch, trained_spans, strict=True)]
    for flag, numbers in (
        ("control_tokens", tokens.escaped),
        ("token_crosses_boundary", np.flatnonzero(crosses_boundary).tolist()),
        ("whitespace_removed", recipe.control.find_lost_whitespace(batch, tokens)),
        ("unknown_token", recipe.control.find_unknown(batch, tokens)),
    ):
        for number in numbers:
            flags[number] |= {flag}
    outcomes = [row if isinstance(row, Reject) else row.conversation for row in rows]
    counts, cut = [len(row.texts) for row in built], np.zeros(len(batch), np.int64)
    masked = Batch(
        recipe.tokenizer, outcomes, counts, batch, tokens, trained, flags, cut, image_token_id=recipe.image_token_id
    )
    if any(row.conversation.tokens is not None for row in built):
        masked = _insert_row_tokens(masked, errors)
        _reject_image_tokens_without_images(masked, errors)
    for number, certain in enumerate(_certainly_have_stops(masked, recipe)):
        if not certain and number not in errors and not _has_stops(masked.example(number), recipe):
            flags[number] |= {"no_trained_stop"}
    return masked, errors


def _repeat_image_tokens(
    recipe: Recipe, batch: RenderedBatch, tokens: Encodings, errors: dict[int, BadRow]
) -> Encodings:
    """Return tokens in which the image tokens are repeated. Add an error for each text with more or fewer image tokens.

    Raises:
        UsageError: `image_processor`, if a row has images, but the tokenizer does not contain the token.
    """
    if recipe.image_processor is None:
        return tokens
    token = recipe.image_processor.image_token
    id_ = recipe.image_token_id
    expected = np.fromiter((len(text.repeats) for text in batch), np.int64, len(batch))
    if id_ is None and expected.any():
        problem = f"the tokenizer {recipe.tokenizer.name} does not contain the image token {token!r}"
        raise UsageError("image_processor", problem, hint="use the tokenizer and the processor of the same model")
    positions = np.flatnonzero(tokens.ids == (-1 if id_ is None else id_))
    texts = np.searchsorted(tokens.token_bounds, positions, side="right") - 1
    found = np.bincount(texts, minlength=len(batch))
    for number in np.flatnonzero(found != expected).tolist():
        problem = f"the tokens contain the image token {token} in {count_noun(int(found[number]), 'place')}, but the "
        problem += f"images need it in {count_noun(int(expected[number]), 'place')}"
        hint = "remove the image tokens from the text of the row, or set control_tokens='escape'"
        errors.setdefault(number, BadRow("image_tokens", problem, hint=hint))
    is_valid = (found == expected)[texts]
    valid_texts = np.flatnonzero(found == expected).tolist()
    counts = np.fromiter(chain.from_iterable(batch[number].repeats for number in valid_texts), np.int64)
    return tokens.with_repeats(positions[is_valid], counts)


def _reject_image_tokens_without_images(batch: Batch, errors: dict[int, BadRow]) -> None:
    """Add an error for each pretokenized row that contains tokens of images, because it has no images."""
    for number, conversation in enumerate(batch.example_conversations):
        if conversation.tokens is not None and batch.image_tokens[number]:
            problem = "the row is pretokenized, and contains tokens of images, but no images"
            hint = "build from messages and images instead of input_ids, or remove the row"
            errors.setdefault(number, BadRow("image_tokens", problem, hint=hint))


def _insert_row_tokens(batch: Batch, errors: dict[int, BadRow]) -> Batch:
    """Insert the tokens of pretokenized rows, which are used unchanged. Add an error for each invalid row."""
    inserted = dict[int, RowTokens]()
    for number, conversation in enumerate(batch.example_conversations):
        if conversation.tokens is None:
            continue
        try:
            check_row_tokens(batch.tokenizer, conversation.tokens)
            inserted[number] = conversation.tokens
        except BadRow as error:
            errors[number] = error
    encoded = {
        number: EncodedText(tokens.input_ids, np.zeros((len(tokens.input_ids), 2), np.int32))
        for number, tokens in inserted.items()
    }
    masks = [
        inserted[number].trained if number in inserted else batch.trained[first:end]
        for number, (first, end) in enumerate(pairwise(batch.tokens.token_bounds.tolist()))
    ]
    return replace(batch, tokens=batch.tokens.with_replacements(encoded), trained=np.concatenate(masks))


def _trained_spans(recipe: Recipe, rows: Sequence[RenderedRow], rejected: Collection[int]) -> Iterator[Sequence[bool]]:
    """Yield for each span of each text whether the span is trained. Spans of rejected texts are not trained."""
    policy, number = recipe.policy, 0
    for row in rows:
        if row.trained_spans is not None and not rejected:
            yield from row.trained_spans
            continue
        for index, text in enumerate(row.texts):
            if number in rejected:
                yield [False] * len(text.spans)
            elif row.trained_spans is None:
                yield policy(text, row.conversation.part(index))
            else:
                yield row.trained_spans[index]
            number += 1


def _add_bos(recipe: Recipe, batch: RenderedBatch, tokens: Encodings) -> Encodings:
    """Prepend the tokenizer's BOS token to each text that needs it and does not already begin with it."""
    numbers = [number for number, text in enumerate(batch) if text.add_bos]
    if not numbers or not len(bos := recipe.tokenizer.bos_ids):
        return tokens
    return tokens.with_prefix([number for number in numbers if not np.array_equal(tokens[number].ids[:1], bos)], bos)


def _certainly_have_stops(masked: Batch, recipe: Recipe) -> list[bool]:
    """Return for each text whether a fast check confirms that all trained turns end with a control token.

    The check succeeds if the text has one run of trained tokens per turn, and every run ends with a control token.
    """
    ids, bounds, trained = masked.tokens.ids, masked.tokens.token_bounds, masked.trained
    next_is_trained = np.append(trained[1:], False)
    next_is_trained[bounds[1:][bounds[1:] > 0] - 1] = False
    run_ends = np.flatnonzero(trained & ~next_is_trained)
    text_of_run = np.searchsorted(bounds, run_ends, side="right") - 1
    count = len(masked.texts)
    stopped_runs = np.bincount(text_of_run[recipe.control.is_control(ids[run_ends])], minlength=count).tolist()
    runs = np.bincount(text_of_run, minlength=count).tolist()
    # A run of trained tokens of a pretokenized row counts as a turn.
    turns = [len(spans.kinds.turns) or number for spans, number in zip(masked.texts.spans, runs, strict=True)]
    return [stopped == number == expected for stopped, number, expected in zip(stopped_runs, runs, turns, strict=True)]


def _has_stops(example: Example, recipe: Recipe) -> bool:
    """Return whether every trained turn ends with a control token. Ignore a last turn flagged `missing_final_stop`."""
    ends = turn_ends(example)
    if "missing_final_stop" in example.flags:
        ends = ends[:-1]
        if not len(ends):
            return True
    last_ids = []
    for end in ends:
        last = end - 1
        while last > 0 and example.trained[last - 1] and not example.text[slice(*example.offsets[last])].strip():
            last -= 1
        last_ids.append(example.input_ids[last])
    return bool(last_ids) and bool(np.isin(last_ids, recipe.control.ids).all())


def encode(
    messages: Sequence[Message],
    tokenizer: Any,
    template: str | Path | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    train_on: str | Policy = "assistant",
    train_parts: Sequence[str] | None = None,
    turns: str = "auto",
    control_tokens: str = "escape",
    on_dropped_message: str = "reject",
    on_missing_stop: str = "flag",
    reject_flags: Sequence[str] = (),
    image_folder: str | None = None,
    download_images: bool = False,
    date: str | datetime.date | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Example, ...]:
    """Encode one conversation as examples, which contain token ids, labels, text, character offsets and spans.

    The examples equal those of a build, except that a build also rejects empty answers.

    Args:
        messages: the conversation, in the format of chat templates.
        tokenizer: a folder, a Hub ID, or a tokenizer object.
        template: the template, as in `build_sft_dataset`.
        tools: JSON schemas of the tools.
        train_on: `"assistant"`, `"last_assistant"`, `"completion"`, `"all"`, or a callable
            `(rendered, conversation) -> [bool per span]`.
        train_parts: the parts to train: `"reasoning"`, `"answer"`, `"tool_call"`; `None` for all parts.
        turns: `"auto"`, `"joint"` or `"split"`.
        control_tokens: `"escape"`, `"refuse"` or `"allow"`: the policy for control-token text inside the messages.
        on_dropped_message: `"reject"` or `"flag"` a conversation if the template omits a system, user or tool message.
        on_missing_stop: `"flag"` a last turn for which the template prints no stop token, or `"append_eos"` to it.
        reject_flags: flags, such as `"no_trained_stop"`, that reject the conversation.
        image_folder: the folder that relative paths of images are resolved against; `None` for the current folder.
        download_images: whether to download images at URLs. Otherwise, they are rejected.
        date: the current date for templates that print it.
        template_kwargs: additional template variables.

    Returns:
        One example, or one example per group of turns if the template rewrites earlier turns. Arrays are NumPy
        arrays of int32 and bool, `[tokens]`.

    Raises:
        UsageError: an option is invalid.
        BadRow: the conversation is rejected; `.code` contains the reason.
        TemplateRefused: the template or the tokenizer cannot be used for any conversation.
        HubError: the tokenizer cannot be downloaded.

    >>> from ftdata.testing import byte_tokenizer
    >>> messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    >>> (example,) = encode(messages, byte_tokenizer(), "chatml")
    >>> example.text.splitlines()
    ['<|im_start|>user', '2+2?<|im_end|>', '<|im_start|>assistant', '4<|im_end|>']
    >>> example.labels.tolist()[-4:], example.labels.dtype
    ([-100, 52, 257, -100], dtype('int32'))
    """
    options = select_options(locals(), "rows")
    recipe = make_recipe(
        load_tokenizer(tokenizer, thorough=False), template, date=date, template_kwargs=template_kwargs, **options
    )
    if isinstance(messages, str | Mapping):
        problem = f"messages is a {type(messages).__name__}, expected a list of messages"
        hint = "pass e.g. row['messages'], and tools=row['tools'] if the row has tools"
        raise BadRow("messages_type", problem, where="<messages>", hint=hint)
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    try:
        row = _copy_as_json(row, images=recipe.reads_images)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("not_json", f"a value in the messages is not JSON: {error}", where="<messages>") from None
    conversation = normalize(Row(row, Source("<messages>", 0)), "messages", images=recipe.reads_images)
    try:
        rendered = apply_policy(conversation, render_conversation(recipe, conversation), recipe.policy)
        batch, errors = _mask_rows(recipe, [rendered])
        texts = {number: errors.get(number) or batch.example(number) for number in range(len(batch.texts))}
        examples = tuple(_trained_examples(recipe, conversation, texts).values())
        _check_flags(recipe, examples)
    except BadRow as error:
        error.where = error.where or error.field
        raise
    return examples
