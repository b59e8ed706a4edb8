"""Sessions of pi, droid and Hermes, trajectories of Harbor, rollouts of verifiers, and spans of OpenTelemetry."""

import json

import pytest

from ftdata.readers.sources import MemorySource
from ftdata.types import Reject


def convert(*records):
    return list(MemorySource(records).rows())


def brief(row):
    assert not isinstance(row, Reject), row
    return [
        f"{entry['role']}: {entry['content']}" + ("" if entry.get("train", True) else " (untrained)")
        for entry in row.data["messages"]
    ]


PI = {"type": "session", "version": 3, "id": "p", "cwd": "/w"}


def entry(entry_id, parent, **values):
    return {"type": "message", "id": entry_id, "parentId": parent, **values}


def said(role, text, **values):
    return {"message": {"role": role, "content": [{"type": "text", "text": text}], **values}}


def test_pi_compaction_keeps_the_last_messages():
    before, after = convert(
        PI,
        entry("1", None, **said("user", "q1")),
        entry("2", "1", **said("assistant", "a1")),
        entry("3", "2", **said("user", "q2")),
        entry("4", "3", **said("assistant", "a2")),
        {"type": "compaction", "id": "5", "parentId": "4", "summary": "S", "firstKeptEntryId": "3"},
        entry("6", "5", **said("user", "q3")),
        entry("7", "6", **said("assistant", "a3")),
    )
    assert brief(before) == ["user: q1", "assistant: a1", "user: q2", "assistant: a2"]
    assert brief(after)[1:] == ["user: q2", "assistant: a2 (untrained)", "user: q3", "assistant: a3"]
    assert "<summary>\nS\n</summary>" in brief(after)[0]


def test_pi_edits_change_only_later_contexts():
    before, after = convert(
        PI,
        entry("1", None, **said("user", "secret")),
        entry("2", "1", **said("assistant", "a1")),
        {"type": "context_edit", "id": "3", "parentId": "2", "targetId": "1", "replacement": {"content": "removed"}},
        entry("4", "3", **said("user", "q2")),
        entry("5", "4", **said("assistant", "a2")),
    )
    assert brief(before) == ["user: secret", "assistant: a1"]
    assert brief(after) == ["user: removed", "assistant: a1 (untrained)", "user: q2", "assistant: a2"]


def test_pi_version_1_is_linear():
    _, after = convert(
        {"type": "session", "id": "p", "cwd": "/w"},
        {"type": "message", **said("user", "q1")},
        {"type": "message", **said("assistant", "a1")},
        {"type": "compaction", "summary": "S", "firstKeptEntryIndex": 2},
        {"type": "message", **said("user", "q2")},
        {"type": "message", **said("assistant", "a2")},
    )
    assert brief(after)[1:] == ["assistant: a1 (untrained)", "user: q2", "assistant: a2"]


def test_pi_commands_errors_and_system_messages():
    tool = {"name": "read", "description": "d", "parameters": {}}
    system = {"role": "system", "content": "Be brief.", "toolsAdded": [tool]}
    command = {"role": "bashExecution", "command": "ls", "output": "x", "exitCode": 1}
    (row,) = convert(
        PI,
        entry("0", None, message=system),
        entry("1", "0", message=command),
        entry("2", "1", message={**command, "excludeFromContext": True}),
        entry("3", "2", **said("assistant", "half", stopReason="aborted")),
        entry("4", "3", **said("assistant", "whole")),
    )
    assert brief(row) == [
        "system: Be brief.",
        "user: Ran `ls`\n```\nx\n```\n\nCommand exited with code 1",
        "assistant: whole",
    ]
    assert row.data["tools"][0]["function"]["name"] == "read"
    assert row.data["trace"]["records"] == {"messages": 3, "metadata": 2, "errors": 1}


def test_output_of_pi_in_json_mode():
    (row,) = convert(
        PI,
        {"type": "agent_start"},
        {"type": "message_start", **said("user", "q")},
        {"type": "message_end", **said("user", "q")},
        {"type": "message_end", **said("assistant", "a")},
        {"type": "agent_end", "messages": []},
    )
    assert brief(row) == ["user: q", "assistant: a"]
    assert row.data["trace"]["records"] == {"messages": 2, "metadata": 2, "duplicates": 2}


