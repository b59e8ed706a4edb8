import json

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


def test_rows_that_look_alike_may_hold_other_lists():
    chat, numbers = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], [1, 2]
    assert convert({"log": chat, "ids": numbers}).schema == "chat_log"
    for log, ids, code in ((numbers, numbers, "unknown_schema"), (chat, chat, "ambiguous_schema")):
        with pytest.raises(BadRow) as caught:
            convert({"log": log, "ids": ids})
        assert caught.value.code == code


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


@pytest.mark.parametrize("role", ["human", "user", "prompter"])
def test_role_spellings_are_mapped(role):
    assert convert({"messages": [{"role": role, "content": "x"}]}).messages[0]["role"] == "user"


@pytest.mark.parametrize("role", ["Human", " user ", "USER"])
def test_roles_of_a_format_are_spelled_exactly_and_speakers_as_people_write(role):
    with pytest.raises(BadRow, match="unknown_role"):
        convert({"messages": [{"role": role, "content": "x"}]})
    assert convert({"conversations": [{"from": role, "value": "x"}]}).messages[0]["role"] == "user"


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


def test_tool_arguments_stay_as_they_are_written():
    def call(arguments):
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        return convert({"messages": [USER, {"role": "assistant", "tool_calls": calls}]}).messages[1]["tool_calls"]

    assert call('{"a":  0}')[0]["function"]["arguments"] == '{"a":  0}'
    assert call("")[0]["function"]["arguments"] == ""
    with pytest.raises(BadRow, match="tool_arguments"):
        call("{a: 0}")


FUNCTION = {"name": "f", "arguments": {"a": 0}}
CALL = {"type": "function", "function": FUNCTION}
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
def test_messages_in_every_spelling(item, messages):
    opened = [USER, item] if messages[0]["role"] == "assistant" else [item, ASSISTANT]
    found = convert({"messages": opened} if "role" in item else {"conversations": opened}).messages
    assert [one for one in found if one not in (USER, ASSISTANT)] == [
        one for one in messages if one not in (USER, ASSISTANT)
    ]
    assert len(found) == 1 + len(messages)


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
def test_further_shapes(data, schema, messages, completion_from):
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
def test_tokens_that_were_made_elsewhere(data, trained):
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
def test_faults_of_further_shapes_are_placed(data, code, field):
    with pytest.raises(BadRow) as caught:
        convert(data)
    assert (caught.value.code, caught.value.field) == (code, field)


def test_columns_may_be_paths_into_rows():
    row = {"data": {"turns": [{"q": "q"}, {"q": "x"}], "a": "a"}, "id": 3}
    assert convert(row, columns={"question": "data.turns[0].q", "answer": "data.a"}).messages == (USER, ASSISTANT)
    assert convert(row, columns={"question": "data.turns[-1].q", "answer": "data.a"}).fields["question"] == "x"
    for path in ("data.turns[2].q", "data.b", "data.turns.q", "id.x"):
        with pytest.raises(BadRow, match="missing_column"):
            convert(row, columns={"question": path, "answer": "data.a"})
    assert convert({"a.b": "q", "c": "a"}, columns={"question": "a.b", "answer": "c"}).messages == (USER, ASSISTANT)


def test_rows_may_bring_variables_for_the_template():
    assert convert({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"x": True}}).kwargs == {"x": True}
    assert convert({"messages": [USER, ASSISTANT], "chat_template_kwargs": '{"x": 1}'}).kwargs == {"x": 1}
    assert convert({"messages": [USER, ASSISTANT], "chat_template_kwargs": None}).kwargs == {}


def test_older_tools_are_wrapped():
    functions = [{"name": "f", "parameters": {}}]
    found = convert({"messages": [USER, ASSISTANT], "functions": functions}).tools
    assert found == ({"type": "function", "function": functions[0]},)


def test_nothing_beside_the_messages_is_lost():
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


def test_what_other_columns_hold_is_used_or_named():
    dolly = {"instruction": "Sum up.", "context": "LONG", "response": "S", "category": "x"}
    assert contents(dolly) == [("user", "Sum up.\n\nLONG"), ("assistant", "S")]
    assert convert(dolly).noted == {"column category"}
    assert contents({"prompt": "q", "response": "a", "system_prompt": "s"})[0] == ("system", "s")
    assert contents({"instruction": "", "input": "q", "output": "a"})[0] == ("user", "q")
    assert contents({"question": "q", "answer": "a", "system": [{"type": "text", "text": "s"}]})[0][0] == "system"
    log = {"talk": [{"speaker": "Human", "text": "q", "mood": "x"}, {"speaker": "bot", "text": "a"}], "id": 1}
    assert convert(log).noted == {"column id", "role Human as user", "role bot as assistant", "message key mood"}
    assert convert({"messages": [USER, ASSISTANT], "tools": []}).noted == frozenset()


