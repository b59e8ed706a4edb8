"""Large files are read in parts: rows and positions do not depend on the part size."""

import json
import random
from dataclasses import asdict
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import often

from ftdata import preview
from ftdata.build import store
from ftdata.build.dataset import write_build
from ftdata.build.pack import best_fit_decreasing, plan_packs
from ftdata.errors import InputRefused, UsageError
from ftdata.readers import file_parts, resolve_sources
from ftdata.readers.file_parts import split_into_parts
from ftdata.types import Reject

LINES = [
    '{"question": "q", "answer": "a"}',
    '{"question": "a longer question, so that parts end inside of it", "answer": "äöü \u2028 日本"}',
    '{"half',
    "",
    "  ",
    "7",
    '\ufeff{"question": "with a mark", "answer": "x"}',
    '{"question": "q", "answer": "' + "long " * 60 + '"}',
]


def places(found):
    """Yield each row or reject with its position; rows and lines are counted across all parts of a file."""
    rows = lines = 0
    for source in found:
        before, reading = (rows, lines), source.rows()
        while True:
            try:
                one = next(reading)
            except StopIteration as end:
                lines += end.value or 0
                break
            place = one.source._replace(
                row=before[0] + one.source.row, line=one.source.line and before[1] + one.source.line
            )
            yield (one.code, one.reason) if isinstance(one, Reject) else one.data, place
            rows += 1


@pytest.fixture
def small(monkeypatch):
    """Return a function that sets the part size in bytes."""
    return lambda size: monkeypatch.setattr(file_parts, "PART", size)


@often(300)
@given(
    lines=st.lists(st.sampled_from(LINES), min_size=3, max_size=30),
    newline=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    suffix=st.sampled_from(["jsonl", "json"]),
    size=st.integers(1, 700),
)
def test_parts_contain_the_rows_of_the_whole_file(tmp_path_factory, lines, newline, last, suffix, size):
    # So that it is seen to be lines, whatever comes.
    lines = [LINES[0], LINES[0], *lines, LINES[0]]
    path = tmp_path_factory.mktemp("parts") / f"data.{suffix}"
    path.write_bytes((newline.join(lines) + (newline if last else "")).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_parts, "PART", size)
        found = split_into_parts(resolve_sources(path))
        assert len(found) > 1 or path.stat().st_size <= 1.5 * size
        assert sum(one.size for one in found) == path.stat().st_size
        assert list(places(found)) == list(places(resolve_sources(path)))


def test_only_files_of_lines_are_split(tmp_path, small):
    small(10)
    rows = [{"question": "q" * 40, "answer": "a"}] * 3
    for name, text in {
        "array.json": json.dumps(rows),
        "pretty.json": "\n".join(json.dumps(row, indent=1) for row in rows),
        "wide.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode("utf-16"),
        "table.csv": "question,answer\n" + 'q,"a\nb"\n' * 9,
    }.items():
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        assert split_into_parts(resolve_sources(tmp_path / name)) == list(resolve_sources(tmp_path / name)), name
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sliced = resolve_sources({"path": tmp_path / "lines.jsonl", "split": "train[:2]"})
    assert split_into_parts(sliced) == list(sliced)


