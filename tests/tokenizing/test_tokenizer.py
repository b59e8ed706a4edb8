"""Tokens of rendered rows, rules R1 and R14 to R18: tokenization, boundaries and typed control tokens."""

import numpy as np
import pytest
from chat_templates import (
    ANSWER,
    HEAD,
    PROMPT,
    TALK,
    TURN,
    USER,
    shown,
    template,
)
from tokenizers import Tokenizer

from ftdata import encode
from ftdata.errors import BadRow
from ftdata.pipeline.examples import build_rows
from ftdata.pipeline.recipe import make_recipe
from ftdata.testing import check_masking_rules
from ftdata.tokenizing.load import load_tokenizer
from ftdata.types import Part, Row, Source


def test_r1_text_is_tokenized_as_a_whole(tokenizer_dir):
    folder = tokenizer_dir("tiny_bpe")
    (example,) = encode(TALK, folder)
    assert example.input_ids.tolist() == Tokenizer.from_file(f"{folder}/tokenizer.json").encode(example.text).ids


def test_r14_token_with_one_generated_character_is_trained(tokenizer_dir):
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    (example,) = encode(
        [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}],
        tokenizer_dir("tiny_bpe"),
        source,
    )
    start = next(span.start for span in example.spans if span.generated)
    first = int(np.flatnonzero(example.trained)[0])
    assert example.offsets[first, 0] < start < example.offsets[first, 1]


def test_r15_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer"):
        encode(TALK, Slow())


def test_r16_typed_control_tokens_do_not_change_the_mask(tokenizer_dir):
    typed = [USER, {"role": "assistant", "content": "say <|im_end|>\n<|im_start|>user\nx"}]
    (plain,) = encode(typed, tokenizer_dir("tiny_bpe"))
    (real,) = encode(typed, tokenizer_dir("tiny_bpe"), control_tokens="allow")
    for example in (plain, real):
        kept = example.offsets[example.trained]
        assert example.text[kept[0, 0] : kept[-1, 1]] == typed[1]["content"] + "<|im_end|>"
    assert "control_tokens" in plain.flags


def test_r17_date_is_fixed(tokenizer_dir):
    source = template(before="Today is {{ strftime_now('%d %b %Y') }}.\n")
    (example,) = encode(TALK, tokenizer_dir("tiny_bpe"), source, date="2030-05-06")
    assert example.text.startswith("Today is 06 May 2030.")
    (example,) = encode(TALK, tokenizer_dir("tiny_bpe"), source)
    assert example.text.startswith("Today is 01 Jan 2026.")


def test_r18_flags_are_recomputed_after_truncation(tokenizer_dir):
    recipe = make_recipe(tokenizer_dir("tiny_bpe"), max_length=20, overlong="truncate")
    row = Row({"messages": [USER, {"role": "assistant", "content": "word " * 40}]}, Source("x", 0))
    (built,) = build_rows(recipe, [row])
    assert built.examples[0].flags >= {"truncated", "answer_truncated"}


@pytest.mark.parametrize(
    "before",
    [
        "{{ tools }}",
        "{{ '(%s)' | format(messages[0].name) }}",
        "{{ '<note>%s</note>' | format(messages[0].mood) }}",
    ],
)
def test_r16_control_tokens_in_untracked_text_are_rejected(tokenizer_dir, before):
    typed = "say <|im_end|> here"
    messages = [{**USER, "name": typed, "mood": typed}, ANSWER]
    tools = [{"type": "function", "function": {"name": "f", "description": typed}}]
    with pytest.raises(BadRow, match="control_tokens"):
        encode(messages, tokenizer_dir("tiny_bpe"), template(before=before), tools=tools)


@pytest.mark.parametrize(
    "turn",
    [
        "{{ m.content }}",
        "{% if '</think>' in m.content %}<think>{{ m.content.split('<think>')[1] }}{% else %}{{ m.content }}{% endif %}",
    ],
)
def test_r16_thinking_tags_in_an_answer_are_control_tokens(tokenizer_dir, turn):
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
    ids = [tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")]
    assert [int((example.input_ids == one).sum()) for one in ids] == [1, 1]
    assert example.trained[np.isin(example.input_ids, ids)].all()
    (answers,) = encode(
        messages, tokenizer, template(HEAD + turn + "<|im_end|>\n"), turns="joint", train_parts=["answer"]
    )
    assert shown(answers) == "yes </think><|im_end|>a2<|im_end|>"


def test_r16_thinking_tags_in_earlier_answers_are_control_tokens(tokenizer_dir):
    thinking = [
        {**m, "content": f"\n <think>hm</think> \n{m['content']}"} if m["role"] == "assistant" else m for m in TALK
    ]
    messages = [{"role": "system", "content": "<think>no</think>"}, *thinking]
    tokenizer = load_tokenizer(tokenizer_dir("qwen"))
    examples = encode(
        messages, tokenizer, template(HEAD + "{{ m.content }}{# <think> </think> #}<|im_end|>\n"), turns="split"
    )
    ids = [tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")]
    assert [[int((one.input_ids == i).sum()) for i in ids] for one in examples] == [[1, 1], [2, 2]]
    for example, turn in zip(examples, (2, 4), strict=True):
        check_masking_rules(example, messages, trained=[turn])
        parts = [(span.part, example.text[span.start : span.end]) for span in example.spans if span.message == turn]
        assert "".join(text for part, text in parts if part is Part.REASONING) == "\n hm \n"
        assert "".join(text for part, text in parts if part is Part.CONTENT) == f"a{turn // 2}"


def test_r16_thinking_tags_opened_by_the_prompt_are_control_tokens(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir("qwen"))
    messages = [USER, {"role": "assistant", "content": "<think>hm</think>yes"}]
    (example,) = encode(messages, tokenizer, template(prompt=PROMPT + "<think>"), control_tokens="refuse")
    ids = [tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")]
    assert [int((example.input_ids == one).sum()) for one in ids] == [1, 1]
    assert shown(example) == "hm</think>yes<|im_end|>"


@pytest.mark.parametrize("name", ["<|IM_END|>ß", "ß<|IM_END|>", "ŉ<|IM_END|>ß"])
def test_r16_case_changes_of_text_length_hide_no_control_token(tokenizer_dir, name):
    source = template(HEAD + "{{ (m.name or '') | lower | upper | lower }}" + TURN)
    (example,) = encode([{**USER, "name": name.replace("ß", "İ")}, ANSWER], tokenizer_dir("tiny_bpe"), source)
    tokenizer = Tokenizer.from_file(f"{tokenizer_dir('tiny_bpe')}/tokenizer.json")
    assert example.input_ids.tolist().count(tokenizer.token_to_id("<|im_end|>")) == 2
    assert "control_tokens" in example.flags
