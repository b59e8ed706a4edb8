"""Sessions of Claude Code: how records become messages, and which sessions are rejected."""

import pytest
from claude_code_records import ANSWER, QUESTION, assistant, call, record, result, text, user

from ftdata.readers.sources import MemorySource
from ftdata.types import Reject


def rows_of(*records):
    items = list(MemorySource(records).rows())
    assert not any(isinstance(item, Reject) for item in items), items
    return [item.data for item in items]


def reject_of(*records):
    (item,) = MemorySource(records).rows()
    assert isinstance(item, Reject)
    return item


def brief(row):
    """Return the messages as short texts."""
    parts = []
    for message in row["messages"]:
        calls = "".join(f" +{item['id']}" for item in message.get("tool_calls", ()))
        thought = f"({message['reasoning_content']})" if "reasoning_content" in message else ""
        trained = "" if message.get("train", True) else " untrained"
        parts.append(f"{message['role']}: {thought}{message['content']}{calls}{trained}")
    return parts


def test_blocks_of_a_response_become_one_message_and_results_follow_it():
    (row,) = rows_of(
        user("u", None, "q"),
        assistant("a1", "u", {"type": "thinking", "thinking": "hm", "signature": "x"}, response="r"),
        assistant("a2", "a1", text("I look."), response="r"),
        assistant("a3", "a2", call("c1", command="ls"), response="r"),
        user("r1", "a3", [result("c1", "a.txt")]),
        assistant("a4", "a3", call("c2"), response="r"),
        user("r2", "a4", [result("c2", [text("x"), text("y")], is_error=True)]),
        assistant("a5", "r2", text("done")),
    )
    assert brief(row) == [
        "user: q",
        "assistant: (hm)I look. +c1 +c2",
        "tool: a.txt",
        "tool: [{'type': 'text', 'text': 'x'}, {'type': 'text', 'text': 'y'}]",
        "assistant: done",
    ]
    assert row["messages"][1]["tool_calls"][0]["function"] == {"name": "Bash", "arguments": {"command": "ls"}}
    assert row["messages"][3]["name"] == "Bash"
    assert row["messages"][3]["is_error"] is True
    assert row["trace"]["records"] == {"messages": 8}
    assert row["trace"]["anomalies"] == {"interleaved_results": 1}
    assert row["trace"]["models"] == ["m"]


def test_order_of_the_blocks_of_a_response_is_kept():
    blocks = [text("first"), call("c"), {"type": "thinking", "thinking": "late"}, text("last")]
    (row,) = rows_of(user("u", None, "q"), assistant("a", "u", *blocks))
    assert brief(row) == ["user: q", "assistant: first +c", "assistant: (late)last"]


def test_branches_are_rows_and_each_answer_is_trained_once():
    kept, abandoned = rows_of(
        user("u1", None, "q1"),
        assistant("a1", "u1", text("one")),
        user("u2", "a1", "try this"),
        assistant("a2", "u2", text("abandoned")),
        user("u3", "a1", "try that"),
        assistant("a3", "u3", text("kept")),
    )
    assert brief(kept) == ["user: q1", "assistant: one", "user: try that", "assistant: kept"]
    assert brief(abandoned) == [
        "user: q1",
        "assistant: one untrained",
        "user: try this",
        "assistant: abandoned",
    ]
    assert (kept["trace"]["abandoned"], abandoned["trace"]["abandoned"]) == (False, True)
    assert abandoned["trace"]["records"] == {"messages": 2, "repeated": 2}


