"""Coverage, rules R11 to R13: tool calls, fields and errors of the template."""

import json
import re

import pytest
from chat_templates import (
    ANSWER,
    CALL,
    CALLS,
    HEAD,
    NEEDS_IDS,
    PROMPT,
    TALK,
    TOOLED,
    TURN,
    USER,
    called,
    outcome,
    refusal,
    template,
    trained,
)

from ftdata.templates import Template, render_in_worker
from ftdata.templates.verification.probe import describe_contradiction
from ftdata.types import Conversation

THINKS = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"


def test_r11_tool_calls_are_trained_and_results_are_not():
    texts, flags = trained(template(HEAD + "{{ m.content }}" + CALLS + "<|im_end|>\n"), TOOLED)
    assert texts[0] == '<tool_call>{"name": "find", "arguments": {"key": "value"}}</tool_call><|im_end|>'
    assert texts[1] == "a2<|im_end|>"
    assert flags == set()


def test_r11_message_rendered_around_another_is_rejected():
    around = (
        "{% for m in messages %}{% if m.role != 'tool' %}" + HEAD + CALLS + "{% if m.tool_calls %}"
        "<result>{{ messages[loop.index0 + 1].content if not loop.last else '' }}</result>{% endif %}"
        + TURN
        + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + PROMPT + "{% endif %}"
    )
    messages = [USER, {**CALL, "content": "then"}, *TOOLED[2:]]
    assert refusal(around, messages).code == "interleaved"


def test_r12_missing_text_is_rejected_or_flagged():
    assert refusal(template(), TOOLED).code == "message_dropped"
    no_system = template("{% if m.role != 'system' %}" + HEAD + TURN + "{% endif %}")
    with_rule = [{"role": "system", "content": "be brief"}, *TALK]
    assert refusal(no_system, with_rule).field == "messages[0].content"
    assert trained(no_system, with_rule, on_dropped_message="flag") == (
        ["a1<|im_end|>", "a2<|im_end|>"],
        {"message_dropped"},
    )
    one = [USER, {"role": "assistant", "content": [{"type": "text", "text": "a1"}]}]
    assert trained(template(), one) == (["a1<|im_end|>"], {"content_parts_joined"})
    only_lists = template(
        HEAD + "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n"
    )
    assert trained(only_lists, TALK) == (["a1<|im_end|>", "a2<|im_end|>"], {"content_as_parts"})
    parts = [USER, {"role": "assistant", "content": [{"type": "text", "text": "a1"}] * 2}]
    assert trained(template(), parts) == (["a1\na1<|im_end|>"], {"content_parts_merged"})
    image = [USER, {"role": "assistant", "content": [{"type": "text", "text": "a1"}, {"type": "image"}]}]
    assert refusal(template(HEAD + "{{ m.content | tojson }}<|im_end|>\n"), image).code == "content_stringified"
    thought = [USER, {**ANSWER, "reasoning_content": "hm"}]
    assert trained(template(), thought) == (["a1<|im_end|>"], {"reasoning_dropped"})
    cut = template(HEAD + "{{ m.content.split('</think>')[-1] }}<|im_end|>\n")
    assert trained(cut, [USER, {"role": "assistant", "content": "hm</think>a1"}]) == (
        ["a1<|im_end|>"],
        {"message_truncated"},
    )
    assert trained(template(), [USER, {**ANSWER, "mood": "sunny"}])[1] == {"fields_dropped"}


def test_r12_untracked_text_is_located_by_changing_it():
    literal = template(HEAD + "{% for c in m.tool_calls or [] %}<call>{{ c.function }}</call>{% endfor %}" + TURN)
    texts, _ = trained(literal, TOOLED)
    assert texts[0] == "<call>{'name': 'find', 'arguments': {'key': 'value'}}</call><|im_end|>"
    formatted = template(HEAD + "{{ '%s' % m.content }}<|im_end|>\n")
    assert trained(formatted) == (["a1<|im_end|>", "a2<|im_end|>"], set())


