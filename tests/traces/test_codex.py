"""Sessions of Codex, and logs of the Responses API."""

import pytest

from ftdata.readers.sources import MemorySource
from ftdata.types import Reject


def line(kind, **payload):
    return {"timestamp": "t", "type": kind, "payload": payload}


META = line("session_meta", id="c", cli_version="0.50", base_instructions={"text": "You are Codex."})


def message(role, text):
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def item(role, text):
    return line("response_item", **message(role, text))


def convert(*records):
    return list(MemorySource(records).rows())


def brief(row):
    return [
        (entry["role"], entry["content"], "" if entry.get("train", True) else "untrained")
        for entry in row.data["messages"]
    ]


def test_items_become_messages_and_events_are_metadata():
    (row,) = convert(
        META,
        item("user", "<environment_context>/w</environment_context>"),
        item("user", "fix it"),
        line("event_msg", type="user_message", message="fix it"),
        line("response_item", type="reasoning", summary=[{"type": "summary_text", "text": "Look"}], content=None),
        item("assistant", "Checking."),
        line("response_item", type="function_call", namespace="mcp__s", name="get", arguments='{"a": 1}', call_id="c1"),
        line("response_item", type="custom_tool_call", name="apply_patch", input="*** Begin", call_id="c2"),
        line("response_item", type="function_call_output", call_id="c2", output=[{"type": "input_text", "text": "ok"}]),
        line("response_item", type="custom_tool_call_output", call_id="c1", output="1"),
        line("response_item", type="web_search_call", action={"type": "search", "query": "x"}),
        item("assistant", "Done."),
    )
    assert brief(row) == [
        ("system", "You are Codex.", ""),
        ("user", "<environment_context>/w</environment_context>", ""),
        ("user", "fix it", ""),
        ("assistant", "Checking.", ""),
        ("tool", "ok", ""),
        ("tool", "1", ""),
        ("assistant", "Done.", ""),
    ]
    answer = row.data["messages"][3]
    assert answer["reasoning_content"] == "Look"
    assert [entry["function"] for entry in answer["tool_calls"]] == [
        {"name": "mcp__s__get", "arguments": '{"a": 1}'},
        {"name": "apply_patch", "arguments": {"input": "*** Begin"}},
    ]
    assert row.data["trace"]["records"] == {"messages": 10, "metadata": 1, "missing_content": 1}
    assert row.data["trace"]["anomalies"] == {"summarized_reasoning": 1, "server_calls_without_result": 1}


def test_reasoning_that_only_an_event_contains_is_kept():
    (row,) = convert(
        META,
        item("user", "q"),
        line("response_item", type="reasoning", summary=[]),
        line("event_msg", type="agent_reasoning_raw_content", text="raw"),
        item("assistant", "a"),
    )
    assert row.data["messages"][2]["reasoning_content"] == "raw"


def test_rollback_and_compaction_end_a_context():
    rows = convert(
        META,
        item("user", "q1"),
        item("assistant", "a1"),
        item("developer", "settings"),
        item("user", "q2"),
        item("assistant", "a2"),
        line("event_msg", type="thread_rolled_back", num_turns=1),
        item("user", "q3"),
        item("assistant", "a3"),
        line("compacted", message="", replacement_history=[message("user", "summary"), message("assistant", "a3")]),
        item("user", "q4"),
        item("assistant", "a4"),
    )
    system = ("system", "You are Codex.", "")
    assert [brief(row)[1:] for row in rows] == [
        [("user", "q1", ""), ("assistant", "a1", ""), ("user", "q3", ""), ("assistant", "a3", "")],
        [("user", "summary", ""), ("assistant", "a3", "untrained"), ("user", "q4", ""), ("assistant", "a4", "")],
        [("user", "q1", ""), ("assistant", "a1", "untrained"), ("developer", "settings", ""), ("user", "q2", ""),
         ("assistant", "a2", "")],
    ]  # fmt: skip
    assert {brief(row)[0] for row in rows} == {system}
    assert [row.data["trace"]["abandoned"] for row in rows] == [False, False, True]


def test_old_compaction_keeps_the_messages_of_the_user():
    _, after = convert(
        META, item("user", "q1"), item("assistant", "a1"), line("compacted", message="sum"), item("assistant", "a2")
    )
    assert brief(after)[1:] == [("user", "q1", ""), ("user", "sum", ""), ("assistant", "a2", "")]
    assert after.data["trace"]["anomalies"]["approximate_context"] == 1


def test_several_events_with_reasoning_keep_their_order():
    def raw(text):
        return line("event_msg", type="agent_reasoning_raw_content", text=text)

    item_of_reasoning = line("response_item", type="reasoning", summary=[])
    for events in ([raw("1"), raw("2"), item_of_reasoning], [item_of_reasoning, raw("1"), item_of_reasoning, raw("2")]):
        (row,) = convert(META, item("user", "q"), *events, item("assistant", "a"))
        assert row.data["messages"][2]["reasoning_content"] == "1\n2"


def test_summaries_are_not_trained_and_do_not_accumulate():
    flagged = {**item("assistant", "written for the compaction"), "metadata": {"compaction_output": True}}
    *_, last = rows = convert(
        META,
        item("user", "q1"),
        item("assistant", "a1"),
        item("assistant", "Done: A."),
        line("compacted", message="Another language model ...\nDone: A."),
        item("user", "q2"),
        item("assistant", "a2"),
        flagged,
        line("compacted", message="Done: B."),
        item("user", "q3"),
        item("assistant", "a3"),
    )
    assert brief(rows[0])[-1] == ("assistant", "Done: A.", "untrained")
    assert brief(rows[1])[-1] == ("assistant", "written for the compaction", "untrained")
    assert [text for _, text, _ in brief(last)][1:] == ["q1", "q2", "Done: B.", "q3", "a3"]


