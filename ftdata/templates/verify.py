"""Verify: what a template does to a conversation, found by probing it, before any row is trusted to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ftdata.errors import BadRow, TemplateRefused
from ftdata.templates import Template, render
from ftdata.types import Conversation, Message, Rendered

_USER: Message = {"role": "user", "content": "first question"}
_ANSWER: Message = {"role": "assistant", "content": "first answer"}
_AGAIN: Message = {"role": "user", "content": "second question"}
_LAST: Message = {"role": "assistant", "content": "second answer"}
_SYSTEM: Message = {"role": "system", "content": "a rule"}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "call00001", "function": {"name": "lookup", "arguments": {"key": "a value"}}}
    ],
}
_THOUGHT: Message = {"role": "assistant", "content": "an answer", "reasoning_content": "a thought"}

_EXTRAS: dict[str, tuple[Message, ...]] = {
    "system": (_SYSTEM, _USER, _ANSWER),
    "tool_calls": (_USER, _CALL),
    "reasoning": (_USER, _THOUGHT),
}
"""Feature -> the smallest conversation that uses it."""


@dataclass(frozen=True)
class TemplateReport:
    """What `check_template` found.

    Attributes:
        template: its name.
        kind: `"chat"` or `"prompt"`.
        verdict: `"exact"`: one example per conversation; `"split"`: the template rewrites earlier turns, so one
            example per turn; `"refused"`: where turns begin and end is not certain.
        stop: the text that ends a turn, `None` where there is none.
        prefix_stable: whether a conversation's rendering begins with the rendering of its first turns.
        lacks: which of system, tool_calls and reasoning the template drops or refuses.
        tagged: whether the template itself marks what is trained.
        uses_date: whether it prints the date.
        reasons: why it is refused, or split.
    """

    template: str
    kind: str
    verdict: str
    stop: str | None
    prefix_stable: bool
    lacks: tuple[str, ...]
    tagged: bool
    uses_date: bool
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.template}: {self.verdict} ({self.kind} template)",
            f"  stop           {self.stop!r}",
            f"  prefix-stable  {'yes' if self.prefix_stable else 'no'}",
            f"  lacks          {', '.join(self.lacks) or 'nothing'}",
            f"  marks          {'its own generation tags' if self.tagged else 'none, detected'}",
            f"  date           {'printed' if self.uses_date else 'not printed'}",
        ]
        return "\n".join([*lines, *(f"  because        {reason}" for reason in self.reasons)])


def verify(template: Template) -> TemplateReport:
    """Probe a template with small conversations.

    Raises:
        TemplateRefused: it cannot be compiled.
    """
    if not template.source:
        raise TemplateRefused("no_template", f"{template.name} has no chat template")
    if not template.chat:
        return TemplateReport(
            template.name,
            "prompt",
            "exact" if template.tagged else "refused",
            None,
            prefix_stable=True,
            lacks=(),
            tagged=template.tagged,
            uses_date=template.uses_date,
            reasons=() if template.tagged else ("it marks nothing as trained",),
        )
    reasons: list[str] = []
    outcome = _try((_USER, _ANSWER, _AGAIN, _LAST), template, "joint", reasons)
    joint = outcome is not None
    if outcome is None:
        outcome = _try((_USER, _ANSWER, _AGAIN, _LAST), template, "split", reasons)
    verdict = "refused" if outcome is None else "exact" if joint else "split"
    lacks = tuple(name for name, probe in _EXTRAS.items() if _loses(probe, template, name))
    return TemplateReport(
        template.name,
        "chat",
        verdict,
        _stop(outcome),
        prefix_stable=joint,
        lacks=lacks,
        tagged=template.tagged,
        uses_date=template.uses_date,
        reasons=tuple(reasons),
    )


def _try(
    messages: Sequence[Message], template: Template, turns: str, reasons: list[str]
) -> tuple[Rendered, ...] | None:
    try:
        return render(Conversation(tuple(messages)), template, turns)
    except BadRow as error:
        reasons.append(str(error))
        return None


def _loses(messages: Sequence[Message], template: Template, feature: str) -> bool:
    outcome = _try(messages, template, "split", [])
    return outcome is None or any(f"{feature}_dropped" in one.flags for one in outcome)


def _stop(outcome: tuple[Rendered, ...] | None) -> str | None:
    if outcome is None:
        return None
    last = outcome[-1]
    generated = "".join(last.text[s.start : s.end] for s in last.spans if s.generated and s.message == len(_EXTRAS))
    return generated.partition(str(_LAST["content"]))[2] or None
