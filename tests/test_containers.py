"""Every container that rows come in: they come out as written, in bounded memory, or the file is refused by name."""

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import sys
import tracemalloc

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import often
from test_readers import outcomes, rows, write

from ftdata import read
from ftdata.errors import InputRefused, MissingDependency, UsageError
from ftdata.readers import sources
from ftdata.readers.scan import COLUMNS, pieces
from ftdata.schemas import schemas
from ftdata.types import Reject

TALK = [{"role": "user", "content": "q, “x”\n\r\n\u2028"}, {"role": "assistant", "content": "007"}]
ROWS = [{"messages": TALK}, {"messages": TALK[::-1]}]
CELLS = [{"question": "007", "answer": "NA"}, {"question": "2024-01-01", "answer": 'a "b", c\nd'}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


def data_of(place):
    return [row.data for row in read(place)]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_packed_files(tmp_path, packing, name):
    path = write(tmp_path, f"{name}.{packing}", PACKERS[packing](LINES))
    assert data_of(path) == ROWS
    misnamed = write(tmp_path, f"plain-{packing}.jsonl", PACKERS[packing](LINES))
    assert data_of(misnamed) == ROWS


@pytest.mark.parametrize("packing", PACKERS)
def test_a_packed_file_that_is_cut_or_damaged_is_refused(tmp_path, packing):
    packed = PACKERS[packing](LINES * 500)
    for name, data in {"cut": packed[: len(packed) // 2], "bad": packed[:40] + b"\xff\x00" * 9 + packed[58:]}.items():
        with pytest.raises(InputRefused, match=f"{name}.jsonl.{packing}: the {packing} file is"):
            data_of(write(tmp_path, f"{name}.jsonl.{packing}", data))


def test_a_packed_file_that_grows_without_bounds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ftdata.readers.streams.FREE", 1 << 20)
    path = write(tmp_path, "bomb.jsonl.gz", gzip.compress(b" " * (8 << 20)))
    with pytest.raises(InputRefused, match="expansion"):
        data_of(path)


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]
)
def test_encodings_are_seen(tmp_path, encoding):
    text = LINES.decode()
    assert data_of(write(tmp_path, "d.jsonl", text.encode(encoding))) == ROWS
    assert data_of(write(tmp_path, "d.json", json.dumps(ROWS, indent=1).encode(encoding))) == ROWS


def test_an_encoding_can_be_named(tmp_path):
    path = write(tmp_path, "d.jsonl", '{"text": "café ’"}\n{"text": "b"}\n'.encode("cp1252"))
    assert data_of({"path": path, "encoding": "cp1252"}) == [{"text": "café ’"}, {"text": "b"}]
    bad, _ = outcomes(path)
    assert (bad.code, bad.source.line) == ("encoding", 1)
    assert "encoding='cp1252'" in bad.fix
    with pytest.raises(UsageError, match="no encoding is called"):
        data_of({"path": path, "encoding": "cp12525"})
    with pytest.raises(UsageError, match="did you mean 'encoding'"):
        data_of({"path": path, "encodign": "cp1252"})


def test_half_characters_in_utf16_are_rejected_with_their_line(tmp_path):
    text = '{"text": "a"}\n{"text": "X"}\n'.encode("utf-16-le").replace("X".encode("utf-16-le"), b"\x00\xd8")
    good, bad = outcomes(write(tmp_path, "d.jsonl", b"\xff\xfe" + text))
    assert (good.data, bad.code, bad.source.line) == ({"text": "a"}, "encoding", 2)


def test_csv_and_tsv_are_text(tmp_path):
    for name, delimiter in {"d.csv": ",", "e.csv": ";", "d.tsv": "\t"}.items():
        out = io.StringIO()
        writer = csv.DictWriter(out, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(CELLS)
        path = write(tmp_path, name, "\ufeff" + out.getvalue())
        assert data_of(path) == CELLS
        assert [row.source.line for row in read(path)] == [2, 3]
        assert data_of(write(tmp_path, name + ".gz", gzip.compress(out.getvalue().encode()))) == CELLS


def test_faults_of_csv_are_rejected_where_they_are(tmp_path):
    text = b'q,a\n1,2\n1,2,3\n\nx"y,"a "b" c"\n\xff,1\n"multi\nline",ok\nlast,"cut'
    found = outcomes(write(tmp_path, "d.csv", text))
    assert [(getattr(one, "code", "row"), one.source.line) for one in found] == [
        ("row", 2), ("ragged_row", 3), ("csv", 5), ("encoding", 6), ("row", 7), ("csv", 9)
    ]  # fmt: skip
    for one in found:
        assert text[one.source.offset :].startswith(text.split(b"\n")[one.source.line - 1])


@pytest.mark.parametrize(("text", "code"), [("", "no_rows"), ("a,b\n", "no_rows"), ("a,a\n1,2\n", "repeated_column")])
def test_csv_without_rows_or_names_is_refused(tmp_path, text, code):
    with pytest.raises(InputRefused) as caught:
        data_of(write(tmp_path, "d.csv", text))
    assert caught.value.code == code


@often(100)
@given(
    st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=2, max_size=2),
        min_size=1,
        max_size=5,
    )
)
def test_any_csv_that_python_writes_comes_back(tmp_path_factory, cells):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([["p", "c"], *cells])
    path = write(tmp_path_factory.mktemp("csv"), "d.csv", out.getvalue())
    assert [list(row.values()) for row in data_of(path)] == cells


