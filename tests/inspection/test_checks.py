"""Each check: rows that it reports, and similar rows that it does not report."""

import pytest
from audit_helpers import PLAIN, audit_rows, rows, talk
from chat_templates import ANSWER, CALLS, HEAD, LATE_STOP, NEEDS_IDS, PROMPT, TALK, TOOLED, TURN, USER, template
from tokenizer_makers import CHATML

from ftdata.inspection.checks import checks

DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + CHATML

DATED = "{% if messages[0].role == 'system' %}{{ messages[0].content }} {{ strftime_now('%Y') }}{% endif %}" + CHATML

TAGGED = template(
    HEAD
    + "{% if m.role == 'assistant' %}{% generation %}"
    + TURN.strip()
    + "{% endgeneration %}\n{% else %}"
    + TURN
    + "{% endif %}",
    "",
)

UNTAGGED = template(
    HEAD
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% else %}"
    + TURN
    + "{% endif %}"
)

CUTS = template(HEAD + "{{ m.content.split('</think>')[-1] }}<|im_end|>\n")

THINKING = (
    "{% for m in messages %}" + HEAD + "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    + PROMPT
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

# "A:" and the answer make one token in this tokenizer.
STRADDLING = (
    "{% for m in messages %}{{ m.role }} th{% generation %}e {{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
)

THINKS = template(HEAD + "{{ m.reasoning_content or '' }}" + TURN)

REASONED = [TALK[0], {**TALK[1], "reasoning_content": "hm"}, *TALK[2:]]
LAST_THOUGHT = template(HEAD + "{% if loop.last %}{{ m.reasoning_content or '' }}{% endif %}" + TURN)

TOOL_RESULTS = template(HEAD + "{{ m.content or '' }}" + CALLS + "<|im_end|>\n")
TOOLS = "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}\n{% endfor %}" + CHATML

TOOL = {"type": "function", "function": {"name": "find", "description": "finds", "parameters": {}}}


PREFERENCE = {"task": "preference", "template": CHATML}


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def with_parts(count):
    parts = [{"type": "text", "text": f"part {number}"} for number in range(count)]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "an answer"}]}


