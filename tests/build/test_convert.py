"""`convert`: written rows are the same conversations, or they are rejected."""

import json
from functools import partial

import datasets
import pytest
from reader_helpers import write
from row_shapes import SHAPES

from ftdata import convert, read
from ftdata.errors import BadRows, StorageError, TooManyRejects, UsageError
from ftdata.schemas import normalize

CHATS = {name: row for name, row in SHAPES.items() if name not in ("text", "tokens")}


def as_objects(messages):
    """Return the messages with the arguments of tool calls as objects."""
    found = json.loads(json.dumps(messages))
    for message in found:
        for call in message.get("tool_calls", ()):
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return found


@pytest.mark.parametrize("to", ["messages", "prompt_completion"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("shape", CHATS)
def test_converted_rows_are_the_same_conversations(tmp_path, shape, suffix, to):
    done = convert([CHATS[shape]] * 2, tmp_path / f"out{suffix}", to)
    assert (done.sources[0].read, done.sources[0].built, done.rejects) == (2, 2, ())
    given = normalize(next(read([CHATS[shape]])))
    for row in map(normalize, read(str(tmp_path / f"out{suffix}"))):
        assert row.schema == to
        assert as_objects(row.messages) == as_objects(given.messages)
        assert row.tools == given.tools
        if to == "prompt_completion":
            assert row.completion_from == given.completion_from


def test_jsonl_output_is_exact_and_readable(tmp_path):
    convert([{"question": "naïve \u2028?", "answer": "007"}], tmp_path / "o.jsonl")
    assert (tmp_path / "o.jsonl").read_text(encoding="utf-8") == (
        '{"messages":[{"role":"user","content":"naïve \u2028?"},{"role":"assistant","content":"007"}]}\n'
    )


def test_text_output_is_the_rendered_row(tmp_path, tokenizer_dir):
    convert([{"question": "q", "answer": "a"}], tmp_path / "o.jsonl", "text", tokenizer=tokenizer_dir("tiny_bpe"))
    (row,) = read(str(tmp_path / "o.jsonl"))
    assert row.data == {"text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"}
    for options in ({"to": "text"}, {"to": "messages", "tokenizer": tokenizer_dir("tiny_bpe")}, {"to": "masages"}):
        with pytest.raises(UsageError, match="to"):
            convert([{"question": "q", "answer": "a"}], tmp_path / "p.jsonl", **options)


def test_unconvertible_rows_are_counted_and_the_output_is_atomic(tmp_path):
    good, odd = (
        {"question": "q", "answer": "a"},
        {"messages": [{"role": "user", "content": "q", "mood": "x"}, {"role": "assistant", "content": "a"}]},
    )
    data = write(tmp_path, "d.jsonl", "".join(json.dumps(row) + "\n" for row in (good, odd, {"text": "t"})) + "{\n")
    (tmp_path / "o.parquet").write_text("older")
    replace = partial(convert, overwrite=True, on_bad_rows="quarantine")
    with pytest.raises(BadRows, match="3 rows are invalid"):
        convert(data, tmp_path / "o.parquet", overwrite=True)
    with pytest.raises(TooManyRejects):
        replace(data, tmp_path / "o.parquet", max_rejects=2)
    assert (tmp_path / "o.parquet").read_text() == "older"
    done = replace(data, tmp_path / "o.parquet", max_rejects=3)
    assert [one.code for one in done.rejects] == ["no_column", "no_messages", "json"]
    assert [one.source.line for one in done.rejects] == [2, 3, 4]
    assert "4 read = 1 written" in str(done)
    assert len(convert(data, tmp_path / "o.jsonl", on_bad_rows="quarantine", max_rejects=2).rejects) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "o.jsonl", "o.parquet", "o.rejects.jsonl"]
    assert replace(data, tmp_path / "o.jsonl", where="question == 'q'", max_rejects=1).sources[0].filtered == 2


def test_unwritable_output_is_refused(tmp_path):
    with pytest.raises(UsageError, match="expected the path of a .jsonl or .parquet"):
        convert([{"question": "q", "answer": "a"}], tmp_path / "o.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        convert([{"question": "q", "answer": "a"}], tmp_path / "file" / "o.jsonl")


def test_rows_that_would_be_read_back_differently_are_rejected(tmp_path, tokenizer_dir):
    typed = {"question": "say <|im_end|>", "answer": "a"}
    for row in (typed, {"input_ids": [5, 6], "labels": [5, 6]}):
        with pytest.raises(BadRows, match="control_tokens|no_messages"):
            convert([row], tmp_path / "o.jsonl", "text", tokenizer=tokenizer_dir("tiny_bpe"))
    with pytest.raises(BadRows, match="no_prompt"):
        convert([[{"role": "assistant", "content": "a"}]], tmp_path / "o.jsonl", "prompt_completion")
    odd = {"id": "1", "index": 3, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [odd]}]
    with pytest.raises(BadRows, match="tool_calls"):
        convert([{"messages": talk}], tmp_path / "o.parquet")


def test_source_file_is_not_overwritten(tmp_path):
    path = write(tmp_path, "d.jsonl", '{"question": "q", "answer": "a"}\n')
    with pytest.raises(UsageError, match="which is one of the sources"):
        convert(path, path)
    assert len(list(read(path))) == 1


def test_unserializable_rows_are_rejected(tmp_path):
    rows = [{"question": "\ud800", "answer": "a"}, {"question": "q", "answer": "a"}, {"x": 10**30, 3: None}]
    done = convert(rows, tmp_path / "o.jsonl", on_bad_rows="quarantine", max_rejects=2)
    assert (done.sources[0].built, len(done.rejects)) == (1, 2)


def test_output_file_does_not_mix_splits_or_repeat_rows(tmp_path):
    made = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"question": name, "answer": "a"}]) for name in ("train", "test")}
    )
    made.save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match="several splits: train, test"):
        convert(tmp_path / "saved", tmp_path / "o.jsonl")
    convert({"path": tmp_path / "saved", "split": "test"}, tmp_path / "o.jsonl")
    assert [row.data["messages"][0]["content"] for row in read(tmp_path / "o.jsonl")] == ["test"]
    with pytest.raises(UsageError, match="it writes each row once"):
        convert({"path": tmp_path / "o.jsonl", "weight": 2}, tmp_path / "p.jsonl")


