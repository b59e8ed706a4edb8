"""Render: a conversation and a template -> text, with every character attributed.

A *chat template* reads `messages`; a *prompt template* reads the row's own columns (`instruction`, `output`,
...). Both are Jinja, run in the same sandbox. What is trained is marked in the template with
`{% generation %} ... {% endgeneration %}`, or, in a tokenizer's own chat template, detected (`markers`).
"""

from ftdata.templates.rendering import DROPPED, TURNS, UNCLOSED, closed, prompt, render
from ftdata.templates.template import DEFAULT_DATE, Template, check, find, scaffold, templates

__all__ = [
    "DEFAULT_DATE",
    "DROPPED",
    "TURNS",
    "UNCLOSED",
    "Template",
    "check",
    "closed",
    "find",
    "prompt",
    "render",
    "scaffold",
    "templates",
]
