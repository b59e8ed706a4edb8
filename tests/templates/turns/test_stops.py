"""Turn ends, rules R5 to R10: text up to the stop token is trained, text after it is not."""

import pytest
from chat_templates import (
    ANSWER,
    CALLS,
    HEAD,
    LATE_STOP,
    PROMPT,
    STOPLESS,
    TALK,
    TOOLED,
    TURN,
    USER,
    refusal,
    shown,
    template,
    trained,
)

from ftdata import encode
from ftdata.templates import Template, render_in_worker
from ftdata.types import Conversation


def test_r5_stop_token_is_eos_or_the_last_control_token():
    assert trained(template(HEAD + "{{ m.content }}\n<|end|><|im_end|></s>\n"))[0][0] == "a1\n<|end|><|im_end|>"
    assert trained(template(HEAD + "{{ m.content }}<|end|><|stop|>\n"))[0][0] == "a1<|end|><|stop|>"
    assert trained(template("{{ m.role }}: {{ m.content }} ###\n", "assistant:"))[0][0] == " a1 ###"


def test_r6_whitespace_after_the_stop_token_is_not_trained():
    assert trained(template(HEAD + "{{ m.content }}<|im_end|>\n\n \n"))[0][0] == "a1<|im_end|>"


def test_r7_stop_token_written_by_the_next_message_is_missing_at_the_end():
    assert trained(LATE_STOP) == (["a1<|im_end|>", "a2"], {"missing_final_stop"})
    unless_last = template(
        HEAD + "{{ m.content }}{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}"
    )
    assert trained(unless_last) == (["a1<|im_end|>", "a2"], {"missing_final_stop"})


def test_r8_turn_without_a_stop_token_ends_with_the_answer():
    openers_only = template("<|{{ m.role }}|>\n{{ m.content }}", "<|assistant|>\n")
    assert trained(openers_only) == (["a1", "a2"], {"no_trained_stop"})
    assert trained(STOPLESS) == (["a1", "a2"], {"no_trained_stop"})


@pytest.mark.parametrize(
    ("source", "messages", "trained", "flags"),
    [
        (LATE_STOP, TALK, "a1<|im_end|>a2<|im_end|>", {"eos_appended"}),
        (STOPLESS, TALK[:2], "a1<|im_end|>", {"eos_appended"}),
        (STOPLESS, TALK, "a1a2<|im_end|>", {"eos_appended", "no_trained_stop"}),
        (STOPLESS, [*TALK, USER], "a1a2", {"no_trained_stop", "trailing_messages"}),
        (template(), TALK, "a1<|im_end|>a2<|im_end|>", set()),
    ],
)
def test_r7_eos_can_be_appended_for_a_missing_final_stop(tokenizer_dir, source, messages, trained, flags):
    (example,) = encode(messages, tokenizer_dir("tiny_bpe"), source, on_missing_stop="append_eos")
    assert (shown(example), example.flags) == (trained, flags)
    if "eos_appended" in flags:
        assert example.text.endswith("a2<|im_end|>" if len(messages) > 2 else "a1<|im_end|>")


def test_r9_middle_and_final_stop_tokens_may_differ():
    source = template(
        "<|start|>{{ m.role }}<|message|>{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}",
        "<|start|>assistant<|message|>",
    )
    special = {"eos_token": "<|return|>"}
    (one,) = render_in_worker(
        Conversation(tuple(TALK)), Template("t", source, strict=False, special_tokens=special), "joint"
    )
    parts = [one.text[s.start : s.end] for s in one.spans if s.generated]
    assert parts == ["a1", "<|end|>", "a2", "<|return|>"]


def test_r10_text_after_the_last_stop_token_is_not_trained():
    always = template().replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "{{ '' }}")
    assert trained(always) == (["a1<|im_end|>", "a2<|im_end|>"], {"text_after_last_stop"})
    twice = template() + "{% if not add_generation_prompt %}</s>{% endif %}"
    assert trained(twice) == (["a1<|im_end|>", "a2<|im_end|>"], {"text_after_last_stop"})


RATED = template(HEAD + TURN + "{% if m.rating %}<|im_start|>rating\n{{ m.rating }}<|im_end|>\n{% endif %}")


