"""Plain rows, which are rendered with cached layouts, give the same examples as the general path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import often
from tokenizer_makers import CHATML

from ftdata.pipeline import plain_rows
from ftdata.pipeline.examples import build_rows
from ftdata.pipeline.mask import masks
from ftdata.pipeline.recipe import make_recipe
from ftdata.testing import text_strategy
from ftdata.types import Reject, Row, Source

HARD_TEXTS = [
    "",
    " ",
    "\u200b",
    "  x  ",
    "<think>hm</think>",
    "<think>hm</think>yes",
    "</think>a",
    "<|im_end|>",
    "a < b",
]
ROLES = ["system", "user", "assistant", "gpt", "tool"]


def texts():
    return st.sampled_from([*["a", "b c"] * 20, *HARD_TEXTS]) | text_strategy()


def plain_messages():
    message = st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(ROLES), texts())
    turns = st.lists(st.tuples(texts(), texts()), min_size=1, max_size=3).map(
        lambda pairs: [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    )
    return turns | st.lists(message, min_size=1, max_size=4)


REWRITTEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}Earlier: {% endif %}{{ m.content }}"
    "{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that prints earlier answers differently than the model wrote them, and no stop token at the end."""

CHANGES = [
    *[lambda row: row] * 6,
    lambda row: {"messages": [{**m, "role": m["role"].replace("assistant", "gpt")} for m in row["messages"]]},
    lambda row: {**row, "id": 7},
    lambda row: {**row, "rejected": "no"},
    lambda row: {**row, "tools": None},
    lambda row: {**row, "system": "Be brief."},
    lambda row: {**row, "loss_mask": [1]},
    lambda row: {**row, "chat_template_kwargs": {"enable_thinking": False}},
    lambda row: {"conversations": row["messages"]},
    lambda row: {"messages": [*row["messages"], None]},
    lambda row: {"messages": [*row["messages"], {"role": "assistant", "content": "x", "train": False}]},
    lambda row: {"messages": [{"content": m["content"], "role": m["role"]} for m in row["messages"]]},
    lambda row: row["messages"],
]


def in_detail(outcome):
    if isinstance(outcome, Reject):
        return outcome
    row = outcome.conversation
    examples = [
        (example.input_ids.tolist(), example.labels.tolist(), example.text, tuple(example.spans), example.flags)
        for example in outcome.examples
    ]
    about = (row.messages, row.notes, row.schema, row.source, row.completion_from, row.tools, row.kwargs)
    return examples, about, outcome.cut, outcome.dropped


@pytest.mark.parametrize(("tokenizer", "template"), [("tiny_bpe", "chatml"), ("tiny_bpe", REWRITTEN), ("qwen", None)])
@often(60)
@given(
    data=st.lists(st.tuples(plain_messages(), st.sampled_from(CHANGES)), min_size=1, max_size=16),
    train_on=st.sampled_from(["assistant", "last_assistant", "completion", "all"]),
    turns=st.sampled_from(["auto", "auto", "joint", "split"]),
    on_missing_stop=st.sampled_from(["flag", "flag", "append_eos"]),
)
def test_plain_rows_give_the_examples_of_the_general_path(
    tokenizer_dir, tokenizer, template, data, train_on, turns, on_missing_stop
):
    rows = [
        Row(change({"messages": messages}), Source("rows.jsonl", number + 1001), notes=frozenset({"quotes"}))
        for number, (messages, change) in enumerate(data)
    ]
    options = {"turns": turns, "on_missing_stop": on_missing_stop}
    recipe = make_recipe(tokenizer_dir(tokenizer), template, train_on=train_on, **options)
    # A function is not a built-in policy, so its rows always take the general path.
    policy = masks.get(train_on)
    general = make_recipe(
        tokenizer_dir(tokenizer), template, train_on=lambda rendered, row: policy(rendered, row), **options
    )
    assert not plain_rows.supports_plain_rows(general)
    expected_outcomes = [*build_rows(general, rows)]
    # The layouts are cached now.
    for outcome, expected in zip(build_rows(recipe, rows), expected_outcomes, strict=True):
        if isinstance(expected, Reject) and expected.code == "nothing_trained":
            # The reason names the policy.
            assert (outcome.code, outcome.source) == (expected.code, expected.source)
        else:
            assert in_detail(outcome) == in_detail(expected)


def test_plain_rows_are_rendered_with_a_layout(tokenizer_dir):
    recipe = make_recipe(tokenizer_dir("tiny_bpe"), CHATML)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [Row({"messages": messages, "id": n}, Source("rows.jsonl", n)) for n in range(50)]
    assert len([*build_rows(recipe, rows)]) == 50
    (rendered,) = plain_rows.render_plain_row(recipe, rows[40], recipe.policy).texts
    assert rendered.text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
