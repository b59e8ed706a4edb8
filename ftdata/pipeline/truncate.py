"""Truncate examples that are longer than `max_length`. Every truncation is reported.

| policy       | result for an overlong example                                                     |
|--------------|------------------------------------------------------------------------------------|
| `reject`     | The example is rejected.                                                           |
| `drop_turns` | The example ends after the last trained turn that fits completely.                 |
| `truncate`   | The first `max_length` tokens remain; flag `answer_truncated` if an answer is cut. |

Every policy rejects an example that would have no trained tokens left. No policy keeps a part of an image.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import BadRow
from ftdata.types import Example, Part


def truncate(example: Example, max_length: int | None, policy: str = "reject", *, keep_ending: bool = False) -> Example:
    """Shorten an example to at most `max_length` tokens. An example that fits is returned unchanged.

    Args:
        example: the example.
        max_length: the maximum number of tokens; `None` for no limit.
        policy: what to keep of a longer example.
        keep_ending: with the policy `drop_turns`, whether to also keep the template text after the last turn that is
            kept, if the whole example ends with the same text. Then both sides of a pair end alike.

    Raises:
        BadRow: `overlong`: the policy is `reject`, or no trained token would remain.
    """
    length = len(example)
    if max_length is None or length <= max_length:
        return example
    problem = f"the example has {length} tokens, expected at most {max_length} (max_length)"
    if policy == "reject":
        raise BadRow("overlong", problem, hint=_suggest_shortening(example, max_length))
    keep = max_length
    if policy == "drop_turns":
        keep = _fitting_length(example, max_length)
        keep += _ending_length(example, keep, max_length) if keep_ending and keep else 0
    keep = _end_before_image(example, keep)
    if not example.trained[:keep].any():
        raise BadRow(
            "overlong",
            f"{problem}, and no answer{' begins' if policy == 'truncate' else ' fits completely'} within that length",
            hint="raise max_length, or shorten or remove the row",
        )
    is_answer_cut = bool(example.trained[keep - 1] and example.trained[keep])
    flags = example.flags | ({"answer_truncated"} if is_answer_cut else set()) | {"truncated"}
    return replace(
        example,
        input_ids=example.input_ids[:keep],
        trained=example.trained[:keep],
        offsets=example.offsets[:keep],
        flags=flags,
        cut=length - keep,
        images=example.images[: _count_images(example, keep)],
    )


def _end_before_image(example: Example, keep: int) -> int:
    """Return the number of tokens to keep, so that the example does not end within an image.

    The example then ends before the template text that precedes the image, because this text can contain the token
    that announces an image.
    """
    if not example.images or not keep:
        return keep
    kept_end, next_start = int(example.offsets[keep - 1, 1]), int(example.offsets[keep, 0])
    spans = [*example.spans]
    for number, span in enumerate(spans):
        if span.part is Part.MEDIA and span.start <= kept_end and next_start < span.end:
            first = spans[number - 1] if number and spans[number - 1].part is Part.SCAFFOLD else span
            return int(np.searchsorted(example.offsets[:, 0], first.start))
    return keep


def _count_images(example: Example, keep: int) -> int:
    """Return the number of images within the first `keep` tokens."""
    end = int(example.offsets[keep - 1, 1])
    return sum(span.part is Part.MEDIA and span.end <= end for span in example.spans) if example.images else 0


def _fitting_length(example: Example, max_length: int) -> int:
    """Return the number of tokens up to the end of the last trained message that fits within `max_length`."""
    ends = turn_ends(example)
    return int(ends[ends <= max_length].max(initial=0))


def _ending_length(example: Example, keep: int, max_length: int) -> int:
    """Return the number of tokens after the last turn of the example if the same tokens follow the token `keep`."""
    ending = example.input_ids[int(turn_ends(example)[-1]) :]
    end = keep + len(ending)
    has_ending = end <= max_length and np.array_equal(example.input_ids[keep:end], ending)
    return len(ending) if has_ending and not example.trained[keep:end].any() else 0


def _suggest_shortening(example: Example, max_length: int) -> str:
    """Return a hint with the policies that keep a part of the example."""
    if example.trained[: _fitting_length(example, max_length)].any():
        return "raise max_length, or set overlong='drop_turns' or overlong='truncate'"
    if example.trained[:max_length].any():
        return "raise max_length, or shorten the row; overlong='truncate' would cut the answer"
    return "raise max_length, or shorten or remove the row"


def turn_ends(example: Example) -> NDArray[np.int64]:
    """Return for each trained assistant message the index after its last token (int64 `[messages]`, ascending)."""
    owners = np.full(len(example), -1, dtype=np.int64)
    generated = [span for span in example.spans if span.generated]
    span_ends = np.asarray([span.end for span in generated], dtype=np.int64)
    messages = np.asarray([span.message for span in generated], dtype=np.int64)
    trained = np.flatnonzero(example.trained)
    # With train_on="all", trained tokens outside the generated spans belong to no turn.
    span_indices = np.searchsorted(span_ends, example.offsets[trained, 0], side="right")
    is_inside = span_indices < len(generated)
    owners[trained[is_inside]] = messages[span_indices[is_inside]]
    changes = np.flatnonzero(np.diff(owners, append=-2))
    return changes[owners[changes] >= 0] + 1
