"""What a model must produce under any chat template, rule by rule: where turns begin and end, and what is refused."""

import json

import numpy as np
import pytest
from chats import (
    ANSWER,
    CALL,
    CALLS,
    HEAD,
    LATE_STOP,
    PROMPT,
    STOPLESS,
    TALK,
    TOOLED,
    TURN,
    USER,
    called,
    outcome,
    refusal,
    shown,
    template,
    trained,
)
from tokenizers import Tokenizer

from ftdata import encode
from ftdata.errors import BadRow
from ftdata.examples import build_rows
from ftdata.recipe import make_recipe
from ftdata.templates import Template, render
from ftdata.testing import check_laws
from ftdata.tokenize import load_tokenizer
from ftdata.types import Conversation, Part, Row, Source


def test_r1_one_text_one_tokenisation(tokenizer_dir):
    folder = tokenizer_dir("tiny_bpe")
    (example,) = encode(TALK, folder)
    assert example.input_ids.tolist() == Tokenizer.from_file(f"{folder}/tokenizer.json").encode(example.text).ids


def test_r2_a_turn_begins_where_its_generation_prompt_ends():
    assert trained(template()) == (["a1<|im_end|>", "a2<|im_end|>"], set())
    spaced = template(
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}", ""
    )
    assert trained(spaced) == ([" a1<|im_end|>", " a2<|im_end|>"], set())
    by_itself = template(
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}" + TURN
    )
    assert trained(by_itself)[0][0] == "<think>\n\n</think>\n\na1<|im_end|>"
    forced = template(
        by_itself.partition("{% for m in messages %}")[2].partition("{% endfor %}")[0], PROMPT + "<think>\n"
    )
    assert trained(forced) == (["\n</think>\n\na1<|im_end|>", "\n</think>\n\na2<|im_end|>"], set())


def test_r2_where_there_is_no_prompt_tags_say_where_the_model_begins():
    body = "{% if m.role == 'assistant' %}{% generation %}" + TURN.strip() + "{% endgeneration %}\n{% else %}" + TURN
    tagged = template(HEAD + body + "{% endif %}", "")
    assert trained(tagged) == (["a1<|im_end|>", "a2<|im_end|>"], {"tags_unconfirmed"})
    untagged = template(HEAD + TURN, "")
    assert trained(untagged)[0] == [f"<|im_start|>assistant\n{answer}<|im_end|>" for answer in ("a1", "a2")]


