"""Rows to examples: the stages from normalise to truncate, composed, under one recipe.

    Row ──normalise──> Conversation ──render──> Rendered ──tokenise──> Encoded ──mask, truncate──> Example
     └───────────────────────── or, at any stage, Reject: where, why, and the way out

Rows go through in batches; what comes out is in the order of what went in.
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
from ftdata.pipeline.mask import Policy, trained_tokens
from ftdata.pipeline.recipe import FLAGS, Recipe, make_recipe, policy_name
from ftdata.pipeline.render_rows import apply_policy, make_reject, render_conversation, render_rows
from ftdata.pipeline.truncate import truncate, turn_ends
from ftdata.schemas import normalize
from ftdata.tokenizing.batches import Encodings, ExampleColumns, RenderedBatch
from ftdata.tokenizing.load import load_tokenizer
from ftdata.tokenizing.token_text import token_texts
from ftdata.tokenizing.tokenizer import encode_rendered
from ftdata.types import Conversation, Example, Message, Part, Reject, RenderedRow, Row, RowTokens, Source, Span


class BuiltRow(NamedTuple):
    """One row that was built: its examples, and how many tokens of it did not fit.

    `dropped` are the lengths of examples that did not fit at all. `repeated` is what it costs to show a conversation in
    several examples: their tokens beyond the longest one's.
    """

    conversation: Conversation
    examples: tuple[Example, ...]
    cut: int = 0
    dropped: tuple[int, ...] = ()

    @property
    def repeated(self) -> int:
        """Tokens beyond those of the longest example."""
        lengths = [len(example.input_ids) for example in self.examples]
        return sum(lengths) - max(lengths, default=0)


def build_rows(recipe: Recipe, rows: Iterable[Row | Reject]) -> Iterator[BuiltRow | Reject]:
    """Take rows through normalise, render, tokenise, mask and truncate.

    Yields, for each row and in order, what was built of it or why it was rejected.
    """
    return chain.from_iterable(build_batches(recipe, rows))


@dataclass(frozen=True, eq=False)
class MaskedTexts:
    """Texts with their tokens and labels: an example each, by columns, or why it is refused.

    Attributes:
        said: the conversation behind each text.
        texts: the texts.
        tokens: their tokens.
        trained: bool `[tokens]`, those that carry loss.
        flags: what a careful reader should know of each text.
        refused: the texts that are refused, and why.
    """

    said: Sequence[Conversation]
    texts: RenderedBatch
    tokens: Encodings
    trained: NDArray[np.bool_]
    flags: Sequence[frozenset[str]]
    refused: Mapping[int, BadRow]

    @cached_property
    def trained_counts(self) -> NDArray[np.int64]:
        """Trained tokens of each text (int64 `[texts]`)."""
        found, filled = np.zeros(len(self), np.int64), np.diff(self.tokens.bounds) > 0
        found[filled] = np.add.reduceat(self.trained, self.tokens.bounds[:-1][filled], dtype=np.int32)
        return found

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> Example | BadRow:
        if number in self.refused:
            return self.refused[number]
        ids, offsets, _ = self.tokens[number]
        trained, text = self.trained[slice(*self.tokens.bounds[number : number + 2].tolist())], self.texts[number]
        return Example(ids, trained, offsets, text.text, text.spans, self.flags[number], self.said[number].source)


@dataclass(frozen=True, eq=False)
class Batch:
    """What rows became, in order: a `Reject`, or `BuiltRow`; where that is one text's example, the text's number."""

    masked: MaskedTexts
    entries: Sequence[int | BuiltRow | Reject]

    @property
    def plain(self) -> bool:
        """Whether each row became one text's example, which is so in most batches."""
        return isinstance(self.entries, range)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[BuiltRow | Reject]:
        built = 0
        for entry in self.entries:
            if isinstance(entry, Reject):
                yield entry
            else:
                yield self.built(built)
                built += 1

    def built(self, number: int) -> BuiltRow:
        """Return one of the rows that were built."""
        entry = self.entries[number] if self.plain else self._built[number]
        assert not isinstance(entry, Reject)
        if isinstance(entry, BuiltRow):
            return entry
        example = self.masked[entry]
        assert isinstance(example, Example)
        return BuiltRow(self.masked.said[entry], (example,))

    @cached_property
    def _built(self) -> list[int | BuiltRow]:
        return [entry for entry in self.entries if not isinstance(entry, Reject)]

    @cached_property
    def rejects(self) -> list[Reject]:
        """The rows that were rejected."""
        return [] if self.plain else [entry for entry in self.entries if isinstance(entry, Reject)]

    @cached_property
    def conversations(self) -> Sequence[Conversation]:
        """The rows that were built."""
        if self.plain:
            return self.masked.said
        return [
            self.masked.said[entry] if isinstance(entry, int) else entry.conversation
            for entry in self.entries
            if not isinstance(entry, Reject)
        ]

    @cached_property
    def counts(self) -> list[int]:
        """How many examples there are of each row that was built."""
        if self.plain:
            return [1] * len(self.entries)
        return [
            1 if isinstance(entry, int) else len(entry.examples)
            for entry in self.entries
            if not isinstance(entry, Reject)
        ]

    @property
    def last(self) -> Source:
        """Where the last row came from."""
        entry = self.entries[-1]
        if isinstance(entry, int):
            return self.masked.said[entry].source
        return entry.source if isinstance(entry, Reject) else entry.conversation.source

    @property
    def cut(self) -> int:
        """Tokens that did not fit."""
        return 0 if self.plain else sum(entry.cut for entry in self.entries if isinstance(entry, BuiltRow))

    @property
    def dropped(self) -> list[int]:
        """Tokens of each example that did not fit at all, of rows of which others did."""
        if self.plain:
            return []
        return [length for entry in self.entries if isinstance(entry, BuiltRow) for length in entry.dropped]

    @property
    def repeated(self) -> int:
        """Tokens that are there because conversations are shown in several examples."""
        return 0 if self.plain else sum(entry.repeated for entry in self.entries if isinstance(entry, BuiltRow))

    @cached_property
    def columns(self) -> ExampleColumns:
        """All examples by columns."""
        if self.plain:
            return _columns_of(self.masked)
        return _columns([one for entry in self if isinstance(entry, BuiltRow) for one in entry.examples])


