"""Render: a conversation and a template -> text, with every character attributed.

A *chat template* reads `messages`; a *prompt template* reads the row's own columns (`instruction`, `output`,
...). Both are Jinja, run in the same sandbox. What is trained is marked in the template with
`{% generation %} ... {% endgeneration %}`, or, in a tokenizer's own chat template, detected (`markers`).
"""

from ftdata.templates.render_chat import DROPPED_MESSAGE_POLICIES, MISSING_STOP_POLICIES, TURNS, append_missing_stop
from ftdata.templates.template import DEFAULT_DATE, Template, check_can_train, find_template, templates
from ftdata.templates.worker.client import (
    cross_check_in_worker,
    render_in_worker,
    require_verified,
    scaffold_in_worker,
    start_template_worker,
    submit_render,
    verify_template,
)

__all__ = [
    "DEFAULT_DATE",
    "DROPPED_MESSAGE_POLICIES",
    "MISSING_STOP_POLICIES",
    "TURNS",
    "Template",
    "append_missing_stop",
    "check_can_train",
    "cross_check_in_worker",
    "find_template",
    "render_in_worker",
    "require_verified",
    "scaffold_in_worker",
    "start_template_worker",
    "submit_render",
    "templates",
    "verify_template",
]