def test_droid_compaction_and_notices():
    def message(message_id, parent, role, text, **values):
        content = {"role": role, "content": [{"type": "text", "text": text}], **values.pop("fields", {})}
        return {"type": "message", "id": message_id, "parentId": parent, "message": content, **values}

    before, after = convert(
        {"type": "session_start", "id": "d", "version": 2, "cwd": "/w"},
        message("1", None, "user", "q1"),
        message("2", "1", "assistant", "a1"),
        message("3", "2", "user", "limit reached", fields={"visibility": "user_only"}),
        {"type": "compaction_state", "id": "k", "summaryText": "S", "anchorMessage": {"id": "1", "index": 0}},
        message("4", "3", "user", "q2", compactionSummaryId="k"),
        message("5", "4", "assistant", "a2", compactionSummaryId="k"),
    )
    assert brief(before) == ["user: q1", "assistant: a1"]
    assert brief(after) == ["user: S", "assistant: a1 (untrained)", "user: q2", "assistant: a2"]


def test_hermes_export_and_trajectory():
    calls = [{"id": "c", "type": "function", "function": {"name": "terminal", "arguments": '{"command": "ls"}'}}]
    messages = [
        {"role": "user", "content": "q", "active": 1},
        {"role": "assistant", "content": "", "tool_calls": calls, "reasoning": "hm"},
        {"role": "tool", "content": "a.txt", "tool_call_id": "c", "tool_name": "terminal"},
        {"role": "assistant", "content": "undone", "active": 0},
        {"role": "assistant", "content": "done"},
    ]
    export = {"id": "h", "source": "cli", "started_at": 1.0, "system_prompt": "S", "model": "m", "messages": messages}
    tools = '<tools>\n[{"name": "terminal", "description": "d", "parameters": {}, "required": null}]\n</tools>'
    answer = '<think>\nhm\n</think>\nI look.\n<tool_call>\n{"name": "terminal", "arguments": {"a": "</tool_call>"}}\n</tool_call>'
    result = '<tool_response>\n{"tool_call_id": "c", "name": "terminal", "content": {"exit": 0}}\n</tool_response>'
    turns = [("system", tools), ("human", "q"), ("gpt", answer), ("tool", result), ("gpt", "<think>\n</think>\ndone")]
    trajectory = {
        "conversations": [{"from": who, "value": text} for who, text in turns],
        "completed": True,
        "timestamp": "t",
    }
    first, second = convert(export, trajectory)
    assert brief(first) == ["system: S", "user: q", "assistant: ", "tool: a.txt", "assistant: done"]
    assert first.data["messages"][2]["reasoning_content"] == "hm"
    assert first.data["trace"]["records"] == {"messages": 4, "retracted": 1}
    assert brief(second) == ["user: q", "assistant: I look.", 'tool: {"exit": 0}', "assistant: done"]
    assert second.data["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": "</tool_call>"}
    assert second.data["tools"][0]["function"]["name"] == "terminal"
    assert (first.source.row, second.source.row) == (0, 1)


def atif(*steps, **values):
    numbered = [{"step_id": number + 1, **step} for number, step in enumerate(steps)]
    return {"schema_version": "ATIF-v1.7", "agent": {"name": "x", "version": "1"}, "steps": numbered, **values}


def test_atif_copies_dispatches_and_results_without_call_id():
    call = {"tool_call_id": "c", "function_name": "ls", "arguments": {}}
    both = {"results": [{"content": "both"}]}
    (row,) = convert(
        atif(
            {"source": "system", "message": "S"},
            {"source": "user", "message": "q"},
            {"source": "agent", "message": "copied", "is_copied_context": True},
            {"source": "agent", "message": "", "llm_call_count": 0, "tool_calls": [call],
             "observation": {"results": [{"content": "a.txt"}]}},
            {"source": "agent", "message": "", "tool_calls": [call, {**call, "tool_call_id": "d"}],
             "observation": both},
            {"source": "agent", "message": "done", "reasoning_content": "hm"},
        )
    )  # fmt: skip
    assert brief(row) == [
        "system: S",
        "user: q",
        "assistant: copied (untrained)",
        "assistant:  (untrained)",
        "tool: a.txt",
        "assistant: ",
        "user: both",
        "assistant: done",
    ]
    assert row.data["trace"]["anomalies"] == {"results_without_call_id": 1, "calls_without_result": 2}