def test_r13_errors_of_the_template_are_reported():
    strict = template("{% if m.role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}" + HEAD + TURN)
    error = refusal(strict, [{"role": "system", "content": "x"}, *TALK])
    assert error.code == "template_raises"
    assert "no system, please" in error.message
    after_user = template(
        "{% if loop.first and m.role != 'user' %}{{ raise_exception('begin!') }}{% endif %}" + HEAD + TURN
    )
    assert refusal(after_user, [ANSWER]).code == "template_raises"


def test_r13_consecutive_answers_are_trained_or_rejected():
    assert trained(template(), [USER, ANSWER, {"role": "assistant", "content": "more"}])[0] == [
        "a1<|im_end|>",
        "more<|im_end|>",
    ]
    late = template("{% if not loop.first %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}", PROMPT)
    assert refusal(late, [USER, ANSWER, {"role": "assistant", "content": "more"}]).code in {"overlap", "history_drift"}


def test_r12_missing_second_tool_call_is_rejected():
    first_only = template(
        HEAD + "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}<|im_end|>\n"
    )
    second = {"type": "function", "function": {"name": "find", "arguments": {"key": "another"}}}
    calls = [USER, {**CALL, "tool_calls": [*CALL["tool_calls"], second]}]
    assert refusal(first_only, calls).code == "message_dropped"
    assert (
        "tools_dropped"
        in render_in_worker(
            Conversation((USER, ANSWER), tools=({"name": "find"},)), Template("t", template(), strict=False), "joint"
        )[0].flags
    )


PRINTS = template(
    HEAD
    + "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments }}</call>{% endfor %}<|im_end|>\n"
)


def test_text_arguments_are_rendered_unchanged_if_the_template_takes_text():
    written = '{"city":"Ulm", "n":1.50}'
    assert trained(PRINTS, called(written)) == ([f"<call>f {written}</call><|im_end|>", "a2<|im_end|>"], set())
    assert trained(PRINTS, called(""))[0][0] == "<call>f </call><|im_end|>"
    as_json = template(HEAD + "{{ m.content }}" + CALLS + "<|im_end|>\n")
    texts, flags = trained(as_json, called(written))
    assert texts[0] == '<tool_call>{"name": "f", "arguments": {"city": "Ulm", "n": 1.5}}</tool_call><|im_end|>'
    assert flags == {"arguments_parsed"}
    assert refusal(as_json, called('{"city":')).code == "tool_arguments"


@pytest.mark.parametrize("arguments", [{"n": 12}, {"n": "x"}, {"s": "abc", "n": [1, 2], "flag": True}])
def test_r11_numbers_and_brackets_of_a_tool_call_are_trained(arguments):
    stopless = template(
        "<|{{ m.role }}|>\n{{ m.content }}" + CALLS.replace("</tool_call>", "") + "\n", "<|assistant|>\n"
    )
    texts, flags = trained(stopless, called(arguments))
    assert texts[0] == f'<tool_call>{{"name": "f", "arguments": {json.dumps(arguments)}}}'
    assert flags == {"no_trained_stop"}


@pytest.mark.parametrize(
    ("turn", "messages"),
    [
        (
            "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}",
            called({"n": 1}, {"n": 2}),
        ),
        ("{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}", called({"ok": 7})),
    ],
)
def test_r12_missing_numbers_and_keys_are_rejected(turn, messages):
    assert refusal(template(HEAD + turn + "<|im_end|>\n"), messages).code == "message_dropped"


@pytest.mark.parametrize(
    ("turn", "more", "flag"),
    [
        ("{{ m.content[0].text }}", {"content": [{"type": "text", "text": "so yes"}, {"type": "text", "text": "yes"}]}, "message_truncated"),
        (THINKS, {"reasoning_content": "one", "thinking": "another"}, "message_truncated"),
        ("{{ m.content }}", {"reasoning_content": ["a thought"]}, "reasoning_dropped"),
        ("{{ m.content }}", {"score": 3}, "fields_dropped"),
        ("{{ m.content }}{{ m.score }}", {"score": 3}, None),
        ("{{ '<think>%s</think>' % m.reasoning_content }}{{ m.content }}", {"reasoning_content": "one"}, None),
        ("<think>{{ m.content.split('</think>')[0][7:] | trim }}</think>{{ m.content.split('</think>')[1] | trim }}",
         {"content": "<think>\nhm\n</think>\n\nyes"}, None),
    ],
)  # fmt: skip
def test_r12_exactly_the_missing_parts_are_flagged(turn, more, flag):
    messages = [{"role": "user", "content": "q"}, {**ANSWER, **more}]
    source = template(HEAD + "{% if m.role == 'user' %}{{ m.content }}{% else %}" + turn + "{% endif %}<|im_end|>\n")
    assert trained(source, messages)[1] == ({flag} if flag else set())