def test_tools_of_a_context_are_those_that_it_contains():
    late = line("response_item", type="tool_search_output", call_id="s", tools=[{"type": "function", "name": "late"}])
    before, after = convert(
        META,
        item("user", "q1"),
        item("assistant", "a1"),
        line("compacted", replacement_history=[message("user", "sum")]),
        late,
        item("assistant", "a2"),
    )
    assert "tools" not in before.data
    assert after.data["tools"][0]["function"]["name"] == "late"


def test_inherited_and_delivered_messages_are_not_trained():
    meta = line("session_meta", id="c", history_mode="paginated", subagent_history_start_ordinal=3)
    delivered = {
        **item("assistant", "copy"),
        "metadata": {"delivered_assistant_message": "codex:code-mode-delivery:v1"},
    }
    (row,) = convert(
        meta,
        {**item("user", "q"), "ordinal": 1},
        {**item("assistant", "of the parent"), "ordinal": 2},
        {**line("response_item", type="agent_message", author="/root", content=[{"type": "input_text", "text": "do"}]),
         "ordinal": 3},
        {**item("assistant", "done"), "ordinal": 4},
        delivered,
    )  # fmt: skip
    assert brief(row) == [
        ("user", "q", ""),
        ("assistant", "of the parent", "untrained"),
        ("user", "do", ""),
        ("assistant", "done", ""),
    ]
    assert row.data["trace"]["records"]["duplicates"] == 1


def test_sessions_from_before_september_2025():
    (row,) = convert(
        {"id": "c", "timestamp": "t", "instructions": None, "git": None},
        {"record_type": "state"},
        message("user", "q"),
        {"type": "function_call", "name": "shell", "arguments": "{}", "call_id": "c1"},
        {"type": "function_call_output", "call_id": "c1", "output": "r"},
        message("assistant", "a"),
    )
    assert [role for role, *_ in brief(row)] == ["user", "assistant", "tool", "assistant"]


def test_tools_that_the_session_contains_are_kept():
    tool = {"name": "look", "description": "d", "inputSchema": {"type": "object"}}
    (row,) = convert(line("session_meta", id="c", dynamic_tools=[tool]), item("user", "q"), item("assistant", "a"))
    function = {"name": "look", "description": "d", "parameters": {"type": "object"}}
    assert row.data["tools"] == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("records", "code"),
    [
        ([META, line("brand_new"), item("assistant", "a")], "unknown_record_type"),
        ([META, line("event_msg", type="brand_new"), item("assistant", "a")], "unknown_record_type"),
        ([META, line("response_item", type="brand_new"), item("assistant", "a")], "unknown_record_type"),
        ([line("session_meta", id="c", history_base={"thread_id": "t"}), item("assistant", "a")], "missing_context"),
        ([META, line("rollout_reference"), item("assistant", "a")], "missing_context"),
        ([META, item("user", "q"), item("assistant", "a"), line("compacted", replacement_history=[message("user", "q")]),
          line("event_msg", type="thread_rolled_back", num_turns=1)], "unknown_history"),
        ([META, item("user", "q")], "no_answer"),
    ],
)  # fmt: skip
def test_sessions_that_cannot_be_converted_are_rejected(records, code):
    (reject,) = convert(*records)
    assert isinstance(reject, Reject)
    assert reject.code == code


ANSWER = {"id": "m", **message("assistant", "Hi")}


def test_logged_response_with_its_request():
    response = {"id": "r", "object": "response", "status": "completed", "output": [ANSWER]}
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    request = {"model": "m", "instructions": "Be brief.", "tools": [tool]}
    given = [message("user", "q"), message("assistant", "earlier"), {"role": "user", "content": "q2"}]
    (row,) = convert({"request": {**request, "input": given}, "response": response})
    assert brief(row) == [
        ("system", "Be brief.", ""),
        ("user", "q", ""),
        ("assistant", "earlier", "untrained"),
        ("user", "q2", ""),
        ("assistant", "Hi", ""),
    ]
    assert row.data["tools"][0]["function"]["name"] == "f"


def test_items_of_servers_and_references():
    reasoning = {"id": "rs", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    found = {"id": "fs", "type": "file_search_call", "queries": ["x"], "results": [{"text": "y"}]}
    given = [reasoning, {"type": "item_reference", "id": "rs"}, {"role": "user", "content": "q"}]
    (row,) = convert({"input": given, "output": [found, ANSWER], "object": "response"})
    assert [entry["role"] for entry in row.data["messages"]] == ["assistant", "user", "assistant", "tool", "assistant"]
    assert row.data["messages"][3]["content"] == '[{"text": "y"}]'


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({"object": "response", "output": [ANSWER]}, "missing_context"),
        ({"input": "q", "previous_response_id": "r", "output": [ANSWER]}, "missing_context"),
        ({"input": [{"type": "item_reference", "id": "x"}], "output": [ANSWER]}, "missing_context"),
        ({"object": "response", "input": "q", "output": [{"type": "brand_new"}]}, "unknown_record_type"),
        ({"input": "q", "status": "failed", "output": [ANSWER]}, "no_answer"),
        ({"object": "response", "input": "q", "output": []}, "no_answer"),
        ({"input": 3, "output": [ANSWER]}, "record_type"),
    ],
)
def test_responses_that_cannot_be_converted_are_rejected(data, code):
    (reject,) = convert(data)
    assert isinstance(reject, Reject)
    assert reject.code == code


def test_truncated_response_is_not_trained():
    (reject,) = convert({"object": "response", "status": "incomplete", "input": "q", "output": [ANSWER]})
    assert "no complete answer" in reject.reason