@pytest.mark.parametrize(
    ("marked", "flags"),
    [
        ("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}", set()),
        ("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>", {"tags_overruled", "stop_untagged"}),
        ("{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}", {"tags_overruled"}),
    ],
)
def test_r2_the_stop_is_trained_whatever_the_tags_of_the_tokenizer_say(marked, flags):
    tagged = template(
        HEAD + "{% if m.role == 'assistant' %}" + marked + "{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    )
    assert trained(tagged) == (["a1<|im_end|>", "a2<|im_end|>"], flags)


def test_r2_thinking_in_the_data_that_the_prompt_opens():
    messages = [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\na1"}]
    assert trained(template(prompt=PROMPT + "<think>\n"), messages) == (["hm\n</think>\na1<|im_end|>"], set())


def test_r3_prompt_drift_begins_before_the_scaffold_that_is_not_there():
    assert trained(template(prompt=PROMPT + "<think>\n")) == (["a1<|im_end|>", "a2<|im_end|>"], {"prompt_drift"})
    half_shared = template(
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}</think>{% endif %}" + TURN, PROMPT + "<think>"
    )
    assert trained(half_shared)[0] == ["</think>a1<|im_end|>", "</think>a2<|im_end|>"]
    first_letters = [USER, {"role": "assistant", "content": "<thank you"}]
    assert trained(template(prompt=PROMPT + "<think>\n"), first_letters)[0] == ["<thank you<|im_end|>"]
    empty = [USER, {"role": "assistant", "content": ""}, *TALK[2:]]
    assert trained(template(prompt=PROMPT + "<think>\n"), empty)[0] == ["<|im_end|>", "a2<|im_end|>"]


@pytest.mark.parametrize(
    "prompt",
    ["<|im_start|>user\n", "<|im_start|>critic\nJudge this.<|im_end|>\n", "Answer now:"],
    ids=["other role", "another turn", "no header"],
)
def test_r4_any_other_drift_is_refused(prompt):
    error = refusal(template(prompt=prompt))
    assert (error.code, error.field) == ("history_drift", "messages[1]")


def test_r4_history_that_is_rewritten_is_split():
    moved = template(
        "{% if m.role == 'user' and loop.index0 == messages|length - 2 %}<|im_start|>note\nlast question<|im_end|>\n{% endif %}"
        + HEAD
        + TURN
    )
    prompt_moves = (
        "{% for m in messages %}{% if m.role == 'user' and loop.revindex <= 2 %}NOTE {% endif %}" + HEAD + TURN
    )
    source = prompt_moves + "{% endfor %}{% if add_generation_prompt %}" + PROMPT + "{% endif %}"
    assert refusal(source).code == "history_drift"
    assert trained(source, turns="auto") == (["a1<|im_end|>", "a2<|im_end|>"], {"split"})
    assert refusal(moved).code == "history_drift"


def test_r5_the_stop_is_eos_or_else_the_last_control_token():
    assert trained(template(HEAD + "{{ m.content }}\n<|end|><|im_end|></s>\n"))[0][0] == "a1\n<|end|><|im_end|>"
    assert trained(template(HEAD + "{{ m.content }}<|end|><|stop|>\n"))[0][0] == "a1<|end|><|stop|>"
    assert trained(template("{{ m.role }}: {{ m.content }} ###\n", "assistant:"))[0][0] == " a1 ###"


def test_r6_blanks_after_the_stop_are_not_trained():
    assert trained(template(HEAD + "{{ m.content }}<|im_end|>\n\n \n"))[0][0] == "a1<|im_end|>"


def test_r7_a_stop_that_only_the_next_message_prints():
    assert trained(LATE_STOP) == (["a1<|im_end|>", "a2"], {"unclosed_final"})
    unless_last = template(
        HEAD + "{{ m.content }}{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}"
    )
    assert trained(unless_last) == (["a1<|im_end|>", "a2"], {"unclosed_final"})


def test_r8_no_stop_at_all_ends_with_the_answer():
    openers_only = template("<|{{ m.role }}|>\n{{ m.content }}", "<|assistant|>\n")
    assert trained(openers_only) == (["a1", "a2"], {"no_stop"})
    assert trained(STOPLESS) == (["a1", "a2"], {"no_stop"})


@pytest.mark.parametrize(
    ("source", "messages", "trained", "flags"),
    [
        (LATE_STOP, TALK, "a1<|im_end|>a2<|im_end|>", {"eos_appended"}),
        (STOPLESS, TALK[:2], "a1<|im_end|>", {"eos_appended"}),
        (STOPLESS, TALK, "a1a2<|im_end|>", {"eos_appended", "no_stop"}),
        (STOPLESS, [*TALK, USER], "a1a2", {"no_stop", "trailing_turns"}),
        (template(), TALK, "a1<|im_end|>a2<|im_end|>", set()),
    ],
)
def test_r7_eos_can_be_put_where_the_template_prints_no_last_stop(tokenizer_dir, source, messages, trained, flags):
    (example,) = encode(messages, tokenizer_dir("tiny_bpe"), source, unclosed="append_eos")
    assert (shown(example), example.flags) == (trained, flags)
    if "eos_appended" in flags:
        assert example.text.endswith("a2<|im_end|>" if len(messages) > 2 else "a1<|im_end|>")


def test_r9_middle_and_final_stops_may_differ():
    source = template(
        "<|start|>{{ m.role }}<|message|>{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}",
        "<|start|>assistant<|message|>",
    )
    special = {"eos_token": "<|return|>"}
    (one,) = render(Conversation(tuple(TALK)), Template("t", source, strict=False, special_tokens=special), "joint")
    parts = [one.text[s.start : s.end] for s in one.spans if s.generated]
    assert parts == ["a1", "<|end|>", "a2", "<|return|>"]


def test_r10_what_follows_the_final_stop_is_never_trained():
    always = template().replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "{{ '' }}")
    assert trained(always) == (["a1<|im_end|>", "a2<|im_end|>"], {"junk_tail"})
    twice = template() + "{% if not add_generation_prompt %}</s>{% endif %}"
    assert trained(twice) == (["a1<|im_end|>", "a2<|im_end|>"], {"junk_tail"})