def _columns_of(masked: MaskedTexts) -> ExampleColumns:
    lengths, sources = np.diff(masked.tokens.bounds), [one.source for one in masked.said]
    return ExampleColumns(
        masked.tokens.ids, masked.trained, lengths, masked.trained_counts, [0] * len(masked), masked.flags, sources
    )


def _columns(examples: Sequence[Example]) -> ExampleColumns:
    return ExampleColumns(
        np.concatenate([one.input_ids for one in examples] or [np.empty(0, np.int32)]),
        np.concatenate([one.trained for one in examples] or [np.empty(0, np.bool_)]),
        np.fromiter(map(len, examples), np.int64),
        np.fromiter((np.count_nonzero(one.trained) for one in examples), np.int64),
        [one.cut for one in examples],
        [one.flags for one in examples],
        [one.source for one in examples],
    )


def build_batches(recipe: Recipe, rows: Iterable[Row | Reject]) -> Iterator[Batch]:
    """As `build_rows`, as many rows at a time as go through the stages together."""
    for batch in render_rows(recipe, rows):
        masked = _masked(recipe, [entry for _, entry in batch if not isinstance(entry, Reject)])
        yield _finished(recipe, batch, masked)


def _finished(recipe: Recipe, batch: Sequence[tuple[Row | Reject, RenderedRow | Reject]], masked: MaskedTexts) -> Batch:
    """Say what became of each row, most of which are one text to which nothing more is to be done."""
    plain = masked.trained_counts > 0
    if recipe.max_length is not None:
        plain &= np.diff(masked.tokens.bounds) <= recipe.max_length
    plain[list(masked.refused)] = False
    if recipe.reject_flags:
        plain &= np.fromiter((flags.isdisjoint(recipe.reject_flags) for flags in masked.flags), np.bool_)
    if plain.all() and all(type(entry) is RenderedRow and entry.plain for _, entry in batch):
        return Batch(masked, range(len(masked)))
    as_is, at, entries = plain.tolist(), 0, list[int | BuiltRow | Reject]()
    for row, entry in batch:
        if isinstance(entry, Reject):
            entries.append(entry)
            continue
        first, at = at, at + len(entry.texts)
        if entry.plain and as_is[first]:
            entries.append(first)
        else:
            entries.append(_finish(recipe, row, entry.conversation, [masked[n] for n in range(first, at)]))
    return Batch(masked, entries)


def _finish(
    recipe: Recipe,
    row: Row | Reject,
    conversation: Conversation,
    encoded: Sequence[Example | BadRow],
) -> BuiltRow | Reject:
    try:
        whole = _examples(recipe, conversation, encoded)
    except BadRow as error:
        return make_reject(row, error)
    lengths = tuple(map(len, whole))
    dropped = list[int]()
    kept: list[Example] = []
    refusal: BadRow | None = None
    for example in whole:
        try:
            kept.append(truncate(example, recipe.max_length, recipe.overlong))
        except BadRow as error:
            refusal = error
            dropped.append(len(example))
    # Turns rendered one by one are whole turns: `drop_turns` may leave some of them out, the others may not.
    if refusal is not None and (recipe.overlong != "drop_turns" or not kept):
        return replace(make_reject(row, refusal), lengths=lengths)
    try:
        _check_flags(recipe, kept)
    except BadRow as error:
        return replace(make_reject(row, error), lengths=lengths)
    return BuiltRow(conversation, tuple(kept), sum(lengths) - sum(map(len, kept)), tuple(dropped))


