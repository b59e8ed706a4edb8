"""Render conversations to text, and attribute each character of the text to a message or to the template.

A *chat template* reads `messages`. A *prompt template* reads the columns of the row, such as `instruction` and
`output`. Both are Jinja templates that run in the same sandbox. A prompt template marks the generated text with
`{% generation %} ... {% endgeneration %}`. With a tokenizer's chat template, the generated text is detected
(`turns.locate`).
"""

from ftdata.templates.render_chat import append_missing_stop
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
