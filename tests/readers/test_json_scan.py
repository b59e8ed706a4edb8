"""The JSON scanner: finds rows at any chunk boundary and assigns each fault to its row."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import often
from reader_helpers import ROWS, TALK, anything, data_of, outcomes, questions, write

from ftdata import read
from ftdata.errors import InputRefused
from ftdata.readers.json_scan import scan_json
from ftdata.types import Reject


def test_rows_under_a_key_are_read(tmp_path):
    about = {"version": "1", "tags": {"a": 1}}
    for indent in (None, 2):
        path = write(tmp_path, "d.json", json.dumps({**about, "data": ROWS, "more": 3}, indent=indent))
        assert data_of(path) == ROWS
    assert [row.source.line for row in read(path)] == [7, 19]
    with pytest.raises(InputRefused, match="train, test"):
        data_of(write(tmp_path, "e.json", json.dumps({"train": ROWS, "test": ROWS})))
    for one in ({"messages": TALK}, {"tools": [{"type": "f"}], "messages": TALK}):
        assert data_of(write(tmp_path, "f.json", json.dumps(one))) == [one]
        assert data_of(write(tmp_path, "g.json", json.dumps(one, indent=1) * 2)) == [one] * 2


def test_lines_of_message_lists_in_a_json_file_are_read(tmp_path):
    assert data_of(write(tmp_path, "d.json", f"{json.dumps(TALK)}\n{json.dumps(TALK)}\n")) == [TALK, TALK]


@pytest.mark.parametrize("text", ['[{"text": "a"},, {"text": "b"}]', '[{"text": "a"}, {"text": "b"},]'])
def test_extra_commas_are_rejected(tmp_path, text):
    found = outcomes(write(tmp_path, "d.json", text))
    assert [one.data["text"] for one in found if not isinstance(one, Reject)] == ["a", "b"]
    assert [one.code for one in found if isinstance(one, Reject)] == ["not_a_row"]


@pytest.mark.slow
@often(200)
@given(
    rows=anything,
    sizes=st.lists(st.integers(1, 40), min_size=1),
    indent=st.sampled_from([None, 1]),
    nested=st.booleans(),
    concatenated=st.booleans(),
)
def test_scan_does_not_depend_on_chunk_boundaries(rows, sizes, indent, nested, concatenated):
    each = [json.dumps(row, indent=indent, ensure_ascii=False) for row in rows]
    text = (",\n".join(each) if nested or not concatenated else "\n".join(each)).encode()
    head, tail = (
        (b'{"a": [[1], "]"], "rows": [', b'], "z": [1, "]", [2]]}')
        if nested
        else (b"", b"")
        if concatenated
        else (b"[", b"]")
    )
    whole, parts, at = head + text + tail, [], len(head)
    parts = [head] if head else []
    while at < len(whole):
        parts.append(whole[at : at + sizes[len(parts) % len(sizes)]])
        at += len(parts[-1])
    *found, last = scan_json(parts, "x", 10_000, "rows" if nested else None)
    assert [json.loads(piece.text) for piece in found] == rows
    assert last.size == 0
    for piece in found:
        assert whole[piece.offset :].startswith(piece.text)
        assert piece.line == 1 + whole[: piece.offset].count(b"\n")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('{"a": 1, "a": 2}', "duplicate_key"),
        ('{"m": [{"role": "user", "role" : "x"}]}', "duplicate_key"),
        ('{"a": NaN, "a": 2}', "duplicate_key"),
        ('{"a": "\\u0022:", "b": 1, "b": 1}', "duplicate_key"),
        ('{"a": "\\":", "b": "x\\" :"}', None),
        ('{"a": "\\u0022:"}', None),
        ('{"a":\t1, "b"\t: [{"a": 1}]}', None),
        ("[" * 200 + "]" * 200, "too_deep"),
        ('{"a": "' + "[" * 200 + '"}', None),
        ('{"a": "\\udc00"}', "lone_surrogate"),
        ('{"a": "\\ud83d\\ude00"}', None),
        ('"{\\"a\\": 1}"', "not_a_row"),
    ],
)  # fmt: skip
def test_json_rows_are_read_exactly_or_rejected(tmp_path, line, code):
    (found,) = outcomes(write(tmp_path, "d.jsonl", line + "\n"))
    assert getattr(found, "code", None) == code
    if code is None:
        assert found.data == json.loads(line)


def test_invalid_csv_row_is_not_split_into_rows(tmp_path):
    found = outcomes(write(tmp_path, "d.csv", 'q,a\n"He said "hi"\nto me,ok"\nx,y\n'))
    assert [getattr(one, "code", "row") for one in found] == ["csv", "row"]
    (lone,) = outcomes(write(tmp_path, "e.csv", "q,a\n" + '"x,y\n' + "x,y\n" * 9))
    assert "the row has 10 lines" in lone.reason


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"question": "2+2?", "answer": "4", "choices": [{"text": "3"}, {"text": "4"}]}, None),
        ({"version": 1, "tags": ["a"], "about": {"x": [{"y": 1}]}, "data": [{"q": 1}, {"q": 2}]}, [{"q": 1}, {"q": 2}]),
        ({"messages": [{"id": 1, "role": "user", "content": "q"}], "tools": [{"name": "f"}]}, None),
        ({"data": [{"content": "c", "question": "q"}]}, [{"content": "c", "question": "q"}]),
        ({"train": [{"q": 1}], "test": []}, [{"q": 1}]),
        ([{"text": ["a", "b"]}], [{"text": ["a", "b"]}]),
        ({"input_ids": [1, 2], "labels": [1, 2]}, None),
    ],
)
def test_single_row_and_container_of_rows_are_distinguished(tmp_path, data, expected):
    for indent in (None, 1):
        assert data_of(write(tmp_path, "d.json", json.dumps(data, indent=indent))) == (expected or [data])


def test_lists_beyond_the_first_megabyte_are_found(tmp_path):
    big = {"train": [{"question": "q" + "x" * 1000, "answer": "a"}] * 1500, "test": [{"question": "q", "answer": "a"}]}
    with pytest.raises(InputRefused, match="train, test"):
        data_of(write(tmp_path, "d.json", json.dumps(big)))
    long = {"documents": [{"text": "x" * 1_100_000}], "question": "q", "answer": "a"}
    assert data_of(write(tmp_path, "e.json", f"{json.dumps(long)}\n" * 2)) == [long] * 2


def test_long_texts_are_scanned_once(tmp_path):
    rows = [{"text": "word [x] " * 100_000}, {"text": "y"}]
    assert data_of(write(tmp_path, "d.json", json.dumps(rows))) == rows
    nested = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 3000
    assert data_of(write(tmp_path, "e.json", json.dumps(nested))) == nested


def test_quote_inside_an_unquoted_cell_is_text(tmp_path):
    assert data_of(write(tmp_path, "d.csv", 'q,a\n12" ruler,x\n')) == [{"q": '12" ruler', "a": "x"}]


def test_values_outside_the_range_of_python_are_rejected(tmp_path):
    far = pa.array([0, 10**15], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": ["a", "b"], "when": far}), tmp_path / "d.parquet")
    good, bad = outcomes(str(tmp_path / "d.parquet"))
    assert (good.data["text"], bad.code) == ("a", "value_range")


def test_large_integers_are_kept_and_duplicate_keys_rejected(tmp_path):
    (row,) = outcomes(write(tmp_path, "d.jsonl", '{"id": 123456789012345678901}\n'))
    assert row.data == {"id": 123456789012345678901}
    (bad,) = outcomes(write(tmp_path, "e.jsonl", '{"answer": "first", "answer"\t:"second"}\n'))
    assert bad.code == "duplicate_key"


def test_minor_faults_do_not_reject_the_file(tmp_path):
    broken, good = outcomes(write(tmp_path, "d.json", '{"text": "a"\n{"text": "b"}\n'))
    assert (broken.code, good.data) == ("json", {"text": "b"})
    assert data_of(write(tmp_path, "what?.csv", "q,a,,\nx,y,,\n")) == [{"q": "x", "a": "y"}]
    (bad,) = outcomes(write(tmp_path, "e.csv", "q,a,,\nx,y,,z\n"))
    assert bad.code == "ragged_row"


def row_of(size, number=0):
    return json.dumps({"question": f"q{number}" + "x" * size, "answer": "a"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # A row that holds a list of objects is a row, however long it is.
        ("\n".join(json.dumps({"documents": [{"title": "t", "text": "d" * 1500}] * 900, "question": f"q{n}", "answer": "a"}) for n in range(2)), ["q0", "q1"]),
        ('{"data": [' + ", ".join(row_of(600_000, n) for n in range(3)) + "]}", ["q0", "q1", "q2"]),
        ('{"messages": [{"id": 1, "question": "q0", "answer": "a"}]}', ["q0"]),
    ],
    ids=["long-rows", "long-rows-under-a-key", "a-key-that-rows-have"],
)  # fmt: skip
def test_row_detection_considers_the_whole_text(tmp_path, text, expected):
    assert questions(write(tmp_path, "d.json", text)) == expected


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"train": [{"a": 1}], "note": "x", "test": [{"a": 1}]}', "several_lists"),
        ('{"train": [{"a": 1}], "train": [{"a": 1}]}', "several_lists"),
        ('{"v": 1, "train": [{"a": 1}]} {"a": "LOST"}', "not_rows"),
        ('{"train": [{"a": 1}], "v": 1} LOST', "not_rows"),
    ],
)
def test_data_next_to_the_rows_is_found_at_any_chunk_boundary(text, code):
    data = text.encode()
    for at in range(len(data)):
        with pytest.raises(InputRefused) as refused:
            list(scan_json([data[:at], data[at:]], "d.json", 1 << 20, "train"))
        assert refused.value.code == code


def test_array_with_one_element_per_line_is_not_json_lines(tmp_path):
    chat = json.dumps(TALK)
    for text in (f"[\n{chat}\n]", f"[\n{chat}\n,\n{chat}\n]"):
        assert data_of(write(tmp_path, "d.json", text)) == [TALK] * text.count("007")


def test_each_invalid_line_is_one_reject(tmp_path):
    lines = ['{"question": "q, "answer": "a"}'] * 2 + [row_of(0)] * 2
    found = outcomes(write(tmp_path, "d.json", "\n".join(lines) + "\n"))
    assert [getattr(one, "code", "row") for one in found] == ["json", "json", "row", "row"]


def test_json_errors_report_their_position(tmp_path):
    (_, bad) = outcomes(write(tmp_path, "b.json", '[{"question": "a"}, {"question": x}]'))
    assert "byte 33" in bad.reason
    with pytest.raises(InputRefused, match=r"c.json:4: the file ends inside the list"):
        outcomes(write(tmp_path, "c.json", f"[\n{row_of(1)},\n{row_of(1)}\n"))


@pytest.mark.slow
def test_many_invalid_rows_and_many_keys_take_linear_time(tmp_path):
    found = outcomes(write(tmp_path, "d.json", "[" + "1,\n" * 100_000 + row_of(1) + "]"))
    assert len(found) == 100_001
    assert [one.source.line for one in found[:3]] == [1, 2, 3]
    wide = "{" + ",".join(f'"k{n}":1' for n in range(100_000)) + ',"k99999":2}'
    (twice,) = outcomes(write(tmp_path, "d.jsonl", wide + "\n"))
    assert "the duplicate key 'k99999'" in twice.reason


@pytest.mark.parametrize(
    "text",
    [
        "[{q},{q},]",
        "[{q} {q}]",
        "[{q},{q}}",
        "[{q},{q}]]",
        '{"data":[{q},{q},]}',
        '{"data":[{q} {q}]}',
        '{"data":[{q},{q}}]',
    ],
)
def test_invalid_json_is_not_accepted(tmp_path, text):
    path = write(tmp_path, "d.json", text.replace("{q}", row_of(1)))
    try:
        found = outcomes(path)
    except InputRefused:
        return
    assert any(isinstance(one, Reject) for one in found)


def test_column_oriented_json_with_objects_is_read(tmp_path):
    columns = {"question": ["a", "b"], "answer": ["c", "d"], "meta": [{"x": 1}, {"x": 2}]}
    assert [row["meta"]["x"] for row in data_of(write(tmp_path, "d.json", json.dumps(columns)))] == [1, 2]
    row = {"messages": TALK, "tools": [{"a": 1}, {"b": 2}]}
    assert data_of(write(tmp_path, "e.json", json.dumps(row))) == [row]
    with pytest.raises(InputRefused, match="also a list of rows"):
        data_of(write(tmp_path, "f.json", '{"text": "About", "data": [' + row_of(1) + "]}"))