def test_parquet_files_are_split_by_row_groups(tmp_path, small):
    table = pa.table({"question": [f"q{n}" for n in range(100)], "answer": [str(n) for n in range(100)]})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=9)
    small(200)
    found = split_into_parts(resolve_sources(tmp_path / "d.parquet"))
    assert len(found) > 3
    assert list(places(found)) == list(places(resolve_sources(tmp_path / "d.parquet")))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_build_does_not_depend_on_the_part_size(tmp_path, tokenizer_dir, small):
    dice = random.Random(0)
    (tmp_path / "a.jsonl").write_text("".join(dice.choice(LINES) + "\n" for _ in range(300)))
    pq.write_table(pa.table({"question": ["q"] * 50, "answer": ["a"] * 50}), tmp_path / "b.parquet", row_group_size=7)
    data = [str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.parquet"), "weight": 2}, str(tmp_path / "a.jsonl")]
    options = {"on_bad_rows": "quarantine", "max_rejects": "90%", "packing": "bfd", "max_length": 256}
    built = []
    for size in (1 << 30, 5000, 777, 100):
        small(size)
        report = write_build(data, tokenizer_dir("tiny_bpe"), tmp_path / f"out{size}", **options)
        found = files(tmp_path / f"out{size}")
        del found["manifest.json"]  # which says by what parts it was asked for
        # The encoder depends on the amount of text that this process has encoded.
        built.append((asdict(report) | {"seconds": 0, "encoder": ""}, found))
        assert store.verify_files(tmp_path / f"out{size}") == []
    for one in built[1:]:
        assert one == built[0]


def test_large_file_without_rows_is_refused(tmp_path, tokenizer_dir, small):
    (tmp_path / "a.jsonl").write_text("\n" * 1000)
    small(100)
    with pytest.raises(InputRefused, match="no_rows"):
        write_build(str(tmp_path / "a.jsonl"), tokenizer_dir("tiny_bpe"), tmp_path / "out")


def test_packing_windows_contain_every_example_once(monkeypatch):
    lengths = [random.Random(0).randint(1, 50) for _ in range(1000)]
    for window in (7, 100, 1000, 5000):
        monkeypatch.setattr("ftdata.build.pack.WINDOW", window)
        plan = plan_packs(lengths, 64)
        assert sorted(plan.order.tolist()) == list(range(1000))
        assert max(sum(lengths[one] for one in pack) for pack in plan.packs) <= 64
        firsts = [min(pack) // window for pack in plan.packs]
        assert firsts == sorted(firsts) == [max(pack) // window for pack in plan.packs]
        if window >= 1000:
            assert plan.packs == best_fit_decreasing(lengths, 64).packs
    assert plan_packs([], 64).packs == []


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_line_number_of_an_error_is_exact(tmp_path):
    """G4: 200 faults at random lines, in files of 1 kB to 1 GB."""
    dice = random.Random(4)
    path, sizes = tmp_path / "data.jsonl", [10 ** dice.uniform(3, 9) for _ in range(198)] + [1e9, 1e9]
    for number, size in enumerate(sizes):
        row = json.dumps({"question": "q" * dice.randint(0, 2000), "answer": "a"}).encode() + dice.choice(
            [b"\n", b"\r\n", b"\n\n"]
        )
        count = max(1, int(size / len(row)))
        at = dice.randrange(count)
        with path.open("wb") as out:
            for first in range(0, at, 1000):
                out.write(row * min(1000, at - first))
            out.write(b'{"question": "q", "answer" "a"}\n')
            for first in range(0, count - at, 1000):
                out.write(row * min(1000, count - at - first))
        found = split_into_parts(resolve_sources(path))
        # Where the others are whole, only their lines are wanted.
        lines = list(accumulate((_lines_of(one) for one in found), initial=0))
        rejects = [
            (before, one)
            for before, source in zip(lines, found, strict=False)
            for one in source.rows()
            if isinstance(one, Reject)
        ]
        ((before, reject),) = rejects
        assert before + reject.source.line == at * row.count(b"\n") + 1, (number, size)
        assert reject.source.offset == at * len(row)


def _lines_of(source):
    reading = source.rows()
    while True:
        try:
            next(reading)
        except StopIteration as end:
            return end.value or 0


def test_part_depends_on_the_byte_before_it(tmp_path, tokenizer_dir, small, monkeypatch):
    """If that byte is no longer a line break, the part starts inside a line, although its own bytes are unchanged."""
    monkeypatch.setenv("FTDATA_CACHE", str(tmp_path / "cache"))
    row = '{"question": "q", "answer": "a"}'
    (tmp_path / "a.jsonl").write_text(f"{row}\n" * 4)
    small(len(row) + 1)
    options = {"on_bad_rows": "quarantine", "max_rejects": 4}
    whole = write_build(str(tmp_path / "a.jsonl"), tokenizer_dir("tiny_bpe"), tmp_path / "out", **options)
    assert whole.totals["built"] == 4
    (tmp_path / "a.jsonl").write_text(f"{row}\n{row} {row}\n{row}\n")
    joined = write_build(str(tmp_path / "a.jsonl"), tokenizer_dir("tiny_bpe"), tmp_path / "out", **options)
    assert (joined.totals["read"], joined.totals["built"]) == (3, 2)


def test_options_of_the_mask_that_do_not_apply_to_text_are_reported(tokenizer_dir, tmp_path):
    rows = [{"text": "formatted"}, {"question": "q", "answer": "a"}]
    report = write_build(rows, tokenizer_dir("tiny_bpe"), tmp_path / "a", turns="joint", train_parts=["answer"])
    assert "1 row with formatted text or tokens, to which train_parts and turns do not apply" in str(report)
    assert "formatted text or tokens" not in str(write_build(rows, tokenizer_dir("tiny_bpe"), tmp_path / "b"))


def test_builds_with_another_tokenizer_are_not_combined(tokenizer_dir, tmp_path):
    """Their ids would be read as other tokens."""
    rows = [{"question": "q", "answer": "a"}]
    write_build(rows, tokenizer_dir("tiny_bpe"), tmp_path / "a")
    (tmp_path / "d.json").write_text(json.dumps(rows))
    for data in (tmp_path / "a", [str(tmp_path / "a"), str(tmp_path / "d.json")]):
        with pytest.raises(UsageError, match="was built with another tokenizer"):
            write_build(data, tokenizer_dir("qwen"), tmp_path / "b")
    with pytest.raises(UsageError, match="was built with another tokenizer"):
        preview([str(tmp_path / "a"), str(tmp_path / "a")], tokenizer_dir("qwen"))
    assert write_build([str(tmp_path / "a")], tokenizer_dir("tiny_bpe"), tmp_path / "b").total("built") == 1
