"""G19: decompression bombs are refused with a clear error, within seconds and bounded memory."""

import gzip
import json
import lzma
import subprocess
import sys
import zipfile

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftdata import read

MEGABYTE = 1 << 20


def packed(unit, times):
    def write(path):
        with gzip.open(path, "wb") as file:
            for _ in range(times):
                file.write(unit * (MEGABYTE // len(unit)))

    return write


def table(**columns):
    return lambda path: pq.write_table(pa.table(columns), path, compression="zstd")


def repeated(text, times):
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([text]))


MAIN = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'


def workbook(sheet, strings=(), others=None):
    """Return a function that writes a workbook piece by piece: the rows of a sheet, and shared strings."""

    def write(path):
        openpyxl.Workbook().save(path)
        with zipfile.ZipFile(path) as old:
            parts = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in parts.items():
                if name not in ("xl/worksheets/sheet1.xml", "xl/sharedStrings.xml"):
                    new.writestr(name, (others or {}).get(name, data))
            for name, tags, pieces in (
                ("xl/worksheets/sheet1.xml", ("<worksheet", "><sheetData>", "</sheetData></worksheet>"), sheet),
                ("xl/sharedStrings.xml", ("<sst", ">", "</sst>"), strings),
            ):
                with new.open(name, "w", force_zip64=True) as part:
                    part.write(f"{tags[0]} {MAIN}{tags[1]}".encode())
                    for piece, times in pieces:
                        for _ in range(times):
                            part.write(piece.encode())
                    part.write(tags[2].encode())

    return write


def cells(row, count=2, string=0):
    return f'<row r="{row}">' + f'<c t="s"><v>{string}</v></c>' * count + "</row>"


def many_sheets(count):
    sheet = '<sheet name="s{n}" sheetId="{n}" r:id="rId1"/>'
    namespace = 'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"'
    listed = "".join(sheet.format(n=n) for n in range(1, count + 1))
    main = f"<workbook {MAIN} {namespace}><sheets>{listed}</sheets></workbook>"
    return lambda path: workbook([(HEAD, 1)], NAMED, {"xl/workbook.xml": main})(path)


def many_parts(count):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(count):
                archive.writestr(str(number), b"")

    return write


NAMED = [("<si><t>question</t></si><si><t>answer</t></si>", 1)]
HEAD = '<row r="1"><c r="A1" t="s"><v>0</v></c><c r="B1" t="s"><v>1</v></c></row>'


def arrow_stream(batches, rows, kind=None):
    """Return a function that writes an Arrow stream of highly compressible batches."""

    def write(path):
        column = pa.array(np.zeros(rows, np.int64)) if kind is None else kind(rows)
        batch = pa.record_batch({"question": column, "answer": column})
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
            for _ in range(batches):
                writer.write_batch(batch)

    return write


def nested(depth):
    """Return a function that writes an Arrow schema with deeply nested metadata."""

    def write(path):
        feature = '{"feature": ' * depth + '{"dtype": "string", "_type": "Value"}' + ', "_type": "List"}' * depth
        info = '{"info": {"features": {"question": ' + feature + "}}}"
        schema = pa.schema([pa.field("question", pa.string())], metadata={"huggingface": info})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch([pa.array(["q"])], schema=schema))

    return write


def plain(**columns):
    return lambda path: pq.write_table(
        pa.table(columns), path, compression="zstd", use_dictionary=False, write_statistics=False
    )


def integer(number):
    """Return a positive integer in Thrift's compact protocol."""
    number, text = number << 1, b""
    while number > 127:
        number, text = number >> 7, text + bytes([number & 127 | 128])
    return text + bytes([number])