THINKS = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"


def test_r11_tool_calls_are_trained_and_results_are_not():
    texts, flags = trained(template(HEAD + "{{ m.content }}" + CALLS + "<|im_end|>\n"), TOOLED)
    assert texts[0] == '<tool_call>{"name": "find", "arguments": {"key": "value"}}</tool_call><|im_end|>'
    assert texts[1] == "a2<|im_end|>"
    assert flags == set()


def test_r11_a_message_printed_around_another_is_refused():
    around = (
        "{% for m in messages %}{% if m.role != 'tool' %}" + HEAD + CALLS + "{% if m.tool_calls %}"
        "<result>{{ messages[loop.index0 + 1].content if not loop.last else '' }}</result>{% endif %}"
        + TURN
        + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + PROMPT + "{% endif %}"
    )
    messages = [USER, {**CALL, "content": "then"}, *TOOLED[2:]]
    assert refusal(around, messages).code == "interleaved"


def test_r12_text_that_never_arrives():
    assert refusal(template(), TOOLED).code == "payload_dropped"
    no_system = template("{% if m.role != 'system' %}" + HEAD + TURN + "{% endif %}")
    with_rule = [{"role": "system", "content": "be brief"}, *TALK]
    assert refusal(no_system, with_rule).field == "messages[0].content"
    assert trained(no_system, with_rule, dropped="flag") == (["a1<|im_end|>", "a2<|im_end|>"], {"payload_dropped"})
    one = [USER, {"role": "assistant", "content": [{"type": "text", "text": "a1"}]}]
    assert trained(template(), one) == (["a1<|im_end|>"], {"parts_joined"})
    parts = [USER, {"role": "assistant", "content": [{"type": "text", "text": "a1"}] * 2}]
    assert refusal(template(HEAD + "{{ m.content | tojson }}<|im_end|>\n"), parts).code == "content_stringified"
    thought = [USER, {**ANSWER, "reasoning_content": "hm"}]
    assert trained(template(), thought) == (["a1<|im_end|>"], {"reasoning_dropped"})
    cut = template(HEAD + "{{ m.content.split('</think>')[-1] }}<|im_end|>\n")
    assert trained(cut, [USER, {"role": "assistant", "content": "hm</think>a1"}]) == (["a1<|im_end|>"], {"content_cut"})
    assert trained(template(), [USER, {**ANSWER, "mood": "sunny"}])[1] == {"fields_dropped"}


def test_r12_text_whose_memory_is_lost_is_found_by_changing_it():
    literal = template(HEAD + "{% for c in m.tool_calls or [] %}<call>{{ c.function }}</call>{% endfor %}" + TURN)
    texts, _ = trained(literal, TOOLED)
    assert texts[0] == "<call>{'name': 'find', 'arguments': {'key': 'value'}}</call><|im_end|>"
    formatted = template(HEAD + "{{ '%s' % m.content }}<|im_end|>\n")
    assert trained(formatted) == (["a1<|im_end|>", "a2<|im_end|>"], set())


