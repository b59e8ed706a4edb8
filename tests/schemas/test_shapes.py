"""Schemas: recognized by their columns, mapped, and rejected with line and reason."""

import json

import pytest
from hypothesis import given
from schema_helpers import ASSISTANT, CALL, FUNCTION, USER, convert

from ftdata.errors import BadRow, UsageError
from ftdata.schemas import check_columns, normalize
from ftdata.testing import text_strategy
from ftdata.types import Row, Source


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
def test_every_schema_is_recognized(data, schema, messages):
    conversation = convert(data)
    assert conversation.schema == schema
    assert conversation.messages == messages
    assert conversation.source.line == 7


@given(question=text_strategy(min_size=0), answer=text_strategy(min_size=0))
def test_text_is_unchanged(question, answer):
    assert [m["content"] for m in convert({"question": question, "answer": answer}).messages] == [question, answer]


def test_rows_with_the_same_columns_may_contain_different_lists():
    chat, numbers = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], [1, 2]
    assert convert({"log": chat, "ids": numbers}).schema == "chat_log"
    for log, ids, code in ((numbers, numbers, "unknown_schema"), (chat, chat, "ambiguous_schema")):
        with pytest.raises(BadRow) as caught:
            convert({"log": log, "ids": ids})
        assert caught.value.code == code


def test_columns_option_maps_names():
    conversation = convert({"q": "x", "a": "y"}, columns={"instruction": "q", "output": "a"})
    assert conversation.fields == {"instruction": "x", "output": "y", "input": ""}


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        ({"foo": "x"}, "unknown_schema", "'foo'"),
        ({"instruction": "q", "output": None}, "missing_column", "output is null, expected text"),
        ({"messages": None, "id": 1}, "unknown_schema", "messages is null"),
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
def test_unmatched_rows_are_rejected_with_line_and_reason(data, code, says):
    with pytest.raises(BadRow) as caught:
        convert(data)
    assert caught.value.code == code
    assert "data.json:7" in str(caught.value)
    assert says in str(caught.value)


def test_missing_mapped_column_suggests_the_nearest_name():
    with pytest.raises(BadRow, match="did you mean 'answer'"):
        convert({"answer": "x", "q": "y"}, columns={"output": "anwser", "instruction": "q"})


def test_unknown_canonical_column_is_refused():
    with pytest.raises(UsageError, match="did you mean 'instruction'"):
        check_columns({"instructoin": "q"})


def test_schema_option_resolves_ambiguity():
    row = {"messages": [USER, ASSISTANT], "text": "t"}
    assert convert(row, schema="text").text == "t"
    assert convert(row, schema="messages").messages == (USER, ASSISTANT)


def test_mixed_file_is_matched_row_by_row():
    shapes = [convert(row).schema for row in ({"text": "t"}, {"question": "q", "answer": "a"}, [USER, ASSISTANT])]
    assert shapes == ["text", "question_answer", "messages"]


def test_system_prompt_and_history_are_kept():
    row = {"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    assert [m["content"] for m in convert(row).messages] == ["s", "q0", "a0", "q", "a"]
    assert convert(row).completion_from == 4
    with pytest.raises(BadRow, match="two_systems"):
        convert({"conversations": [{"from": "system", "value": "x"}, {"from": "gpt", "value": "a"}], "system": "y"})


@pytest.mark.parametrize(
    ("data", "schema", "messages", "completion_from"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", (USER, ASSISTANT), 1),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, USER]}, "preference", (USER, ASSISTANT), 1),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, "preference", (USER, ASSISTANT), 1),
        ({"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": "b"}, "preference", (USER, ASSISTANT), 1),
        ({"dialog": [USER, ASSISTANT], "id": 3, "tags": ["x"]}, "chat_log", (USER, ASSISTANT), 1),
        ({"log": [{"speaker": "user", "text": "q"}, {"speaker": "bot", "text": "a"}]}, "chat_log", (USER, ASSISTANT), 1),
        ({"messages": json.dumps([USER, ASSISTANT])}, "messages", (USER, ASSISTANT), 1),
        ({"conversations": [USER, ASSISTANT]}, "sharegpt", (USER, ASSISTANT), 1),
    ],
)  # fmt: skip
def test_preference_and_other_schemas_are_normalized(data, schema, messages, completion_from):
    found = convert(data)
    assert (found.schema, found.messages, found.completion_from) == (schema, messages, completion_from)


@pytest.mark.parametrize(
    ("data", "trained"),
    [
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, [False, True, True]),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 0], "attention_mask": [1, 1, 1]}, [False, True, False]),
        ({"input_ids": [5, 6], "assistant_masks": [0, 1], "seq_lengths": [2]}, [False, True]),
    ],
)
def test_pretokenized_rows_are_normalized(data, trained):
    found = convert(data)
    assert (found.schema, found.messages) == ("tokens", ())
    assert found.tokens.input_ids.tolist() == data["input_ids"]
    assert found.tokens.trained.tolist() == trained


