"""ftdata converts fine-tuning data to the exact tokens and labels that a language model is trained on.

    from ftdata import build_sft_dataset
    ds = build_sft_dataset("data.json", tokenizer="google/gemma-2-9b-it")

The names below are the public API. They are imported on first use, which keeps `import ftdata` fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ftdata._version import __version__

if TYPE_CHECKING:
    from ftdata.build.convert import convert
    from ftdata.build.dataset import build_sft_dataset
    from ftdata.build.preference import build_preference_dataset
    from ftdata.build.remote import verify
    from ftdata.errors import FtdataError
    from ftdata.exporters.export import export
    from ftdata.inspection.audit import audit
    from ftdata.inspection.diff import diff
    from ftdata.inspection.preview import preview
    from ftdata.inspection.stats import stats
    from ftdata.pipeline.examples import encode
    from ftdata.pipeline.recipe import check_template
    from ftdata.readers import read

_MODULES = {
    "FtdataError": "ftdata.errors",
    "audit": "ftdata.inspection.audit",
    "build_preference_dataset": "ftdata.build.preference",
    "build_sft_dataset": "ftdata.build.dataset",
    "check_template": "ftdata.pipeline.recipe",
    "convert": "ftdata.build.convert",
    "diff": "ftdata.inspection.diff",
    "encode": "ftdata.pipeline.examples",
    "export": "ftdata.exporters.export",
    "preview": "ftdata.inspection.preview",
    "read": "ftdata.readers",
    "stats": "ftdata.inspection.stats",
    "verify": "ftdata.build.remote",
}

__all__ = [
    "FtdataError", "__version__", "audit", "build_preference_dataset", "build_sft_dataset", "check_template", "convert",
    "diff", "encode", "export", "preview", "read", "stats", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        message = f"module 'ftdata' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    # Tab completion shows only public names.
    return __all__
