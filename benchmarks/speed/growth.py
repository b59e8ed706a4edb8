"""Measure how CPU time and memory grow with the number of rows, with one process and with two.

    python benchmarks/speed/growth.py --tokenizer FOLDER [--rows 1000 10000 100000 1000000] [--workers 1 2]

The rows are synthetic, have 1 kB each, and are in four files. CPU time and peak memory include all processes. `own` is
the memory without memory-mapped files. The cache is not used.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from counting import own
from prep import vocabulary, words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(built(Path(given.child), given.tokenizer, given.workers[0])))
        return
    print("| rows | workers | CPU s | wall s | rows a CPU second | million tokens | peak MB | own MB |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for count in given.rows:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
            written(Path(scratch), count)
            for workers in given.workers:
                one = child(scratch, given.tokenizer, workers)
                print(
                    f"| {count:,} | {workers} | {one['cpu']:.1f} | {one['wall']:.1f} | {count / one['cpu']:,.0f} | "
                    f"{one['tokens'] / 1e6:.1f} | {one['peak']:,.0f} | {one['own']:,.0f} |",
                    flush=True,
                )


def written(folder: Path, count: int) -> None:
    chance = random.Random(count)  # noqa: S311
    for number in range(4):
        with (folder / f"{number}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(count // 4):
                known = vocabulary(chance)
                talk = [
                    {"role": role, "content": words(chance, known, 10, 70)}
                    for _ in range(chance.randint(1, 3))
                    for role in ("user", "assistant")
                ]
                file.write(json.dumps({"messages": talk}, ensure_ascii=False) + "\n")


def child(folder: str, tokenizer: str, workers: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", folder, "--tokenizer", tokenizer, "--workers", str(workers)]
    began = time.perf_counter()
    environment = {**os.environ, "FTDATA_CACHE": "off"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": time.perf_counter() - began}


def built(folder: Path, tokenizer: str, workers: int) -> dict[str, Any]:
    import threading

    from ftdata.build.dataset import write_build

    most = [0.0]

    def watch() -> None:
        while True:
            most[0] = max(most[0], own())
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()
    data = [str(path) for path in sorted(folder.glob("*.jsonl"))]
    report = write_build(data, tokenizer, folder / "built", template="chatml", workers=workers)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in usage)
    peak = usage[0].ru_maxrss / 1024 + (workers * usage[1].ru_maxrss / 1024 if workers > 1 else 0)
    return {"cpu": cpu, "peak": peak, "own": most[0], "tokens": report.splits["train"]["tokens"]}


if __name__ == "__main__":
    main()
