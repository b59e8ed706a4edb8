"""Truncate: what becomes of an example that is longer than `max_length`. Nothing is ever cut in silence.

| policy       | an over-long example                                                                    |
|--------------|-----------------------------------------------------------------------------------------|
| `reject`     | is rejected, with its length                                                            |
| `drop_turns` | keeps the turns that fit, whole: it ends with the last trained turn that does           |
| `truncate`   | keeps its first `max_length` tokens, flagged `answer_truncated` where an answer is cut  |

An example with nothing left to train is rejected under every policy.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import BadRow
from ftdata.types import Example

POLICIES = ("reject", "drop_turns", "truncate")


def truncate(example: Example, max_length: int | None, policy: str = "reject") -> Example:
    """Return the example, or the part of it that fits into `max_length` tokens: always a prefix.

    Raises:
        BadRow: `overlong` under `reject`, or where nothing trained would be left.
    """
    length = len(example)
    if max_length is None or length <= max_length:
        return example
    too_long = f"is {length} tokens long, max_length is {max_length}"
    if policy == "reject":
        raise BadRow("overlong", too_long, hint="raise max_length, or choose overlong='drop_turns' or 'truncate'")
    keep = max_length if policy == "truncate" else _last_whole_turn(example, max_length)
    if not example.trained[:keep].any():
        raise BadRow(
            "overlong",
            f"{too_long}, and no answer{' begins' if policy == 'truncate' else ' fits whole'} before that",
            hint="raise max_length",
        )
    cuts_answer = bool(example.trained[keep - 1] and example.trained[keep])
    flags = example.flags | ({"answer_truncated"} if cuts_answer else set()) | {"truncated"}
    return replace(
        example,
        input_ids=example.input_ids[:keep],
        trained=example.trained[:keep],
        offsets=example.offsets[:keep],
        flags=flags,
        cut=length - keep,
    )


def _last_whole_turn(example: Example, max_length: int) -> int:
    ends = turn_ends(example)
    fitting = ends[ends <= max_length]
    return int(fitting[-1]) if len(fitting) else 0


def turn_ends(example: Example) -> NDArray[np.int64]:
    """Return the token positions just after each trained turn, ascending (int64 `[turns]`)."""
    owners = np.full(len(example), -1, dtype=np.int64)
    generated = [span for span in example.spans if span.generated]
    span_ends = np.asarray([span.end for span in generated], dtype=np.int64)
    messages = np.asarray([span.message for span in generated], dtype=np.int64)
    trained = np.flatnonzero(example.trained)
    # A trained token outside every generated span (train_on="all") has no turn of its own.
    at = np.searchsorted(span_ends, example.offsets[trained, 0], side="right")
    inside = at < len(generated)
    owners[trained[inside]] = messages[at[inside]]
    changes = np.flatnonzero(np.diff(owners, append=-2))
    return changes[owners[changes] >= 0] + 1
