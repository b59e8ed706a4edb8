"""Session files as data: detection, places of errors, options and reports."""

import gzip
import json

import pytest
from claude_code_records import ANSWER, QUESTION, assistant, record, text, user
from typer.testing import CliRunner

from ftdata import audit, build_sft_dataset, convert, preview, read
from ftdata.build.dataset import write_build
from ftdata.cli import app
from ftdata.errors import BadRows, InputRefused, UsageError
from ftdata.readers import file_parts, resolve_sources, traces
from ftdata.types import Reject

SESSION = [QUESTION, record("progress", "p", "u", data={}), {**ANSWER, "parentUuid": "p"}]
UNKNOWN = [QUESTION, record("brand-new", "x", "u"), {**ANSWER, "parentUuid": "x"}]


def write(path, records):
    path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return path


@pytest.fixture
def session(tmp_path):
    return write(tmp_path / "session.jsonl", SESSION)


def test_files_of_sessions_and_rows_are_read_together(session, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"question": "1+1?", "answer": "2"}])
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress(session.read_bytes()))
    found = list(read([str(session), str(rows), str(packed)]))
    assert [row.data.get("answer") for row in found] == [None, "2", None]
    assert found[0].data == found[2].data
    assert str(found[0].source) == f"{session}:1"


def test_single_objects_in_a_file_are_documents(tmp_path):
    steps = [{"step_id": 1, "source": "user", "message": "q"}, {"step_id": 2, "source": "agent", "message": "a"}]
    child = {"trajectory_id": "t", "agent": {}, "steps": steps}
    trajectory = {"schema_version": "ATIF-v1.7", "agent": {}, "steps": steps, "subagent_trajectories": [child]}
    path = tmp_path / "trajectory.json"
    path.write_text(json.dumps(trajectory, indent=2))
    rows = write(tmp_path / "rows.jsonl", [trajectory, {"question": "1+1?", "answer": "2"}, trajectory])
    assert [row.data["trace"]["context"] for row in read(path)] == ["main", "t"]
    assert [str(row.source).rpartition("rows.jsonl")[2] for row in read(rows)] == [
        ":1",
        ":1[1]",
        ":2[2]",
        ":3[3]",
        ":3[4]",
    ]


def test_places_of_errors(tmp_path, tokenizer_dir):
    path = write(tmp_path / "a.jsonl", UNKNOWN)
    with pytest.raises(BadRows, match=r"a\.jsonl:2 type: the record type 'brand-new' of Claude Code 2\.1 is unknown"):
        build_sft_dataset(path, tokenizer_dir("tiny_bpe"), template="chatml")
    (reject,) = (row for source in resolve_sources(path) for row in source.rows())
    assert isinstance(reject, Reject)
    assert "brand-new" in reject.raw


def test_unknown_records_can_be_ignored(tmp_path):
    path = write(tmp_path / "a.jsonl", UNKNOWN)
    (row,) = read({"path": str(path), "ignore_records": "other, brand-new"})
    assert row.data["trace"]["records"] == {"messages": 2, "ignored": 1}
    result = CliRunner().invoke(app, ["preview", str(path), "--ignore-records", "brand-new", "--json"])
    assert result.exit_code == 0
    assert "yes" in json.dumps(json.loads(result.stdout)["rows"][0])
    with pytest.raises(UsageError, match="expected a text with names"):
        list(read({"path": str(path), "ignore_records": ["brand-new"]}))


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]


@pytest.mark.parametrize(
    "row",
    [
        {"type": "summary", "uuid": "1", "messages": CHAT},
        {"type": "result", "session_id": "1", "prompt": "q", "completion": "a"},
        {"id": "1", "timestamp": "t", "instructions": "i", "input": "x", "output": "y"},
        {"example_id": 1, "prompt": CHAT[:1], "completion": CHAT[1:]},
        {"source": "web", "started_at": 1, "messages": CHAT},
        {"completed": True, "system": "s", "conversations": [{"from": "human", "value": "q", "weight": 0}]},
        {"task": "t", "trajectory": CHAT},
        {"task": "t", "nodes": [{"id": 1}], "messages": CHAT},
        {"task": "t", "traces": ["a"], "messages": CHAT},
        {"input": "q", "output": [{"type": "text", "text": "a"}]},
        {"input": "q", "output": []},
        {"attributes": {"gen_ai.x": 1}, "messages": CHAT},
        {"type": "chat", "text": "t"},
        {"question": "q", "answer": "a"},
    ],
)
def test_rows_of_data_sets_are_not_sessions(tmp_path, row):
    path = write(tmp_path / "rows.jsonl", [row] * 2)
    assert [item.data for item in read(path)] == [row] * 2
    assert file_parts.is_line_format(resolve_sources(path)[0].input, "jsonl")


