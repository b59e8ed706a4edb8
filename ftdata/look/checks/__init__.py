"""Checks: what can be wrong with data, each with a code that stays, a severity, and a way out.

A *flag* check is a flag of the examples; a *row* check looks at each row; a *data* check at all rows together, when
they were read; a *template* check at tokenizer and template. Rows that are rejected are findings, too, by their codes.
"""

# To import them is what puts them into the list.
from ftdata.look.checks import rows, whole
from ftdata.look.checks.registry import SEVERITIES, Check, Data, Row, Setting, checks

__all__ = ["SEVERITIES", "Check", "Data", "Row", "Setting", "checks", "rows", "whole"]