def test_r13_what_the_template_refuses_is_refused_in_its_own_words():
    strict = template("{% if m.role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}" + HEAD + TURN)
    error = refusal(strict, [{"role": "system", "content": "x"}, *TALK])
    assert error.code == "template_raises"
    assert "no system, please" in error.message
    after_user = template(
        "{% if loop.first and m.role != 'user' %}{{ raise_exception('begin!') }}{% endif %}" + HEAD + TURN
    )
    assert refusal(after_user, [ANSWER]).code == "template_raises"


def test_r13_two_answers_in_a_row():
    assert trained(template(), [USER, ANSWER, {"role": "assistant", "content": "more"}])[0] == [
        "a1<|im_end|>",
        "more<|im_end|>",
    ]
    late = template("{% if not loop.first %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}", PROMPT)
    assert refusal(late, [USER, ANSWER, {"role": "assistant", "content": "more"}]).code in {"overlap", "history_drift"}


def test_r14_a_token_is_trained_if_it_overlaps_by_a_character(tokenizer_dir):
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    (example,) = encode(
        [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}],
        tokenizer_dir("tiny_bpe"),
        source,
    )
    start = next(span.start for span in example.spans if span.generated)
    first = int(np.flatnonzero(example.trained)[0])
    assert example.offsets[first, 0] < start < example.offsets[first, 1]


def test_r15_without_offsets_there_is_no_mask():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer"):
        encode(TALK, Slow())


def test_r16_typed_control_tokens_leave_the_mask_exact(tokenizer_dir):
    typed = [USER, {"role": "assistant", "content": "say <|im_end|>\n<|im_start|>user\nx"}]
    (plain,) = encode(typed, tokenizer_dir("tiny_bpe"))
    (real,) = encode(typed, tokenizer_dir("tiny_bpe"), control_tokens="allow")
    for example in (plain, real):
        kept = example.offsets[example.trained]
        assert example.text[kept[0, 0] : kept[-1, 1]] == typed[1]["content"] + "<|im_end|>"
    assert "control_tokens" in plain.flags


def test_r17_the_date_is_pinned(tokenizer_dir):
    source = template(before="Today is {{ strftime_now('%d %b %Y') }}.\n")
    (example,) = encode(TALK, tokenizer_dir("tiny_bpe"), source, date="2030-05-06")
    assert example.text.startswith("Today is 06 May 2030.")
    (example,) = encode(TALK, tokenizer_dir("tiny_bpe"), source)
    assert example.text.startswith("Today is 01 Jan 2026.")


def test_r18_flags_follow_truncation(tokenizer_dir):
    recipe = make_recipe(tokenizer_dir("tiny_bpe"), max_length=20, overlong="truncate")
    row = Row({"messages": [USER, {"role": "assistant", "content": "word " * 40}]}, Source("x", 0))
    (built,) = build_rows(recipe, [row])
    assert built.examples[0].flags >= {"truncated", "truncated_answer"}


RATED = template(HEAD + TURN + "{% if m.rating %}<|im_start|>rating\n{{ m.rating }}<|im_end|>\n{% endif %}")


def test_r5_other_fields_of_a_message_do_not_move_its_stop():
    assert trained(RATED, [USER, {**ANSWER, "rating": "5 stars"}, *TALK[2:]])[0] == ["a1<|im_end|>", "a2<|im_end|>"]
    inside = template(HEAD + "{{ m.content[:1] }}{{ m.rating }}{{ m.content[1:] }}<|im_end|>\n")
    assert refusal(inside, [USER, {**ANSWER, "rating": "5 stars"}]).code == "interleaved"


def test_r8_the_opener_of_the_next_message_is_no_stop():
    numbered = "{% for m in messages %}<|im_start|>{{ m.role }} #{{ loop.index }}\n{{ m.content }}\n{% endfor %}"
    asked = numbered + "{% if add_generation_prompt %}<|im_start|>assistant #{{ messages|length + 1 }}\n{% endif %}"
    assert trained(asked) == (["a1", "a2"], {"no_stop"})
    first_bare = "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first %}[INST] {% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }} {% endif %}{% endfor %}"
    assert trained(first_bare) == ([" a1", " a2"], {"no_stop"})


