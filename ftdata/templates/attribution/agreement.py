"""Find the common prefix or suffix of two rendered texts. Compare characters, or whole words and tags."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile

TAG = re.compile(r"<[^<>\s]{1,64}>|\[[^\[\]\s]{1,64}\]")
"""Text that looks like a control token."""

ATOM = re.compile(rf"{TAG.pattern}|\w+|\s+|.", re.DOTALL)
"""A unit that is compared as a whole: a tag, a word, whitespace or any other character."""


def common_prefix_length(a: str, b: str) -> int:
    """Return the length of the common prefix of two texts, in characters.

    >>> common_prefix_length("abcd", "abx")
    2
    """
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def find_tags(text: str) -> set[str]:
    """Return all substrings that look like control tokens, such as `<|im_end|>` or `[INST]`."""
    return set(TAG.findall(text))


def common_prefix(a: str, b: str) -> str:
    r"""Return the common prefix of two texts. The prefix never ends inside a word or a tag.

    >>> common_prefix("</s>\n<user>", "</s>\n<users>")
    '</s>\n'
    """
    return "".join(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(_atoms(a), _atoms(b), strict=False)))


def common_suffix(a: str, b: str) -> str:
    """Return the common suffix of two texts. The suffix never begins inside a word or a tag.

    >>> common_suffix("<s>[INST] ", "</s>[INST] ")
    '[INST] '
    """
    pairs = zip(reversed(list(_atoms(a))), reversed(list(_atoms(b))), strict=False)
    return "".join(reversed([x for x, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]))


def _atoms(text: str) -> Iterator[str]:
    return (match.group() for match in ATOM.finditer(text))
