"""Messages of every format: roles, speakers, tool calls, tool results and content blocks."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schema_helpers import ASSISTANT, CALL, FUNCTION, USER, convert

from ftdata.errors import BadRow
from ftdata.schemas import normalize
from ftdata.schemas.messages import read_messages
from ftdata.types import Row, Source


@pytest.mark.parametrize("role", ["human", "user", "prompter"])
def test_role_spellings_are_mapped(role):
    assert convert({"messages": [{"role": role, "content": "x"}]}).messages[0]["role"] == "user"


@pytest.mark.parametrize("role", ["Human", " user ", "USER"])
def test_role_names_are_exact_and_speaker_names_are_case_insensitive(role):
    with pytest.raises(BadRow, match="unknown_role"):
        convert({"messages": [{"role": role, "content": "x"}]})
    assert convert({"conversations": [{"from": role, "value": "x"}]}).messages[0]["role"] == "user"


@given(st.sampled_from([("train", False), ("weight", 0), ("weight", 0.0)]))
def test_messages_can_be_marked_as_untrained(mark):
    key, value = mark
    assert convert({"messages": [USER, {**ASSISTANT, key: value}]}).messages[1]["train"] is False


def test_unknown_message_keys_are_kept():
    assert convert({"messages": [{**USER, "mood": "calm"}, ASSISTANT]}).messages[0]["mood"] == "calm"


def test_tools_may_be_a_json_string():
    assert convert({"messages": [USER, ASSISTANT], "tools": '[{"type": "function"}]'}).tools == ({"type": "function"},)
    assert convert({"messages": [USER, ASSISTANT], "tools": "[]"}).tools == ()


def test_extra_keys_do_not_replace_the_message():
    assert (
        convert({"messages": [{**USER, "from": "system"}, {**ASSISTANT, "value": "high"}]}).messages[1]["content"]
        == "a"
    )


def test_tool_arguments_are_kept_as_written():
    def call(arguments):
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        return convert({"messages": [USER, {"role": "assistant", "tool_calls": calls}]}).messages[1]["tool_calls"]

    assert call('{"a":  0}')[0]["function"]["arguments"] == '{"a":  0}'
    assert call("")[0]["function"]["arguments"] == ""
    with pytest.raises(BadRow, match="tool_arguments"):
        call("{a: 0}")


CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}

RESULT = {"role": "tool", "content": "r"}


@pytest.mark.parametrize(
    ("item", "messages"),
    [
        ({"role": "assistant", "content": "", "tool_calls": [CALL]}, [CALLING]),
        ({"role": "assistant", "content": "", "tool_calls": [FUNCTION]}, [CALLING]),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "f", "parameters": {"a": 0}}]}, [CALLING]),
        ({"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}, [CALLING]),
        ({"role": "assistant", "content": "", "function_call": FUNCTION}, [CALLING]),
        ({"role": "assistant", "tool_calls": [CALL]}, [{key: CALLING[key] for key in ("role", "tool_calls")}]),
        ({"from": "function_call", "value": json.dumps(FUNCTION)}, [CALLING]),
        ({"from": "function_call", "value": json.dumps([FUNCTION])}, [CALLING]),
        ({"from": "observation", "value": "r"}, [{"role": "observation", "content": "r"}]),
        ({"from": "function_response", "value": "r"}, [RESULT]),
        ({"from": "gpt", "value": "a", "weight": 0}, [{**ASSISTANT, "train": False}]),
        ({"speaker": "Human", "text": "q"}, [USER]),
        ({"author": "AI", "message": "a"}, [ASSISTANT]),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "a"}]},
            [{**ASSISTANT, "reasoning_content": "t"}],
        ),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 0}}]},
            [{**ASSISTANT, "tool_calls": [{"type": "function", "id": "1", "function": FUNCTION}]}],
        ),
        (
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}]}, {"type": "text", "text": "q"}]},
            [{**RESULT, "tool_call_id": "1"}, USER],
        ),
    ],
)  # fmt: skip
def test_messages_of_every_format_are_normalized(item, messages):
    opened = [USER, item] if messages[0]["role"] == "assistant" else [item, ASSISTANT]
    found = convert({"messages": opened} if "role" in item else {"conversations": opened}).messages
    assert [one for one in found if one not in (USER, ASSISTANT)] == [
        one for one in messages if one not in (USER, ASSISTANT)
    ]
    assert len(found) == 1 + len(messages)


def test_legacy_functions_become_tools():
    functions = [{"name": "f", "parameters": {}}]
    found = convert({"messages": [USER, ASSISTANT], "functions": functions}).tools
    assert found == ({"type": "function", "function": functions[0]},)


def test_prompt_repeated_in_the_completion_is_removed():
    system = {"role": "system", "content": "s"}
    data = {"prompt": [system, USER], "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}
    assert convert(data).messages == (system, USER, ASSISTANT)
    again = {"prompt": [USER], "chosen": [ASSISTANT, USER, ASSISTANT], "rejected": "r"}
    assert convert(again).messages == (USER, ASSISTANT, USER, ASSISTANT)


def test_tool_call_arguments_are_found_under_every_key():
    for call in ({"function": {"name": "f", "parameters": {"x": 1}}}, {"name": "f", "args": {"x": 1}, "id": None}):
        talk = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        (found,) = convert({"messages": talk}).messages[1]["tool_calls"]
        assert found["function"] == {"name": "f", "arguments": {"x": 1}}
        assert "id" not in found
    assert convert({"messages": [USER, {**ASSISTANT, "tool_calls": "null"}]}).messages == (USER, ASSISTANT)


def test_tool_call_arguments_next_to_the_function_are_read():
    call = {"function": {"name": "f"}, "arguments": {"a": 1}}
    (message,) = read_messages([{"role": "assistant", "content": "", "tool_calls": [call]}], "messages")
    assert message["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": 1}}}]


@pytest.mark.parametrize("key", ["input", "arguments", "parameters", "args"])
def test_tool_use_arguments_are_found_under_every_key(key):
    block = {"type": "tool_use", "name": "f", key: {"a": 1}}
    (message,) = read_messages([{"role": "assistant", "content": [block]}], "messages")
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}


def test_tool_use_with_invalid_json_is_rejected():
    block = {"type": "tool_use", "name": "f", "input": "{bad"}
    with pytest.raises(BadRow, match="tool_arguments"):
        read_messages([{"role": "assistant", "content": [block]}], "messages")


def test_repeated_keys_in_json_text_are_rejected():
    text = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": false, "train": true}]'
    with pytest.raises(BadRow, match="duplicate_key"):
        read_messages(text, "messages")


def test_two_texts_of_a_message_are_rejected():
    with pytest.raises(BadRow, match="both value and content"):
        read_messages([{"from": "gpt", "value": "b", "content": "c"}], "messages")


def test_content_blocks_in_an_unsupported_order_are_rejected():
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    result = {
        "type": "tool_result",
        "tool_use_id": "1",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    with pytest.raises(BadRow, match="block_type"):
        convert({"messages": [USER, {"role": "assistant", "content": [call, result]}, ASSISTANT]})
    apart = [USER, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}, ASSISTANT]
    assert convert({"messages": apart}).messages[2]["content"] == result["content"]


def test_text_with_an_author_and_empty_cells_are_accepted():
    assert convert({"text": "Once ...", "author": "Jane"}).schema == "text"
    with pytest.raises(BadRow, match="one_message"):
        convert({"text": "hi", "speaker": "Jane"})
    blank = {"question": "q", "answer": "a", "prompt": "", "completion": ""}
    assert convert(blank).schema == "question_answer"
    with pytest.raises(BadRow, match=r"ambiguous_schema.*\(one, two\)"):
        convert({"one": [USER, ASSISTANT], "two": [USER, ASSISTANT]})


def test_history_may_be_messages_and_cells_are_parsed_only_in_message_columns():
    assert len(convert({"question": "q", "answer": "a", "history": [USER, ASSISTANT]}).messages) == 4
    chat = json.dumps([{"speaker": "Ann", "text": "hi"}])
    row = Row({"instruction": "i", "input": chat, "output": "o"}, Source("d.csv", 0, 1), flat=True)
    assert normalize(row).messages[0]["content"] == f"i\n\n{chat}"
    spelled = {"prompt": json.dumps([USER]), "completion": "a"}
    assert convert(spelled).notes == {"text prompt"}
    assert convert({"question": "q", "answer": '[{"role": "capital", "city": "Rome"}]'}).notes == frozenset()
    assert convert({"messages": [USER, ASSISTANT], "tools": [{"name": "t"}], "functions": [{"name": "f"}]}).notes == {
        "column functions"
    }


def test_trained_messages_of_other_roles_are_reported():
    """Axolotl trains them."""
    row = {"messages": [{**USER, "train": True}, ASSISTANT]}
    assert "trained user" in convert(row).notes
    assert not convert({"messages": [{**USER, "train": False}, {**ASSISTANT, "train": True}]}).notes


def test_reasoning_that_is_given_twice_is_rejected():
    """Templates would print both."""
    answer = {**ASSISTANT, "reasoning_content": "so", "content": "<think>\nso\n</think>\n\n4"}
    with pytest.raises(BadRow, match="two_reasonings.*keep only one of them"):
        convert({"messages": [USER, answer]})
    assert convert({"messages": [USER, {**answer, "content": "4 <think> is a tag"}]}).messages[1]["content"]
