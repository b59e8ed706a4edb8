"""Write the tokens and labels of a finished build in the input formats of trainers.

    ftdata export BUILD --to FORMAT -o DIR

An export reads the packed sequences of a build. It does not render or tokenize rows, so the tokens and labels are the
same for every trainer. Each format is one module with one `ExportFormat`, registered under the name of its trainer.
"""

from __future__ import annotations

from ftdata.exporters.formats import ExportFormat, exporters

__all__ = ["ExportFormat", "exporters"]
