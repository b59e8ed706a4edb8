"""Truncate examples that are longer than `max_length`. Every truncation is reported.

| policy       | result for an overlong example                                                     |
|--------------|------------------------------------------------------------------------------------|
| `reject`     | The example is rejected.                                                           |
| `drop_turns` | The example ends after the last trained turn that fits completely.                 |
| `truncate`   | The first `max_length` tokens remain; flag `answer_truncated` if an answer is cut. |

Every policy rejects an example that would have no trained tokens left.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import BadRow
from ftdata.types import Example


def truncate(example: Example, max_length: int | None, policy: str = "reject") -> Example:
    """Shorten an example to at most `max_length` tokens. An example that fits is returned unchanged.

    Raises:
        BadRow: `overlong`: the policy is `reject`, or no trained token would remain.
    """
    length = len(example)
    if max_length is None or length <= max_length:
        return example
    problem = f"the example has {length} tokens, expected at most {max_length} (max_length)"
    if policy == "reject":
        raise BadRow("overlong", problem, hint="raise max_length, or set overlong='drop_turns' or overlong='truncate'")
    keep = max_length
    if policy == "drop_turns":
        ends = turn_ends(example)
        keep = int(ends[ends <= max_length].max(initial=0))
    if not example.trained[:keep].any():
        raise BadRow(
            "overlong",
            f"{problem}, and no answer{' begins' if policy == 'truncate' else ' fits completely'} within that length",
            hint="raise max_length",
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
    )


def turn_ends(example: Example) -> NDArray[np.int64]:
    """Return the end of each trained turn, as the index after its last token, in ascending order (int64 `[turns]`)."""
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