def test_verifiers_rollouts():
    double = json.dumps({"id": "c", "name": "calc", "arguments": '{"e": "2+2"}'})
    rollout = {
        "example_id": 3,
        "prompt": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "an example"}],
        "completion": [
            {"role": "assistant", "content": "", "tool_calls": [double]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "4"},
        ],
        "reward": 1.0,
        "error": None,
        "is_completed": True,
        "tool_defs": [{"name": "calc", "description": "d", "parameters": {}}],
    }
    (row,) = convert(rollout)
    assert brief(row) == [
        "user: 2+2?",
        "assistant: an example (untrained)",
        "assistant: ",
        "tool: 4",
        "assistant: 4",
    ]
    assert row.data["messages"][3]["tool_call_id"] == "c"
    assert row.data["tools"][0]["function"]["name"] == "calc"
    assert row.data["trace"]["reward"] == 1.0


def test_verifiers_calls_of_a_trajectory_are_joined():
    question, first = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a1"}
    second = {"role": "user", "content": "q2"}
    turns = [
        {"prompt": [question], "completion": [{**first, "reasoning_content": "hm"}]},
        {"prompt": [question, first, second], "response": {"message": {"role": "assistant", "content": "a2"}}},
        {"prompt": [{"role": "user", "content": "other"}], "completion": [{"role": "assistant", "content": "b"}]},
    ]
    joined, other = convert({"task": {}, "trajectory": turns, "rewards": {"r": {"score": 2.0, "weight": 0.5}}})
    assert brief(joined) == ["user: q", "assistant: a1", "user: q2", "assistant: a2"]
    assert joined.data["messages"][1]["reasoning_content"] == "hm"
    assert brief(other) == ["user: other", "assistant: b"]
    assert other.data["trace"]["reward"] == 1.0


def span(number, sent, output, **attributes):
    values = {"gen_ai.operation.name": "chat", "gen_ai.conversation.id": "k", **attributes}
    values |= {"gen_ai.input.messages": json.dumps(sent), "gen_ai.output.messages": json.dumps(output)}
    pairs = [{"key": key, "value": {"stringValue": value}} for key, value in values.items()]
    item = {"traceId": "t", "spanId": f"s{number}", "startTimeUnixNano": str(number), "attributes": pairs}
    return {"resourceSpans": [{"scopeSpans": [{"spans": [item]}]}]}


def part(role, text):
    return {"role": role, "parts": [{"type": "text", "content": text}]}


def test_spans_of_otlp_are_joined_in_the_order_of_time():
    system = json.dumps([{"type": "text", "content": "S"}])
    tools = json.dumps([{"type": "function", "name": "f", "parameters": {}}])
    common = {"gen_ai.system_instructions": system, "gen_ai.tool.definitions": tools}
    question, answer = part("user", "q"), part("assistant", "a")
    (row,) = convert(
        span(2, [question, answer, part("user", "q2")], [part("assistant", "a2")], **common),
        span(1, [question], [answer], **common),
        {"trace_id": "t", "span_id": "x", "attributes": {"gen_ai.operation.name": "invoke_agent"}},
    )
    assert brief(row) == ["system: S", "user: q", "assistant: a", "user: q2", "assistant: a2"]
    assert row.data["tools"] == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert row.data["trace"]["records"] == {"messages": 2, "metadata": 1}


