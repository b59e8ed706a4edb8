"""Parquet and Arrow: values are read exactly, and damaged files are refused."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reader_helpers import ROWS, data_of, outcomes, questions, write

from ftdata.errors import InputRefused


def test_parquet_and_arrow_files_are_read(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "d.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("d.parquet", "file.arrow", "stream.arrow"):
        assert data_of(str(tmp_path / name)) == ROWS
        whole = (tmp_path / name).read_bytes()
        path = write(tmp_path, f"cut-{name}", whole[: len(whole) // 2])
        with pytest.raises(InputRefused, match="damaged_file|partial_file"):
            data_of(path)


def test_invalid_utf8_in_parquet_rejects_only_its_row(tmp_path):
    raw = pa.array([b"good", b"\xff\xfe"]).cast(pa.binary())
    broken = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": broken}), tmp_path / "d.parquet")
    good, bad = outcomes(str(tmp_path / "d.parquet"))
    assert good.data == {"text": "good"}
    assert (bad.code, bad.source.row) == ("encoding", 1)


def stream_of(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        for batch in table.to_batches(1000):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def test_damaged_arrow_streams_are_refused(tmp_path):
    table = pa.Table.from_pylist([{"question": f"q{n}", "answer": "a"} for n in range(3000)])
    whole = stream_of(table)
    assert len(questions(write(tmp_path, "d.arrow", whole))) == 3000
    with pytest.raises(InputRefused, match="truncated"):
        questions(write(tmp_path, "cut.arrow", whole[:-8]))
    with pytest.raises(InputRefused, match="repeated_column"):
        questions(write(tmp_path, "twice.arrow", stream_of(table.append_column("question", table["answer"]))))
    offsets = whole.index(np.arange(0, 12, 2, dtype=np.int32).tobytes())
    damaged = whole[: offsets + 4] + b"\xff\xff\xff\x7f" + whole[offsets + 8 :]
    with pytest.raises(InputRefused, match="damaged_file"):
        questions(write(tmp_path, "damaged.arrow", damaged))


def test_json_columns_in_arrow_are_parsed(tmp_path):
    """`datasets` stores objects that differ between rows as JSON text and marks the column in the schema."""
    talks = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}], "tools": [{"a": None}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x", "train": True}], "tools": [{"b": {"c": 1}}]},
    ]  # fmt: skip
    path = write(tmp_path, "d.jsonl", "".join(json.dumps(talk) + "\n" for talk in talks))
    made = datasets.load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    made.to_parquet(tmp_path / "d.parquet")
    made.save_to_disk(tmp_path / "saved")
    for data in (
        made,
        made.with_format("numpy"),
        str(tmp_path / "d.parquet"),
        str(tmp_path / "saved"),
        made.data.table,
    ):
        assert data_of(data) == talks


def test_foreign_metadata_is_ignored(tmp_path):
    table = pa.table({"question": ["q"], "answer": ["a"], "when": pa.array([1], pa.date64())})
    for note in (b'{"info":null}', b"null", b"[]", b"not json", b"\xff"):
        pq.write_table(table.replace_schema_metadata({b"huggingface": note}), tmp_path / "d.parquet")
        assert data_of(tmp_path / "d.parquet")[0]["question"] == "q"
    assert questions(write(tmp_path, "d.arrow", stream_of(table))) == ["q"]
    assert data_of(table.to_batches()[0])[0]["question"] == data_of(table.to_reader())[0]["question"] == "q"


def test_nulls_in_json_columns_are_kept():
    features = datasets.Features(
        {"messages": datasets.List({"role": datasets.Value("string"), "calls": datasets.Json()})}
    )
    made = datasets.Dataset.from_list(
        [{"messages": [{"role": "user", "calls": {"a": None, "b": 1}}]}], features=features
    )
    assert (
        data_of(made)
        == data_of(made.to_iterable_dataset())
        == [{"messages": [{"role": "user", "calls": {"a": None, "b": 1}}]}]
    )


@pytest.mark.parametrize("name", ["d.parquet", "file.arrow", "stream.arrow"])
def test_table_truncated_at_any_byte_is_refused(tmp_path, name):
    """The bytes at the expected position of the metadata length may be any number."""
    table = pa.Table.from_pylist(ROWS)
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_file if name.startswith("file") else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    whole = path.read_bytes()
    for size in range(12, len(whole) - 8, 37):
        path.write_bytes(whole[:size])
        with pytest.raises(InputRefused, match="damaged_file|partial_file"):
            data_of(path)


def test_parquet_with_long_values_is_read(tmp_path):
    """Columns with a dictionary and long values are read in small batches."""
    values = [f"{number} " + "long " * 400 for number in range(2000)]
    nested = [[{"role": "user", "content": value}] for value in values]
    pq.write_table(pa.table({"question": values, "answer": values[::-1]}), tmp_path / "flat.parquet")
    pq.write_table(pa.table({"messages": nested}), tmp_path / "nested.parquet")
    assert [row["answer"] for row in data_of(str(tmp_path / "flat.parquet"))] == values[::-1]
    assert [row["messages"] for row in data_of(str(tmp_path / "nested.parquet"))] == nested
