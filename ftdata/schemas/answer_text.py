"""Detect visible text and thinking blocks in the text of answers."""

from __future__ import annotations

import re

_VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufdd0-\ufdef\ufff0-\ufffb\ufffe\uffff\U0001bca0-\U0001bca3\U000e0000-\U000e0fff\U0001d173-\U0001d17a]"
)
"""Visible characters: all except whitespace, control, format, filler and variation characters (Unicode's
Default_Ignorable_Code_Point, and the Braille blank)."""


def has_visible_text(text: str) -> bool:
    r"""Return whether a text has visible characters. Zero-width spaces, byte order marks and NUL are invisible.

    >>> has_visible_text("\u200b\ufeff\x00 \n"), has_visible_text("\u200bx")
    (False, True)
    """
    return _VISIBLE.search(text) is not None


THINKING_NAMES = "think|thinking|thought|reasoning"
EMPTY_THINKING = re.compile(rf"\s*(?:<({THINKING_NAMES})>\s*</\1>|</(?:{THINKING_NAMES})>)")
"""An empty thinking block, or only its closing tag if the generation prompt ends with the opening tag."""

_THINKING_TAG = re.compile(rf"[<\[](/?)({THINKING_NAMES}|thoughts)[>\]]", re.IGNORECASE)


def has_answer(text: str) -> bool:
    """Return whether a text has visible characters outside thinking blocks such as `<think>...</think>`.

    >>> [has_answer(text) for text in ("<think>hm</think> yes", "hm</think> yes", "[THINK] is a tag")]
    [True, True, True]
    >>> [has_answer(text) for text in ("<think>hm</think>", "hm</think>", "[THINK]hm[/THINK]")]
    [False, False, False]
    """
    # The search for a single character is much faster than the search for two.
    may_have_closing_tag = ("<" in text and "</" in text) or ("[" in text and "[/" in text)
    return has_visible_text(text) and (not may_have_closing_tag or has_visible_text(_remove_thinking(text)))


def _remove_thinking(text: str) -> str:
    """Remove thinking blocks from a text. A closing tag without an opening tag ends a block that the prompt opens."""
    tags = [(tag.start(), tag.end(), tag[1], tag[2].lower()) for tag in _THINKING_TAG.finditer(text)]
    last_closing = {name: start for start, _, slash, name in tags if slash}
    outside, position, opened = list[str](), 0, ""
    for start, end, slash, name in tags:
        if not slash and not opened and start < last_closing.get(name, -1):
            outside.append(text[position:start])
            opened = name
        elif slash and not opened:
            outside, position = [], end
        elif slash and name == opened:
            position, opened = end, ""
    return "".join([*outside, text[position:]])
