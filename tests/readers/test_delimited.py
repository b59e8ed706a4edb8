"""CSV and TSV: every cell is text, and every invalid row is rejected at its line."""

import csv
import gzip
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import often
from reader_helpers import CELLS, data_of, outcomes, write

from ftdata import convert, read
from ftdata.errors import InputRefused, UsageError
from ftdata.readers import resolve_sources
from ftdata.types import Reject


def test_csv_and_tsv_cells_are_text(tmp_path):
    for name, delimiter in {"d.csv": ",", "e.csv": ";", "d.tsv": "\t"}.items():
        out = io.StringIO()
        writer = csv.DictWriter(out, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(CELLS)
        path = write(tmp_path, name, "\ufeff" + out.getvalue())
        assert data_of(path) == CELLS
        assert [row.source.line for row in read(path)] == [2, 3]
        assert data_of(write(tmp_path, name + ".gz", gzip.compress(out.getvalue().encode()))) == CELLS


def test_invalid_csv_rows_are_rejected_at_their_line(tmp_path):
    text = b'q,a\n1,2\n1,2,3\n\nx"y,"a "b" c"\n\xff,1\n"multi\nline",ok\nlast,"cut'
    found = outcomes(write(tmp_path, "d.csv", text))
    assert [(getattr(one, "code", "row"), one.source.line) for one in found] == [
        ("row", 2), ("ragged_row", 3), ("csv", 5), ("encoding", 6), ("row", 7), ("csv", 9)
    ]  # fmt: skip
    for one in found:
        assert text[one.source.offset :].startswith(text.split(b"\n")[one.source.line - 1])


def test_open_quote_before_many_rows_is_an_error(tmp_path):
    """Otherwise, hundreds of rows would be lost with one rejected row."""
    lines = [f"{number},it is {number}" for number in range(100)]
    lines[5], lines[90] = '5,"it is 5', '90,"it is 90, here"'
    path = write(tmp_path, "d.csv", "q,a\n" + "\n".join(lines))
    with pytest.raises(InputRefused, match="86 lines, of which 84 look like rows") as caught:
        outcomes(path)
    assert caught.value.where.endswith("d.csv:7")
    rows = [row for source in resolve_sources({"path": str(path), "quoting": "none"}) for row in source.rows()]
    assert [one.source.line for one in rows if isinstance(one, Reject)] == [92]
    lines[90] = '90,it is 90"'
    (long,) = [one for one in outcomes(write(tmp_path, "e.csv", "q,a\n" + "\n".join(lines))) if one.notes]
    assert (long.source.line, long.notes) == (7, {"long quotes"})


@pytest.mark.parametrize(("text", "code"), [("", "no_rows"), ("a,b\n", "no_rows"), ("a,a\n1,2\n", "repeated_column")])
def test_csv_without_rows_or_column_names_is_refused(tmp_path, text, code):
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
def test_csv_written_by_python_is_read_back(tmp_path_factory, cells):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([["p", "c"], *cells])
    path = write(tmp_path_factory.mktemp("csv"), "d.csv", out.getvalue())
    assert [list(row.values()) for row in data_of(path)] == cells


def test_csv_exported_by_spreadsheets_is_read(tmp_path):
    assert data_of(write(tmp_path, "a.csv", "\nquestion,answer\nq,a\n")) == [{"question": "q", "answer": "a"}]
    assert data_of(write(tmp_path, "b.csv", "sep=;\r\nquestion;answer\r\nq, r;a\r\n")) == [
        {"question": "q, r", "answer": "a"}
    ]


def test_continuation_of_an_invalid_csv_row_is_not_a_row(tmp_path):
    text = 'question,answer\n"he said "hi"\nyes, sure\nok","x"\ngood,row\n"a "b" c",d\n"x\ny",z\n'
    found = outcomes(write(tmp_path, "d.csv", text))
    assert [getattr(one, "data", None) or (one.code, one.source.line) for one in found] == [
        ("csv", 2), {"question": "good", "answer": "row"}, ("csv", 6), {"question": "x\ny", "answer": "z"}
    ]  # fmt: skip
    assert found[0].raw == '"he said "hi"\nyes, sure\nok","x"\n'


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        # Quotes that CSV does not write are text.
        ("x.tsv", 'question\tanswer\na0\tb0\n"q2" is\ta2\nq3 say "hi" to\ta3\nq4\ta4\n', ["a0", '"q2"', "q3", "q4"]),
        ("x.csv", 'question,answer\n"bad" x,y\ngood1,a\nthe 5" disk,c\nok,d\n', ["csv", "good1", "the", "ok"]),
        ("x.csv", 'question,answer\n"he said "hi"\nyes, sure\nok","x"\ngood,row\n', ["csv", "good"]),
        ("x.csv", 'question,answer\n"a "b"\nmore","and "" so\non"\ngood,row\n', ["csv", "good"]),
    ],
)
def test_rows_after_an_invalid_csv_row_are_read(tmp_path, name, text, expected):
    found = outcomes(write(tmp_path, name, text))
    assert ["csv" if isinstance(one, Reject) else one.data["question"].split()[0] for one in found] == expected