def forged(write, stated=1000):
    """Return a function that writes a Parquet file with a footer that understates the size of column chunks."""

    def wrong(path):
        write(path)
        metadata, data = pq.ParquetFile(path).metadata, path.read_bytes()
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        sizes = {
            group.column(number).total_uncompressed_size for group in groups for number in range(metadata.num_columns)
        }
        sizes |= {group.total_byte_size for group in groups}
        length = int.from_bytes(data[-8:-4], "little")
        footer = data[-8 - length : -8]
        for size in sizes:
            footer = footer.replace(integer(size), integer(stated)) if size > MEGABYTE else footer
        path.write_bytes(data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
        assert pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size <= stated

    return wrong


def prefixes(path):
    values = pa.table({"question": ["y" * 900_000 + str(number) for number in range(1000)], "answer": ["a"] * 1000})
    encoding = {"question": "DELTA_BYTE_ARRAY", "answer": "PLAIN"}
    pq.write_table(values, path, compression="zstd", use_dictionary=False, column_encoding=encoding)


def xz(dict_size):
    def write(path):
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": dict_size}]
        with lzma.open(path, "wb", format=lzma.FORMAT_XZ, filters=filters) as file:
            for _ in range(300):
                file.write(b" " * MEGABYTE + b"\n")

    return write


def references(sizes, text="y" * 50_000_000):
    """Write lists whose items refer to a single dictionary value."""
    items = pa.DictionaryArray.from_arrays(pa.array([0] * sum(sizes), pa.int32()), pa.array([text]))
    offsets = pa.array(np.cumsum([0, *sizes]), pa.int32())
    columns = {
        "question": ["q"] * len(sizes),
        "answer": ["a"] * len(sizes),
        "notes": pa.ListArray.from_arrays(offsets, items),
    }
    options = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 1 << 30}
    return lambda path: pq.write_table(pa.table(columns), path, **options)


def empty_lists(path):
    inner = pa.ListArray.from_arrays(pa.array(np.zeros(7_900_001), pa.int32()), pa.array([], pa.int32()))
    notes = pa.ListArray.from_arrays(pa.array([0, 7_900_000], pa.int32()), inner)
    padding = pa.array([np.random.default_rng(0).bytes(80_000)])
    pq.write_table(
        pa.table({"question": ["q"], "answer": ["a"], "notes": notes, "padding": padding}), path, compression="zstd"
    )


def repeated_in(kind, count=20_000):
    """Write a value of 1 MB that a column refers to `count` times."""
    text, zeros = pa.array(["y" * MEGABYTE]), pa.array(np.zeros(count), pa.int32())
    single_row = pa.array([0, count], pa.int32())
    items = pa.DictionaryArray.from_arrays(zeros, text.cast(pa.string_view()) if "view" in kind else text)
    if kind == "map":
        column = pa.MapArray.from_arrays(single_row, pa.array(list(map(str, range(count)))), items)
    elif kind == "union":
        union = pa.UnionArray.from_sparse(zeros.cast(pa.int8()), [items])
        column = pa.ListArray.from_arrays(single_row, union)
    elif kind == "extension":
        views = pa.ListViewArray.from_arrays(zeros, pa.array(np.ones(count), pa.int32()), text)
        column = pa.ExtensionArray.from_storage(pa.opaque(views.type, "a", "b"), views)
    else:
        column = items if kind == "views" else pa.ListArray.from_arrays(single_row, items)
    data = pa.table({"question": column, "answer": ["a"] * len(column)})

    def write(path):
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, data.schema) as writer:
            writer.write_table(data)

    return write


def text_map(path):
    """Write one row with a map of 20,000 keys to the same text."""
    items = pa.array(["y" * 100_000] * 20_000)
    column = pa.MapArray.from_arrays(pa.array([0, 20_000], pa.int32()), pa.array(list(map(str, range(20_000)))), items)
    pq.write_table(pa.table({"question": column, "answer": ["a"]}), path, compression="zstd")


def one_row(before, value, after, count=20_000_000):
    """Write one row with `count` small values, compressed."""

    def write(path):
        with gzip.open(path, "wb", 1) as file:
            file.write(before + value * count + after)

    return write


TRAILING = b'{"question": "q", "answer": "a"}'