def test_incompletely_rendered_tools_are_flagged():
    tools = [
        {"type": "function", "function": {"name": n, "parameters": {"properties": {"k": {}}}}} for n in ("go", "run")
    ]

    def flags(before):
        source = Template("t", template(before=before), strict=False, special_tokens={"eos_token": "<|im_end|>"})
        return render_in_worker(Conversation(tuple(TALK), tools=tuple(tools)), source, "joint")[0].flags

    assert flags("{{ tools | tojson }}") == set()
    assert (
        flags("{{ (tools or [{}])[0] | tojson }}")
        == flags("{% for t in tools or [] %}{{ t.function.name }}{% endfor %}")
        == {"tools_dropped"}
    )


def test_r13_conversation_that_starts_with_an_answer_is_rejected():
    assert refusal(template(), [ANSWER, *TALK]).code == "no_prompt"


@pytest.mark.parametrize("key", ["function_call", "function_calls"])
def test_r11_legacy_function_calls_are_trained(key):
    printed = "{% if m." + key + " %}<tool_call>{{ m." + key + " | tojson }}</tool_call>{% endif %}"
    messages = [USER, {**ANSWER, key: {"name": "f", "arguments": "{}"}}, *TOOLED[2:]]
    texts, flags = trained(template(HEAD + "{{ m.content }}" + printed + "<|im_end|>\n"), messages)
    assert texts[0] == 'a1<tool_call>{"name": "f", "arguments": "{}"}</tool_call><|im_end|>'
    assert flags == set()


def test_r11_other_field_before_the_stop_token_is_rejected():
    source = template(HEAD + "{{ m.content }}{% if m.mood %} ({{ m.mood }}){% endif %}<|im_end|>\n")
    assert refusal(source, [USER, {**ANSWER, "mood": "sunny"}]).code == "interleaved"


def test_r12_missing_call_with_repeated_text_is_rejected():
    first_only = template(
        HEAD + "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}<|im_end|>\n"
    )
    every = template(HEAD + "{{ m.content }}" + CALLS + "<|im_end|>\n")
    for arguments in ({"key": "lu"}, {"key": "value"}, {"key": 1}):
        second = {"type": "function", "function": {"name": "find", "arguments": arguments}}
        first = {"type": "function", "function": {"name": "find", "arguments": {"key": "value", "n": 12}}}
        messages = [USER, {**CALL, "tool_calls": [first, second]}]
        assert refusal(first_only, messages).code == "message_dropped"
        assert trained(every, messages)[1] == set()


def test_roles_named_in_the_template_are_passed_through():
    named = template("{% if m.role == 'ipython' %}<|im_start|>ipython\n{% else %}" + HEAD + "{% endif %}" + TURN)
    messages = [USER, CALL | {"content": "c", "tool_calls": None}, {"role": "ipython", "content": "r"}, TALK[3]]
    assert "<|im_start|>ipython\nr" in outcome(named, messages)[0].text
    assert "<|im_start|>tool\nr" in outcome(template(), messages)[0].text
    error = refusal(template(), [{"role": "context", "content": "c"}, *TALK])
    assert (error.code, error.field) == ("unknown_role", "messages[0].role")


def test_untrained_answer_needs_no_prompt():
    assert trained(template(), [{**ANSWER, "train": False}, *TALK])[0] == ["a1<|im_end|>", "a2<|im_end|>"]