def test_r10_a_footer_is_not_trained():
    footer = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}assistant: {% else %}### End{% endif %}"
    assert trained(footer) == (["a1", "a2"], {"no_stop", "junk_tail"})


def test_r9_a_stop_that_is_printed_only_where_the_conversation_ends(tokenizer_dir):
    ends = template(
        "{{ m.role }}:\n{{ m.content }}\n{% if loop.last and not add_generation_prompt %}<|endoftext|>{% endif %}",
        "assistant:\n",
    )
    (example,) = encode(TALK, tokenizer_dir("qwen"), ends)
    assert (shown(example), example.flags) == ("a1a2\n<|endoftext|>", {"no_stop"})
    asks = template("<|im_start|>{{ m.role }}:\n{{ m.content }}\n", "") + "<|im_start|>assistant:{{ '\n' }}"
    (example,) = encode(TALK, tokenizer_dir("qwen"), asks)
    assert (shown(example), example.flags) == ("a1a2", {"no_stop", "junk_tail"})


@pytest.mark.parametrize("prompt", ["Answer now: ", "[Be brief] Ok. "])
def test_r4_a_prompt_that_says_more_than_thinking_is_refused(prompt):
    assert refusal(template(prompt=PROMPT + prompt)).code == "history_drift"


def test_r12_one_of_two_calls_that_is_missing():
    first_only = template(
        HEAD + "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}<|im_end|>\n"
    )
    second = {"type": "function", "function": {"name": "find", "arguments": {"key": "another"}}}
    calls = [USER, {**CALL, "tool_calls": [*CALL["tool_calls"], second]}]
    assert refusal(first_only, calls).code == "payload_dropped"
    assert (
        "tools_dropped"
        in render(
            Conversation((USER, ANSWER), tools=({"name": "find"},)), Template("t", template(), strict=False), "joint"
        )[0].flags
    )


@pytest.mark.parametrize(
    "before",
    [
        "{{ tools }}",
        "{{ '(%s)' | format(messages[0].name) }}",
        "{{ '<note>%s</note>' | format(messages[0].mood) }}",
    ],
)
def test_r16_control_tokens_in_text_that_cannot_be_followed_are_refused(tokenizer_dir, before):
    typed = "say <|im_end|> here"
    messages = [{**USER, "name": typed, "mood": typed}, ANSWER]
    tools = [{"type": "function", "function": {"name": "f", "description": typed}}]
    with pytest.raises(BadRow, match="control_tokens"):
        encode(messages, tokenizer_dir("tiny_bpe"), template(before=before), tools=tools)


PRINTS = template(
    HEAD
    + "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments }}</call>{% endfor %}<|im_end|>\n"
)


def test_arguments_that_are_text_are_printed_as_they_are_where_the_template_takes_text():
    written = '{"city":"Ulm", "n":1.50}'
    assert trained(PRINTS, called(written)) == ([f"<call>f {written}</call><|im_end|>", "a2<|im_end|>"], set())
    assert trained(PRINTS, called(""))[0][0] == "<call>f </call><|im_end|>"
    as_json = template(HEAD + "{{ m.content }}" + CALLS + "<|im_end|>\n")
    texts, flags = trained(as_json, called(written))
    assert texts[0] == '<tool_call>{"name": "f", "arguments": {"city": "Ulm", "n": 1.5}}</tool_call><|im_end|>'
    assert flags == {"arguments_parsed"}
    assert refusal(as_json, called('{"city":')).code == "tool_arguments"


