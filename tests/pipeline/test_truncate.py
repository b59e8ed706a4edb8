import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import law

from ftdata import encode
from ftdata.errors import BadRow
from ftdata.options import OPTIONS
from ftdata.pipeline.truncate import truncate, turn_ends
from ftdata.testing import conversation_strategy
from ftdata.tokenizing.load import load_tokenizer

POLICIES = OPTIONS["overlong"].choices


@law(100)
@given(messages=conversation_strategy(), policy=st.sampled_from(POLICIES), data=st.data())
def test_truncation_rules_hold(tokenizer_dir, messages, policy, data):
    tokenizer = load_tokenizer(tokenizer_dir("tiny_bpe"))
    (whole,) = encode(messages, tokenizer)
    limit = data.draw(st.integers(2, len(whole) + 3))
    try:
        kept = truncate(whole, limit, policy)
    except BadRow as refusal:
        assert refusal.code == "overlong"
        assert len(whole) > limit
        return
    assert len(kept) <= limit  # T1
    assert kept.input_ids.tolist() == whole.input_ids[: len(kept)].tolist()  # T2
    assert kept.labels.tolist() == whole.labels[: len(kept)].tolist()
    assert kept.offsets.tolist() == whole.offsets[: len(kept)].tolist()
    assert len(whole) == len(kept) + kept.cut  # T3
    assert kept.trained.any()
    if policy == "reject":
        assert kept is whole
    if policy == "drop_turns" and kept.cut:  # T4
        assert kept.input_ids[-1] == tokenizer.token_to_id("<|im_end|>")
        assert kept.trained[-1]
        assert "answer_truncated" not in kept.flags


@law(100)
@given(messages=conversation_strategy(), policy=st.sampled_from(POLICIES))
def test_without_a_limit_examples_are_unchanged(tokenizer_dir, messages, policy):
    (whole,) = encode(messages, tokenizer_dir("tiny_bpe"))
    assert truncate(whole, None, policy) is whole  # T5
    assert truncate(whole, len(whole), policy) is whole


@law(100)
@given(messages=conversation_strategy())
def test_turn_ends_are_the_stop_tokens(tokenizer_dir, messages):
    tokenizer = load_tokenizer(tokenizer_dir("tiny_bpe"))
    (whole,) = encode(messages, tokenizer)
    ends = turn_ends(whole)
    assert len(ends) == sum(m["role"] == "assistant" for m in messages)
    assert (whole.input_ids[ends - 1] == tokenizer.token_to_id("<|im_end|>")).all()


def test_drop_turns_keeps_every_turn_that_fits(tokenizer_dir):
    messages = [{"role": role, "content": f"{role} says {n}"} for n in range(3) for role in ("user", "assistant")]
    (whole,) = encode(messages, tokenizer_dir("tiny_bpe"))
    ends = turn_ends(whole).tolist()
    assert len(ends) == 3
    for limit in range(ends[0], len(whole)):
        kept = truncate(whole, limit, "drop_turns")
        assert len(kept) == max(end for end in ends if end <= limit)
        assert "truncated" in kept.flags
    for limit in range(2, ends[0]):
        with pytest.raises(BadRow, match=r"no answer fits completely within that length. Fix: raise max_length"):
            truncate(whole, limit, "drop_turns")


def test_overlong_error_suggests_a_fix(tokenizer_dir):
    (whole,) = encode(
        [{"role": "user", "content": "x" * 99}, {"role": "assistant", "content": "y"}], tokenizer_dir("tiny_bpe")
    )
    messages = [{"role": role, "content": "a few words"} for role in ("user", "assistant")]
    (turns,) = encode(messages * 2, tokenizer_dir("tiny_bpe"))
    for example, limit, hint in (
        (turns, len(turns) - 4, "or set overlong='drop_turns' or overlong='truncate'"),
        (
            turns,
            int(np.flatnonzero(turns.trained)[0]) + 1,
            "or shorten the row; overlong='truncate' would cut the answer",
        ),
        (whole, 8, "or shorten or remove the row"),
    ):
        with pytest.raises(BadRow, match=f"Fix: raise max_length, {hint}"):
            truncate(example, limit)
    with pytest.raises(
        BadRow, match=r"expected at most 8 .max_length., and no answer begins within that length. Fix: raise max_length"
    ):
        truncate(whole, 8, "truncate")


def test_cut_answer_is_flagged_and_has_no_stop_token(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir("tiny_bpe"))
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a long answer " * 10}]
    (whole,) = encode(messages, tokenizer)
    kept = truncate(whole, len(whole) - 5, "truncate")
    assert "answer_truncated" in kept.flags
    assert not np.isin(tokenizer.token_to_id("<|im_end|>"), kept.labels)
    with pytest.raises(BadRow, match="no answer fits completely"):
        truncate(whole, len(whole) - 5, "drop_turns")
    with pytest.raises(BadRow, match="has .* tokens, expected at most 10"):
        truncate(whole, 10)
