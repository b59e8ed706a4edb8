"""The parts of a `tokenizer.json` that all converted tokenizers have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class ConversionError(Exception):
    """A tokenizer cannot be converted. The arguments are the problem and how to fix it."""

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem)
        self.problem, self.hint = problem, hint


def make_specification(
    model: Mapping[str, Any], added_tokens: Sequence[Mapping[str, Any]], **stages: Any
) -> dict[str, Any]:
    """Return the content of `tokenizer.json`.

    Args:
        model: the section `model`.
        added_tokens: the added tokens.
        stages: the sections `normalizer`, `pre_tokenizer` and `decoder`.
    """
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, **stages, "added_tokens": list(added_tokens), "model": {**_MODEL, **model}}


_MODEL = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
}


def make_added_token(id_: int, content: str, *, special: bool = True, normalized: bool = False) -> dict[str, Any]:
    """Return an added token as in `tokenizer.json`. It matches its exact text, or the normalized text."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": id_, "content": content, **flags, "normalized": normalized, "special": special}


def prepend_token(token: str, id_: int) -> dict[str, Any]:
    """Return a section `post_processor` that prepends a token, such as BOS, to each text."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    second = [first, text, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {token: {"id": token, "ids": [id_], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [first, text], "pair": second, "special_tokens": tokens}
