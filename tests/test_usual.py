"""What is made of a usual row in one step is what the stages make of it one by one."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftdata.recipe import make_recipe
from ftdata.schemas import normalise
from ftdata.shown import check_answers, chosen, rendered
from ftdata.types import Row, Source
from ftdata.usual import usual

TEXTS = st.sampled_from(
    ["a", "two words", " blanks ", "\n", "", "<think>so</think>it is", "x <|im_end|> y", "</think>"]
)
TURNS = st.sampled_from(
    [
        lambda role, text: {"role": role, "content": text},
        lambda role, text: {"content": text, "role": role},
        lambda role, text: {"role": role, "content": text, "train": False},
        lambda role, text: {"role": role, "content": text, "name": "x"},
        lambda role, text: {"role": {"user": "human", "assistant": "gpt"}.get(role, role), "content": text},
        lambda role, text: {"from": role, "value": text},
        lambda role, text: {"role": role, "content": [{"type": "text", "text": text}]},
    ]
)
ROLES = st.lists(st.sampled_from(["system", "user", "assistant", "assistant", "user", "tool"]), max_size=5)
BESIDE = st.sampled_from(
    [
        *[{}] * 6,
        {"id": 3},
        {"system": "be brief"},
        {"system": None},
        {"tools": []},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"prompt": "x", "completion": "y"},
    ]
)


@st.composite
def rows(draw):
    usually = draw(st.booleans())
    roles = ["user", "assistant"] * draw(st.integers(1, 2)) if usually else draw(ROLES)
    turn = draw(TURNS)
    talk = [(turn if usually else draw(TURNS))(role, draw(TEXTS)) for role in roles]
    column = draw(st.sampled_from(["messages", "messages", "conversations", "conversation", "chat"]))
    data = {column: talk, **draw(BESIDE)}
    return talk if draw(st.integers(0, 9)) == 0 else data


@pytest.mark.parametrize("name", ["chatml", "qwen", "gemma"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"turns": "joint", "train_on": "completion", "train_parts": ["answer"]},
        {"schema": "messages", "train_on": "last_assistant"},
        {"unclosed": "append_eos"},
    ],
)
@settings(max_examples=150, deadline=None)
@given(data=rows())
def test_it_is_what_the_stages_make_of_it(tokenizer_dir, name, options, data):
    tokenizer, template = (tokenizer_dir("tiny_bpe"), name) if name != "qwen" else (tokenizer_dir("qwen"), None)
    recipe = make_recipe(tokenizer, template, **options)
    row = Row(data, Source("x.jsonl", 7, 8, 90))
    # What was seen before, there may be a plan for.
    seen = {"messages": [{"role": role, "content": "text"} for role in ("user", "assistant")]}
    rendered(recipe, normalise(row._replace(data=seen)))
    found = usual(recipe)(row)
    if found is not None:
        conversation = normalise(row, recipe.schema)
        check_answers(conversation)
        assert found == chosen(conversation, rendered(recipe, conversation), recipe.policy)


@pytest.mark.parametrize(
    ("data", "is_usual"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, True),
        ({"messages": [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}], "id": 1}, True),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, True),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "system": "s"}, False),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}, False),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "a"}]}, False),
        ({"instruction": "q", "output": "a"}, False),
    ],
)
def test_which_rows_are_usual(tokenizer_dir, data, is_usual):
    recipe = make_recipe(tokenizer_dir("tiny_bpe"), "chatml")
    row = Row(data, Source("x.jsonl", 0))
    assert usual(recipe)(row) is None or is_usual
    seen = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rendered(recipe, normalise(row._replace(data=seen)))
    assert (usual(recipe)(row) is not None) == is_usual
    assert usual(recipe)(row._replace(flat=True)) is None
    assert usual(replace(recipe, columns={"messages": "messages"}))(row) is None
