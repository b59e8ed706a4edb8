"""Files that are more than they seem are refused in words, in seconds, and in bounded memory."""

import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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


FILES = {
    "line of 100 MB": ("a.jsonl", lambda path: path.write_bytes(b'{"question": "' + b"x" * 100 * MEGABYTE + b'", "answer": "a"}\n'), "line_too_long"),
    "1 GiB in one line": ("a.jsonl.gz", packed(b"x", 1024), "line_too_long|expansion"),
    "1 GiB of blank lines": ("a.jsonl.gz", packed(b"\n", 1024), "no_rows|expansion"),
    "1 GiB of brackets": ("a.json.gz", packed(b"[", 1024), "too_deep"),
    "1 GiB of blanks": ("a.csv.gz", packed(b" ", 1024), "line_too_long|expansion"),
    "long text": ("a.jsonl", lambda path: path.write_text(json.dumps({"question": "q", "answer": "word " * 2_400_000})), "row_too_long"),
    "long cell": ("a.parquet", table(question=["z" * 300_000_000], answer=["a"]), "row_too_long"),
    "dictionary": ("a.parquet", table(question=repeated("y" * 100 * MEGABYTE, 20), answer=["a"] * 20), "expansion|row_too_long"),
    "columns": ("a.jsonl", lambda path: path.write_text(json.dumps({f"c{n}": 1 for n in range(1_000_000)})), "schema"),
    "names": ("a.csv", lambda path: path.write_text(",".join(f"c{n}" for n in range(1_000_000)) + "\n" + "v," * 999_999 + "v\n"), "schema"),
    "open quote": ("a.csv", lambda path: path.write_bytes(b'question,answer\n"' + b"q a\n" * 15_000_000), "csv"),
    "nested": ("a.json", lambda path: path.write_bytes(b'{"a":' * 2_000_000), "too_deep"),
}  # fmt: skip


MEASURED = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "ftdata", *sys.argv[1:]], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stdout + done.stderr, used.ru_maxrss >> 10, used.ru_utime + used.ru_stime]))
"""
QUICK = ("line of 100 MB", "1 GiB in one line", "long cell", "columns")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in FILES]
)
def test_a_bomb_is_refused(name, tmp_path, tokenizer_dir):
    """At most 700 MB and 20 s (of processor time: others may be at work here); 100 MB and 1 s are spent on imports."""
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
