"""Readers: values are exact, and each fault rejects only its own row at its line."""

import gzip
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import often
from reader_helpers import anything, outcomes, write

from ftdata import read
from ftdata.errors import BadRow, FtdataError, InputRefused, UsageError
from ftdata.readers import resolve_sources
from ftdata.readers.json_parse import parse_row
from ftdata.types import Reject, Source


@often(100)
@given(rows=anything, pretty=st.booleans(), ascii_only=st.booleans())
def test_json_array_is_read_exactly_with_line_numbers(tmp_path_factory, rows, pretty, ascii_only):
    """R1, R2, R4: values are exact, and line numbers are physical lines."""
    folder = tmp_path_factory.mktemp("array")
    each = [json.dumps(row, indent=2 if pretty else None, ensure_ascii=ascii_only) for row in rows]
    found = outcomes(write(folder, "data.json", "[\n" + ",\n".join(each) + "\n]"))
    assert [row.data for row in found] == rows
    lines = [2]
    for text in each[:-1]:
        lines.append(lines[-1] + text.count("\n") + 1)
    assert [row.source.line for row in found] == lines
    assert [row.source.row for row in found] == list(range(len(rows)))


@often(100)
@given(
    rows=anything,
    blanks=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    ending=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_json_lines_are_read_exactly_with_line_numbers(tmp_path_factory, rows, blanks, ending, bom):
    folder = tmp_path_factory.mktemp("lines")
    text, lines, number = "", [], 1
    for row, blank in zip(rows, blanks, strict=False):
        text += ending * blank + json.dumps(row, ensure_ascii=False) + ending
        lines.append(number + blank)
        number += blank + 1
    found = outcomes(write(folder, "data.jsonl", (b"\xef\xbb\xbf" if bom else b"") + text.encode()))
    assert [row.data for row in found] == rows
    assert [row.source.line for row in found] == lines


@often(50)
@given(rows=anything, data=st.data())
def test_invalid_line_is_rejected_at_its_line(tmp_path_factory, rows, data):
    """D1, D2: read = built + rejected, and exactly the invalid lines are rejected."""
    broken = data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1))
    each = [json.dumps(row) for row in rows]
    for index in broken:
        each[index] = each[index][:-1]
    found = outcomes(write(tmp_path_factory.mktemp("broken"), "data.jsonl", "\n".join(each) + "\n"))
    assert {entry.source.line - 1 for entry in found if isinstance(entry, Reject)} == broken
    assert [entry.data for entry in found if not isinstance(entry, Reject)] == [
        r for i, r in enumerate(rows) if i not in broken
    ]


def test_values_are_not_coerced():
    row = {"a": "007", "b": "2024-01-01", "c": "NA", "d": "true", "e": "1e5", "f": "null"}
    assert next(iter(read([row]))).data == row


def test_numbers_beyond_64_bits_and_nan_are_read(tmp_path):
    (row,) = outcomes(write(tmp_path, "d.jsonl", f'{{"n": {10**40}, "x": NaN, "text": "t"}}\n'))
    assert row.data["n"] == 10**40


def test_each_inner_list_is_a_conversation(tmp_path):
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 2
    assert [row.data for row in outcomes(write(tmp_path, "d.json", json.dumps(chats)))] == chats


def test_column_oriented_objects_are_rows(tmp_path):
    nested = {"question": {"0": "q0", "1": "q1"}, "answer": {"0": "a0", "1": "a1"}}
    expected = [{"question": "q0", "answer": "a0"}, {"question": "q1", "answer": "a1"}]
    assert [row.data for row in outcomes(write(tmp_path, "a.json", json.dumps(nested)))] == expected
    lists = {"question": ["q0", "q1"], "answer": ["a0", "a1"]}
    assert [row.data for row in outcomes(write(tmp_path, "b.json", json.dumps(lists, indent=1)))] == expected


def test_single_conversation_object_is_one_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert [r.data for r in outcomes(write(tmp_path, "d.json", json.dumps(row, indent=2)))] == [row]