def test_events_of_older_conventions_and_numbered_attributes():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    common = {"traceId": "t", "spanId": "s"}
    events = [
        {**common, "timeUnixNano": "1", "eventName": "gen_ai.user.message", "body": {"content": "q"}},
        {**common, "timeUnixNano": "2", "eventName": "gen_ai.choice",
         "body": {"index": 0, "message": {"content": None, "tool_calls": [call]}}},
    ]  # fmt: skip
    (row,) = convert(*events)
    assert [entry["role"] for entry in row.data["messages"]] == ["user", "assistant"]
    assert row.data["messages"][1]["tool_calls"][0]["id"] == "c"
    attributes = {
        "gen_ai.prompt.0.role": "user",
        "gen_ai.prompt.0.content": "q",
        "gen_ai.completion.0.content": "a",
        "gen_ai.completion.0.tool_calls.0.name": "f",
        "gen_ai.completion.0.tool_calls.0.arguments": "{}",
    }
    (row,) = convert({"trace_id": "t", "span_id": "s", "attributes": attributes})
    assert brief(row) == ["user: q", "assistant: a"]
    assert row.data["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


def test_pi_system_messages_change_the_prompt_and_the_tools_of_later_contexts():
    add = {"role": "system", "sections": {"A": "a", "B": "b"}, "toolsAdded": [{"name": "x"}, {"name": "y"}]}
    patch = {"role": "system", "sections": {"A": None, "C": "c"}, "toolsRemoved": [{"name": "x"}]}
    first, second, third = convert(
        PI,
        entry("0", None, message=add),
        entry("1", "0", **said("user", "q1")),
        entry("2", "1", **said("assistant", "a1")),
        entry("3", "2", message=patch),
        entry("4", "3", **said("assistant", "a2")),
        {"type": "compaction", "id": "5", "parentId": "4", "summary": "S", "systemMessage": {"content": "new"}},
        entry("6", "5", **said("assistant", "a3")),
    )
    assert [brief(row)[0] for row in (first, second, third)] == ["system: a\n\nb", "system: b\n\nc", "system: new"]
    names = [[tool["function"]["name"] for tool in row.data.get("tools", ())] for row in (first, second, third)]
    assert names == [["x", "y"], ["y"], []]


def test_hermes_segments_items_and_summaries():
    tail = {"role": "assistant", "content": "tail", "timestamp": 2.0}
    segments = [
        {"messages": [{"role": "user", "content": "q"}, tail]},
        {"messages": [{"role": "assistant", "content": "sum", "_compressed_summary": True}, tail,
                      {"role": "user", "content": "q2"},
                      {"role": "assistant", "content": "", "codex_message_items": '[{"content": [{"text": "final"}]}]',
                       "reasoning_details": '[{"text": "hm"}]'}]},
    ]  # fmt: skip
    export = {"id": "h", "source": "cli", "started_at": 1.0, "message_count": 6, "segments": segments, "messages": []}
    first, second = convert(export)
    assert brief(first) == ["user: q", "assistant: tail"]
    assert brief(second) == [
        "assistant: sum (untrained)",
        "assistant: tail (untrained)",
        "user: q2",
        "assistant: final",
    ]
    assert second.data["messages"][3]["reasoning_content"] == "hm"


def test_hermes_trajectory_with_fewer_results_and_quoted_tags():
    answer = 'Use <tool_call>\nlike this.\n<tool_call>\n{"name": "a"}\n</tool_call>\n<tool_call>\n{"name": "b"}\n</tool_call>'
    result = '<tool_response>\n{"name": "b", "content": "x"}\n</tool_response>'
    turns = [("human", "q"), ("gpt", answer), ("tool", result), ("gpt", "done")]
    trajectory = {"conversations": [{"from": who, "value": text} for who, text in turns], "completed": True,
                  "prompt_index": 0}  # fmt: skip
    (row,) = convert(trajectory)
    assert brief(row)[1] == "assistant: Use <tool_call>\nlike this."
    assert row.data["messages"][2]["name"] == "b"
    turns[2] = ("tool", result.replace('"b"', '"c"'))
    (reject,) = convert({**trajectory, "conversations": [{"from": who, "value": text} for who, text in turns]})
    assert isinstance(reject, Reject)


def test_verifiers_windows_agents_and_attempts():
    compacted = {"role": "system", "content": "--- context compacted ---"}
    completion = [{"role": "assistant", "content": "a"}, compacted, {"role": "user", "content": "sum"},
                  {"role": "assistant", "content": "b"}]  # fmt: skip
    rows = convert({**ROLLOUT, "prompt": [{"role": "user", "content": "q"}], "completion": completion})
    assert [brief(row) for row in rows] == [["user: q", "assistant: a"], ["user: sum", "assistant: b"]]
    nodes = [
        {"message": {"role": "user", "content": "q"}},
        {"parent": 0, "sampled": True, "message": {"role": "assistant", "content": "a"}},
        {"parent": 1, "sampled": True, "message": {"role": "assistant", "content": "unused"},
         "semantic_parents": [{"node": 1, "type": "compaction_attempt"}]},
    ]  # fmt: skip
    judge = {"agent": {"name": "judge", "trainable": False}, "nodes": nodes[:2]}
    (row,) = convert({"env": {}, "task": {}, "traces": [{"agent": {"name": "main"}, "nodes": nodes}, judge]})
    assert brief(row) == ["user: q", "assistant: a", "assistant: unused (untrained)"]
    assert row.data["trace"]["records"] == {"messages": 3, "unanswered": 2}
    (reject,) = convert({"env": {}, "task": {}, "traces": []})
    assert reject.code == "no_answer"


def test_spans_that_repeat_fail_or_offer_choices():
    question, answers = part("user", "q"), [part("assistant", "a"), part("assistant", "b")]
    follow = span(3, [question, answers[1], part("user", "q2")], [part("assistant", "c")])
    failed = span(4, [question], [part("assistant", "half")], **{"error.type": "timeout"})
    (row,) = convert(span(1, [question], answers), span(2, [question], answers), follow, failed)
    assert brief(row) == ["user: q", "assistant: b", "user: q2", "assistant: c"]
    assert row.data["trace"]["records"] == {"messages": 2, "duplicates": 1, "errors": 1}
    assert row.data["trace"]["anomalies"] == {"unused_choices": 1}


def test_order_of_parts_of_spans_is_kept_and_calls_without_parent_are_counted():
    parts = [{"type": "reasoning", "content": "r"}, {"type": "text", "content": "t"},
             {"type": "reasoning", "content": "s"}, {"type": "tool_call", "id": "c", "name": "f"}]  # fmt: skip
    rows = convert(
        span(1, [part("user", "q")], [{"role": "assistant", "parts": parts}]),
        span(2, [part("user", "only new")], [part("assistant", "a")]),
    )
    assert [message.get("reasoning_content") for message in rows[0].data["messages"]] == [None, "r", "s"]
    assert rows[1].data["trace"]["anomalies"]["calls_without_parent"] == 1


QUESTION = {"source": "user", "message": "q"}
ANSWER = {"source": "agent", "message": "a"}
ROLLOUT = {"reward": 1.0, "timing": {}, "completion": [{"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    ("records", "code", "field"),
    [
        ([PI, {"type": "brand_new", "id": "1", "parentId": None}], "unknown_record_type", "type"),
        ([PI, entry("1", None, message={"role": "robot", "content": "x"})], "unknown_record_type", "role"),
        ([PI, entry("1", "gone", **said("assistant", "a"))], "missing_parent", "parentId"),
        ([{"type": "session_start", "id": "d"}, {"type": "brand_new"}], "unknown_record_type", "type"),
        ([{"role": "session_meta"}, {"role": "robot", "content": "x"}], "unknown_record_type", "role"),
        ([{**atif(QUESTION, ANSWER), "schema_version": "ATIF-v2.0"}], "trace_version", "schema_version"),
        ([atif(QUESTION, {**ANSWER, "brand_new": 1})], "unknown_record_type", "brand_new"),
        ([atif(QUESTION, {"source": "robot", "message": "x"})], "trace_structure", "steps[1].source"),
        ([atif(QUESTION, {**ANSWER, "tool_calls": [{}]})], "trace_structure", "steps[1].tool_calls[0].function_name"),
        ([atif(QUESTION)], "no_answer", ""),
        ([{**ROLLOUT, "prompt": [{"role": "robot", "content": "x"}]}], "trace_structure", "prompt[0]"),
        ([{"task": {}, "nodes": [{"message": {"role": "user", "content": "q"}, "parent": 5}]}], "trace_structure",
         "nodes[0].parent"),
        ([span(1, [part("tool", "x")], [part("assistant", "a")])], "missing_context", ""),
        ([span(1, [{"role": "user", "parts": [{"type": "brand_new"}]}], [part("assistant", "a")])], "unknown_record_type",
         "type"),
    ],
)  # fmt: skip
def test_sessions_that_cannot_be_converted_are_rejected(records, code, field):
    (reject,) = convert(*records)
    assert isinstance(reject, Reject)
    assert (reject.code, reject.field) == (code, field)
