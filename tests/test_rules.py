"""What a model must produce under any chat template, rule by rule: where turns begin and end, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from ftdata import encode
from ftdata.errors import BadRow, TemplateRefused, UsageError
from ftdata.examples import FLAGS, build_rows, make_recipe
from ftdata.templates import Template, render
from ftdata.testing import check_laws, try_template
from ftdata.tokenize import load_tokenizer
from ftdata.types import Conversation, Part, Row, Source

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


def outcome(source, messages=TALK, turns="joint", **options):
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    return render(
        Conversation(tuple(messages)), Template("t", source, strict=False, special_tokens=special), turns, **options
    )


def trained(source, messages=TALK, turns="joint", **options):
    """The text that is trained, one entry per turn, and the flags of all texts."""
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


def shown(example):
    return "".join(example.text[a:b] for a, b in example.offsets[example.trained])


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


def test_flags_can_be_made_faults(tokenizer_dir):
    with pytest.raises(BadRow, match="no_stop"):
        encode(TALK, tokenizer_dir("tiny_bpe"), STOPLESS, refuse=["no_stop"])
    encode(TALK, tokenizer_dir("tiny_bpe"), refuse=["no_stop"])
    with pytest.raises(UsageError, match="no_stop"):
        encode(TALK, tokenizer_dir("tiny_bpe"), refuse=["nostop"])
    with pytest.raises(UsageError, match="list of flags"):
        encode(TALK, tokenizer_dir("tiny_bpe"), refuse="no_stop")
    rows = [Row({"messages": TALK}, Source("x", n)) for n in range(2)]
    recipe = make_recipe(tokenizer_dir("tiny_bpe"), STOPLESS, refuse=["no_stop"])
    assert [(one.code, one.tokens > 0) for one in build_rows(recipe, rows)] == [("no_stop", True)] * 2
    cut = make_recipe(tokenizer_dir("tiny_bpe"), max_length=60, overlong="truncate", refuse=["truncated_answer"])
    (row,) = build_rows(cut, [Row({"messages": [USER, {**ANSWER, "content": "long " * 30}]}, Source("x", 0))])
    assert row.code == "truncated_answer"


def test_every_flag_is_documented():
    table = (
        (Path(__file__).parents[1] / "docs" / "masks.md")
        .read_text()
        .partition("| flag |")[2]
        .partition("| refusal |")[0]
    )
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(FLAGS)


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

CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"


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
    parts = [USER, {"role": "assistant", "content": [{"type": "text", "text": "a1"}]}]
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


def test_turns_are_grouped_by_the_question_they_answer():
    """A call, its result and the answer are shown together, as they are when the model is asked for them."""
    thinking = "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think></think>{% endif %}"
    source = (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        + template(HEAD + thinking + "{{ m.content }}" + CALLS + "<|im_end|>\n")
    )
    messages = [*TOOLED, {"role": "user", "content": "q3"}, {"role": "assistant", "content": "a3"}]
    first, second = outcome(source, messages, "auto")
    assert {span.message for span in first.spans if span.generated} == {1, 3}
    assert {span.message for span in second.spans if span.generated} == {5}
    assert (first.messages, second.messages) == (4, 6)


THINKING = [USER, {"role": "assistant", "content": "a1", "reasoning_content": "hm"}]


@pytest.mark.parametrize(
    ("messages", "parts", "expected"),
    [
        (THINKING, ["answer"], "a1<|im_end|>"),
        (THINKING, ["reasoning"], "<think>hm</think>"),
        (THINKING, ["reasoning", "answer"], "<think>hm</think>a1<|im_end|>"),
        ([USER, {"role": "assistant", "content": "<think>hm</think>\na1"}], ["answer"], "a1<|im_end|>"),
        (
            [USER, {**CALL, "content": "let me see"}],
            ["tool_call"],
            '<tool_call>{"name": "find", "arguments": {"key": "value"}}</tool_call><|im_end|>',
        ),
        ([USER, {**CALL, "content": "let me see"}], ["answer"], "let me see"),
        (
            [USER, {**ANSWER, "reasoning_content": "r1"}, USER, {**ANSWER, "reasoning_content": "r2"}],
            ["reasoning"],
            "<think>r1</think><think>r2</think>",
        ),
        (TOOLED, ["answer"], "a2<|im_end|>"),
    ],
)
def test_parts_of_a_turn_can_be_chosen(tokenizer_dir, messages, parts, expected):
    source = template(
        HEAD
        + "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
        + CALLS
        + "<|im_end|>\n"
    )
    (example,) = encode(messages, tokenizer_dir("tiny_bpe"), source, train_parts=parts)
    pieces = example.offsets[example.trained]
    assert "".join(example.text[a:b] for a, b in pieces) == expected


@pytest.mark.parametrize("key", ["train", "training", "weight", "loss"])
def test_messages_say_themselves_whether_they_are_trained(tokenizer_dir, key):
    messages = [USER, {**ANSWER, key: 0}, *TALK[2:]]
    (example,) = encode(messages, tokenizer_dir("tiny_bpe"))
    assert "".join(example.text[a:b] for a, b in example.offsets[example.trained]) == "a2<|im_end|>"
    assert "fields_dropped" not in example.flags


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


def test_thinking_that_the_prompt_opens_is_reasoning(tokenizer_dir):
    source = template(prompt=PROMPT + "<think>\n").replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n{% endif %}{{ m.content }}"
    )
    messages = [USER, {"role": "assistant", "content": "why\n</think>\n\na1"}]
    (example,) = encode(messages, tokenizer_dir("tiny_bpe"), source, train_parts=["answer"])
    assert "".join(example.text[a:b] for a, b in example.offsets[example.trained]) == "a1<|im_end|>"


def test_lone_surrogates_are_refused_row_by_row(tokenizer_dir):
    with pytest.raises(BadRow, match="lone_surrogate"):
        encode([{"role": "user", "content": "\ud800"}, ANSWER], tokenizer_dir("tiny_bpe"))


def test_whole_numbers_of_any_size_stay(tokenizer_dir):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"id": 123456789012345678901234567890}'}}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (example,) = encode(
        messages, tokenizer_dir("tiny_bpe"), template(HEAD + "{{ m.content }}" + CALLS + "<|im_end|>\n")
    )
    assert "123456789012345678901234567890" in example.text


def test_what_is_remembered_does_not_hide_what_is_cut():
    """The prompt prints earlier answers whole, the conversation cuts thinking out of them: seen only where there is any."""
    strip = "{% set c = m.content %}{% if m.role == 'assistant' and loop.index0 != ns.last and '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    source = (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'assistant' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        + template(strip + HEAD + "{{ c }}<|im_end|>\n")
    )
    known = Template("t", source, strict=False, special_tokens={"eos_token": "<|im_end|>"})
    (plain,) = render(Conversation(tuple(TALK)), known, "joint")
    assert plain.flags == set()
    thinking = [USER, {"role": "assistant", "content": "<think>hm</think>a1"}, *TALK[2:]]
    with pytest.raises(BadRow, match="history_drift"):
        render(Conversation(tuple(thinking)), known, "joint")


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
        assert "".join(text for part, text in parts if part is Part.REASONING) == "hm \n"
        assert "".join(text for part, text in parts if part is Part.CONTENT) == f"\n a{turn // 2}"


def test_tags_of_a_users_own_template_are_followed_and_compared(tokenizer_dir):
    right = template("<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n")
    header = template("<|im_start|>{% generation %}{{ m.role }}\n{{ m.content }}<|im_end|>{% endgeneration %}\n")
    only = "{% if m.role == 'assistant' %}", "{% else %}" + TURN + "{% endif %}"
    right, header = (
        source.replace("{% generation %}", only[0] + "{% generation %}").replace(
            "{% endgeneration %}\n", "{% endgeneration %}\n" + only[1].replace(TURN, body)
        )
        for source, body in ((right, TURN), (header, "{{ m.role }}\n" + TURN))
    )
    (example,) = encode(TALK, tokenizer_dir("tiny_bpe"), right)
    assert (shown(example), example.flags) == ("a1<|im_end|>a2<|im_end|>", set())
    (example,) = encode(TALK, tokenizer_dir("tiny_bpe"), header)
    assert (shown(example), example.flags) == ("assistant\na1<|im_end|>assistant\na2<|im_end|>", {"tags_unconfirmed"})
    with pytest.raises(AssertionError, match="M2"):
        try_template(tokenizer_dir("tiny_bpe"), header, max_examples=10)


@pytest.mark.parametrize("asked", ["messages[-1].content | title == 'Short'", "messages[-1].content is in '/short'"])
def test_what_is_remembered_hangs_on_all_that_a_template_may_ask(tokenizer_dir, asked):
    source = template(prompt=PROMPT + "{% if " + asked + " %}Sure: {% endif %}")
    encode([{"role": "user", "content": "hello"}, ANSWER], tokenizer_dir("tiny_bpe"), source)
    with pytest.raises(BadRow, match="history_drift"):
        encode([{"role": "user", "content": "short"}, ANSWER], tokenizer_dir("tiny_bpe"), source)


@pytest.mark.parametrize(
    ("messages", "options", "error"),
    [
        (None, {}, BadRow),
        ([{"role": "user", "content": "q", "x": {1}}, ANSWER], {}, BadRow),
        (TALK, {"train_parts": [1]}, UsageError),
        (TALK, {"train_parts": []}, UsageError),
        (TALK, {"train_parts": "answer"}, UsageError),
        (TALK, {"train_on": None}, UsageError),
        (TALK, {"train_on": lambda *_: None}, UsageError),
        (TALK, {"turns": None}, UsageError),
        (TALK, {"template_kwargs": [1]}, UsageError),
        (TALK, {"template_kwargs": {"tools": []}}, UsageError),
        (TALK, {"template": "{% for m in messages %}" * 30 + "{% endfor %}" * 30}, TemplateRefused),
        (TALK, {"template": "{% for m in messages %}{% set c = cycler() %}{% endfor %}"}, BadRow),
    ],
)
def test_what_cannot_be_meant_is_an_error_of_ours(tokenizer_dir, messages, options, error):
    with pytest.raises(error):
        encode(messages, tokenizer_dir("tiny_bpe"), **options)


def test_a_policy_must_speak_of_every_span(tokenizer_dir):
    with pytest.raises(UsageError, match=r"\[mask_length\] the mask policy gave 1 answers for \d+ spans"):
        encode(TALK, tokenizer_dir("tiny_bpe"), train_on=lambda *_: [True])


def test_rows_nested_too_deep_are_rejected(tokenizer_dir):
    deep = {}
    for _ in range(3000):
        deep = {"x": deep}
    recipe = make_recipe(tokenizer_dir("tiny_bpe"))
    (row,) = build_rows(recipe, [Row({"messages": [{**USER, "extra": deep}, ANSWER]}, Source("x", 0))])
    assert row.code == "too_deep"