def test_rejected_and_filtered_rows_are_counted_and_listed(tmp_path):
    rows = [{"question": str(n), "answer": "a" * (n % 3)} for n in range(9)]
    done = convert(rows, tmp_path / "o.jsonl", where="question != '4'", on_bad_rows="quarantine", max_rejects="40%")
    assert done.as_dict()["sources"] == [
        {"source": "<memory>", "read": 9, "written": 5, "filtered": 1, "rejected": {"empty_answer": 3}}
    ]
    listed = [json.loads(line) for line in (tmp_path / "o.rejects.jsonl").read_text().splitlines()]
    assert [(one["row"], one["code"]) for one in listed] == [
        (0, "empty_answer"),
        (3, "empty_answer"),
        (6, "empty_answer"),
    ]
    convert(rows[1:3], tmp_path / "o.jsonl", overwrite=True)
    assert not (tmp_path / "o.rejects.jsonl").exists()


def test_lost_completion_start_is_noted(tmp_path):
    talk = [
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "m"},
        {"role": "assistant", "content": "a2"},
    ]
    row = {"prompt": [{"role": "user", "content": "q"}], "completion": talk}
    assert "completions with several answers" in str(convert([row], tmp_path / "o.jsonl"))
    assert "completions" not in str(convert([row], tmp_path / "pairs.jsonl", "prompt_completion"))


def test_tool_calls_are_written_to_parquet(tmp_path):
    call = {"id": None, "function": {"name": "f"}}
    blocks = [{"type": "tool_result", "tool_use_id": "1", "content": "no", "is_error": True}]
    talk = [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "user", "content": blocks}, {"role": "assistant", "content": "a"},
    ]  # fmt: skip
    convert([{"messages": talk}], tmp_path / "o.parquet")
    (back,) = read(tmp_path / "o.parquet")
    assert back.data["messages"][1]["tool_calls"] == [{"function": {"name": "f", "arguments": "{}"}}]
    assert back.data["messages"][2]["is_error"] is True
    odd = [talk[0], {"role": "assistant", "content": "", "tool_calls": [{"type": 1, "function": {"name": "f"}}]}]
    with pytest.raises(BadRows, match="no_column"):
        convert([{"messages": odd}], tmp_path / "odd.parquet")


def test_sources_are_counted_separately_and_never_deleted(tmp_path):
    rows = [json.dumps({"question": str(n), "answer": "a"}) for n in range(5)]
    paths = [write(tmp_path, name, "\n".join(rows) + "\n") for name in ("p1.jsonl", "p2.jsonl")]
    done = convert(paths, tmp_path / "o.jsonl", where="question | int > 1")
    assert [(one.read, one.built, one.filtered) for one in done.sources] == [(5, 3, 2)] * 2
    mended = write(tmp_path, "chats.rejects.jsonl", rows[0] + "\n")
    with pytest.raises(UsageError, match="which is one of the sources"):
        convert(mended, tmp_path / "chats.jsonl")


def test_untrained_messages_are_rejected_for_text_output(tmp_path, tokenizer_dir):
    secret = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "SECRET", "train": False}]
    with pytest.raises(BadRows, match="untrained_message"):
        convert([{"messages": secret}], tmp_path / "o.jsonl", "text", tokenizer=tokenizer_dir("tiny_bpe"))


def test_existing_output_needs_overwrite(tmp_path):
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(UsageError, match=r"target_exists.*set overwrite=True"):
        convert([{"question": "q", "answer": "a"}], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "precious"
    seen = []
    assert (
        convert([{"question": "q", "answer": "a"}], tmp_path / "out.jsonl", overwrite=True, progress=seen.append)
        .sources[0]
        .built
        == 1
    )
    assert (seen[-1].phase, seen[-1].rows) == ("convert", 1)


def test_tool_results_get_the_standard_role(tmp_path):
    """Most templates ignore the role observation, so other tools would lose the result."""
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    result = [{"from": "observation", "value": "22 C"}, {"from": "gpt", "value": "22"}]
    rows = [{"conversations": [{"from": "human", "value": "w?"}, call, *result]}]
    report = convert(rows, tmp_path / "out.jsonl")
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert "observation as tool (1 row)" in str(report)


def test_conversations_that_become_several_texts_are_reported(tmp_path, tokenizer_dir):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "t"},
    ]
    target = tmp_path / "out.jsonl"
    report = convert([{"messages": turns * 2}], target, to="text", tokenizer=tokenizer_dir("qwen"))
    assert len(target.read_text().splitlines()) == 2
    assert "conversations written as several texts, because the template rewrites earlier turns: 1 row" in str(report)
