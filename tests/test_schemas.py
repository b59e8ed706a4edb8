import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftdata.errors import BadRow, UsageError
from ftdata.schemas import check_columns, normalise
from ftdata.testing import texts
from ftdata.types import Row, Source

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def convert(data, **options):
    return normalise(Row(data, Source("data.json", 4, 7)), **options)


@pytest.mark.parametrize(
    ("data", "schema", "messages"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages", (USER, ASSISTANT)),
        ({"prompt": "ignored", "prompt_id": "x", "messages": [USER, ASSISTANT]}, "messages", (USER, ASSISTANT)),
        ([USER, ASSISTANT], "messages", (USER, ASSISTANT)),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            (USER, ASSISTANT),
        ),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", (USER, ASSISTANT)),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion", (USER, ASSISTANT)),
        ({"instruction": "q", "output": "a"}, "alpaca", (USER, ASSISTANT)),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", (USER, ASSISTANT)),
        (
            {"instruction": "q", "input": "i", "output": "a"},
            "alpaca",
            ({"role": "user", "content": "q\n\ni"}, ASSISTANT),
        ),
        ({"instruction": "q", "response": "a"}, "alpaca", (USER, ASSISTANT)),
        ({"question": "q", "answer": "a"}, "question_answer", (USER, ASSISTANT)),
        ({"question": {"0": "q"}, "answer": {"0": "a"}}, "question_answer", (USER, ASSISTANT)),
        ({"text": "t"}, "text", ()),
    ],
)
def test_every_shape_is_recognised(data, schema, messages):
    conversation = convert(data)
    assert conversation.schema == schema
    assert conversation.messages == messages
    assert conversation.source.line == 7


@given(question=texts(min_size=0), answer=texts(min_size=0))
def test_texts_pass_through_unchanged(question, answer):
    assert [m["content"] for m in convert({"question": question, "answer": answer}).messages] == [question, answer]


def test_columns_map_names():
    conversation = convert({"q": "x", "a": "y"}, columns={"instruction": "q", "output": "a"})
    assert conversation.fields == {"instruction": "x", "output": "y", "input": ""}


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        ({"foo": "x"}, "unknown_schema", "'foo'"),
        (
            {"messages": [USER, ASSISTANT], "question": "q", "answer": "a"},
            "ambiguous_schema",
            "messages, question_answer",
        ),
        ({"role": "user", "content": "q"}, "one_message", "single message"),
        ({"question": 3, "answer": "a"}, "content_type", "question"),
        ({"question": {"0": "a", "1": "b"}, "answer": "a"}, "nested_cell", "2 values"),
        ({"messages": []}, "no_messages", "messages"),
        ({"messages": ["x"]}, "message_type", "messages[0]"),
        ({"messages": [{"role": "user", "content": None}]}, "content_type", "messages[0].content"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "unknown_role", "did you mean 'assistant'"),
        ({"messages": [{"content": "x"}]}, "unknown_role", "messages[0].role"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "weight_value", "messages[1].weight"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content_type", "messages[0].content"),
        ("text", "not_a_row", "str"),
    ],
)
def test_what_does_not_fit_is_refused_with_place_and_reason(data, code, says):
    with pytest.raises(BadRow) as caught:
        convert(data)
    assert caught.value.code == code
    assert "data.json:7" in str(caught.value)
    assert says in str(caught.value)


def test_a_missing_mapped_column_names_the_nearest():
    with pytest.raises(BadRow, match="did you mean 'answer'"):
        convert({"answer": "x", "q": "y"}, columns={"output": "anwser", "instruction": "q"})


def test_an_unknown_canonical_column_is_refused():
    with pytest.raises(UsageError, match="did you mean 'instruction'"):
        check_columns({"instructoin": "q"})


@pytest.mark.parametrize("role", ["human", "Human", " user ", "prompter"])
def test_role_spellings_are_mapped(role):
    assert convert({"messages": [{"role": role, "content": "x"}]}).messages[0]["role"] == "user"


@given(st.sampled_from([("train", False), ("weight", 0), ("weight", 0.0)]))
def test_untrained_messages(mark):
    key, value = mark
    assert convert({"messages": [USER, {**ASSISTANT, key: value}]}).messages[1]["train"] is False


def test_unknown_message_keys_are_kept():
    assert convert({"messages": [{**USER, "mood": "calm"}, ASSISTANT]}).messages[0]["mood"] == "calm"


def test_a_forced_schema_settles_ambiguity():
    row = {"messages": [USER, ASSISTANT], "text": "t"}
    assert convert(row, schema="text").text == "t"
    assert convert(row, schema="messages").messages == (USER, ASSISTANT)


def test_a_mixed_file_is_read_row_by_row():
    shapes = [convert(row).schema for row in ({"text": "t"}, {"question": "q", "answer": "a"}, [USER, ASSISTANT])]
    assert shapes == ["text", "question_answer", "messages"]


def test_tools_may_be_a_json_string():
    assert convert({"messages": [USER, ASSISTANT], "tools": '[{"type": "function"}]'}).tools == ({"type": "function"},)
    assert convert({"messages": [USER, ASSISTANT], "tools": "[]"}).tools == ()


def test_a_schema_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ftdata.types import Conversation\n"
        "def convert(row):\n"
        "    return Conversation(({'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': row['a']}), completion_from=1)\n"
    )
    assert convert({"q": "q", "a": "a"}, schema=f"{path}:convert").messages == (USER, ASSISTANT)


def test_extra_keys_do_not_replace_the_message():
    assert (
        convert({"messages": [{**USER, "from": "system"}, {**ASSISTANT, "value": "high"}]}).messages[1]["content"]
        == "a"
    )


def test_what_stands_before_the_question_is_kept():
    row = {"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    assert [m["content"] for m in convert(row).messages] == ["s", "q0", "a0", "q", "a"]
    assert convert(row).completion_from == 4
    with pytest.raises(BadRow, match="two_systems"):
        convert({"conversations": [{"from": "system", "value": "x"}, {"from": "gpt", "value": "a"}], "system": "y"})
    with pytest.raises(BadRow, match="row_options"):
        convert({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"chat_template": "x"}})


def test_tool_arguments_stay_as_they_are_written():
    def call(arguments):
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        return convert({"messages": [USER, {"role": "assistant", "tool_calls": calls}]}).messages[1]["tool_calls"]

    assert call('{"a":  0}')[0]["function"]["arguments"] == '{"a":  0}'
    assert call("")[0]["function"]["arguments"] == ""
    with pytest.raises(BadRow, match="tool_arguments"):
        call("{a: 0}")
