"""Remove secrets from values and texts before they are written or printed.

A secret is recognized by its name (`hub_token`, `password`, `aws_secret_access_key`) or by its value: a Hugging Face,
OpenAI, AWS, GitHub, GitLab, Slack or Google credential, the credentials of a URL, a signed query parameter, or the
value of an environment variable with the name of a secret.

Names of vocabulary tokens (`eos_token`, `max_new_tokens`) are not secrets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

REDACTED = "[redacted-by-ftdata]"
"""The text that replaces a secret."""

_SHORTEST_EXACT, _SHORTEST_PART = 4, 8
"""Minimum length of an environment variable to be compared with whole values, and to be searched for in texts."""

_SECRET_WORDS = re.compile(
    r"secret|password|passwd|passphrase|apikey|accesskey|privatekey|accountkey|signingkey|encryptionkey|wandbkey"
    r"|credential|authorization|bearer|sastoken"
)
_JOINED_TOKENS = re.compile(r"(?:access|auth|api|hf|hub|id|private|refresh|session|user)token$")
_PATH_WORDS = ("path", "dir", "folder", "file")
"""A name that ends with one of these words contains the path of a secret, such as `HF_TOKEN_PATH`."""

_VOCABULARY_WORDS = {
    "additional", "assistant", "audio", "begin", "boi", "bol", "bos", "boundary", "cls", "control", "decoder",
    "delimiter", "end", "eod", "eoi", "eol", "eom", "eos", "eot", "extra", "fill", "fim", "first", "forced",
    "image", "last", "mask", "middle", "new", "next", "null", "pad", "padding", "prefix", "sep", "separator",
    "special", "start", "stop", "suffix", "system", "think", "tool", "unk", "unknown", "user", "video",
    "vision", "word",
}  # fmt: skip
"""Words before `token` in the names of vocabulary tokens, such as `eos_token`."""

_SWITCHES = ("true", "false", "none", "null")
_SPECIAL_TOKEN = re.compile(r"<.*>|\[.*\]|\{.*\}", re.DOTALL)
"""Matches the text of special tokens."""

_CREDENTIALS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_(?=[A-Za-z]*[0-9A-Z])[A-Za-z0-9]{10,}|hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}"
    r"|sk-(?=[\w-]*[0-9A-Z])[\w-]{16,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Z])(?::[^\s\"'<>@]+(?=@))?"
    r"|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abeprs]-[\w-]{10,}|AIza[\w-]{35}"
    r")"
)
_USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*:/{1,2})(?P<user>[^\s/?#@:\"'<>]*)(?P<password>:[^\s/?#\"'<>]*)?@")
_QUERY = re.compile(r"(?<=[?&;#])(?P<name>[\w.%-]+)=(?P<value>[^\s&;#\"'<>]+)")
_SIGNATURES = {"auth", "code", "jwt", "key", "pwd", "sig", "signature", "token", "xamzsignature", "xgoogsignature"}
_ASSIGNED = re.compile(
    r"(?P<name>(?<![\w.%-])[A-Za-z][\w.-]*)(?P<between>=|[\"']\s*[:=]\s*)(?P<quote>[\"']?)(?P<value>[^\s\"',;&]+)"
)


@lru_cache(maxsize=1024)
def is_secret_name(name: str) -> bool:
    """Return whether the name of a field or variable indicates that its value is a secret.

    >>> [is_secret_name(name) for name in ("hub_token", "AWS_SECRET_ACCESS_KEY", "apiKey", "X-Auth-Token")]
    [True, True, True, True]
    >>> [is_secret_name(name) for name in ("eos_token", "max_new_tokens", "pad_token_id", "tokenizer", "HF_TOKEN_PATH")]
    [False, False, False, False, False]
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = [word.lower() for word in re.findall(r"[^\W_]+", spaced)]
    while words and words[-1].isdecimal():
        words.pop()
    if not words or words[-1] in _PATH_WORDS:
        return False
    if _SECRET_WORDS.search("".join(words)) or _JOINED_TOKENS.fullmatch(words[-1]):
        return True
    return words[-1] == "token" and not _VOCABULARY_WORDS.intersection(words[:-1])


def redact(value: Any) -> Any:
    """Return a copy of a text, mapping or sequence in which all secrets are replaced.

    In a field with the name of a secret, the whole value is replaced; in other fields, only the secret part of the
    text. Numbers are replaced in fields with the name of a password or key; booleans and null are never replaced.

    >>> redact({"hub_token": "abc", "eos_token": "</s>", "data": ["https://me:pw@host/d.json"]})
    {'hub_token': '[redacted-by-ftdata]', 'eos_token': '</s>', 'data': ['https://[redacted-by-ftdata]@host/d.json']}
    """
    return _redact_value(value, tuple(_environment_secrets()))