def test_parts_of_a_file_are_never_sessions(tmp_path, monkeypatch):
    records = [{"type": "summary", "uuid": str(number), "sessionId": "s", "text": "x"} for number in range(40)]
    path = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}, *records])
    monkeypatch.setattr(file_parts, "PART", 300)
    parts = file_parts.split_into_parts(resolve_sources(path))
    assert len(parts) > 2
    assert [row.data for part in parts for row in part.rows()] == [row.data for row in read(path)]


def test_sessions_can_begin_with_records_without_an_id(tmp_path):
    first = {"type": "mode", "mode": "plan"}
    (row,) = read(write(tmp_path / "a.jsonl", [first, *SESSION]))
    assert row.data["trace"]["records"] == {"messages": 2, "metadata": 2}
    (reject,) = (item for source in resolve_sources(write(tmp_path / "b.jsonl", [{"type": "odd"}, *SESSION]))
                 for item in source.rows())  # fmt: skip
    assert isinstance(reject, Reject)
    assert (reject.code, reject.source.line) == ("unknown_record_type", 1)
    (reject,) = (item for source in resolve_sources(write(tmp_path / "c.jsonl", [{"resourceSpans": []}]))
                 for item in source.rows())  # fmt: skip
    assert isinstance(reject, Reject)
    assert reject.code == "no_answer"


def test_invalid_line_rejects_the_session(tmp_path):
    path = write(tmp_path / "a.jsonl", SESSION)
    path.write_text(path.read_text() + '{"type": "user", "mess')
    (reject,) = (row for source in resolve_sources(path) for row in source.rows())
    assert isinstance(reject, Reject)
    assert (reject.code, reject.source.line) == ("partial_file", 4)
    path.write_text(path.read_text().rpartition("\n")[0] + "\n[1, 2]\n")
    (reject,) = (row for source in resolve_sources(path) for row in source.rows())
    assert isinstance(reject, Reject)
    assert reject.code in ("not_a_row", "record_type")


def test_session_files_are_not_divided_into_parts(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", SESSION)
    monkeypatch.setattr(file_parts, "PART", 10)
    assert len(file_parts.split_into_parts(resolve_sources(path))) == 1
    monkeypatch.setattr(traces, "MAX_SESSION_BYTES", 10)
    with pytest.raises(InputRefused, match="more than 0 MiB"):
        list(read(path))


def test_rows_can_be_filtered_and_reports_count_what_is_left_out(session, tmp_path, tokenizer_dir):
    tiny = tokenizer_dir("tiny_bpe")
    branches = [
        QUESTION,
        ANSWER,
        user("u2", "a", "q2"),
        assistant("a2", "u2", text("no")),
        user("u3", "a", "q3"),
        assistant("a3", "u3", text("yes")),
    ]
    write(session, branches)
    report = write_build(session, tiny, tmp_path / "all", template="chatml")
    assert any("agent sessions with records" in note and "repeated (1 row)" in note for note in report.notes)
    assert any("conversations from agent sessions: 2 rows" in note for note in report.notes)
    assert not any("columns that are not read" in note for note in report.notes)
    filtered = build_sft_dataset(session, tiny, template="chatml", where="not trace.abandoned")
    assert len(filtered["train"]) == 1
    assert audit(session, tiny, template="chatml").rows == 2


def test_sessions_are_converted_to_messages(session, tmp_path):
    output = tmp_path / "messages.jsonl"
    convert(session, output)
    (row,) = map(json.loads, output.read_text().splitlines())
    assert [message["content"] for message in row["messages"]] == ["q", "yes"]


def test_preview_shows_sessions(session):
    page = preview(session)
    assert "yes" in str(page)
