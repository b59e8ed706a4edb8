"""Names of files: which say that there is no data in them, and which of what split it is."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import PurePosixPath

_NO_DATA = {
    *("readme.md", "license", "license.txt", "license.md"),
    *("config.json", "eval_results.json", "tokenizer.json", "tokenizer_config.json"),
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
}
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in names -> the split that they say, as `datasets` has them."""


def is_data(name: str) -> bool:
    """Whether a file or folder of this name may be data: it is not hidden, nor of those that stand beside data."""
    return name.lower() not in _NO_DATA and not name.startswith((".", "_"))


def split_from_name(path: str) -> str | None:
    """Return the split that a file's name says, or else that of the nearest folder that is called as one.

    >>> split_from_name("data/test-00000-of-00001.parquet"), split_from_name("eval/part-0.jsonl"), split_from_name("test-time/a.jsonl")
    ('test', 'test', None)
    """
    name = PurePosixPath(path)
    words = re.split(r"[^a-z]+", name.name.split(".", 1)[0].lower())
    folders = [folder.name.lower() for folder in name.parents]
    return next((_SPLITS[word] for word in (*words, *folders) if word in _SPLITS), None)


def matches_pattern(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern: `*` and `?` stand for what is within a name, `**` for any folders.

    In time that depends on their lengths: patterns come from cards of data sets, too.

    >>> [matches_pattern("a/b/c.jsonl", pattern) for pattern in ("a/**/*.jsonl", "**", "a/*.jsonl", "a/b/c.*")]
    [True, True, False, True]
    """
    names = path.split("/")
    reached = {0}
    for part in pattern.split("/"):
        if part == "**":
            reached = set(range(min(reached), len(names) + 1)) if reached else reached
        else:
            match = _name_pattern(part)
            reached = {at + 1 for at in reached if at < len(names) and match(names[at])}
    return len(names) in reached


@lru_cache(maxsize=256)
def _name_pattern(pattern: str) -> Callable[[str], object]:
    return re.compile(fnmatch.translate(pattern)).match
