"""Mask policies select the trained spans of a text. The trained tokens are computed from these spans.

A policy returns for each span whether it is trained. A token is trained if it overlaps a trained span by at least one
character. A token without characters is never trained. The first token of a text is never trained, because there is no
earlier token to predict it from. The tokens of images are never trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import FtdataError, UsageError, check_choice
from ftdata.registry import Registry, is_built_in
from ftdata.schemas.answer_text import EMPTY_THINKING, THINKING_NAMES
from ftdata.schemas.preference import PAIR_SCHEMA
from ftdata.tokenizing.batches import Encodings, RenderedBatch
from ftdata.types import Conversation, Part, Rendered, Spans

Policy = Callable[[Rendered, Conversation], Sequence[bool]]
"""A mask policy: returns for each span of a text whether it is trained. Its exceptions become `mask_failed` errors.

It must be deterministic, and importable by name from a module if there are several `workers`.
"""

masks: Registry[Policy] = Registry("ftdata.masks", "mask")
"""Map each name that `train_on` accepts to its policy."""


@masks.register("assistant")
def assistant(rendered: Rendered, conversation: Conversation) -> Sequence[bool]:
    """Train every assistant turn, except messages with `train: false` or `weight: 0`."""
    kinds = Spans.from_spans(rendered.spans).kinds
    untrained = _untrained(conversation)
    if not untrained:
        return kinds.generated
    pairs = zip(kinds.generated, kinds.messages, strict=True)
    return [generated and message not in untrained for generated, message in pairs]


@masks.register("last_assistant")
def last_assistant(rendered: Rendered, conversation: Conversation) -> list[bool]:
    """Train only the last assistant message of the conversation."""
    last = max((i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"), default=0)
    trained_spans = assistant(rendered, conversation)
    return [trained and span.message == last for trained, span in zip(trained_spans, rendered.spans, strict=True)]


@masks.register("completion")
def completion(rendered: Rendered, conversation: Conversation) -> list[bool]:
    """Train the assistant messages after the prompt. In a chat without a separate prompt, train the last turn."""
    trained_spans = assistant(rendered, conversation)
    first = conversation.completion_from
    return [trained and span.message >= first for trained, span in zip(trained_spans, rendered.spans, strict=True)]


@masks.register("all")
def all_text(rendered: Rendered, conversation: Conversation) -> list[bool]:
    """Train the whole text, including prompts and template text, except messages with `train: false` or `weight: 0`.

    The template text around an excluded message is trained, but its stop token is not.
    """
    untrained = _untrained(conversation)
    if not untrained:
        return [True] * len(rendered.spans)
    return [
        span.message not in untrained or (span.part is Part.SCAFFOLD and not span.generated) for span in rendered.spans
    ]


def _untrained(conversation: Conversation) -> frozenset[int]:
    """Return the indices of the messages that are excluded from training."""
    messages = enumerate(conversation.messages)
    # Most messages have only a role and a content.
    return frozenset([index for index, message in messages if len(message) > 2 and message.get("train") is False])


def drop_untrained_flags(rendered: Rendered, trained_spans: Sequence[bool]) -> frozenset[str]:
    """Return the flags of a rendered text, without `empty_thinking` if the mask trains no empty thinking block."""
    if "empty_thinking" not in rendered.flags:
        return rendered.flags
    indices = [index for index, span in enumerate(rendered.spans) if span.generated]
    spans = [*rendered.spans]
    for _, group in groupby(indices, lambda index: spans[index].message):
        turn = [*group]
        start = spans[turn[0]].start
        block = EMPTY_THINKING.match(rendered.text, start, spans[turn[-1]].end)
        if block and any(trained_spans[index] for index in turn if spans[index].start < block.end()):
            return rendered.flags
    return rendered.flags - {"empty_thinking"}


PARTS = {"reasoning": Part.REASONING, "answer": Part.CONTENT, "tool_call": Part.TOOL_CALL}
"""Map each name that `train_parts` accepts to its part."""


def resolve_policy(train_on: str | Policy, train_parts: Sequence[str] | None = None) -> Policy:
    """Return the mask policy for `train_on`, a name or a function. The policy trains only the parts in `train_parts`.

    Raises:
        UsageError: `train_on` or `train_parts` contains an unknown name.
    """
    if not isinstance(train_on, str) and not callable(train_on):
        raise UsageError(
            "train_on", f"train_on is {train_on!r}, expected a function or a name: {', '.join(masks.names())}"
        )
    policy = _find_policy(train_on)
    policy = policy if is_built_in(policy) else _add_checks(policy)
    if train_parts is None:
        return policy
    if isinstance(train_parts, str) or not isinstance(train_parts, Iterable) or not train_parts:
        problem = f"train_parts is {train_parts!r}, expected a list of {', '.join(PARTS)}"
        raise UsageError("train_parts", problem, hint="pass a list, e.g. train_parts=['answer']")
    for name in train_parts:
        check_choice("train_parts", name, PARTS)
    selected_parts = frozenset(PARTS[name] for name in train_parts)
    return lambda rendered, conversation: [
        trained and bool(parts & selected_parts)
        for trained, parts in zip(policy(rendered, conversation), parts_of_spans(rendered), strict=True)
    ]


def is_built_in_policy(train_on: str | Policy) -> bool:
    """Return whether a policy is built in. Such a policy uses only span kinds, roles and the key `train`."""
    return is_built_in(_find_policy(train_on))


def _find_policy(train_on: str | Policy) -> Policy:
    return masks.get(train_on) if isinstance(train_on, str) else train_on


def _add_checks(policy: Policy) -> Policy:
    """Wrap a custom policy in a function that checks the policy's return value."""

    def checked_policy(rendered: Rendered, conversation: Conversation) -> list[bool]:
        try:
            result = policy(rendered, conversation)
        except FtdataError:
            raise
        except Exception as error:
            problem = f"the mask policy raised {type(error).__name__}: {error}"
            raise UsageError("mask_failed", problem, where=str(conversation.source)) from error
        trained_spans = list(result) if isinstance(result, Iterable) else None
        if trained_spans is None or not all(isinstance(trained, bool | np.bool_) for trained in trained_spans):
            raise UsageError("mask_type", f"the mask policy returned {result!r:.60}, expected one bool per span")
        if len(trained_spans) != len(rendered.spans):
            problem = (
                f"the mask policy returned {len(trained_spans)} values, expected {len(rendered.spans)}: one per span"
            )
            raise UsageError("mask_length", problem)
        if conversation.schema == PAIR_SCHEMA or "label" in conversation.feedback:
            _check_rated_answer(rendered, conversation, trained_spans)
        return [bool(trained) for trained in trained_spans]

    return checked_policy


