"""Excel: workbooks written by people and by libraries."""

import datetime

import pandas as pd
import pytest
from reader_helpers import data_of, outcomes

from ftdata import read
from ftdata.errors import InputRefused


def test_excel_cells_are_text_in_every_sheet(tmp_path):
    with pd.ExcelWriter(tmp_path / "d.xlsx") as out:
        pd.DataFrame([{"question": "007", "answer": "NA"}, {"question": 7, "answer": None}]).to_excel(
            out, sheet_name="one", index=False
        )
        pd.DataFrame([{"text": "t"}]).to_excel(out, sheet_name="two", index=False)
    found = list(read(str(tmp_path / "d.xlsx")))
    assert [row.data for row in found] == [{"question": "007", "answer": "NA"}, {"question": "7"}, {"text": "t"}]
    assert [str(row.source).rpartition("/")[2] for row in found] == ["d.xlsx#one:2", "d.xlsx#one:3", "d.xlsx#two:2"]


def test_excel_with_dates_errors_formulas_and_hidden_sheets(tmp_path):
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


def test_excel_written_by_pandas_is_read(tmp_path):
    pd.DataFrame({"question": ["q\r\n1"], "answer": ["a"]}).to_excel(tmp_path / "d.xlsx")
    assert data_of(tmp_path / "d.xlsx") == [{"": "0", "question": "q\r\n1", "answer": "a"}]


ESCAPES = ["_x000D_", "a_x000D_b", "_x005F_", "_x005F_x000D_", "_x0041_", "\r", "tab\tand\nbreak", "_xZZZZ_", "x005F_"]


def written_by_hand(path, texts, *, inline):
    """Write texts as Excel does: text that looks like an escape is escaped (ECMA-376 Part 1, 22.9.2.19)."""
    import re
    import zipfile
    from xml.sax.saxutils import escape

    import openpyxl

    openpyxl.Workbook().save(path)
    stored = [re.sub(r"_(?=x[0-9A-Fa-f]{4}_)", "_x005F_", text).replace("\r", "_x000D_") for text in texts]
    cells = [f'<t xml:space="preserve">{escape(text)}</t>' for text in stored]
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    rows = "".join(
        f'<row r="{n}"><c r="A{n}" t="inlineStr"><is>{cell}</is></c></row>'
        if inline
        else f'<row r="{n}"><c r="A{n}" t="s"><v>{n - 1}</v></c></row>'
        for n, cell in enumerate(cells, 1)
    )
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    parts["xl/worksheets/sheet1.xml"] = f"<worksheet {main}><sheetData>{rows}</sheetData></worksheet>".encode()
    phonetic = "<rPh sb='0' eb='1'><t>phonetic</t></rPh>"
    strings = "".join(f"<si>{cell}{phonetic}</si>" for cell in cells)
    parts["xl/sharedStrings.xml"] = f"<sst {main}>{strings}</sst>".encode()
    with zipfile.ZipFile(path, "w") as new:
        for name, data in parts.items():
            new.writestr(name, data)


@pytest.mark.parametrize("inline", [True, False])
def test_excel_escapes_are_decoded(inline, tmp_path):
    path = tmp_path / "d.xlsx"
    written_by_hand(path, ["text", *ESCAPES], inline=inline)
    assert [row["text"] for row in data_of(path)] == ESCAPES


def test_excel_rich_text_runs_are_joined(tmp_path):
    """Formatted text is stored in several runs."""
    path = tmp_path / "d.xlsx"
    written_by_hand(path, ["text", "PIECES"], inline=False)
    import zipfile

    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    runs = b"<r><rPr><b/></rPr><t>bold </t></r><r><t>plain</t></r>"
    parts["xl/sharedStrings.xml"] = parts["xl/sharedStrings.xml"].replace(b'<t xml:space="preserve">PIECES</t>', runs)
    with zipfile.ZipFile(path, "w") as new:
        for name, data in parts.items():
            new.writestr(name, data)
    assert data_of(path) == [{"text": "bold plain"}]


@pytest.mark.slow
def test_large_workbook_is_read(tmp_path):
    path = tmp_path / "d.xlsx"
    frame = pd.DataFrame({"question": [f"question {n}" for n in range(6_000)], "answer": ["yes", "no"] * 3_000})
    frame.to_excel(path, index=False)
    assert data_of(path) == frame.to_dict("records")


def changed(path, name, old, new):
    import zipfile

    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    assert old in parts[name]
    parts[name] = parts[name].replace(old, new)
    with zipfile.ZipFile(path, "w") as archive:
        for part, data in parts.items():
            archive.writestr(part, data)


def book_of(path, *rows):
    import openpyxl

    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return str(path)


def codes(path):
    return [getattr(one, "data", None) or (one.code, one.field, one.source.line) for one in outcomes(path)]


def test_cells_beyond_the_header_reject_their_row(tmp_path):
    path = book_of(tmp_path / "d.xlsx", ["question", "answer"], ["q", "a", "more"], ["q", "a"])
    assert codes(path) == [("ragged_row", "", 2), {"question": "q", "answer": "a"}]


def test_surrogates_in_excel_are_joined_or_rejected(tmp_path):
    """Excel escapes characters beyond 16 bits as two surrogates; a lone surrogate is not valid text."""
    path = book_of(tmp_path / "d.xlsx", ["question", "answer"], ["q", "_xD83D__xDE00_"], ["q", "_xD83D_"])
    assert codes(path) == [{"question": "q", "answer": "😀"}, ("lone_surrogate", "B3", 3)]


def test_malformed_excel_cell_rejects_its_row(tmp_path):
    path = book_of(tmp_path / "d.xlsx", ["question", "answer"], ["q", 1], ["q", 2], ["q", 3])
    changed(path, "xl/worksheets/sheet1.xml", b"<v>2</v>", b"<v>two</v>")
    assert codes(path) == [{"question": "q", "answer": "1"}, ("excel_error", "B3", 3), {"question": "q", "answer": "3"}]


def test_oversized_header_cell_is_refused(tmp_path):
    path = book_of(tmp_path / "d.xlsx", ["question", "LONG"], ["q", "a"])
    changed(path, "xl/worksheets/sheet1.xml", b"LONG", b"x" * 40_000)
    with pytest.raises(InputRefused, match="cell_too_long"):
        outcomes(path)


@pytest.mark.long
def test_workbook_with_a_repeated_long_text_is_read(tmp_path):
    """700 kB that expand to 130 MB of XML: the same system prompt of 8 kB in each row."""
    prompt = "You are a helpful assistant. " * 280
    import openpyxl

    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("s")
    sheet.append(["system", "question", "answer"])
    for n in range(16_000):
        sheet.append([prompt, f"q{n}", f"a{n}"])
    book.save(tmp_path / "d.xlsx")
    found = data_of(tmp_path / "d.xlsx")
    assert len(found) == 16_000
    assert found[-1] == {"system": prompt, "question": "q15999", "answer": "a15999"}
