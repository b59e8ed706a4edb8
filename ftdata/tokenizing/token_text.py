"""Decode each token to text separately, for data that contains only token ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ftdata.tokenizing.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
"""The character that decoders return for bytes that are not a complete character."""
_MAX_TOKENS_PER_CHARACTER = 16
"""A character that is split into more tokens than this is not joined."""


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token. If several tokens form one character, only the first token has text."""
    cache = _text_cache(tokenizer)
    texts = [cache[id_] if id_ in cache else cache.setdefault(id_, _decode_inside(tokenizer, [id_])) for id_ in ids]
    start = 0
    while start < len(texts):
        if _REPLACEMENT in texts[start]:
            end = _find_character_end(tokenizer, ids, start)
            texts[start:end] = [_decode_inside(tokenizer, ids[start:end]), *[""] * (end - start - 1)]
            start = end
        else:
            start += 1
    # Some tokenizers prepend a space to every text when they encode it, and remove it when they decode.
    if texts and texts[0].startswith(" ") and not tokenizer.decode(ids[:8]).startswith(" "):
        texts[0] = texts[0][1:]
    return texts


@lru_cache(maxsize=8)
def _text_cache(tokenizer: Tokenizer) -> dict[int, str]:  # noqa: ARG001  (the argument is the cache key)
    return {}


def _find_character_end(tokenizer: Tokenizer, ids: Sequence[int], start: int) -> int:
    """Return the index after the first tokens from `start` on that together form complete characters.

    Return `start + 1` if the tokens do not form complete characters.
    """
    for end in range(start + 2, min(start + _MAX_TOKENS_PER_CHARACTER, len(ids)) + 1):
        if _REPLACEMENT not in _decode_inside(tokenizer, ids[start:end]):
            return end
    return start + 1


@lru_cache(maxsize=8)
def _find_prefix(tokenizer: Tokenizer) -> tuple[tuple[int, ...], str]:
    """Return the ids and text of a prefix token, because decoders may remove a space at the start of a text."""
    for character in ("a", "A", "0"):
        ids = tokenizer.encode([character])[0].ids[-1:].tolist()
        if ids and (text := tokenizer.decode(ids)) and tokenizer.decode(ids * 2).startswith(text):
            return tuple(ids), text
    return (), ""


def _decode_inside(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Decode ids as if they were in the middle of a text, so that a leading space is kept."""
    prefix, text = _find_prefix(tokenizer)
    return tokenizer.decode([*prefix, *ids]).removeprefix(text)