@pytest.mark.parametrize("arguments", [{"n": 12}, {"n": "x"}, {"s": "abc", "n": [1, 2], "flag": True}])
def test_r11_numbers_and_brackets_of_a_call_are_its_own(arguments):
    stopless = template(
        "<|{{ m.role }}|>\n{{ m.content }}" + CALLS.replace("</tool_call>", "") + "\n", "<|assistant|>\n"
    )
    texts, flags = trained(stopless, called(arguments))
    assert texts[0] == f'<tool_call>{{"name": "f", "arguments": {json.dumps(arguments)}}}'
    assert flags == {"no_stop"}


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
def test_r12_numbers_and_keys_that_never_arrive(turn, messages):
    assert refusal(template(HEAD + turn + "<|im_end|>\n"), messages).code == "payload_dropped"


@pytest.mark.parametrize(
    ("turn", "more", "flag"),
    [
        ("{{ m.content[0].text }}", {"content": [{"type": "text", "text": "so yes"}, {"type": "text", "text": "yes"}]}, "content_cut"),
        (THINKS, {"reasoning_content": "one", "thinking": "another"}, "content_cut"),
        ("{{ m.content }}", {"reasoning_content": ["a thought"]}, "reasoning_dropped"),
        ("{{ m.content }}", {"score": 3}, "fields_dropped"),
        ("{{ m.content }}{{ m.score }}", {"score": 3}, None),
        ("{{ '<think>%s</think>' % m.reasoning_content }}{{ m.content }}", {"reasoning_content": "one"}, None),
        ("<think>{{ m.content.split('</think>')[0][7:] | trim }}</think>{{ m.content.split('</think>')[1] | trim }}",
         {"content": "<think>\nhm\n</think>\n\nyes"}, None),
    ],
)  # fmt: skip
def test_r12_what_is_lost_is_flagged_and_nothing_else(turn, more, flag):
    messages = [{"role": "user", "content": "q"}, {**ANSWER, **more}]
    source = template(HEAD + "{% if m.role == 'user' %}{{ m.content }}{% else %}" + turn + "{% endif %}<|im_end|>\n")
    assert trained(source, messages)[1] == ({flag} if flag else set())


def test_tools_that_are_not_printed_whole_are_flagged():
    tools = [
        {"type": "function", "function": {"name": n, "parameters": {"properties": {"k": {}}}}} for n in ("go", "run")
    ]

    def flags(before):
        source = Template("t", template(before=before), strict=False, special_tokens={"eos_token": "<|im_end|>"})
        return render(Conversation(tuple(TALK), tools=tuple(tools)), source, "joint")[0].flags

    assert flags("{{ tools | tojson }}") == set()
    assert (
        flags("{{ (tools or [{}])[0] | tojson }}")
        == flags("{% for t in tools or [] %}{{ t.function.name }}{% endfor %}")
        == {"tools_dropped"}
    )


def test_r13_nothing_asks_for_an_answer_that_opens_the_conversation():
    assert refusal(template(), [ANSWER, *TALK]).code == "no_prompt"


@pytest.mark.parametrize(
    "turn",
    [
        "{{ m.content }}",
        "{% if '</think>' in m.content %}<think>{{ m.content.split('<think>')[1] }}{% else %}{{ m.content }}{% endif %}",
    ],
)
def test_r16_tags_of_thinking_that_is_written_into_an_answer_are_real(tokenizer_dir, turn):
    messages = [
        {"role": "user", "content": "what is <think> for?"},
        {"role": "assistant", "content": "<think>hm</think>\n\nyes </think>"},
        *TALK[2:],
    ]
    tokenizer = load_tokenizer(tokenizer_dir("qwen"))
    assert "<think>" in tokenizer.added_tokens
    (example,) = encode(
        messages, tokenizer, template(HEAD + turn + "{# <think> </think> #}<|im_end|>\n"), turns="joint"
    )
    ids = [tokenizer.id_of("<think>"), tokenizer.id_of("</think>")]
    assert [int((example.input_ids == one).sum()) for one in ids] == [1, 1]
    assert example.trained[np.isin(example.input_ids, ids)].all()
    (answers,) = encode(
        messages, tokenizer, template(HEAD + turn + "<|im_end|>\n"), turns="joint", train_parts=["answer"]
    )
    assert shown(answers) == "yes </think><|im_end|>a2<|im_end|>"


