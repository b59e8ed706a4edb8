"""Near-duplicates: rows that say almost the same.

The words of a row, five at a time, are a set; how much of two sets is shared (Jaccard) is estimated by MinHash (Broder
1997), and pairs worth comparing are found by bands of it (Leskovec, Rajaraman and Ullman 2020, 3.4). What is said is
what the messages hold, but for system messages, which whole data sets share: for those, for tools, and for what is not
trained, rows are alike only where they are equal.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ftdata.errors import MissingDependency
from ftdata.types import Conversation

PERMUTATIONS = 128
SIZE = PERMUTATIONS + 2
_SYSTEM = ("system", "developer")
_WORDS, _BAND, _AT_ONCE, _SEED = 5, 4, 1 << 16, 42


@lru_cache(maxsize=1)
def _word() -> re.Pattern[str]:
    """Find words with the marks on their letters, signs alone, and each character of scripts without blanks."""
    marks = "".join(char for char in map(chr, range(0x300, 0x110000)) if unicodedata.category(char) in ("Mn", "Mc"))
    alone = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e2f"
    return re.compile(rf"[{alone}][{marks}]*|(?:(?![{alone}])\w[{marks}]*)+|\S")


def require_rensa() -> None:
    """Refuse to go on without the library that makes signatures.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import rensa  # noqa: F401  (is it there?)
    except ImportError:
        hint = "pip install 'ftdata[dedup]'"
        raise MissingDependency("no_rensa", "near-duplicates need rensa", hint=hint) from None


def minhash_signatures(conversations: Sequence[Conversation]) -> NDArray[np.uint32]:
    """Return the MinHash of what each conversation says, and a hash of all that must be equal besides.

    uint32 `[conversations, SIZE]`, the hash in the last two columns.
    """
    from rensa import RMinHash

    sets = [_shingles(_word().findall("\n".join(_said(one)).casefold())) for one in conversations]
    rows = RMinHash.digest_matrix_from_token_sets(sets, PERMUTATIONS, _SEED).to_rows()
    besides = np.asarray([_besides(one) for one in conversations], dtype=np.uint64).view(np.uint32).reshape(-1, 2)
    return np.concatenate((np.asarray(rows, dtype=np.uint32).reshape(-1, PERMUTATIONS), besides), axis=1)


def _besides(conversation: Conversation) -> int:
    untrained = [at for at, message in enumerate(conversation.messages) if message.get("train") is False]
    systems = [message.get("content") for message in conversation.messages if message["role"] in _SYSTEM]
    parts = [systems, conversation.tools, untrained, dict(conversation.kwargs)]
    return xxhash.xxh3_64_intdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def _said(conversation: Conversation) -> Iterator[str]:
    if conversation.text is not None:
        yield conversation.text
    for message in conversation.messages:
        if message["role"] not in _SYSTEM:
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


def first_similar(minhashes: NDArray[np.uint32], threshold: float) -> NDArray[np.int64]:
    """Return for each row the first row that is kept and at least as similar as `threshold`: itself where none is.

    Rows that are left out suppress no others. Args and result: uint32 `[rows, hashes]` -> int64 `[rows]`.
    """
    found = np.arange(len(minhashes))
    labels = similarity_groups(minhashes, threshold)
    order = np.argsort(labels, kind="stable")
    bounds = np.flatnonzero(np.diff(labels[order], prepend=-1, append=-1) != 0)
    for start, end in pairwise(bounds.tolist()):
        kept: list[int] = []
        for row in order[start:end].tolist() if end - start > 1 else ():
            others = minhashes[kept]
            like = (others[:, :PERMUTATIONS] == minhashes[row, :PERMUTATIONS]).mean(axis=1) >= threshold
            like &= (others[:, PERMUTATIONS:] == minhashes[row, PERMUTATIONS:]).all(axis=1)
            if like.any():
                found[row] = kept[int(like.argmax())]
            else:
                kept.append(row)
    return found


def similarity_groups(minhashes: NDArray[np.uint32], threshold: float) -> NDArray[np.int64]:
    """Return the connected components of similarity: int64 `[rows]`, equal for rows that a chain of similar ones joins.

    Tools, system messages and masks are not looked at.
    """
    minhashes = minhashes[:, :PERMUTATIONS]
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


def merge_labels(labels: NDArray[np.int64], equal: NDArray[np.generic]) -> NDArray[np.int64]:
    """Return labels that are the same, too, where `equal` is."""
    _, first, which = np.unique(equal, return_index=True, return_inverse=True)
    found = labels.copy()
    _join(found, first[which], np.arange(len(labels)))
    return found
