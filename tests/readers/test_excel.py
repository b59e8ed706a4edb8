"""Excel: sheets as people and libraries write them."""

import datetime

import pandas as pd
import pytest
from rows import data_of, outcomes

from ftdata import read


def test_excel_is_text_sheet_by_sheet(tmp_path):
    with pd.ExcelWriter(tmp_path / "d.xlsx") as out:
        pd.DataFrame([{"question": "007", "answer": "NA"}, {"question": 7, "answer": None}]).to_excel(
            out, sheet_name="one", index=False
        )
        pd.DataFrame([{"text": "t"}]).to_excel(out, sheet_name="two", index=False)
    found = list(read(str(tmp_path / "d.xlsx")))
    assert [row.data for row in found] == [{"question": "007", "answer": "NA"}, {"question": "7"}, {"text": "t"}]
    assert [str(row.source).rpartition("/")[2] for row in found] == ["d.xlsx#one:2", "d.xlsx#one:3", "d.xlsx#two:2"]


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


def test_excel_as_pandas_writes_it(tmp_path):
    pd.DataFrame({"question": ["q\r\n1"], "answer": ["a"]}).to_excel(tmp_path / "d.xlsx")
    assert data_of(tmp_path / "d.xlsx") == [{"": "0", "question": "q\r\n1", "answer": "a"}]


ESCAPES = ["_x000D_", "a_x000D_b", "_x005F_", "_x005F_x000D_", "_x0041_", "\r", "tab\tand\nbreak", "_xZZZZ_", "x005F_"]


def written_by_hand(path, texts, *, inline):
    """Write texts as Excel does: what looks like an escape is itself escaped (ECMA-376 Part 1, 22.9.2.19)."""
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
def test_excel_escapes_are_read_as_they_were_typed(inline, tmp_path):
    path = tmp_path / "d.xlsx"
    written_by_hand(path, ["text", *ESCAPES], inline=inline)
    assert [row["text"] for row in data_of(path)] == ESCAPES


def test_excel_strings_in_pieces(tmp_path):
    """Text with formats stands in several runs."""
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


def test_a_large_honest_workbook_is_read(tmp_path):
    path = tmp_path / "d.xlsx"
    frame = pd.DataFrame({"question": [f"question {n}" for n in range(20_000)], "answer": ["yes", "no"] * 10_000})
    frame.to_excel(path, index=False)
    assert data_of(path) == frame.to_dict("records")