def _check_rated_answer(rendered: Rendered, conversation: Conversation, trained_spans: Sequence[bool]) -> None:
    """Check that a mask trains only the answer that is rated, because trainers of ratings score only this answer.

    Raises:
        UsageError: `mask_prompt`.
    """
    for span, is_trained in zip(rendered.spans, trained_spans, strict=True):
        if is_trained and not (span.generated and span.message >= conversation.completion_from):
            text = rendered.text[span.start : span.end]
            problem = f"the mask policy trains {text!r:.60}, which is not part of the rated answer"
            hint = "train only spans with span.generated and span.message >= conversation.completion_from"
            raise UsageError("mask_prompt", problem, where=str(conversation.source), hint=hint)


_THINKING_TAG = re.compile(rf"</?(?:{THINKING_NAMES})>")


def parts_of_spans(rendered: Rendered) -> list[frozenset[Part]]:
    """Return the parts that each span belongs to, such as the answer, the reasoning or a tool call.

    Template text belongs to the part that it closes (`</think>`, the stop token). Before the first part of a turn, it
    belongs to the part that it opens. Between an answer and a tool call it opens the call (`<tool_call>`). Between
    reasoning and a tool call it belongs to both. An empty thinking block is reasoning.
    """
    spans, text = rendered.spans, rendered.text
    turn_parts = frozenset(PARTS.values())
    span_parts = [frozenset({span.part}) for span in spans]
    for _, turn in groupby((n for n, span in enumerate(spans) if span.generated), lambda n: spans[n].message):
        indices = list(turn)
        parts = [spans[n].part if spans[n].part in turn_parts else None for n in indices]
        previous_parts, next_parts = _fill_forward(parts), _fill_forward(parts[::-1])[::-1]
        for n, part, before, after in zip(indices, parts, previous_parts, next_parts, strict=True):
            if part is None:
                tag = _THINKING_TAG.search(text, spans[n].start, spans[n].end) if before is None else None
                span_parts[n] = _adjacent_parts(Part.REASONING if tag else before, after)
    return span_parts


def _fill_forward(parts: Sequence[Part | None]) -> list[Part | None]:
    """Replace each `None` by the nearest part before it, if there is a part before it."""
    filled: list[Part | None] = []
    for part in parts:
        filled.append(part or (filled[-1] if filled else None))
    return filled


