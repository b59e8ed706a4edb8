"""Spelling: the text of each token, where tokens come without a text of their own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ftdata.tokenizing.tokenizer import Tokenizer

_BROKEN, _LONGEST = "\ufffd", 16
"""What stands for bytes that are no character, and how many tokens at most make one that is shown whole."""


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; of those that make a character together, the first one's is all of it."""
    known = _known(tokenizer)
    texts = [known[one] if one in known else known.setdefault(one, _decoded(tokenizer, [one])) for one in ids]
    at = 0
    while at < len(texts):
        if _BROKEN in texts[at]:
            end = _whole(tokenizer, ids, at)
            texts[at:end] = [_decoded(tokenizer, ids[at:end]), *[""] * (end - at - 1)]
            at = end
        else:
            at += 1
    # A blank that is put before every text, and taken away again, is none of the text's.
    if texts and texts[0].startswith(" ") and not tokenizer.decode(ids[:8]).startswith(" "):
        texts[0] = texts[0][1:]
    return texts


@lru_cache(maxsize=8)
def _known(tokenizer: Tokenizer) -> dict[int, str]:  # noqa: ARG001  (each has its own)
    return {}


def _whole(tokenizer: Tokenizer, ids: Sequence[int], at: int) -> int:
    """Return before which token the characters end that begin with this one; the next where they never do."""
    for end in range(at + 2, min(at + _LONGEST, len(ids)) + 1):
        if _BROKEN not in _decoded(tokenizer, ids[at:end]):
            return end
    return at + 1


@lru_cache(maxsize=8)
def _before(tokenizer: Tokenizer) -> tuple[tuple[int, ...], str]:
    """Return a token to put before others, and its text: decoders take away the blank with which a text begins."""
    for letter in ("a", "A", "0"):
        ids = tokenizer.encode([letter])[0].ids[-1:].tolist()
        if ids and (text := tokenizer.decode(ids)) and tokenizer.decode(ids * 2).startswith(text):
            return tuple(ids), text
    return (), ""


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    before, text = _before(tokenizer)
    return tokenizer.decode([*before, *ids]).removeprefix(text)
