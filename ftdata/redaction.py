"""Remove secrets from values and texts before they are written or printed.

A secret is recognized by its name (`hub_token`, `password`, `aws_secret_access_key`) or by its value: a Hugging Face,
OpenAI, AWS, GitHub, GitLab, Slack or Google credential, the credentials of a URL, a signed query parameter, or the
value of an environment variable whose name says that it is a secret.

Names of vocabulary tokens (`eos_token`, `max_new_tokens`) are not secrets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

REDACTED = "[redacted-by-ftdata]"
"""The text that replaces a secret."""

_SHORTEST_EXACT, _SHORTEST_PART = 4, 8
"""Characters of an environment variable that are compared with a whole value, and searched for inside of texts."""

_SECRETS = re.compile(
    r"secret|password|passwd|passphrase|apikey|accesskey|privatekey|accountkey|signingkey|encryptionkey|wandbkey"
    r"|credential|authorization|bearer|sastoken"
)
_JOINED_TOKENS = re.compile(r"(?:access|auth|api|hf|hub|id|private|refresh|session|user)token$")
_PLACES = ("path", "dir", "folder", "file")
"""A name that ends so holds the place of a secret, such as `HF_TOKEN_PATH`."""

_VOCABULARY = frozenset(
    [
        "additional",
        "assistant",
        "audio",
        "begin",
        "boi",
        "bol",
        "bos",
        "boundary",
        "cls",
        "control",
        "decoder",
        "delimiter",
        "end",
        "eod",
        "eoi",
        "eol",
        "eom",
        "eos",
        "eot",
        "extra",
        "fill",
        "fim",
        "first",
        "forced",
        "image",
        "last",
        "mask",
        "middle",
        "new",
        "next",
        "null",
        "pad",
        "padding",
        "prefix",
        "sep",
        "separator",
        "special",
        "start",
        "stop",
        "suffix",
        "system",
        "think",
        "tool",
        "unk",
        "unknown",
        "user",
        "video",
        "vision",
        "word",
    ]
)
"""Words before `token` that make it an entry of a vocabulary."""

_SWITCHES = ("true", "false", "none", "null")
_SPECIAL = re.compile(r"<.*>|\[.*\]|\{.*\}", re.DOTALL)
"""How the text of a vocabulary token looks."""

_VALUES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_(?=[A-Za-z]*[0-9A-Z])[A-Za-z0-9]{10,}|hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}"
    r"|sk-(?=[\w-]*[0-9A-Z])[\w-]{16,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Z])"
    r"|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abeprs]-[\w-]{10,}|AIza[\w-]{35}"
    r")"
)
_USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*://)(?P<user>[^\s/?#@:\"'<>]*)(?P<rest>:[^\s/?#\"'<>]*)?@")
_QUERY = re.compile(r"(?<=[?&;])(?P<name>[\w.%-]+)=(?P<value>[^\s&;#\"'<>]+)")
_SIGNATURES = frozenset(("sig", "signature", "xamzsignature", "xgoogsignature", "token", "key"))
_ASSIGNED = re.compile(
    r"(?P<name>(?<![\w.%-])[A-Za-z][\w.-]*)(?P<between>=|[\"']\s*[:=]\s*)(?P<quote>[\"']?)(?P<value>[^\s\"',;&]+)"
)


def is_secret_name(name: str) -> bool:
    """Return whether a key names a secret.

    >>> [is_secret_name(name) for name in ("hub_token", "AWS_SECRET_ACCESS_KEY", "apiKey", "X-Auth-Token")]
    [True, True, True, True]
    >>> [is_secret_name(name) for name in ("eos_token", "max_new_tokens", "pad_token_id", "tokenizer", "HF_TOKEN_PATH")]
    [False, False, False, False, False]
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = [word.lower() for word in re.findall(r"[^\W_]+", spaced)]
    while words and words[-1].isdecimal():
        words.pop()
    if not words or words[-1] in _PLACES:
        return False
    if _SECRETS.search("".join(words)) or _JOINED_TOKENS.fullmatch(words[-1]):
        return True
    return words[-1] == "token" and not _VOCABULARY.intersection(words[:-1])


def redact(value: Any) -> Any:
    """Return a value without its secrets: a text, or mappings and sequences of values, which are copied.

    A secret in a field of a secret name is replaced as a whole; elsewhere, only the secret part of a text is.
    Numbers, booleans and null stay, except numbers that a password or key consists of.

    >>> redact({"hub_token": "abc", "eos_token": "</s>", "data": ["https://me:pw@host/d.json"]})
    {'hub_token': '[redacted-by-ftdata]', 'eos_token': '</s>', 'data': ['https://[redacted-by-ftdata]@host/d.json']}
    """
    return _redacted(value, tuple(_environment()))


