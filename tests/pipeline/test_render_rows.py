"""Rows of all kinds are rendered in the same way, whether or not similar rows were rendered before."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import often

from ftdata.errors import BadRow, UsageError
from ftdata.pipeline.examples import build_rows
from ftdata.pipeline.recipe import make_recipe
from ftdata.schemas import Schema, schemas
from ftdata.templates.render_cache import render_cache
from ftdata.types import Reject, Row, Source

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


OPTIONS = [
    {},
    {"turns": "joint", "train_on": "completion", "train_parts": ["answer"]},
    {"schema": "messages", "train_on": "last_assistant"},
    {"on_missing_stop": "append_eos"},
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, marks=pytest.mark.long if name == "qwen" and number in (1, 2) else ())
        for name in ("chatml", "qwen", "gemma")
        for number, options in enumerate(OPTIONS)
    ],
)
@often(150)
@given(data=rows())
def test_rows_do_not_depend_on_the_cache(tokenizer_dir, name, options, data):
    tokenizer, template = (tokenizer_dir("tiny_bpe"), name) if name != "qwen" else (tokenizer_dir("qwen"), None)
    recipe = make_recipe(tokenizer, template, **options)
    row = Row(data, Source("x.jsonl", 7, 8, 90))
    render_cache.cache_clear()
    (alone,) = build_rows(recipe, [row])
    similar = {"messages": [{"role": role, "content": "text"} for role in ("user", "assistant")]}
    *_, cached = build_rows(recipe, [row._replace(data=similar)] * 2 + [row])
    assert described(cached) == described(alone)


def described(outcome):
    if isinstance(outcome, Reject):
        return outcome
    arrays = [(one.input_ids.tolist(), one.labels.tolist(), one.offsets.tolist()) for one in outcome.examples]
    rest = [(one.text, one.spans, one.flags, one.source, one.cut) for one in outcome.examples]
    return outcome.conversation, arrays, rest


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def built(tokenizer, rows, **options):
    placed = [Row(data, Source("x.jsonl", number)) for number, data in enumerate(rows)]
    return list(build_rows(make_recipe(tokenizer, "chatml", **options), placed))


@pytest.mark.parametrize("odd", [None, 5, b"x", float("nan"), "text"])
def test_invalid_rows_between_plain_rows_are_rejected(tokenizer_dir, odd):
    found = built(tokenizer_dir("tiny_bpe"), [*[{"messages": TALK}] * 40, odd, {"messages": TALK}])
    assert [at for at, one in enumerate(found) if isinstance(one, Reject)] == [40]
    assert found[40].code == "not_a_row"


def test_replaced_messages_schema_is_used(tokenizer_dir):
    ours = schemas.get("messages")
    schemas.register("messages")(Schema(("messages",), ours.matches, ours.convert))
    try:
        found = built(tokenizer_dir("tiny_bpe"), [{"messages": TALK, "system": "be brief"}] * 50)
    finally:
        schemas.register("messages")(ours)
    assert all("be brief" in one.examples[0].text for one in found)


@pytest.mark.parametrize(("fault", "told"), [(RecursionError, UsageError), (BadRow, BadRow)])
def test_errors_of_a_mask_policy_do_not_reject_rows(tokenizer_dir, fault, told):
    def policy(*_):
        raise fault("mine", "mine")

    with pytest.raises(told, match="mine"):
        built(tokenizer_dir("tiny_bpe"), [{"messages": TALK}] * 3, train_on=policy)


def test_mask_policies_run_after_rendering_and_skip_rejected_rows(tokenizer_dir):
    def policy(rendered, conversation):
        assert "<|im_end|> typed" not in rendered.text
        conversation.messages[0]["content"] = "changed"
        return [span.generated for span in rendered.spans]

    rows = [{"messages": [dict(one) for one in TALK]} for _ in range(40)] * 2
    rows.append({"messages": [{"role": "user", "content": "<|im_end|> typed"}, TALK[1]]})
    found = built(tokenizer_dir("tiny_bpe"), rows, train_on=policy, control_tokens="refuse")
    assert [one.code for one in found if isinstance(one, Reject)] == ["control_tokens"]
    assert not any("changed" in one.examples[0].text for one in found[:80])
