"""Measure the work of the coordinating process for as many shards as a cluster may have.

    python benchmarks/speed/scale.py [--shards 1000000] [--rows 200000000] [--tokenizer FOLDER --built 2000]

The script plans the shards (remote files of 10 MB, and parts of 64 MB of one file), merges synthetic reports, writes
the manifest, and plans packed sequences for the rows. With a tokenizer, it also builds and resumes tiny files, to
measure the cost of a shard without rows.
"""

import argparse
import json
import pickle
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=200_000_000)
    parser.add_argument("--tokenizer")
    parser.add_argument("--built", type=int, default=2_000)
    given = parser.parse_args()
    planned(given.shards)
    packed(given.rows)
    if given.tokenizer:
        built(given.tokenizer, given.built)


@contextmanager
def measured(what: str) -> Iterator[list[str]]:
    more: list[str] = []
    began = time.perf_counter()
    yield more
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        "; ".join([f"{what}: {time.perf_counter() - began:.1f} s", *more, f"{peak:,.0f} MB so far at most"]), flush=True
    )


def planned(count: int) -> None:
    from ftdata.build.ledger import Ledger
    from ftdata.build.merge_shards import MergedShards
    from ftdata.build.shards import ShardResult, Task
    from ftdata.readers.file_parts import PART, split_into_parts
    from ftdata.readers.sources import FileSource
    from ftdata.storage import disk

    files = [FileSource(f"s3://bucket/data/{n:07d}.jsonl.gz", "jsonl", length=10_000_000) for n in range(count)]
    home = Path("/shared/out")
    with measured(f"{count:,} files of 10 MB ({count / 1e5:.0f} TB) planned") as more:
        tasks = [Task(one, home, number) for number, one in enumerate(split_into_parts(files))]
        more.append(f"{len(tasks):,} tasks of {len(pickle.dumps(tasks[0]))} bytes")
    with measured("1 TB and 100 TB of lines in parts"):
        for size in (10**12, 10**14):
            part = max(PART, size // (1 << 15))
            print(f"{size / 1e12:.0f} TB in one file: {size // part:,} parts of {part / 1e6:,.0f} MB", flush=True)
    with measured(f"reports of {count:,} shards joined") as more:
        counts = {"read": 5000, "built": 5000, "examples": 5000, "tokens_in": 10**6, "tokens_kept": 10**6}
        results = [
            ShardResult(task, home, Ledger(task.source.path, **counts), 5000, "tokenizers", f"{task.number:032x}")
            for task in tasks
        ]
        joined = MergedShards(results)
        more.append(f"{sum(one.read for one in joined.ledgers):,} rows")
    with measured("their part of manifest and report") as more:
        sources = [{"split": one.split, **one.share._asdict()} for one in joined.sources]
        written = disk.encode_json({"sources": sources}) + disk.encode_json(
            {"rows": [one.as_dict() for one in joined.ledgers]}
        )
        more.append(f"{len(written) / 1e6:,.0f} MB")
    with measured("a key for all of them") as more:
        text = json.dumps([asdict(one) for one in tasks[:1000]], default=str)
        more.append(f"{len(text) / 1000:.0f} bytes each")


def packed(rows: int) -> None:
    from ftdata.build.pack import plan_packs as plan

    lengths = np.random.default_rng(0).lognormal(6, 1, rows).clip(8, 8192).astype(np.int32)
    with measured(f"packs of 8,192 planned for {rows:,} rows, {lengths.sum() / 1e9:,.0f} billion tokens") as more:
        found = plan(lengths, 8192)
        more.append(f"{len(found):,} packs, {lengths.sum(dtype=np.int64) / len(found) / 8192:.2%} full")


def built(tokenizer: str, count: int) -> None:
    from ftdata.build.dataset import write_build

    with tempfile.TemporaryDirectory() as scratch:
        data, out = Path(scratch) / "data", Path(scratch) / "out"
        data.mkdir()
        for number in range(count):
            (data / f"{number:06d}.jsonl").write_text(json.dumps({"question": f"q{number}", "answer": "a"}) + "\n")
        with measured(f"{count:,} files of one row built"):
            write_build(str(data), tokenizer, out)
        with measured("found to be built"):
            write_build(str(data), tokenizer, out)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
