"""Turn starts, rules R2 to R4: generation prompts and history rewriting."""

import pytest
from chat_templates import (
    CALLS,
    HEAD,
    PROMPT,
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
from ftdata.errors import BadRow
from ftdata.testing import byte_tokenizer


def test_r2_turn_starts_where_its_generation_prompt_ends():
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
    assert trained(forced) == (["\n</think>\n\na1<|im_end|>", "\n</think>\n\na2<|im_end|>"], {"empty_thinking"})


def test_block_with_only_the_end_of_the_text_belongs_to_the_last_turn(tmp_path):
    """The training templates of TRL for Phi-3 contain such a block."""
    source = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
    )
    source += "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    source += "{% if add_generation_prompt %}<assistant>{% else %}{% generation %}<|end|>{% endgeneration %}{% endif %}"
    (tmp_path / "tagged.jinja").write_text(source)
    (example,) = encode(TALK, byte_tokenizer(), str(tmp_path / "tagged.jinja"))
    assert shown(example) == "a1<|im_end|>\na2<|im_end|>\n<|end|>"


def test_r2_without_a_prompt_generation_tags_locate_the_turn():
    body = "{% if m.role == 'assistant' %}{% generation %}" + TURN.strip() + "{% endgeneration %}\n{% else %}" + TURN
    tagged = template(HEAD + body + "{% endif %}", "")
    # The headers would be trained if the tags were not there.
    assert trained(tagged) == (["a1<|im_end|>", "a2<|im_end|>"], {"generation_tags_unconfirmed"})
    untagged = template(HEAD + TURN, "")
    assert trained(untagged)[0] == [f"<|im_start|>assistant\n{answer}<|im_end|>" for answer in ("a1", "a2")]


@pytest.mark.parametrize(
    ("marked", "flags"),
    [
        ("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}", set()),
        (
            "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>",
            {"generation_tags_overruled", "stop_outside_generation_tags"},
        ),
        ("{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}", {"generation_tags_overruled"}),
    ],
)
def test_r2_stop_token_is_trained_whatever_the_generation_tags_mark(marked, flags):
    tagged = template(
        HEAD + "{% if m.role == 'assistant' %}" + marked + "{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    )
    assert trained(tagged) == (["a1<|im_end|>", "a2<|im_end|>"], flags)


def test_r2_thinking_block_opened_by_the_prompt_is_not_trained():
    messages = [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\na1"}]
    assert trained(template(prompt=PROMPT + "<think>\n"), messages) == (["hm\n</think>\na1<|im_end|>"], set())


def test_r3_turn_starts_after_the_common_prefix_with_the_prompt():
    assert trained(template(prompt=PROMPT + "<think>\n")) == (["a1<|im_end|>", "a2<|im_end|>"], {"prompt_mismatch"})
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
def test_r4_any_other_drift_is_rejected(prompt):
    error = refusal(template(prompt=prompt))
    assert (error.code, error.field) == ("history_drift", "messages[1]")


def test_r4_rewritten_history_is_split():
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
    assert trained(source, turns="auto") == (["a1<|im_end|>", "a2<|im_end|>"], {"conversation_split"})
    assert refusal(moved).code == "history_drift"


@pytest.mark.parametrize("prompt", ["Answer now: ", "[Be brief] Ok. "])
def test_r4_prompt_with_more_than_thinking_is_rejected(prompt):
    assert refusal(template(prompt=PROMPT + prompt)).code == "history_drift"


def test_r4_history_not_compared_is_flagged():
    source = template(
        "{% if m.tool_calls and loop.last %}{{ raise_exception('a call needs its result') }}{% endif %}"
        + HEAD
        + "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}"
        + CALLS
        + "<|im_end|>\n"
    )
    assert trained(source, TOOLED)[1] == {"history_not_compared", "empty_thinking"}


def test_conversation_that_begins_with_an_answer_is_rejected_with_generation_tags():
    """The built-in template has generation tags, which do not depend on a prompt."""
    with pytest.raises(BadRow, match="no_prompt"):
        encode([*TALK[1:]], byte_tokenizer(), "chatml")
    (example,) = encode([{**TALK[1], "train": False}, *TALK[2:]], byte_tokenizer(), "chatml")
    assert shown(example) == "a2<|im_end|>"


def test_trained_header_of_a_template_without_generation_prompt_is_flagged():
    assert "header_trained" in trained(template(HEAD + TURN, ""))[1]
    # A token before a tool call is not a header.
    calls = "{% for c in m.tool_calls or [] %}[CALL]{{ c | tojson }}{% endfor %}"
    mistral = (
        "{% if m.role == 'assistant' %}" + calls + "{{ m.content }}<|im_end|>{% else %}[{{ m.content }}]{% endif %}"
    )
    assert "header_trained" not in trained(template(mistral, ""), TOOLED)[1]
    # Templates such as Mistral's print no header before an answer.
    assert "header_trained" not in trained(template("{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
                                                    "{{ m.content }}<|im_end|>{% endif %}", ""))[1]  # fmt: skip
