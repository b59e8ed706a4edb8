"""The checks of `ftdata audit`. Each check has a stable code, a severity, a message and a fix.

A *flag* check reports a flag of the examples. A *row* check inspects one row at a time. A *data* check compares all
rows after they have been read. A *template* check inspects the tokenizer and the template. A *server* check compares
the rows with an inference server. Rejected rows are also reported as findings, under the code of their error.
"""

# Importing the modules registers their checks, in the order in which findings of equal severity are printed.
# isort: off
from ftdata.inspection.checks import row_checks
from ftdata.inspection.checks import pair_checks
from ftdata.inspection.checks import dataset_checks

# isort: on
from ftdata.inspection.checks.registry import Check, CheckedDataset, CheckedRow, CheckedTemplate, ServedBatch, checks

__all__ = [
    "Check",
    "CheckedDataset",
    "CheckedRow",
    "CheckedTemplate",
    "ServedBatch",
    "checks",
    "dataset_checks",
    "pair_checks",
    "row_checks",
]