def test_parquet_and_arrow(tmp_path):
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


def test_text_in_parquet_that_is_not_utf8_is_rejected_row_by_row(tmp_path):
    raw = pa.array([b"good", b"\xff\xfe"]).cast(pa.binary())
    broken = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": broken}), tmp_path / "d.parquet")
    good, bad = outcomes(str(tmp_path / "d.parquet"))
    assert good.data == {"text": "good"}
    assert (bad.code, bad.source.row) == ("encoding", 1)


def test_excel_is_text_sheet_by_sheet(tmp_path):
    with pd.ExcelWriter(tmp_path / "d.xlsx") as out:
        pd.DataFrame([{"question": "007", "answer": "NA"}, {"question": 7, "answer": None}]).to_excel(
            out, sheet_name="one", index=False
        )
        pd.DataFrame([{"text": "t"}]).to_excel(out, sheet_name="two", index=False)
    found = list(read(str(tmp_path / "d.xlsx")))
    assert [row.data for row in found] == [{"question": "007", "answer": "NA"}, {"question": "7"}, {"text": "t"}]
    assert [str(row.source).rpartition("/")[2] for row in found] == ["d.xlsx#one:2", "d.xlsx#one:3", "d.xlsx#two:2"]


def test_data_frames_and_data_sets(tmp_path):
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


def test_folders_are_all_their_files(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, "b.jsonl", '{"text": "b"}\n')
    write(tmp_path / "deep", "a.csv", "text\na\n")
    write(tmp_path, "README.md", "about")
    write(tmp_path, ".hidden", "x")
    assert data_of(tmp_path) == [{"text": "b"}, {"text": "a"}]
    write(tmp_path, "notes.txt", "x")
    with pytest.raises(InputRefused, match=r"notes\.txt"):
        data_of(tmp_path)