def test_r16_tags_of_thinking_in_earlier_answers_are_real_too(tokenizer_dir):
    thinking = [
        {**m, "content": f"\n <think>hm</think> \n{m['content']}"} if m["role"] == "assistant" else m for m in TALK
    ]
    messages = [{"role": "system", "content": "<think>no</think>"}, *thinking]
    tokenizer = load_tokenizer(tokenizer_dir("qwen"))
    examples = encode(
        messages, tokenizer, template(HEAD + "{{ m.content }}{# <think> </think> #}<|im_end|>\n"), turns="split"
    )
    ids = [tokenizer.id_of("<think>"), tokenizer.id_of("</think>")]
    assert [[int((one.input_ids == i).sum()) for i in ids] for one in examples] == [[1, 1], [2, 2]]
    for example, turn in zip(examples, (2, 4), strict=True):
        check_laws(example, messages, trained=[turn])
        parts = [(span.part, example.text[span.start : span.end]) for span in example.spans if span.message == turn]
        assert "".join(text for part, text in parts if part is Part.REASONING) == "\n hm \n"
        assert "".join(text for part, text in parts if part is Part.CONTENT) == f"a{turn // 2}"


ENDS = "{% if loop.last and m.role == 'assistant' %}<|end|>{% else %}<|im_end|>\n{% endif %}"


@pytest.mark.parametrize(
    ("turn", "messages", "expected", "flags"),
    [
        ("{{ m.content }}" + CALLS + ENDS, TOOLED, ["</tool_call><|im_end|>", "a2<|end|>"], set()),
        ("{{ m.content }}{% if m.role != 'user' %}</answer>{% endif %}" + ENDS, TALK, ["a1</answer><|im_end|>", "a2</answer><|end|>"], set()),
        ("{{ m.content }}" + CALLS + "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}", TOOLED, ["</tool_call><|im_end|>", "a2"], {"unclosed_final"}),
    ],
)  # fmt: skip
def test_r5_a_closing_tag_is_no_stop(turn, messages, expected, flags):
    texts, found = trained(template(HEAD + turn), messages, special={"eos_token": "<|end|>"})
    assert [text[-len(end) :] for text, end in zip(texts, expected, strict=True)] == expected
    assert found == flags


def test_r7_a_call_without_its_stop_is_unclosed(tokenizer_dir):
    late = template(
        "{% if not loop.first %}<|im_end|>\n{% endif %}" + HEAD + "{{ m.content }}" + CALLS, "<|im_end|>\n" + PROMPT
    )
    texts, flags = trained(late, TOOLED)
    assert (texts[0][-22:], texts[1], flags) == ("</tool_call><|im_end|>", "a2", {"unclosed_final"})
    assert trained(late, TOOLED[:2])[1] == {"unclosed_final"}
    (example,) = encode(TOOLED[:2], tokenizer_dir("tiny_bpe"), late, unclosed="append_eos")
    assert shown(example).endswith("</tool_call><|im_end|>")


def test_r8_the_stop_of_a_blank_message_is_not_the_answers():
    source = "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content | trim }}<|im_end|>{% else %}<|assistant|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    assert trained(source, [*TALK[:2], {"role": "user", "content": " "}, TALK[3]]) == (["a1", "a2"], {"no_stop"})