RESULTS = [
    {"temperature": 21, "city": "Oslo"},
    [{"a": 1}, {"b": [1, 2.5, True, None, "x\ny"]}],
    {"type": "weather", "city": {"name": "Tromsø"}},
    {"ok": True},
    {},
]
RESULT = HEAD + "{% if m.role == 'tool' %}PRINTED{% else %}{{ m.content }}" + CALLS + "{% endif %}<|im_end|>\n"


@pytest.mark.parametrize("result", RESULTS, ids=str)
@pytest.mark.parametrize("printed", ["{{ m.content | tojson }}", "{{ m.content | tojson(indent=2) }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | tojson }}{% endif %}"])  # fmt: skip
def test_r12_tool_results_that_are_objects_are_rendered_as_json(result, printed):
    messages = [*TOOLED[:2], {**TOOLED[2], "content": result}, *TOOLED[3:]]
    texts, flags = trained(template(RESULT.replace("PRINTED", printed)), messages)
    assert texts[1] == "a2<|im_end|>"
    assert flags == set()
    bound = Template(
        "results", template(RESULT.replace("PRINTED", printed)), special_tokens={"eos_token": "<|im_end|>"}
    )
    (rendered,) = render_in_worker(Conversation(tuple(messages)), bound)
    assert json.loads(rendered.text.partition("tool\n")[2].partition("<|im_end|>")[0]) == result


@pytest.mark.parametrize("result", RESULTS[:4], ids=str)
@pytest.mark.parametrize(
    ("printed", "code"),
    [
        ("{{ m.content }}", "content_stringified"),
        ("{{ m.content | string }}", "content_stringified"),
        ("done", "message_dropped"),
    ],
)
def test_r12_objects_not_rendered_as_json_are_rejected(result, printed, code):
    messages = [*TOOLED[:2], {**TOOLED[2], "content": result}, *TOOLED[3:]]
    found = refusal(template(RESULT.replace("PRINTED", printed)), messages)
    assert found.code == code
    assert found.field == "messages[2].content"
    assert "JSON text" in found.hint


STOP_AFTER_TEXT = HEAD + "{{ m.content }}{% if not loop.last or m.content %}<|im_end|>\n{% endif %}"


@pytest.mark.parametrize("prompt", [PROMPT, ""], ids=["a generation prompt", "no generation prompt"])
def test_empty_answer_without_a_stop_token_is_flagged(prompt):
    """Neither the header nor other template text may be taken for the missing stop token."""
    source = (
        "{% for m in messages %}"
        + STOP_AFTER_TEXT
        + "{% endfor %}{% if add_generation_prompt %}"
        + prompt
        + "{% endif %}"
    )
    texts, flags = trained(source, [USER, {**ANSWER, "content": ""}])
    assert flags & {"no_trained_stop", "missing_final_stop"}
    assert not any("<|im_end|>" in text for text in texts)


def test_empty_split_turn_is_flagged(tokenizer_dir):
    """The flag is kept even if the split turn has no trained token and so no example."""
    from ftdata import encode

    source = (
        "{% for m in messages %}" + HEAD + "{{ m.content }}{% if m.content %}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}" + PROMPT + "{% endif %}"
    )
    messages = [USER, {**ANSWER, "content": ""}, USER, ANSWER]
    for turns in ("split", "joint"):
        examples = encode(messages, tokenizer_dir("tiny_bpe"), source, turns=turns)
        assert any("no_trained_stop" in example.flags for example in examples), turns