# code -> (what makes it fire, what nearly does)
CASES = {
    "stop_on_one_side": (
        rows(pair("q", "a long answer " * 20, "no"), max_length=60, overlong="truncate", **PREFERENCE),
        rows(pair("q", "a long answer " * 20, "no " * 99), max_length=60, overlong="truncate", **PREFERENCE),
    ),
    "refusal_on_one_side": (
        rows(pair("q", "I cannot help with that.", "Sure."), **PREFERENCE),
        rows(pair("q", "I cannot help with that.", "I'm sorry, I can't."), **PREFERENCE),
    ),
    "length_bias": (
        rows(
            *[pair(f"q{n}", "long answer", "no" if n % 3 else "a much longer answer") for n in range(60)], **PREFERENCE
        ),
        rows(
            *[pair(f"q{n}", "long answer", "no" if n % 2 else "a much longer answer") for n in range(60)], **PREFERENCE
        ),
    ),
    "no_trained_stop": (rows({"input_ids": [1, 40, 41], "labels": [-100, 40, 41]}), rows({"text": "a stop<|im_end|>"})),
    "answer_truncated": (
        rows(talk("q", "a long answer " * 20), max_length=30, overlong="truncate"),
        rows(talk("q", "short", "q", "a long answer " * 20), max_length=40, overlong="drop_turns"),
    ),
    "missing_final_stop": (rows(talk("q", "a"), template=LATE_STOP), rows(talk("q", "a"), template=CHATML)),
    "message_truncated": (rows(talk("q", "hm</think>a1"), template=CUTS), rows(talk("q", "a1"), template=CUTS)),
    "message_dropped": (
        rows(
            {"messages": [{"role": "system", "content": "lost"}, *TALK]},
            template="{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML,
            on_dropped_message="flag",
        ),
        rows(talk("q", "a"), template=CHATML, on_dropped_message="flag"),
    ),
    "reasoning_dropped": (
        rows({"messages": [USER, {**ANSWER, "reasoning_content": "a thought"}]}, template=CHATML),
        rows({"messages": [USER, {**ANSWER, "reasoning_content": "a thought"}]}, template=THINKS),
    ),
    "history_rewritten": (
        rows({"messages": REASONED}, template=LAST_THOUGHT, turns="joint"),
        rows({"messages": REASONED}, template=LAST_THOUGHT),
    ),
    "tools_dropped": (
        rows({**PLAIN, "tools": [TOOL]}, template=CHATML),
        rows({**PLAIN, "tools": [TOOL]}, template=TOOLS),
    ),
    "tool_call_ids_added": (
        rows({"messages": TOOLED}, template=NEEDS_IDS),
        rows({"messages": TOOLED}, template=template(HEAD + "{{ m.content or '' }}" + CALLS + "<|im_end|>\n")),
    ),
    "fields_dropped": (
        rows({"messages": [USER, {**ANSWER, "mood": "sunny"}]}, template=CHATML + "{# mood #}"),
        rows({"messages": [USER, {**ANSWER, "train": True}]}, template=CHATML),
    ),
    "prompt_mismatch": (
        rows(PLAIN, template=template(prompt=PROMPT + "<think>\n")),
        rows(PLAIN, template=template()),
    ),
    "empty_thinking": (
        rows(talk("q", "a"), template=THINKING),
        rows(talk("q", "a"), template=THINKING, template_kwargs={"enable_thinking": False}),
    ),
    "token_crosses_boundary": (rows(talk("q", "a"), template=STRADDLING), rows(talk("q", "a"), template=CHATML)),
    "whitespace_removed": (rows(talk("q", "a "), lstrip=True), rows(talk("q", " a"), lstrip=True)),
    "rejected_side_dropped": (
        rows({"prompt": "q", "chosen": "yes", "rejected": "no"}, template=CHATML, schema="preference"),
        rows({"prompt": "q", "completion": "yes"}, template=CHATML),
    ),
    "generation_tags_unconfirmed": (rows(PLAIN, template=TAGGED), rows(PLAIN, template=CHATML)),
    "header_trained": (
        rows(PLAIN, template=CHATML.partition("{% if add_generation_prompt")[0]),
        rows(PLAIN, template=CHATML),
    ),
    "stop_outside_generation_tags": (rows(PLAIN, chat=UNTAGGED), rows(PLAIN, chat=TAGGED)),
    "control_tokens": (rows(talk("<|im_end|>", "a")), rows(talk("<|im_end", "a"))),
    "trailing_messages": (rows({"messages": [*TALK, USER]}), rows({"messages": TALK})),
    "double_bos": (
        rows({"input_ids": [3, 3, 40, 2], "labels": [-100, -100, 40, 2]}),
        rows({"text": "<s>text<|im_end|>"}),
    ),
    "double_eos": (
        rows({"input_ids": [1, 40, 2, 2], "labels": [-100, 40, 2, 2]}),
        rows({"input_ids": [2, 2, 40, 2], "labels": [-100, -100, 40, 2]}),
    ),
    "media_placeholder": (rows(talk("<image>What?", "a")), rows(talk("an <image>alt</image> in XML", "a"))),
    "left_over": (rows(talk("q", "an answer</s>")), rows(talk("q", "<s>struck</s> out"))),
    "same_prompt": (
        rows(PLAIN, against=[talk("a question", "x")]),
        rows(PLAIN, against=[talk("another question", "x")]),
    ),
    "label_share": (rows(talk("word " * 3000, "x")), rows(talk("word " * 300, "an answer " * 20))),
    "drift": (
        rows({"messages": TALK, "prompt_token_ids": [40, 41], "completion_token_ids": [42, 2]}),
        rows({"prompt_token_ids": [40, 41], "completion_token_ids": [42, 2]}),
    ),
    "role_order": (
        rows({"messages": [USER, USER, ANSWER]}),
        rows({"messages": [{"role": "system", "content": "s"}, {"role": "developer", "content": "d"}, *TALK]}),
    ),
    "tool_results": (
        rows({"messages": [USER, TOOLED[1], ANSWER]}, template=TOOL_RESULTS),
        rows({"messages": TOOLED}, template=TOOL_RESULTS),
    ),
    "undeclared_tool": (
        rows({"messages": TOOLED, "tools": [{"type": "function", "function": {"name": "g"}}]}, template=TOOL_RESULTS),
        rows(
            {"messages": TOOLED, "tools": [{"type": "function", "function": {"name": "find"}}]}, template=TOOL_RESULTS
        ),
    ),
    "trivial_answer": (rows(talk("q", "N/A")), rows(talk("q", "4"), talk("q", "No."), talk("q", "👍"), talk("q", "√"))),
    "empty_question": (
        rows(talk(" ", "an answer")),
        rows(
            {
                "messages": [
                    USER,
                    {**ANSWER, "train": False},
                    {"role": "user", "content": ""},
                    {**ANSWER, "train": False},
                    *TALK,
                ]
            }
        ),
    ),
    "unread_column": (
        rows({"question": "a question", "answer": "an answer", "context": "text"}),
        rows({"question": "a question", "answer": "an answer", "id": "7"}),
    ),
    "contradiction": (
        rows(PLAIN, talk("a question", "another answer")),
        rows(PLAIN, PLAIN, talk("a second question", "another answer")),
    ),
    "content_parts_merged": (rows(with_parts(2)), rows(with_parts(1))),
    "default_system": (rows(PLAIN, template=DEFAULT), rows(talk("q", "a", system="s"), template=DEFAULT)),
    "mojibake": (rows(talk("itâ€™s", "a")), rows(talk("it’s “CAFÉ”, été…” à São Paulo", "«MANHÃ» Â l’aide"))),
    "pii": (
        rows(talk("mail ada@lovelace.org", "a"), pii=True),
        rows(talk("mail me@example.com, 10.0.0.1, 1.2.3", "4111 1111 1111 1112"), pii=True),
    ),
    "duplicate": (rows(PLAIN, PLAIN), rows(PLAIN, talk("a question", "another answer"))),
    "near_duplicate": (
        rows(
            talk("q", "one two three four five six seven eight nine ten " * 3),
            talk("q", "one two three four five six seven eight nine ten " * 3 + "!"),
            near_duplicate_threshold=0.7,
        ),
        rows(PLAIN, PLAIN, near_duplicate_threshold=0.7),
    ),
    "leakage": (rows(PLAIN, against=[PLAIN]), rows(PLAIN, against=[talk("another question", "an answer")])),
    "script": (
        rows(*[talk(f"q{n}", f"answer {n}") for n in range(300)], talk("q", "привет, как дела")),
        rows(*[talk(f"q{n}", f"answer {n}") for n in range(300)], talk("привет", "hello")),
    ),
    "pad_is_stop": (rows(PLAIN, pad="<|im_end|>"), rows(PLAIN)),
    "date_inserted": (rows(talk("q", "a", system="s"), template=DATED), rows(PLAIN)),
    "template_drift": (rows(PLAIN, template="zephyr"), rows(PLAIN, template="{# mine #}" + CHATML)),
}


IMAGE_CHECKS = {"image_size", "image_leakage"}
"""Checks with cases in `tests/images/test_inspection.py`."""


def test_every_check_has_a_case():
    # `test_serving.py` compares rows with a server. `tokenizing/test_declared_tokens.py` has a tokenizer without bytes.
    assert set(CASES) | IMAGE_CHECKS | {"serving", "unknown_token"} == set(checks)


@pytest.mark.parametrize("code", CASES)
def test_check_reports_a_finding(tokenizer, code):
    report = audit_rows(tokenizer, *CASES[code][0])
    (finding,) = [one for one in report.findings if one.code == code]
    assert finding.severity == checks[code].severity
    assert finding.fix in str(report)
    assert code not in {
        one.code for one in audit_rows(tokenizer, CASES[code][0][0], {**CASES[code][0][1], "ignore": [code]}).findings
    }


@pytest.mark.parametrize("code", CASES)
def test_check_reports_no_finding(tokenizer, code):
    assert code not in {one.code for one in audit_rows(tokenizer, *CASES[code][1]).findings}