def test_r5_other_fields_of_a_message_do_not_move_its_stop_token():
    assert trained(RATED, [USER, {**ANSWER, "rating": "5 stars"}, *TALK[2:]])[0] == ["a1<|im_end|>", "a2<|im_end|>"]
    inside = template(HEAD + "{{ m.content[:1] }}{{ m.rating }}{{ m.content[1:] }}<|im_end|>\n")
    assert refusal(inside, [USER, {**ANSWER, "rating": "5 stars"}]).code == "interleaved"


def test_r8_header_of_the_next_message_is_not_a_stop_token():
    numbered = "{% for m in messages %}<|im_start|>{{ m.role }} #{{ loop.index }}\n{{ m.content }}\n{% endfor %}"
    asked = numbered + "{% if add_generation_prompt %}<|im_start|>assistant #{{ messages|length + 1 }}\n{% endif %}"
    assert trained(asked) == (["a1", "a2"], {"no_trained_stop"})
    first_bare = "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first %}[INST] {% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }} {% endif %}{% endfor %}"
    assert trained(first_bare) == ([" a1", " a2"], {"no_trained_stop"})


def test_r10_footer_is_not_trained():
    footer = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}assistant: {% else %}### End{% endif %}"
    assert trained(footer) == (["a1", "a2"], {"no_trained_stop", "text_after_last_stop"})


def test_r9_stop_token_only_at_the_end_of_the_conversation(tokenizer_dir):
    ends = template(
        "{{ m.role }}:\n{{ m.content }}\n{% if loop.last and not add_generation_prompt %}<|endoftext|>{% endif %}",
        "assistant:\n",
    )
    (example,) = encode(TALK, tokenizer_dir("qwen"), ends)
    assert (shown(example), example.flags) == ("a1a2\n<|endoftext|>", {"no_trained_stop"})
    asks = template("<|im_start|>{{ m.role }}:\n{{ m.content }}\n", "") + "<|im_start|>assistant:{{ '\n' }}"
    (example,) = encode(TALK, tokenizer_dir("qwen"), asks)
    assert (shown(example), example.flags) == ("a1a2", {"no_trained_stop", "text_after_last_stop"})


ENDS = "{% if loop.last and m.role == 'assistant' %}<|end|>{% else %}<|im_end|>\n{% endif %}"


@pytest.mark.parametrize(
    ("turn", "messages", "expected", "flags"),
    [
        ("{{ m.content }}" + CALLS + ENDS, TOOLED, ["</tool_call><|im_end|>", "a2<|end|>"], set()),
        ("{{ m.content }}{% if m.role != 'user' %}</answer>{% endif %}" + ENDS, TALK, ["a1</answer><|im_end|>", "a2</answer><|end|>"], set()),
        ("{{ m.content }}" + CALLS + "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}", TOOLED, ["</tool_call><|im_end|>", "a2"], {"missing_final_stop"}),
    ],
)  # fmt: skip
def test_r5_closing_tag_is_not_a_stop_token(turn, messages, expected, flags):
    texts, found = trained(template(HEAD + turn), messages, special={"eos_token": "<|end|>"})
    assert [text[-len(end) :] for text, end in zip(texts, expected, strict=True)] == expected
    assert found == flags


def test_r7_tool_call_without_a_stop_token_is_flagged(tokenizer_dir):
    late = template(
        "{% if not loop.first %}<|im_end|>\n{% endif %}" + HEAD + "{{ m.content }}" + CALLS, "<|im_end|>\n" + PROMPT
    )
    texts, flags = trained(late, TOOLED)
    assert (texts[0][-22:], texts[1], flags) == ("</tool_call><|im_end|>", "a2", {"missing_final_stop"})
    assert trained(late, TOOLED[:2])[1] == {"missing_final_stop"}
    (example,) = encode(TOOLED[:2], tokenizer_dir("tiny_bpe"), late, on_missing_stop="append_eos")
    assert shown(example).endswith("</tool_call><|im_end|>")


def test_r8_stop_token_of_an_empty_message_is_not_that_of_the_answer():
    source = "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content | trim }}<|im_end|>{% else %}<|assistant|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    assert trained(source, [*TALK[:2], {"role": "user", "content": " "}, TALK[3]]) == (
        ["a1", "a2"],
        {"no_trained_stop"},
    )