@pytest.mark.parametrize("key", ["function_call", "function_calls"])
def test_r11_older_spellings_of_calls_are_trained(key):
    printed = "{% if m." + key + " %}<tool_call>{{ m." + key + " | tojson }}</tool_call>{% endif %}"
    messages = [USER, {**ANSWER, key: {"name": "f", "arguments": "{}"}}, *TOOLED[2:]]
    texts, flags = trained(template(HEAD + "{{ m.content }}" + printed + "<|im_end|>\n"), messages)
    assert texts[0] == 'a1<tool_call>{"name": "f", "arguments": "{}"}</tool_call><|im_end|>'
    assert flags == set()


def test_r11_any_other_field_before_the_stop_is_refused():
    source = template(HEAD + "{{ m.content }}{% if m.mood %} ({{ m.mood }}){% endif %}<|im_end|>\n")
    assert refusal(source, [USER, {**ANSWER, "mood": "sunny"}]).code == "interleaved"


def test_r4_history_that_cannot_be_compared_is_flagged():
    source = template(
        "{% if m.tool_calls and loop.last %}{{ raise_exception('a call needs its result') }}{% endif %}"
        + HEAD
        + "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}"
        + CALLS
        + "<|im_end|>\n"
    )
    assert trained(source, TOOLED)[1] == {"uncompared"}


def test_r12_a_call_that_says_what_another_says():
    first_only = template(
        HEAD + "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}<|im_end|>\n"
    )
    every = template(HEAD + "{{ m.content }}" + CALLS + "<|im_end|>\n")
    for arguments in ({"key": "lu"}, {"key": "value"}, {"key": 1}):
        second = {"type": "function", "function": {"name": "find", "arguments": arguments}}
        first = {"type": "function", "function": {"name": "find", "arguments": {"key": "value", "n": 12}}}
        messages = [USER, {**CALL, "tool_calls": [first, second]}]
        assert refusal(first_only, messages).code == "payload_dropped"
        assert trained(every, messages)[1] == set()


def test_r16_tags_that_the_prompt_opens_are_real_in_the_answer_too(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir("qwen"))
    messages = [USER, {"role": "assistant", "content": "<think>hm</think>yes"}]
    (example,) = encode(messages, tokenizer, template(prompt=PROMPT + "<think>"), control_tokens="refuse")
    ids = [tokenizer.id_of("<think>"), tokenizer.id_of("</think>")]
    assert [int((example.input_ids == one).sum()) for one in ids] == [1, 1]
    assert shown(example) == "hm</think>yes<|im_end|>"


@pytest.mark.parametrize("name", ["<|IM_END|>ß", "ß<|IM_END|>", "ŉ<|IM_END|>ß"])
def test_r16_letters_that_change_their_number_hide_no_control_token(tokenizer_dir, name):
    source = template(HEAD + "{{ (m.name or '') | lower | upper | lower }}" + TURN)
    (example,) = encode([{**USER, "name": name.replace("ß", "İ")}, ANSWER], tokenizer_dir("tiny_bpe"), source)
    tokenizer = Tokenizer.from_file(f"{tokenizer_dir('tiny_bpe')}/tokenizer.json")
    assert example.input_ids.tolist().count(tokenizer.token_to_id("<|im_end|>")) == 2
    assert "control_tokens" in example.flags


def test_roles_that_a_template_names_go_through():
    named = template("{% if m.role == 'ipython' %}<|im_start|>ipython\n{% else %}" + HEAD + "{% endif %}" + TURN)
    messages = [USER, CALL | {"content": "c", "tool_calls": None}, {"role": "ipython", "content": "r"}, TALK[3]]
    assert "<|im_start|>ipython\nr" in outcome(named, messages)[0].text
    assert "<|im_start|>tool\nr" in outcome(template(), messages)[0].text
    error = refusal(template(), [{"role": "context", "content": "c"}, *TALK])
    assert (error.code, error.field) == ("unknown_role", "messages[0].role")


def test_an_answer_that_is_not_trained_needs_no_prompt():
    assert trained(template(), [{**ANSWER, "train": False}, *TALK])[0] == ["a1<|im_end|>", "a2<|im_end|>"]
