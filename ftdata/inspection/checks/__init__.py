"""Checks: what can be wrong with data, each with a code that stays, a severity, and a way out.

A *flag* check is a flag of the examples; a *row* check looks at each row; a *data* check at all rows together, when
they were read; a *template* check at tokenizer and template. Rows that are rejected are findings, too, by their codes.
"""

# Importing the modules registers their checks, in the order in which findings of one severity are printed.
# isort: off
from ftdata.inspection.checks import row_checks
from ftdata.inspection.checks import dataset_checks

# isort: on
from ftdata.inspection.checks.registry import SEVERITIES, Check, CheckedDataset, CheckedRow, CheckedTemplate, checks

__all__ = [
    "SEVERITIES",
    "Check",
    "CheckedDataset",
    "CheckedRow",
    "CheckedTemplate",
    "checks",
    "dataset_checks",
    "row_checks",
]
