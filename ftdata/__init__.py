"""ftdata: any fine-tuning data into exactly the tokens and labels that a language model should be trained on.

    from ftdata import build_sft_dataset
    ds = build_sft_dataset("data.json", tokenizer="google/gemma-2-9b-it")

The names below are the public interface. They are imported on first use, so that `import ftdata` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ftdata._version import __version__

if TYPE_CHECKING:
    from ftdata._convert import convert
    from ftdata.build import build_sft_dataset
    from ftdata.errors import FtdataError
    from ftdata.examples import encode
    from ftdata.look.audit import audit
    from ftdata.look.diff import diff
    from ftdata.look.preview import preview
    from ftdata.look.stats import stats
    from ftdata.readers import read
    from ftdata.recipe import check_template
    from ftdata.remote_builds import verify

_HOMES = {
    "FtdataError": "ftdata.errors",
    "audit": "ftdata.look.audit",
    "build_sft_dataset": "ftdata.build",
    "check_template": "ftdata.recipe",
    "convert": "ftdata._convert",
    "diff": "ftdata.look.diff",
    "encode": "ftdata.examples",
    "preview": "ftdata.look.preview",
    "read": "ftdata.readers",
    "stats": "ftdata.look.stats",
    "verify": "ftdata.remote_builds",
}

__all__ = [
    "FtdataError",
    "__version__",
    "audit",
    "build_sft_dataset",
    "check_template",
    "convert",
    "diff",
    "encode",
    "preview",
    "read",
    "stats",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module 'ftdata' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
