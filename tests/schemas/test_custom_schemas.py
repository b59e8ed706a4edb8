"""Custom schemas: from files, with their errors."""

import pytest
from schema_helpers import ASSISTANT, USER, convert

from ftdata.errors import BadRow, UsageError


def test_custom_schema_from_a_file_is_used(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ftdata.types import Conversation\n"
        "def convert(row):\n"
        "    return Conversation(({'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': row['a']}), completion_from=1)\n"
    )
    assert convert({"q": "q", "a": "a"}, schema=f"{path}:convert").messages == (USER, ASSISTANT)


def test_failing_custom_schema_rejects_only_its_row(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ftdata.types import Conversation\nprint('loaded')\n"
        "def fails(row): return row['x']\ndef gives(row): return {}\n"
        "def good(row): return Conversation(messages=({'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}))\n"
    )
    for name, says in (("fails", "KeyError"), ("gives", "returned a dict")):
        with pytest.raises(BadRow, match=f"schema_failed.*{says}"):
            convert({"y": 1}, schema=f"{file}:{name}")
    assert convert({"y": 1}, schema=f"{file}:good").messages == (USER, ASSISTANT)
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(UsageError, match="cannot be loaded: SyntaxError"):
        convert({"y": 1}, schema=f"{tmp_path / 'broken.py'}:f")


def test_custom_schema_is_loaded_once(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "print('loaded')\nfrom ftdata.types import Conversation\ndef f(row): return Conversation(())\n"
    )
    for _ in range(3):
        convert({"y": 1}, schema=f"{tmp_path / 'mine.py'}:f")
    assert capsys.readouterr().out == "loaded\n"


@pytest.mark.parametrize(
    "made",
    [
        "({'content': 'x'},)", "('a', 'b')", "None", "(), text=5", "(), tools='nope'", "({'role': 'usr', 'content': 'x'},)",
        "({'role': 'user', 'content': 5},)", "(), tokens=Tokens([1, 2, 3], [True])", "(), tools=('t',)",
    ],
)  # fmt: skip
def test_result_of_a_custom_schema_is_checked(tmp_path, made):
    (tmp_path / "mine.py").write_text(f"from ftdata.types import *\ndef f(row): return Conversation({made})\n")
    with pytest.raises(BadRow):
        convert({"y": 1}, schema=f"{tmp_path / 'mine.py'}:f")


def test_completion_start_of_a_custom_schema_is_optional(tmp_path):
    talk = (USER, ASSISTANT, USER, ASSISTANT)
    (tmp_path / "mine.py").write_text(f"from ftdata.types import *\ndef f(row): return Conversation({talk})\n")
    assert convert({"y": 1}, schema=f"{tmp_path / 'mine.py'}:f").completion_from == 3


@pytest.mark.parametrize("put", ["message", "argument", "tool", "field"])
def test_custom_schema_may_return_the_same_object_for_every_row(tmp_path, put):
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
