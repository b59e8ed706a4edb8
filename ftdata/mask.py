"""Mask: a policy over spans -> which tokens carry loss.

A policy says, for each span, whether it is trained. Tokens follow their characters: a token is trained if it
overlaps a trained stretch by at least one character; a token of no characters never is. The first token of a
text is never trained, since nothing stands before it to predict it from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import UsageError, one_of
from ftdata.registry import Registry
from ftdata.types import Conversation, Part, Rendered

Policy = Callable[[Rendered, Conversation], Sequence[bool]]

masks: Registry[Policy] = Registry("ftdata.masks", "mask")


@masks.register("assistant")
def assistant(rendered: Rendered, conversation: Conversation) -> list[bool]:
    """Train every assistant turn, except messages that say `train: false` or `weight: 0`."""
    untrained = {i for i, message in enumerate(conversation.messages) if message.get("train") is False}
    return [span.generated and span.message not in untrained for span in rendered.spans]


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
def everything(rendered: Rendered, conversation: Conversation) -> list[bool]:  # noqa: ARG001
    """Train the whole text, prompts and template included."""
    return [True] * len(rendered.spans)


PARTS = {"reasoning": Part.REASONING, "answer": Part.CONTENT, "tool_call": Part.TOOL_CALL}
"""What `train_parts` may name."""


def policy_of(train_on: str | Policy, train_parts: Sequence[str] | None = None) -> Policy:
    """Return the policy of a name, or the callable itself, narrowed to some parts of the turns.

    Raises:
        UsageError: no policy, or no part, has this name.
    """
    if not isinstance(train_on, str) and not callable(train_on):
        raise UsageError(
            "train_on", f"train_on is {train_on!r}, expected one of {', '.join(masks.names())}, or a function"
        )
    policy = masks.get(train_on) if isinstance(train_on, str) else train_on
    if train_parts is None:
        return policy
    if isinstance(train_parts, str) or not train_parts:
        raise UsageError("train_parts", f"train_parts is {train_parts!r}, expected a list of {', '.join(PARTS)}")
    for name in train_parts:
        one_of("train_parts", name, PARTS)
    wanted = frozenset(PARTS[name] for name in train_parts)
    return lambda rendered, conversation: [
        yes and bool(kinds & wanted)
        for yes, kinds in zip(policy(rendered, conversation), span_parts(rendered), strict=True)
    ]


def span_parts(rendered: Rendered) -> list[frozenset[Part]]:
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
    offsets: NDArray[np.int32], rendered: Rendered, chosen: Sequence[bool]
) -> tuple[NDArray[np.bool_], bool]:
    """Return, for each token, whether it carries loss (bool `[n]`), and whether one of them straddles a boundary.

    Args:
        offsets: int32 `[n, 2]`, the characters behind each token.
        rendered: the text's spans.
        chosen: for each span, whether the policy trains it.

    Raises:
        UsageError: a policy of the user's own gave another number of answers than there are spans.

    >>> import numpy as np
    >>> from ftdata.types import Part, Span
    >>> spans = (Span(0, 4, Part.CONTENT, 0, False), Span(4, 9, Part.CONTENT, 1, True))
    >>> offsets = np.array([[0, 3], [3, 6], [6, 6], [6, 9]], dtype=np.int32)
    >>> trained, straddles = trained_tokens(offsets, Rendered("x" * 9, spans), [False, True])
    >>> trained.tolist(), straddles
    ([False, True, False, True], True)
    """
    if len(chosen) != len(rendered.spans):
        raise UsageError("mask_length", f"the mask policy gave {len(chosen)} answers for {len(rendered.spans)} spans")
    begins, ends = _stretches(rendered, chosen)
    first, last = offsets[:, 0], offsets[:, 1]
    # A stretch that has begun before the token ends, and has not ended where it begins, is in it.
    trained = (np.searchsorted(begins, last, "left") > np.searchsorted(ends, first, "right")) & (first < last)
    trained[:1] = False
    at = np.searchsorted(begins, first[trained], "right") - 1
    inside = (at >= 0) & (last[trained] <= ends[at])
    return trained, not bool(inside.all())


def _stretches(rendered: Rendered, chosen: Sequence[bool]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where trained stretches of the text begin and end; neighbours are one."""
    begins, ends = list[int](), list[int]()
    for span, yes in zip(rendered.spans, chosen, strict=True):
        if yes and span.start < span.end:
            if ends and ends[-1] == span.start:
                ends[-1] = span.end
            else:
                begins.append(span.start)
                ends.append(span.end)
    return np.asarray(begins, dtype=np.int64), np.asarray(ends, dtype=np.int64)