def redact_for_storage(value: Any) -> Any:
    r"""Return names and options as they may be stored: without secrets, and as Unicode that every reader of JSON takes.

    Names of files need not be UTF-8. Python represents the bytes that are not by lone surrogates.

    >>> redact_for_storage({"path": "a" + chr(0xDCFF)})["path"].isascii()
    True
    """
    value = redact(value)
    if isinstance(value, Mapping):
        return {key: redact_for_storage(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact_for_storage(inner) for inner in value)
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Return a text, such as a message or a log line, without its secrets; also those in `name=value`.

    >>> redact_text("train.hub_token='abc' was passed to https://host/?token=abc&n=1")
    "train.hub_token='[redacted-by-ftdata]' was passed to https://host/?token=[redacted-by-ftdata]&n=1"
    """
    return _ASSIGNED.sub(_assignment, _plain(text, tuple(_environment())))


def is_redacted(value: Any) -> bool:
    """Return whether a value, or a part of it, was redacted."""
    if isinstance(value, Mapping):
        return any(is_redacted(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return any(is_redacted(inner) for inner in value)
    return isinstance(value, str) and REDACTED in value


def drop_redacted(values: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Return a mapping without the fields whose whole value was redacted, and their names, such as `train.hub_token`.

    >>> drop_redacted({"model": "m", "train": {"hub_token": "[redacted-by-ftdata]", "seed": 1}})
    ({'model': 'm', 'train': {'seed': 1}}, ['train.hub_token'])
    """
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for name, value in values.items():
        if value == REDACTED:
            dropped.append(f"{prefix}{name}")
        elif isinstance(value, Mapping):
            kept[name], more = drop_redacted(value, f"{prefix}{name}.")
            dropped += more
        else:
            kept[name] = value
    return kept, dropped


def _redacted(value: Any, known: tuple[str, ...], name: str = "", *, secret: bool = False) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _redacted(inner, known, str(key), secret=secret or is_secret_name(str(key)))
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_redacted(inner, known, name, secret=secret) for inner in value]
    if isinstance(value, tuple):
        return tuple(_redacted(inner, known, name, secret=secret) for inner in value)
    if isinstance(value, str):
        return REDACTED if secret and _hides(name, value) else _plain(value, known)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return REDACTED if secret and is_number and not name.lower().endswith("token") else value


def _hides(name: str, value: str) -> bool:
    """Return whether the text of a field of a secret name is one: an unknown `..._token` may hold `<|end|>`."""
    return bool(value) and not (name.lower().endswith("token") and _SPECIAL.fullmatch(value) and value != REDACTED)


def _plain(text: str, known: tuple[str, ...]) -> str:
    if text in known:
        return REDACTED
    for value in known:
        if len(value) >= _SHORTEST_PART:
            text = text.replace(value, REDACTED)
    if "://" in text:
        text = _QUERY.sub(_parameter, _USER_INFO.sub(_without_user, text))
    return _VALUES.sub(REDACTED, text)


def _without_user(found: re.Match[str]) -> str:
    # A name alone may be a token of the web; elsewhere it is a name, such as that of `ssh://git@host`.
    is_secret = found["rest"] is not None or (found["user"] and found["scheme"].startswith("http"))
    return f"{found['scheme']}{REDACTED}@" if is_secret else found[0]


def _parameter(found: re.Match[str]) -> str:
    name = found["name"]
    is_secret = is_secret_name(name) or re.sub(r"[\W_]", "", name).lower() in _SIGNATURES
    return f"{name}={REDACTED}" if is_secret else found[0]


def _assignment(found: re.Match[str]) -> str:
    name = found["name"].rpartition(".")[2]
    # `token` alone is also what parsers report: "expected token='x'".
    is_secret = name.lower() != "token" and is_secret_name(name) and _hides(name, found["value"])
    return f"{found['name']}{found['between']}{found['quote']}{REDACTED}" if is_secret else found[0]


def _environment() -> Iterator[str]:
    """Yield the values of environment variables whose names say that they are secrets, longest first."""
    found = {value for name, value in os.environ.items() if len(value) >= _SHORTEST_EXACT and is_secret_name(name)}
    # `HF_HUB_DISABLE_IMPLICIT_TOKEN=true` is a switch.
    yield from sorted((value for value in found if value.lower() not in _SWITCHES), key=len, reverse=True)
