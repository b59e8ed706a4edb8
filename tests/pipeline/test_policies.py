"""User options: parts, turns, rejected flags and generation tags; invalid options."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
from chat_templates import (
    ANSWER,
    CALL,
    CALLS,
    HEAD,
    PROMPT,
    STOPLESS,
    TALK,
    TOOLED,
    TURN,
    USER,
    outcome,
    shown,
    template,
)

from ftdata import encode
from ftdata.errors import BadRow, TemplateRefused, UsageError
from ftdata.pipeline.examples import build_rows
from ftdata.pipeline.mask import assistant, completion, last_assistant
from ftdata.pipeline.recipe import make_recipe
from ftdata.templates import Template, render_in_worker
from ftdata.testing import try_template
from ftdata.types import Conversation, Row, Source


def test_reject_flags_rejects_rows_with_these_flags(tokenizer_dir):
    with pytest.raises(BadRow, match="no_trained_stop"):
        encode(TALK, tokenizer_dir("tiny_bpe"), STOPLESS, reject_flags=["no_trained_stop"])
    encode(TALK, tokenizer_dir("tiny_bpe"), reject_flags=["no_trained_stop"])
    with pytest.raises(UsageError, match="no_trained_stop"):
        encode(TALK, tokenizer_dir("tiny_bpe"), reject_flags=["nostop"])
    with pytest.raises(UsageError, match="list of flags"):
        encode(TALK, tokenizer_dir("tiny_bpe"), reject_flags="no_trained_stop")
    rows = [Row({"messages": TALK}, Source("x", n)) for n in range(2)]
    recipe = make_recipe(tokenizer_dir("tiny_bpe"), STOPLESS, reject_flags=["no_trained_stop"])
    assert [(one.code, one.tokens > 0) for one in build_rows(recipe, rows)] == [("no_trained_stop", True)] * 2
    cut = make_recipe(tokenizer_dir("tiny_bpe"), max_length=60, overlong="truncate", reject_flags=["answer_truncated"])
    (row,) = build_rows(cut, [Row({"messages": [USER, {**ANSWER, "content": "long " * 30}]}, Source("x", 0))])
    assert row.code == "answer_truncated"


def test_assistant_messages_are_grouped_by_user_message():
    """A tool call, its result and the answer are one example, as at inference."""
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


def test_empty_answer_whose_block_is_rewritten_is_split(tokenizer_dir):
    """The template prints an empty thinking block in the last answer only."""
    block = "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    source = template(HEAD + block + "{{ m.content }}<|im_end|>\n")
    messages = [USER, {**ANSWER, "content": ""}, *TALK[2:]]
    first, second = encode(messages, tokenizer_dir("tiny_bpe"), source)
    trained = ["".join(e.text[a:b] for a, b in e.offsets[e.trained]) for e in (first, second)]
    assert trained == ["<think></think><|im_end|>", "<think></think>a2<|im_end|>"]
    (joint,) = encode(messages, tokenizer_dir("tiny_bpe"), source, turns="joint")
    assert "history_rewritten" in joint.flags


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
        ([USER, {**ANSWER, "content": "<think>\n\n</think>\n\na1"}], ["answer"], "a1<|im_end|>"),
        ([USER, {**ANSWER, "content": "<think></think>a1"}], ["answer"], "a1<|im_end|>"),
        ([USER, {**ANSWER, "content": "<think></think>a1"}], ["reasoning"], "<think></think>"),
    ],
)
def test_train_parts_selects_parts_of_a_turn(tokenizer_dir, messages, parts, expected):
    source = template(
        HEAD
        + "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
        + CALLS
        + "<|im_end|>\n"
    )
    (example,) = encode(messages, tokenizer_dir("tiny_bpe"), source, train_parts=parts)
    pieces = example.offsets[example.trained]
    assert "".join(example.text[a:b] for a, b in pieces) == expected


@pytest.mark.parametrize(("parts", "expected"), [(["answer"], "a1<|im_end|>"), (["reasoning"], "<think></think>")])
def test_empty_thinking_of_the_template_is_reasoning(tokenizer_dir, parts, expected):
    block = "{% if m.role == 'assistant' %}<think></think>{% endif %}"
    source = template(HEAD + block + "{{ m.content }}<|im_end|>\n")
    (example,) = encode([USER, ANSWER], tokenizer_dir("tiny_bpe"), source, train_parts=parts)
    assert "".join(example.text[a:b] for a, b in example.offsets[example.trained]) == expected


@pytest.mark.parametrize("key", ["train", "training", "weight", "loss"])
def test_training_fields_of_a_message_are_followed(tokenizer_dir, key):
    messages = [USER, {**ANSWER, key: 0}, *TALK[2:]]
    (example,) = encode(messages, tokenizer_dir("tiny_bpe"))
    assert "".join(example.text[a:b] for a, b in example.offsets[example.trained]) == "a2<|im_end|>"
    assert "fields_dropped" not in example.flags


def test_thinking_block_opened_by_the_prompt_is_reasoning(tokenizer_dir):
    source = template(prompt=PROMPT + "<think>\n").replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n{% endif %}{{ m.content }}"
    )
    messages = [USER, {"role": "assistant", "content": "why\n</think>\n\na1"}]
    (example,) = encode(messages, tokenizer_dir("tiny_bpe"), source, train_parts=["answer"])
    assert "".join(example.text[a:b] for a, b in example.offsets[example.trained]) == "a1<|im_end|>"


def test_lone_surrogates_are_rejected(tokenizer_dir):
    with pytest.raises(BadRow, match="lone_surrogate"):
        encode([{"role": "user", "content": "\ud800"}, ANSWER], tokenizer_dir("tiny_bpe"))


def test_large_integers_are_rendered_exactly(tokenizer_dir):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"id": 123456789012345678901234567890}'}}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (example,) = encode(
        messages, tokenizer_dir("tiny_bpe"), template(HEAD + "{{ m.content }}" + CALLS + "<|im_end|>\n")
    )
    assert "123456789012345678901234567890" in example.text


def test_cached_plan_does_not_hide_removed_text():
    """The prompt keeps earlier reasoning but the conversation removes it, which only rows with reasoning reveal."""
    strip = "{% set c = m.content %}{% if m.role == 'assistant' and loop.index0 != ns.last and '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    source = (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'assistant' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        + template(strip + HEAD + "{{ c }}<|im_end|>\n")
    )
    known = Template("t", source, strict=False, special_tokens={"eos_token": "<|im_end|>"})
    (plain,) = render_in_worker(Conversation(tuple(TALK)), known, "joint")
    assert plain.flags == set()
    thinking = [USER, {"role": "assistant", "content": "<think>hm</think>a1"}, *TALK[2:]]
    with pytest.raises(BadRow, match="history_drift"):
        render_in_worker(Conversation(tuple(thinking)), known, "joint")


@pytest.mark.slow
def test_generation_tags_of_a_user_template_are_followed_and_checked(tokenizer_dir):
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
    assert (shown(example), example.flags) == (
        "assistant\na1<|im_end|>assistant\na2<|im_end|>",
        {"generation_tags_unconfirmed"},
    )
    with pytest.raises(AssertionError, match="M2"):
        try_template(tokenizer_dir("tiny_bpe"), header, max_examples=10)


@pytest.mark.parametrize("asked", ["messages[-1].content | title == 'Short'", "messages[-1].content is in '/short'"])
def test_cached_plan_depends_on_every_string_operation(tokenizer_dir, asked):
    source = template(prompt=PROMPT + "{% if " + asked + " %}Sure: {% endif %}")
    encode([{"role": "user", "content": "hello"}, ANSWER], tokenizer_dir("tiny_bpe"), source)
    with pytest.raises(BadRow, match="history_drift"):
        encode([{"role": "user", "content": "short"}, ANSWER], tokenizer_dir("tiny_bpe"), source)


LONG = [{"role": "user", "content": "a long question /think"}, ANSWER]


@pytest.mark.parametrize(
    "asked",
    [
        "range(messages[-1].content | length) | length > 3",
        "messages[-1].content[2]",
        "'X' | replace('X', messages[-1].content) == messages[-1].content and messages[-1].content | length > 3",
        "messages[-1].content.split('a', maxsplit=1) | length > 1",
        "messages[-1].content | length is sameas 22",
    ],
)
def test_cached_plan_depends_on_lengths_and_positions(asked):
    source = template(prompt=PROMPT + "{% if " + asked + " %}<think>\n{% endif %}")
    known = Template("t", source, strict=False, special_tokens={"eos_token": "<|im_end|>"})
    flags = [
        render_in_worker(Conversation(tuple(talk)), known, "joint")[0].flags
        for talk in (TALK[:2], LONG, TALK[:2], LONG)
    ]
    assert flags == [set(), {"prompt_mismatch"}] * 2


@pytest.mark.parametrize(
    "printed",
    [
        "m.content | replace(' /think', '')",
        "m.content[:10]",
        "m.content.replace(' /think', '')",
        "m.content.split(' /')[0]",
    ],
)
def test_text_kept_in_one_row_may_be_cut_in_another(printed):
    source = template(HEAD + "{% if loop.last %}{{ " + printed + " }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n")
    known = Template("t", source, strict=False, special_tokens={"eos_token": "<|im_end|>"})
    for talk, refused in ((TALK[:2], False), (LONG, True), (TALK[:2], False)):
        with pytest.raises(BadRow, match="history_drift") if refused else nullcontext():
            render_in_worker(Conversation(tuple(talk)), known, "joint")


def test_reasoning_trimmed_only_in_history_splits_the_turns():
    source = template(
        HEAD
        + "{% if m.reasoning_content %}<think>{{ m.reasoning_content if loop.last else m.reasoning_content | trim }}</think>{% endif %}"
        + TURN
    )
    known = Template("t", source, strict=False, special_tokens={"eos_token": "<|im_end|>"})
    count = {}
    for thought in ("hm", "\nhm\n", "hm"):
        messages = [{**one, "reasoning_content": thought} if one["role"] == "assistant" else one for one in TALK]
        count[thought] = len(render_in_worker(Conversation(tuple(messages)), known, "auto"))
    assert count == {"hm": 1, "\nhm\n": 2}


@pytest.mark.parametrize("parts", [["answer"], ["reasoning"]])
def test_whitespace_before_thinking_is_reasoning(tokenizer_dir, parts):
    messages = [USER, {"role": "assistant", "content": "\n<think>hm</think>a"}]
    (example,) = encode(messages, tokenizer_dir("tiny_bpe"), template(), train_parts=parts)
    assert shown(example) == ("a<|im_end|>" if parts == ["answer"] else "\n<think>hm</think>")


def test_undefined_special_token_renders_as_empty_text(tokenizer_dir):
    (example,) = encode(TALK, tokenizer_dir("tiny_bpe"), template(before="{{ bos_token }}"))
    assert example.text.startswith("<|im_start|>")
    with pytest.raises(BadRow, match="bos_tokem"):
        encode(TALK, tokenizer_dir("tiny_bpe"), template(before="{{ bos_tokem }}"))


def test_trailing_messages_are_flagged_once(tokenizer_dir):
    found = encode([*TALK, USER], tokenizer_dir("tiny_bpe"), turns="split")
    assert ["trailing_messages" in one.flags for one in found] == [False, True]
    (whole,) = encode([*TALK, USER], tokenizer_dir("tiny_bpe"), turns="joint")
    assert "trailing_messages" in whole.flags


@pytest.mark.parametrize(
    ("messages", "options", "error", "code"),
    [
        (None, {}, BadRow, "messages_type"),
        ([{"role": "user", "content": "q", "x": {1}}, ANSWER], {}, BadRow, "not_json"),
        (TALK, {"train_parts": [1]}, UsageError, "unknown_train_parts"),
        (TALK, {"train_parts": []}, UsageError, "train_parts"),
        (TALK, {"train_parts": "answer"}, UsageError, "train_parts"),
        (TALK, {"train_on": None}, UsageError, "train_on"),
        (TALK, {"train_on": lambda *_: None}, UsageError, "mask_type"),
        (TALK, {"train_on": lambda *_: 3}, UsageError, "mask_type"),
        (TALK, {"train_on": lambda rendered, _: ["no"] * len(rendered.spans)}, UsageError, "mask_type"),
        (TALK, {"reject_flags": None}, UsageError, "reject_flags"),
        (TALK, {"turns": None}, UsageError, "unknown_turns"),
        (TALK, {"template_kwargs": [1]}, UsageError, "template_kwargs"),
        (TALK, {"template_kwargs": {"tools": []}}, UsageError, "template_kwargs"),
        (TALK, {"template": "{% for m in messages %}" * 30 + "{% endfor %}" * 30}, TemplateRefused, "template_syntax"),
        (TALK, {"template": "{% for m in messages %}{% set c = cycler() %}{% endfor %}"}, BadRow, "template_raises"),
    ],
)
def test_invalid_arguments_raise_ftdata_errors(tokenizer_dir, messages, options, error, code):
    with pytest.raises(error) as caught:
        encode(messages, tokenizer_dir("tiny_bpe"), **options)
    assert caught.value.code == code


def test_mask_policy_must_cover_every_span(tokenizer_dir):
    with pytest.raises(
        UsageError, match=r"\[mask_length\] the mask policy returned 1 values, expected \d+: one per span"
    ):
        encode(TALK, tokenizer_dir("tiny_bpe"), train_on=lambda *_: [True])


@pytest.mark.parametrize("policy", [assistant, completion, last_assistant])
def test_mask_policy_may_call_another_with_changed_messages(tokenizer_dir, policy):
    def second_only(rendered, conversation):
        changed = ({**message, "train": n != 1} for n, message in enumerate(conversation.messages))
        return policy(rendered, replace(conversation, messages=tuple(changed)))

    recipe = make_recipe(tokenizer_dir("tiny_bpe"), train_on=second_only)
    rows = [Row({"messages": [USER, ANSWER, USER, {**ANSWER, "content": "b"}]}, Source("x", n)) for n in range(8)]
    for built in build_rows(recipe, rows):
        (example,) = built.examples
        assert shown(example) == "b<|im_end|>"


def test_deeply_nested_rows_are_rejected(tokenizer_dir):
    deep = {}
    for _ in range(3000):
        deep = {"x": deep}
    recipe = make_recipe(tokenizer_dir("tiny_bpe"))
    (row,) = build_rows(recipe, [Row({"messages": [{**USER, "extra": deep}, ANSWER]}, Source("x", 0))])
    assert row.code == "too_deep"


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, {"empty_thinking"}),
        ({"train_parts": ["reasoning"]}, {"empty_thinking"}),
        ({"train_parts": ["answer"]}, set()),
        ({"train_on": lambda rendered, _: [span.message == 0 for span in rendered.spans]}, set()),
    ],
)
def test_empty_thinking_is_flagged_only_if_it_is_trained(options, flags, tokenizer_dir):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (example,) = encode(messages, tokenizer_dir("tiny_bpe"), THINKS, **options)
    assert example.flags & {"empty_thinking"} == flags
