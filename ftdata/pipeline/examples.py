"""Convert rows to examples: normalize, render, tokenize, mask and truncate each batch of rows.

Row ──normalize──> Conversation ──render──> Rendered ──tokenize──> Encodings ──mask, truncate──> Example
 └───────────────────────── or, at any stage, Reject: where, why, and the fix
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import BadRow
from ftdata.pipeline.flags import FLAGS
from ftdata.pipeline.mask import Policy, trained_tokens
from ftdata.pipeline.recipe import Recipe, make_recipe, policy_name
from ftdata.pipeline.render_rows import RowAndOutcome, apply_policy, make_reject, render_conversation, render_rows
from ftdata.pipeline.truncate import truncate, turn_ends
from ftdata.schemas import normalize
from ftdata.tokenizing.batches import Encodings, ExampleColumns, RenderedBatch
from ftdata.tokenizing.load import load_tokenizer
from ftdata.tokenizing.token_text import token_texts
from ftdata.tokenizing.tokenizer import encode_rendered
from ftdata.types import Conversation, Example, Message, Part, Reject, RenderedRow, Row, RowTokens, Source, Span


class BuiltRow(NamedTuple):
    """The examples of one row, with the number of removed tokens (`cut`) and the lengths of removed examples."""

    conversation: Conversation
    examples: tuple[Example, ...]
    cut: int = 0
    dropped: tuple[int, ...] = ()

    @property
    def repeated(self) -> int:
        """Total number of tokens in all examples except the longest example."""
        lengths = [len(example.input_ids) for example in self.examples]
        return sum(lengths) - max(lengths, default=0)


def build_rows(recipe: Recipe, rows: Iterable[Row | Reject]) -> Iterator[BuiltRow | Reject]:
    """Convert rows to examples. Yield, in order, a `BuiltRow` for each valid row and a `Reject` for each bad row."""
    return chain.from_iterable(build_batches(recipe, rows))


@dataclass(frozen=True, eq=False)
class MaskedTexts:
    """The tokens and masks of a batch of texts. Each item is an `Example`, or a `BadRow` error for a rejected text.

    Attributes:
        conversations: the conversation of each text.
        texts: the rendered texts.
        tokens: the tokens of the texts.
        trained: bool `[tokens]`, true for trained tokens.
        flags: the flags of each text.
        errors: the errors of rejected texts, by the number of the text.
    """

    conversations: Sequence[Conversation]
    texts: RenderedBatch
    tokens: Encodings
    trained: NDArray[np.bool_]
    flags: Sequence[frozenset[str]]
    errors: Mapping[int, BadRow]

    @cached_property
    def trained_counts(self) -> NDArray[np.int64]:
        """Number of trained tokens of each text (int64 `[texts]`)."""
        counts, has_tokens = np.zeros(len(self), np.int64), np.diff(self.tokens.token_bounds) > 0
        counts[has_tokens] = np.add.reduceat(self.trained, self.tokens.token_bounds[:-1][has_tokens], dtype=np.int32)
        return counts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> Example | BadRow:
        if number in self.errors:
            return self.errors[number]
        ids, offsets, _ = self.tokens[number]
        trained, text = self.trained[slice(*self.tokens.token_bounds[number : number + 2].tolist())], self.texts[number]
        flags, source = self.flags[number], self.conversations[number].source
        return Example(ids, trained, offsets, text.text, text.spans, flags, source)


@dataclass(frozen=True, eq=False)
class Batch:
    """The results of a batch of rows: built rows and rejected rows, in the order of the input.

    Each result is a `Reject`, a `BuiltRow`, or the number of a text in `masked` that is the row's only example.
    """

    masked: MaskedTexts
    results: Sequence[int | BuiltRow | Reject]

    @property
    def plain(self) -> bool:
        """Whether every row in the batch has exactly one example, which was not truncated."""
        return isinstance(self.results, range)

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[BuiltRow | Reject]:
        number = 0
        for result in self.results:
            if isinstance(result, Reject):
                yield result
            else:
                yield self.built(number)
                number += 1

    def built(self, number: int) -> BuiltRow:
        """Return the built row with the given number. Rejected rows are not counted."""
        result = self.results[number] if self.plain else self._built_results[number]
        assert not isinstance(result, Reject)
        if isinstance(result, BuiltRow):
            return result
        example = self.masked[result]
        assert isinstance(example, Example)
        return BuiltRow(self.masked.conversations[result], (example,))

    @cached_property
    def _built_results(self) -> list[int | BuiltRow]:
        return [result for result in self.results if not isinstance(result, Reject)]

    @cached_property
    def rejects(self) -> list[Reject]:
        """The rejected rows of the batch."""
        return [] if self.plain else [result for result in self.results if isinstance(result, Reject)]

    @cached_property
    def conversations(self) -> Sequence[Conversation]:
        """The conversations of the built rows."""
        if self.plain:
            return self.masked.conversations
        return [
            self.masked.conversations[result] if isinstance(result, int) else result.conversation
            for result in self.results
            if not isinstance(result, Reject)
        ]

    @cached_property
    def counts(self) -> list[int]:
        """Number of examples of each built row."""
        if self.plain:
            return [1] * len(self.results)
        return [
            1 if isinstance(result, int) else len(result.examples)
            for result in self.results
            if not isinstance(result, Reject)
        ]

    @property
    def last_source(self) -> Source:
        """The file and row number of the last row of the batch."""
        result = self.results[-1]
        if isinstance(result, int):
            return self.masked.conversations[result].source
        return result.source if isinstance(result, Reject) else result.conversation.source

    @property
    def cut(self) -> int:
        """Number of tokens that truncation removed from the batch."""
        return 0 if self.plain else sum(result.cut for result in self.results if isinstance(result, BuiltRow))

    @property
    def dropped(self) -> list[int]:
        """Number of tokens of each dropped example. Rejected rows are not included."""
        if self.plain:
            return []
        return [length for result in self.results if isinstance(result, BuiltRow) for length in result.dropped]

    @property
    def repeated(self) -> int:
        """Number of repeated tokens. If a conversation is split into examples, they repeat earlier turns."""
        return 0 if self.plain else sum(result.repeated for result in self.results if isinstance(result, BuiltRow))

    @cached_property
    def columns(self) -> ExampleColumns:
        """All examples of the batch, as arrays."""
        if self.plain:
            return _columns_of_masked(self.masked)
        return _columns_of_examples(
            [example for result in self if isinstance(result, BuiltRow) for example in result.examples]
        )


def _columns_of_masked(masked: MaskedTexts) -> ExampleColumns:
    lengths = np.diff(masked.tokens.token_bounds)
    sources = [conversation.source for conversation in masked.conversations]
    return ExampleColumns(
        masked.tokens.ids, masked.trained, lengths, masked.trained_counts, [0] * len(masked), masked.flags, sources
    )


def _columns_of_examples(examples: Sequence[Example]) -> ExampleColumns:
    return ExampleColumns(
        np.concatenate([example.input_ids for example in examples] or [np.empty(0, np.int32)]),
        np.concatenate([example.trained for example in examples] or [np.empty(0, np.bool_)]),
        np.fromiter(map(len, examples), np.int64),
        np.fromiter((np.count_nonzero(example.trained) for example in examples), np.int64),
        [example.cut for example in examples],
        [example.flags for example in examples],
        [example.source for example in examples],
    )


def build_batches(recipe: Recipe, rows: Iterable[Row | Reject]) -> Iterator[Batch]:
    """Convert rows to examples as `build_rows` does, but yield the results in batches."""
    for batch in render_rows(recipe, rows):
        masked = _mask_rows(recipe, [outcome for _, outcome in batch if not isinstance(outcome, Reject)])
        yield _finish_rows(recipe, batch, masked)


def _finish_rows(recipe: Recipe, batch: Sequence[RowAndOutcome], masked: MaskedTexts) -> Batch:
    """Truncate the tokenized texts of each row and check their flags. A row with one short text is not changed."""
    is_final = masked.trained_counts > 0
    if recipe.max_length is not None:
        is_final &= np.diff(masked.tokens.token_bounds) <= recipe.max_length
    is_final[list(masked.errors)] = False
    if recipe.reject_flags:
        is_final &= np.fromiter((flags.isdisjoint(recipe.reject_flags) for flags in masked.flags), np.bool_)
    if is_final.all() and all(type(outcome) is RenderedRow and outcome.is_single_text for _, outcome in batch):
        return Batch(masked, range(len(masked)))
    final_texts, next_text, results = is_final.tolist(), 0, list[int | BuiltRow | Reject]()
    for row, outcome in batch:
        if isinstance(outcome, Reject):
            results.append(outcome)
            continue
        first, next_text = next_text, next_text + len(outcome.texts)
        if outcome.is_single_text and final_texts[first]:
            results.append(first)
        else:
            results.append(_build_row(recipe, row, outcome.conversation, [masked[n] for n in range(first, next_text)]))
    return Batch(masked, results)


def _build_row(
    recipe: Recipe, row: Row | Reject, conversation: Conversation, encoded: Sequence[Example | BadRow]
) -> BuiltRow | Reject:
    try:
        examples = _trained_examples(recipe, conversation, encoded)
    except BadRow as error:
        return make_reject(row, error)
    lengths = tuple(map(len, examples))
    dropped = list[int]()
    fitting: list[Example] = []
    length_error: BadRow | None = None
    for example in examples:
        try:
            fitting.append(truncate(example, recipe.max_length, recipe.overlong))
        except BadRow as error:
            length_error = error
            dropped.append(len(example))
    # In a split conversation each example is a group of whole turns, so `drop_turns` may drop some of the examples.
    if length_error is not None and (recipe.overlong != "drop_turns" or not fitting):
        return replace(make_reject(row, length_error), lengths=lengths)
    try:
        _check_flags(recipe, fitting)
    except BadRow as error:
        return replace(make_reject(row, error), lengths=lengths)
    return BuiltRow(conversation, tuple(fitting), sum(lengths) - sum(map(len, fitting)), tuple(dropped))


def _check_flags(recipe: Recipe, examples: Iterable[Example]) -> None:
    """Reject a row if one of its examples has a flag that is listed in `reject_flags`."""
    if not recipe.reject_flags:
        return
    flags = frozenset[str]().union(*(example.flags for example in examples)).intersection(recipe.reject_flags)
    for flag in sorted(flags):
        raise BadRow(
            flag,
            f"the row has the flag {flag}, which is listed in reject_flags ({FLAGS[flag].sentence})",
            hint=f"correct the row; or remove {flag} from reject_flags to keep rows with this flag",
        )


def _trained_examples(
    recipe: Recipe, conversation: Conversation, encoded: Sequence[Example | BadRow]
) -> tuple[Example, ...]:
    """Return the examples of one conversation. If it is split into several texts, omit texts without trained tokens."""
    if conversation.tokens is not None:
        return (pass_tokens_through(recipe, conversation, conversation.tokens),)
    trained: list[Example] = []
    extra_flags = frozenset[str]()
    for example in encoded:
        if isinstance(example, BadRow):
            raise example
        if example.trained.any():
            trained.append(example)
        elif not any(span.generated for span in example.spans):
            # A split turn that is empty and has no stop token becomes no example, so another example has its flags.
            extra_flags |= example.flags & {"no_trained_stop", "missing_final_stop"}
    if not trained:
        raise BadRow("nothing_trained", f"the row has no trained token with train_on={policy_name(recipe.train_on)!r}")
    if conversation.messages and conversation.messages[-1]["role"] != "assistant":
        extra_flags |= {"trailing_messages"}
    if extra_flags:
        trained[-1] = replace(trained[-1], flags=trained[-1].flags | extra_flags)
    return tuple(trained)


def pass_tokens_through(recipe: Recipe, conversation: Conversation, tokens: RowTokens) -> Example:
    """Create the example of a row of token ids. The ids are not changed, and are decoded to text only for display.

    Raises:
        BadRow: the tokenizer does not contain a token, or no token is trained.
    """
    ids, trained = tokens.input_ids, tokens.trained
    if (unknown := np.flatnonzero((ids < 0) | (ids >= recipe.tokenizer.size))).size:
        first = int(unknown[0])
        problem = f"the token id {ids[first]} is not in the vocabulary of tokenizer {recipe.tokenizer.name}"
        raise BadRow("token_id", problem, field=f"input_ids[{first}]", hint="pass the tokenizer that made these tokens")
    if not trained.any():
        raise BadRow("nothing_trained", "the row has no trained token", field="labels")
    texts = token_texts(recipe.tokenizer, ids.tolist())
    ends = np.cumsum([len(text) for text in texts])
    offsets = np.stack((ends - [len(text) for text in texts], ends), axis=1).astype(np.int32)
    runs = np.flatnonzero(np.diff(trained, prepend=~trained[:1], append=~trained[-1:]))
    spans = [
        Span(int(offsets[start, 0]), int(offsets[end - 1, 1]), Part.CONTENT, number, bool(trained[start]))
        for number, (start, end) in enumerate(pairwise(runs.tolist()))
    ]
    flags = frozenset({"pretokenized"})
    example = Example(ids, trained, offsets, "".join(texts), tuple(spans), flags, conversation.source)
    return example if _has_stops(example, recipe) else replace(example, flags=flags | {"no_trained_stop"})


def _mask_rows(recipe: Recipe, rows: Sequence[RenderedRow]) -> MaskedTexts:
    """Tokenize the rendered texts of all rows, and select the trained tokens."""
    conversations = [row.conversation for row in rows for _ in row.texts]
    batch = RenderedBatch([text for row in rows for text in row.texts])
    tokens, errors = encode_rendered(recipe.tokenizer, batch, recipe.control, recipe.control_tokens)
    tokens = _add_bos(recipe, batch, tokens)
    trained, crosses_boundary = trained_tokens(tokens, batch, _trained_spans(recipe, rows, errors))
    flags = [text.flags for text in batch]
    for flag, numbers in (
        ("control_tokens", tokens.escaped),
        ("token_crosses_boundary", np.flatnonzero(crosses_boundary).tolist()),
        ("whitespace_removed", recipe.control.find_lost_whitespace(batch, tokens)),
    ):
        for number in numbers:
            flags[number] |= {flag}
    masked = MaskedTexts(conversations, batch, tokens, trained, flags, errors)
    for number, certain in enumerate(_certainly_have_stops(masked, recipe)):
        if not certain and isinstance(example := masked[number], Example) and not _has_stops(example, recipe):
            flags[number] |= {"no_trained_stop"}
    return masked


def _trained_spans(recipe: Recipe, rows: Sequence[RenderedRow], rejected: Collection[int]) -> list[Sequence[bool]]:
    """Return for each span of each text whether the span is trained. Spans of rejected texts are not trained."""
    policy, trained_spans = recipe.policy, list[Sequence[bool]]()
    for row in rows:
        if row.trained_spans is not None and not rejected:
            trained_spans += row.trained_spans
            continue
        for number, text in enumerate(row.texts):
            if len(trained_spans) in rejected:
                trained_spans.append([False] * len(text.spans))
            else:
                trained_spans.append(
                    policy(text, row.conversation) if row.trained_spans is None else row.trained_spans[number]
                )
    return trained_spans


def _add_bos(recipe: Recipe, batch: RenderedBatch, tokens: Encodings) -> Encodings:
    """Prepend the tokenizer's BOS token to each text that needs it and does not already begin with it."""
    numbers = [number for number, text in enumerate(batch) if text.add_bos]
    if not numbers or not len(bos := recipe.tokenizer.bos_ids):
        return tokens
    return tokens.with_prefix([number for number in numbers if not np.array_equal(tokens[number].ids[:1], bos)], bos)