LITERAL = 'question\tanswer\nsay "hi"\t"hi" she said\n"all of it"\tx\n5" pipe\t"open\n'
QUOTED = 'question\tanswer\n"a\tb"\t"say ""hi"""\nplain\t"two\nlines"\n'


def test_literal_quotes_in_tsv_are_text(tmp_path, caplog):
    (tmp_path / "d.tsv").write_text(LITERAL)
    assert data_of(tmp_path / "d.tsv") == [
        {"question": 'say "hi"', "answer": '"hi" she said'},
        {"question": '"all of it"', "answer": "x"},
        {"question": '5" pipe', "answer": '"open'},
    ]
    assert "quotes are text" in caplog.text
    report = convert(str(tmp_path / "d.tsv"), to="messages", output=tmp_path / "d.jsonl")
    assert any("quotes are text" in note and "3 rows" in note for note in report.notes)
    (tmp_path / "c.tsv").write_text(QUOTED)
    assert not convert(str(tmp_path / "c.tsv"), to="messages", output=tmp_path / "c.jsonl").notes


def test_tsv_with_csv_quoting_is_detected(tmp_path, caplog):
    expected = [{"question": "a\tb", "answer": 'say "hi"'}, {"question": "plain", "answer": "two\nlines"}]
    for text in (QUOTED, QUOTED + '"broken" row\tx\n'):
        (tmp_path / "d.tsv").write_text(text)
        found = outcomes(str(tmp_path / "d.tsv"))
        assert [row.data for row in found[:2]] == expected
        assert [row.code for row in found[2:]] in ([], ["csv"])
    assert "quotes" not in caplog.text


def test_quoting_option_overrides_the_detection(tmp_path):
    (tmp_path / "d.tsv").write_text('question\tanswer\n"q"\t"a"\n')
    assert data_of(tmp_path / "d.tsv") == [{"question": "q", "answer": "a"}]
    source = {"path": str(tmp_path / "d.tsv"), "quoting": "none"}
    assert [row.data for row in read(source)] == [{"question": '"q"', "answer": '"a"'}]
    (tmp_path / "l.tsv").write_text(LITERAL)
    rows = outcomes({"path": str(tmp_path / "l.tsv"), "quoting": "csv"})
    assert "csv" in {getattr(row, "code", "") for row in rows}
    (tmp_path / "d.csv").write_text('question,answer\n"q","a"\n')
    assert [row.data for row in read({"path": str(tmp_path / "d.csv"), "quoting": "none"})] == [
        {"question": '"q"', "answer": '"a"'}
    ]
    with pytest.raises(UsageError, match="quoting"):
        list(read({"path": str(tmp_path / "d.csv"), "quoting": "all"}))


@given(st.lists(st.lists(st.text(st.sampled_from('a"\t\n ,')), min_size=2, max_size=2), min_size=1))
def test_tsv_with_csv_quoting_is_read_back(rows):
    """A CSV writer quotes every cell that contains quotes, delimiters or line breaks."""
    import csv
    import io

    from ftdata.readers.quote_detection import _count_cells, _is_csv

    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows([["question", "answer"], *rows])
    found = _count_cells(io.BytesIO(text.getvalue().encode()), b"\t")
    assert _is_csv(found)
    assert not found["literal"]


@given(st.lists(st.lists(st.text(st.sampled_from('ab" ,'), min_size=1), min_size=2, max_size=2), min_size=1))
def test_tsv_without_quoting_is_read_back(rows):
    import io

    from ftdata.readers.quote_detection import _count_cells, _is_csv

    text = "\n".join(["question\tanswer", *map("\t".join, rows)]) + "\n"
    literal = any('"' in cell and not (cell[0] == cell[-1] == '"' and len(cell) > 1) for row in rows for cell in row)
    found = _count_cells(io.BytesIO(text.encode()), b"\t")
    if literal and found["needed"] == 0 and found["quoted"] <= found["plain"]:
        assert not _is_csv(found)


def test_quoting_on_standard_input_is_detected(tmp_path):
    import subprocess
    import sys

    ran = subprocess.run(
        [sys.executable, "-m", "ftdata", "preview", "-", "--template", "question_answer"],
        input=LITERAL.replace("\t", ","), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in ran.stderr