def test_compaction_begins_a_new_row():
    before, after = rows_of(
        user("u1", None, "q1"),
        assistant("a1", "u1", text("one")),
        assistant("a0", "a1", text("kept by the compaction"), response="r0"),
        {**record("system", "k", None), "subtype": "compact_boundary", "logicalParentUuid": "a0",
         "compactMetadata": {"preservedMessages": {"uuids": ["a0"]}}},
        user("s", "k", "summary", isCompactSummary=True, isVisibleInTranscriptOnly=True),
        user("u2", "s", "q2"),
        assistant("a2", "u2", text("two")),
    )  # fmt: skip
    assert brief(before) == ["user: q1", "assistant: one", "assistant: kept by the compaction"]
    assert brief(after) == [
        "user: summary",
        "assistant: kept by the compaction untrained",
        "user: q2",
        "assistant: two",
    ]


def test_preserved_segment_of_a_compaction_is_context():
    _, after = rows_of(
        user("u1", None, "q1"),
        assistant("a1", "u1", text("one")),
        user("u2", "a1", "q2"),
        assistant("a2", "u2", text("two")),
        {**record("system", "k", None), "subtype": "compact_boundary",
         "compactMetadata": {"preservedSegment": {"headUuid": "u2", "tailUuid": "a2"}}},
        user("s", "k", "summary", isCompactSummary=True),
        assistant("a3", "s", text("three")),
    )  # fmt: skip
    assert brief(after) == ["user: summary", "user: q2", "assistant: two untrained", "assistant: three"]


BOUNDARY = {**record("system", "k", None), "subtype": "compact_boundary"}
SUMMARY = user("s", "k", "summary", isCompactSummary=True)


def test_records_that_continue_a_preserved_message_continue_the_summary():
    segment = {"preservedSegment": {"headUuid": "u2", "tailUuid": "a2"}}
    before, after = rows_of(
        user("u1", None, "q1"),
        assistant("a1", "u1", text("one")),
        user("u2", "a1", "q2"),
        assistant("a2", "u2", text("two")),
        {**BOUNDARY, "compactMetadata": segment},
        SUMMARY,
        user("u3", "a2", "q3"),
        assistant("a3", "u3", text("three")),
    )
    assert brief(before) == ["user: q1", "assistant: one", "user: q2", "assistant: two"]
    assert brief(after) == ["user: summary", "user: q2", "assistant: two untrained", "user: q3", "assistant: three"]


def test_preserved_messages_before_the_summary():
    segment = {"preservedSegment": {"headUuid": "u1", "tailUuid": "a1", "anchorUuid": "k"}}
    _, after = rows_of(
        user("u1", None, "q1"),
        assistant("a1", "u1", text("one")),
        {**BOUNDARY, "compactMetadata": segment},
        SUMMARY,
        assistant("a2", "s", text("two")),
    )
    assert brief(after) == ["user: q1", "assistant: one untrained", "user: summary", "assistant: two"]


def test_messages_written_again_after_a_compaction_are_context():
    again = rows_of(
        user("u1", None, "q1"),
        assistant("a1", "u1", text("one"), response="r"),
        BOUNDARY,
        SUMMARY,
        assistant("b1", "s", text("one"), response="r"),
        user("u2", "b1", "q2"),
        assistant("a2", "u2", text("two")),
    )
    same = rows_of(
        user("u1", None, "q1"),
        assistant("a1", "u1", text("one"), response="r"),
        BOUNDARY,
        SUMMARY,
        assistant("a1", "s", text("one"), response="r"),
        user("u2", "a1", "q2"),
        assistant("a2", "u2", text("two")),
    )
    expected = ["user: summary", "assistant: one untrained", "user: q2", "assistant: two"]
    assert brief(again[1]) == brief(same[1]) == expected
    assert again[1]["trace"]["anomalies"] == {"replayed_messages": 1}


def test_result_after_a_compaction_belongs_to_the_new_context():
    before, after = rows_of(
        user("u", None, "q"),
        assistant("a", "u", call("c")),
        BOUNDARY,
        SUMMARY,
        user("r", "s", [result("c", "ok")]),
        assistant("b", "r", text("done")),
    )
    assert brief(before) == ["user: q", "assistant:  +c"]
    assert brief(after) == ["user: summary", "tool: ok", "assistant: done"]