@pytest.mark.parametrize("prompt", ["q2", [USER | {"content": "q2"}]])
def test_history_comes_before_the_question(prompt):
    for answer in ({"chosen": "a2", "rejected": "r"}, {"completion": "a2"}):
        data = {"prompt": prompt, **answer, "history": [["q1", "a1"]], "system": "s"}
        texts = [content for _, content in contents(data)]
        assert texts == ["s", "q1", "a1", "q2", "a2"]


def test_a_question_that_is_repeated_in_the_answers_is_asked_once():
    system = {"role": "system", "content": "s"}
    data = {"prompt": [system, USER], "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}
    assert convert(data).messages == (system, USER, ASSISTANT)
    again = {"prompt": [USER], "chosen": [ASSISTANT, USER, ASSISTANT], "rejected": "r"}
    assert convert(again).messages == (USER, ASSISTANT, USER, ASSISTANT)


def test_a_text_that_spells_messages_is_a_text_where_texts_are_no_cells():
    spelled = json.dumps([USER, ASSISTANT])
    data = {"prompt": "Write a chat as JSON", "completion": spelled}
    assert contents(data) == [("user", "Write a chat as JSON"), ("assistant", spelled)]
    row = Row({"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])}, Source("d.csv", 0, 1), flat=True)
    assert normalise(row).messages == (USER, ASSISTANT)


@pytest.mark.parametrize("name", ["eos_token", "bos_token", "raise_exception", "strftime_now"])
def test_a_row_cannot_set_what_is_the_tokenizers(name):
    with pytest.raises(BadRow, match="row_options"):
        convert({"messages": [USER, ASSISTANT], "chat_template_kwargs": {name: "x"}})


def test_calls_are_read_wherever_their_arguments_stand():
    for call in ({"function": {"name": "f", "parameters": {"x": 1}}}, {"name": "f", "args": {"x": 1}, "id": None}):
        talk = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        (found,) = convert({"messages": talk}).messages[1]["tool_calls"]
        assert found["function"] == {"name": "f", "arguments": {"x": 1}}
        assert "id" not in found
    assert convert({"messages": [USER, {**ASSISTANT, "tool_calls": "null"}]}).messages == (USER, ASSISTANT)


def test_blocks_in_an_order_that_no_template_prints_are_refused():
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


def test_a_mapped_column_may_be_missing_where_it_is_not_needed():
    columns = {"instruction": "q", "output": "a", "input": "ctx"}
    assert contents({"q": "x", "a": "y"}, columns=columns)[0] == ("user", "x")
    with pytest.raises(BadRow, match="missing_column"):
        convert({"q": "x"}, columns=columns)
    mapped = convert({"question": "q", "answer": "a", "h": [["q1", "a1"]]}, columns={"history": "h"})
    assert len(mapped.messages) == 4
    with pytest.raises(UsageError, match="expected the name of a column"):
        check_columns({"question": ""})


def test_texts_have_authors_and_tables_blank_cells():
    assert convert({"text": "Once ...", "author": "Jane"}).schema == "text"
    with pytest.raises(BadRow, match="one_message"):
        convert({"text": "hi", "speaker": "Jane"})
    blank = {"question": "q", "answer": "a", "prompt": "", "completion": ""}
    assert convert(blank).schema == "question_answer"
    with pytest.raises(BadRow, match=r"ambiguous_schema.*\(one, two\)"):
        convert({"one": [USER, ASSISTANT], "two": [USER, ASSISTANT]})


def test_a_schema_of_ones_own_fails_row_by_row(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ftdata.types import Conversation\nprint('loaded')\n"
        "def fails(row): return row['x']\ndef gives(row): return {}\n"
        "def good(row): return Conversation(messages=({'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}))\n"
    )
    for name, says in (("fails", "KeyError"), ("gives", "makes a dict")):
        with pytest.raises(BadRow, match=f"schema_failed.*{says}"):
            convert({"y": 1}, schema=f"{file}:{name}")
    assert convert({"y": 1}, schema=f"{file}:good").messages == (USER, ASSISTANT)
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(UsageError, match="cannot be loaded: SyntaxError"):
        convert({"y": 1}, schema=f"{tmp_path / 'broken.py'}:f")


def test_a_schema_is_loaded_once(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "print('loaded')\nfrom ftdata.types import Conversation\ndef f(row): return Conversation(())\n"
    )
    for _ in range(3):
        convert({"y": 1}, schema=f"{tmp_path / 'mine.py'}:f")
    assert capsys.readouterr().out == "loaded\n"


def test_a_mapping_is_not_replaced_by_what_it_stands_beside():
    data = {"instruction": "i", "output": "WORSE", "response": "WORST", "best": "BEST"}
    assert contents(data, columns={"output": "best"})[-1] == ("assistant", "BEST")
    with pytest.raises(BadRow, match="missing_column"):
        convert(data, columns={"output": "bset"})
    nested = convert({"question": "q", "data": {"answers": ["a"]}}, columns={"answer": "data.answers[0]"})
    assert nested.noted == frozenset()


def test_preferences_ask_what_they_were_asked():
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


def test_what_is_blank_gives_way_to_another_name():
    assert contents({"instruction": "i", "input": None, "context": "CTX", "response": "o"})[0][1] == "i\n\nCTX"
    assert contents({"question": "q", "answer": "a", "system": "", "system_prompt": "S"})[0] == ("system", "S")
    assert contents({"instruction": "i", "output": None, "response": "o"})[-1] == ("assistant", "o")


def test_history_may_be_messages_and_cells_are_messages_only_where_these_belong():
    assert len(convert({"question": "q", "answer": "a", "history": [USER, ASSISTANT]}).messages) == 4
    chat = json.dumps([{"speaker": "Ann", "text": "hi"}])
    row = Row({"instruction": "i", "input": chat, "output": "o"}, Source("d.csv", 0, 1), flat=True)
    assert normalise(row).messages[0]["content"] == f"i\n\n{chat}"
    spelled = {"prompt": json.dumps([USER]), "completion": "a"}
    assert convert(spelled).noted == {"text prompt"}
    assert convert({"question": "q", "answer": '[{"role": "capital", "city": "Rome"}]'}).noted == frozenset()
    assert convert({"messages": [USER, ASSISTANT], "tools": [{"name": "t"}], "functions": [{"name": "f"}]}).noted == {
        "column functions"
    }


@pytest.mark.parametrize(
    "made",
    [
        "({'content': 'x'},)", "('a', 'b')", "None", "(), text=5", "(), tools='nope'", "({'role': 'usr', 'content': 'x'},)",
        "({'role': 'user', 'content': 5},)", "(), tokens=Tokens([1, 2, 3], [True])", "(), tools=('t',)",
    ],
)  # fmt: skip
def test_what_a_schema_of_ones_own_makes_is_checked(tmp_path, made):
    (tmp_path / "mine.py").write_text(f"from ftdata.types import *\ndef f(row): return Conversation({made})\n")
    with pytest.raises(BadRow):
        convert({"y": 1}, schema=f"{tmp_path / 'mine.py'}:f")


def test_a_schema_of_ones_own_need_not_say_where_the_completion_begins(tmp_path):
    talk = (USER, ASSISTANT, USER, ASSISTANT)
    (tmp_path / "mine.py").write_text(f"from ftdata.types import *\ndef f(row): return Conversation({talk})\n")
    assert convert({"y": 1}, schema=f"{tmp_path / 'mine.py'}:f").completion_from == 3


@pytest.mark.parametrize("put", ["message", "argument", "tool", "field"])
def test_what_a_schema_of_ones_own_gives_may_be_the_same_object_each_time(tmp_path, put):
    (tmp_path / "mine.py").write_text(
        "from ftdata.types import *\n"
        "answer = {'role': 'assistant', 'content': 'a'}\n"
        "asked = {'role': 'user', 'content': 'q'}\n"
        "calls = {'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': {'x': 'x'}}}]}\n"
        "tool = {'type': 'function', 'function': {'name': 'f'}}\n"
        "fields = {'question': 'q'}\n"
        "whole = Conversation((asked, calls, answer), fields=fields, tools=(tool,))\n"
        "def f(row):\n"
        "    answer['content'] = fields['question'] = row['y']\n"
        "    calls['tool_calls'][0]['function']['arguments']['x'] = tool['function']['name'] = row['y']\n"
        "    return whole\n"
    )
    first, second = (convert({"y": text}, schema=f"{tmp_path / 'mine.py'}:f") for text in ("one", "two"))
    found = {
        "message": lambda one: one.messages[2]["content"],
        "argument": lambda one: one.messages[1]["tool_calls"][0]["function"]["arguments"]["x"],
        "tool": lambda one: one.tools[0]["function"]["name"],
        "field": lambda one: one.fields["question"],
    }[put]
    assert [found(first), found(second)] == ["one", "two"]
