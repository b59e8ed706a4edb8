"""Probe templates: render small conversations to find out how a template behaves before it renders any row.

Every rendered probe is cross-checked (`cross_check`). A template with a single contradiction is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from typing import Any

from ftdata.errors import BadRow, TemplateRefused
from ftdata.schemas import ROLES
from ftdata.templates.attribution.agreement import TAG
from ftdata.templates.chat import ChatRendering
from ftdata.templates.render_chat import CONTENT_FORMATS, render_chat
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


def _message(role: str, content: str, **fields: Any) -> Message:
    return {"role": role, "content": content, **fields}  # type: ignore[typeddict-item]  # (any keys)


_user, _answer = partial(_message, "user"), partial(_message, "assistant")
_FUNCTION = {"name": "lookup", "arguments": {"key": "a value"}}
_CALL = _answer("", tool_calls=[{"type": "function", "id": "call00001", "function": _FUNCTION}])
_RESULT = _message("tool", "a result", name="lookup", tool_call_id="call00001")

_TWO_TURNS = (_user("first question"), _answer("first answer"), _user("second question"), _answer("second answer"))

_PROBES: Mapping[str, tuple[Message, ...]] = {
    "single": (_user("first question"), _answer("first answer")),
    "plain": _TWO_TURNS,
    "system": (_message("system", "a rule"), _user("first question"), _answer("first answer")),
    "system_turns": (_message("system", "a rule"), *_TWO_TURNS),
    "tools": (_user("first question"), _answer("first answer")),
    "tools_turns": _TWO_TURNS,
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
"""Feature -> a small conversation that uses the feature."""

_WITH_TOOLS = ("tools", "tools_turns", "tool_calls")

_REPORTED_FLAGS = {
    "prompt_mismatch", "no_trained_stop", "missing_final_stop", "text_after_last_stop", "template_not_probed",
    "generation_tags_unconfirmed", "generation_tags_overruled", "stop_outside_generation_tags", "header_trained",
}  # fmt: skip
"""Flags of the probes that a report contains."""

_FEATURES = ("system", "tools", "tool_calls", "reasoning", "names")


@dataclass(frozen=True)
class TemplateReport:
    """The result of examining a template: whether and how ftdata can train on its output.

    Attributes:
        template: name of the template.
        kind: `"chat"` or `"prompt"`.
        verdict: `"exact"`: one example per conversation. `"split"`: one example per turn, because the template rewrites
            earlier turns. `"refused"`: the turns of no probe could be located unambiguously, or a cross-check failed.
        stop: text that ends a turn, or `None`.
        prefix_stable: whether the template renders the first turns of a conversation without system message and tools
            as a prefix of the whole text.
        lacks: features that the template omits or rejects: system, tools, tool_calls, reasoning or names.
        rewrites: what the template changes: `"turns"` (earlier turns), `"system_turns"` or `"tools_turns"` (earlier
            turns of conversations with a system message or tools, e.g. because it prints them before the last
            question), `"reasoning"` (omitted in some turns), `"contents"` (any content), `"think_tags"` (removes
            thinking from contents), `"blanks"` (strips contents).
        adds: text that the template prints before the first message, such as a default system prompt.
        flags: flags of the probes that are in `_REPORTED_FLAGS`.
        tagged: whether the template has generation tags.
        uses_date: whether the template prints the current date.
        reasons: why the verdict is `"refused"` or `"split"`.
        contradictions: differences that the cross-checks found.
        proved: number of renderings that were cross-checked.
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
        """Return the report as a dict of JSON values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        is_chat = self.kind == "chat"
        checked = f"chat template, {self.proved} renderings cross-checked" if is_chat else "prompt template"
        stop = repr(self.stop) if is_chat else "the end of the generation block"
        lines = [
            f"{self.template}: {self.verdict} ({checked})",
            f"  stop           {stop}",
            f"  prefix-stable  {self._describe_stability()}",
            f"  lacks          {', '.join(self.lacks) or 'nothing'}",
            f"  rewrites       {', '.join(self.rewrites) or 'nothing'}",
            f"  adds           {self.adds[:200]!r}" if self.adds else "  adds           nothing",
            f"  marks          {'generation tags' if self.tagged else 'no generation tags; turns are detected'}",
            f"  date           {'printed' if self.uses_date else 'not printed'}",
            *([f"  flags          {', '.join(self.flags)}"] if self.flags else []),
        ]
        return "\n".join([*lines, *(f"  because        {reason}" for reason in self.reasons + self.contradictions)])

    def _describe_stability(self) -> str:
        if not self.prefix_stable:
            return "no"
        exceptions = [text for name, text in _UNSTABLE_WITH.items() if name in self.rewrites]
        return f"yes, but not {' or '.join(exceptions)}: these are split" if exceptions else "yes"


_UNSTABLE_WITH = {
    "system_turns": "for conversations with a system message",
    "tools_turns": "for conversations with tools",
}


@dataclass(frozen=True)
class _ProbeResult:
    """The rendered texts of a small conversation or an error, and any difference between the two renderers."""

    texts: tuple[Rendered, ...] = ()
    error: str = ""
    contradiction: str = ""

    @property
    def flags(self) -> frozenset[str]:
        return frozenset[str]().union(*(text.flags for text in self.texts))


def probe_template(template: Template) -> TemplateReport:
    """Examine a template in this process: render small conversations with two renderers, and compare the texts.

    Raises:
        TemplateRefused: `no_template`, or `template_syntax` if the template cannot be compiled.
    """
    if not template.source:
        raise TemplateRefused("no_template", "the tokenizer has no chat template")
    facts: dict[str, Any] = {
        "template": template.name,
        "tagged": template.has_generation_tags,
        "uses_date": template.uses_date,
    }
    if not template.is_chat:
        reasons = () if template.has_generation_tags else ("it has no generation block",)
        return TemplateReport(kind="prompt", verdict="refused" if reasons else "exact", reasons=reasons, **facts)
    joint = {name: _run_probe(template, name, "joint") for name in _PROBES}
    split = {name: _run_probe(template, name, "split") for name in _PROBES}
    results = [*joint.values(), *split.values()]
    plain, single = joint["plain"], split["single"]
    unstable = next((name for name in ("plain", "reasoning") if "history_rewritten" in joint[name].flags), None)
    prefix_stable = bool(plain.texts) and unstable is None
    contradictions = tuple(result.contradiction for result in results if result.contradiction)
    has_texts = any(result.texts for result in results)
    flags = plain.flags | single.flags | _flag_untrained_stop(template, single)
    return TemplateReport(
        kind="chat",
        verdict="refused" if contradictions or not has_texts else "exact" if prefix_stable else "split",
        stop=template.stops.stop or _find_ending(single),
        prefix_stable=prefix_stable,
        lacks=tuple(name for name in _FEATURES if _lacks(split[name], name)),
        rewrites=tuple(_find_rewrites(joint, split)),
        adds=_find_added_text(template, single),
        flags=tuple(sorted(flags & _REPORTED_FLAGS)),
        reasons=()
        if prefix_stable
        else tuple(
            filter(None, (plain.error or _describe_rewriting(joint[unstable or "plain"], split[unstable or "plain"]),))
        ),
        contradictions=contradictions,
        proved=sum(len(result.texts) for result in results),
        **facts,
    )


def _flag_untrained_stop(template: Template, single: _ProbeResult) -> frozenset[str]:
    """Return the flag `no_trained_stop` if the template prints a stop token after a turn, but outside its tags."""
    stop = template.stops.stop.strip() if template.stops.stop else ""
    is_untrained = bool(stop) and bool(single.texts) and stop not in _generated_text(single.texts[-1], 1)
    return frozenset({"no_trained_stop"} if is_untrained else ())


def _run_probe(template: Template, name: str, turns: str) -> _ProbeResult:
    conversation = Conversation(_PROBES[name], tools=_TOOLS if name in _WITH_TOOLS else ())
    try:
        texts = render_chat(conversation, template, turns)
    except BadRow as error:
        return _ProbeResult(error=str(error))
    contradictions = (describe_contradiction(conversation, template, text) for text in texts)
    return _ProbeResult(
        texts,
        contradiction=next((f"{name}: {contradiction}" for contradiction in contradictions if contradiction), ""),
    )


def describe_contradiction(
    conversation: Conversation, template: Template, rendered: Rendered, max_messages: int | None = None
) -> str | None:
    """Compare a rendered conversation with the result of a second renderer, and describe the first difference.

    Args:
        conversation: the conversation. `rendered` may contain only its first messages.
        template: the chat template.
        rendered: the rendered text to check.
        max_messages: maximum number of messages to change. `None`: all messages.

    Returns:
        The description, or `None` if the check passes or the text cannot be cross-checked.
    """
    if not template.is_chat or not conversation.messages or "arguments_as_text" in rendered.flags:
        return None
    if template.has_generation_tags and template.strict:
        return None
    for flag in CONTENT_FORMATS.keys() & rendered.flags:
        conversation = CONTENT_FORMATS[flag](conversation)
    chat = ChatRendering.from_messages(conversation.messages, conversation.tools, template).prefix(rendered.messages)
    if "tool_call_ids_added" in rendered.flags:
        chat = chat.with_call_ids()
    if "empty_content_added" in rendered.flags:
        chat = chat.with_empty_content()
    contradiction = cross_check(chat, rendered, max_messages)
    return None if contradiction is None else str(contradiction)


def _describe_rewriting(joint: _ProbeResult, split: _ProbeResult) -> str:
    if not joint.texts or not split.texts:
        return ""
    as_answer, as_history = _generated_text(split.texts[0], 1), _generated_text(joint.texts[0], 1)
    if as_answer == as_history:
        # The template rewrites the text before the answer, such as the thinking block of the generation prompt.
        texts = [text.text[: text.text.index("first answer")][-80:] for text in (split.texts[0], joint.texts[0])]
        return (
            f"the text before the first answer ends with {texts[0]!r} when the answer is generated, but with "
            f"{texts[1]!r} in the history of later turns"
        )
    return f"the first answer is {as_answer!r} when it is generated, but {as_history!r} in the history of later turns"


def _generated_text(rendered: Rendered, message: int) -> str:
    spans = (span for span in rendered.spans if span.generated and span.message == message)
    return "".join(rendered.text[span.start : span.end] for span in spans)


def _lacks(result: _ProbeResult, feature: str) -> bool:
    if feature == "tools" and "tools_dropped" in result.flags:
        return True
    part = {"names": Part.OTHER, "reasoning": Part.REASONING}.get(feature)
    if part is None or not result.texts:
        return result.error.startswith(("[message_dropped]", "[template_raises]"))
    return not any(span.part is part for text in result.texts for span in text.spans)


def _find_rewrites(joint: Mapping[str, _ProbeResult], split: Mapping[str, _ProbeResult]) -> Iterator[str]:
    if "history_rewritten" in joint["plain"].flags or "history_rewritten" in joint["reasoning"].flags:
        yield "turns"
    else:
        for name in _UNSTABLE_WITH:
            if "history_rewritten" in joint[name].flags or (split[name].texts and not joint[name].texts):
                yield name
    reasoning = [span for text in joint["reasoning"].texts for span in text.spans if span.part is Part.REASONING]
    if len({span.message for span in reasoning}) == 1:
        yield "reasoning"
    if "message_truncated" in joint["single"].flags:
        yield "contents"
    elif "message_truncated" in joint["think_tags"].flags:
        yield "think_tags"
    lengths = [len(str(message["content"])) for message in _PROBES["blanks"]]
    if joint["blanks"].texts and _content_length(joint["blanks"].texts) < sum(lengths):
        yield "blanks"


def _content_length(texts: Sequence[Rendered]) -> int:
    return sum(span.end - span.start for text in texts for span in text.spans if span.part is Part.CONTENT)


def _find_added_text(template: Template, single: _ProbeResult) -> str:
    if not single.texts:
        return ""
    rendered = single.texts[0]
    first = next((span.start for span in rendered.spans if span.part is Part.CONTENT), 0)
    before = rendered.text[:first].removesuffix(template.stops.opener)
    words = [word for word in TAG.sub(" ", before).split() if word.strip(":#").lower() not in ROLES]
    # If the opener of messages is unknown, up to three words may belong to it.
    return before if len(words) > (0 if template.stops.is_probed and template.stops.opener else 3) else ""


def _find_ending(result: _ProbeResult) -> str | None:
    if not result.texts:
        return None
    return _generated_text(result.texts[-1], 1).partition(str(_PROBES["single"][-1]["content"]))[2] or None
