"""Mask: a policy over spans -> which tokens carry loss.

A policy says, for each span, whether it is trained. Tokens follow their characters: a token is trained if it
overlaps a trained stretch by at least one character; a token of no characters never is. The first token of a
text is never trained, since nothing stands before it to predict it from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import FtdataError, UsageError, check_choice
from ftdata.registry import Registry, is_built_in
from ftdata.tokenizing.batches import Encodings, RenderedBatch
from ftdata.types import Conversation, Part, Rendered, Spans

Policy = Callable[[Rendered, Conversation], Sequence[bool]]
"""A mask policy: for each span of a text, whether it is trained. What it raises is `mask_failed`.

It must answer alike for the same text and messages, and, with several `workers`, be found by its name in a module.
"""

masks: Registry[Policy] = Registry("ftdata.masks", "mask")
"""Name, for `train_on` -> policy."""


@masks.register("assistant")
def assistant(rendered: Rendered, conversation: Conversation) -> Sequence[bool]:
    """Train every assistant turn, except messages that say `train: false` or `weight: 0`."""
    kinds = Spans.of(rendered.spans).kinds
    untrained = _untrained(conversation)
    if not untrained:
        return kinds.generated
    pairs = zip(kinds.generated, kinds.messages, strict=True)
    return [generated and message not in untrained for generated, message in pairs]


@masks.register("last_assistant")
def last_assistant(rendered: Rendered, conversation: Conversation) -> list[bool]:
    """Train the last assistant turn of the conversation only."""
    last = max((i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"), default=0)
    chosen = assistant(rendered, conversation)
    return [yes and span.message == last for yes, span in zip(chosen, rendered.spans, strict=True)]


@masks.register("completion")
def completion(rendered: Rendered, conversation: Conversation) -> list[bool]:
    """Train the assistant turns of the completion: what follows the prompt, or the last turn of a chat."""
    chosen = assistant(rendered, conversation)
    first = conversation.completion_from
    return [yes and span.message >= first for yes, span in zip(chosen, rendered.spans, strict=True)]


@masks.register("all")
def all_text(rendered: Rendered, conversation: Conversation) -> list[bool]:
    """Train the whole text, prompts and template included, except messages with `train: false` or `weight: 0`.

    The template text around such a message is trained, its stop token is not.
    """
    untrained = _untrained(conversation)
    if not untrained:
        return [True] * len(rendered.spans)
    return [
        span.message not in untrained or (span.part is Part.SCAFFOLD and not span.generated) for span in rendered.spans
    ]


def _untrained(conversation: Conversation) -> frozenset[int]:
    """Return the indices of the messages that are not trained."""
    messages = enumerate(conversation.messages)
    return frozenset(index for index, message in messages if message.get("train") is False)


PARTS = {"reasoning": Part.REASONING, "answer": Part.CONTENT, "tool_call": Part.TOOL_CALL}
"""What `train_parts` may name."""


def resolve_policy(train_on: str | Policy, train_parts: Sequence[str] | None = None) -> Policy:
    """Return the policy of a name, or the callable itself, narrowed to some parts of the turns.

    Raises:
        UsageError: no policy, or no part, has this name.
    """
    if not isinstance(train_on, str) and not callable(train_on):
        raise UsageError(
            "train_on", f"train_on is {train_on!r}, expected one of {', '.join(masks.names())}, or a function"
        )
    policy = _asked(train_on)
    policy = policy if is_built_in(policy) else _checked(policy)
    if train_parts is None:
        return policy
    if isinstance(train_parts, str) or not isinstance(train_parts, Iterable) or not train_parts:
        raise UsageError("train_parts", f"train_parts is {train_parts!r}, expected a list of {', '.join(PARTS)}")
    for name in train_parts:
        check_choice("train_parts", name, PARTS)
    wanted = frozenset(PARTS[name] for name in train_parts)
    return lambda rendered, conversation: [
        yes and bool(kinds & wanted)
        for yes, kinds in zip(policy(rendered, conversation), parts_of_spans(rendered), strict=True)
    ]


def is_custom(train_on: str | Policy) -> bool:
    """Whether a policy is built in: their answer depends on kinds of spans, roles and `train` alone."""
    return is_built_in(_asked(train_on))


def _asked(train_on: str | Policy) -> Policy:
    return masks.get(train_on) if isinstance(train_on, str) else train_on


def _checked(policy: Policy) -> Policy:
    """Return a policy of the user's own, whose answers are looked at before they are believed."""

    def answers(rendered: Rendered, conversation: Conversation) -> list[bool]:
        try:
            given = policy(rendered, conversation)
        except FtdataError:
            raise
        except Exception as error:
            found = f"the mask policy fails: {type(error).__name__}: {error}"
            raise UsageError("mask_failed", found, where=str(conversation.source)) from error
        chosen = list(given) if isinstance(given, Iterable) else None
        if chosen is None or not all(isinstance(one, bool | np.bool_) for one in chosen):
            raise UsageError("mask_type", f"the mask policy gave {given!r:.60}, expected one bool per span")
        if len(chosen) != len(rendered.spans):
            found = f"the mask policy gave {len(chosen)} answers for {len(rendered.spans)} spans"
            raise UsageError("mask_length", found)
        return [bool(one) for one in chosen]

    return answers


