"""Split expressions: the same rows as in `datasets`, for any number of files."""

import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftdata import read
from ftdata.errors import UsageError
from ftdata.readers import resolve_sources, split_expressions

BOUND = st.none() | st.integers(-12, 30).map(str) | st.integers(-100, 120).map("{}%".format)


@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4), start=BOUND, stop=BOUND)
def test_slice_equals_that_of_the_list_of_all_rows(sizes, start, stop):
    rows = [(file, row) for file, size in enumerate(sizes) for row in range(size)]
    bounds = [
        None if one is None else round(int(one[:-1]) * len(rows) / 100) if one.endswith("%") else int(one)
        for one in (start, stop)
    ]
    counts = [lambda enough, size=size: size if enough is None else min(size, enough) for size in sizes]
    found = [
        row
        for number, first, last in split_expressions.split_ranges(
            split_expressions.SplitPart("train", start, stop), counts
        )
        for row in [(number, at) for at in range(sizes[number])][first:last]
    ]
    assert found == rows[slice(*bounds)]


def test_files_are_counted_only_as_far_as_needed():
    def never(enough):
        raise AssertionError

    assert list(
        split_expressions.split_ranges(
            split_expressions.SplitPart("train", None, "5"), [lambda enough: min(9, enough), never]
        )
    ) == [(0, 0, 5)]
    assert list(
        split_expressions.split_ranges(
            split_expressions.SplitPart("train", "5"), [lambda enough: min(9, enough), never]
        )
    ) == [
        (0, 5, None),
        (1, 0, None),
    ]


@pytest.mark.parametrize(
    "split", ["train[:10%]", "train[-7:]", "train[33%:66%]", "train[3:5]+test", "test+train", "test[1:]"]
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_slices_equal_those_of_datasets(tmp_path, split, kind):
    given_rows = {name: [{"text": f"{name} {n}"} for n in range(size)] for name, size in (("train", 37), ("test", 5))}
    made = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in given_rows.items()})
    made.save_to_disk(tmp_path / "saved")
    expected = []
    for part in split.split("+"):
        name, _, bounds = part.partition("[")
        path = tmp_path / f"{name}.{kind}"
        made[name].to_json(path) if kind == "jsonl" else made[name].to_parquet(path)
        found = datasets.load_dataset(
            "json" if kind == "jsonl" else kind,
            data_files=str(path),
            split=f"train[{bounds or ':]'}",
            cache_dir=tmp_path / "cache",
        )
        expected += found["text"]
    found = resolve_sources({"path": tmp_path / "saved", "split": split})
    assert [row.data["text"] for one in found for row in one.rows()] == expected
    assert [one.split for one in found] == [None if "+" in split else split.partition("[")[0]] * len(found)
    alone = resolve_sources({"path": path, "split": f"train[{bounds or ':]'}"})
    assert [row.data["text"] for one in alone for row in one.rows()] == found_of(expected, name)


def found_of(texts, name):
    return [text for text in texts if text.startswith(name)]


def test_invalid_split_expressions_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "t"}) + "\n")
    for split, code in (("train[", "split"), ("train[1]", "split"), ("tset", "no_split"), ("train[5:]", "no_rows")):
        with pytest.raises(UsageError) as refused:
            resolve_sources({"path": path, "split": split})
        assert refused.value.code == code
    with pytest.raises(UsageError, match="in memory"):
        list(read({"path": datasets.Dataset.from_list([{"text": "t"}]), "split": "train[:1]"}))
