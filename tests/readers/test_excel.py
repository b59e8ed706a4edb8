"""Excel: sheets as people and libraries write them."""

import datetime

import pandas as pd
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
