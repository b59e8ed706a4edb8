"""Small chat templates and conversations, and functions that return their trained text."""

import pytest

from ftdata.errors import BadRow
from ftdata.templates import Template, render_in_worker
from ftdata.types import Conversation

USER, ANSWER = {"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}
TALK = [USER, ANSWER, {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"key": "value"}}}],
}
TOOLED = [USER, CALL, {"role": "tool", "content": "found", "name": "find"}, {"role": "assistant", "content": "a2"}]
HEAD, TURN, PROMPT = "<|im_start|>{{ m.role }}\n", "{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n"


def template(turn=HEAD + TURN, prompt=PROMPT, before=""):
    ask = f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}" if prompt else ""
    return f"{before}{{% for m in messages %}}{turn}{{% endfor %}}{ask}"


LATE_STOP = template(
    "{% if not loop.first %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}",
    "<|im_end|>\n" + PROMPT,
)
STOPLESS = template("{{ m.role }}: {{ m.content }}\n\n", "assistant: ")


def outcome(source, messages=TALK, turns="joint", special=None, **options):
    special = special or {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    return render_in_worker(
        Conversation(tuple(messages)), Template("t", source, strict=False, special_tokens=special), turns, **options
    )


def trained(source, messages=TALK, turns="joint", **options):
    """Return the trained text of each turn, and the flags of all rendered rows."""
    texts, flags = [], set()
    for one in outcome(source, messages, turns, **options):
        found = {}
        for span in one.spans:
            if span.generated:
                found[span.message] = found.get(span.message, "") + one.text[span.start : span.end]
        texts += found.values()
        flags |= one.flags
    return texts, flags


def refusal(source, messages=TALK, turns="joint"):
    with pytest.raises(BadRow) as caught:
        outcome(source, messages, turns)
    return caught.value


def shown(example):
    return "".join(example.text[a:b] for a, b in example.offsets[example.trained])


NEEDS_IDS = template(
    "{% if m.role == 'tool' %}{{ '[RESULT]' ~ m.content ~ m.tool_call_id }}{% else %}" + HEAD + "{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('no id') }}"
    "{% endif %}{{ '[CALL]' ~ (c.function | tojson) ~ c.id }}{% endfor %}<|im_end|>\n{% endif %}"
)


CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"


def called(*arguments, **more):
    calls = [
        {"type": "function", "id": f"call{n}", "function": {"name": "f", "arguments": a}}
        for n, a in enumerate(arguments)
    ]
    return [
        USER,
        {"role": "assistant", "content": "", "tool_calls": calls, **more},
        {"role": "tool", "content": "ok"},
        TALK[3],
    ]