def test_standard_input(monkeypatch):
    for text in (LINES, json.dumps(ROWS).encode(), gzip.compress(LINES)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert data_of("-") == ROWS


def test_places_that_fsspec_knows(tmp_path):
    path = write(tmp_path, "d.jsonl", LINES)
    assert data_of(f"file://{path}") == ROWS
    with pytest.raises(UsageError, match="is not there"):
        data_of(f"file://{path}x.jsonl")
    with pytest.raises(UsageError, match="unknown_protocol"):
        data_of("gopher://x/d.jsonl")


def test_a_place_without_its_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(MissingDependency, match=r"ftdata\[s3\]"):
        data_of("s3://bucket/d.jsonl")


def test_rows_under_a_key(tmp_path):
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


def test_lines_of_bare_lists_under_a_json_name(tmp_path):
    assert data_of(write(tmp_path, "d.json", f"{json.dumps(TALK)}\n{json.dumps(TALK)}\n")) == [TALK, TALK]


@pytest.mark.parametrize("text", ['[{"text": "a"},, {"text": "b"}]', '[{"text": "a"}, {"text": "b"},]'])
def test_commas_too_many_are_rejected(tmp_path, text):
    found = outcomes(write(tmp_path, "d.json", text))
    assert [one.data["text"] for one in found if not isinstance(one, Reject)] == ["a", "b"]
    assert [one.code for one in found if isinstance(one, Reject)] == ["not_a_row"]


@often(200)
@given(
    rows=rows,
    sizes=st.lists(st.integers(1, 40), min_size=1),
    indent=st.sampled_from([None, 1]),
    nested=st.booleans(),
    concatenated=st.booleans(),
)
def test_the_scan_finds_rows_wherever_the_text_is_parted(rows, sizes, indent, nested, concatenated):
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
    *found, last = pieces(parts, "x", 10_000, "rows" if nested else None)
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
def test_rows_are_read_exactly_or_not_at_all(tmp_path, line, code):
    (found,) = outcomes(write(tmp_path, "d.jsonl", line + "\n"))
    assert getattr(found, "code", None) == code
    if code is None:
        assert found.data == json.loads(line)


def test_rows_after_a_broken_one_are_not_made_up(tmp_path):
    found = outcomes(write(tmp_path, "d.csv", 'q,a\n"He said "hi"\nto me,ok"\nx,y\n'))
    assert [getattr(one, "code", "row") for one in found] == ["csv", "row"]
    (lone,) = outcomes(write(tmp_path, "e.csv", "q,a\n" + '"x,y\n' + "x,y\n" * 20))
    assert "with 20 lines after it" in lone.reason


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
def test_a_row_is_told_from_what_holds_rows(tmp_path, data, expected):
    for indent in (None, 1):
        assert data_of(write(tmp_path, "d.json", json.dumps(data, indent=indent))) == (expected or [data])


def test_no_list_beyond_the_first_megabyte_is_lost(tmp_path):
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


def test_damage_after_a_packed_stream_is_damage(tmp_path):
    for packing in ("bz2", "xz"):
        twice = PACKERS[packing](LINES) * 2
        assert data_of(write(tmp_path, f"d.jsonl.{packing}", twice)) == ROWS * 2
        with pytest.raises(InputRefused, match="damaged_file|partial_file"):
            data_of(write(tmp_path, f"e.jsonl.{packing}", PACKERS[packing](LINES) + b"XX" + twice))


def test_patterns_that_go_deep_name_each_file_once(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "sub", "b.jsonl", '{"text": "b"}\n')
    assert sorted(row["text"] for row in data_of(f"{tmp_path}/**")) == ["a", "b"]


def test_a_quote_inside_a_plain_cell_is_a_quote(tmp_path):
    assert data_of(write(tmp_path, "d.csv", 'q,a\n12" ruler,x\n')) == [{"q": '12" ruler', "a": "x"}]


def test_values_that_python_does_not_have_are_rejected(tmp_path):
    far = pa.array([0, 10**15], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": ["a", "b"], "when": far}), tmp_path / "d.parquet")
    good, bad = outcomes(str(tmp_path / "d.parquet"))
    assert (good.data["text"], bad.code) == ("a", "value_range")


def test_names_that_stand_twice_are_refused(tmp_path):
    pq.write_table(pa.table([["q"], ["x"], ["y"]], names=["q", "a", "a"]), tmp_path / "d.parquet")
    pd.DataFrame([["q", "a", "a"], ["1", "2", "3"]]).to_excel(tmp_path / "d.xlsx", index=False, header=False)
    for name in ("d.parquet", "d.xlsx"):
        with pytest.raises(InputRefused, match="repeated_column"):
            data_of(str(tmp_path / name))


def test_numbers_and_keys_of_any_kind_stay(tmp_path):
    (row,) = outcomes(write(tmp_path, "d.jsonl", '{"id": 123456789012345678901}\n'))
    assert row.data == {"id": 123456789012345678901}
    (bad,) = outcomes(write(tmp_path, "e.jsonl", '{"answer": "first", "answer"\t:"second"}\n'))
    assert bad.code == "duplicate_key"


def test_small_faults_of_files_do_not_cost_them(tmp_path):
    broken, good = outcomes(write(tmp_path, "d.json", '{"text": "a"\n{"text": "b"}\n'))
    assert (broken.code, good.data) == ("json", {"text": "b"})
    assert data_of(write(tmp_path, "what?.csv", "q,a,,\nx,y,,\n")) == [{"q": "x", "a": "y"}]
    (bad,) = outcomes(write(tmp_path, "e.csv", "q,a,,\nx,y,,z\n"))
    assert bad.code == "ragged_row"


def test_every_shape_is_known_as_a_row():
    """What tells a row from what holds rows must know the columns of every schema."""
    for name, schema in schemas.own().items():
        assert name == "chat_log" or set(schema.columns) & COLUMNS


def row_of(size, number=0):
    return json.dumps({"question": f"q{number}" + "x" * size, "answer": "a"})


def questions(path):
    return [row.data["question"].rstrip("x") for row in read(path)]


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
def test_what_is_a_row_is_told_by_all_of_it(tmp_path, text, expected):
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
def test_what_stands_beside_the_rows_is_found_however_the_text_is_parted(text, code):
    data = text.encode()
    for at in range(len(data)):
        with pytest.raises(InputRefused) as refused:
            list(pieces([data[:at], data[at:]], "d.json", 1 << 20, "train"))
        assert refused.value.code == code


def test_arrays_whose_lines_are_whole_are_no_json_lines(tmp_path):
    chat = json.dumps(TALK)
    for text in (f"[\n{chat}\n]", f"[\n{chat}\n,\n{chat}\n]"):
        assert data_of(write(tmp_path, "d.json", text)) == [TALK] * text.count("007")


def test_each_broken_line_is_rejected_alone(tmp_path):
    lines = ['{"question": "q, "answer": "a"}'] * 2 + [row_of(0)] * 2
    found = outcomes(write(tmp_path, "d.json", "\n".join(lines) + "\n"))
    assert [getattr(one, "code", "row") for one in found] == ["json", "json", "row", "row"]


def test_places_of_faults_in_json(tmp_path):
    (_, bad) = outcomes(write(tmp_path, "b.json", '[{"question": "a"}, {"question": x}]'))
    assert "byte 33" in bad.reason
    with pytest.raises(InputRefused, match=r"c.json:4: the JSON ends before the list"):
        outcomes(write(tmp_path, "c.json", f"[\n{row_of(1)},\n{row_of(1)}\n"))


@pytest.mark.parametrize("packing", ["bz2", "xz"])
def test_bombs_are_stopped_while_they_unpack(tmp_path, packing, monkeypatch):
    from ftdata.readers import streams

    monkeypatch.setattr(streams, "FREE", 1 << 22)
    bomb = PACKERS[packing](LINES + b" " * (1 << 28))
    tracemalloc.start()
    with pytest.raises(InputRefused, match="expansion"):
        data_of(write(tmp_path, f"d.jsonl.{packing}", bomb))
    assert tracemalloc.get_traced_memory()[1] < 1 << 25
    tracemalloc.stop()


def test_padding_and_frames_to_skip_belong_to_packed_files(tmp_path):
    assert data_of(write(tmp_path, "d.jsonl.xz", lzma.compress(LINES) + b"\0" * 8 + lzma.compress(LINES))) == ROWS * 2
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    assert data_of(write(tmp_path, "d.jsonl.zst", skipped + zstd(LINES))) == ROWS
    assert data_of(write(tmp_path, "d.jsonl", b"\xef\xbb\xbf" + LINES + b"\xef\xbb\xbf" + LINES)) == ROWS * 2
    with pytest.raises(InputRefused, match=r"packed_table.*unpack it first"):
        data_of(write(tmp_path, "d.parquet.gz", gzip.compress(b"PAR1")))


def test_many_strays_and_many_keys_take_no_longer_than_few(tmp_path):
    found = outcomes(write(tmp_path, "d.json", "[" + "1,\n" * 200_000 + row_of(1) + "]"))
    assert len(found) == 200_001
    assert [one.source.line for one in found[:3]] == [1, 2, 3]
    wide = "{" + ",".join(f'"k{n}":1' for n in range(200_000)) + ',"k199999":2}'
    (twice,) = outcomes(write(tmp_path, "d.jsonl", wide + "\n"))
    assert "'k199999' twice" in twice.reason


def stream_of(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        for batch in table.to_batches(1000):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def test_arrow_streams_are_whole_or_refused(tmp_path):
    table = pa.Table.from_pylist([{"question": f"q{n}", "answer": "a"} for n in range(3000)])
    whole = stream_of(table)
    assert len(questions(write(tmp_path, "d.arrow", whole))) == 3000
    with pytest.raises(InputRefused, match="cut off"):
        questions(write(tmp_path, "cut.arrow", whole[:-8]))
    with pytest.raises(InputRefused, match="repeated_column"):
        questions(write(tmp_path, "twice.arrow", stream_of(table.append_column("question", table["answer"]))))
    offsets = whole.index(np.arange(0, 12, 2, dtype=np.int32).tobytes())
    damaged = whole[: offsets + 4] + b"\xff\xff\xff\x7f" + whole[offsets + 8 :]
    with pytest.raises(InputRefused, match="damaged_file"):
        questions(write(tmp_path, "damaged.arrow", damaged))


def test_json_in_arrow_is_what_it_says(tmp_path):
    """`datasets` keeps objects that differ between rows as JSON text, and notes it in the schema."""
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


def test_objects_in_memory_are_read_as_they_are(tmp_path):
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


def test_csv_as_spreadsheets_write_it(tmp_path):
    assert data_of(write(tmp_path, "a.csv", "\nquestion,answer\nq,a\n")) == [{"question": "q", "answer": "a"}]
    assert data_of(write(tmp_path, "b.csv", "sep=;\r\nquestion;answer\r\nq, r;a\r\n")) == [
        {"question": "q, r", "answer": "a"}
    ]


def test_the_rest_of_a_broken_csv_row_is_no_row(tmp_path):
    text = 'question,answer\n"he said "hi"\nyes, sure\nok","x"\ngood,row\n"a "b" c",d\n"x\ny",z\n'
    found = outcomes(write(tmp_path, "d.csv", text))
    assert [getattr(one, "data", None) or (one.code, one.source.line) for one in found] == [
        ("csv", 2), {"question": "good", "answer": "row"}, ("csv", 6), {"question": "x\ny", "answer": "z"}
    ]  # fmt: skip
    assert found[0].raw == '"he said "hi"\nyes, sure\nok","x"\n'


@pytest.mark.parametrize(("encoding", "byte"), [("cp1253", b"\xd2\xaa"), ("ascii", "é".encode()), ("cp1252", b"\x81")])
def test_what_an_encoding_lacks_is_no_text_in_it(tmp_path, encoding, byte):
    text = b'{"question": "' + byte + b'", "answer": "a"}\n'
    (bad,) = [
        row
        for source in sources({"path": write(tmp_path, "d.jsonl", text), "encoding": encoding})
        for row in source.rows()
    ]
    assert bad.code == "encoding"
    assert "no text in its encoding: byte 0x" in bad.reason
    assert data_of({"path": write(tmp_path, "e.jsonl", LINES), "encoding": "utf-8-sig"}) == ROWS


def test_excel_as_people_have_it(tmp_path):
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    for row in ([], ["question", "answer"], ["q", datetime.datetime(2024, 1, 1)], ["=1/0", "a"], ["", ""], ["n", 7]):
        sheet.append(row)
    sheet["A4"].value, sheet["A4"].data_type = "#DIV/0!", "e"
    sheet["B7"] = "=A1"
    hidden = book.create_sheet("notes")
    hidden.append(["question"])
    hidden.sheet_state = "hidden"
    book.save(tmp_path / "d.xlsx")
    assert [(getattr(one, "data", None) or (one.code, one.field), one.source.line) for one in outcomes(str(tmp_path / "d.xlsx"))] == [
        ({"question": "q", "answer": "2024-01-01"}, 3), (("excel_error", "A4"), 4),
        ({"question": "n", "answer": "7"}, 6), (("excel_formula", "B7"), 7),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        # Quotes within cells are no sign of what is open.
        ("x.tsv", 'question\tanswer\na0\tb0\n"q2" is\ta2\nq3 say "hi" to\ta3\nq4\ta4\n', ["a0", "csv", "q3", "q4"]),
        ("x.csv", 'question,answer\n"bad" x,y\ngood1,a\nthe 5" disk,c\nok,d\n', ["csv", "good1", "the", "ok"]),
        ("x.csv", 'question,answer\n"he said "hi"\nyes, sure\nok","x"\ngood,row\n', ["csv", "good"]),
        ("x.csv", 'question,answer\n"a "b"\nmore","and "" so\non"\ngood,row\n', ["csv", "good"]),
    ],
)
def test_rows_after_a_fault_of_csv_are_read_where_they_begin(tmp_path, name, text, expected):
    found = outcomes(write(tmp_path, name, text))
    assert ["csv" if isinstance(one, Reject) else one.data["question"].split()[0] for one in found] == expected


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
def test_json_that_is_not_valid_is_not_taken_for_it(tmp_path, text):
    path = write(tmp_path, "d.json", text.replace("{q}", row_of(1)))
    try:
        found = outcomes(path)
    except InputRefused:
        return
    assert any(isinstance(one, Reject) for one in found)


def test_columns_of_objects_are_columns(tmp_path):
    columns = {"question": ["a", "b"], "answer": ["c", "d"], "meta": [{"x": 1}, {"x": 2}]}
    assert [row["meta"]["x"] for row in data_of(write(tmp_path, "d.json", json.dumps(columns)))] == [1, 2]
    row = {"messages": TALK, "tools": [{"a": 1}, {"b": 2}]}
    assert data_of(write(tmp_path, "e.json", json.dumps(row))) == [row]
    with pytest.raises(InputRefused, match="which of them are the rows"):
        data_of(write(tmp_path, "f.json", '{"text": "About", "data": [' + row_of(1) + "]}"))


def test_excel_as_pandas_writes_it(tmp_path):
    pd.DataFrame({"question": ["q\r\n1"], "answer": ["a"]}).to_excel(tmp_path / "d.xlsx")
    assert data_of(tmp_path / "d.xlsx") == [{"": "0", "question": "q\r\n1", "answer": "a"}]


def test_metadata_of_others_is_no_matter(tmp_path):
    table = pa.table({"question": ["q"], "answer": ["a"], "when": pa.array([1], pa.date64())})
    for note in (b'{"info":null}', b"null", b"[]", b"not json", b"\xff"):
        pq.write_table(table.replace_schema_metadata({b"huggingface": note}), tmp_path / "d.parquet")
        assert data_of(tmp_path / "d.parquet")[0]["question"] == "q"
    assert questions(write(tmp_path, "d.arrow", stream_of(table))) == ["q"]
    assert data_of(table.to_batches()[0])[0]["question"] == data_of(table.to_reader())[0]["question"] == "q"


def test_nulls_of_json_stay_however_a_data_set_is_read():
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