def _certainly_have_stops(masked: MaskedTexts, recipe: Recipe) -> list[bool]:
    """Return for each text whether a fast check confirms that all trained turns end with a control token.

    The check succeeds if the text has one run of trained tokens per turn, and every run ends with a control token.
    """
    ids, bounds, trained = masked.tokens.ids, masked.tokens.token_bounds, masked.trained
    next_is_trained = np.append(trained[1:], False)
    next_is_trained[bounds[1:][bounds[1:] > 0] - 1] = False
    run_ends = np.flatnonzero(trained & ~next_is_trained)
    text_of_run = np.searchsorted(bounds, run_ends, side="right") - 1
    stopped_runs = np.bincount(text_of_run[recipe.control.is_control(ids[run_ends])], minlength=len(masked)).tolist()
    runs = np.bincount(text_of_run, minlength=len(masked)).tolist()
    turns = [len(spans.kinds.turns) for spans in masked.texts.spans]
    return [stopped == count == expected for stopped, count, expected in zip(stopped_runs, runs, turns, strict=True)]


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
    recipe = make_recipe(
        load_tokenizer(tokenizer, thorough=False),
        template,
        date=date,
        template_kwargs=template_kwargs,
        train_on=train_on,
        train_parts=train_parts,
        turns=turns,
        control_tokens=control_tokens,
        on_dropped_message=on_dropped_message,
        on_missing_stop=on_missing_stop,
        reject_flags=reject_flags,
    )
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    try:
        # A round trip through JSON rejects values that no template and no file could contain.
        row = json.loads(json.dumps(row))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("not_json", f"a value in the messages is not JSON: {error}", where="<messages>") from None
    conversation = normalize(Row(row, Source("<messages>", 0)), "messages")
    try:
        rendered = apply_policy(conversation, render_conversation(recipe, conversation), recipe.policy)
        masked = _mask_rows(recipe, [rendered])
        examples = _trained_examples(recipe, conversation, [masked[number] for number in range(len(masked))])
        _check_flags(recipe, examples)
    except BadRow as error:
        error.where = error.where or error.field
        raise
    return examples
