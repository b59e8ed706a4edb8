"""Measure the memory of a build of one large file, after each gigabyte and at the peak.

    python benchmarks/speed/large.py --tokenizer FOLDER --data chats.jsonl [--gigabytes 10] [--workers 2]

The rows contain turns of the given conversations in random orders, with at least 2 kB each. A tenth of the file is
repeated ten times. The build packs sequences of 8,192 tokens. The disk must have four times as much space as the file.
The memory includes all processes, without the memory that imports need.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import orjson
from counting import cpu, own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        built(Path(given.child), given.tokenizer, given.workers)
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        file = Path(scratch) / "large.jsonl"
        written(file, Path(given.data), int(given.gigabytes * 1e9))
        command = [sys.executable, __file__, "--child", str(file), "--tokenizer", given.tokenizer, "--data", given.data]
        command += ["--workers", str(given.workers)]
        subprocess.run(command, check=True, env={**os.environ, "FTDATA_CACHE": "off"})  # noqa: S603


def written(file: Path, data: Path, size: int) -> None:
    chance = random.Random(0)  # noqa: S311
    talks = [orjson.loads(line)["messages"] for line in data.read_bytes().splitlines()]
    pairs = [talk[at : at + 2] for talk in talks for at in range(talk[0]["role"] == "system", len(talk) - 1, 2)]
    tenth = file.with_name("tenth.jsonl")
    with tenth.open("wb") as target:
        while target.tell() < size / 10:
            talk, least = [], chance.randint(100, 1500)
            while sum(len(message["content"]) for message in talk) < least:
                talk += chance.choice(pairs)
            target.write(orjson.dumps({"messages": talk}) + b"\n")
    with file.open("wb") as target:
        for _ in range(10):
            with tenth.open("rb") as source:
                shutil.copyfileobj(source, target)


def built(file: Path, tokenizer: str, workers: int) -> None:
    from ftdata.build.dataset import write_build

    imported, most, told = own(), [0.0], [(0.0, 0.0)]

    def watch() -> None:
        while True:
            most[0] = max(most[0], own())
            time.sleep(0.2)

    def progress(rows: int, tokens: int, share: float | None) -> None:
        if share is not None and share >= told[-1][0] + 0.1:
            told.append((share, own() - imported))
            print(f"{share:4.0%} read: {rows:,} rows, {tokens:,} tokens, {told[-1][1]:,.0f} MB of its own", flush=True)

    threading.Thread(target=watch, daemon=True).start()
    report = write_build(
        file, tokenizer, file.parent / "built", template="chatml", packing="bfd", max_length=8192, overlong="truncate",
        workers=workers, progress=progress,
    )  # fmt: skip
    size, train, used = file.stat().st_size / 1e9, report.splits["train"], cpu()
    (first, before), (last, after) = told[2], told[-1]
    print(f"{size:.1f} GB: {train['examples']:,} conversations, {train['tokens']:,} tokens")
    print(f"{used:,.0f} CPU s, {report.seconds:,.0f} s, {most[0] - imported:,.0f} MB of its own at most")
    print(f"{(after - before) / (last - first) / size:+.1f} MB for each GB that is read")


if __name__ == "__main__":
    main()