def redact_for_storage(value: Any) -> Any:
    r"""Redact secrets in a value that is stored as JSON. Also escape lone surrogates, which JSON files cannot contain.

    Python represents the bytes of file names that are not UTF-8 by lone surrogates.

    >>> redact_for_storage({"path": "a" + chr(0xDCFF)})["path"].isascii()
    True
    """
    return map_texts(redact(value), lambda text: text.encode("utf-8", "backslashreplace").decode())


def map_texts(value: Any, change: Callable[[str], Any]) -> Any:
    """Return a copy of a value in which `change` is applied to all texts in mappings, lists and tuples, except keys."""
    if isinstance(value, Mapping):
        return {key: map_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_texts(inner, change) for inner in value)
    return change(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Replace the secrets in a message or log line, such as the value in `hub_token=abc`.

    >>> redact_text("train.hub_token='abc' was passed to https://host/?token=abc&n=1")
    "train.hub_token='[redacted-by-ftdata]' was passed to https://host/?token=[redacted-by-ftdata]&n=1"
    """
    return _ASSIGNED.sub(_redact_assignment, _redact_plain(text, tuple(_environment_secrets())))


def is_redacted(value: Any) -> bool:
    """Return whether a value contains the placeholder of a redacted secret."""
    texts: list[str] = []
    map_texts(value, texts.append)
    return any(REDACTED in text for text in texts)


def drop_redacted(values: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Remove the fields whose whole value was redacted. Return the remaining fields and the removed names.

    >>> drop_redacted({"model": "m", "train": {"hub_token": "[redacted-by-ftdata]", "seed": 1}})
    ({'model': 'm', 'train': {'seed': 1}}, ['train.hub_token'])
    """
    remaining: dict[str, Any] = {}
    dropped: list[str] = []
    for name, value in values.items():
        if value == REDACTED:
            dropped.append(f"{prefix}{name}")
        elif isinstance(value, Mapping):
            remaining[name], inner_names = drop_redacted(value, f"{prefix}{name}.")
            dropped += inner_names
        else:
            remaining[name] = value
    return remaining, dropped


def _redact_value(value: Any, secrets: tuple[str, ...], name: str = "", *, is_secret: bool = False) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _redact_value(inner, secrets, str(key), is_secret=is_secret or is_secret_name(str(key)))
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        items = [_redact_value(inner, secrets, name, is_secret=is_secret) for inner in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, str):
        return REDACTED if is_secret and _is_secret_text(name, value) else _redact_plain(value, secrets)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return REDACTED if is_secret and is_number and not name.lower().endswith("token") else value


def _is_secret_text(name: str, value: str) -> bool:
    """Return whether the value of a secret field is a secret. Special tokens such as `<|end|>` are not."""
    is_special_token = name.lower().endswith("token") and _SPECIAL_TOKEN.fullmatch(value) and value != REDACTED
    return bool(value) and not is_special_token


def _redact_plain(text: str, secrets: tuple[str, ...]) -> str:
    if text in secrets:
        return REDACTED
    for value in secrets:
        if len(value) >= _SHORTEST_PART:
            text = text.replace(value, REDACTED)
    if ":/" in text:
        text = _QUERY.sub(_redact_parameter, _USER_INFO.sub(_redact_user_info, text))
    return _CREDENTIALS.sub(REDACTED, text)


def _redact_user_info(match: re.Match[str]) -> str:
    # A user name without a password can be a token in http URLs; in other URLs it is a name, as in `ssh://git@host`.
    is_secret = match["password"] is not None or (match["user"] and match["scheme"].startswith("http"))
    return f"{match['scheme']}{REDACTED}@" if is_secret else match[0]


def _redact_parameter(match: re.Match[str]) -> str:
    name = match["name"]
    is_secret = is_secret_name(name) or re.sub(r"[\W_]", "", name).lower() in _SIGNATURES
    return f"{name}={REDACTED}" if is_secret else match[0]


def _redact_assignment(match: re.Match[str]) -> str:
    name = match["name"].rpartition(".")[2]
    # `token` alone is not a secret, because parsers report "expected token='x'".
    is_secret = name.lower() != "token" and is_secret_name(name) and _is_secret_text(name, match["value"])
    return f"{match['name']}{match['between']}{match['quote']}{REDACTED}" if is_secret else match[0]


def _environment_secrets() -> Iterator[str]:
    """Yield the values of all environment variables that contain secrets, longest first."""
    values = {value for name, value in os.environ.items() if len(value) >= _SHORTEST_EXACT and is_secret_name(name)}
    # `HF_HUB_DISABLE_IMPLICIT_TOKEN=true` is a switch.
    yield from sorted((value for value in values if value.lower() not in _SWITCHES), key=len, reverse=True)