THINKING = (
    "{% for m in messages %}"
    + HEAD
    + "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    + PROMPT
    + "{% if not enable_thinking | default(true) %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_empty_thinking_block_is_flagged():
    texts, flags = trained(THINKING, TALK)
    assert texts[0].startswith("<think>\n\n</think>")
    assert flags == {"empty_thinking"}
    thought = [USER, {**ANSWER, "reasoning_content": "hm"}]
    assert trained(THINKING, thought)[1] == set()
    typed = [USER, {**ANSWER, "content": "<think>\n\n</think>yes"}]
    assert "empty_thinking" not in trained(template(), typed)[1]


def test_thinking_block_opened_by_the_prompt_and_left_empty_is_flagged():
    opened = (
        "{% for m in messages %}"
        + HEAD
        + "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}" + PROMPT + "<think>{% endif %}"
    )
    texts, flags = trained(opened, TALK)
    assert texts[0].startswith("</think>")
    assert flags == {"empty_thinking"}
    assert trained(opened, [USER, {**ANSWER, "reasoning_content": "hm"}])[1] == set()


def test_template_variable_moves_the_thinking_block_to_the_prompt(tokenizer_dir):
    from ftdata import encode

    (example,) = encode(TALK[:2], tokenizer_dir("tiny_bpe"), THINKING, template_kwargs={"enable_thinking": False})
    assert "empty_thinking" not in example.flags
    assert (
        "".join(
            example.text[slice(*span)]
            for span, yes in zip(example.offsets.tolist(), example.trained, strict=True)
            if yes
        )
        == "a1<|im_end|>"
    )


def test_reasoning_of_earlier_turns_may_be_left_out():
    """An earlier turn with its reasoning is an example of its own, so the context of later turns is complete."""
    drops = template(HEAD + "{% if loop.last %}" + THINKS + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n")
    thoughts = [USER, {**ANSWER, "reasoning_content": "hm"}, USER, {**ANSWER, "reasoning_content": "so"}]
    texts, flags = trained(drops, thoughts, turns="auto")
    assert texts == ["<think>hm</think>a1<|im_end|>", "<think>so</think>a1<|im_end|>"]
    assert flags == {"conversation_split"}
    never = template(HEAD + TURN)
    assert trained(never, thoughts)[1] == {"reasoning_dropped"}


def test_ids_are_added_to_tool_calls_if_the_template_requires_them():
    """The result has the id of its call, the id is trained, and the second renderer confirms the text."""
    (rendered,) = outcome(NEEDS_IDS, TOOLED, "joint")
    assert rendered.flags == {"tool_call_ids_added"}
    (call_id,) = set(re.findall(r"\[CALL\].*?}}(\w{9})<", rendered.text))
    assert f"[RESULT]found{call_id}" in rendered.text
    texts, _ = trained(NEEDS_IDS, TOOLED)
    assert texts[0].endswith(f"{call_id}<|im_end|>")
    checked = Template("t", NEEDS_IDS, special_tokens={"bos_token": "<s>", "eos_token": "<|im_end|>"})
    assert describe_contradiction(Conversation(tuple(TOOLED)), checked, rendered) is None


def test_tool_calls_with_null_content_are_rendered():
    """OpenAI's format has `content: null`, on which templates that call a method of the content fail, such as Qwen 3's."""
    searches = template(
        HEAD + "{% if m.content.startswith('x') %}{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '[CALL]' ~ (c.function | tojson) }}{% endfor %}<|im_end|>\n"
    )
    messages = [USER, {**CALL, "content": None}, *TOOLED[2:]]
    texts, flags = trained(searches, messages)
    assert '[CALL]{"name": "find"' in texts[0]
    assert flags == {"empty_content_added"}
    (rendered,) = outcome(searches, messages, "joint")
    checked = Template("t", searches, special_tokens={"bos_token": "<s>", "eos_token": "<|im_end|>"})
    assert describe_contradiction(Conversation(tuple(messages)), checked, rendered) is None
    assert trained(searches, TOOLED)[1] == set()


def test_ids_of_the_row_are_kept():
    (call,) = CALL["tool_calls"]
    messages = [USER, {**CALL, "tool_calls": [{**call, "id": "abcdefghi"}, call]}]
    messages += [
        {"role": "tool", "content": "first", "tool_call_id": "abcdefghi"},
        {"role": "tool", "content": "second"},
    ]
    (rendered,) = outcome(NEEDS_IDS, [*messages, ANSWER], "joint")
    first, second = re.findall(r"\[CALL\].*?}(\w{9})(?=\[|<)", rendered.text)
    assert first == "abcdefghi"
    assert f"firstabcdefghi[RESULT]second{second}" in rendered.text
    with_ids = [USER, {**CALL, "tool_calls": [{**call, "id": "abcdefghi"}]}, {**TOOLED[2], "tool_call_id": "abcdefghi"}]
    assert trained(NEEDS_IDS, [*with_ids, ANSWER])[1] == set()
