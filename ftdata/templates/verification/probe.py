"""Verify: what a template does to conversations, found by probing it, before any row is trusted to it.

Every probe that it renders is proved by the second way (`proof`); one contradiction refuses the template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ftdata.errors import BadRow, TemplateRefused
from ftdata.schemas import ROLES
from ftdata.templates.attribution.agreement import TAG
from ftdata.templates.chat import ChatRendering
from ftdata.templates.render_chat import join_text_parts, render_chat
from ftdata.templates.template import Template
from ftdata.templates.verification.cross_check import cross_check
from ftdata.types import Conversation, Message, Part, Rendered

_TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Looks a thing up",
            "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
        },
    },
)


def _message(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}  # type: ignore[typeddict-item]  # any keys


_user, _answer = partial(_message, "user"), partial(_message, "assistant")
_FUNCTION = {"name": "lookup", "arguments": {"key": "a value"}}
_CALL = _answer("", tool_calls=[{"type": "function", "id": "call00001", "function": _FUNCTION}])
_RESULT = _message("tool", "a result", name="lookup", tool_call_id="call00001")

_PROBES: Mapping[str, tuple[Message, ...]] = {
    "single": (_user("first question"), _answer("first answer")),
    "plain": (_user("first question"), _answer("first answer"), _user("second question"), _answer("second answer")),
    "system": (_message("system", "a rule"), _user("first question"), _answer("first answer")),
    "tool_calls": (_user("first question"), _CALL, _RESULT, _answer("first answer")),
    "reasoning": (
        _user("first question"),
        _answer("first answer", reasoning_content="first thought"),
        _user("second question"),
        _answer("second answer", reasoning_content="second thought"),
    ),
    "think_tags": (
        _user("first question"),
        _answer("<think>\nfirst thought\n</think>\n\nfirst answer"),
        _user("second question"),
        _answer("<think>\nsecond thought\n</think>\n\nsecond answer"),
    ),
    "names": (_user("first question", name="Ada"), _answer("first answer")),
    "blanks": (_user(" first question \n"), _answer("\n first answer \n"), _user("second"), _answer(" second ")),
    "equal": (_user("yes"), _answer("yes"), _user("yes"), _answer("yes")),
    "two_answers": (_user("first question"), _answer("first answer"), _answer("another answer")),
}
"""Feature -> a small conversation that uses it."""

_FEATURES = ("system", "tool_calls", "reasoning", "names")


@dataclass(frozen=True)
class TemplateReport:
    """What `check_template` found.

    Attributes:
        template: its name.
        kind: `"chat"` or `"prompt"`.
        verdict: `"exact"`: one example per conversation; `"split"`: the template rewrites earlier turns, so one
            example per turn; `"refused"`: it renders no plain conversation for which turns are certain, or the two
            ways of finding them disagree.
        stop: the text that ends a turn, `None` where there is none.
        prefix_stable: whether a conversation's rendering shows its first turns as they were asked for.
        lacks: which of system, tool_calls, reasoning and names the template drops or refuses.
        rewrites: what it changes: `"turns"` (earlier ones), `"reasoning"` (kept in some turns only), `"contents"`
            (of any kind), `"think_tags"` (thinking written into the content is cut), `"blanks"` (around contents).
        adds: what it prints before the first message without being asked to: a default system prompt.
        flags: what else was unusual about the probes (`prompt_mismatch`, `no_trained_stop`, `missing_final_stop`, `text_after_last_stop`).
        tagged: whether the template itself marks what is trained.
        uses_date: whether it prints the date.
        reasons: why it is refused, or split.
        contradictions: where the two ways of finding what is trained disagree.
        proved: how many renderings were confirmed by the second way.
    """

    template: str
    kind: str
    verdict: str
    stop: str | None = None
    prefix_stable: bool = True
    lacks: tuple[str, ...] = ()
    rewrites: tuple[str, ...] = ()
    adds: str = ""
    flags: tuple[str, ...] = ()
    tagged: bool = False
    uses_date: bool = False
    reasons: tuple[str, ...] = ()
    contradictions: tuple[str, ...] = ()
    proved: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.template}: {self.verdict} ({self.kind} template, {self.proved} renderings proved)",
            f"  stop           {self.stop!r}",
            f"  prefix-stable  {'yes' if self.prefix_stable else 'no'}",
            f"  lacks          {', '.join(self.lacks) or 'nothing'}",
            f"  rewrites       {', '.join(self.rewrites) or 'nothing'}",
            f"  adds           {self.adds[:200]!r}" if self.adds else "  adds           nothing",
            f"  marks          {'its own generation tags' if self.tagged else 'none, detected'}",
            f"  date           {'printed' if self.uses_date else 'not printed'}",
            *([f"  flags          {', '.join(self.flags)}"] if self.flags else []),
        ]
        return "\n".join([*lines, *(f"  because        {reason}" for reason in self.reasons + self.contradictions)])


@dataclass(frozen=True)
class _Outcome:
    """What became of one probe: its rendering, or why there is none."""

    texts: tuple[Rendered, ...] = ()
    refusal: str = ""
    contradiction: str = ""

    @property
    def flags(self) -> frozenset[str]:
        return frozenset[str]().union(*(one.flags for one in self.texts))


def probe_template(template: Template) -> TemplateReport:
    """Probe a template with small conversations, in this process.

    Raises:
        TemplateRefused: it cannot be compiled.
    """
    if not template.source:
        raise TemplateRefused("no_template", f"{template.name} has no chat template")
    facts: dict[str, Any] = {"template": template.name, "tagged": template.tagged, "uses_date": template.uses_date}
    if not template.chat:
        reasons = () if template.tagged else ("it marks nothing as trained",)
        return TemplateReport(kind="prompt", verdict="refused" if reasons else "exact", reasons=reasons, **facts)
    joint = {name: _outcome(template, name, "joint") for name in _PROBES}
    split = {name: _outcome(template, name, "split") for name in _PROBES}
    outcomes = [*joint.values(), *split.values()]
    plain, single = joint["plain"], split["single"]
    stable = bool(plain.texts) and "history_rewritten" not in plain.flags
    contradictions = tuple(one.contradiction for one in outcomes if one.contradiction)
    possible = any(one.texts for one in outcomes)
    unusual = plain.flags | single.flags
    return TemplateReport(
        kind="chat",
        verdict="refused" if contradictions or not possible else "exact" if stable else "split",
        stop=template.stops.stop or _ending(single),
        prefix_stable=stable,
        lacks=tuple(name for name in _FEATURES if _lacks(split[name], name)),
        rewrites=tuple(_rewrites(joint)),
        adds=_added(template, single),
        flags=tuple(
            sorted(
                unusual
                & {
                    "prompt_mismatch",
                    "no_trained_stop",
                    "missing_final_stop",
                    "text_after_last_stop",
                    "template_not_probed",
                }
            )
        ),
        reasons=() if stable else tuple(filter(None, (plain.refusal or _rewriting(plain, split["plain"]),))),
        contradictions=contradictions,
        proved=sum(len(one.texts) for one in outcomes),
        **facts,
    )


def _outcome(template: Template, name: str, turns: str) -> _Outcome:
    conversation = Conversation(_PROBES[name], tools=_TOOLS if name == "tool_calls" else ())
    try:
        texts = render_chat(conversation, template, turns)
    except BadRow as error:
        return _Outcome(refusal=str(error))
    against = (describe_contradiction(conversation, template, one) for one in texts)
    return _Outcome(texts, contradiction=next((f"{name}: {one}" for one in against if one), ""))


def describe_contradiction(
    conversation: Conversation, template: Template, rendered: Rendered, most: int | None = None
) -> str | None:
    """Return what speaks against a rendering of a conversation or of its first turns, in words; `None` for nothing."""
    if not template.chat or not conversation.messages or "arguments_as_text" in rendered.flags:
        return None
    if template.tagged and template.strict:
        return None
    if "content_parts_joined" in rendered.flags:
        conversation = join_text_parts(conversation)
    found = cross_check(ChatRendering.of(conversation, template).first(rendered.messages), rendered, most)
    return None if found is None else str(found)


def _rewriting(joint: _Outcome, split: _Outcome) -> str:
    if not joint.texts or not split.texts:
        return ""
    asked, shown = _generated(split.texts[0], 1), _generated(joint.texts[0], 1)
    return f"the first answer is {asked!r} where the model is asked for it, and {shown!r} once the conversation goes on"


def _generated(rendered: Rendered, message: int) -> str:
    own = (span for span in rendered.spans if span.generated and span.message == message)
    return "".join(rendered.text[span.start : span.end] for span in own)


def _lacks(outcome: _Outcome, feature: str) -> bool:
    part = {"names": Part.OTHER, "reasoning": Part.REASONING}.get(feature)
    if part is None or not outcome.texts:
        return outcome.refusal.startswith(("[message_dropped]", "[template_raises]"))
    return not any(span.part is part for one in outcome.texts for span in one.spans)


def _rewrites(joint: Mapping[str, _Outcome]) -> Iterator[str]:
    if "history_rewritten" in joint["plain"].flags or "history_rewritten" in joint["reasoning"].flags:
        yield "turns"
    printed = [span for one in joint["reasoning"].texts for span in one.spans if span.part is Part.REASONING]
    if len({span.message for span in printed}) == 1:
        yield "reasoning"
    if "message_truncated" in joint["single"].flags:
        yield "contents"
    elif "message_truncated" in joint["think_tags"].flags:
        yield "think_tags"
    given = [len(str(message["content"])) for message in _PROBES["blanks"]]
    if joint["blanks"].texts and _contents(joint["blanks"].texts) < sum(given):
        yield "blanks"


def _contents(texts: Sequence[Rendered]) -> int:
    return sum(span.end - span.start for one in texts for span in one.spans if span.part is Part.CONTENT)


def _added(template: Template, single: _Outcome) -> str:
    if not single.texts:
        return ""
    one = single.texts[0]
    first = next((span.start for span in one.spans if span.part is Part.CONTENT), 0)
    before = one.text[:first].removesuffix(template.stops.opener)
    words = [word for word in TAG.sub(" ", before).split() if word.strip(":#").lower() not in ROLES]
    # Where it is not known how a message is opened, a few words may be its header.
    return before if len(words) > (0 if template.stops.learnt and template.stops.opener else 3) else ""


def _ending(outcome: _Outcome) -> str | None:
    if not outcome.texts:
        return None
    return _generated(outcome.texts[-1], 1).partition(str(_PROBES["single"][-1]["content"]))[2] or None
