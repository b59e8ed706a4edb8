"""Read the added tokens that the configuration of a tokenizer declares."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftdata.tokenizing.formats.specification import ConversionError, make_added_token

_STRIPPING = ("lstrip", "rstrip", "single_word")

_HINT = "correct added_tokens_decoder in tokenizer_config.json"


def read_added_tokens(config: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return the added tokens in `tokenizer_config.json` and in `added_tokens.json`.

    Raises:
        ConversionError: an entry is invalid.
    """
    try:
        tokens = [_read_token(id_, token) for id_, token in (config.get("added_tokens_decoder") or {}).items()]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        problem = f"added_tokens_decoder in tokenizer_config.json is invalid: {error}"
        raise ConversionError(problem, 'expected {"ID": {"content": "TEXT", "special": true}, ...}') from None
    file = folder / "added_tokens.json"
    if not file.is_file():
        return tokens
    special = {*named_tokens(config)}
    try:
        entries = json.loads(file.read_text("utf-8")).items()
        return merge_added_tokens(
            tokens, [make_added_token(_read_id(id_), text, special=text in special) for text, id_ in entries]
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ConversionError(f"added_tokens.json is invalid: {error}", 'expected {"TEXT": ID, ...}') from None


def _read_token(id_: Any, token: Mapping[str, Any]) -> dict[str, Any]:
    text = token["content"]
    if not isinstance(text, str) or not text:
        raise ValueError(f"the content {text!r} of token {id_} is no text")
    text.encode()
    for name in ("special", *_STRIPPING):
        if not isinstance(token.get(name, False), bool):
            raise TypeError(f"{name} of token {id_} is {token[name]!r}, expected true or false")
    made = make_added_token(_read_id(id_), text, special=token.get("special", False))
    return made | {name: token[name] for name in _STRIPPING if name in token}


def _read_id(id_: Any) -> int:
    number = int(id_)
    if not 0 <= number < 1 << 26:
        raise ValueError(f"the id {number} is out of range")
    return number


def merge_added_tokens(own: Sequence[dict[str, Any]], declared: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add declared tokens to those of the tokenizer's file.

    Raises:
        ConversionError: two tokens have the same id or the same text.
    """
    merged = {token["id"]: token for token in own}
    ids = {token["content"]: token["id"] for token in own}
    for token in declared:
        id_, text = token["id"], token["content"]
        if (other := merged.get(id_, token)["content"]) != text:
            raise ConversionError(f"the token {text!r} has the id {id_}, which is the id of {other!r}", _HINT)
        if ids.setdefault(text, id_) != id_:
            raise ConversionError(f"the token {text!r} has the ids {ids[text]} and {id_}", _HINT)
        stripping = {name: token[name] for name in _STRIPPING}
        merged[id_] = {**merged[id_], **stripping} if id_ in merged else token
    return [merged[id_] for id_ in sorted(merged)]


def check_stripping(tokens: Sequence[Mapping[str, Any]]) -> None:
    """Check that no token strips the whitespace around it, because the library of the vendor does not.

    Raises:
        ConversionError: a token has `lstrip`, `rstrip` or `single_word`.
    """
    for token in tokens:
        if names := [name for name in _STRIPPING if token[name]]:
            problem = f"the token {token['content']!r} has {names[0]}: true, which sentencepiece does not support"
            raise ConversionError(problem, f"set {names[0]} to false in added_tokens_decoder")


def named_tokens(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of the tokens that a configuration names, such as `eos_token` and `additional_special_tokens`."""
    for key, value in config.items():
        is_list = key in ("additional_special_tokens", "extra_special_tokens")
        if is_list:
            items = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else []
        elif key.endswith("_token") and not key.startswith(("add_", "use_")):
            items = [value]
        else:
            continue
        for item in items:
            text = item.get("content") if isinstance(item, Mapping) else item
            if isinstance(text, str) and text:
                yield text


def check_named_tokens(config: Mapping[str, Any], vocabulary: Container[str]) -> None:
    """Check that each token that a configuration names has an id. Otherwise, the template would print it as text.

    Raises:
        ConversionError: a token has no id.
    """
    for text in named_tokens(config):
        if text not in vocabulary:
            problem = f"tokenizer_config.json or special_tokens_map.json names the token {text!r}, which has no id"
            raise ConversionError(problem, "add its id and text to added_tokens_decoder in tokenizer_config.json")
