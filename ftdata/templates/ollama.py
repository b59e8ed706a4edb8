"""Convert a chat template to a Modelfile for Ollama, whose templates are written in Go's template language.

Only templates that print the same text around every message of a role can be converted. The text is read from small
conversations, and the result is compared with the template on other conversations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftdata.errors import TemplateRefused, first_difference
from ftdata.templates.attribution.agreement import common_prefix_length
from ftdata.templates.template import Template
from ftdata.templates.worker.client import render_plain

_CONTENTS = {"system": "qzs{}zq", "user": "qzu{}zq", "assistant": "qza{}zq"}
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_CHECKS = ("u", "uau", "uauau", "su", "suau", "suauau")


@dataclass(frozen=True, slots=True)
class MessageLayout:
    """The text that a template prints around messages.

    Attributes:
        start: the text before a conversation without a system message.
        prefixes: role -> text before the content. The prefix of the system message contains the start of the text.
        suffixes: role -> text after the content.
        prompt: the generation prompt.
    """

    start: str
    prefixes: Mapping[str, str]
    suffixes: Mapping[str, str]
    prompt: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render messages as Ollama does, with the generation prompt."""
        text = "" if messages[0]["role"] == "system" else self.start
        for message in messages:
            text += self.prefixes[message["role"]] + message["content"] + self.suffixes[message["role"]]
        return text + self.prompt


def make_modelfile(template: Template, source: str = ".") -> str:
    """Return a Modelfile with the template and its stop token.

    Args:
        template: the chat template.
        source: the folder of the model, or a GGUF file, for the instruction `FROM`.

    Raises:
        TemplateRefused: `not_convertible`, if the template prints other text than around the messages of each role.
    """
    layout = detect_layout(template)
    # Ollama prepends BOS itself.
    bos = template.special_tokens.get("bos_token") or ""
    if bos and not layout.start.startswith(bos) and layout.prefixes["user"].startswith(bos):
        raise _not_convertible("the template prints the BOS token before each message, and Ollama adds another one")
    prefixes = {**layout.prefixes}
    if "system" in prefixes:
        prefixes["system"] = prefixes["system"].removeprefix(bos)
    omitted = ["tools", "reasoning", *(() if "system" in prefixes else ("system messages",))]
    lines = [
        f"# Not in this template: {', '.join(omitted)}.",
        f"FROM {source}",
        f'TEMPLATE """{_make_loop(replace(layout, start=layout.start.removeprefix(bos), prefixes=prefixes))}"""',
    ]
    if stop := template.stops.stop.strip() if template.stops.stop else "":
        lines.append(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def _make_loop(layout: MessageLayout) -> str:
    """Return the loop over the messages in Go's template language."""
    first = 'and (eq $index 0) (ne .Role "system")'
    parts = ["{{ range $index, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $index)) 1 }}"]
    parts += [_make_condition(first, _escape(layout.start))]
    for role, prefix in layout.prefixes.items():
        suffix = _escape(layout.suffixes[role])
        if role == "assistant":
            # The model continues an answer at the end.
            suffix = _make_condition("not $last", suffix)
        parts.append(_make_condition(f'eq .Role "{role}"', f"{_escape(prefix)}{{{{ .Content }}}}{suffix}"))
    parts.append(_make_condition('and $last (ne .Role "assistant")', _escape(layout.prompt)))
    return "".join([*parts, "{{ end }}"])


def _make_condition(condition: str, text: str) -> str:
    return f"{{{{ if {condition} }}}}{text}{{{{ end }}}}" if text else ""


def _escape(text: str) -> str:
    """Return template text in Go's template language, inside three quotes of a Modelfile."""
    if '"""' in text or "\\" in text:
        raise _not_convertible(f"the template prints {text!r}, which a Modelfile cannot contain")
    return text.replace("{{", '{{ "{{" }}')


def detect_layout(template: Template) -> MessageLayout:
    """Detect the text that a template prints around the messages of each role.

    Raises:
        TemplateRefused: `not_convertible`.
    """
    texts = _render(template, ("uau", "ua", "uu", "suau"))
    if texts["uau"] is None or texts["ua"] is None:
        raise _not_convertible("the template does not print a conversation of the roles user and assistant")
    before, after_question, after_answer, end = _split(texts["uau"])
    suffix = _common_start(after_answer, _split(texts["ua"])[-1])
    prefix = after_answer[len(suffix) :]
    # Two questions in a row show where a question ends, if the template accepts them.
    between = _split(texts["uu"])[1] if texts["uu"] is not None else _common_start(after_question, end) + prefix
    if not before.endswith(prefix) or not between.endswith(prefix):
        raise _not_convertible("the text before a message of the user depends on the messages before it")
    user_suffix = between.removesuffix(prefix)
    prefixes = {"user": prefix, "assistant": after_question.removeprefix(user_suffix)}
    suffixes = {"user": user_suffix, "assistant": suffix}
    if texts["suau"] is not None:
        first, after_system, *_ = _split(texts["suau"])
        prefixes, suffixes = {"system": first, **prefixes}, {"system": after_system.removesuffix(prefix), **suffixes}
    layout = MessageLayout(before.removesuffix(prefix), prefixes, suffixes, end.removeprefix(user_suffix))
    _check_layout(layout, template)
    return layout


def _check_layout(layout: MessageLayout, template: Template) -> None:
    """Compare the layout with the template on other conversations."""
    checks = [roles for roles in _CHECKS if not roles.startswith("s") or "system" in layout.prefixes]
    for roles, expected in _render(template, checks).items():
        rendered = layout.render(_messages(roles))
        if expected is None or rendered != expected:
            position = first_difference(rendered, expected or "")
            names = ", ".join(_ROLES[role] for role in roles)
            excerpts = [text[position : position + 20] for text in (rendered, expected or "")]
            problem = f"for the roles {names}, it would print {excerpts[0]!r} at character {position}, expected "
            raise _not_convertible(f"{problem}{excerpts[1]!r}")


def _messages(roles: str) -> list[dict[str, str]]:
    return [
        {"role": _ROLES[role], "content": _CONTENTS[_ROLES[role]].format(number)} for number, role in enumerate(roles)
    ]


def _render(template: Template, probes: Sequence[str]) -> dict[str, str | None]:
    """Render conversations of the given roles. The text is `None` if the template does not print every message."""
    cases: list[dict[str, Any]] = [
        {"messages": _messages(roles), "tools": None, "add_generation_prompt": not roles.endswith("a")}
        for roles in probes
    ]
    texts = dict[str, str | None]()
    for roles, text in zip(probes, render_plain(template, cases), strict=True):
        is_complete = text is not None and all(message["content"] in text for message in _messages(roles))
        texts[roles] = text if is_complete else None
    return texts


def _split(text: str) -> list[str]:
    """Return the texts before, between and after the contents of a conversation."""
    return re.split(r"qz[sua]\d+zq", text)


def _common_start(first: str, second: str) -> str:
    return first[: common_prefix_length(first, second)]


def _not_convertible(reason: str) -> TemplateRefused:
    hint = "write the Modelfile by hand, or serve the model with its Jinja template"
    return TemplateRefused("not_convertible", f"the template cannot be converted for Ollama: {reason}", hint=hint)