def test_json_lines_in_a_json_file_are_read(tmp_path):
    assert len(outcomes(write(tmp_path, "d.json", '{"text": "a"}\n{"text": "b"}\n'))) == 2


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("d.json", "", "no_rows"),
        ("d.json", "  \n ", "no_rows"),
        ("d.jsonl", "\n\n", "no_rows"),
        ("d.json", "[]", "no_rows"),
        ("d.json", '[{"a": "b"}', "partial_file"),
        ("d.json", '[{"a": "b', "partial_file"),
        ("d.jsonl", "<!DOCTYPE html><html>", "not_json"),
        ("d.jsonl", "PAR1", "not_json"),
        ("d.jsonl", b"\x1f\x8b\x08\x00", "partial_file"),
        ("d.txt", "hello", "no_reader"),
    ],
)
def test_files_that_are_not_json_are_refused(tmp_path, name, content, code):
    with pytest.raises(InputRefused) as caught:
        outcomes(write(tmp_path, name, content))
    assert caught.value.code == code
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "line", ['{"a": "\\ud800"}', '{"a": 1,}', "{'a': 1}", '{"a": 1} {"b": 2}', '"text"', "3", "[" * 100_000]
)
def test_values_that_are_not_rows_are_rejected_at_their_line(tmp_path, line):
    _first, second = outcomes(write(tmp_path, "d.jsonl", f'{{"text": "ok"}}\n{line}\n'))
    assert isinstance(second, Reject)
    assert second.source.line == 2


def test_truncated_last_line_is_reported(tmp_path):
    (_, cut) = outcomes(write(tmp_path, "d.jsonl", '{"text": "ok"}\n{"text": "no'))
    assert cut.code == "partial_file"


@pytest.mark.parametrize(
    ("content", "fix"),
    [
        ('{"a": "b"},\n{"a": "b"},', "correct the JSON"),
        ('{"a": "b"}\n{"a" "b"}', "correct the JSON"),
        ('{"a": "b"}\r{"a": "c"}\r', "line feeds (LF)"),
        ("{'a': 'b'}", "double quotes"),
        ('{"a": "b", "a": "c"}', "remove one of the keys"),
    ],
)
def test_complete_last_line_is_not_called_truncated(tmp_path, content, fix):
    last = outcomes(write(tmp_path, "d.jsonl", content))[-1]
    assert last.code in ("json", "duplicate_key")
    assert fix in last.fix