def parts_of_spans(rendered: Rendered) -> list[frozenset[Part]]:
    """Return, for each span, the parts of the turn that it belongs to.

    The template's text goes with the part that it closes (`</think>`, the stop), or, before a turn's first part, with
    the one that it opens. Between an answer and a tool call it opens the call (`<tool_call>`); between reasoning and a
    call it does both.
    """
    spans = rendered.spans
    kinds = frozenset(PARTS.values())
    found = [frozenset({span.part}) for span in spans]
    for _, turn in groupby((n for n, span in enumerate(spans) if span.generated), lambda n: spans[n].message):
        indices = list(turn)
        parts = [spans[n].part if spans[n].part in kinds else None for n in indices]
        before, after = _latest(parts), _latest(parts[::-1])[::-1]
        for n, own, last, following in zip(indices, parts, before, after, strict=True):
            if own is None:
                found[n] = _closed_and_opened(last, following)
    return found


def _latest(parts: Sequence[Part | None]) -> list[Part | None]:
    """Return, for each place, the last part there or before it."""
    found: list[Part | None] = []
    for part in parts:
        found.append(part or (found[-1] if found else None))
    return found


def _closed_and_opened(before: Part | None, after: Part | None) -> frozenset[Part]:
    """Return what template text between two parts of a turn belongs to."""
    opens = after is Part.TOOL_CALL or before is None
    closes = not opens or before is Part.REASONING
    return frozenset(part for part, yes in ((before, closes), (after, opens)) if part is not None and yes)


def trained_tokens(
    tokens: Encodings, batch: RenderedBatch, chosen: Sequence[Sequence[bool]]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which tokens carry loss (bool `[tokens]`), and in which texts one straddles a boundary (bool `[texts]`).

    Args:
        tokens: the tokens of all texts.
        batch: the texts.
        chosen: for each of them, which of its spans are to be trained.

    >>> import numpy as np
    >>> from ftdata.tokenizing.batches import EncodedText
    >>> from ftdata.types import Part, Span
    >>> spans = (Span(0, 4, Part.CONTENT, 0, False), Span(4, 9, Part.CONTENT, 1, True))
    >>> offsets = np.array([[0, 3], [3, 6], [6, 6], [6, 9]], dtype=np.int32)
    >>> tokens = Encodings.of([EncodedText(np.arange(4, dtype=np.int32), offsets)], [9])
    >>> trained, straddles = trained_tokens(tokens, RenderedBatch([Rendered("x" * 9, spans)]), [[False, True]])
    >>> trained.tolist(), straddles.tolist()
    ([False, True, False, True], [True])
    """
    begins, ends = _stretches(batch, np.fromiter(chain.from_iterable(chosen), np.bool_))
    first, last, firsts = tokens.starts, tokens.ends, tokens.bounds[:-1]
    trained, inside = _covered(first, last, begins.astype(first.dtype), ends.astype(first.dtype))
    # Where no token straddles, the two are one.
    trained = trained & (first < last)
    trained[firsts[firsts < len(trained)]] = False
    apart = np.searchsorted(tokens.bounds, np.flatnonzero(trained > inside), side="right") - 1
    straddles = np.zeros(len(tokens), np.bool_)
    straddles[apart] = True
    return trained, straddles


def _stretches(batch: RenderedBatch, chosen: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where stretches of chosen spans begin and end; neighbours are one."""
    chosen = chosen & (batch.starts < batch.ends)
    begins, ends = batch.starts[chosen], batch.ends[chosen]
    apart = np.ones(len(begins) + 1, np.bool_)
    apart[1:-1] = begins[1:] != ends[:-1]
    return begins[apart[:-1]], ends[apart[1:]]


def _covered(
    first: NDArray[np.integer], last: NDArray[np.integer], begins: NDArray[np.integer], ends: NDArray[np.integer]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which of the tokens `[first, last)` are in a stretch, in part and as a whole (bool `[n]` each)."""
    search, size = np.searchsorted, len(first)
    if (first[1:] < first[:-1]).any() or (last[1:] < last[:-1]).any():
        # A stretch that has begun before the token ends, and has not ended where it begins, is in it.
        part = search(begins, last, "left") > search(ends, first, "right")
        return part, search(begins, first, "right") > search(ends, last, "left")
    # The same, asked for the stretches, of which there are far fewer.
    starts, stops = search(last, begins, "right"), search(first, ends, "left")
    part = _ranges(starts, stops, size)
    inner_starts, inner_stops = search(first, begins, "left"), search(last, ends, "right")
    if (inner_starts <= starts).all() and (stops <= inner_stops).all():
        return part, part
    return part, _ranges(inner_starts, inner_stops, size)


def _ranges(starts: NDArray[np.integer], stops: NDArray[np.integer], size: int) -> NDArray[np.bool_]:
    """Return which of `size` numbers are in one of the ranges `[start, stop)`, which are in order (bool `[size]`)."""
    edges = np.empty(2 * len(starts) + 2, np.int64)
    edges[0], edges[1:-1:2], edges[2:-1:2], edges[-1] = 0, starts, stops, size
    # The last number of one may be the first of the next.
    np.maximum.accumulate(edges, out=edges)
    return np.repeat(np.arange(len(edges) - 1) % 2 == 1, np.diff(edges))
