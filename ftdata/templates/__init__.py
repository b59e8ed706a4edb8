"""Render: a conversation and a template -> text, with every character attributed.

A *chat template* reads `messages`; a *prompt template* reads the row's own columns (`instruction`, `output`,
...). Both are Jinja, run in the same sandbox. What is trained is marked in the template with
`{% generation %} ... {% endgeneration %}`, or, in a tokenizer's own chat template, detected (`markers`).
"""

from ftdata.templates.render_chat import DROPPED, TURNS, UNCLOSED, closed
from ftdata.templates.template import DEFAULT_DATE, Template, check, find, templates
from ftdata.templates.worker.client import begun, contradicted, render, scaffold, start, trusted, verify

__all__ = [
    "DEFAULT_DATE",
    "DROPPED",
    "TURNS",
    "UNCLOSED",
    "Template",
    "begun",
    "check",
    "closed",
    "contradicted",
    "find",
    "render",
    "scaffold",
    "start",
    "templates",
    "trusted",
    "verify",
]