@pytest.mark.parametrize(
    ("data", "code", "field"),
    [
        ({"input_ids": [5, 6]}, "no_labels", "input_ids"),
        ({"input_ids": [], "labels": []}, "no_tokens", "input_ids"),
        ({"input_ids": [5, 6], "labels": [6, 7]}, "label_value", "labels[0]"),
        ({"input_ids": [5, 6], "labels": [5]}, "tokens_shape", "labels"),
        ({"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1, 0]}, "tokens_shape", "attention_mask"),
        ({"input_ids": [5, 6], "labels": [5, 6], "seq_lengths": [1, 1]}, "tokens_shape", "seq_lengths"),
        ({"input_ids": [5, 6], "labels": [5, 6], "position_ids": [0, 0]}, "tokens_shape", "position_ids"),
        ({"input_ids": [5, 6], "labels": [5, 6], "cu_seqlens": [0, 1, 2]}, "tokens_shape", "cu_seqlens"),
        ({"input_ids": [5, 6], "labels": [5, 6], "sequence_lengths": [1, 1]}, "tokens_shape", "sequence_lengths"),
        ({"input_ids": [5, 6], "completion_mask": [0, 2]}, "tokens_shape", "completion_mask"),
        ({"input_ids": [5, "6"], "labels": [5, 6]}, "tokens_type", "input_ids"),
        ({"chosen": "a", "rejected": "b"}, "no_prompt", "chosen"),
        ({"messages": "[1"}, "json_text", "messages"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": "[1"}]}, "json_text", "messages[1].tool_calls"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}, {"type": "text", "text": "a"}]}]}, "block_order", "messages[1].content[1]"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use"}]}]}, "block_type", "messages[1].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content_type", "messages[0].content"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "json_text", "conversations[0].value"),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"chat_template": "x"}}, "row_options", "chat_template_kwargs.chat_template"),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tools": [1]}}, "row_options", "chat_template_kwargs.tools"),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": [1]}, "row_options", "chat_template_kwargs"),
    ],
)  # fmt: skip
def test_errors_of_all_schemas_name_their_field(data, code, field):
    with pytest.raises(BadRow) as caught:
        convert(data)
    assert (caught.value.code, caught.value.field) == (code, field)


def test_columns_may_be_paths_into_nested_rows():
    row = {"data": {"turns": [{"q": "q"}, {"q": "x"}], "a": "a"}, "id": 3}
    assert convert(row, columns={"question": "data.turns[0].q", "answer": "data.a"}).messages == (USER, ASSISTANT)
    assert convert(row, columns={"question": "data.turns[-1].q", "answer": "data.a"}).fields["question"] == "x"
    for path in ("data.turns[2].q", "data.b", "data.turns.q", "id.x"):
        with pytest.raises(BadRow, match="missing_column"):
            convert(row, columns={"question": path, "answer": "data.a"})
    assert convert({"a.b": "q", "c": "a"}, columns={"question": "a.b", "answer": "c"}).messages == (USER, ASSISTANT)


def test_rows_may_set_template_variables():
    assert convert({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"x": True}}).kwargs == {"x": True}
    assert convert({"messages": [USER, ASSISTANT], "chat_template_kwargs": '{"x": 1}'}).kwargs == {"x": 1}
    assert convert({"messages": [USER, ASSISTANT], "chat_template_kwargs": None}).kwargs == {}


def test_system_prompt_tools_and_calls_are_kept_in_every_schema():
    system, tools = {"system": "s"}, {"tools": [{"type": "function"}]}
    for row in (
        {"question": "q", "answer": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "output": "a"},
        {"messages": [USER, ASSISTANT]},
    ):
        found = convert({**row, **system, **tools})
        assert [one["content"] for one in found.messages] == ["s", "q", "a"]
        assert found.tools == ({"type": "function"},)
    calls = {**ASSISTANT, "function_call": json.dumps(FUNCTION)}
    assert convert({"messages": [USER, calls]}).messages[1]["tool_calls"] == [CALL]
    with pytest.raises(BadRow, match="two_calls"):
        convert({"messages": [USER, {**calls, "tool_calls": [CALL]}]})
    for key in ("args", "input"):
        written = {**ASSISTANT, "tool_calls": [{"name": "f", key: {"a": 0}}]}
        assert convert({"messages": [USER, written]}).messages[1]["tool_calls"] == [CALL]
    chosen = {"prompt": "q", "chosen": [{"role": "system", "content": "s"}, USER, ASSISTANT], "rejected": []}
    assert len(convert(chosen).messages) == 3
    with pytest.raises(BadRow, match="missing_column"):
        convert({"question": "q", "answers": "hello"}, columns={"answer": "answers[0]"})
    with pytest.raises(BadRow, match="tokens_type"):
        convert({"input_ids": [2**32 + 5], "labels": [2**32 + 5]})


def contents(data, **options):
    return [(message["role"], message["content"]) for message in convert(data, **options).messages]