def test_partial_and_truncated_responses_are_not_trained():
    (row,) = rows_of(
        user("u", None, "q"),
        assistant("p", "u", text("par")),
        record("system", "e", "p", subtype="api_error"),
        record("assistant", "t", "e", [text("cut")], message={"id": "t", "stop_reason": "max_tokens"}),
        user("v", "t", "go on"),
        assistant("b", "v", text("rest")),
    )
    assert brief(row) == ["user: q", "assistant: cut untrained", "user: go on", "assistant: rest"]
    assert row["trace"]["records"] == {"messages": 4, "errors": 1, "retracted": 1}
    assert row["trace"]["anomalies"] == {"truncated_responses": 1}


def test_several_queued_prompts_are_one_path():
    (row,) = rows_of(
        user("u", None, "q"),
        assistant("a", "u", call("c")),
        user("r", "a", [result("c", "ok")]),
        record("attachment", "p1", "r", attachment={"type": "queued_command", "prompt": "one"}),
        record("attachment", "p2", "r", attachment={"type": "queued_command", "prompt": "two"}),
        assistant("b", "r", text("both")),
    )
    assert brief(row)[-3:] == ["user: one", "user: two", "assistant: both"]
    assert row["trace"]["abandoned"] is False


@pytest.mark.parametrize(
    "records",
    [
        [user("x", "x", "q", isSidechain=True), assistant("y", "x", text("a"), isSidechain=True)],
        [
            record("progress", "p", "q"),
            record("progress", "q", "p"),
            user("u", "p", "q"),
            assistant("a", "u", text("a")),
        ],
    ],
)
def test_cycles_end(records):
    list(MemorySource(records).rows())


def test_sub_agents_are_rows_with_and_without_an_agent_id():
    main, *agents = sorted(
        rows_of(
            user("u", None, "q"),
            assistant("a", "u", call("c", prompt="find")),
            user("s1", None, "find", isSidechain=True),
            assistant("s2", "s1", text("found"), isSidechain=True),
            user("t1", None, "other", isSidechain=True, agentId="x"),
            assistant("t2", "t1", text("yes"), isSidechain=True, agentId="x"),
            user("r", "a", [result("c", "found")]),
            assistant("b", "r", text("done")),
        ),
        key=lambda row: row["trace"]["context"] != "main",
    )
    assert brief(main) == ["user: q", "assistant:  +c", "tool: found", "assistant: done"]
    assert sorted(row["trace"]["context"] for row in agents) == ["agent s1", "agent x"]


def test_messages_that_the_model_did_not_write_or_see_are_counted():
    (row,) = rows_of(
        {"type": "summary", "summary": "title", "leafUuid": "z"},
        user("u", None, "q"),
        record("assistant", "e", "u", [text("API Error: 529")], message={"model": "<synthetic>"}, isApiErrorMessage=True),
        record("system", "f", "e", subtype="api_error"),
        assistant("dead", "f", text("stream that broke")),
        assistant("a", "f", text("answer")),
        assistant("a", "f", text("answer")),
        assistant("h", "a", {"type": "thinking", "thinking": "", "signature": "x"}),
        record("attachment", "n", "a", attachment={"type": "todo_reminder"}),
        {"type": "queue-operation", "operation": "enqueue", "content": "also b", "sessionId": "s"},
        record("attachment", "p", "a", attachment={"type": "queued_command", "prompt": "also b"}),
        {"type": "queue-operation", "operation": "enqueue", "content": "never sent", "sessionId": "s"},
        assistant("b", "p", text("b, too")),
        user("x", "b", "last words"),
    )  # fmt: skip
    assert brief(row) == ["user: q", "assistant: answer", "user: also b", "assistant: b, too", "user: last words"]
    assert row["trace"]["records"] == {
        "messages": 5,
        "metadata": 2,
        "duplicates": 1,
        "errors": 2,
        "retracted": 1,
        "missing_content": 3,
    }
    assert row["trace"]["anomalies"] == {"hidden_reasoning": 1}