def test_invalid_utf8_is_rejected_at_its_line(tmp_path):
    (_, bad) = outcomes(write(tmp_path, "d.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9"}\n'))
    assert bad.code == "encoding"
    assert bad.source.line == 2


def test_read_raises_at_an_invalid_row(tmp_path):
    with pytest.raises(BadRow, match=r"d\.jsonl:2"):
        list(read(write(tmp_path, "d.jsonl", '{"a": 1}\n{"a": \n{"a": 2}\n')))


def test_files_globs_and_lists_are_read_in_order(tmp_path):
    a, b = write(tmp_path, "a.jsonl", '{"text": "a"}\n'), write(tmp_path, "b.jsonl", '{"text": "b"}\n')
    assert [row.data["text"] for row in read([b, a])] == ["b", "a"]
    assert [row.data["text"] for row in read(str(tmp_path / "*.jsonl"))] == ["a", "b"]


def test_missing_file_error_suggests_similar_names(tmp_path):
    write(tmp_path, "train.json", "[]")
    with pytest.raises(UsageError, match=r"did you mean '.*train\.json'"):
        resolve_sources(str(tmp_path / "trian.json"))


@pytest.mark.parametrize("data", [{"train": []}, 3])
def test_invalid_sources_are_refused(data):
    with pytest.raises(UsageError):
        resolve_sources(data)


def test_data_frames_and_datasets_are_read(tmp_path):
    import datasets
    import pandas as pd

    given = [{"question": "007", "answer": "NA"}, {"question": "x", "answer": None}]
    assert [row.data for row in read(pd.DataFrame(given))] == [given[0], {"question": "x"}]
    assert [row.data for row in read(datasets.Dataset.from_list(given[:1]))] == given[:1]


def test_stopping_early_leaves_nothing_open(tmp_path):
    path = write(tmp_path, "d.json", json.dumps([{"text": "a"}] * 50))
    next(iter(read(path)))


def test_values_between_rows_are_rejected_one_by_one(tmp_path):
    found = outcomes(write(tmp_path, "d.json", '[1, "a, b",\n {"text": "t"}, null, {"text": "u"}, 2]'))
    assert [isinstance(entry, Reject) for entry in found] == [True, True, False, True, False, True]
    assert [entry.source.row for entry in found] == list(range(6))
    assert {entry.code for entry in found if isinstance(entry, Reject)} == {"not_a_row"}
    assert [entry.source.line for entry in found] == [1, 1, 2, 2, 2, 2]
    assert [entry.source.offset for entry in found] == [1, 4, 13, 28, 34, 49]


def test_single_object_with_empty_lines_after_it_is_columns(tmp_path):
    path = write(tmp_path, "d.json", '{"question": ["q"], "answer": ["a"]}\n\n')
    assert [row.data for row in outcomes(path)] == [{"question": "q", "answer": "a"}]
    (row,) = outcomes(write(tmp_path, "e.json", '[{"messages": []}]'))
    assert row.data == {"messages": []}


def test_arrays_in_data_frames_are_read_as_lists(tmp_path):
    import pandas as pd

    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pd.DataFrame([{"messages": chat}]).to_parquet(tmp_path / "d.parquet")
    (row,) = read(pd.read_parquet(tmp_path / "d.parquet"))
    assert row.data == {"messages": chat}


def test_oversized_line_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr("ftdata.readers.json_rows.MAX_LINE", 50)
    long = '{"text": "' + "x" * 60 + '"}'
    codes = [getattr(e, "code", "") for e in outcomes(write(tmp_path, "d.jsonl", f'{{"text": "a"}}\n{long}\n'))]
    assert codes == ["", "line_too_long"]
    assert [getattr(e, "code", "") for e in outcomes(write(tmp_path, "d.json", f'[{{"text": "a"}}, {long}]'))] == codes


BLANK = st.sampled_from(["", "", " ", "\t", "  ", "\r"])
STRINGS = st.one_of(
    st.text(max_size=6).map(json.dumps),
    st.text(max_size=6).map(lambda text: json.dumps(text, ensure_ascii=False)),
    st.sampled_from(['"a"', '"\\u0061"', '"a\\":"', '"a\\" :"', '"\\u0022:"', '"{[:"', '"\\/"']),
).filter(lambda text: "\\ud" not in text and "\n" not in text)
NUMBERS = st.sampled_from(["0", "-0", "12", "1.10", "1e5", "18446744073709551616", "123456789012345678901234567890"])


def json_text(inner, blank):
    between = st.tuples(blank, blank).map("".join)
    pair = st.tuples(STRINGS, between, inner, between).map(lambda each: f"{each[0]}{each[1]}:{each[3]}{each[2]}")
    lists = st.tuples(st.lists(inner, max_size=3), between).map(lambda each: f"[{(',' + each[1]).join(each[0])}]")
    objects = st.tuples(st.lists(pair, max_size=3), between).map(lambda each: f"{{{(',' + each[1]).join(each[0])}}}")
    return lists | objects


TREES = st.recursive(
    STRINGS | NUMBERS | st.sampled_from(["true", "null"]), lambda inner: json_text(inner, BLANK), max_leaves=8
)


@pytest.mark.slow
@often(600)
@given(text=json_text(TREES, BLANK))
def test_line_is_parsed_like_python_unless_a_key_is_repeated(text):
    twice = []

    def unique(pairs):
        twice.extend([1] * (len(pairs) - len(dict(pairs))))
        return dict(pairs)

    value = json.loads(text, object_pairs_hook=unique)
    row = parse_row(text.encode() + b"\n", Source("x", 0, 1, 0), whole_line=True)
    if twice:
        assert row.code == "duplicate_key"
    else:
        assert repr(row.data) == repr(value)


def test_invalid_bytes_are_not_detected_as_utf16(tmp_path):
    path = write(tmp_path, "d.jsonl", b"@" + b"\xed" * 9 + b'\n{"a": 1}\n')
    first, second = outcomes(path)
    assert (first.code, second.data) == ("encoding", {"a": 1})


def test_rows_before_a_damaged_part_are_read(tmp_path):
    text = "".join(json.dumps({"prompt": f"question {n}", "completion": "a"}) + "\n" for n in range(400))
    damaged, rows = gzip.compress(text.encode())[:600], []
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(damaged)
    with pytest.raises(FtdataError):
        rows.extend(row.data["prompt"] for row in read(path))
    complete = zlib.decompressobj(wbits=31).decompress(damaged).count(b"\n")
    assert rows == [f"question {n}" for n in range(complete)]
    assert complete > 64