def _check_flags(recipe: Recipe, examples: Iterable[Example]) -> None:
    """Refuse a row with a flag that the user wants to be a fault."""
    if not recipe.reject_flags:
        return
    found = frozenset[str]().union(*(example.flags for example in examples)).intersection(recipe.reject_flags)
    for flag in sorted(found):
        means = FLAGS[flag].format(n="such", repeated="some")
        raise BadRow(
            flag,
            f"is refused by choice: {means}",
            hint=f"reject_flags= names {flag}; without it, it is a flag in the report",
        )


def _examples(recipe: Recipe, conversation: Conversation, encoded: Sequence[Example | BadRow]) -> tuple[Example, ...]:
    """Return the examples of one conversation; turns on their own of which nothing is trained are none."""
    if conversation.tokens is not None:
        return (pass_tokens_through(recipe, conversation, conversation.tokens),)
    trained: list[Example] = []
    lost = frozenset[str]()
    for one in encoded:
        if isinstance(one, BadRow):
            raise one
        if one.trained.any():
            trained.append(one)
        elif not any(span.generated for span in one.spans):
            # An empty turn by itself, without a stop: there is no example that could carry its flags.
            lost |= one.flags & {"no_trained_stop", "missing_final_stop"}
    if not trained:
        raise BadRow("nothing_trained", f"no token would be trained under train_on={policy_name(recipe.train_on)!r}")
    if conversation.messages and conversation.messages[-1]["role"] != "assistant":
        lost |= {"trailing_messages"}
    if lost:
        trained[-1] = replace(trained[-1], flags=trained[-1].flags | lost)
    return tuple(trained)


def pass_tokens_through(recipe: Recipe, conversation: Conversation, tokens: RowTokens) -> Example:
    """Pass the row's own tokens through; its text is theirs, one by one, for people to read.

    Raises:
        BadRow: the tokenizer has no such tokens, or none is to be learnt.
    """
    ids, trained = tokens.input_ids, tokens.trained
    if (foreign := np.flatnonzero((ids < 0) | (ids >= recipe.tokenizer.size))).size:
        at = int(foreign[0])
        found = f"is {ids[at]}, which tokenizer {recipe.tokenizer.name} does not have"
        raise BadRow("token_id", found, field=f"input_ids[{at}]", hint="give the tokenizer that made these tokens")
    if not trained.any():
        raise BadRow("nothing_trained", "has no token to learn", field="labels")
    texts = token_texts(recipe.tokenizer, ids.tolist())
    ends = np.cumsum([len(text) for text in texts])
    offsets = np.stack((ends - [len(text) for text in texts], ends), axis=1).astype(np.int32)
    runs = np.flatnonzero(np.diff(trained, prepend=~trained[:1], append=~trained[-1:]))
    spans = [
        Span(int(offsets[a, 0]), int(offsets[b - 1, 1]), Part.CONTENT, at, bool(trained[a]))
        for at, (a, b) in enumerate(pairwise(runs.tolist()))
    ]
    flags = frozenset({"pretokenized"})
    example = Example(ids, trained, offsets, "".join(texts), tuple(spans), flags, conversation.source)
    return example if _stops(example, recipe) else replace(example, flags=flags | {"no_trained_stop"})


def _masked(recipe: Recipe, rows: Sequence[RenderedRow]) -> MaskedTexts:
    """Tokenise and mask the texts of rows, all at once."""
    said = [row.conversation for row in rows for _ in row.texts]
    batch = RenderedBatch([one for row in rows for one in row.texts])
    tokens, refused = encode_rendered(recipe.tokenizer, batch, recipe.control, recipe.control_tokens)
    tokens = _begun(recipe, batch, tokens)
    trained, straddles = trained_tokens(tokens, batch, _chosen(recipe, rows, refused))
    flags = [one.flags for one in batch]
    for flag, numbers in (
        ("control_tokens", tokens.escaped),
        ("token_crosses_boundary", np.flatnonzero(straddles).tolist()),
    ):
        for number in numbers:
            flags[number] |= {flag}
    made = MaskedTexts(said, batch, tokens, trained, flags, refused)
    for number, plain in enumerate(_closed(made, recipe)):
        if not plain and isinstance(example := made[number], Example) and not _stops(example, recipe):
            flags[number] |= {"no_trained_stop"}
    return made


