"""Stub modules for torchvision, which `import streaming` needs. They exist only while or after `streaming` is imported.

The wheel of torchvision on PyPI needs a CUDA build of PyTorch. A stub package in a normal folder does not work, because
transformers uses torchvision if it can be imported.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from typing import Any


class TorchvisionStub:
    """Finds and loads stub modules."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> ModuleSpec | None:
        """Return the spec of a stub module."""
        is_stub = name.partition(".")[0] == "torchvision" and "streaming" in sys.modules
        return ModuleSpec(name, TorchvisionStub, is_package=True) if is_stub else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(_: ModuleSpec) -> None:
        """Use the default module."""

    @staticmethod
    def exec_module(module: Any) -> None:
        """Add the names that `streaming` imports."""
        module.VisionDataset, module.to_tensor = object, None


sys.meta_path.append(TorchvisionStub)  # type: ignore[arg-type]
