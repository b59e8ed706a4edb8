"""Sources: folders, standard input, URLs, data frames and data sets."""

import gzip
import io
import json
import sys

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reader_helpers import CELLS, LINES, ROWS, data_of, write

from ftdata import read
from ftdata.errors import InputRefused, MissingDependency, UsageError
from ftdata.readers.json_scan import COLUMNS
from ftdata.schemas import schemas


def test_data_frames_and_datasets_are_read(tmp_path):
    ds = datasets.Dataset.from_list(ROWS)
    both = datasets.DatasetDict(train=ds, test=ds.select([0]))
    frame = pd.DataFrame(CELLS)
    assert data_of(frame) == CELLS
    assert data_of(ds) == data_of(ds.to_iterable_dataset()) == ROWS
    assert data_of(both) == [*ROWS, ROWS[0]]
    ds.save_to_disk(str(tmp_path / "one"))
    both.save_to_disk(str(tmp_path / "both"))
    assert data_of(str(tmp_path / "one")) == ROWS
    assert data_of(str(tmp_path / "both")) == [*ROWS, ROWS[0]]
    assert data_of({"path": str(tmp_path / "both"), "split": "test"}) == ROWS[:1]


def test_folder_is_read_with_all_of_its_files(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, "b.jsonl", '{"text": "b"}\n')
    write(tmp_path / "deep", "a.csv", "text\na\n")
    write(tmp_path, "README.md", "about")
    write(tmp_path, ".hidden", "x")
    assert data_of(tmp_path) == [{"text": "b"}, {"text": "a"}]
    write(tmp_path, "notes.txt", "x")
    with pytest.raises(InputRefused, match=r"notes\.txt"):
        data_of(tmp_path)


def test_standard_input_is_read(monkeypatch):
    for text in (LINES, json.dumps(ROWS).encode(), gzip.compress(LINES)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert data_of("-") == ROWS


def test_fsspec_urls_are_read(tmp_path):
    path = write(tmp_path, "d.jsonl", LINES)
    assert data_of(f"file://{path}") == ROWS
    with pytest.raises(UsageError, match="does not exist"):
        data_of(f"file://{path}x.jsonl")
    with pytest.raises(UsageError, match="unknown_protocol"):
        data_of("gopher://x/d.jsonl")


def test_missing_fsspec_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(MissingDependency, match=r"ftdata\[s3\]"):
        data_of("s3://bucket/d.jsonl")


def test_recursive_patterns_match_each_file_once(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "sub", "b.jsonl", '{"text": "b"}\n')
    assert sorted(row["text"] for row in data_of(f"{tmp_path}/**")) == ["a", "b"]


def test_repeated_column_names_are_refused(tmp_path):
    pq.write_table(pa.table([["q"], ["x"], ["y"]], names=["q", "a", "a"]), tmp_path / "d.parquet")
    pd.DataFrame([["q", "a", "a"], ["1", "2", "3"]]).to_excel(tmp_path / "d.xlsx", index=False, header=False)
    for name in ("d.parquet", "d.xlsx"):
        with pytest.raises(InputRefused, match="repeated_column"):
            data_of(str(tmp_path / name))


def test_columns_of_every_schema_are_recognized_as_a_row():
    """The detection of single rows must know a column of every schema."""
    for name, schema in schemas.registered().items():
        assert name == "chat_log" or set(schema.columns) & COLUMNS


def test_in_memory_objects_are_read_unchanged(tmp_path):
    def used_again():
        row = {}
        for number in range(3):
            row.update(question=str(number), answer="a")
            yield row

    assert [row.data["question"] for row in list(read(used_again()))] == ["0", "1", "2"]
    made = datasets.Dataset.from_list([{"question": "q", "answer": "a"}])
    loud = made.with_transform(
        lambda batch: {"question": [one.upper() for one in batch["question"]], "answer": batch["answer"]}
    )
    assert data_of(loud) == [{"question": "Q", "answer": "a"}]
    as_table = made.to_iterable_dataset().with_format("arrow")
    assert (
        data_of(as_table)
        == data_of([made])
        == data_of({"path": made, "weight": 2})
        == [{"question": "q", "answer": "a"}]
    )
    assert data_of([made, pd.DataFrame([{"question": "r"}])]) == [{"question": "q", "answer": "a"}, {"question": "r"}]
    ids = {"input_ids": np.arange(3), "labels": (1, 2)}
    assert data_of([ids]) == [{"input_ids": [0, 1, 2], "labels": [1, 2]}]
    maps = pa.table({"kwargs": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))})
    assert data_of(maps) == [{"kwargs": {"a": 1}}]
    with pytest.raises(InputRefused, match="repeated_column"):
        data_of(pd.DataFrame([["a", "b"]], columns=[1, "1"]))