def test_injected_message_beside_the_conversation_is_not_a_branch():
    (row,) = rows_of(
        user("u", None, "/review"),
        user("m", "u", "the prompt of the command", isMeta=True),
        assistant("a", "u", text("reviewed")),
    )
    assert brief(row) == ["user: /review", "user: the prompt of the command", "assistant: reviewed"]


def test_text_beside_a_result_follows_it():
    (row,) = rows_of(
        user("u", None, "q"),
        assistant("a", "u", call("c")),
        user("r", "a", [text("go on"), result("c", "ok")]),
        assistant("b", "r", text("done")),
    )
    assert brief(row) == ["user: q", "assistant:  +c", "tool: ok", "user: go on", "assistant: done"]


def test_server_tools_keep_their_results():
    blocks = [
        {"type": "server_tool_use", "id": "w", "name": "web_search", "input": {"query": "x"}},
        {"type": "web_search_tool_result", "tool_use_id": "w", "content": [{"title": "t"}]},
        text("It is y."),
    ]
    (row,) = rows_of(user("u", None, "q"), assistant("a", "u", *blocks))
    assert brief(row) == ["user: q", "assistant:  +w", 'tool: [{"title": "t"}]', "assistant: It is y."]


def test_stream_json_output_is_linear():
    (row,) = rows_of(
        {"type": "system", "subtype": "init", "session_id": "s", "tools": ["Bash"]},
        {"type": "user", "session_id": "s", "message": {"role": "user", "content": "q"}},
        {"type": "assistant", "session_id": "s", "message": {"id": "r", "role": "assistant", "content": [text("a")]}},
        {"type": "result", "session_id": "s", "result": "a"},
    )
    assert brief(row) == ["user: q", "assistant: a"]
    assert row["trace"]["records"] == {"messages": 2, "metadata": 2}


def test_copied_answers_of_a_forked_session_are_not_trained():
    copied = {"forkedFrom": {"sessionId": "other", "messageUuid": "a"}}
    (row,) = rows_of(
        user("u", None, "q", **copied),
        assistant("a", "u", text("copied"), **copied),
        user("v", "a", "q2"),
        assistant("b", "v", text("new")),
    )
    assert brief(row) == ["user: q", "assistant: copied untrained", "user: q2", "assistant: new"]


@pytest.mark.parametrize(
    ("records", "code", "reason"),
    [
        ([QUESTION, record("brand-new", "x", "u"), ANSWER], "unknown_record_type", "'brand-new' of Claude Code 2.1"),
        ([QUESTION, record("system", "x", "u", subtype="odd"), ANSWER], "unknown_record_type", "'system/odd'"),
        ([QUESTION, assistant("a", "u", {"type": "hologram"})], "unknown_record_type", "the content type 'hologram'"),
        ([QUESTION, assistant("a", "gone", text("yes"))], "missing_parent", "the record gone"),
        ([QUESTION, ANSWER, assistant("a", "u", text("no"))], "conflicting_records", "same uuid"),
        ([QUESTION, {**ANSWER, "message": "yes"}], "record_type", "has no message"),
        ([QUESTION, {**ANSWER, "message": {"content": [3]}}], "trace_structure", "has the part 3"),
        ([QUESTION], "no_answer", "no complete answer of the model"),
        ([{"type": "fork-context-ref", "parentSessionId": "p", "sessionId": "s"}, QUESTION, ANSWER],
         "missing_context", "continues session p"),
    ],
)  # fmt: skip
def test_sessions_that_cannot_be_converted_are_rejected(records, code, reason):
    reject = reject_of(*records)
    assert reject.code == code
    assert reason in reject.reason
    assert reject.fix or code == "record_type"