def _adjacent_parts(before: Part | None, after: Part | None) -> frozenset[Part]:
    """Return the parts that template text belongs to, given the parts before and after the text."""
    opens = after is Part.TOOL_CALL or before is None
    closes = not opens or before is Part.REASONING
    pairs = ((before, closes), (after, opens))
    return frozenset(part for part, belongs in pairs if part is not None and belongs)


def trained_tokens(
    tokens: Encodings, batch: RenderedBatch, trained_spans: Iterable[Sequence[bool]]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Convert trained spans to trained tokens, and find texts in which a token crosses a trained span's boundary.

    Args:
        tokens: the tokens of all texts.
        batch: the texts.
        trained_spans: for each span of each text, whether it is trained.

    Returns:
        bool `[tokens]` and bool `[texts]`.

    >>> import numpy as np
    >>> from ftdata.tokenizing.batches import EncodedText
    >>> from ftdata.types import Part, Span
    >>> spans = (Span(0, 4, Part.CONTENT, 0, False), Span(4, 9, Part.CONTENT, 1, True))
    >>> offsets = np.array([[0, 3], [3, 6], [6, 6], [6, 9]], dtype=np.int32)
    >>> tokens = Encodings.from_texts([EncodedText(np.arange(4, dtype=np.int32), offsets)], [9])
    >>> trained, crosses = trained_tokens(tokens, RenderedBatch([Rendered("x" * 9, spans)]), [[False, True]])
    >>> trained.tolist(), crosses.tolist()
    ([False, True, False, True], [True])
    """
    range_starts, range_ends = _trained_ranges(batch, np.fromiter(chain.from_iterable(trained_spans), np.bool_))
    starts, ends, first_tokens = tokens.starts, tokens.ends, tokens.token_bounds[:-1]
    trained, is_inside = _covered_tokens(
        starts, ends, range_starts.astype(starts.dtype), range_ends.astype(starts.dtype)
    )
    # `trained` and `is_inside` may be the same array, so it is copied before it is changed.
    trained = trained & (starts < ends)
    trained[first_tokens[first_tokens < len(trained)]] = False
    texts = np.searchsorted(tokens.token_bounds, np.flatnonzero(trained > is_inside), side="right") - 1
    crosses_boundary = np.zeros(len(tokens), np.bool_)
    crosses_boundary[texts] = True
    return trained, crosses_boundary


def _trained_ranges(batch: RenderedBatch, trained: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the starts and ends of the trained character ranges. Adjacent trained spans form one range."""
    trained = trained & (batch.starts < batch.ends) & ~batch.media
    starts, ends = batch.starts[trained], batch.ends[trained]
    is_boundary = np.ones(len(starts) + 1, np.bool_)
    is_boundary[1:-1] = starts[1:] != ends[:-1]
    return starts[is_boundary[:-1]], ends[is_boundary[1:]]


def _covered_tokens(
    starts: NDArray[np.integer],
    ends: NDArray[np.integer],
    range_starts: NDArray[np.integer],
    range_ends: NDArray[np.integer],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which tokens overlap a range, and which tokens are completely inside a range (bool `[tokens]`)."""
    search, size = np.searchsorted, len(starts)
    if (starts[1:] < starts[:-1]).any() or (ends[1:] < ends[:-1]).any():
        # A range overlaps a token if it starts before the end of the token and ends after its start.
        overlapping = search(range_starts, ends, "left") > search(range_ends, starts, "right")
        return overlapping, search(range_starts, starts, "right") > search(range_ends, ends, "left")
    # The tokens are sorted, so it is faster to search for the ranges, which are far fewer.
    first_tokens, end_tokens = search(ends, range_starts, "right"), search(starts, range_ends, "left")
    overlapping = _members_of_ranges(first_tokens, end_tokens, size)
    inner_first, inner_end = search(starts, range_starts, "left"), search(ends, range_ends, "right")
    if (inner_first <= first_tokens).all() and (end_tokens <= inner_end).all():
        return overlapping, overlapping
    return overlapping, _members_of_ranges(inner_first, inner_end, size)


def _members_of_ranges(starts: NDArray[np.integer], ends: NDArray[np.integer], size: int) -> NDArray[np.bool_]:
    """Return for each integer below `size` whether a range `[start, end)` contains it (bool `[size]`)."""
    edges = np.empty(2 * len(starts) + 2, np.int64)
    edges[0], edges[1:-1:2], edges[2:-1:2], edges[-1] = 0, starts, ends, size
    # The last integer of a range may be the first of the next range.
    np.maximum.accumulate(edges, out=edges)
    return np.repeat(np.arange(len(edges) - 1) % 2 == 1, np.diff(edges))
