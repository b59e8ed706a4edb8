"""Near-duplicates: rows that say almost the same.

The words of a row, five at a time, are a set; how much of two sets is shared (Jaccard) is estimated by MinHash (Broder
1997), and pairs worth comparing are found by bands of it (Leskovec, Rajaraman and Ullman 2020, 3.4). What is said is
what the messages hold, but for system messages, which whole data sets share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import MissingDependency
from ftdata.types import Conversation

PERMUTATIONS = 128
_WORDS, _BAND, _AT_ONCE, _SEED = 5, 4, 1 << 16, 42
# Scripts without blanks have a word per character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]|\w+?(?=[\u3040-\u30ff\u3400-\u9fff]|\b)")


def require() -> None:
    """Refuse to go on without the library that makes signatures.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import rensa  # noqa: F401
    except ImportError:
        hint = "pip install 'ftdata[dedup]'"
        raise MissingDependency("no_rensa", "near-duplicates need rensa", hint=hint) from None


def signatures(conversations: Sequence[Conversation]) -> NDArray[np.uint32]:
    """Return the MinHash of what each conversation says: uint32 `[conversations, PERMUTATIONS]`."""
    from rensa import RMinHash

    sets = [_shingles(_WORD.findall("\n".join(_said(one)).casefold())) for one in conversations]
    rows = RMinHash.digest_matrix_from_token_sets(sets, PERMUTATIONS, _SEED).to_rows()
    return np.asarray(rows, dtype=np.uint32).reshape(len(conversations), PERMUTATIONS)


def _said(conversation: Conversation) -> Iterator[str]:
    if conversation.text is not None:
        yield conversation.text
    for message in conversation.messages:
        if message["role"] not in ("system", "developer"):
            yield from _texts([message.get(key) for key in ("reasoning_content", "content", "tool_calls")])
    if conversation.tokens is not None:
        yield " ".join(map(str, conversation.tokens.input_ids.tolist()))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif value is not None:
        yield str(value.get("text")) if "text" in value else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _shingles(words: Sequence[str]) -> list[str]:
    return [" ".join(words[at : at + _WORDS]) for at in range(max(len(words) - _WORDS + 1, 1))]


def groups(minhashes: NDArray[np.uint32], threshold: float) -> NDArray[np.int64]:
    """Return a number for each row, the same for rows that are as similar as `threshold`, or have such between them."""
    labels = np.arange(len(minhashes))
    for start in range(0, PERMUTATIONS, _BAND):
        band = np.ascontiguousarray(minhashes[:, start : start + _BAND]).view(f"V{4 * _BAND}").ravel()
        _, bucket = np.unique(band.view(f"S{4 * _BAND}"), return_inverse=True)
        order = np.argsort(bucket, kind="stable")
        same = np.flatnonzero(np.diff(bucket[order]) == 0)
        begins = np.maximum.accumulate(np.where(np.diff(bucket[order], prepend=-1) != 0, np.arange(len(order)), 0))
        # Each row is compared with the one before it in its bucket, and with the first one.
        left, right = np.concatenate((order[same], order[begins[same]])), np.tile(order[same + 1], 2)
        joined = _alike(minhashes, left, right, threshold)
        _join(labels, left[joined], right[joined])
    return labels


def _alike(
    minhashes: NDArray[np.uint32], left: NDArray[np.int64], right: NDArray[np.int64], threshold: float
) -> NDArray[np.bool_]:
    parts = [
        (minhashes[left[at : at + _AT_ONCE]] == minhashes[right[at : at + _AT_ONCE]]).mean(axis=1) >= threshold
        for at in range(0, len(left), _AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.bool_)


def _join(labels: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
    """Give all rows that are joined, over others or not, the smallest of their numbers."""
    while len(left):
        least = np.minimum(labels[left], labels[right])
        apart = labels[left] != labels[right]
        if not apart.any():
            return
        for side in (left, right):
            np.minimum.at(labels, labels[side], least)
            np.minimum.at(labels, side, least)
        labels[:] = labels[labels]
