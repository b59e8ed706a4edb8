"""Recognize data files by name, and find the split, such as `train` or `test`, in a file name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import PurePosixPath

_NON_DATA_FILES = {
    *("readme.md", "license", "license.txt", "license.md"),
    *("config.json", "eval_results.json", "tokenizer.json", "tokenizer_config.json"),
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
}
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Split for each word in a file name, with the words that `datasets` recognizes."""


_IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
"""Suffixes of the images of rows, which are often next to the data."""


def is_data(name: str) -> bool:
    """Return whether a file or folder may contain data: it is not hidden, no well-known metadata file and no image."""
    folded = name.lower()
    return folded not in _NON_DATA_FILES and not name.startswith((".", "_")) and not folded.endswith(_IMAGE_SUFFIXES)


def split_from_name(path: str) -> str | None:
    """Find a data set split, such as `test`, in a file name. If the file name has no split, search its folder names.

    The nearest folder takes precedence. Return `None` if no name contains a split.

    >>> split_from_name("data/test-00000-of-00001.parquet"), split_from_name("eval/part-0.jsonl")
    ('test', 'test')
    >>> split_from_name("test-time/a.jsonl")
    """
    name = PurePosixPath(path)
    words = re.split(r"[^a-z]+", name.name.split(".", 1)[0].lower())
    folders = [folder.name.lower() for folder in name.parents]
    return next((_SPLITS[word] for word in (*words, *folders) if word in _SPLITS), None)


def matches_pattern(path: str, pattern: str) -> bool:
    """Return whether a path matches a glob. `*` and `?` never match a slash. `**` matches any number of folders.

    The time is bounded by the lengths of path and pattern, because a pattern may come from an untrusted data set card.

    >>> [matches_pattern("a/b/c.jsonl", pattern) for pattern in ("a/**/*.jsonl", "**", "a/*.jsonl", "a/b/c.*")]
    [True, True, False, True]
    """
    names = path.split("/")
    reached = {0}
    for part in pattern.split("/"):
        if part == "**":
            reached = set(range(min(reached), len(names) + 1)) if reached else reached
        else:
            match = _compile_name_pattern(part)
            reached = {index + 1 for index in reached if index < len(names) and match(names[index])}
    return len(names) in reached


@lru_cache(maxsize=256)
def _compile_name_pattern(pattern: str) -> Callable[[str], object]:
    return re.compile(fnmatch.translate(pattern)).match