def _chosen(recipe: Recipe, rows: Sequence[RenderedRow], refused: Collection[int]) -> list[Sequence[bool]]:
    """Return which spans of each text are to be trained; none of those that are refused."""
    policy, found = recipe.policy, list[Sequence[bool]]()
    for row in rows:
        if row.trained_spans is not None and not refused:
            found += row.trained_spans
            continue
        for number, one in enumerate(row.texts):
            if len(found) in refused:
                found.append([False] * len(one.spans))
            else:
                found.append(policy(one, row.conversation) if row.trained_spans is None else row.trained_spans[number])
    return found


def _begun(recipe: Recipe, batch: RenderedBatch, tokens: Encodings) -> Encodings:
    """Return the tokens with the tokenizer's own BOS before them, where a text has none of its own."""
    wanted = [number for number, one in enumerate(batch) if one.add_bos]
    if not wanted or not len(bos := recipe.tokenizer.bos_ids):
        return tokens
    return tokens.begun([number for number in wanted if not np.array_equal(tokens[number].ids[:1], bos)], bos)


def _closed(masked: MaskedTexts, recipe: Recipe) -> list[bool]:
    """Return for which texts it is plain that every trained turn ends in a control token.

    That is so where every stretch of trained tokens, of which each turn has one, ends in one.
    """
    ids, bounds, trained = masked.tokens.ids, masked.tokens.bounds, masked.trained
    following = np.append(trained[1:], False)
    following[bounds[1:][bounds[1:] > 0] - 1] = False
    closing = np.flatnonzero(trained & ~following)
    of = np.searchsorted(bounds, closing, side="right") - 1
    good = np.bincount(of[recipe.control.among(ids[closing])], minlength=len(masked)).tolist()
    every = np.bincount(of, minlength=len(masked)).tolist()
    turns = [len(spans.kinds.turns) for spans in masked.texts.spans]
    return [a == b == c for a, b, c in zip(good, every, turns, strict=True)]


def _stops(example: Example, recipe: Recipe) -> bool:
    """Whether every trained turn ends in a control token, but for blanks, and a last one that has none to end in."""
    ends = turn_ends(example)
    if "missing_final_stop" in example.flags:
        ends = ends[:-1]
        if not len(ends):
            return True
    last = []
    for end in ends:
        at = end - 1
        while at > 0 and example.trained[at - 1] and not example.text[slice(*example.offsets[at])].strip():
            at -= 1
        last.append(example.input_ids[at])
    return bool(last) and bool(np.isin(last, recipe.control.ids).all())


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
    """Encode one conversation: ids, labels, and the reason of each.

    It is what a build makes of it, but for an empty answer, which a build refuses.

    Args:
        messages: the conversation, as chat templates take it.
        tokenizer: a folder, a hub id, or a tokenizer object.
        template: as for `build_sft_dataset`.
        tools: JSON schemas of tools, for templates that print them.
        train_on: `"assistant"`, `"last_assistant"`, `"completion"`, `"all"`, or a callable
            `(rendered, conversation) -> [bool per span]`.
        train_parts: of what `train_on` chooses, these parts only: `"reasoning"`, `"answer"`, `"tool_call"`.
        turns: `"auto"`, `"joint"` or `"split"`.
        control_tokens: `"escape"`, `"refuse"` or `"allow"` control-token text inside the messages.
        on_dropped_message: `"reject"` or `"flag"` a conversation of which the template leaves out a message that is not the
            assistant's.
        on_missing_stop: `"flag"` a last turn that the template leaves without a stop, or `"append_eos"` and train it.
        reject_flags: flags, such as `"no_trained_stop"`, that make a conversation a bad one.
        date: what templates that print a date are shown.
        template_kwargs: further variables for the template.

    Returns:
        One example, or one per group of turns that answer one user message where the template rewrites earlier turns;
        arrays are numpy's, int32 and bool `[tokens]`.

    Raises:
        UsageError: an option is invalid.
        BadRow: the conversation is refused; `.code` says why.
        TemplateRefused: the template or tokenizer cannot be used at all.
        HubError: the tokenizer cannot be had.

    >>> from ftdata.testing import byte_tokenizer
    >>> talk = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    >>> (example,) = encode(talk, byte_tokenizer(), "chatml")
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
        # Through JSON and back: what cannot be written there, no template and no file could hold.
        row = json.loads(json.dumps(row))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("not_json", f"the messages hold what JSON does not: {error}", where="<messages>") from None
    conversation = normalize(Row(row, Source("<messages>", 0)), "messages")
    try:
        masked = _masked(recipe, [apply_policy(conversation, render_conversation(recipe, conversation), recipe.policy)])
        examples = _examples(recipe, conversation, [masked[number] for number in range(len(masked))])
        _check_flags(recipe, examples)
    except BadRow as error:
        error.where = error.where or error.field
        raise
    return examples
