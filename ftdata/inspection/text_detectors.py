"""Detect wrong encodings, placeholders, template text, writing systems and personal data in texts."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterator

_CONTINUED = "\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_SIGNS = "¡-ª¬-º¼-¾€‚ƒ„†‡ˆ‰Š‹ŒŽ•˜™š›œžŸ"
_MOJIBAKE = re.compile(
    "|".join(
        (
            "[\u0080-\u0084\u0086-\u009f]",  # Windows-1252 characters, decoded as Latin-1
            f"â[€‚„†‡ˆ‰•˜šœ\u0080-\u009f][{_CONTINUED}]",  # UTF-8 quotation marks, arrows, €, as Windows-1252
            "Ã[\u00a1-\u00aa\u00ac-\u00ba\u00bc-\u00beŸŒŽšž]|(?<![A-ZÀ-Þ])Ã\u00a0",  # é ü ñ ß, à
            "Ã[‡„…–˜‰Šœ›](?=[a-z])|(?<=[a-z])Ã[«»](?=[a-z])",  # Ç Ä Å Ö Ø before a lowercase letter
            "Â[¡-ª¬-º¼-¿€]|(?<![A-ZÀ-ÞĐ\u00a0‚‘“«])Â\u00a0|Â«(?=\\w)|(?<=[a-z])Â»",
            f"(?<=[A-Za-z])[ÄÅ][{_SIGNS}]|[ÄÅ][{_SIGNS}](?=[a-z])|È[˜™š›](?=[a-z])|Æ[°¡]",  # Polish, Czech, Turkish
            f"á[º»][{_CONTINUED}](?=[a-z])",  # Vietnamese
            f"(?:[\u00ce-\u00d1\u00d6-\u00db][{_CONTINUED}]){{2}}",  # Greek, Cyrillic, Hebrew, Arabic
            f"(?:[à-ï][{_CONTINUED}]{{2}}){{2}}",  # Indic scripts, Thai, Chinese, Japanese, Korean
            f"ðŸ[{_CONTINUED}]{{2}}",
            "(?:Р[°±ІіґµЅѕїј»є№ёќџ’Ўњћў]|С[‚ѓ„…†‡€‰Љ‹ЊЏЃ\u0080-\u0098]){3}",  # UTF-8 Cyrillic, as Windows-1251
            "ï»¿|\ufffd",
        )
    )
)


def find_mojibake(text: str) -> str | None:
    """Find characters that were decoded with the wrong encoding.

    Return an excerpt around the first match, or `None`.

    >>> find_mojibake("it was Ã©tÃ©"), find_mojibake("un été à São Paulo, «MANHÃ»")
    ('it was Ã©tÃ©', None)
    """
    if text.isascii() or not (match := _MOJIBAKE.search(text)):
        return None
    return text[max(match.start() - 12, 0) : match.end() + 12]


_PLACEHOLDER_ANSWERS = frozenset(
    (
        *("n/a", "n/a.", "n.a.", "#n/a", "todo", "tbd", "fixme", "lorem ipsum", "[removed]", "[deleted]", "<noinput>"),
        *("<nooutput>", "no answer", "no answer.", "[insert answer here]", "[answer]", "answer here"),
    )
)


def is_placeholder_text(text: str) -> bool:
    """Return whether a text is a placeholder, such as "N/A", or contains only dots and dashes.

    >>> [is_placeholder_text(text) for text in ("N/A", "nan", "...", "–", "-", "4", "%", "NaN", "👍", "")]
    [True, True, True, True, False, False, False, False, False, True]
    """
    text = text.strip()
    if len(text) > 32 or text == "-":
        return False
    # pandas writes missing values as "nan"; other spellings, such as "NaN", can be real answers.
    return text == "nan" or text.casefold() in _PLACEHOLDER_ANSWERS or not text.strip(".…-–—_。・ ")


_REFUSAL = re.compile(
    r"\W*(?:(?:i am|i'm|i’m) (?:really |very |so )?sorry\b.{0,40}?\b(?:can't|can’t|cannot|can not|unable|won't|won’t)"
    r"|(?:sorry|unfortunately|i apologi[sz]e)\b.{0,40}?\bi (?:can't|can’t|cannot|can not|am unable|won't|won’t)"
    r"|i (?:can't|can’t|cannot|can not|won't|won’t|will not|am not able to|am unable to) "
    r"(?:help|assist|provide|create|write|generate|answer|comply|fulfill|do that|support|discuss|engage|give)\b"
    r"|as an ai\b.{0,60}?\bi (?:can't|can’t|cannot|can not|don't|don’t|do not|am not able|am unable))",
    re.IGNORECASE | re.DOTALL,
)


def is_refusal(text: str) -> bool:
    """Return whether an English answer begins with a refusal.

    >>> [is_refusal(text) for text in ("I'm sorry, but I can't help with that.", "I can't believe it!", "Sorry, 5.")]
    [True, False, False]
    """
    return _REFUSAL.match(text) is not None


_CONTROL = "|".join(
    (
        *("im_start", "im_end", "im_sep", "eot_id", "eom_id", "eot", "begin_of_text", "end_of_text", "endoftext"),
        *("start_header_id", "end_header_id", "header_start", "header_end", "user", "assistant", "system", "end"),
        *("start", "channel", "message", "return", "call", "python_tag", "(?:START|END)_OF_TURN_TOKEN"),
    )
)
_TEMPLATE_TEXT = re.compile(
    rf"<\|(?:{_CONTROL})\|>|(?<!\w)\[/?INST\]|\[TOOL_CALLS\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:/s|eos)>\s*\Z"
    r"|<｜[^｜<>]{1,40}｜>|^### (?:Human|Assistant|Instruction|Response):|\n\nHuman: [^\n]*\n\nAssistant:",
    re.MULTILINE,
)


def find_template_leftover(text: str) -> str | None:
    """Find template text of a known model, such as `<|eot_id|>`. Return the first match or `None`.

    >>> [find_template_leftover(text) for text in ("Sure.<|eot_id|>", "<s>strikethrough</s>", "a[INST]")]
    ['<|eot_id|>', None, None]
    """
    match = _TEMPLATE_TEXT.search(text)
    is_strikethrough = match is not None and match.group().startswith("</s>") and "<s>" in text
    return match.group().strip() if match and not is_strikethrough else None


_MEDIA_PLACEHOLDER = re.compile(
    r"<(?:image|video|audio|img|ImageHere|start_of_image|image_soft_token)(?:_?\d+)?>(?!.*</)|\[IMG\]|<image_placeholder>"
    r"|<\|(?:image|video|audio)(?:_pad|_\d+)?\|>|!\[[^\]\n]{0,100}\]\(data:image/"
)


def find_media_placeholder(text: str) -> str | None:
    """Find a placeholder for an image, a video or audio in a text. Return the first match or `None`.

    >>> [find_media_placeholder(text) for text in ("<image>What?", "<image_1>", "an <imagery>")]
    ['<image>', '<image_1>', None]
    """
    match = _MEDIA_PLACEHOLDER.search(text)
    return match.group() if match else None


SCRIPTS = (
    *("Latin", "Greek", "Cyrillic", "Armenian", "Hebrew", "Arabic", "Indic", "Thai", "Georgian", "Hangul"),
    *("Kana", "Han"),
)
_KANA, _HAN, _MAX_CHARACTERS = 10, 11, 1000
_BLOCKS = {
    0x41: 0, 0x370: 1, 0x400: 2, 0x530: 3, 0x590: 4, 0x600: 5, 0x900: 6, 0xE00: 7, 0xE80: -1, 0x10A0: 8, 0x1100: 9,
    0x1200: -1, 0x1E00: 0, 0x1F00: 1, 0x2000: -1, 0x3040: 10, 0x3130: 9, 0x3190: -1, 0x3400: 11, 0xA000: -1, 0xAC00: 9,
    0xD7B0: -1, 0xF900: 11, 0xFB00: -1, 0x20000: 11,
}  # fmt: skip
"""The first code point of Unicode blocks -> the number of the script; -1 for other scripts."""
_LATIN, _NOT_LATIN = re.compile("[A-Za-z\u00c0-\u02af]"), re.compile("[\u0370-\U0010ffff]")
_BLOCK_STARTS, _BLOCK_SCRIPTS = list(_BLOCKS), list(_BLOCKS.values())


def detect_script(text: str) -> int:
    """Detect the most frequent script (writing system) of a text.

    Return an index into `SCRIPTS`, or -1 if the text has too few characters of any script. A text with any Kana is
    Japanese: its Han characters count as Kana.

    >>> [SCRIPTS[detect_script(text)] for text in ("hello", "привет", "年號", "これは本です")]
    ['Latin', 'Cyrillic', 'Han', 'Kana']
    """
    text = text[:_MAX_CHARACTERS]
    counts = [0] * (len(SCRIPTS) + 1)
    counts[0] = len(_LATIN.findall(text))
    for char in () if text.isascii() else filter(str.isalpha, _NOT_LATIN.findall(text)):
        counts[_BLOCK_SCRIPTS[bisect(_BLOCK_STARTS, ord(char)) - 1]] += 1
    if counts[_KANA]:
        counts[_KANA] += counts[_HAN]
    script = max(range(len(SCRIPTS)), key=counts.__getitem__)
    # One or two characters of another script are usually symbols, such as π or µ.
    return script if counts[script] >= (1 if script in (_KANA, _HAN) else 3) else -1


_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_RESERVED_NETWORKS = r"10\.|127\.|0\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.|255\.|1\.2\.3\.4\b"
_KEYS = (
    *("sk-[A-Za-z0-9_-]{20,}", "gh[pousr]_[A-Za-z0-9]{36,}", r"github_pat_\w{22,}", "AKIA[0-9A-Z]{16}"),
    *("hf_[A-Za-z0-9]{30,}", r"AIza[\w-]{35}", "xox[abpr]-[A-Za-z0-9-]{10,}"),
)
_PHONE_NUMBERS = (
    *(r"\+\d{1,3}[ .-]?(?:\(\d+\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}", r"0[1-9](?:[ .-]\d\d){4}"),
    *(r"\(\d{3}\) ?\d{3}[ .-]\d{4}", r"\d{3}-\d{3}-\d{4}"),
)
_PERSONAL_PATTERNS = {
    "e-mail address": r"(?<![\w.+-])\w[\w.+-]*@(?!example\.|git(?:hub|lab)\.com:)[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b",
    "telephone number": rf"(?<![\w.])(?:{'|'.join(_PHONE_NUMBERS)})(?![\w-])",
    "social security number": r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])",
    "network address": rf"(?<![\w.])(?!{_RESERVED_NETWORKS})(?:{_OCTET}\.){{3}}{_OCTET}(?![\w.])",
    "secret key": rf"\b(?:{'|'.join(_KEYS)})|-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "card number": r"(?<![\w.-])[3-6](?:\d{12,18}|\d{3}(?:[ -]\d{4}){2}[ -]\d{1,7}|\d{3}[ -]\d{6}[ -]\d{5})(?![\w-])",
    "bank account": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b",
}

_PERSONAL = {kind: re.compile(pattern) for kind, pattern in _PERSONAL_PATTERNS.items()}


def find_personal_data(text: str) -> Iterator[tuple[str, str]]:
    """Find personal data in a text. Yield each kind of data with a short excerpt of its first match.

    Card numbers and bank accounts are reported only if their check digits are correct.

    >>> list(find_personal_data("write to ada@lovelace.org, or pay with 4111 1111 1111 1111"))
    [('e-mail address', 'ada…rg'), ('card number', '411…11')]
    """
    for kind, pattern in _PERSONAL.items():
        if kind == "e-mail address" and "@" not in text:
            continue
        for match in pattern.finditer(text):
            is_valid = _VALIDATORS.get(kind)
            if is_valid is None or is_valid(re.sub(r"[ -]", "", match.group())):
                yield kind, f"{match.group()[:3]}…{match.group()[-2:]}"
                break


def _is_card_number(digits: str) -> bool:
    """Return whether the check digit of a card number is correct (Luhn algorithm, ISO/IEC 7812-1, annex B)."""
    reverse = enumerate(digits[::-1])
    return sum(sum(divmod(2 * int(digit), 10)) if index % 2 else int(digit) for index, digit in reverse) % 10 == 0


def _is_iban(text: str) -> bool:
    """Return whether the length and the check digits of an IBAN are correct (modulo 97, ISO 13616)."""
    return 15 <= len(text) <= 34 and int("".join(str(int(char, 36)) for char in text[4:] + text[:4])) % 97 == 1


_VALIDATORS = {"card number": _is_card_number, "bank account": _is_iban}
