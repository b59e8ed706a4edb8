"""Find near-duplicates: rows whose estimated similarity to another row reaches a threshold.

The similarity of two rows is the Jaccard similarity of their sets of five-word sequences, estimated by MinHash (Broder
1997). Candidate pairs are found by banding (Leskovec, Rajaraman and Ullman 2020, section 3.4). The words come from all
messages except system messages, which often are the same in a whole data set. Near-duplicates must also have equal
system messages, tools, template variables and untrained messages.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ftdata.errors import MissingDependency
from ftdata.types import Conversation

PERMUTATIONS = 128
SIZE = PERMUTATIONS + 2
_SYSTEM = ("system", "developer")
_WORDS, _BAND, _PAIRS_PER_STEP, _SEED = 5, 4, 1 << 16, 42


@lru_cache(maxsize=1)
def _word_pattern() -> re.Pattern[str]:
    """Return a pattern that matches a word, a symbol, or a character of a language written without word spaces."""
    marks = "".join(char for char in map(chr, range(0x300, 0x110000)) if unicodedata.category(char) in ("Mn", "Mc"))
    unspaced = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e2f"
    return re.compile(rf"[{unspaced}][{marks}]*|(?:(?![{unspaced}])\w[{marks}]*)+|\S")


def require_rensa() -> None:
    """Check that `rensa`, the MinHash library, is installed.

    Raises:
        MissingDependency: `rensa` is not installed.
    """
    try:
        import rensa  # noqa: F401  (checks that rensa is installed)
    except ImportError:
        hint = "pip install 'ftdata[dedup]'"
        raise MissingDependency("no_rensa", "near-duplicate detection requires the package rensa", hint=hint) from None


def minhash_signatures(conversations: Sequence[Conversation]) -> NDArray[np.uint32]:
    """Return a MinHash signature of each conversation, and a hash of the parts that are equal in near-duplicates.

    Returns:
        uint32 `[conversations, SIZE]`, with the hash of the equal parts in the last two columns.
    """
    from rensa import RMinHash

    sets = [_shingles(_word_pattern().findall("\n".join(_texts(item)).casefold())) for item in conversations]
    rows = RMinHash.digest_matrix_from_token_sets(sets, PERMUTATIONS, _SEED).to_rows()
    hashes = np.asarray([_hash_context(item) for item in conversations], dtype=np.uint64).view(np.uint32)
    return np.concatenate((np.asarray(rows, dtype=np.uint32).reshape(-1, PERMUTATIONS), hashes.reshape(-1, 2)), axis=1)


def _hash_context(conversation: Conversation) -> int:
    untrained = [index for index, message in enumerate(conversation.messages) if message.get("train") is False]
    systems = [message.get("content") for message in conversation.messages if message["role"] in _SYSTEM]
    parts = [systems, conversation.tools, untrained, dict(conversation.kwargs)]
    return xxhash.xxh3_64_intdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def _texts(conversation: Conversation) -> Iterator[str]:
    if conversation.text is not None:
        yield conversation.text
    for message in chain.from_iterable(part.messages for part in conversation.parts):
        if message["role"] not in _SYSTEM:
            yield from _texts_of_value([message.get(key) for key in ("reasoning_content", "content", "tool_calls")])
    if conversation.tokens is not None:
        yield " ".join(map(str, conversation.tokens.input_ids.tolist()))


def _texts_of_value(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_of_value(inner)
    elif value is not None:
        yield str(value.get("text")) if "text" in value else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _shingles(words: Sequence[str]) -> list[str]:
    return [" ".join(words[start : start + _WORDS]) for start in range(max(len(words) - _WORDS + 1, 1))]


def first_similar(minhashes: NDArray[np.uint32], threshold: float) -> NDArray[np.int64]:
    """For each row, return the index of the similar earlier row that replaces it, or the row's own index.

    A row is kept if it is similar to no earlier kept row, so a removed row never causes the removal of another row.

    Args:
        minhashes: uint32 `[rows, SIZE]`.
        threshold: the minimum similarity.

    Returns:
        int64 `[rows]`.
    """
    first = np.arange(len(minhashes))
    labels = similarity_groups(minhashes, threshold)
    order = np.argsort(labels, kind="stable")
    bounds = np.flatnonzero(np.diff(labels[order], prepend=-1, append=-1) != 0)
    for start, end in pairwise(bounds.tolist()):
        unique_rows: list[int] = []
        for row in order[start:end].tolist() if end - start > 1 else ():
            candidates = minhashes[unique_rows]
            is_similar = (candidates[:, :PERMUTATIONS] == minhashes[row, :PERMUTATIONS]).mean(axis=1) >= threshold
            is_similar &= (candidates[:, PERMUTATIONS:] == minhashes[row, PERMUTATIONS:]).all(axis=1)
            if is_similar.any():
                first[row] = unique_rows[int(is_similar.argmax())]
            else:
                unique_rows.append(row)
    return first


def similarity_groups(minhashes: NDArray[np.uint32], threshold: float) -> NDArray[np.int64]:
    """Group rows that are connected by a chain of similar rows. Tools, system messages and training masks are ignored.

    Returns:
        int64 `[rows]`, the label of each row's group.
    """
    minhashes = minhashes[:, :PERMUTATIONS]
    labels = np.arange(len(minhashes))
    for start in range(0, PERMUTATIONS, _BAND):
        band = np.ascontiguousarray(minhashes[:, start : start + _BAND]).view(f"V{4 * _BAND}").ravel()
        _, bucket = np.unique(band.view(f"S{4 * _BAND}"), return_inverse=True)
        left, right = _candidate_pairs(bucket)
        is_similar = _are_similar(minhashes, left, right, threshold)
        _connect(labels, left[is_similar], right[is_similar])
    return labels


def _candidate_pairs(bucket: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pairs of rows to compare: each row with the previous row and with the first row of its bucket."""
    order = np.argsort(bucket, kind="stable")
    # In this order, the rows of a bucket are consecutive. Until the next bucket begins, the running maximum is the
    # position at which the current bucket began.
    is_first = np.diff(bucket[order], prepend=-1) != 0
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    later = np.flatnonzero(~is_first)
    return np.concatenate((order[later - 1], order[first[later]])), np.tile(order[later], 2)


