"""Detect: wrong encodings, placeholders, scripts, and what looks as if it belonged to a person, in a text."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect
from collections.abc import Iterator
from functools import lru_cache

_CONTINUED = "\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MOJIBAKE = re.compile(
    "|".join(
        (
            "â€[™˜œ“”¢¦¹º\x93\x94\x98\x99\x9c\x9d]",  # quotation marks and dots in UTF-8, read as Windows-1252
            "Ã[\u0080-\u00aa\u00ac-\u00ba\u00bc-\u00beŸ‰Šœ]",  # é è à ü ß É
            "Â[\u00a0°£©®·±²³´¼½¾§¢]",
            f"(?:[ÐÑ][{_CONTINUED}]){{2}}",  # Cyrillic
            f"(?:[ä-é][{_CONTINUED}]{{2}}){{2}}",  # Chinese, Japanese, Korean
            f"ðŸ[{_CONTINUED}]{{2}}",
            "ï»¿|\ufffd",
        )
    )
)


def mojibake(text: str) -> str | None:
    """Return a text decoded with a wrong encoding, with what is around it; `None` where there is none.

    >>> mojibake("it was Ã©tÃ©"), mojibake("un été à São Paulo, «MANHÃ»")
    ('it was Ã©tÃ©', None)
    """
    if text.isascii() or not (found := _MOJIBAKE.search(text)):
        return None
    return text[max(found.start() - 12, 0) : found.end() + 12]


_NOTHING = frozenset(
    ("n/a", "nan", "null", "undefined", "todo", "tbd", "fixme", "lorem ipsum", "[removed]", "[deleted]", "#n/a")
)


def says_nothing(text: str) -> bool:
    """Whether a text is a placeholder, or has no letter, digit or symbol in it, but punctuation alone.

    >>> [says_nothing(text) for text in ("N/A", "...", "4", "👍", "√", "")]
    [True, True, False, False, False, True]
    """
    text = text.strip()
    if len(text) > 32:
        return False
    return text.casefold() in _NOTHING or all(unicodedata.category(char)[0] in "PZC" for char in text)


SCRIPTS = (
    *("Latin", "Greek", "Cyrillic", "Armenian", "Hebrew", "Arabic", "Indic", "Thai", "Georgian", "Hangul"),
    *("Kana", "Han"),
)
_KANA, _HAN, _LETTERS = 10, 11, 1000
_BLOCKS = {
    0x41: 0,
    0x370: 1,
    0x400: 2,
    0x530: 3,
    0x590: 4,
    0x600: 5,
    0x900: 6,
    0xE00: 7,
    0xE80: -1,
    0x10A0: 8,
    0x1100: 9,
    0x1200: -1,
    0x1E00: 0,
    0x1F00: 1,
    0x2000: -1,
    0x3040: 10,
    0x3130: 9,
    0x3190: -1,
    0x3400: 11,
    0xA000: -1,
    0xAC00: 9,
    0xD7B0: -1,
    0xF900: 11,
    0xFB00: -1,
    0x20000: 11,
}
"""Where blocks of Unicode begin, and the number of their script."""
_LATIN, _OTHERS = re.compile("[A-Za-z\u00c0-\u02af]"), re.compile("[\u0370-\U0010ffff]")
_BEGINS, _NUMBERS = list(_BLOCKS), list(_BLOCKS.values())


def script(text: str) -> int:
    """Return the number, of `SCRIPTS`, of that in which most letters of a text are written; -1 where there are none.

    Kana anywhere make a text Japanese, whatever Han is in it; it counts as Kana.

    >>> [SCRIPTS[script(text)] for text in ("hello", "привет", "年號", "これは本です")]
    ['Latin', 'Cyrillic', 'Han', 'Kana']
    """
    text = text[:_LETTERS]
    counts = [0] * (len(SCRIPTS) + 1)
    counts[0] = len(_LATIN.findall(text))
    for char in () if text.isascii() else filter(str.isalpha, _OTHERS.findall(text)):
        counts[_NUMBERS[bisect(_BEGINS, ord(char)) - 1]] += 1
    if counts[_KANA]:
        counts[_KANA] += counts[_HAN]
    most = max(range(len(SCRIPTS)), key=counts.__getitem__)
    return most if counts[most] else -1


_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_PERSONAL = {
    "e-mail address": r"(?<![\w.+-])\w[\w.+-]*@(?!example\.)[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b",
    "telephone number": r"(?<![\w.])(?:\+\d{1,3}[ .-]?(?:\(\d+\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){2,3}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}-\d{3}-\d{4})(?![\w-])",
    "social security number": r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])",
    "network address": rf"(?<![\w.])(?!10\.|127\.|0\.|192\.168\.|255\.)(?:{_OCTET}\.){{3}}{_OCTET}(?![\w.])",
    "secret key": r"\b(?:sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{36,}|AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{30,}"
    r"|xox[abpr]-[A-Za-z0-9-]{10,})|-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "card number": r"(?<![\w.-])[3-6](?:\d{12,18}|\d{3}(?:[ -]\d{4}){2}[ -]\d{1,7}|\d{3}[ -]\d{6}[ -]\d{5})(?![\w-])",
    "bank account": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b",
}


def personal(text: str) -> Iterator[tuple[str, str]]:
    """Yield what looks as if it belonged to a person: what kind of thing it is, and enough of it to find it again.

    Numbers of cards and of bank accounts count where their check digits are right.

    >>> list(personal("write to ada@lovelace.org, or pay with 4111 1111 1111 1111"))
    [('e-mail address', 'ada…rg'), ('card number', '411…11')]
    """
    for kind, pattern in _patterns().items():
        if kind == "e-mail address" and "@" not in text:
            continue
        for found in pattern.finditer(text):
            is_right = _CHECKED.get(kind)
            if is_right is None or is_right(re.sub(r"[ -]", "", found.group())):
                yield kind, f"{found.group()[:3]}…{found.group()[-2:]}"
                break


@lru_cache(maxsize=1)
def _patterns() -> dict[str, re.Pattern[str]]:
    return {kind: re.compile(pattern) for kind, pattern in _PERSONAL.items()}


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    return sum(sum(divmod(2 * int(one), 10)) if at % 2 else int(one) for at, one in enumerate(digits[::-1])) % 10 == 0


def _iban(text: str) -> bool:
    """ISO 13616: modulo 97."""
    return 15 <= len(text) <= 34 and int("".join(str(int(one, 36)) for one in text[4:] + text[:4])) % 97 == 1


_CHECKED = {"card number": _luhn, "bank account": _iban}