FILES = {
    "references in a map": ("a.arrow", lambda path: repeated_in("map")(path), "expansion|row_too_long"),
    "references in a union": ("a.arrow", lambda path: repeated_in("union")(path), "column_type"),
    "references in an extension type": ("a.arrow", lambda path: repeated_in("extension")(path), "column_type"),
    "references to a view in a list": ("a.arrow", lambda path: repeated_in("list of views")(path), "expansion|row_too_long"),
    "texts in a map": ("a.parquet", text_map, "expansion|row_too_long"),
    "objects in a row of JSON Lines": ("a.jsonl.gz", one_row(b'{"messages":[', b"{},", b"{}]}\n"), "row_too_long"),
    "objects in a row of JSON": ("a.json.gz", one_row(b'[{"messages":[', b"{},", b"{}]}]\n"), "row_too_long"),
    "texts in a row": ("a.jsonl.gz", one_row(b'{"messages":[', b'"ab",', b'""]}\n', 12_000_000), "row_too_long"),
    "thinking tags": ("a.jsonl", lambda path: path.write_text(json.dumps({"question": "q", "answer": "<think>[THINK]<thought>" * 30_000 + "</think>" * 90_000})), "empty_answer"),
    "cells in a row": ("a.csv.gz", one_row(b"question,answer\n", b"ab,", b"\n"), "row_too_long"),
    "carriage returns": ("a.csv", lambda path: path.write_bytes(b"question,answer\n" + b"a\rb\n" * 200_000), "csv"),
    "whitespace after an object": ("a.json.gz", one_row(TRAILING, b" ", b"", 400 * MEGABYTE), "not_rows"),
    "references in a list": ("a.parquet", lambda path: references([60])(path), "expansion|row_too_long"),
    "references after an empty list": ("a.parquet", lambda path: references([0, 100])(path), "expansion|row_too_long"),
    "empty lists in a row": ("a.parquet", empty_lists, "expansion|row_too_long"),
    "plain cells": ("a.parquet", lambda path: plain(question=["\0" * MEGABYTE] * 1000, answer=["a"] * 1000)(path), "expansion"),
    "plain cells, small in the footer": ("a.parquet", lambda path: forged(plain(question=["\0" * 4 * MEGABYTE] * 900, answer=["a"] * 900))(path), "expansion"),
    "one plain cell": ("a.parquet", lambda path: plain(question=["\0" * 60_000_000], answer=["a"])(path), "expansion"),
    "one plain cell in each row group": ("a.parquet", lambda path: pq.write_table(pa.table({"question": ["\0" * 60_000_000] * 15, "answer": ["a"] * 15}), path, row_group_size=1, compression="zstd", use_dictionary=False), "expansion"),
    "repeated prefixes": ("a.parquet", prefixes, "expansion"),
    "xz that needs 1 GiB": ("a.jsonl.xz", xz(1 << 30), "expansion"),
    "a million empty lists": ("a.jsonl", lambda path: path.write_bytes(b"[]\n" * 1_000_000), "no_messages"),
    "a million nulls": ("a.json", lambda path: path.write_bytes(b"[" + b"null," * 1_000_000 + b"null]"), "not_rows|not_a_row"),
    "a million empty cells": ("a.csv", lambda path: path.write_bytes(b"question,answer\n" + b",\n" * 1_000_000), "empty_answer"),
    "many keys": ("a.jsonl", lambda path: path.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"} | {f"k{n}": 1 for n in range(200_000)}]})), "message_type"),
    "shared strings": ("a.xlsx", lambda path: workbook([(HEAD, 1)], [*NAMED, ("<si><t>" + "x" * 1000 + "</t></si>", 1_000_000)])(path), "expansion"),
    "shared strings, empty": ("a.xlsx", lambda path: workbook([(HEAD, 1)], [*NAMED, ("<si><t>x</t></si>" * 1000, 50_000)])(path), "expansion"),
    "one long string in all cells": ("a.xlsx", lambda path: workbook([(HEAD, 1), (cells(2, 2, 2).replace(' r="2"', ""), 100_000)], [*NAMED, ("<si><t>" + "word " * 400_000 + "</t></si>", 1)])(path), "cell_too_long|expansion"),
    "row number": ("a.xlsx", lambda path: workbook([(HEAD, 1), (cells(2_000_000_000), 1)], NAMED)(path), "too_many_rows"),
    "huge sheet": ("a.xlsx", lambda path: workbook([(HEAD, 1), (cells(2, 100) * 100, 20_000)], NAMED)(path), "expansion"),
    "one huge row": ("a.xlsx", lambda path: workbook([(HEAD, 1), ('<row r="2">', 1), ("<c><v>1</v></c>" * 1000, 1000), ("</row>", 1)], NAMED)(path), "row_too_long|expansion"),
    "one row number for all": ("a.xlsx", lambda path: workbook([(HEAD, 1), (cells(2, 2, 0), 100)], NAMED)(path), "row_order"),
    "wide rows": ("a.xlsx", lambda path: workbook([(HEAD, 1), ('<row><c r="XFD2" t="str"><v>q</v></c></row>' * 1000, 100)], NAMED)(path), "ragged_row"),
    "long string, often": ("a.xlsx", lambda path: workbook([(HEAD, 1), (cells(2, 2, 2).replace(' r="2"', "") * 1000, 100)], [*NAMED, ("<si><t>" + "x" * 32_767 + "</t></si>", 1)])(path), "expansion"),
    "many sheets": ("a.xlsx", many_sheets(300_000), "expansion"),
    "many parts": ("a.xlsx", many_parts(400_000), "expansion"),
    "styles": ("a.xlsx", lambda path: workbook([(HEAD, 1)], NAMED, {"xl/styles.xml": f"<styleSheet {MAIN}><cellXfs>" + "<xf/>" * 3_000_000 + "</cellXfs></styleSheet>"})(path), "expansion"),
    "empty rows": ("a.xlsx", lambda path: workbook([(HEAD, 1), ("<row/>" * 1000, 2000)], NAMED)(path), "too_many_rows|expansion"),
    "many compressed buffers": ("a.arrow", lambda path: arrow_stream(2000, 1_000_000)(path), "expansion"),
    "one compressed buffer": ("a.arrow", lambda path: arrow_stream(1, 200_000_000)(path), "expansion"),
    "compressed text": ("a.arrow", lambda path: arrow_stream(400, 4, lambda rows: pa.array(["y" * 20_000_000] * rows))(path), "expansion|row_too_long"),
    "empty columns": ("a.arrow", lambda path: arrow_stream(100, 100_000_000, pa.nulls)(path), "expansion|schema"),
    "nested metadata": ("a.arrow", nested(5000), "too_deep|schema|damaged"),
    "line of 100 MB": ("a.jsonl", lambda path: path.write_bytes(b'{"question": "' + b"x" * 100 * MEGABYTE + b'", "answer": "a"}\n'), "line_too_long"),
    "1 GiB in one line": ("a.jsonl.gz", packed(b"x", 1024), "line_too_long|expansion"),
    "1 GiB of blank lines": ("a.jsonl.gz", packed(b"\n", 1024), "no_rows|expansion"),
    "1 GiB of brackets": ("a.json.gz", packed(b"[", 1024), "too_deep"),
    "1 GiB of blanks": ("a.csv.gz", packed(b" ", 1024), "line_too_long|expansion"),
    "long text": ("a.jsonl", lambda path: path.write_text(json.dumps({"question": "q", "answer": "word " * 2_400_000})), "row_too_long"),
    "long cell": ("a.parquet", lambda path: table(question=["z" * 300_000_000], answer=["a"])(path), "row_too_long|expansion"),
    "dictionary": ("a.parquet", lambda path: table(question=repeated("y" * 100 * MEGABYTE, 20), answer=["a"] * 20)(path), "expansion|row_too_long"),
    "columns": ("a.jsonl", lambda path: path.write_text(json.dumps({f"c{n}": 1 for n in range(1_000_000)})), "schema"),
    "names": ("a.csv", lambda path: path.write_text(",".join(f"c{n}" for n in range(1_000_000)) + "\n" + "v," * 999_999 + "v\n"), "schema"),
    "open quote": ("a.csv", lambda path: path.write_bytes(b'question,answer\n"' + b"q a\n" * 15_000_000), "csv"),
    "open quotes": ("a.tsv", lambda path: path.write_text("question\tanswer\n" + ('"a\n' + ("x" * 600 + '""\n') * 10_001) * 4), "ragged_row"),
    "quotes that reopen": ("a.tsv", lambda path: path.write_text("question\tanswer\n" + ('"a\n' + ("x" * 600 + '"\t"\n') * 10_001) * 4), "csv|ragged_row"),
    "a million empty objects": ("a.jsonl", lambda path: path.write_bytes(b"{}\n" * 1_000_000), "unknown_schema"),
    "nested": ("a.json", lambda path: path.write_bytes(b'{"a":' * 2_000_000), "too_deep"),
}  # fmt: skip


MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "ftdata", *sys.argv[1:]], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stdout + done.stderr, used.ru_maxrss >> 10, used.ru_utime + used.ru_stime]))
"""
QUICK = ("objects in a row of JSON Lines", "row number")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in FILES]
)
def test_decompression_bomb_is_refused(name, tmp_path, tokenizer_dir):
    """At most 700 MB and 20 s of CPU time, of which imports take 100 MB and 1 s."""
    file, write, expected = FILES[name]
    write(tmp_path / file)
    asked = ["build", str(tmp_path / file), "-t", tokenizer_dir("tiny_bpe"), "-o", "out", "--workers", "1"]
    # A child's memory counts from its parent's, so this one is small.
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *asked], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    code, told, megabytes, seconds = json.loads(done.stdout)
    sys.stdout.write(f"{name}: {seconds:.1f} s, {megabytes} MB\n")
    assert code == 3, told
    assert any(part in told for part in expected.split("|"))
    assert len(told) < 10_000
    assert megabytes < 700
    assert seconds < 20


def test_trailing_empty_cells_are_ignored(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nq,a" + "," * 1_000_000)
    (row,) = read(str(tmp_path / "a.csv"))
    assert row.data == {"question": "q", "answer": "a"}