def _are_similar(
    minhashes: NDArray[np.uint32], left: NDArray[np.int64], right: NDArray[np.int64], threshold: float
) -> NDArray[np.bool_]:
    steps = [slice(start, start + _PAIRS_PER_STEP) for start in range(0, len(left), _PAIRS_PER_STEP)]
    parts = [(minhashes[left[step]] == minhashes[right[step]]).mean(axis=1) >= threshold for step in steps]
    return np.concatenate([np.empty(0, np.bool_), *parts])


def _connect(labels: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
    """Merge the groups of the rows `left[i]` and `right[i]`, for each i. Change the group labels in place.

    The label of a group is the number of one of its rows. In each round, the labels of both rows of a pair, and the
    labels of the rows with these numbers, are replaced by the smaller label. Then each row takes the label of the row
    that its label names. The rounds end when the labels in every pair are equal.
    """
    while (labels[left] != labels[right]).any():
        smallest = np.minimum(labels[left], labels[right])
        for side in (left, right):
            np.minimum.at(labels, labels[side], smallest)
            np.minimum.at(labels, side, smallest)
        labels[:] = labels[labels]


def merge_labels(labels: NDArray[np.int64], equal: NDArray[np.generic]) -> NDArray[np.int64]:
    """Merge the groups of all rows that have the same value in `equal`. Return the new group label of each row."""
    _, first, inverse = np.unique(equal, return_index=True, return_inverse=True)
    merged = labels.copy()
    _connect(merged, first[inverse], np.arange(len(labels)))
    return merged
