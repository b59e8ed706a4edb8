"""Every schema in every file format gives the same conversations; `docs/data.md` contains this matrix."""

import bz2
import csv
import gzip
import json
import lzma
import re
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reader_helpers import zstd
from row_shapes import SHAPES

from ftdata import read
from ftdata.schemas import normalize


def pretty(rows):
    return json.dumps(rows, indent=2, ensure_ascii=False)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def cells(rows):
    return [{k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in row.items()} for row in rows]


def file(name, text):
    def write(rows, folder):
        path = folder / name
        data = text(rows)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def table(name, delimiter):
    def write(rows, folder):
        with (folder / name).open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(cells(rows))
        return folder / name

    return write


def parquet(rows, folder):
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    return folder / "d.parquet"


def arrow(rows, folder):
    made = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "d.arrow"), "wb") as sink, pa.ipc.new_file(sink, made.schema) as writer:
        writer.write_table(made)
    return folder / "d.arrow"


def saved(rows, folder):
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def excel(rows, folder):
    pd.DataFrame(cells(rows)).to_excel(folder / "d.xlsx", index=False)
    return folder / "d.xlsx"


def columns(rows):
    return json.dumps({name: {str(n): row[name] for n, row in enumerate(rows)} for name in rows[0]})


CONTAINERS = {
    "JSON array": file("d.json", json.dumps),
    "JSON array, pretty": file("d.json", pretty),
    "JSON under a key": file("d.json", lambda rows: pretty({"version": 1, "data": rows})),
    "JSON, concatenated": file("d.json", lambda rows: "\n".join(map(pretty, rows))),
    "JSON by columns": file("d.json", columns),
    "JSON Lines": file("d.jsonl", lines),
    "JSON Lines .gz": file("d.jsonl.gz", lambda rows: gzip.compress(lines(rows).encode())),
    "JSON Lines .bz2": file("d.jsonl.bz2", lambda rows: bz2.compress(lines(rows).encode())),
    "JSON Lines .xz": file("d.jsonl.xz", lambda rows: lzma.compress(lines(rows).encode())),
    "JSON Lines .zst": file("d.jsonl.zst", lambda rows: zstd(lines(rows).encode())),
    "JSON Lines, UTF-16": file("d.jsonl", lambda rows: lines(rows).encode("utf-16")),
    "CSV": table("d.csv", ","),
    "TSV": table("d.tsv", "\t"),
    "Excel": excel,
    "Parquet": parquet,
    "Arrow": arrow,
    "`save_to_disk`": saved,
    "`DataFrame`": lambda rows, _: pd.DataFrame(rows),
    "`Dataset`": lambda rows, _: datasets.Dataset.from_list(rows),
    "`IterableDataset`": lambda rows, _: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "`DatasetDict`": lambda rows, _: datasets.DatasetDict(train=datasets.Dataset.from_list(rows)),
    "iterable of dicts": lambda rows, _: iter(rows),
}


CANNOT = {}
"""(shape, container) -> what the format cannot store, such as a line break; the table has a – there."""

CELLS = [
    pytest.param(shape, container, marks=[pytest.mark.xfail(strict=True)] if (shape, container) in CANNOT else ())
    for shape in SHAPES
    for container in CONTAINERS
]


@pytest.mark.parametrize(("shape", "container"), CELLS)
def test_every_shape_in_every_container(tmp_path, container, shape):
    rows = [SHAPES[shape]] * 2
    expected = normalize(next(read([SHAPES[shape]])))
    for found in map(normalize, read(CONTAINERS[container](rows, tmp_path))):
        assert (found.schema, found.messages, found.tools, found.text) == (
            expected.schema, expected.messages, expected.tools, expected.text
        )  # fmt: skip
        assert found.fields == expected.fields
        if expected.tokens is not None:
            assert found.tokens.input_ids.tolist() == expected.tokens.input_ids.tolist()
            assert found.tokens.trained.tolist() == expected.tokens.trained.tolist()


def test_table_in_the_docs_equals_this_matrix():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    head, *body = re.findall(
        r"^\|(.*)\|$", text.partition("## Formats and schemas")[2].partition("\n## ")[0], re.MULTILINE
    )
    assert [cell.strip() for cell in head.split("|")][1:] == list(SHAPES)
    found = [[cell.strip() for cell in line.split("|")] for line in body[1:]]
    assert [line[0] for line in found] == list(CONTAINERS), "docs/data.md has a row for each container, in this order"
    for name, *cells in found:
        assert cells == ["–" if (shape, name) in CANNOT else "✓" for shape in SHAPES], name