def test_other_columns_are_used_or_noted():
    dolly = {"instruction": "Sum up.", "context": "LONG", "response": "S", "category": "x"}
    assert contents(dolly) == [("user", "Sum up.\n\nLONG"), ("assistant", "S")]
    assert convert(dolly).notes == {"column category"}
    assert contents({"prompt": "q", "response": "a", "system_prompt": "s"})[0] == ("system", "s")
    assert contents({"instruction": "", "input": "q", "output": "a"})[0] == ("user", "q")
    assert contents({"question": "q", "answer": "a", "system": [{"type": "text", "text": "s"}]})[0][0] == "system"
    log = {"talk": [{"speaker": "Human", "text": "q", "mood": "x"}, {"speaker": "bot", "text": "a"}], "id": 1}
    assert convert(log).notes == {"column id", "role Human as user", "role bot as assistant", "message key mood"}
    assert convert({"messages": [USER, ASSISTANT], "tools": []}).notes == frozenset()


@pytest.mark.parametrize("prompt", ["q2", [USER | {"content": "q2"}]])
def test_history_comes_before_the_question(prompt):
    for answer in ({"chosen": "a2", "rejected": "r"}, {"completion": "a2"}):
        data = {"prompt": prompt, **answer, "history": [["q1", "a1"]], "system": "s"}
        texts = [content for _, content in contents(data)]
        assert texts == ["s", "q1", "a1", "q2", "a2"]


def test_json_messages_in_text_are_parsed_only_in_flat_files():
    spelled = json.dumps([USER, ASSISTANT])
    data = {"prompt": "Write a chat as JSON", "completion": spelled}
    assert contents(data) == [("user", "Write a chat as JSON"), ("assistant", spelled)]
    row = Row({"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])}, Source("d.csv", 0, 1), flat=True)
    assert normalize(row).messages == (USER, ASSISTANT)


@pytest.mark.parametrize("name", ["eos_token", "bos_token", "raise_exception", "strftime_now"])
def test_row_cannot_set_special_tokens_or_functions(name):
    with pytest.raises(BadRow, match="row_options"):
        convert({"messages": [USER, ASSISTANT], "chat_template_kwargs": {name: "x"}})


def test_optional_mapped_column_may_be_missing():
    columns = {"instruction": "q", "output": "a", "input": "ctx"}
    assert contents({"q": "x", "a": "y"}, columns=columns)[0] == ("user", "x")
    with pytest.raises(BadRow, match="missing_column"):
        convert({"q": "x"}, columns=columns)
    mapped = convert({"question": "q", "answer": "a", "h": [["q1", "a1"]]}, columns={"history": "h"})
    assert len(mapped.messages) == 4
    with pytest.raises(UsageError, match="expected the name of a column"):
        check_columns({"question": ""})


def test_missing_mapped_column_is_not_replaced_by_other_messages():
    """A row that lacks the column of `columns=` must not be trained on another conversation of the row."""
    row = {"draft": [USER, ASSISTANT]}
    with pytest.raises(BadRow, match="no column 'final', which columns= maps to 'messages'"):
        convert(row, columns={"messages": "final"})
    with pytest.raises(BadRow, match="did you mean 'conversation'"):
        convert({"conversation": [USER, ASSISTANT]}, columns={"messages": "conversatoin"})
    assert convert(row, columns={"messages": "draft"}).schema == "messages"


def test_text_instead_of_messages_is_named():
    with pytest.raises(BadRow, match=r"messages_type.*is str 'hello', expected a list of messages"):
        convert({"id": 1, "messages": "hello"})


def test_mapped_column_is_not_replaced_by_an_alias():
    data = {"instruction": "i", "output": "WORSE", "response": "WORST", "best": "BEST"}
    assert contents(data, columns={"output": "best"})[-1] == ("assistant", "BEST")
    with pytest.raises(BadRow, match="missing_column"):
        convert(data, columns={"output": "bset"})
    nested = convert({"question": "q", "data": {"answers": ["a"]}}, columns={"answer": "data.answers[0]"})
    assert nested.notes == frozenset()


def test_preference_rows_keep_their_prompt():
    told = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
        ASSISTANT,
    ]
    for prompt in ("", None, "q2", " q2 ", [{"role": "user", "content": "q2"}]):
        assert convert({"prompt": prompt, "chosen": told, "rejected": "r"}).messages == tuple(told)
    with pytest.raises(BadRow, match="prompt_differs"):
        convert({"prompt": "q3", "chosen": told, "rejected": "r"})
    systems = [[{"role": "system", "content": name}, USER] for name in ("s1", "s2")]
    with pytest.raises(BadRow, match="two_systems"):
        convert({"prompt": systems[0], "chosen": [*systems[1], ASSISTANT], "rejected": "r"})


def test_empty_column_falls_back_to_an_alias():
    assert contents({"instruction": "i", "input": None, "context": "CTX", "response": "o"})[0][1] == "i\n\nCTX"
    assert contents({"question": "q", "answer": "a", "system": "", "system_prompt": "S"})[0] == ("system", "S")
    assert contents({"instruction": "i", "output": None, "response": "o"})[-1] == ("assistant", "o")
